//! One migration as one QEMU sees it: what its events and numbers add up to. Pure; [`crate::instance`] does the talking.
//!
//! ```text
//! source:  setup → active ⟲ passes → (STOP) device → completed      the guest has left, this QEMU stays stopped for ever
//!                    ├→ (STOP) postcopy-active → completed           the guest has left with the switch
//!                    │                  ⇅ postcopy-paused            the link broke, until there is another one
//!                    └→ cancelling → cancelled                      the guest runs on here
//!                    └→ failed (RESUME)                             the guest runs on here
//! target:  setup → active → completed                               loaded, stopped, waits for the go
//!                    ├→ postcopy-active (paused) → completed         stopped, waits for the go; memory follows
//!                    └→ failed, or QEMU exits                       nothing was run here
//! ```

use crate::accelerator::Accelerator;
use crate::failure::{self, Cause, Explanation};
use crate::forecast::Written;
use crate::qmp::Event;
use crate::qmp::commands::{MigrationInfo, MigrationStatus, VersionTriple};
use crate::transport::Transport;
use std::collections::VecDeque;

/// What an outgoing migration is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Most bytes a second; none is unlimited.
    pub bandwidth: Option<u64>,
    /// The longest standstill to accept, in milliseconds.
    pub max_downtime_ms: u64,
    /// Slow the guest down when it writes faster than the link carries.
    pub auto_converge: bool,
    /// It may go over to post-copy. The target has to be told the same.
    pub post_copy: bool,
    /// Memory stays where it is, because the target maps it too ([`crate::instance::Incoming::prepare_by_reference`]); only the
    /// rest of the machine is sent, over one connection and never in post-copy.
    pub by_reference: bool,
    /// How memory is carried. The target has to be told the same.
    pub transport: Transport,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            bandwidth: None,
            max_downtime_ms: 300,
            auto_converge: false,
            post_copy: false,
            by_reference: false,
            transport: Transport::default(),
        }
    }
}

/// How a guest moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Its memory is copied while it runs at the source.
    #[default]
    PreCopy,
    /// It was stopped so that the copying comes to an end.
    Paused,
    /// It runs at the target while the rest of its memory follows.
    PostCopy,
}

/// What is known of a migration. Times are microseconds since the Unix epoch, by this host's clock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// QEMU's word.
    pub status: MigrationStatus,
    /// How the guest moves.
    pub mode: Mode,
    /// When it began.
    pub start_us: Option<i64>,
    /// When the guest's CPUs stopped for it.
    pub stop_us: Option<i64>,
    /// When the guest's CPUs ran (again).
    pub resume_us: Option<i64>,
    /// When it reached its end.
    pub end_us: Option<i64>,
    /// Bytes of guest memory.
    pub total_bytes: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Bytes still to send.
    pub remaining_bytes: u64,
    /// Measured over the last looks, [`RATE_WINDOW_US`] at most; over all of it at the end. 0 until it can be told.
    pub bytes_per_second: u64,
    /// How fast the guest writes to its memory, as QEMU estimates it after each pass.
    pub dirty_bytes_per_second: u64,
    /// Passes over the memory.
    pub passes: u64,
    /// What each of the passes has shown that the guest writes to, the last [`WRITTEN_KEPT`] of them, the oldest first.
    pub written: Vec<Written>,
    /// The standstill allowed at present, in milliseconds.
    pub downtime_limit_ms: Option<u64>,
    /// From start to end by QEMU's count, in milliseconds.
    pub total_ms: Option<u64>,
    /// The standstill as this QEMU counts it, in milliseconds. Only one side's view.
    pub downtime_ms: Option<u64>,
    /// The standstill that QEMU expects if it switched over now, in milliseconds.
    pub expected_downtime_ms: Option<u64>,
    /// By how many per cent auto-converge slows the guest down.
    pub throttle_percent: Option<u64>,
    /// Why it failed.
    pub error: Option<String>,
    /// What kind of failure that is.
    pub cause: Option<Cause>,
    /// Since when post-copy has had no link.
    pub broken_us: Option<i64>,
    /// How often post-copy has gone on over another link.
    pub recoveries: u64,
}

