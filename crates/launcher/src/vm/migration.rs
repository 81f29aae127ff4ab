//! Leaving and arriving.

use super::{Refused, Stage, Vm, is_copied_here, refused, short};
use crate::blank;
use crate::copy_mark;
use crate::plan::{Plan, WritableDisk};
use crate::record::Record;
use crate::rooms;
use crate::rpc::{
    Cause, DiskRoom, DomainPhase, GoOrder, LinkOrder, MigrationFacts, MigrationMode, MigrationRole, Refusal,
    SourceOrder, TargetReady, TransportOrder,
};
use godwit_qemu::blocks::Blocks;
use godwit_qemu::instance::{Arrived, Departed, GoError, Incoming, Settled};
use godwit_qemu::migration::{Facts, Mode, Options};
use godwit_qemu::qmp::Event;
use godwit_qemu::qmp::commands::MigrationStatus;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

/// KubeVirt's.
const MAX_DOWNTIME_MS: u64 = 300;
/// How long a cancellation is waited for before its answer is given.
const CANCEL_LIMIT: Duration = Duration::from_secs(5);
/// How long a target reads the images below its disks at most before it answers.
const BASE_LIMIT: Duration = Duration::from_secs(5);
/// How long block devices are wiped at most when a guest does not come.
const WIPE_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at it.
const CANCEL_LOOK: Duration = Duration::from_millis(2);

impl Vm {
    /// What a target offers besides the memory socket.
    pub(super) async fn offer(
        &mut self,
        incoming: &mut Incoming,
        socket: String,
        plan: &Plan,
        migration_uid: &str,
    ) -> Result<TargetReady, Refused> {
        let (post_copy, ability) = (incoming.can_post_copy(), incoming.qemu().ability());
        let rooms = BTreeMap::new();
        let by_reference = incoming.is_by_reference();
        let ready = TargetReady {
            socket,
            blocks_socket: None,
            post_copy,
            awaits_transport: false,
            by_reference,
            ability,
            rooms,
        };
        let coming: Vec<WritableDisk> = plan.writable.iter().filter(|disk| is_copied_here(disk)).cloned().collect();
        if coming.is_empty() {
            return Ok(ready);
        }
        let blocks = format!("blocks-{}.sock", short(migration_uid));
        let path = self.paths.sockets.join(&blocks);
        let _ = std::fs::remove_file(&path);
        incoming.offer_blocks(&path, &exports(&coming)).await?;
        let rooms = self.rooms(&coming).await;
        Ok(TargetReady { blocks_socket: Some(blocks), rooms, ..ready })
    }

    /// What there is for each of the disks that come. What takes too long to know is left out.
    async fn rooms(&mut self, disks: &[WritableDisk]) -> BTreeMap<String, DiskRoom> {
        let end = Instant::now() + BASE_LIMIT;
        while disks.iter().any(|d| d.base.is_some() && !self.bases.contains_key(&d.volume)) {
            match tokio::time::timeout_at(end, self.digests.1.recv()).await {
                Ok(Some((volume, digest))) => self.base_known(volume, digest),
                Ok(None) | Err(_) => break,
            }
        }
        let room = |disk: &WritableDisk| {
            let base = self.bases.get(&disk.volume).cloned();
            let room = rooms::look(&disk.path, base);
            let room = room.inspect_err(|error| tracing::warn!(%error, volume = disk.volume, "looking for room"));
            Some((disk.volume.clone(), room.ok()?))
        };
        disks.iter().filter_map(room).collect()
    }

    /// Of the disks to be copied those whose image below the target has as well; refused when the target has no room for all.
    fn above_base(
        copied: &[WritableDisk],
        bases: &BTreeMap<String, String>,
        rooms: &BTreeMap<String, DiskRoom>,
    ) -> Result<BTreeSet<usize>, Refused> {
        let same = |disk: &&WritableDisk| {
            let theirs = rooms.get(&disk.volume).and_then(|room| room.base.as_ref());
            theirs.is_some() && theirs == bases.get(&disk.volume)
        };
        let above: BTreeSet<usize> = copied.iter().filter(same).map(|disk| disk.number).collect();
        let need = |disk: &WritableDisk| rooms::needed(disk, above.contains(&disk.number));
        let mut needs = Vec::new();
        for disk in copied {
            let bytes = need(disk).map_err(|e| {
                refused(Refusal::Failed, format!("volume {}: looking at {}: {e}", disk.volume, disk.path.display()))
            })?;
            needs.push((disk.volume.as_str(), bytes));
        }
        match rooms::shortage(&needs, rooms) {
            None => Ok(above),
            Some(why) => Err(Refused { cause: Some(Cause::NoSpace), ..refused(Refusal::Failed, why) }),
        }
    }

