//! How fast a guest writes to its memory, and how much of it is there.

use super::{Error, Qemu};
use crate::forecast::Written;
use crate::qmp::commands::{self, DirtyRateStatus, VersionTriple};
use std::time::Duration;

/// Between two questions whether a measurement is over.
const ASK_EVERY: Duration = Duration::from_millis(10);
/// How long it may take beyond its time.
const LATE: Duration = Duration::from_secs(5);
/// Pages that are looked at, of a guest of any size: enough to tell a tenth of it to 2 %.
const SAMPLED: u64 = 4096;
/// So many a GiB QEMU takes at least (its default), and at most.
const PER_GIB: (u64, u64) = (512, 16384);
/// More than QEMU's address space takes around the guest's memory where both are in one mapping.
const AROUND: u64 = 8 << 20;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

impl Qemu {
    /// Over which times it can measure, in milliseconds, the shortest first. QEMU before 8.2 counts in seconds.
    pub fn write_windows(&self) -> &'static [u64] {
        if self.counts_milliseconds() { &[100, 300, 1000, 3000] } else { &[1000, 2000, 4000] }
    }

    fn counts_milliseconds(&self) -> bool {
        self.version >= VersionTriple { major: 8, minor: 2, micro: 0 }
    }

    /// How much of its memory the guest writes to within one of [`Qemu::write_windows`]; takes that long.
    ///
    /// Some pages are looked at twice and compared. This costs the guest nothing, works with each accelerator, and also while
    /// the guest is sent. (The bitmap would tell it exactly under KVM, but each first write to a page would then cost the
    /// guest a fault; under TCG it says 0 whatever is written.)
    ///
    /// One at a time: QEMU (7.2 to 10.0) may take a second order before it has noted the first, and mix them up.
    pub async fn written_within(&self, window_ms: u64) -> Result<Written, Error> {
        let per_gib = (SAMPLED * GIB / self.memory.max(1)).clamp(PER_GIB.0, PER_GIB.1);
        let milliseconds = self.counts_milliseconds();
        let ask = commands::CalcDirtyRate {
            calc_time: if milliseconds { window_ms } else { window_ms / 1000 },
            calc_time_unit: milliseconds.then_some("millisecond"),
            sample_pages: per_gib,
        };
        self.qmp.execute(&ask).await?;
        let window = Duration::from_millis(window_ms);
        let measured = async {
            tokio::time::sleep(window).await;
            loop {
                let answer = self.qmp.execute(&commands::QueryDirtyRate {}).await?;
                match (answer.status, answer.dirty_rate) {
                    (DirtyRateStatus::Measured, Some(rate)) => return Ok(rate),
                    _ => tokio::time::sleep(ASK_EVERY).await,
                }
            }
        };
        let rate = tokio::time::timeout(window + LATE, measured).await.unwrap_or(Err(Error::Unsupported(
            "QEMU does not come to an end of measuring how fast the guest writes",
        )))?;
        Ok(written(self.memory, per_gib, window_ms, u64::try_from(rate).unwrap_or(0)))
    }

    /// Bytes of the guest's memory.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// How many bytes of the guest's memory are there; none where the system does not tell.
    pub fn memory_present(&self) -> Option<u64> {
        // Another QEMU may have brought it here, so that this one has mapped little of it yet.
        if let Some(memory) = &self.shared_memory {
            return memory.present_bytes().ok().map(|bytes| bytes.min(self.memory));
        }
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", self.process.pid())).ok()?;
        present(&maps, self.memory)
    }
}

/// QEMU tells whole MiB a second, cut off, of the pages that it looked at.
fn written(memory: u64, per_gib: u64, window_ms: u64, mib_per_second: u64) -> Written {
    let a_mib = MIB as f64 * window_ms as f64 / 1000.0;
    // 0 is less than one, or nothing.
    let bytes = if mib_per_second == 0 { 0.0 } else { (mib_per_second as f64 + 0.5) * a_mib };
    let pages = per_gib as f64 * memory as f64 / GIB as f64;
    Written::sampled(memory, pages, window_ms, bytes, a_mib / 2.0)
}

/// What is there of the mapping that holds the guest's memory (proc(5), `/proc/pid/smaps`).
fn present(maps: &str, memory: u64) -> Option<u64> {
    let mut size = 0;
    let mut found = None;
    for line in maps.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let kib = || value.trim().strip_suffix(" kB").and_then(|kib| kib.trim().parse::<u64>().ok());
        match key {
            "Size" => size = kib().unwrap_or(0) * 1024,
            "Rss" if size >= memory && size <= memory.saturating_add(AROUND) => {
                found = found.max(kib().map(|kib| (kib * 1024).min(memory)));
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measurement_knows_by_how_much_it_may_be_wrong() {
        // Half of 1 GiB in a second, of 4096 pages: 1.6 % of a GiB each way, and half a MiB.
        let half = written(GIB, 4096, 1000, 512);
        assert_eq!(half.bytes, 512 * MIB + MIB / 2);
        assert!((16 * MIB..18 * MIB).contains(&half.margin), "{}", half.margin);
        let nothing = written(GIB, 4096, 1000, 0);
        assert_eq!(nothing.bytes, 0);
        assert!((MIB..2 * MIB).contains(&nothing.margin), "{}", nothing.margin);
        assert!(written(16 * MIB, 16384, 100, 3).bytes < MIB);
        assert_eq!(written(16 * MIB, 16384, 1000, 500).bytes, 16 * MIB, "never more than there is");
    }

    #[test]
    fn the_guests_memory_is_found_by_its_size() {
        let maps = "\
7f0000000000-7f0040000000 rw-p 00000000 00:00 0 
Size:            1048576 kB
KernelPageSize:        4 kB
Rss:              102400 kB
Pss:              102400 kB
VmFlags: rd wr mr mw me ac sd
7f0050000000-7f0051000000 rw-p 00000000 00:00 0 
Size:              16384 kB
Rss:               16384 kB
";
        assert_eq!(present(maps, GIB), Some(100 * MIB));
        assert_eq!(present(maps, 16 * MIB), Some(16 * MIB));
        assert_eq!(present(maps, 64 * MIB), None);
        assert_eq!(present("", GIB), None);
    }
}