impl Facts {
    /// Whether QEMU has said its last word.
    pub fn is_final(&self) -> bool {
        is_final(self.status)
    }
}

fn is_final(status: MigrationStatus) -> bool {
    matches!(status, MigrationStatus::Completed | MigrationStatus::Failed | MigrationStatus::Cancelled)
}

/// How many passes' measurements are kept.
pub const WRITTEN_KEPT: usize = 16;

/// Over how long the rate is measured at most, in microseconds.
const RATE_WINDOW_US: i64 = 1_000_000;
/// Less than this between two looks is not worth a look.
const LOOK_APART_US: i64 = 50_000;
/// Before this has passed, no rate is told.
const FIRST_RATE_US: u64 = 250_000;

/// Adds up events and numbers. Both ends use it.
#[derive(Clone, Debug)]
pub struct Tracker {
    facts: Facts,
    /// Events before this one are taken already, or belong to an earlier migration of the same QEMU (its own arrival, or a
    /// failed try).
    from_event: u64,
    /// Time and bytes sent at the last looks, the oldest first.
    looks: VecDeque<(i64, u64)>,
    /// QEMU's answers can only be about this migration, since it has had no other.
    only_one: bool,
    /// Bytes of disks to copy and copied, which count like memory.
    blocks: (u64, u64),
    /// The pass that QEMU last announced, and when.
    announced: (u64, i64),
    /// The pass that was last looked at, and when it began.
    looked_at: (u64, i64),
    /// How often QEMU has said that post-copy is under way.
    filled: u64,
    /// It was ordered to cancel before anything had gone wrong.
    cancels: bool,
}

impl Tracker {
    /// Begins with the event of this number.
    pub fn new(from_event: u64) -> Self {
        Tracker {
            facts: Facts::default(),
            from_event,
            looks: VecDeque::new(),
            only_one: false,
            blocks: (0, 0),
            announced: (0, 0),
            looked_at: (0, 0),
            filled: 0,
            cancels: false,
        }
    }

    /// For a QEMU that was started to receive.
    pub fn arriving() -> Self {
        Tracker { only_one: true, ..Tracker::new(0) }
    }

    /// What is known.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Takes an event of QEMU's.
    pub fn event(&mut self, event: &Event) {
        if event.number < self.from_event {
            return;
        }
        self.from_event = event.number + 1;
        match event.name.as_str() {
            "MIGRATION" => {
                let status = event.text("status").map_or(MigrationStatus::Other, MigrationStatus::from_name);
                if status == MigrationStatus::PostcopyActive {
                    // The first one is the switch.
                    self.facts.recoveries = self.filled;
                    self.filled += 1;
                }
                self.status(status, event.at_us);
            }
            "MIGRATION_PASS" => {
                let pass = event.data.get("pass").and_then(serde_json::Value::as_u64).unwrap_or(0);
                self.facts.passes = self.facts.passes.max(pass);
                self.announced = (pass, event.at_us);
            }
            // A STOP after the switchover's is not the switchover's; QEMU's last word may overtake it.
            "STOP" if self.facts.stop_us.is_none() || !self.facts.is_final() => self.facts.stop_us = Some(event.at_us),
            // Held for a moment while the sending begins (see `tracks_writes`): that was not the switchover.
            "RESUME" if matches!(self.facts.status, MigrationStatus::Setup | MigrationStatus::Active) => {
                self.facts.stop_us = None;
            }
            "RESUME" => self.facts.resume_us = Some(event.at_us),
            _ => {}
        }
    }

