//! Many runs, some at the same time, each on a guest of its own.

use super::error::Error;
use super::guest::Guest;
use super::judge::Outcome;
use super::plan::{self, Manner};
use super::report;
use super::run::{Report, has_ended, run, was_fenced};
use super::stage::Stage;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many runs.
    pub runs: u32,
    /// The first of them, to repeat one of another night.
    pub first: u32,
    /// Decides about victims and moments.
    pub seed: u64,
    /// Guests that are moved at the same time.
    pub parallel: u32,
    /// The longest that a fault lasts.
    pub longest: Duration,
    /// Where to keep the cluster's files; none: a scratch folder, which stays only when a promise was broken.
    pub data_dir: Option<PathBuf>,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// The runs in order of their numbers.
    pub reports: Vec<Report>,
}

impl Summary {
    /// How many runs broke a promise.
    #[must_use]
    pub fn broken(&self) -> usize {
        self.reports.iter().filter(|report| !report.broken.is_empty()).count()
    }
}

/// Carries out the runs, and prints each as it ends and all together.
///
/// # Errors
/// What keeps the cluster from being there. A promise that is broken is in the summary.
pub async fn night(options: &Options) -> Result<Summary, Error> {
    let scratch = match &options.data_dir {
        Some(_) => None,
        None => Some(tempfile::Builder::new().prefix("godwit-faults-").tempdir_in("/var/tmp").map_err(|source| {
            Error::Io { what: "make a scratch folder in", path: PathBuf::from("/var/tmp"), source }
        })?),
    };
    let folder = match (&options.data_dir, &scratch) {
        (Some(folder), _) => folder.clone(),
        (None, Some(scratch)) => scratch.path().to_owned(),
        (None, None) => PathBuf::new(),
    };
    println!("seed {}: runs {} to {}, {} at a time", options.seed, options.first, options.end(), options.parallel);
    let mut summary = Summary::default();
    let done = tokio::select! {
        done = attack(options, &folder, &mut summary) => done,
        interrupted = interruption() => interrupted,
    };
    let down = godwit_standalone::down(&folder);
    if (summary.broken() > 0 || !matches!(done, Ok(()) | Err(Error::Interrupted)))
        && let Some(scratch) = scratch
    {
        println!("everything that was said is kept in {}", scratch.keep().display());
    }
    summary.reports.sort_by_key(|report| report.number);
    report::print_all(&summary);
    done?;
    down?;
    Ok(summary)
}

/// Waits for SIGINT or SIGTERM.
async fn interruption() -> Result<(), Error> {
    let io = |source| Error::Io { what: "listen to signals of", path: PathBuf::from("/proc/self"), source };
    let mut terminate = signal(SignalKind::terminate()).map_err(io)?;
    tokio::select! {
        pressed = tokio::signal::ctrl_c() => pressed.map_err(io)?,
        _ = terminate.recv() => {}
    }
    Err(Error::Interrupted)
}

impl Options {
    /// The number after the last run's.
    fn end(&self) -> u32 {
        self.first.saturating_add(self.runs)
    }
}

/// What the lanes share.
struct Night {
    options: Options,
    stage: Arc<Stage>,
    kept: PathBuf,
    next: AtomicU32,
    guests: AtomicU32,
    /// A promise was broken: no new runs begin, so that what led to it is not buried.
    enough: AtomicBool,
}

async fn attack(options: &Options, folder: &Path, summary: &mut Summary) -> Result<(), Error> {
    let stage = Arc::new(Stage::start(folder).await?);
    let kept = stage.layout.root().join("launchers");
    std::fs::create_dir_all(&kept).map_err(|source| Error::Io { what: "make", path: kept.clone(), source })?;
    let night = Arc::new(Night {
        options: options.clone(),
        stage,
        kept,
        next: AtomicU32::new(options.first),
        guests: AtomicU32::new(1),
        enough: AtomicBool::new(false),
    });
    let (tell, mut reports) = mpsc::unbounded_channel();
    let mut lanes = tokio::task::JoinSet::new();
    for _ in 0..options.parallel.max(1) {
        lanes.spawn(lane(night.clone(), tell.clone()));
    }
    drop(tell);
    while let Some(report) = reports.recv().await {
        report::print(&report);
        summary.reports.push(report);
    }
    while let Some(ended) = lanes.join_next().await {
        match ended {
            Ok(ended) => ended?,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
    Ok(())
}

/// Runs one after another, each kind of guest for as long as it lives.
async fn lane(night: Arc<Night>, tell: mpsc::UnboundedSender<Report>) -> Result<(), Error> {
    let mut guests: Vec<Guest> = Vec::new();
    loop {
        let number = night.next.fetch_add(1, Ordering::Relaxed);
        if number >= night.options.end() || night.enough.load(Ordering::Relaxed) {
            return Ok(());
        }
        let strike = plan::strike(night.options.seed, number, night.options.longest);
        let disk = strike.manner == Manner::Disk;
        let mut known = guests.iter().position(|guest| guest.disk == disk).map(|place| guests.swap_remove(place));
        // Between two runs another lane's faults may have had its node fence it.
        if let Some(guest) = &known
            && has_ended(&night.stage, guest).await
            && was_fenced(&night.stage, guest).await
        {
            guest.remove(&night.stage).await;
            known = None;
        }
        let current = match known {
            Some(guest) => guest,
            None => {
                let new = Guest::new(night.guests.fetch_add(1, Ordering::Relaxed), disk);
                new.start(&night.stage).await?;
                new
            }
        };
        let report = run(&night.stage, &current, number, strike, &night.kept).await;
        let report = report.inspect_err(|_| night.enough.store(true, Ordering::Relaxed))?;
        if report.outcome == Outcome::Lost {
            current.remove(&night.stage).await;
        } else {
            guests.push(current);
        }
        if !report.broken.is_empty() {
            night.enough.store(true, Ordering::Relaxed);
        }
        if tell.send(report).is_err() {
            return Ok(());
        }
    }
}
