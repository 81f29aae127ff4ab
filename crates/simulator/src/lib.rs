//! The real controllers on a simulated cluster, in virtual time.
//!
//! [`simulate`] runs the `decide` functions of crate `control` against a store that behaves like the API server, on caches
//! that lag behind it, beside nodes that play kubelet, handler and launcher, while a seed decides what goes wrong. After
//! every event it checks what must always hold; at the end nothing may be stuck. See docs/simulator.md.

mod backwards;
mod campaign;
mod check;
mod control_loop;
mod emptied;
mod event;
mod faults;
mod fence;
mod handler;
mod kubelet;
mod launchers;
mod limits;
mod machine;
mod maintained;
mod mutation;
mod post_copy;
mod quick;
mod random;
mod rates;
mod shrink;
mod sim;
mod standing;
mod standstill;
mod store;
mod trace;
mod users;

use std::collections::BTreeSet;
use std::time::Duration;

pub use campaign::{Summary, campaign, explain, run_of};
pub use check::{Rule, Violation};
pub use emptied::{Emptied, Leaving};
pub use godwit_api::MigrationPhase;
pub use limits::Limits;
pub use mutation::Mutation;
pub use rates::Faults;
pub use shrink::{Shrunk, shrink};

/// Migrations that may leave one node, and arrive on one, when nothing else is said.
pub const DEFAULT_PER_NODE: u32 = godwit_api::config::PARALLEL_OUTBOUND_MIGRATIONS_PER_NODE;

/// What is simulated.
#[derive(Clone, Debug)]
pub struct Options {
    /// Number of nodes.
    pub nodes: u32,
    /// Number of VMs, all with run strategy Always.
    pub vms: u32,
    /// Decides everything that is left open; the same seed gives the same run.
    pub seed: u64,
    /// What goes wrong.
    pub faults: Faults,
    /// For how long users ask for migrations and things go wrong (virtual time); after it the cluster gets time to settle.
    pub duration: Duration,
    /// How many migrations are asked for, for each VM.
    pub migrations: u32,
    /// Ask for all of them at once instead of spread over `duration`.
    pub at_once: bool,
    /// Something that is done when a migration comes to a phase, the first time only.
    pub blow: Option<(MigrationPhase, Blow)>,
    /// Something that is done when a migration comes to a step of its hand-over, the first time only.
    pub blow_at_step: Option<(Step, Blow)>,
    /// Keep the whole trace, not only its end.
    pub full_trace: bool,
    /// Controller processes, all of them at work at the same time (as when a leader has lost its lease and does not know yet).
    pub controllers: u32,
    /// The limits in the KubeVirt object; `None` leaves the defaults.
    pub limits: Option<Limits>,
    /// So many migrations of VMs drawn at random, instead of `migrations` for each.
    pub moves: Option<u32>,
    /// How often a source's handler reports progress.
    pub report_every: Duration,
    /// Numbers of injected faults (counted from 1) that are left out; see [`Report::injections`].
    pub without: BTreeSet<u64>,
    /// Rules that are not checked, to see what else there is beneath.
    pub unchecked: BTreeSet<Rule>,
    /// The VMs run already when time begins, instead of being started one by one (for clusters of tens of thousands).
    pub standing: bool,
    /// In a cluster that stands already: all VMs run on the node of this number (from 0), which is emptied. Users and faults stop
    /// when it is empty, or after `duration`.
    pub empty: Option<u32>,
    /// So many NodeMaintenances are asked for, each for a node and with fields drawn at random; most guests are then to be moved rather
    /// than shut down.
    pub maintenances: u32,
    /// Tells how much real time has passed, to measure how long decisions take. It changes nothing else.
    pub clock: Option<fn() -> Duration>,
    /// So soon after the death of its node a VM runs elsewhere, unless another node dies meanwhile; `None` checks only that it does
    /// in the end.
    pub rescued_within: Option<Duration>,
    /// Controllers hold what they know packed from one decision to the next. It changes nothing else.
    pub packed: bool,
    /// Something that is wrong with the controllers.
    pub mutation: Option<Mutation>,
}

impl Default for Options {
    /// Three nodes, three VMs that migrate once each within two minutes, nothing goes wrong.
    fn default() -> Self {
        Self {
            nodes: 3,
            vms: 3,
            seed: 0,
            faults: Faults::NONE,
            duration: Duration::from_secs(120),
            migrations: 1,
            at_once: false,
            blow: None,
            blow_at_step: None,
            full_trace: false,
            controllers: 1,
            limits: None,
            moves: None,
            report_every: Duration::from_secs(1),
            without: BTreeSet::new(),
            unchecked: BTreeSet::new(),
            standing: false,
            empty: None,
            maintenances: 0,
            clock: None,
            rescued_within: None,
            packed: false,
            mutation: None,
        }
    }
}

