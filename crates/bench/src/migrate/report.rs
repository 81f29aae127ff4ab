//! What was measured: as data, and as a table for people.

use super::figures::{Figures, Spread};
use super::goals::{Judgement, judge};
use super::{Line, Options, Way};
use godwit_qemu::accelerator::Accelerator;
use serde::Serialize;
use std::fmt;
use std::path::Path;

/// Where it was measured.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Machine {
    /// Processor.
    pub cpu: String,
    /// How many of them.
    pub cpus: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Kernel.
    pub kernel: String,
    /// What executed the guests.
    pub accelerator: String,
    /// QEMU, as it names itself.
    pub qemu: String,
    /// libvirt's version, where it was measured.
    pub libvirt: Option<String>,
    /// The load (1 minute) when the run began: other people's work on the same processors.
    pub load_at_start: f64,
}

impl Machine {
    /// This machine.
    pub fn look(qemu: &Path, accelerator: Accelerator) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, key: &str| {
            let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
            line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let version = std::process::Command::new(qemu).arg("--version").output();
        let version = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kib: u64 = memory.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or_default();
        Machine {
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: kib / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            accelerator: accelerator.to_string(),
            qemu: version.lines().next().unwrap_or_default().to_owned(),
            libvirt: None,
            load_at_start: super::run::load(),
        }
    }
}

/// A line in one way.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// The line.
    pub line: Line,
    /// The way.
    pub way: Way,
    /// Its moves.
    pub runs: Vec<Figures>,
}

impl Entry {
    /// A figure over the moves after which the guest was whole.
    pub fn spread(&self, figure: impl Fn(&Figures) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.runs.iter().filter(|run| run.is_sound()).filter_map(figure))
    }

    /// What there is to show: the moves after which the guest was whole, or if there was none, those in which it moved at all.
    fn shown(&self) -> Vec<&Figures> {
        let some = |wanted: &dyn Fn(&Figures) -> bool| self.runs.iter().filter(|run| wanted(run)).collect::<Vec<_>>();
        let sound = some(&Figures::is_sound);
        if sound.is_empty() { some(&|run| run.failure.is_none()) } else { sound }
    }

    /// Why the guest did not move, if it did not.
    pub fn failure(&self) -> Option<&str> {
        self.runs.iter().find_map(|run| run.failure.as_deref())
    }
}

/// What is not in the report, and why.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LeftOut {
    /// What.
    pub what: String,
    /// Why.
    pub why: String,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// When it was taken.
    pub taken_at: String,
    /// Where.
    pub machine: Machine,
    /// Moves that were wanted of each line and way.
    pub runs: usize,
    /// A move that took longer was given up, in seconds.
    pub limit_seconds: f64,
    /// What the link carries without a cap (one stream of QEMU's, or as it was given); what loads are a part of. None when there
    /// was no load.
    pub link_bytes_per_second: Option<u64>,
    /// The measurements.
    pub entries: Vec<Entry>,
    /// What is missing.
    pub left_out: Vec<LeftOut>,
}

impl Report {
    /// With nothing in it yet.
    pub fn new(machine: Machine, options: &Options) -> Self {
        Report {
            taken_at: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            machine,
            runs: options.runs,
            limit_seconds: options.limit.as_secs_f64(),
            link_bytes_per_second: None,
            entries: Vec::new(),
            left_out: Vec::new(),
        }
    }

    /// The goals, met or missed.
    pub fn goals(&self) -> Vec<Judgement> {
        judge(&self.entries)
    }

    /// As JSON, the goals included.
    pub fn json(&self) -> serde_json::Value {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        value["goals"] = serde_json::to_value(self.goals()).unwrap_or_default();
        value
    }
}

/// One move in a few words.
pub fn in_short(figures: &Figures) -> String {
    if let Some(failure) = &figures.failure {
        return format!("did not move: {failure}");
    }
    let number = |value: Option<f64>| value.map_or_else(|| "-".into(), |n| format!("{n:.1}"));
    let mut text = format!(
        "{:.0} ms in all, standstill {} ms (witness {} ms), ping gap {:.0} ms with {} lost, {:.1} MiB, {:.2} s of CPU",
        figures.total_ms,
        number(figures.standstill_ms),
        number(figures.witness.around_resume_ms),
        figures.ping_gap_ms,
        figures.pings_lost,
        figures.wire_bytes as f64 / MIB,
        figures.cpu_seconds,
    );
    if figures.damaged_pages > 0 {
        text += &format!(", {} PAGES DAMAGED", figures.damaged_pages);
    }
    if let Some(wrong) = &figures.wrong {
        text += &format!(", WRONG: {wrong}");
    }
    text
}