    /// How the guest's memory will come. The first order stands, whatever a later one says.
    pub(super) async fn receive_by(&mut self, order: &TransportOrder) -> Result<(), Refused> {
        self.about(&order.migration_uid, MigrationRole::Target)?;
        if let Stage::Incoming(incoming) = &mut self.stage {
            let stands = incoming.listen(order.transport).await?;
            if let Some(m) = &mut self.now.migration {
                m.transport = stands;
            }
        }
        Ok(())
    }

    pub(super) fn arriving(&mut self, migration_uid: String, by_reference: bool) {
        let facts = MigrationFacts::new(migration_uid, MigrationRole::Target);
        self.now.migration = Some(MigrationFacts { by_reference, ..facts });
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
        let bandwidth = order.bandwidth_bytes_per_second.filter(|b| *b > 0);
        if self.about(&order.migration_uid, MigrationRole::Source).is_ok() {
            return self.limit_bandwidth(bandwidth).await;
        }
        for socket in [Some(&order.socket), order.blocks_socket.as_ref()].into_iter().flatten() {
            check_name(socket)?;
        }
        match &self.stage {
            Stage::Running(_) if self.ending.is_some() => {
                return Err(refused(Refusal::Conflict, "the guest is being shut down"));
            }
            Stage::Running(_) if self.now.is_rebooting() => {
                return Err(refused(
                    Refusal::Conflict,
                    "the guest is being rebooted; it can be sent when it has started over",
                ));
            }
            Stage::Running(_) => {}
            Stage::Filling(_) => {
                return Err(refused(Refusal::Conflict, "the guest has not all of its memory yet (post-copy)"));
            }
            Stage::Outgoing(_) => {
                return Err(refused(Refusal::Conflict, "another migration of this guest is under way"));
            }
            _ => return Err(refused(Refusal::Conflict, "no guest runs here")),
        }
        // Whatever the other end does not see, and what it wants from another claim.
        let wanted = |disk: &&WritableDisk| !disk.shared || order.rooms.contains_key(&disk.volume);
        let copied: Vec<WritableDisk> = self.disks.iter().filter(wanted).cloned().collect();
        if !copied.is_empty() && order.blocks_socket.is_none() {
            let names: Vec<&str> = copied.iter().map(|disk| disk.volume.as_str()).collect();
            let message = format!("the writable disks {} are not shared between the nodes", names.join(", "));
            return Err(refused(Refusal::Invalid, message));
        }
        let above_base = Self::above_base(&copied, &self.bases, &order.rooms)?;
        // Whoever cannot write down that the guest has left must not let it go.
        let folder = &self.paths.ephemeral_disks;
        let record = Record::prepare(folder)
            .map_err(|e| refused(Refusal::Failed, format!("preparing the record in {}: {e}", folder.display())))?;
        self.record = Some(record);
        let Stage::Running(running) = std::mem::replace(&mut self.stage, Stage::Ended) else { return Ok(()) };
        let options = Options {
            bandwidth,
            max_downtime_ms: order.max_downtime_ms.filter(|ms| *ms > 0).unwrap_or(MAX_DOWNTIME_MS),
            auto_converge: order.allow_auto_converge,
            post_copy: order.allow_post_copy,
            by_reference: order.by_reference,
            transport: order.transport,
        };
        let mut facts = MigrationFacts::new(order.migration_uid, MigrationRole::Source);
        facts.transport = order.transport;
        facts.by_reference = order.by_reference;
        let disks = exports(&copied);
        let blocks =
            order.blocks_socket.map(|socket| Blocks { socket: self.paths.sockets.join(socket), disks, above_base });
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
                facts.cause = Some(error.cause());
                self.now.migration = Some(facts);
                Err(error.into())
            }
        }
    }

    async fn limit_bandwidth(&mut self, bandwidth: Option<u64>) -> Result<(), Refused> {
        let limited = match &mut self.stage {
            Stage::Outgoing(outgoing) if outgoing.bandwidth() != bandwidth => outgoing.limit_bandwidth(bandwidth).await,
            Stage::Serving(serving) if serving.bandwidth() != bandwidth => serving.limit_bandwidth(bandwidth).await,
            _ => return Ok(()),
        };
        limited.map_err(|e| refused(Refusal::Failed, e.to_string()))?;
        if matches!(self.stage, Stage::Serving(_)) {
            self.served();
        }
        self.take_facts();
        Ok(())
    }

    /// Asks for the cancellation and waits for what comes of it; the state then tells whether it was too late. Where QEMU
    /// takes longer, the state says `cancelling`, and later what came of it.
    pub(super) async fn cancel(&mut self, uid: &str) -> Result<(), Refused> {
        self.about(uid, MigrationRole::Source)?;
        // Perhaps it has gone over to post-copy in this moment, and must not be touched any more.
        self.follow().await;
        let Stage::Outgoing(outgoing) = &mut self.stage else { return Ok(()) };
        outgoing.cancel().await.map_err(|e| refused(Refusal::Failed, e.to_string()))?;
        let end = Instant::now() + CANCEL_LIMIT;
        while let Stage::Outgoing(outgoing) = &mut self.stage
            && Instant::now() < end
        {
            if let Err(error) = outgoing.look().await {
                tracing::debug!(%error, "looking at the cancelled migration");
                break;
            }
            self.follow().await;
            if matches!(self.stage, Stage::Outgoing(_)) {
                tokio::time::sleep(CANCEL_LOOK).await;
            }
        }
        self.follow().await;
        Ok(())
    }

    /// Lets the guest run at the target while the rest of its memory follows. The same order again is no second one.
    pub(super) async fn switch_to_post_copy(&mut self, uid: &str) -> Result<(), Refused> {
        self.about(uid, MigrationRole::Source)?;
        match &mut self.stage {
            Stage::Outgoing(outgoing) => {
                outgoing.switch_to_post_copy().await?;
                self.follow().await;
                Ok(())
            }
            // It has left already, in this way or the ordinary one.
            Stage::Serving(_) | Stage::Departed(_) => Ok(()),
            _ => Err(refused(Refusal::Conflict, "no migration is under way here")),
        }
    }

    /// Stands the guest still so that the migration comes to an end.
    pub(super) async fn pause_to_migrate(&mut self, uid: &str) -> Result<(), Refused> {
        self.about(uid, MigrationRole::Source)?;
        match &mut self.stage {
            Stage::Outgoing(outgoing) => {
                outgoing.hold().await?;
                self.follow().await;
                Ok(())
            }
            Stage::Serving(_) | Stage::Departed(_) => Ok(()),
            _ => Err(refused(Refusal::Conflict, "no migration is under way here")),
        }
    }

    /// The source is stopped for good: the guest is this end's. The same go again is no second one.
    pub(super) async fn go(&mut self, order: &GoOrder) -> Result<(), Refused> {
        let gone = self.about(&order.migration_uid, MigrationRole::Target)?.gone;
        self.may_run(order.run_until)?;
        match std::mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Incoming(mut incoming) => {
                if gone {
                    // QEMU got the first go and did not answer.
                    match incoming.running().await {
                        Ok(arrived) => {
                            self.arrived(arrived).await;
                            return Ok(());
                        }
                        Err(again) => incoming = again,
                    }
                }
                // From here on it may run here, whatever becomes of the answer.
                self.set_gone(true);
                for disk in self.disks.iter().filter(|disk| disk.comes) {
                    if let Err(error) = copy_mark::remove(&disk.path) {
                        tracing::warn!(%error, volume = disk.volume, "its copy is whole, and still marked as unfinished");
                    }
                }
                self.keep_tpm();
                match incoming.go(order.paused).await {
                    Ok(arrived) => {
                        self.arrived(arrived).await;
                        Ok(())
                    }
                    Err(GoError { incoming, may_run, error }) => {
                        self.set_gone(gone || may_run);
                        self.stage = Stage::Incoming(incoming);
                        Err(Refused { cause: Some(error.cause()), ..refused(Refusal::Conflict, error.to_string()) })
                    }
                }
            }
            other => {
                self.stage = other;
                match (&self.stage, gone) {
                    (Stage::Running(_) | Stage::Filling(_) | Stage::Outgoing(_), true) => Ok(()),
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

    async fn arrived(&mut self, arrived: Arrived) {
        let (stage, facts) = match arrived {
            Arrived::Whole(running, facts) => (Stage::Running(running), facts),
            Arrived::Filling(filling) => {
                let facts = filling.facts().clone();
                (Stage::Filling(filling), facts)
            }
        };
        self.stage = stage;
        if let Some(m) = &mut self.now.migration {
            fill(m, &facts);
            m.loaded = true;
            m.gone = true;
        }
        self.inside.stood_still();
        // The RESUME came before the answer to `cont`, and perhaps that the guest's agent holds its channel open.
        while let Some(event) = self.events.as_mut().and_then(|e| e.try_next()) {
            self.event(event).await;
        }
        self.refresh().await;
        self.keep_state().await;
    }

    /// Takes another link for the memory of a post-copy.
    pub(super) async fn recover(&mut self, order: &LinkOrder) -> Result<(), Refused> {
        check_name(&order.socket)?;
        let role = match &self.stage {
            Stage::Serving(_) => MigrationRole::Source,
            _ => MigrationRole::Target,
        };
        self.about(&order.migration_uid, role)?;
        let path = self.paths.sockets.join(&order.socket);
        let taken = match &mut self.stage {
            Stage::Serving(serving) => serving.take_up(&path).await,
            Stage::Incoming(incoming) => {
                self.carrier.cut();
                let _ = std::fs::remove_file(&path);
                incoming.take_up(&path).await
            }
            Stage::Filling(filling) => {
                self.carrier.cut();
                let _ = std::fs::remove_file(&path);
                filling.take_up(&path).await
            }
            _ => return Err(refused(Refusal::Conflict, "no post-copy is under way here")),
        };
        match &self.stage {
            Stage::Serving(_) => self.served(),
            Stage::Filling(_) => self.filled(),
            _ => self.take_facts(),
        }
        Ok(taken?)
    }

    /// Ends a target that is not needed.
    pub(super) async fn abandon(&mut self, uid: &str) -> Result<(), Refused> {
        let gone = self.about(uid, MigrationRole::Target)?.gone;
        match &self.stage {
            Stage::Incoming(incoming) if !gone => {
                let qemu = incoming.qemu().clone();
                self.now.exit_reason = Some("the guest did not come here: its migration was given up".into());
                qemu.process().kill().await;
                self.wipe_devices().await;
                self.discard_state();
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

    /// Takes off block devices what has come to them in vain, so that they can be taken again. Nobody waits for that for long, and
    /// where it cannot be done the next one is told that there is data.
    async fn wipe_devices(&self) {
        for disk in self.disks.iter().filter(|disk| disk.comes && !disk.path.is_file()) {
            let device = disk.path.clone();
            let wiped = tokio::task::spawn_blocking(move || blank::wipe(&device));
            match tokio::time::timeout(WIPE_LIMIT, wiped).await {
                Ok(Ok(Ok(()))) => {}
                other => tracing::warn!(volume = disk.volume, ?other, "an unfinished copy stays on its block device"),
            }
        }
    }

    pub(super) async fn migration_event(&mut self, event: &Event) {
        match &mut self.stage {
            Stage::Outgoing(outgoing) => {
                outgoing.event(event);
                // A pass can be over long before the next look; what it has left decides how the next one may end. The last one
                // is taken stock of while the guest stands still: nothing is left to decide.
                if event.name == "MIGRATION_PASS"
                    && outgoing.facts().stop_us.is_none()
                    && let Err(error) = outgoing.look().await
                {
                    tracing::debug!(%error, "looking at a pass");
                }
                if let Err(error) = outgoing.advance().await {
                    tracing::debug!(%error, "going on with the migration");
                }
                self.follow().await;
            }
            Stage::Incoming(incoming) => {
                incoming.event(event);
                self.take_facts();
            }
            Stage::Serving(serving) => {
                serving.event(event);
                self.served();
            }
            Stage::Filling(filling) => {
                filling.event(event);
                self.filled();
            }
            _ => {}
        }
        if event.name == "RESUME"
            && matches!(self.stage, Stage::Running(_) | Stage::Filling(_))
            && let Some(m) = &mut self.now.migration
        {
            let arrived = m.role == MigrationRole::Target && m.gone;
            let stayed = m.role == MigrationRole::Source && m.stop_us.is_some();
            if arrived || stayed {
                m.resume_us.get_or_insert(event.at_us);
            }
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
            Stage::Serving(serving) => {
                if let Err(error) = serving.look().await {
                    tracing::debug!(%error, "looking at the memory that follows");
                }
                self.served();
            }
            Stage::Filling(filling) => {
                if let Err(error) = filling.look().await {
                    tracing::debug!(%error, "looking at the memory that follows");
                }
                self.filled();
            }
            _ => {}
        }
    }

    /// Reports the outgoing migration, and settles it after QEMU's last word, or after the switch to post-copy.
    async fn follow(&mut self) {
        match &self.stage {
            Stage::Outgoing(outgoing) if outgoing.facts().is_final() => self.settle().await,
            Stage::Outgoing(outgoing) if outgoing.is_switching() => self.hand_over().await,
            _ => self.take_facts(),
        }
    }

    /// Writes down that the guest has left as soon as it has by the switch to post-copy, and only then reports it.
    async fn hand_over(&mut self) {
        let Stage::Outgoing(outgoing) = std::mem::replace(&mut self.stage, Stage::Ended) else { return };
        match outgoing.hand_over().await {
            Ok(serving) => {
                let mut facts = self.departing(serving.facts());
                facts.guest_paused = serving.is_paused();
                facts.bandwidth_limit = serving.bandwidth();
                self.write_down(&facts);
                // What is left here runs no guest, and the guest needs it.
                self.fence.release();
                self.now.migration = Some(facts);
                self.stage = Stage::Serving(serving);
                self.refresh().await;
                self.publish();
            }
            Err(outgoing) => {
                let over = outgoing.facts().is_final();
                self.stage = Stage::Outgoing(*outgoing);
                if over { self.settle().await } else { self.take_facts() }
            }
        }
    }

    /// What is to be told of a guest that has left.
    fn departing(&self, facts: &Facts) -> MigrationFacts {
        let mut told = match &self.now.migration {
            Some(m) => m.clone(),
            None => MigrationFacts::new("", MigrationRole::Source),
        };
        fill(&mut told, facts);
        told.handed_over = true;
        told.paused_by_migration = false;
        told.post_copy_possible = false;
        told
    }

    /// Reports the source of a post-copy, and its departure when all is there.
    pub(super) fn served(&mut self) {
        let Stage::Serving(serving) = std::mem::replace(&mut self.stage, Stage::Ended) else { return };
        let facts = self.departing(serving.facts());
        match serving.settle() {
            Ok(departed) => self.departed(departed, facts),
            Err(serving) => {
                self.now.migration = Some(MigrationFacts { bandwidth_limit: serving.bandwidth(), ..facts });
                self.stage = Stage::Serving(*serving);
            }
        }
    }

    /// Reports the target of a post-copy.
    fn filled(&mut self) {
        let Stage::Filling(filling) = std::mem::replace(&mut self.stage, Stage::Ended) else { return };
        if let Some(m) = &mut self.now.migration {
            let resume_us = m.resume_us;
            fill(m, filling.facts());
            m.resume_us = resume_us;
        }
        self.stage = match filling.settle() {
            Ok(running) => Stage::Running(running),
            Err(filling) => Stage::Filling(*filling),
        };
    }

    fn departed(&mut self, departed: Departed, facts: MigrationFacts) {
        self.write_down(&facts);
        self.fence.release();
        self.now.migration = Some(facts);
        self.now.exit_reason = Some("the guest has migrated to another node".into());
        let qemu = departed.qemu().clone();
        self.now.qemu_status = Some("postmigrate".into());
        self.stage = Stage::Departed(departed);
        self.now.phase = DomainPhase::MigratedAway;
        self.publish();
        tokio::spawn(async move { qemu.quit().await });
    }

    pub(super) async fn settle(&mut self) {
        let Stage::Outgoing(outgoing) = std::mem::replace(&mut self.stage, Stage::Ended) else { return };
        match outgoing.settle().await {
            Settled::Departed(departed) => {
                let facts = self.departing(departed.facts());
                self.departed(departed, facts);
            }
            Settled::Stays(running, facts) => {
                self.stage = Stage::Running(running);
                if facts.stop_us.is_some() {
                    self.inside.stood_still();
                }
                if let Some(m) = &mut self.now.migration {
                    fill(m, &facts);
                    m.paused_by_migration = false;
                    m.post_copy_possible = false;
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

    fn write_down(&mut self, facts: &MigrationFacts) {
        let written = match self.record.as_mut().map(|record| record.write(facts)) {
            Some(Ok(())) => Ok(()),
            _ => Record::prepare(&self.paths.ephemeral_disks).and_then(|mut record| record.write(facts)),
        };
        if let Err(error) = written {
            // It is true all the same, and the guest stands still until it is told.
            tracing::error!(%error, "that the guest has left could not be written down");
        }
    }

    /// Copies what QEMU says into the state; what must be written down first is left out: `completed` and post-copy.
    fn take_facts(&mut self) {
        let Some(m) = &mut self.now.migration else { return };
        match &self.stage {
            Stage::Outgoing(outgoing) => {
                let mut facts = outgoing.facts().clone();
                if facts.status == MigrationStatus::Completed || facts.status.is_post_copy() {
                    facts.status = MigrationStatus::Device;
                    facts.end_us = None;
                }
                fill(m, &facts);
                m.guest_paused = outgoing.is_paused();
                m.paused_by_migration = outgoing.is_held();
                m.post_copy_possible = outgoing.can_post_copy();
                m.bandwidth_limit = outgoing.bandwidth();
            }
            Stage::Incoming(incoming) => {
                fill(m, incoming.facts());
                m.loaded =
                    matches!(incoming.facts().status, MigrationStatus::Completed | MigrationStatus::PostcopyActive);
            }
            _ => {}
        }
    }
}

pub(crate) fn check_name(socket: &str) -> Result<(), Refused> {
    if socket.is_empty() || socket.contains('/') || socket.starts_with('.') {
        let message = format!("{socket:?} is not a file name in the directory of launcher.sock");
        return Err(refused(Refusal::BadRequest, message));
    }
    Ok(())
}

/// The numbers of disks, and the names under which they are exported.
fn exports(disks: &[WritableDisk]) -> Vec<(usize, String)> {
    disks.iter().map(|disk| (disk.number, disk.volume.clone())).collect()
}

/// A departure whose memory had not all followed when the launcher that told of it ended: QEMU ended with that launcher.
pub(super) fn end_unserved(facts: &mut MigrationFacts) {
    if !facts.is_final() {
        facts.status = "failed".into();
        facts.error = Some("the source's launcher ended before all of the guest's memory had followed it".into());
        facts.cause = Some(Cause::Killed);
    }
}

fn fill(m: &mut MigrationFacts, facts: &Facts) {
    m.status = facts.status.as_str().into();
    m.mode = match facts.mode {
        Mode::PreCopy => MigrationMode::PreCopy,
        Mode::Paused => MigrationMode::Paused,
        Mode::PostCopy => MigrationMode::PostCopy,
    };
    m.recoverable = true;
    m.broken_us = facts.broken_us;
    m.recoveries = facts.recoveries;
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
    m.written.clone_from(&facts.written);
    m.throttle_percent = facts.throttle_percent;
    m.downtime_limit_ms = facts.downtime_limit_ms;
    m.total_ms = facts.total_ms;
    m.qemu_downtime_ms = facts.downtime_ms;
    m.expected_downtime_ms = facts.expected_downtime_ms;
    m.error = facts.error.clone();
    m.cause = facts.cause;
}
