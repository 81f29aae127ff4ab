//! What passes between a launcher and its handler: facts out, orders in.
//!
//! HTTP/1.1 with JSON bodies over the unix socket `launcher.sock` (docs/architecture.md, "Launcher RPC"). Unknown members
//! are ignored and new ones are optional, so that a handler and a launcher of different builds understand each other.

use crate::fence::{Clock, Deadline};
use godwit_api::VirtualMachineInstance;
pub use godwit_api::vmi::GuestCpu;
pub use godwit_qemu::accelerator::Accelerator;
pub use godwit_qemu::failure::Cause;
pub use godwit_qemu::forecast::{self, Written};
pub use godwit_qemu::transport::{self, Ability, Transport};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Path of [`State`].
pub const STATE: &str = "/v1/state";
/// Path of the NDJSON stream of [`State`].
pub const WATCH: &str = "/v1/watch";
/// Path of the QEMU events kept so far.
pub const EVENTS: &str = "/v1/events";
/// Path of [`VmOrder`].
pub const VM: &str = "/v1/vm";
/// Path of [`TargetOrder`].
pub const MIGRATION_TARGET: &str = "/v1/migration/target";
/// Path of [`LendOrder`]. An older launcher does not know it.
pub const MIGRATION_LEND: &str = "/v1/migration/lend";
/// Path of [`TransportOrder`].
pub const MIGRATION_TRANSPORT: &str = "/v1/migration/transport";
/// Path of [`SourceOrder`].
pub const MIGRATION_SOURCE: &str = "/v1/migration/source";
/// Path of the cancellation of an outgoing migration ([`MigrationRef`]).
pub const MIGRATION_CANCEL: &str = "/v1/migration/cancel";
/// Path of the switch of a running migration to post-copy ([`MigrationRef`]).
pub const MIGRATION_POST_COPY: &str = "/v1/migration/post-copy";
/// Path that stops the guest so that its migration comes to an end ([`MigrationRef`]).
pub const MIGRATION_PAUSE: &str = "/v1/migration/pause";
/// Path of the go for a target ([`GoOrder`]).
pub const MIGRATION_GO: &str = "/v1/migration/go";
/// Path of another link for a post-copy whose link broke ([`LinkOrder`]).
pub const MIGRATION_RECOVER: &str = "/v1/migration/recover";
/// Path of connections to the other end's launcher that this one is to carry ([`CarryOrder`]). An older launcher does not know it.
pub const MIGRATION_CARRY: &str = "/v1/migration/carry";
/// Path of the end of a target that will not be needed ([`MigrationRef`]).
pub const MIGRATION_ABANDON: &str = "/v1/migration/abandon";
/// Path of [`ShutdownOrder`].
pub const SHUTDOWN: &str = "/v1/shutdown";
/// Path that has [`MemoryFacts`] measured anew, unless that is just being done. An older launcher does not know it.
pub const MEASURE: &str = "/v1/measure";
/// Path of [`DisksOrder`]. An older launcher does not know it.
pub const DISKS: &str = "/v1/disks";
/// Path of [`RunUntilOrder`]. An older launcher does not know it, and its guest is the handler's alone to fence.
pub const RUN_UNTIL: &str = "/v1/run-until";
/// Path that stops the guest's CPUs.
pub const PAUSE: &str = "/v1/pause";
/// Path that lets the guest's CPUs run again.
pub const UNPAUSE: &str = "/v1/unpause";
/// Path that presses the machine's reset button. An older launcher does not know it.
pub const RESET: &str = "/v1/reset";
/// Path that has the guest reboot itself: by its agent, or where there is none by its power button, after which it is started over
/// ([`State::reboot`]). An older launcher does not know it, or only the first.
pub const REBOOT: &str = "/v1/reboot";
/// Path of what the guest agent says when it is asked now ([`GuestAnswers`]). An older launcher does not know it.
pub const GUEST: &str = "/v1/guest";

/// The newest way to build a guest's machine, beyond what its VMI says. What a guest was started with it keeps wherever it
/// goes ([`State::machine_revision`], `status.machineRevision`), until it is started anew.
///
/// 0: as launchers built it that knew of no revisions. 1: the memory balloon takes hints of free pages. 2: it takes none, and
/// there is a SCSI controller for disks that come while the guest runs, whether or not one is there from the start. 3: there is a
/// screen, unless its VMI wants none. 4: a processor that stands for the node's own (`host-model`, or none asked for) is spelled out
/// ([`VmOrder::host_cpu`]), and a named one is had whole or not at all.
pub const MACHINE_REVISION: u32 = 4;

