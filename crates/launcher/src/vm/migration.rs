//! Leaving and arriving.

use super::{Refused, Stage, Vm, refused, short};
use crate::plan::Plan;
use crate::record::Record;
use crate::rpc::{DomainPhase, GoOrder, MigrationFacts, MigrationRole, Refusal, SourceOrder, TargetReady};
use godwit_qemu::blocks::Blocks;
use godwit_qemu::instance::{GoError, Incoming, Settled};
use godwit_qemu::migration::{Facts, Options};
use godwit_qemu::qmp::Event;
use godwit_qemu::qmp::commands::MigrationStatus;

/// KubeVirt's.
const MAX_DOWNTIME_MS: u64 = 300;

impl Vm {
    /// What a target offers besides the memory socket.
    pub(super) async fn offer(
        &self,
        incoming: &mut Incoming,
        socket: String,
        plan: &Plan,
        migration_uid: &str,
    ) -> Result<TargetReady, Refused> {
        if plan.local_disks.is_empty() {
            return Ok(TargetReady { socket, blocks_socket: None, post_copy: false });
        }
        let blocks = format!("blocks-{}.sock", short(migration_uid));
        let path = self.paths.sockets.join(&blocks);
        let _ = std::fs::remove_file(&path);
        incoming.offer_blocks(&path, &plan.local_disks).await?;
        Ok(TargetReady { socket, blocks_socket: Some(blocks), post_copy: false })
    }

    pub(super) fn arriving(&mut self, migration_uid: String) {
        self.now.migration = Some(MigrationFacts::new(migration_uid, MigrationRole::Target));
    }

    fn about(&self, uid: &str, role: MigrationRole) -> Result<&MigrationFacts, Refused> {
        match &self.now.migration {
            Some(m) if m.uid == uid && m.role == role => Ok(m),
            Some(m) => {
                let message = format!("this launcher's migration is {} ({:?}), not {uid} ({role:?})", m.uid, m.role);
                Err(refused(Refusal::Conflict, message))
            }
            None => Err(refused(Refusal::Conflict, format!("this launcher knows no migration {uid}"))),
        }
    }

    /// Starts to send the guest, once for a migration uid.
    pub(super) async fn migrate(&mut self, order: SourceOrder) -> Result<(), Refused> {
        if self.about(&order.migration_uid, MigrationRole::Source).is_ok() {
            return Ok(());
        }
        for socket in [Some(&order.socket), order.blocks_socket.as_ref()].into_iter().flatten() {
            if socket.is_empty() || socket.contains('/') || socket.starts_with('.') {
                let message = format!("{socket:?} is not a file name in the directory of launcher.sock");
                return Err(refused(Refusal::BadRequest, message));
            }
        }
        match &self.stage {
            Stage::Running(running) if running.is_paused() => {
                return Err(refused(Refusal::Conflict, "the guest is paused; unpause it before it migrates"));
            }
            Stage::Running(_) if self.ending.is_some() => {
                return Err(refused(Refusal::Conflict, "the guest is being shut down"));
            }
            Stage::Running(_) => {}
            Stage::Outgoing(_) => {
                return Err(refused(Refusal::Conflict, "another migration of this guest is under way"));
            }
            _ => return Err(refused(Refusal::Conflict, "no guest runs here")),
        }
        if !self.local_disks.is_empty() && order.blocks_socket.is_none() {
            let names: Vec<&str> = self.local_disks.iter().map(|(_, name)| name.as_str()).collect();
            let message = format!("the writable disks {} are not shared between the nodes", names.join(", "));
            return Err(refused(Refusal::Invalid, message));
        }
        // Whoever cannot write down that the guest has left must not let it go.
        let folder = &self.paths.ephemeral_disks;
        let record = Record::prepare(folder)
            .map_err(|e| refused(Refusal::Failed, format!("preparing the record in {}: {e}", folder.display())))?;
        self.record = Some(record);
        let Stage::Running(running) = std::mem::replace(&mut self.stage, Stage::Ended) else { return Ok(()) };
        let options = Options {
            bandwidth: order.bandwidth_bytes_per_second.filter(|b| *b > 0),
            max_downtime_ms: order.max_downtime_ms.filter(|ms| *ms > 0).unwrap_or(MAX_DOWNTIME_MS),
            auto_converge: order.allow_auto_converge,
        };
        let mut facts = MigrationFacts::new(order.migration_uid, MigrationRole::Source);
        let blocks = order
            .blocks_socket
            .map(|socket| Blocks { socket: self.paths.sockets.join(socket), disks: self.local_disks.clone() });
        match running.migrate(&self.paths.sockets.join(&order.socket), &options, blocks.as_ref()).await {
            Ok(outgoing) => {
                self.stage = Stage::Outgoing(outgoing);
                self.now.migration = Some(facts);
                self.take_facts();
                Ok(())
            }
            Err((running, error)) => {
                self.stage = Stage::Running(running);
                facts.status = "failed".into();
                facts.error = Some(error.to_string());
                self.now.migration = Some(facts);
                Err(error.into())
            }
        }
    }

