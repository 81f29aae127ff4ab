//! `godwit bench …`: instruments that put a cluster of their own to the test.

use crate::args::{Bench, BenchDrain, BenchFaults, BenchLocal, BenchMigrate, BenchStorage, BenchStreams, Output};
use anyhow::Context;
use godwit_bench::faults;
use godwit_bench::migrate::{self, Options, Report};
use godwit_bench::{drain, local, storage, streams};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// Carries one out.
pub async fn run(bench: Bench) -> anyhow::Result<ExitCode> {
    match bench {
        Bench::Migrate(wanted) => migrations(wanted).await,
        Bench::Faults(wanted) => attack(wanted).await,
        Bench::Streams(wanted) => talk(wanted).await,
        Bench::Storage(wanted) => keep(wanted).await,
        Bench::Local(wanted) => renew(wanted).await,
        Bench::Drain(wanted) => empty(wanted).await,
        Bench::Controller(wanted) => unless_ended(crate::footprint::run(wanted)).await?,
    }
}

async fn migrations(wanted: BenchMigrate) -> anyhow::Result<ExitCode> {
    let options = options(&wanted);
    let lines = options.lines().len() * options.ways.len();
    eprintln!("bench: {lines} lines of {} moves each", options.runs);
    let begun = std::time::Instant::now();
    let mut tell = |text: &str| eprintln!("{:>6.0} s  {text}", begun.elapsed().as_secs_f64());
    let report = unless_ended(migrate::run(&options, &mut tell)).await??;
    if let Some(folder) = &wanted.out {
        write(&report, folder)?;
    }
    match wanted.output {
        Output::Text => print!("{report}"),
        Output::Json => println!("{}", serde_json::to_string_pretty(&report.json())?),
    }
    Ok(ExitCode::SUCCESS)
}

/// Carries a measurement out. When it is broken off it is dropped, and with it everything that it has started.
async fn unless_ended<T>(work: impl Future<Output = T>) -> anyhow::Result<T> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        done = work => Ok(done),
        _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
        _ = terminate.recv() => anyhow::bail!("terminated"),
    }
}

async fn talk(wanted: BenchStreams) -> anyhow::Result<ExitCode> {
    let BenchStreams { moves, connections, guest, limit, output } = wanted;
    let options = streams::Options { moves, connections, guest, limit: Duration::from_secs(limit) };
    let begun = std::time::Instant::now();
    let mut tell = |text: &str| eprintln!("{:>6.0} s  {text}", begun.elapsed().as_secs_f64());
    let report = unless_ended(streams::run(&options, &mut tell)).await??;
    match output {
        Output::Text => print!("{report}"),
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    Ok(if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn keep(wanted: BenchStorage) -> anyhow::Result<ExitCode> {
    let BenchStorage { moves, bandwidth, guest, limit, output } = wanted;
    let options = storage::Options { moves, bandwidth, guest, limit: Duration::from_secs(limit) };
    let begun = std::time::Instant::now();
    let mut tell = |text: &str| eprintln!("{:>6.0} s  {text}", begun.elapsed().as_secs_f64());
    let report = unless_ended(storage::run(&options, &mut tell)).await??;
    match output {
        Output::Text => print!("{report}"),
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    Ok(if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn renew(wanted: BenchLocal) -> anyhow::Result<ExitCode> {
    let BenchLocal { memory, moves, guest, limit, output } = wanted;
    let options = local::Options { memory, moves, guest, limit: Duration::from_secs(limit) };
    let begun = std::time::Instant::now();
    let mut tell = |text: &str| eprintln!("{:>6.0} s  {text}", begun.elapsed().as_secs_f64());
    let report = unless_ended(local::run(&options, &mut tell)).await??;
    match output {
        Output::Text => print!("{report}"),
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    Ok(if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn empty(wanted: BenchDrain) -> anyhow::Result<ExitCode> {
    let BenchDrain { guests, simulated, bandwidth, parallel, seed, limit, output } = wanted;
    let limit = Duration::from_secs(limit);
    let options = drain::Options { guests, simulated, bandwidth, parallel, seed, limit };
    let begun = std::time::Instant::now();
    let mut tell = |text: &str| eprintln!("{:>6.0} s  {text}", begun.elapsed().as_secs_f64());
    let report = unless_ended(drain::run(&options, &mut tell)).await??;
    match output {
        Output::Text => print!("{report}"),
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    Ok(if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn options(wanted: &BenchMigrate) -> Options {
    let mut memory = wanted.memory.clone();
    if wanted.all {
        memory = ["512Mi", "1Gi", "4Gi"].into_iter().filter_map(|size| size.parse().ok()).collect();
    }
    Options {
        memory,
        load: wanted.load.clone(),
        bandwidth: wanted.bandwidth.clone(),
        ways: wanted.ways.clone(),
        runs: wanted.runs.max(1),
        guest: wanted.guest.clone(),
        link: wanted.link.map(|link| link.0 << 20),
        limit: Duration::from_secs(wanted.limit),
    }
}

/// `report.json`, `report.txt` and a picture of each line.
fn write(report: &Report, folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let json = serde_json::to_string_pretty(&report.json())?;
    let mut files = vec![("report.json".to_owned(), json), ("report.txt".to_owned(), report.to_string())];
    files.extend(migrate::plot::plots(report));
    for (name, text) in files {
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

async fn attack(wanted: BenchFaults) -> anyhow::Result<ExitCode> {
    let BenchFaults { runs, seed, first, parallel, longest, data_dir } = wanted;
    let longest = Duration::try_from_secs_f64(longest).context("--longest")?;
    let seed = seed.unwrap_or_else(|| (u64::from(std::process::id()) << 32) | u64::from(clock()));
    let summary = faults::night(&faults::Options { runs, first, seed, parallel, longest, data_dir }).await?;
    Ok(if summary.broken() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Something that differs from one invocation to the next.
fn clock() -> u32 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.subsec_nanos())
}