/// A network interface of the guest, as the handler wired it in the pod's network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InterfaceOrder {
    /// The interface's name in the VMI (`spec.domain.devices.interfaces[].name`).
    pub name: String,
    /// The tap device, in the launcher's network namespace, that QEMU opens.
    pub tap: String,
    /// The guest's MAC address.
    pub mac: String,
    /// The MTU offered to the guest; none leaves the guest's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}

/// What the handler knows about a volume and the VMI does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeFacts {
    /// Size of the claim in bytes: a missing `disk.img` on a persistentVolumeClaim is created sparse with this size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_bytes: Option<u64>,
}

/// Define and start a VM (`PUT /v1/vm`). Idempotent for the same VMI uid.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VmOrder {
    /// The VMI as the API has it.
    pub vmi: VirtualMachineInstance,
    /// The wired interfaces, one for each interface of the VMI.
    #[serde(default)]
    pub interfaces: Vec<InterfaceOrder>,
    /// By volume name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub volumes: BTreeMap<String, VolumeFacts>,
    /// The accelerator to use; none lets the launcher find out what this machine can do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<Accelerator>,
    /// What stands for this node's own processor; none where that is not known, and from older handlers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_cpu: Option<GuestCpu>,
    /// Make the guest's memory such that another QEMU on this node can map it ([`State::shareable_memory`]).
    #[serde(default)]
    pub shareable_memory: bool,
    /// The newest [`MACHINE_REVISION`] that the handler wants, and will keep for the guest's targets. An older one knows none.
    #[serde(default)]
    pub machine_revision: u32,
    /// An older handler says nothing.
    #[serde(flatten)]
    pub run_until: Option<RunUntilOrder>,
}

/// The guest may run until then (`PUT /v1/run-until`, docs/fencing.md): when that has passed, the launcher kills QEMU, and starts
/// none before it has more time. Time that was given is not taken back. The answer waits for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RunUntilOrder {
    /// Milliseconds of `CLOCK_BOOTTIME`, which handler and launcher share.
    pub run_until_ms: u64,
    /// The same by `CLOCK_MONOTONIC`, on a node whose handler does not count the machine's sleep ([`Clock::Awake`]). Then only this
    /// counts; an older launcher does not know it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub awake_until_ms: Option<u64>,
}

impl RunUntilOrder {
    /// Until this time of this clock.
    #[must_use]
    pub fn by(clock: Clock, until: Duration) -> Self {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        match clock {
            Clock::Boot => Self { run_until_ms: ms(until), awake_until_ms: None },
            Clock::Awake => {
                let left = until.saturating_sub(clock.now());
                Self { run_until_ms: ms(Clock::Boot.now().saturating_add(left)), awake_until_ms: Some(ms(until)) }
            }
        }
    }

    /// The moment.
    #[must_use]
    pub fn deadline(self) -> Deadline {
        match self.awake_until_ms {
            Some(ms) => Deadline { clock: Clock::Awake, at: Duration::from_millis(ms) },
            None => Deadline { clock: Clock::Boot, at: Duration::from_millis(self.run_until_ms) },
        }
    }
}

/// Prepare to receive a VM (`PUT /v1/migration/target`). Never runs the guest. Idempotent for the same migration uid.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TargetOrder {
    /// UID of the VirtualMachineInstanceMigration.
    pub migration_uid: String,
    /// The VMI as the API has it.
    pub vmi: VirtualMachineInstance,
    /// The wired interfaces, one for each interface of the VMI, with the same MAC addresses as at the source.
    #[serde(default)]
    pub interfaces: Vec<InterfaceOrder>,
    /// By volume name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub volumes: BTreeMap<String, VolumeFacts>,
    /// The source's accelerator ([`State::accelerator`]). A target whose machine cannot offer it refuses, because a stream
    /// from one accelerator does not run under the other. None: the launcher finds out what its machine can do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<Accelerator>,
    /// The source's machine type with its version ([`State::machine_type`], for example `pc-q35-7.2`). None: the VMI's
    /// `status.machine.type`, and without that the same default as the source took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_type: Option<String>,
    /// The migration may switch to post-copy. A machine that cannot receive so says so ([`TargetReady::post_copy`]).
    #[serde(default)]
    pub allow_post_copy: bool,
    /// How memory comes is agreed later: nobody can connect before [`MIGRATION_TRANSPORT`]. Without it QEMU's plain stream
    /// is expected at once.
    #[serde(default)]
    pub transport_follows: bool,
    /// As in [`VmOrder::shareable_memory`], for memory that is copied.
    #[serde(default)]
    pub shareable_memory: bool,
    /// Name, within the directory of `launcher.sock`, of the unix socket on which the handler hands over the source's own
    /// memory, which is on this node. A launcher that cannot take it, or is older, has it copied
    /// ([`TargetReady::by_reference`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_socket: Option<String>,
    /// By volume name, for the disks that the guest was given while it ran: names, within the directory of `launcher.sock`, of
    /// the unix sockets on which the handler hands their images over.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disk_sockets: BTreeMap<String, String>,
}