    fn status(&mut self, status: MigrationStatus, at_us: i64) {
        // QEMU shuts its socket before it notes that it cancels; when its sender is quicker it calls that a failure.
        let status =
            if status == MigrationStatus::Failed && self.cancels { MigrationStatus::Cancelled } else { status };
        // The last word stands.
        if self.facts.is_final() {
            if status == self.facts.status {
                self.facts.end_us = self.facts.end_us.map(|end| end.min(at_us));
            }
            return;
        }
        // A target up to QEMU 9.0 says so when it listens for another link.
        if status == MigrationStatus::Setup && self.facts.status.is_post_copy() {
            return;
        }
        self.facts.status = status;
        if status.is_post_copy() {
            self.facts.mode = Mode::PostCopy;
        }
        if status == MigrationStatus::PostcopyPaused {
            self.facts.broken_us.get_or_insert(at_us);
        }
        // What was said of the broken link is over with it.
        let flows = matches!(status, MigrationStatus::PostcopyActive | MigrationStatus::Completed);
        if flows && self.facts.broken_us.take().is_some() {
            (self.facts.error, self.facts.cause) = (None, None);
        }
        if status == MigrationStatus::Setup || status == MigrationStatus::Active {
            self.facts.start_us.get_or_insert(at_us);
        }
        if is_final(status) {
            self.facts.end_us = Some(at_us);
        }
        // QEMU's last numbers may be from before.
        if status == MigrationStatus::Completed {
            self.facts.remaining_bytes = 0;
        }
    }

    /// Takes the numbers that QEMU answers at this time.
    pub fn look(&mut self, info: &MigrationInfo, now_us: i64) {
        // Until the events of this migration come, QEMU still answers with the last one's end.
        if self.facts.status == MigrationStatus::None {
            if !self.only_one || info.status == MigrationStatus::None {
                return;
            }
            self.status(info.status, now_us);
        }
        if let Some(ram) = &info.ram {
            let (blocks, copied) = self.blocks;
            let sent = copied.saturating_add(ram.transferred);
            self.facts.total_bytes = blocks.saturating_add(ram.total);
            let remaining = blocks.saturating_sub(copied).saturating_add(ram.remaining);
            self.facts.remaining_bytes = if self.facts.status == MigrationStatus::Completed { 0 } else { remaining };
            self.facts.passes = self.facts.passes.max(ram.dirty_sync_count);
            self.pass(ram.dirty_sync_count, ram.remaining, info.status, now_us);
            self.facts.dirty_bytes_per_second = ram.dirty_pages_rate.saturating_mul(ram.page_size);
            self.sent(sent, now_us);
        }
        if let Some(total) = info.total_time {
            self.facts.total_ms = Some(total);
        }
        if let Some(downtime) = info.downtime {
            self.facts.downtime_ms = Some(downtime);
        }
        if self.facts.is_final() {
            self.facts.bytes_per_second = match self.facts.total_ms {
                Some(ms) if ms > 0 => self.facts.sent_bytes.saturating_mul(1000) / ms,
                _ => self.facts.bytes_per_second,
            };
        }
        self.facts.throttle_percent = info.cpu_throttle_percentage.filter(|percent| *percent > 0);
        self.facts.expected_downtime_ms = info.expected_downtime.or(self.facts.expected_downtime_ms);
        // In post-copy it is about a link, of which more is said elsewhere.
        if let Some(error) = info.error_desc.as_ref().filter(|_| !info.status.is_post_copy() && !self.cancels) {
            self.fail(error.clone());
        }
        // The answer may be ahead of the event on its way; the event brings the exact time.
        let turned = is_final(info.status) || info.status.is_post_copy() && info.status != self.facts.status;
        if turned && !self.facts.is_final() {
            self.status(info.status, now_us);
        }
    }

