//! `godwit bench local`: what a guest notices of a new launcher on its own node, by how much memory it has. Its memory goes by
//! reference, and for comparison by copy within the same node.

use crate::migrate::lab::{Lab, Workload, booted};
use crate::migrate::ours::Ours;
use crate::migrate::plan::Mebibytes;
use crate::migrate::{Bandwidth, Error};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Duration;

/// More than any memory: QEMU's own guest, its firmware and its devices are some hundred KiB.
const FEW_BYTES: u64 = 4 << 20;

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The guests' memory.
    pub memory: Vec<Mebibytes>,
    /// How many moves of each guest.
    pub moves: usize,
    /// Folder with the guest's `vmlinuz` and `initrd`.
    pub guest: PathBuf,
    /// How long a move may take.
    pub limit: Duration,
}

/// How a guest's memory came to its new launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Memory {
    /// Both launchers map the same.
    ByReference,
    /// Copied within the node.
    Copied,
}

/// One move.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Leg {
    /// The guest's memory in MiB, of which half is filled and 10 MiB a second are written.
    pub memory_mib: u64,
    /// How it came.
    pub memory: Memory,
    /// From the VMIM's creation to `Succeeded`.
    pub total_ms: f64,
    /// From QEMU's first word of the migration to the guest's `RESUME`.
    pub sending_ms: Option<f64>,
    /// `STOP` in the old launcher to `RESUME` in the new one.
    pub standstill_ms: Option<f64>,
    /// Bytes sent, by QEMU's count.
    pub bytes: Option<u64>,
    /// Why the guest did not move.
    pub failure: Option<String>,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The moves in order.
    pub moves: Vec<Leg>,
    /// Everything that must not be.
    pub wrong: Vec<String>,
}

impl Report {
    /// Whether every move was made, and as it should be.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.wrong.is_empty()
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{:>9} {:>13} {:>10} {:>12} {:>12} {:>12}",
            "memory", "by", "total ms", "sending ms", "standstill", "sent"
        )?;
        let ms = |ms: Option<f64>| ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1}"));
        for leg in &self.moves {
            writeln!(
                f,
                "{:>5} MiB {:>13} {:>10.0} {:>12} {:>9} ms {:>8} KiB{}",
                leg.memory_mib,
                if leg.memory == Memory::ByReference { "reference" } else { "copy" },
                leg.total_ms,
                ms(leg.sending_ms),
                ms(leg.standstill_ms),
                leg.bytes.map_or_else(|| "-".to_owned(), |bytes| (bytes >> 10).to_string()),
                leg.failure.as_ref().map(|failure| format!("  {failure}")).unwrap_or_default(),
            )?;
        }
        self.wrong.iter().try_for_each(|wrong| writeln!(f, "WRONG: {wrong}"))
    }
}

/// Starts a cluster, and one guest after another in it. `tell` gets a line for a person now and then.
///
/// # Errors
/// What kept it from being measured. A guest that does not move, or not well, is in the report.
pub async fn run(options: &Options, tell: &mut dyn FnMut(&str)) -> Result<Report, Error> {
    let lab = Lab::with_cluster(&options.guest).await?;
    let guest = lab.guest().await?;
    let mut report = Report::default();
    for size in &options.memory {
        for memory in [Memory::ByReference, Memory::Copied] {
            let work = Workload::filled(*size, Bandwidth::Unlimited, memory == Memory::ByReference);
            let mut ours = Ours::boot(&lab, &work).await?;
            let before = booted(&guest).await?;
            for _ in 0..options.moves {
                let moved = ours.renew(options.limit).await?;
                let between =
                    |from: Option<i64>, to: Option<i64>| from.zip(to).map(|(from, to)| (to - from) as f64 / 1e3);
                let leg = Leg {
                    memory_mib: size.0,
                    memory,
                    total_ms: (moved.over_us - moved.asked_us) as f64 / 1e3,
                    sending_ms: between(moved.sending_us, moved.resume_us),
                    standstill_ms: between(moved.stop_us, moved.resume_us),
                    bytes: moved.qemu_bytes,
                    failure: moved.failure,
                };
                tell(&format!("{} MiB, {memory:?}: {:.0} ms", size.0, leg.total_ms));
                let what = format!("{} MiB, {memory:?}", size.0);
                report.wrong.extend(leg.failure.as_ref().map(|failure| format!("{what}: {failure}")));
                if memory == Memory::ByReference && leg.bytes.is_none_or(|bytes| bytes > FEW_BYTES) {
                    report.wrong.push(format!("{what}: {:?} bytes were sent", leg.bytes));
                }
                report.moves.push(leg);
            }
            let after = guest.facts().await?;
            if after.token != before.token || after.checksum != before.checksum || after.corrupt_pages > 0 {
                report.wrong.push(format!("{} MiB, {memory:?}: the guest's memory is not what it was", size.0));
            }
            ours.end().await?;
        }
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_move_is_a_line_and_what_is_wrong_is_said() {
        let leg = Leg {
            memory_mib: 4096,
            memory: Memory::ByReference,
            total_ms: 301.0,
            sending_ms: Some(6.2),
            standstill_ms: Some(3.07),
            bytes: Some(300 << 10),
            failure: None,
        };
        let mut report = Report { moves: vec![leg], wrong: Vec::new() };
        let text = report.to_string();
        assert!(report.is_good() && text.contains(" 4096 MiB     reference        301"), "{text}");
        assert!(text.contains("3.1 ms      300 KiB"), "{text}");
        report.wrong.push("it was copied".into());
        assert!(!report.is_good() && report.to_string().contains("WRONG: it was copied"));
    }
}