/// Make the disks that come and go while the guest runs those of this VMI (`PUT /v1/disks`): hotpluggable volumes. Those that the
/// VMI does not have any more are taken out; those that are new and have a socket are plugged in. Repeating it changes nothing.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DisksOrder {
    /// The VMI as the API has it.
    pub vmi: VirtualMachineInstance,
    /// As in [`TargetOrder::disk_sockets`], for those that are to be plugged in.
    #[serde(default)]
    pub sockets: BTreeMap<String, String>,
}

/// Source: hand the guest's memory over on a unix socket (`POST /v1/migration/lend`), for a target on this node to map it too.
/// Refused where it is QEMU's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LendOrder {
    /// UID of the VirtualMachineInstanceMigration.
    pub migration_uid: String,
    /// Name, within the directory of `launcher.sock`, of the unix socket on which the handler takes it.
    pub socket: String,
}

/// Where a target receives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TargetReady {
    /// Name, within the directory of `launcher.sock`, of the unix socket on which the target's QEMU accepts the memory stream.
    pub socket: String,
    /// The same for the blocks of disks that are not shared (NBD); none when every disk is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocks_socket: Option<String>,
    /// It was allowed to receive in post-copy, and this machine can. Only then may the source be allowed it too: QEMU wants
    /// the same on both ends.
    #[serde(default)]
    pub post_copy: bool,
    /// It waits for [`MIGRATION_TRANSPORT`], as it was told to ([`TargetOrder::transport_follows`]).
    #[serde(default)]
    pub awaits_transport: bool,
    /// It has the source's own memory ([`TargetOrder::memory_socket`]). The source must be told the same
    /// ([`SourceOrder::by_reference`]); pages that are sent are refused.
    #[serde(default)]
    pub by_reference: bool,
    /// How its QEMU could receive memory.
    #[serde(default)]
    pub ability: Ability,
    /// By volume name, for the disks that are copied. An older launcher says nothing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rooms: BTreeMap<String, DiskRoom>,
}

/// Target: how memory comes (`PUT /v1/migration/transport`). The first order stands; the state that is answered says which
/// ([`MigrationFacts::transport`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TransportOrder {
    /// UID of the VirtualMachineInstanceMigration.
    pub migration_uid: String,
    /// What both ends have agreed on.
    #[serde(default)]
    pub transport: Transport,
}

/// Start the outgoing migration (`PUT /v1/migration/source`), once for a migration uid.
///
/// The same uid again with another bandwidth changes the bandwidth of the one that is under way; nothing else of it changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceOrder {
    /// UID of the VirtualMachineInstanceMigration.
    pub migration_uid: String,
    /// Name, within the directory of `launcher.sock`, of the unix socket to which QEMU sends the memory stream. The handler
    /// listens there and carries it to the target's node.
    pub socket: String,
    /// The same for disks' blocks (NBD), when disks that are not shared have to move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocks_socket: Option<String>,
    /// Most bytes a second; none or 0 is unlimited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_second: Option<u64>,
    /// The longest standstill to accept, in milliseconds; the launcher begins lower and rises to it only as needed. None: 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_downtime_ms: Option<u64>,
    /// Slow the guest down when it writes faster than the link carries.
    #[serde(default)]
    pub allow_auto_converge: bool,
    /// It may be switched to post-copy ([`MIGRATION_POST_COPY`]). Only where the target said [`TargetReady::post_copy`].
    #[serde(default)]
    pub allow_post_copy: bool,
    /// The target has the guest's memory already ([`TargetReady::by_reference`]): it is not sent.
    #[serde(default)]
    pub by_reference: bool,
    /// How memory is carried, as the target was told.
    #[serde(default)]
    pub transport: Transport,
    /// What the target said of the disks that are copied ([`TargetReady::rooms`]). What it said nothing of is not checked, and
    /// is copied whole.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rooms: BTreeMap<String, DiskRoom>,
}

