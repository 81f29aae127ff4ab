//! `status.dirtyRate`: what launchers measure each minute, told to everybody when it is news.

use godwit_api::vmi::{DirtyRate, DirtySample, VirtualMachineInstance};
use godwit_launcher::rpc::{MemoryFacts, Written};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

/// Not written anew within this time.
const EVERY: SignedDuration = SignedDuration::from_mins(3);
/// A round of measurements ends with one of at least this many milliseconds; before that it is not the whole of it.
const WHOLE_MS: u64 = 3_000;
/// Changes that are less than one part in so many are none.
const MARKED: u64 = 4;
/// Nor are those of less than so many bytes a second.
const LEAST: u64 = 1 << 20;
/// Of the memory that is there, one part in so many of all that the guest has.
const PART: u64 = 16;

/// What is to be written, if anything is: the first whole round, later what differs markedly. Never while a migration is under
/// way, whose own passes tell more.
#[must_use]
pub fn news(vmi: &VirtualMachineInstance, memory: &MemoryFacts) -> Option<DirtyRate> {
    let migration = vmi.status.migration_state.as_ref();
    if migration.is_some_and(|state| state.migration_uid.is_some() && state.completed != Some(true)) {
        return None;
    }
    let longest = memory.written.last().filter(|longest| longest.within_ms >= WHOLE_MS)?;
    let measured = Timestamp::from_microsecond(memory.measured_us?).ok()?;
    if let Some(old) = &vmi.status.dirty_rate {
        // Clocks of nodes may differ, and the guest may have come from another.
        let early = old.measured_at.as_ref().is_some_and(|at| measured.duration_since(at.0).abs() < EVERY);
        if early || !differs(old, memory, longest) {
            return None;
        }
    }
    let sample =
        |one: &Written| DirtySample { within_milliseconds: one.within_ms, bytes: one.bytes, margin_bytes: one.margin };
    Some(DirtyRate {
        measured_at: Timestamp::from_second(measured.as_second()).ok().map(Time),
        bytes_per_second: Some(longest.rate()),
        memory_bytes: Some(memory.total_bytes),
        present_bytes: Some(memory.present_bytes),
        one_pass: Some(memory.one_pass),
        samples: memory.written.iter().map(sample).collect(),
    })
}

fn differs(old: &DirtyRate, memory: &MemoryFacts, longest: &Written) -> bool {
    // Another QEMU, or another size.
    if old.memory_bytes != Some(memory.total_bytes) || old.one_pass != Some(memory.one_pass) {
        return true;
    }
    if old.present_bytes.unwrap_or(0).abs_diff(memory.present_bytes) > memory.total_bytes / PART {
        return true;
    }
    let before = old.samples.last();
    let before =
        before.map(|one| Written { within_ms: one.within_milliseconds, bytes: one.bytes, margin: one.margin_bytes });
    let Some(before) = before else { return true };
    // Whatever lies between what both may be is chance.
    let sure = [before, *longest].map(|one| Written { bytes: one.margin, ..one }.rate());
    let (old, new) = (before.rate(), longest.rate());
    let least = (old.max(new) / MARKED).max(LEAST).max(sure[0].saturating_add(sure[1]));
    old.abs_diff(new) > least
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MI: u64 = 1 << 20;
    const BOOT: i64 = 1_763_668_800_000_000;

    fn memory(rate: u64, seconds: i64) -> MemoryFacts {
        let at = |within_ms| Written { within_ms, bytes: rate * within_ms / 1000, margin: MI };
        MemoryFacts {
            total_bytes: 512 * MI,
            present_bytes: 100 * MI,
            written: [1000, 2000, 4000].map(at).into(),
            measured_us: Some(BOOT + seconds * 1_000_000),
            one_pass: false,
        }
    }

    fn vmi(known: Option<DirtyRate>) -> VirtualMachineInstance {
        let mut vmi: VirtualMachineInstance = serde_json::from_value(json!({"metadata": {"name": "a"}})).unwrap();
        vmi.status.dirty_rate = known;
        vmi
    }

    #[test]
    fn the_first_whole_round_is_told() {
        assert_eq!(news(&vmi(None), &MemoryFacts::default()), None, "an older launcher measures nothing");
        let mut half = memory(10 * MI, 0);
        half.written.pop();
        assert_eq!(news(&vmi(None), &half), None);
        let told = news(&vmi(None), &memory(10 * MI, 0)).unwrap();
        assert_eq!(told.bytes_per_second, Some(10 * MI));
        assert_eq!(
            (told.memory_bytes, told.present_bytes, told.one_pass),
            (Some(512 * MI), Some(100 * MI), Some(false))
        );
        assert_eq!(told.measured_at.as_ref().unwrap().0.to_string(), "2025-11-20T20:00:00Z");
        let shortest = DirtySample { within_milliseconds: 1000, bytes: 10 * MI, margin_bytes: MI };
        assert_eq!((told.samples.len(), &told.samples[0]), (3, &shortest));
    }

    #[test]
    fn later_only_what_differs_and_not_often() {
        let known = vmi(news(&vmi(None), &memory(10 * MI, 0)));
        let tells = |memory: &MemoryFacts| news(&known, memory).is_some();
        assert!(!tells(&memory(40 * MI, 60)), "too early");
        assert!(tells(&memory(40 * MI, 180)));
        assert!(tells(&memory(0, 240)), "it has become quiet");
        assert!(!tells(&memory(12 * MI, 3600)), "about the same");
        let grown = MemoryFacts { present_bytes: 400 * MI, ..memory(10 * MI, 240) };
        assert!(tells(&grown));
        assert!(tells(&MemoryFacts { one_pass: true, ..memory(10 * MI, 240) }), "another QEMU");
        assert!(tells(&memory(40 * MI, -7200)), "a node's clock that is behind");
        let mut unsure = memory(40 * MI, 240);
        unsure.written[2].margin = 200 * MI;
        assert!(!tells(&unsure), "that may be chance");
    }

    #[test]
    fn nothing_is_told_while_it_moves() {
        let mut moves = vmi(None);
        moves.status.migration_state =
            serde_json::from_value(json!({"migrationUid": "m", "sourceNode": "node1"})).unwrap();
        assert_eq!(news(&moves, &memory(10 * MI, 0)), None);
        moves.status.migration_state.as_mut().unwrap().completed = Some(true);
        assert!(news(&moves, &memory(10 * MI, 0)).is_some());
    }
}
