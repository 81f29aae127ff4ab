//! A reboot of a guest that has no agent to be asked: its power button is pressed, and when it has powered down it starts over in
//! the same QEMU, which meanwhile does not end with it.

use super::{Refused, Stage, Vm, refused};
use crate::rpc::{RebootFacts, Refusal};
use godwit_qemu::qmp::commands::RunState;
use godwit_qemu::qmp::{self, Event};
use std::time::Duration;
use tokio::time::Instant;

/// How long the guest may take to power down. A guest that does so later has ended, as any other that powers itself down.
const LIMIT: Duration = Duration::from_secs(120);
/// Between two presses of the power button: a guest that is still booting misses it.
const PRESS_EVERY: Duration = Duration::from_secs(5);

/// A reboot that is under way. As long as there is one, QEMU stays when the guest powers down.
pub(super) struct Rebooting {
    /// When the guest's patience ends.
    deadline: Instant,
    /// When the button is pressed again.
    press: Instant,
    /// The guest has powered down, and is to start over.
    off: bool,
}

impl Vm {
    /// Presses the power button of a guest that will start over. A second order while one is under way changes nothing.
    pub(super) async fn reboot(&mut self) -> Result<(), Refused> {
        let running = match &self.stage {
            Stage::Running(_) if self.ending.is_some() => Err("the guest is being shut down"),
            Stage::Running(running) if running.is_paused() => Err("the guest is paused"),
            Stage::Running(running) => Ok(running),
            Stage::Empty | Stage::Ended => Err("no guest runs here"),
            _ => Err("it is migrating"),
        };
        let running = running.map_err(|why| {
            refused(Refusal::Conflict, format!("the guest cannot be rebooted by its power button: {why}"))
        })?;
        if self.rebooting.is_some() {
            return Ok(());
        }
        let failed = |e: qmp::Error| refused(Refusal::Failed, e.to_string());
        running.outlive_power_off(true).await.map_err(failed)?;
        let now = Instant::now();
        self.rebooting = Some(Rebooting { deadline: now + LIMIT, press: now, off: false });
        self.now.reboot = Some(RebootFacts { asked_us: jiff::Timestamp::now().as_microsecond(), given_up_us: None });
        tracing::info!(
            "the guest is to reboot: its power button is pressed, and when it has powered down it starts over"
        );
        self.look_at_reboot().await;
        Ok(())
    }

    pub(super) async fn reboot_event(&mut self, event: &Event) {
        let (Some(rebooting), Some(facts)) = (&mut self.rebooting, &self.now.reboot) else { return };
        match event.name.as_str() {
            "SHUTDOWN" if event.text("reason") == Some("guest-shutdown") => {
                rebooting.off = true;
                self.look_at_reboot().await;
            }
            // It reboots of its own, or somebody has reset it; but not before.
            "RESET" if !rebooting.off && event.at_us >= facts.asked_us => self.end_reboot(false).await,
            _ => {}
        }
    }

    pub(super) async fn look_at_reboot(&mut self) {
        let Some(rebooting) = &mut self.rebooting else {
            // A guest that has powered down where QEMU is still there: perhaps QEMU did not tell its state then.
            if self.shutdown_reason.is_some() && matches!(self.stage, Stage::Running(_)) {
                self.refresh().await;
            }
            return;
        };
        let Stage::Running(running) = &mut self.stage else { return };
        if self.ending.is_some() {
            // The end goes before. QEMU stays without its guest, so it is ended here.
            if rebooting.off {
                let qemu = running.qemu().clone();
                self.rebooting = None;
                tokio::spawn(async move { qemu.quit().await });
            }
            return;
        }
        let now = Instant::now();
        if rebooting.off {
            let over = match running.start_over().await {
                Ok(()) => true,
                Err(error) => {
                    tracing::warn!(%error, "starting over a guest that has powered down");
                    // Perhaps only the last answer is missing; else it is tried again.
                    running.qemu().status().await.is_ok_and(|state| state == RunState::Running)
                }
            };
            if over {
                tracing::info!("the guest has powered down and starts over");
                self.rebooting = None;
                self.now.reboot = None;
                self.refresh().await;
            }
        } else if now >= rebooting.deadline {
            self.end_reboot(true).await;
        } else if now >= rebooting.press {
            rebooting.press = now + PRESS_EVERY;
            if let Err(error) = running.qemu().power_button().await {
                tracing::warn!(%error, "pressing the power button");
            }
        }
    }

    /// The guest's next power-off is its end again. `given_up`: it has not powered down in time.
    async fn end_reboot(&mut self, given_up: bool) {
        let (Some(rebooting), Stage::Running(running)) = (&mut self.rebooting, &self.stage) else { return };
        if let Err(error) = running.outlive_power_off(false).await {
            tracing::warn!(%error, "QEMU is to end with its guest again; trying again");
            return;
        }
        // It may have powered down in this moment, and its event is on its way.
        match running.qemu().status().await {
            Ok(RunState::Shutdown) => {
                rebooting.off = true;
                return;
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "whether the guest has powered down is not known; asking again");
                return;
            }
        }
        self.rebooting = None;
        let asked = self.now.reboot.take();
        if given_up {
            let given_up_us = Some(jiff::Timestamp::now().as_microsecond());
            self.now.reboot = asked.map(|asked| RebootFacts { given_up_us, ..asked });
            tracing::warn!("the guest has not powered down within {LIMIT:?} of its power button; it runs on");
        }
    }
}