/// The source is stopped for good (`POST /v1/migration/go`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GoOrder {
    /// UID of the VirtualMachineInstanceMigration.
    pub migration_uid: String,
    /// The guest was paused by its user at the source ([`MigrationFacts::guest_paused`]): it is the target's from now on, and
    /// stays paused there until somebody unpauses it.
    #[serde(default)]
    pub paused: bool,
    /// An older handler says nothing.
    #[serde(flatten)]
    pub run_until: Option<RunUntilOrder>,
}

/// Another link for a post-copy (`POST /v1/migration/recover`): first the target, which listens for it, then the source, which
/// dials. A link that QEMU still holds for whole is broken by it. May be repeated with another socket until the guest's memory
/// flows again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LinkOrder {
    /// UID of the VirtualMachineInstanceMigration.
    pub migration_uid: String,
    /// Name, within the directory of `launcher.sock`, of the unix socket. The target's QEMU makes it; the source's dials it.
    pub socket: String,
}

/// Carry QEMU's memory stream over connections to the other end's launcher (`POST /v1/migration/carry`). The handlers have opened
/// them and made sure of each other; whatever becomes of the handlers, the stream goes on.
///
/// The source gets all connections of a link in one order, listens on QEMU's socket, and answers when the target's launcher
/// has shown on all of them who it is. The target gets each as it comes, and answers at once. A link of a greater number ends the one before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CarryOrder {
    /// UID of the VirtualMachineInstanceMigration.
    pub migration_uid: String,
    /// Which end this launcher is.
    pub role: MigrationRole,
    /// Which link of the migration they belong to: 0 is the first, those of a post-copy that goes on have greater numbers.
    pub link: u64,
    /// Which connections of the link they are, from 0, QEMU's main one, in the order in which they are handed over. None: a link of no
    /// greater number that QEMU has not begun with is given up.
    pub streams: Vec<u8>,
    /// Name, within the directory of `launcher.sock`, of QEMU's unix socket.
    pub socket: String,
    /// The same of the one on which the handler hands the connections over.
    pub handed: String,
    /// How memory is carried, as agreed.
    #[serde(default)]
    pub transport: Transport,
    /// What the two launchers know each other by; none goes in the clear.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secured: Option<Secured>,
}

impl CarryOrder {
    /// That nothing comes of the source's connections up to those of link `link`, if QEMU has not begun with them.
    #[must_use]
    pub fn none(migration_uid: &str, link: u64) -> Self {
        Self {
            migration_uid: migration_uid.to_owned(),
            role: MigrationRole::Source,
            link,
            streams: Vec::new(),
            socket: "none.sock".into(),
            handed: "none.sock".into(),
            transport: Transport::default(),
            secured: None,
        }
    }
}

/// A migration's own key and certificate, and whom it talks to. Good for the streams of this migration and for nothing else.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Secured {
    /// The certificate: DER in base64.
    pub certificate: String,
    /// Its private key: PKCS#8 in base64.
    pub key: String,
    /// SHA-256 of the other end's certificate, in lower-case hexadecimal digits.
    pub peer: String,
}

/// Without the key.
impl std::fmt::Debug for Secured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secured").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// What this launcher carries of a migration's memory stream ([`CarryOrder`]).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CarriedFacts {
    /// Which link it is.
    pub link: u64,
    /// It is not over.
    pub flows: bool,
    /// At the source: QEMU has yet to open its first connection. An older launcher does not tell.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub awaits_qemu: bool,
    /// Bytes from QEMU to the other end, over all links.
    pub out: u64,
    /// Bytes from the other end to QEMU, over all links.
    pub back: u64,
    /// Microseconds that the connections took to take what went out, all of them together.
    pub writing_us: u64,
    /// Why it broke, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// It broke because the other end acknowledged nothing any more. An older launcher does not tell.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub timed_out: bool,
}

/// Names the migration that an order is about, so that an order that arrives late cannot hit the next one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MigrationRef {
    /// UID of the VirtualMachineInstanceMigration.
    pub migration_uid: String,
}

/// The guest agent's own answers (QEMU `docs/interop/qemu-ga-ref`), by command; what it does not know is left out.
pub type GuestAnswers = BTreeMap<String, serde_json::Value>;

