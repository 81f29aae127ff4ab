//! How it ends: as ordered, by itself, by a crash, or because the guest has moved.

use super::{Ending, Stage, Vm};
use crate::rpc::{DomainPhase, MigrationRole};
use godwit_qemu::failure;
use godwit_qemu::process::Ended;
use godwit_qemu::qmp::commands::MigrationStatus;
use std::time::Duration;
use tokio::time::Instant;

/// Between two presses of the power button.
const PRESS_EVERY: Duration = Duration::from_secs(5);
/// How long a launcher stays to tell an end that nobody may have seen yet.
const TELL_END: Duration = Duration::from_secs(2);
/// The same for a guest that has left: only what this launcher says makes it run at the target. `POST /v1/shutdown` or SIGTERM
/// says that it is known.
const TELL_DEPARTURE: Duration = Duration::from_secs(30);

impl Vm {
    /// Presses the power button, and ends QEMU when `grace` has passed. Where no guest runs, ends at once.
    pub(super) async fn shut_down(&mut self, grace: Duration) {
        let deadline = Instant::now() + grace;
        match &self.stage {
            Stage::Empty => {
                self.now.exit_reason = Some("it was told to end before a VM was started".into());
                self.over(DomainPhase::Shutdown);
                self.dismissed = true;
            }
            Stage::Incoming(incoming) => {
                let qemu = incoming.qemu().clone();
                self.now.exit_reason = Some("it was told to end before the guest came here".into());
                qemu.process().kill().await;
                self.discard_state();
                self.over(DomainPhase::Shutdown);
            }
            // It cannot hear the power button, and QEMU perhaps nothing at all. One that only waits for its memory has its grace:
            // it may come.
            Stage::Filling(filling) if filling.is_lost() || filling.is_broken() && grace.is_zero() => {
                let qemu = filling.qemu().clone();
                self.ending = Some(Ending { deadline, press: deadline, forced: true });
                qemu.process().kill().await;
            }
            // The guest needs this QEMU until all of its memory is there; only after its patience it is lost.
            Stage::Serving(_) if grace.is_zero() => {
                self.dismissed = true;
                if let Some(qemu) = self.stage.qemu() {
                    qemu.process().kill().await;
                }
            }
            Stage::Running(_) | Stage::Filling(_) | Stage::Outgoing(_) | Stage::Serving(_) => match &mut self.ending {
                Some(ending) => ending.deadline = ending.deadline.min(deadline),
                None => self.ending = Some(Ending { deadline, press: Instant::now(), forced: false }),
            },
            Stage::Departed(_) | Stage::Ended => self.dismissed = true,
        }
        self.look_at_ending().await;
    }

    /// SIGTERM: the pod is to end.
    pub(super) async fn terminate(&mut self) {
        tracing::info!("told to end (SIGTERM)");
        self.shut_down(self.grace).await;
        // Nothing stops the kubelet's own patience; what was said by now has to do.
        if self.over.is_some() {
            self.dismissed = true;
        }
    }

    pub(super) async fn look_at_ending(&mut self) {
        let hears = match &self.stage {
            Stage::Serving(_) => false,
            Stage::Filling(filling) => !filling.is_broken(),
            _ => true,
        };
        let Some(ending) = &mut self.ending else { return };
        let now = Instant::now();
        let Some(qemu) = self.stage.qemu().cloned() else { return };
        if now >= ending.deadline {
            if !ending.forced {
                ending.forced = true;
                tracing::info!("ending QEMU");
                // Its end comes back as any other does.
                tokio::spawn(async move { qemu.quit().await });
            }
        } else if now >= ending.press && hears {
            ending.press = now + PRESS_EVERY;
            if let Err(error) = qemu.power_button().await {
                tracing::warn!(%error, "pressing the power button");
            }
        }
    }

    /// QEMU has ended.
    pub(super) async fn ended(&mut self, ended: Ended) {
        // What it said before it ended explains the end.
        while let Some(event) = self.events.as_mut().and_then(|e| e.try_next()) {
            self.event(event).await;
        }
        match &self.stage {
            Stage::Outgoing(outgoing) if outgoing.facts().status == MigrationStatus::Completed => self.settle().await,
            Stage::Serving(_) => self.served(),
            _ => {}
        }
        if let Some(console) = self.console.take() {
            console.drain().await;
        }
        if let Some(m) = &mut self.now.migration {
            let interrupted = match m.role {
                MigrationRole::Source => matches!(self.stage, Stage::Outgoing(_) | Stage::Serving(_)),
                MigrationRole::Target => matches!(self.stage, Stage::Incoming(_) | Stage::Filling(_)),
            };
            if interrupted && !m.is_final() {
                let explained = failure::of_end(&ended);
                m.status = "failed".into();
                m.error = Some(explained.text);
                m.cause = Some(explained.cause);
            }
        }
        self.fence.release();
        self.now.fenced = self.fence.has_struck();
        let (phase, reason) = match (&self.stage, &self.ending, self.shutdown_reason.as_deref()) {
            (Stage::Departed(_), ..) => {
                (DomainPhase::MigratedAway, "the guest has migrated to another node".to_string())
            }
            (Stage::Serving(_), ..) => (
                DomainPhase::MigratedAway,
                format!("QEMU ended before all of the guest's memory had followed it to the other node: {ended}"),
            ),
            _ if self.now.fenced => (DomainPhase::Crashed, crate::fence::REASON.to_string()),
            (Stage::Incoming(_), ..) => {
                let why = failure::of_end(&ended).text;
                (DomainPhase::Crashed, format!("the guest could not be received: {why}"))
            }
            // Whoever ended it: it did not shut down.
            (Stage::Filling(filling), ..) if filling.is_lost() || filling.is_broken() => {
                let why = filling.facts().error.as_deref().unwrap_or("a part of its memory did not come");
                (DomainPhase::Crashed, format!("the guest is lost: {why}"))
            }
            (_, Some(ending), _) if ending.forced => {
                (DomainPhase::Shutdown, "the guest was told to shut down and was ended by force after its grace".into())
            }
            (_, Some(_), _) => (DomainPhase::Shutdown, "the guest has shut down as it was told to".into()),
            (_, None, Some("guest-shutdown")) => (DomainPhase::Shutdown, "the guest has shut itself down".into()),
            (_, None, Some("host-signal")) => (DomainPhase::Crashed, "QEMU was ended by a signal from outside".into()),
            (_, None, Some(reason)) => (DomainPhase::Crashed, format!("QEMU has ended ({reason}); {ended}")),
            (_, None, None) => (DomainPhase::Crashed, ended.to_string()),
        };
        tracing::info!(?phase, reason, "QEMU has ended");
        self.now.exit_reason = Some(reason);
        self.over(phase);
    }

    /// Nothing follows. The last state stays to be told for a while.
    pub(super) fn over(&mut self, phase: DomainPhase) {
        self.stage = Stage::Ended;
        self.events = None;
        self.console = None;
        self.ending = None;
        self.rebooting = None;
        self.now.reboot = None;
        self.now.phase = phase;
        self.now.qemu_pid = None;
        self.now.qemu_status = None;
        self.now.guest_agent.connected = false;
        self.over = Some(Instant::now());
    }

    /// Whether the process may end: everything is over, and told.
    pub(super) fn may_exit(&self) -> bool {
        let Some(over) = self.over else { return false };
        let patience = if self.now.phase == DomainPhase::MigratedAway { TELL_DEPARTURE } else { TELL_END };
        self.dismissed || over.elapsed() >= patience
    }
}
