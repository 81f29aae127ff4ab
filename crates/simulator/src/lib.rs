//! The real controllers on a simulated cluster, in virtual time.
//!
//! [`simulate`] runs the `decide` functions of crate `control` against a store that behaves like the API server, on caches
//! that lag behind it, beside nodes that play kubelet, handler and launcher, while a seed decides what goes wrong. After
//! every event it checks what must always hold; at the end nothing may be stuck. See docs/simulator.md.

mod check;
mod control_loop;
mod event;
mod faults;
mod handler;
mod kubelet;
mod machine;
mod random;
mod sim;
mod store;
mod trace;
mod users;

use std::time::Duration;

pub use godwit_api::MigrationPhase;

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
    /// Keep the whole trace, not only its end.
    pub full_trace: bool,
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
            full_trace: false,
        }
    }
}

/// How often things go wrong: of a thousand (`*_per_mille`), or so many times in an hour of virtual time (`*_per_hour`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Faults {
    /// Watch events that come up to seconds late.
    pub late_news_per_mille: u32,
    /// Watch events that come twice.
    pub double_news_per_mille: u32,
    /// Watches that break: what happens is missed until the kind is listed again.
    pub watch_breaks_per_hour: u32,
    /// Writes of controllers that are refused although nobody else has written.
    pub conflicts_per_mille: u32,
    /// Writes of controllers that are carried out, but whose answer is lost.
    pub lost_answers_per_mille: u32,
    /// The controllers restart; what they were carrying out is cut off between two writes.
    pub controller_restarts_per_hour: u32,
    /// The handler and kubelet of a node restart; launchers live on.
    pub agent_restarts_per_hour: u32,
    /// A launcher is killed with its QEMU.
    pub launcher_kills_per_hour: u32,
    /// A node dies and comes back, empty, minutes later.
    pub node_deaths_per_hour: u32,
    /// A node cannot reach anything for a while; its guests run on.
    pub node_cuts_per_hour: u32,
    /// The link between two nodes is cut for a while.
    pub link_cuts_per_hour: u32,
    /// Migrations at whose hand-over, within milliseconds around the go, something breaks.
    pub hand_over_per_mille: u32,
    /// Nodes that are cordoned for some minutes.
    pub cordons_per_hour: u32,
    /// Images that are pulled slowly (up to minutes).
    pub slow_pulls_per_mille: u32,
    /// Migrations that are deleted at some moment of their life.
    pub cancels_per_mille: u32,
    /// Migrations that are asked for twice at the same moment, past admission.
    pub twins_per_mille: u32,
    /// Guests that write faster than the link carries.
    pub busy_guests_per_mille: u32,
}

impl Faults {
    /// Nothing goes wrong.
    pub const NONE: Faults = Faults {
        late_news_per_mille: 0,
        double_news_per_mille: 0,
        watch_breaks_per_hour: 0,
        conflicts_per_mille: 0,
        lost_answers_per_mille: 0,
        controller_restarts_per_hour: 0,
        agent_restarts_per_hour: 0,
        launcher_kills_per_hour: 0,
        node_deaths_per_hour: 0,
        node_cuts_per_hour: 0,
        link_cuts_per_hour: 0,
        hand_over_per_mille: 0,
        cordons_per_hour: 0,
        slow_pulls_per_mille: 0,
        cancels_per_mille: 0,
        twins_per_mille: 0,
        busy_guests_per_mille: 0,
    };

    /// Everything goes wrong, often.
    pub const ALL: Faults = Faults {
        late_news_per_mille: 50,
        double_news_per_mille: 30,
        watch_breaks_per_hour: 120,
        conflicts_per_mille: 30,
        lost_answers_per_mille: 15,
        controller_restarts_per_hour: 60,
        agent_restarts_per_hour: 60,
        launcher_kills_per_hour: 40,
        node_deaths_per_hour: 15,
        node_cuts_per_hour: 20,
        link_cuts_per_hour: 60,
        hand_over_per_mille: 150,
        cordons_per_hour: 30,
        slow_pulls_per_mille: 100,
        cancels_per_mille: 250,
        twins_per_mille: 100,
        busy_guests_per_mille: 150,
    };
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
    /// Handler and kubelet of the source node restart.
    RestartSourceAgent,
    /// Handler and kubelet of the target node restart.
    RestartTargetAgent,
}

impl Blow {
    /// All of them.
    pub const ALL: [Blow; 12] = [
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
        Blow::RestartSourceAgent,
        Blow::RestartTargetAgent,
    ];
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed, to run it again.
    pub seed: u64,
    /// The first thing that must always hold and did not.
    pub violation: Option<String>,
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
    /// Guests that died of an injected fault.
    pub guests_killed: u64,
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