/// Shut the guest down: ACPI power button, then kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ShutdownOrder {
    /// How long the guest may take; 0 kills at once.
    pub grace_seconds: u64,
}

/// Where a VM's life stands in this launcher.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DomainPhase {
    /// No VM has been ordered yet.
    #[default]
    Undefined,
    /// A target: QEMU is there, receives or has received, and does not run the guest.
    Incoming,
    /// The guest runs here.
    Running,
    /// The guest is here and stopped on purpose.
    Paused,
    /// A source in post-copy: the guest runs at the target, or will, and never here again; this QEMU still serves its memory.
    HandedOver,
    /// The guest has shut itself down, or was told to; QEMU is gone. Or a target that was abandoned.
    Shutdown,
    /// QEMU ended in a way nobody asked for, or could not be started.
    Crashed,
    /// The guest lives on another node; QEMU is gone.
    MigratedAway,
}

impl DomainPhase {
    /// Whether nothing follows: the launcher exits soon after reporting it.
    pub fn is_final(self) -> bool {
        matches!(self, DomainPhase::Shutdown | DomainPhase::Crashed | DomainPhase::MigratedAway)
    }
}

/// Everything true about this launcher's VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct State {
    /// UID of the VMI this launcher was started for.
    pub vmi_uid: String,
    /// Where the VM's life stands.
    pub phase: DomainPhase,
    /// What QEMU calls its state (`running`, `inmigrate`, `postmigrate`, …), when there is a QEMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qemu_status: Option<String>,
    /// KVM or TCG, once known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<Accelerator>,
    /// Why this accelerator, in a sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerator_reason: Option<String>,
    /// QEMU's version, for example `7.2.22`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qemu_version: Option<String>,
    /// Machine type with its version, for example `pc-q35-7.2`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine_type: Option<String>,
    /// How its machine was built ([`MACHINE_REVISION`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine_revision: Option<u32>,
    /// The processor that it was given; none where that is the node's own, whatever that is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_cpu: Option<GuestCpu>,
    /// Another QEMU on this node could map the guest's memory ([`MIGRATION_LEND`]).
    pub shareable_memory: bool,
    /// How its QEMU could carry memory.
    pub ability: Ability,
    /// It knows [`MIGRATION_CARRY`].
    pub carries_streams: bool,
    /// Process id of QEMU, as this launcher's process namespace numbers it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qemu_pid: Option<u32>,
    /// Resident memory of the launcher itself (without QEMU), in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub launcher_rss_bytes: Option<u64>,
    /// What the guest agent says, when one has answered.
    pub guest_agent: GuestAgentFacts,
    /// Why the guest's TPM does not work any more, in a sentence, once it does not. The guest runs on and cannot be moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm_failure: Option<String>,
    /// Why the VM ended, in a sentence, once it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_reason: Option<String>,
    /// The guest was killed because its node might not run it any more ([`RunUntilOrder`]).
    pub fenced: bool,
    /// The reboot by the power button that is under way, or that the guest did not take part in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reboot: Option<RebootFacts>,
    /// What was measured of the guest's memory.
    pub memory: MemoryFacts,
    /// The last or current migration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationFacts>,
    /// The volumes that are disks of the guest, in the order of the VMI's disks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeState>,
}

impl State {
    /// The facts of migration `uid`, seen from its `role`; those of another migration (a launcher keeps its last one) do not count.
    #[must_use]
    pub fn migration_of(&self, uid: &str, role: MigrationRole) -> Option<&MigrationFacts> {
        self.migration.as_ref().filter(|m| m.uid == uid && m.role == role)
    }

    /// The guest has been told to power down so that it is started over. It is not sent away meanwhile: at a target its
    /// power-off would be its end.
    #[must_use]
    pub fn is_rebooting(&self) -> bool {
        self.reboot.is_some_and(|reboot| reboot.given_up_us.is_none())
    }
}

/// A reboot by the power button ([`REBOOT`]). There is none any more once the guest has started over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RebootFacts {
    /// When it was asked for, microseconds since the Unix epoch by this host's clock.
    pub asked_us: i64,
    /// When the guest had not powered down in time, by the same clock. It runs on, and when it powers down later it ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub given_up_us: Option<i64>,
}