const MIB: f64 = 1024.0 * 1024.0;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let m = &self.machine;
        writeln!(
            f,
            "{} · {} × {} · {} MiB · Linux {} · {} · {}{}",
            self.taken_at,
            m.cpus,
            m.cpu,
            m.memory_mib,
            m.kernel,
            m.qemu,
            m.accelerator,
            m.libvirt.as_ref().map(|version| format!(" · libvirt {version}")).unwrap_or_default()
        )?;
        writeln!(
            f,
            "load of the machine at the start: {:.2}; medians of up to {} moves, (least..most); ! after these moves the guest was lost or damaged: \
             no goal is held against them",
            m.load_at_start, self.runs
        )?;
        if let Some(link) = self.link_bytes_per_second {
            writeln!(
                f,
                "the link: {:.0} MiB/s without a cap; loads are per cent of that, or of the cap",
                link as f64 / MIB
            )?;
        }
        let mut last = None;
        for entry in &self.entries {
            if last != Some(entry.line) {
                writeln!(f, "\n{}", entry.line)?;
                cells(f, COLUMNS.map(|(name, _)| name.to_owned()))?;
                last = Some(entry.line);
            }
            row(f, entry)?;
        }
        if !self.left_out.is_empty() {
            writeln!(f, "\nLeft out")?;
            for left in &self.left_out {
                writeln!(f, "  {}: {}", left.what, left.why)?;
            }
        }
        let goals = self.goals();
        if !goals.is_empty() {
            writeln!(f, "\nGoals")?;
            for goal in &goals {
                writeln!(f, "  {goal}")?;
            }
        }
        Ok(())
    }
}

/// The columns' names and widths; cells are set off by two blanks.
const COLUMNS: [(&str, usize); 16] = [
    ("way", 13),
    ("total ms", 18),
    ("transfer ms", 18),
    ("ready ms", 8),
    ("standstill ms", 20),
    ("witness ms", 10),
    ("QEMU says", 9),
    ("ping gap ms", 11),
    ("lost", 4),
    ("wire MiB", 8),
    ("MiB/s", 6),
    ("CPU s", 6),
    ("passes", 6),
    ("foretold ms", 11),
    ("off %", 5),
    ("standstill off ms", 17),
];

fn cells(f: &mut fmt::Formatter<'_>, cells: [String; COLUMNS.len()]) -> fmt::Result {
    for (number, (cell, (_, width))) in cells.into_iter().zip(COLUMNS).enumerate() {
        if number == 0 { write!(f, "  {cell:<width$}")? } else { write!(f, "  {cell:>width$}")? }
    }
    writeln!(f)
}

fn row(f: &mut fmt::Formatter<'_>, entry: &Entry) -> fmt::Result {
    let shown = entry.shown();
    let over = |figure: &dyn Fn(&Figures) -> Option<f64>| Spread::of(shown.iter().filter_map(|run| figure(run)));
    let spread = |figure: &dyn Fn(&Figures) -> Option<f64>, digits: usize| match over(figure) {
        None => "-".to_owned(),
        Some(s) if shown.len() == 1 => format!("{:.digits$}", s.median),
        Some(s) => format!("{:.digits$} ({:.digits$}..{:.digits$})", s.median, s.min, s.max),
    };
    let median = |figure: &dyn Fn(&Figures) -> Option<f64>, digits: usize| {
        over(figure).map_or_else(|| "-".to_owned(), |s| format!("{:.digits$}", s.median))
    };
    let lost = shown.iter().map(|run| run.pings_lost).reduce(|a, b| a + b);
    cells(
        f,
        [
            // Figures of a guest that was lost are shown, and said to be that.
            format!("{}{}", entry.way.name(), if shown.iter().any(|run| !run.is_sound()) { "!" } else { "" }),
            spread(&|run| Some(run.total_ms), 0),
            spread(&|run| run.transfer_ms, 0),
            median(&|run| run.target_ready_ms, 0),
            spread(&|run| run.standstill_ms, 1),
            median(&|run| run.witness.around_resume_ms, 1),
            median(&|run| run.qemu_downtime_ms.map(|ms| ms as f64), 0),
            median(&|run| Some(run.ping_gap_ms), 0),
            lost.map_or_else(|| "-".to_owned(), |lost| lost.to_string()),
            median(&|run| Some(run.wire_bytes as f64 / MIB), 1),
            median(&|run| run.bytes_per_second.map(|rate| rate / MIB), 0),
            median(&|run| Some(run.cpu_seconds), 2),
            median(&|run| Some(run.passes as f64), 0),
            median(&|run| run.foretold.and_then(|foretold| foretold.total_ms), 0),
            median(&|run| run.total_error_percent, 0),
            median(&|run| run.standstill_error_ms, 0),
        ],
    )?;
    for (number, run) in entry.runs.iter().enumerate() {
        let mut say = |text: String| writeln!(f, "    move {}: {text}", number + 1);
        if let Some(failure) = &run.failure {
            say(format!("did not move: {failure}"))?;
        }
        if run.damaged_pages > 0 {
            say(format!("{} PAGES OF THE GUEST'S MEMORY DAMAGED", run.damaged_pages))?;
        }
        if let Some(wrong) = &run.wrong {
            say(format!("WRONG: {wrong}"))?;
        }
    }
    Ok(())
}