/// One thing that happens to a migration on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    /// A user deletes it.
    Cancel,
    /// A user deletes its target pod, which ends within its grace period.
    DeleteTargetPod,
    /// Its target launcher is killed.
    KillTarget,
    /// Its source launcher is killed.
    KillSource,
    /// The target's node dies.
    KillTargetNode,
    /// The source's node dies.
    KillSourceNode,
    /// The link between its nodes is cut for half a minute.
    CutLink,
    /// The controllers restart.
    RestartController,
    /// The source's node is cut off for some time.
    CutSourceNode,
    /// The target's node is cut off for some time.
    CutTargetNode,
    /// The source's node does not reach the API server for some time, but other nodes.
    DeafenSourceNode,
    /// The target's node does not.
    DeafenTargetNode,
    /// The API server is away for longer than any lease lasts.
    StopApiServer,
    /// Handler and kubelet of the source node restart.
    RestartSourceAgent,
    /// Handler and kubelet of the target node restart.
    RestartTargetAgent,
    /// Handler and kubelet of the source node stand still for some time.
    StallSourceAgent,
    /// Handler and kubelet of the target node stand still for some time.
    StallTargetAgent,
    /// The source's launcher stands still for some time, its QEMU does not.
    StallSourceLauncher,
    /// The target's launcher stands still for some time, its QEMU does not.
    StallTargetLauncher,
    /// The source's QEMU stands still for some time.
    StallSourceQemu,
    /// The target's QEMU stands still for some time.
    StallTargetQemu,
}

/// The steps of a hand-over (docs/hand-over.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The source begins to send.
    Sends,
    /// The guest stands still at the source, which may still run it.
    Stands,
    /// It is written down that the guest has left.
    Left,
    /// The guest runs at the target; in post-copy some of its memory is still to follow.
    Runs,
}

impl Step {
    /// All of them.
    pub const ALL: [Step; 4] = [Step::Sends, Step::Stands, Step::Left, Step::Runs];
}

impl Blow {
    /// All of them.
    pub const ALL: [Blow; 21] = [
        Blow::Cancel,
        Blow::DeleteTargetPod,
        Blow::KillTarget,
        Blow::KillSource,
        Blow::KillTargetNode,
        Blow::KillSourceNode,
        Blow::CutLink,
        Blow::RestartController,
        Blow::CutSourceNode,
        Blow::CutTargetNode,
        Blow::DeafenSourceNode,
        Blow::DeafenTargetNode,
        Blow::StopApiServer,
        Blow::RestartSourceAgent,
        Blow::RestartTargetAgent,
        Blow::StallSourceAgent,
        Blow::StallTargetAgent,
        Blow::StallSourceLauncher,
        Blow::StallTargetLauncher,
        Blow::StallSourceQemu,
        Blow::StallTargetQemu,
    ];
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed, to run it again.
    pub seed: u64,
    /// The first thing that must always hold and did not.
    pub violation: Option<Violation>,
    /// The last events before the end (or all of them, see [`Options::full_trace`]).
    pub trace: Vec<String>,
    /// Differs between any two runs that differ in anything that happened.
    pub trace_hash: u64,
    /// How much virtual time passed until everything was at rest.
    pub virtual_time: Duration,
    /// Events that were simulated.
    pub events: u64,
    /// Decisions that were taken.
    pub decisions: u64,
    /// How long they took together, and the longest of them, by [`Options::clock`].
    pub deciding: Duration,
    /// See `deciding`.
    pub longest_decision: Duration,
    /// Writes of the controllers that were carried out.
    pub writes: u64,
    /// Writes of the controllers that met a conflict.
    pub conflicts: u64,
    /// Migrations that ended well.
    pub succeeded: u64,
    /// Migrations that ended badly, cancelled ones included.
    pub failed: u64,
    /// Most migrations that were under way at the same time.
    pub most_at_once: u32,
    /// Most migrations that were leaving one node at the same time.
    pub most_from_one_node: u32,
    /// Most migrations that were arriving on one node at the same time.
    pub most_to_one_node: u32,
    /// Guests that died of an injected fault.
    pub guests_killed: u64,
    /// Faults that were injected, those left out included.
    pub injections: u64,
    /// Guests that were handed over in post-copy.
    pub post_copies: u64,
    /// Guests that were ended by the fence of their node.
    pub fenced: u64,
    /// VMs that were found to run in time after the death of their node.
    pub rescued: u64,
    /// How the node of [`Options::empty`] was emptied.
    pub emptied: Option<Emptied>,
}

impl Report {
    /// Panics with the seed and the end of the trace when something did not hold.
    ///
    /// # Panics
    /// See above; meant for tests.
    pub fn expect_sound(&self) -> &Self {
        if let Some(violation) = &self.violation {
            panic!("seed {}: {violation}\n{}\n(seed {})", self.seed, self.trace.join("\n"), self.seed);
        }
        self
    }
}

/// Runs one simulation to its end.
pub fn simulate(options: Options) -> Report {
    sim::Sim::new(options).run()
}