/// The guest's memory, as it was measured while the guest ran here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MemoryFacts {
    /// Bytes that the guest has; 0 before anything was measured.
    pub total_bytes: u64,
    /// Bytes of it that are there: what was never written to is not.
    pub present_bytes: u64,
    /// How much of it the guest writes to within some times, the shortest first.
    pub written: Vec<Written>,
    /// When all of that had been measured last, microseconds since the Unix epoch by this host's clock. The shorter times may be
    /// newer already, or the only ones that are known yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measured_us: Option<i64>,
    /// A guest that runs is sent in one pass, since this QEMU loses track of what is written between two.
    pub one_pass: bool,
}

/// A volume as the guest has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VolumeState {
    /// The volume's name in the VMI.
    pub name: String,
    /// The device that the guest most likely calls it by, for example `vda`.
    pub target: String,
    /// What the guest sees of it, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// The persistentVolumeClaim behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub claim: Option<String>,
    /// Both nodes see it; otherwise a migration copies it.
    pub shared: bool,
    /// SHA-256 of the image that it lies above, once that is known. A target that has the same gets only what was written
    /// above it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// It came while the guest ran, to this place; none of those that were there from the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub place: Option<u32>,
}

/// What a target has for a disk that is copied to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DiskRoom {
    /// Which file system it is on, as the target numbers them: disks on the same one share its room.
    pub filesystem: u64,
    /// Free bytes of that file system.
    pub free_bytes: u64,
    /// SHA-256 of the image that it lies above; none when it lies above none, or when that was not known in time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
}

/// What the guest agent says about the inside.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GuestAgentFacts {
    /// Whether it answers now.
    pub connected: bool,
    /// The guest's host name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// The guest's operating system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub os: Option<GuestOs>,
    /// The guest's interfaces, the loopback left out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<GuestInterface>,
    /// When its clock was last set to this host's, microseconds since the Unix epoch: after it arrived, or stood still.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clock_set_us: Option<i64>,
}

/// The guest's operating system, as its agent names it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GuestOs {
    /// Short id, for example `fedora`.
    pub id: String,
    /// Name, for example `Fedora Linux`.
    pub name: String,
    /// The name with the version.
    pub pretty_name: String,
    /// Version, for example `40 (Cloud Edition)`.
    pub version: String,
    /// Version id, for example `40`.
    pub version_id: String,
    /// Kernel release.
    pub kernel_release: String,
    /// Kernel version.
    pub kernel_version: String,
    /// Machine hardware name, for example `x86_64`.
    pub machine: String,
}

/// One interface as the guest names and configures it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GuestInterface {
    /// Name in the guest, for example `eth0`.
    pub name: String,
    /// MAC address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Addresses without prefix lengths, the agent's order, IPv4 and IPv6.
    pub addresses: Vec<String>,
}

/// Which end of a migration this launcher is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MigrationRole {
    /// The guest leaves.
    Source,
    /// The guest arrives.
    Target,
}

/// How a guest moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MigrationMode {
    /// Its memory is copied while it runs at the source.
    #[default]
    PreCopy,
    /// It runs at the target while the rest of its memory follows.
    PostCopy,
    /// It was stopped at the source so that the copying comes to an end.
    Paused,
}