    fn sent(&mut self, sent: u64, now_us: i64) {
        self.facts.sent_bytes = sent;
        let Some(&(last, _)) = self.looks.back() else {
            self.looks.push_back((now_us, sent));
            return;
        };
        // Looks that are close together measure the buffers, not the link.
        if now_us.saturating_sub(last) < LOOK_APART_US {
            return;
        }
        self.looks.push_back((now_us, sent));
        while self.looks.len() > 2 && self.looks.get(1).is_some_and(|(at, _)| now_us - at >= RATE_WINDOW_US) {
            self.looks.pop_front();
        }
        let Some(&(first, before)) = self.looks.front() else { return };
        let elapsed = now_us.saturating_sub(first).unsigned_abs();
        // The first bytes only fill what lies between the two QEMUs.
        if elapsed >= FIRST_RATE_US {
            let bytes = sent.saturating_sub(before);
            self.facts.bytes_per_second = bytes.saturating_mul(1_000_000).checked_div(elapsed).unwrap_or(0);
        }
    }

    /// When a pass begins, what it has to send is what was written to during the one before.
    fn pass(&mut self, pass: u64, remaining: u64, status: MigrationStatus, now_us: i64) {
        let (last, last_began) = self.looked_at;
        if pass <= last {
            return;
        }
        let began = if self.announced.0 == pass { self.announced.1 } else { now_us };
        self.looked_at = (pass, began);
        let within_ms = u64::try_from((began - last_began) / 1000).unwrap_or(0);
        // A guest that stands still says nothing of what it writes.
        if last == 0 || within_ms == 0 || status != MigrationStatus::Active || self.facts.stop_us.is_some() {
            return;
        }
        if self.facts.written.len() >= WRITTEN_KEPT {
            self.facts.written.remove(0);
        }
        self.facts.written.push(Written { within_ms, bytes: remaining, margin: remaining / 50 });
    }

    /// The disks come first: how many bytes there are and how many of them are copied.
    pub(crate) fn blocks(&mut self, total: u64, copied: u64, now_us: i64) {
        self.blocks = (total, copied);
        self.facts.total_bytes = total;
        self.facts.remaining_bytes = total.saturating_sub(copied);
        self.status(MigrationStatus::Setup, now_us);
        self.sent(copied, now_us);
    }

    /// The same, beside the memory: counted with its next numbers.
    pub(crate) fn blocks_beside_memory(&mut self, total: u64, copied: u64) {
        self.blocks = (total, copied);
    }

    /// The memory follows: earlier events of QEMU's are about something else.
    pub(crate) fn memory_from(&mut self, event: u64) {
        self.from_event = event;
    }

    /// It ends before QEMU has begun with the memory.
    pub(crate) fn end(&mut self, status: MigrationStatus, error: Option<String>, now_us: i64) {
        self.status(status, now_us);
        if let Some(error) = error {
            self.fail(error);
        }
    }

    pub(crate) fn limit(&mut self, downtime_ms: u64) {
        self.facts.downtime_limit_ms = Some(downtime_ms);
    }

    pub(crate) fn mode(&mut self, mode: Mode) {
        self.facts.mode = mode;
    }

    /// QEMU is going to be told to cancel. What it then fails of is that, unless it has failed before.
    pub(crate) fn cancel(&mut self) {
        self.cancels = self.facts.error.is_none() && !self.facts.is_final();
    }

    /// The first reason stands.
    pub(crate) fn fail(&mut self, text: String) {
        if self.facts.error.is_none() {
            self.explained(Explanation { cause: failure::cause(&text), text });
        }
    }

    pub(crate) fn link_lost(&mut self, text: &str) {
        if self.facts.error.is_none() {
            self.explained(Explanation { cause: Cause::LinkLost, text: text.into() });
        }
    }

    /// A better reason than the one that was known.
    pub(crate) fn explained(&mut self, explanation: Explanation) {
        self.facts.cause = Some(explanation.cause);
        self.facts.error = Some(explanation.text);
    }
}