    /// Asks for the cancellation. Where the guest is afterwards, the state tells.
    pub(super) async fn cancel(&mut self, uid: &str) -> Result<(), Refused> {
        self.about(uid, MigrationRole::Source)?;
        if let Stage::Outgoing(outgoing) = &mut self.stage {
            outgoing.cancel().await.map_err(|e| refused(Refusal::Failed, e.to_string()))?;
            self.follow().await;
        }
        Ok(())
    }

    /// Lets the guest run at the target while the rest of its memory follows.
    pub(super) async fn switch_to_post_copy(&mut self, uid: &str) -> Result<(), Refused> {
        self.about(uid, MigrationRole::Source)?;
        Err(refused(Refusal::Unsupported, "this launcher does not switch to post-copy"))
    }

    /// Stops the guest so that the migration comes to an end.
    pub(super) async fn pause_to_migrate(&mut self, uid: &str) -> Result<(), Refused> {
        self.about(uid, MigrationRole::Source)?;
        Err(refused(Refusal::Unsupported, "this launcher does not pause a guest for its migration"))
    }

    /// The source is stopped for good: run the guest. The same go again is no second one.
    pub(super) async fn go(&mut self, order: &GoOrder) -> Result<(), Refused> {
        let uid = &order.migration_uid;
        let gone = self.about(uid, MigrationRole::Target)?.gone;
        match std::mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Incoming(mut incoming) => {
                if gone {
                    // QEMU got the first go and did not answer.
                    match incoming.running().await {
                        Ok(running) => {
                            self.stage = Stage::Running(running);
                            self.arrived().await;
                            return Ok(());
                        }
                        Err(again) => incoming = again,
                    }
                }
                // From here on it may run here, whatever becomes of the answer.
                self.set_gone(true);
                match incoming.go().await {
                    Ok(running) => {
                        self.stage = Stage::Running(running);
                        self.arrived().await;
                        Ok(())
                    }
                    Err(GoError { incoming, may_run, error }) => {
                        self.set_gone(gone || may_run);
                        self.stage = Stage::Incoming(incoming);
                        Err(refused(Refusal::Conflict, error.to_string()))
                    }
                }
            }
            other => {
                self.stage = other;
                match (&self.stage, gone) {
                    (Stage::Running(_) | Stage::Outgoing(_), true) => Ok(()),
                    _ => Err(refused(Refusal::Conflict, "there is no guest that waits for a go here")),
                }
            }
        }
    }

    fn set_gone(&mut self, gone: bool) {
        if let Some(m) = &mut self.now.migration {
            m.gone = gone;
        }
    }

    async fn arrived(&mut self) {
        self.set_gone(true);
        // The RESUME came before the answer to `cont`.
        while let Some(event) = self.events.as_mut().and_then(|e| e.try_next()) {
            self.migration_event(&event).await;
        }
        self.refresh().await;
    }

    /// Ends a target that is not needed.
    pub(super) async fn abandon(&mut self, uid: &str) -> Result<(), Refused> {
        let gone = self.about(uid, MigrationRole::Target)?.gone;
        match &self.stage {
            Stage::Incoming(incoming) if !gone => {
                let qemu = incoming.qemu().clone();
                self.now.exit_reason = Some("the guest did not come here: its migration was given up".into());
                qemu.process().kill().await;
                if let Some(m) = &mut self.now.migration
                    && !m.is_final()
                {
                    m.status = "cancelled".into();
                }
                self.over(DomainPhase::Shutdown);
                Ok(())
            }
            Stage::Ended => Ok(()),
            _ => Err(refused(Refusal::Conflict, "the guest was told to run here; it cannot be abandoned")),
        }
    }

    pub(super) async fn migration_event(&mut self, event: &Event) {
        match &mut self.stage {
            Stage::Outgoing(outgoing) => {
                outgoing.event(event);
                if let Err(error) = outgoing.advance().await {
                    tracing::debug!(%error, "going on with the migration");
                }
                self.follow().await;
            }
            Stage::Incoming(incoming) => {
                incoming.event(event);
                self.take_facts();
            }
            Stage::Running(_) if event.name == "RESUME" => {
                if let Some(m) = &mut self.now.migration {
                    let arrived = m.role == MigrationRole::Target && m.gone;
                    let stayed = m.role == MigrationRole::Source && m.stop_us.is_some();
                    if arrived || stayed {
                        m.resume_us.get_or_insert(event.at_us);
                    }
                }
            }
            _ => {}
        }
    }

    pub(super) async fn look_at_migration(&mut self) {
        match &mut self.stage {
            Stage::Outgoing(outgoing) => {
                if let Err(error) = outgoing.look().await {
                    tracing::debug!(%error, "looking at the migration");
                }
                self.follow().await;
            }
            Stage::Incoming(incoming) => {
                if let Err(error) = incoming.look().await {
                    tracing::debug!(%error, "looking at the arrival");
                }
                self.take_facts();
            }
            _ => {}
        }
    }

    /// Reports the outgoing migration, and settles it after QEMU's last word.
    async fn follow(&mut self) {
        match &self.stage {
            Stage::Outgoing(outgoing) if outgoing.facts().is_final() => self.settle().await,
            _ => self.take_facts(),
        }
    }

    pub(super) async fn settle(&mut self) {
        let Stage::Outgoing(outgoing) = std::mem::replace(&mut self.stage, Stage::Ended) else { return };
        match outgoing.settle().await {
            Settled::Departed(departed) => {
                let mut facts = match &self.now.migration {
                    Some(m) => m.clone(),
                    None => MigrationFacts::new("", MigrationRole::Source),
                };
                fill(&mut facts, departed.facts());
                facts.handed_over = true;
                if let Err(error) = self.write_down(&facts) {
                    // It is true all the same, and the guest stands still until it is told.
                    tracing::error!(%error, "that the guest has left could not be written down");
                }
                self.now.migration = Some(facts);
                self.now.exit_reason = Some("the guest has migrated to another node".into());
                let qemu = departed.qemu().clone();
                self.now.qemu_status = Some("postmigrate".into());
                self.stage = Stage::Departed(departed);
                self.now.phase = DomainPhase::MigratedAway;
                self.publish();
                tokio::spawn(async move { qemu.quit().await });
            }
            Settled::Stays(running, facts) => {
                self.stage = Stage::Running(running);
                if let Some(m) = &mut self.now.migration {
                    fill(m, &facts);
                }
                self.refresh().await;
            }
            Settled::Unclear(outgoing, error) => {
                tracing::warn!(%error, "the migration's end is not clear yet");
                self.stage = Stage::Outgoing(*outgoing);
                self.take_facts();
            }
        }
    }

    fn write_down(&mut self, facts: &MigrationFacts) -> std::io::Result<()> {
        let quick = self.record.take().map(|mut record| record.write(facts));
        match quick {
            Some(Ok(())) => Ok(()),
            _ => Record::prepare(&self.paths.ephemeral_disks)?.write(facts),
        }
    }

    /// Copies what QEMU says into the state; `completed` of a source is left out, since it has to be written down first.
    fn take_facts(&mut self) {
        let Some(m) = &mut self.now.migration else { return };
        match &self.stage {
            Stage::Outgoing(outgoing) => {
                let mut facts = outgoing.facts().clone();
                if facts.status == MigrationStatus::Completed {
                    facts.status = MigrationStatus::Device;
                    facts.end_us = None;
                }
                fill(m, &facts);
            }
            Stage::Incoming(incoming) => {
                fill(m, incoming.facts());
                m.loaded = incoming.facts().status == MigrationStatus::Completed;
            }
            _ => {}
        }
    }
}

fn fill(m: &mut MigrationFacts, facts: &Facts) {
    m.status = facts.status.as_str().into();
    m.start_us = facts.start_us;
    m.stop_us = facts.stop_us;
    m.resume_us = facts.resume_us;
    m.end_us = facts.end_us;
    m.total_bytes = facts.total_bytes;
    m.processed_bytes = facts.sent_bytes;
    m.remaining_bytes = facts.remaining_bytes;
    m.bytes_per_second = facts.bytes_per_second;
    m.dirty_bytes_per_second = facts.dirty_bytes_per_second;
    m.iteration = facts.passes;
    m.downtime_limit_ms = facts.downtime_limit_ms;
    m.total_ms = facts.total_ms;
    m.qemu_downtime_ms = facts.downtime_ms;
    m.error = facts.error.clone();
}