/// A migration as this end's QEMU sees it. Times are microseconds since the Unix epoch by this host's clock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MigrationFacts {
    /// UID of the VirtualMachineInstanceMigration.
    pub uid: String,
    /// Which end this is.
    pub role: MigrationRole,
    /// QEMU's word: `setup`, `active`, `device`, `postcopy-active`, `postcopy-paused`, `completed`, `failed`, `cancelling`,
    /// `cancelled`, …; `none` before it began. A source reports `completed` and `postcopy-…` only after it has written down
    /// that the guest has left, and forced that to the disk. `postcopy-paused` says that the link broke during post-copy; it
    /// can be another one's turn ([`MIGRATION_RECOVER`]).
    pub status: String,
    /// How the guest moves; it only ever gets from pre-copy to one of the others.
    #[serde(default)]
    pub mode: MigrationMode,
    /// Source: the guest will never run here again, which is written down. This, not the status, is what a go needs.
    #[serde(default)]
    pub handed_over: bool,
    /// Source: the guest was paused by its user before it left. The go has to say so ([`GoOrder::paused`]).
    #[serde(default)]
    pub guest_paused: bool,
    /// Source: this migration stands the guest still at present ([`MIGRATION_PAUSE`]); it runs again if the migration fails.
    #[serde(default)]
    pub paused_by_migration: bool,
    /// Source: [`MIGRATION_POST_COPY`] would be obeyed now.
    #[serde(default)]
    pub post_copy_possible: bool,
    /// Memory stays where it is, both ends map it: what is sent is the rest of the machine.
    #[serde(default)]
    pub by_reference: bool,
    /// How memory is carried.
    #[serde(default)]
    pub transport: Transport,
    /// The memory stream goes through this launcher. None: through its handler, whose end is the stream's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub carried: Option<CarriedFacts>,
    /// This launcher knows [`MIGRATION_RECOVER`]. An older one's guest is lost with the link of its post-copy.
    #[serde(default)]
    pub recoverable: bool,
    /// Since when post-copy has had no link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken_us: Option<i64>,
    /// How often post-copy has gone on over another link.
    #[serde(default)]
    pub recoveries: u64,
    /// When it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_us: Option<i64>,
    /// Source: when the guest's CPUs stopped for the switchover.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_us: Option<i64>,
    /// Target: when the guest's CPUs ran; source: when they ran again after a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume_us: Option<i64>,
    /// When it reached `completed`, `failed` or `cancelled`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_us: Option<i64>,
    /// Target: QEMU has what it needs to run the guest, and waits for the go.
    #[serde(default)]
    pub loaded: bool,
    /// Target: the go was given.
    #[serde(default)]
    pub gone: bool,
    /// Bytes of guest memory in all.
    #[serde(default)]
    pub total_bytes: u64,
    /// Bytes sent so far.
    #[serde(default)]
    pub processed_bytes: u64,
    /// Bytes of guest memory that still have to be sent.
    #[serde(default)]
    pub remaining_bytes: u64,
    /// Measured over the last looks, a second at most; over all of it once it has ended. 0 until it can be told.
    #[serde(default)]
    pub bytes_per_second: u64,
    /// Most bytes a second that it is allowed; none is unlimited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_limit: Option<u64>,
    /// By how many per cent auto-converge slows the guest down at present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle_percent: Option<u64>,
    /// How fast the guest writes to its memory, as QEMU estimates it after each pass.
    #[serde(default)]
    pub dirty_bytes_per_second: u64,
    /// Passes over the memory so far.
    #[serde(default)]
    pub iteration: u64,
    /// What the last of them have shown that the guest writes to, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub written: Vec<Written>,
    /// The standstill that the source allows itself at present, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_limit_ms: Option<u64>,
    /// Time from start to end by QEMU's count, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_ms: Option<u64>,
    /// The standstill as the source's QEMU counts it, in milliseconds. It leaves the target's part out: for the truth take the
    /// target's `resume_us` minus the source's `stop_us`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu_downtime_ms: Option<u64>,
    /// The standstill that QEMU expects if it switched over now, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_downtime_ms: Option<u64>,
    /// Why it failed, in QEMU's words or this launcher's. The target's often are the telling ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What kind of failure that is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
}

impl MigrationFacts {
    /// The facts before anything has happened.
    pub fn new(uid: impl Into<String>, role: MigrationRole) -> Self {
        MigrationFacts {
            uid: uid.into(),
            role,
            status: "none".into(),
            mode: MigrationMode::PreCopy,
            handed_over: false,
            guest_paused: false,
            paused_by_migration: false,
            post_copy_possible: false,
            by_reference: false,
            transport: Transport::default(),
            carried: None,
            recoverable: false,
            broken_us: None,
            recoveries: 0,
            start_us: None,
            stop_us: None,
            resume_us: None,
            end_us: None,
            loaded: false,
            gone: false,
            total_bytes: 0,
            processed_bytes: 0,
            remaining_bytes: 0,
            bytes_per_second: 0,
            bandwidth_limit: None,
            throttle_percent: None,
            dirty_bytes_per_second: 0,
            iteration: 0,
            written: Vec::new(),
            downtime_limit_ms: None,
            total_ms: None,
            qemu_downtime_ms: None,
            expected_downtime_ms: None,
            error: None,
            cause: None,
        }
    }

    /// Whether this end has nothing more to wait for from QEMU.
    pub fn is_final(&self) -> bool {
        matches!(self.status.as_str(), "completed" | "failed" | "cancelled")
    }
}

/// One event of QEMU's, as `GET /v1/events` lists them (the last 1024, in order).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EventRecord {
    /// Microseconds since the Unix epoch, QEMU's stamp.
    pub at_us: i64,
    /// QEMU's name of it, for example `STOP`.
    pub event: String,
    /// Its data.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub data: serde_json::Value,
}