/// Whether a QEMU sees every page that the guest writes to between two passes over its memory.
///
/// The translator (TCG) of QEMU before 9.0 does not: when it takes stock of written pages while the guest runs, it leaves the
/// guest's write permissions cached, and pages written again through them are never sent. Measured with 7.2 and a Linux guest
/// that rewrites memory, capped at 64 MiB/s: damaged in 19 of 20 moves with several passes, in none of 12 with one. Such a
/// guest is sent in one pass ([`crate::forecast::DowntimeRamp::one_pass`]), and held for a moment at the beginning.
pub fn tracks_writes(accelerator: Accelerator, version: VersionTriple) -> bool {
    accelerator == Accelerator::Kvm || version >= VersionTriple { major: 9, minor: 0, micro: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::commands::RamInfo;
    use serde_json::json;

    fn event(number: u64, at_us: i64, name: &str, status: &str) -> Event {
        Event { number, at_us, name: name.into(), data: json!({"status": status}) }
    }

    /// What QEMU answers when it begins a pass.
    fn begins(pass: u64, remaining: u64, status: MigrationStatus) -> MigrationInfo {
        let ram = RamInfo { total: 1 << 30, remaining, dirty_sync_count: pass, page_size: 4096, ..RamInfo::default() };
        MigrationInfo { status, ram: Some(ram), ..MigrationInfo::default() }
    }

    #[test]
    fn each_pass_shows_what_was_written_during_the_one_before() {
        let mut tracker = Tracker::new(0);
        let event = |number, at_us, name: &str, data| Event { number, at_us, name: name.into(), data };
        tracker.event(&event(0, 0, "MIGRATION", serde_json::json!({ "status": "active" })));
        tracker.event(&event(1, 1_000, "MIGRATION_PASS", serde_json::json!({ "pass": 1 })));
        tracker.look(&begins(1, 1 << 30, MigrationStatus::Active), 5_000);
        tracker.look(&begins(1, 1 << 29, MigrationStatus::Active), 900_000);
        assert_eq!(tracker.facts().written, [], "the first pass sends what is there");
        tracker.event(&event(2, 2_001_000, "MIGRATION_PASS", serde_json::json!({ "pass": 2 })));
        tracker.look(&begins(2, 40 << 20, MigrationStatus::Active), 2_010_000);
        tracker.look(&begins(2, 30 << 20, MigrationStatus::Active), 2_200_000);
        // One was overlooked.
        tracker.look(&begins(4, 10 << 20, MigrationStatus::Active), 2_501_000);
        let written: Vec<_> = tracker.facts().written.iter().map(|w| (w.within_ms, w.bytes >> 20)).collect();
        assert_eq!(written, [(2000, 40), (500, 10)]);
        // Stopped for the switchover: what is left then it has not written within that time.
        tracker.event(&event(3, 2_600_000, "STOP", serde_json::Value::Null));
        tracker.look(&begins(5, 1 << 20, MigrationStatus::Active), 2_601_000);
        assert_eq!(tracker.facts().written.len(), 2);
    }

    #[test]
    fn nothing_remains_of_what_is_completed() {
        let mut tracker = Tracker::new(0);
        tracker.event(&event(0, 10, "MIGRATION", "active"));
        tracker.look(&begins(1, 1 << 20, MigrationStatus::Active), 20);
        tracker.event(&event(1, 30, "MIGRATION", "postcopy-active"));
        tracker.event(&event(2, 40, "MIGRATION", "completed"));
        assert_eq!(tracker.facts().remaining_bytes, 0, "the last look was before");
        tracker.look(&begins(1, 1 << 12, MigrationStatus::PostcopyActive), 41);
        assert_eq!(tracker.facts().remaining_bytes, 0, "an answer may be late");
    }

    #[test]
    fn a_flight_is_told_in_order() {
        let mut tracker = Tracker::new(0);
        for (n, (at, name, status)) in [
            (10, "MIGRATION", "setup"),
            (20, "MIGRATION", "active"),
            (30, "STOP", ""),
            (31, "MIGRATION", "device"),
            (40, "MIGRATION", "completed"),
        ]
        .into_iter()
        .enumerate()
        {
            tracker.event(&event(n as u64, at, name, status));
        }
        let facts = tracker.facts();
        assert_eq!((facts.start_us, facts.stop_us, facts.end_us), (Some(10), Some(30), Some(40)));
        assert!(facts.is_final());
        // The STOP of the QEMU that is told to quit is not the switchover's.
        tracker.event(&event(9, 99, "STOP", ""));
        assert_eq!(tracker.facts().stop_us, Some(30));
    }

    #[test]
    fn being_held_at_the_start_is_not_the_switchover() {
        let mut tracker = Tracker::new(0);
        for (n, (at, name, status)) in [
            (5, "STOP", ""),
            (10, "MIGRATION", "setup"),
            (15, "RESUME", ""),
            (20, "MIGRATION", "active"),
            (30, "STOP", ""),
            (40, "MIGRATION", "completed"),
        ]
        .into_iter()
        .enumerate()
        {
            tracker.event(&event(n as u64, at, name, status));
        }
        assert_eq!((tracker.facts().stop_us, tracker.facts().resume_us), (Some(30), None));
    }

    #[test]
    fn only_old_translators_lose_track_of_writes() {
        let version = |major, minor| VersionTriple { major, minor, micro: 0 };
        assert!(!tracks_writes(Accelerator::Tcg, version(7, 2)));
        assert!(tracks_writes(Accelerator::Kvm, version(7, 2)));
        assert!(tracks_writes(Accelerator::Tcg, version(10, 0)));
    }

    #[test]
    fn numbers_that_overtake_events_do_not_lose_them() {
        let mut tracker = Tracker::new(0);
        tracker.event(&event(0, 10, "MIGRATION", "active"));
        tracker.look(&MigrationInfo { status: MigrationStatus::Completed, ..MigrationInfo::default() }, 50);
        assert_eq!((tracker.facts().stop_us, tracker.facts().end_us), (None, Some(50)));
        tracker.event(&event(1, 30, "STOP", ""));
        tracker.event(&event(2, 40, "MIGRATION", "completed"));
        assert_eq!((tracker.facts().stop_us, tracker.facts().end_us), (Some(30), Some(40)));
        tracker.event(&event(1, 99, "STOP", ""));
        assert_eq!(tracker.facts().stop_us, Some(30), "taken already");
    }

    #[test]
    fn an_earlier_migration_of_the_same_qemu_is_not_this_one() {
        let mut tracker = Tracker::new(3);
        tracker.event(&event(2, 5, "MIGRATION", "completed"));
        let info = MigrationInfo { status: MigrationStatus::Completed, ..MigrationInfo::default() };
        tracker.look(&info, 6);
        assert_eq!(tracker.facts().status, MigrationStatus::None);
        tracker.event(&event(3, 7, "MIGRATION", "setup"));
        assert_eq!(tracker.facts().status, MigrationStatus::Setup);
    }

    /// Seen in CI with QEMU 7.2: `Unable to write to socket: Broken pipe` a moment after the order.
    #[test]
    fn what_fails_because_it_is_cancelled_is_cancelled() {
        let broken = MigrationInfo {
            status: MigrationStatus::Failed,
            error_desc: Some("Unable to write to socket: Broken pipe".into()),
            ..MigrationInfo::default()
        };
        let ended = |fails_first: bool| {
            let mut tracker = Tracker::new(0);
            tracker.event(&event(0, 1, "MIGRATION", "active"));
            if fails_first {
                tracker.fail("the link broke".into());
            }
            tracker.cancel();
            tracker.event(&event(1, 2, "MIGRATION", "failed"));
            tracker.look(&broken, 3);
            (tracker.facts().status, tracker.facts().error.clone())
        };
        assert_eq!(ended(false), (MigrationStatus::Cancelled, None));
        assert_eq!(ended(true), (MigrationStatus::Failed, Some("the link broke".into())));
    }

    #[test]
    fn the_last_word_stands() {
        let mut tracker = Tracker::new(0);
        tracker.event(&event(0, 1, "MIGRATION", "active"));
        tracker.event(&event(1, 2, "MIGRATION", "failed"));
        tracker.event(&event(2, 3, "MIGRATION", "completed"));
        assert_eq!((tracker.facts().status, tracker.facts().end_us), (MigrationStatus::Failed, Some(2)));
    }

    #[test]
    fn the_rate_is_that_of_the_last_second_and_the_first_burst_is_not_one() {
        let mut tracker = Tracker::new(0);
        tracker.event(&event(0, 1, "MIGRATION", "active"));
        let mut look = |at_ms: i64, transferred| {
            let ram = Some(RamInfo { total: 100_000_000, transferred, ..RamInfo::default() });
            tracker.look(
                &MigrationInfo { status: MigrationStatus::Active, ram, ..MigrationInfo::default() },
                at_ms * 1000,
            );
            tracker.facts().bytes_per_second
        };
        assert_eq!(look(0, 0), 0);
        assert_eq!(look(60, 1_000_000), 0, "what lies in buffers is no rate");
        assert_eq!(look(500, 1_000_000), 2_000_000);
        // The burst is forgotten after a second.
        assert_eq!(look(1000, 1_100_000), 1_100_000);
        assert_eq!(look(1500, 1_200_000), 200_000);
        assert_eq!(look(1510, 9_200_000), 200_000, "too close together");
    }

    #[test]
    fn post_copy_is_remembered_after_its_end() {
        let mut tracker = Tracker::new(0);
        for (n, status) in ["active", "postcopy-active", "completed"].into_iter().enumerate() {
            tracker.event(&event(n as u64, 10 * n as i64, "MIGRATION", status));
        }
        assert_eq!((tracker.facts().status, tracker.facts().mode), (MigrationStatus::Completed, Mode::PostCopy));
    }

    #[test]
    fn a_link_that_broke_in_post_copy_is_told_until_there_is_another_one() {
        let mut tracker = Tracker::new(0);
        let mut number = 0;
        let mut tell = |tracker: &mut Tracker, status| {
            tracker.event(&event(number, 10 * number as i64, "MIGRATION", status));
            number += 1;
        };
        for status in ["active", "postcopy-active", "postcopy-paused"] {
            tell(&mut tracker, status);
        }
        tracker.link_lost("cut");
        assert_eq!((tracker.facts().broken_us, tracker.facts().recoveries), (Some(20), 0));
        // A target's QEMU listens again, and fails at it once.
        for status in ["setup", "postcopy-recover", "postcopy-paused", "postcopy-recover-setup", "postcopy-recover"] {
            tell(&mut tracker, status);
            assert!(tracker.facts().status.is_post_copy(), "{status}");
            assert_eq!((tracker.facts().broken_us, tracker.facts().error.as_deref()), (Some(20), Some("cut")));
        }
        tell(&mut tracker, "postcopy-active");
        let facts = tracker.facts();
        assert_eq!((facts.broken_us, facts.recoveries, facts.error.as_deref()), (None, 1, None));
        tell(&mut tracker, "postcopy-paused");
        let words = MigrationInfo {
            status: MigrationStatus::PostcopyPaused,
            error_desc: Some("Channel error".into()),
            ..MigrationInfo::default()
        };
        tracker.look(&words, 99);
        assert_eq!(tracker.facts().error, None, "who follows it says it better");
        tell(&mut tracker, "completed");
        assert_eq!((tracker.facts().broken_us, tracker.facts().mode), (None, Mode::PostCopy));
    }
}