/// Why an order was not carried out, for a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The order could not be read.
    BadRequest,
    /// No such path.
    NotFound,
    /// The order does not fit the state this VM is in, or names another migration.
    Conflict,
    /// The VM cannot be built as asked: a missing file, an unsupported field.
    Invalid,
    /// This QEMU on this machine, or this migration as it was started, cannot do that: it will be refused again.
    Unsupported,
    /// The launcher or QEMU failed at it.
    Failed,
}

/// The body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ErrorBody {
    /// For a program.
    pub reason: Refusal,
    /// For a person.
    pub message: String,
    /// What kind of failure of QEMU's it is, where it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
}

/// Where things are in the pod; a test puts them elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Sockets: `launcher.sock`, `console-serial0`, `qga` and those of migrations.
    pub sockets: PathBuf,
    /// Overlays, cloud-init and emptyDisk images, and the record of a completed migration.
    pub ephemeral_disks: PathBuf,
    /// One directory a persistentVolumeClaim volume.
    pub vmi_disks: PathBuf,
    /// One block device a persistentVolumeClaim volume whose claim is of mode `Block`.
    pub block_disks: PathBuf,
    /// One directory a containerDisk volume.
    pub container_disks: PathBuf,
    /// The unpacked image of `firmware.kernelBoot.container`.
    pub kernel_boot: PathBuf,
    /// One directory a configMap volume.
    pub config_maps: PathBuf,
    /// One directory a secret volume.
    pub secrets: PathBuf,
    /// One directory a cloudInitNoCloud volume whose data is in secrets.
    pub cloud_init: PathBuf,
    /// The claim with what of the guest outlives its pods, where it keeps anything.
    pub persistent_state: PathBuf,
}

impl Default for Paths {
    fn default() -> Self {
        Paths {
            sockets: "/var/run/kubevirt/sockets".into(),
            ephemeral_disks: "/var/run/kubevirt-ephemeral-disks".into(),
            vmi_disks: "/var/run/kubevirt-private/vmi-disks".into(),
            block_disks: "/dev/vmi-disks".into(),
            container_disks: "/var/run/kubevirt/container-disks".into(),
            kernel_boot: "/var/run/kubevirt/kernel-boot".into(),
            config_maps: "/var/run/kubevirt-private/config-map".into(),
            secrets: "/var/run/kubevirt-private/secret".into(),
            cloud_init: "/var/run/kubevirt-private/cloud-init".into(),
            persistent_state: "/var/run/kubevirt-private/persistent-state".into(),
        }
    }
}

impl Paths {
    /// The same layout below `root` (for tests).
    pub fn under(root: &std::path::Path) -> Self {
        let d = Paths::default();
        let below = |p: &PathBuf| root.join(p.strip_prefix("/").unwrap_or(p));
        Paths {
            sockets: below(&d.sockets),
            ephemeral_disks: below(&d.ephemeral_disks),
            vmi_disks: below(&d.vmi_disks),
            block_disks: below(&d.block_disks),
            container_disks: below(&d.container_disks),
            kernel_boot: below(&d.kernel_boot),
            config_maps: below(&d.config_maps),
            secrets: below(&d.secrets),
            cloud_init: below(&d.cloud_init),
            persistent_state: below(&d.persistent_state),
        }
    }

    /// The RPC socket.
    pub fn rpc_socket(&self) -> PathBuf {
        self.sockets.join("launcher.sock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_deadline_is_understood_by_launchers_that_know_one_clock_and_from_handlers_that_do() {
        let boot = RunUntilOrder::by(Clock::Boot, Duration::from_millis(7));
        assert_eq!(serde_json::to_value(boot).unwrap(), json!({"runUntilMs": 7}));
        let later = Clock::Awake.now() + Duration::from_secs(600);
        let awake = RunUntilOrder::by(Clock::Awake, later);
        assert!(Duration::from_millis(awake.run_until_ms) > Clock::Boot.now() + Duration::from_secs(300));
        assert_eq!(awake.deadline().clock, Clock::Awake);

        let go = |order| serde_json::to_value(GoOrder { migration_uid: "m".into(), paused: false, run_until: order });
        assert_eq!(go(Some(boot)).unwrap(), json!({"migrationUid": "m", "paused": false, "runUntilMs": 7}));
        for order in [None, Some(boot), Some(awake)] {
            let read: GoOrder = serde_json::from_value(go(order).unwrap()).unwrap();
            assert_eq!(read.run_until, order);
        }
    }
}
