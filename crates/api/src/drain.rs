//! The plan of a drain: what would become of everything on some nodes if they were emptied now. Godwit's own.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

string_enum! {
    /// What becomes of a VM when its node is emptied.
    DrainOutcome default Block {
        /// It is migrated while it runs.
        Migrate = "Migrate",
        /// Its guest is shut down.
        ShutDown = "ShutDown",
        /// Somebody else moves it (evictionStrategy `External`); the drain waits for that.
        External = "External",
        /// It stays, and with it the drain does not come to its end.
        Block = "Block",
    }
}

string_enum! {
    /// What becomes of another pod.
    PodOutcome default Block {
        /// It is evicted.
        Evict = "Evict",
        /// It is left alone: it belongs to the node.
        Ignore = "Ignore",
        /// It goes when other pods of its PodDisruptionBudget are healthy again.
        Wait = "Wait",
        /// It stays, and with it the drain does not come to its end.
        Block = "Block",
    }
}

string_enum! {
    /// What an expected duration rests on; the best that there was.
    DrainBasis default Size {
        /// The migration is under way and tells how far it is.
        Progress = "Progress",
        /// The guest's last migration, as it was measured.
        LastMigration = "LastMigration",
        /// How fast the guest writes to its memory, as it was measured while it ran (`status.dirtyRate`), and the bandwidth.
        DirtyRate = "DirtyRate",
        /// What the guest was measured to write, and the link to carry, before a migration that did not end.
        Forecast = "Forecast",
        /// How much there is to copy at most, and the bandwidth that other migrations had or that is configured. How fast the
        /// guest writes to its memory is not known.
        Size = "Size",
        /// How long a shutdown may take.
        GracePeriod = "GracePeriod",
    }
}

string_enum! {
    /// What an expected bandwidth rests on; the best that there was.
    BandwidthBasis default Assumed {
        /// What the last migrations between the two nodes got.
        Pair = "Pair",
        /// What the last migrations from or to the node that is left got.
        Node = "Node",
        /// What the last migrations in the cluster got.
        Cluster = "Cluster",
        /// What is allowed: nothing slower was measured.
        Configured = "Configured",
        /// Nothing is configured and nothing was measured.
        Assumed = "Assumed",
    }
}

api_struct! {
    /// A time from now on, in milliseconds.
    DrainDuration {
        /// As is likely; unset when nothing can be said.
        milliseconds: Option<u64>,
        /// No less.
        min_milliseconds: Option<u64>,
        /// No more; unset when there is no telling.
        max_milliseconds: Option<u64>,
    }
}

api_struct! {
    /// What would become of everything on some nodes if they were emptied now. Nothing is changed by making it.
    DrainPlan {
        /// The nodes to be emptied.
        nodes: Vec<String>,
        /// When it was made.
        made_at: Option<Time>,
        /// Whether something stays, so that the drain would not come to its end.
        blocked: Option<bool>,
        /// The VMs; those that leave first, in the order in which they begin to.
        vms: Vec<DrainVm>,
        /// The other pods.
        pods: Vec<DrainPod>,
        /// Until everything that can leave has left.
        duration: Option<DrainDuration>,
        /// What it takes so long for; the strongest first.
        bounds: Vec<DrainBound>,
        /// What the plan could not take into account.
        notes: Vec<String>,
    }
}

api_struct! {
    /// What would become of a VM.
    DrainVm {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// The node that it is to leave.
        node: String,
        /// What becomes of it.
        outcome: Option<DrainOutcome>,
        /// Why, in sentences; everything that blocks it.
        reasons: Vec<String>,
        /// The eviction strategy that counts, its own or the cluster's.
        eviction_strategy: Option<String>,
        /// The run strategy of its VM; unset for a VMI of its own.
        run_strategy: Option<String>,
        /// Whether it is started again after its shutdown.
        restarts: Option<bool>,
        /// Where it goes to, or is started again. Unset when no node was found, or somebody else decides.
        target_node: Option<String>,
        /// The migration that is under way or waits already.
        migration_name: Option<String>,
        /// The MigrationPolicy that applies.
        migration_policy_name: Option<String>,
        /// Bytes of memory, and of disks that are local to the node, to be copied at least once.
        bytes: Option<u64>,
        /// Until it begins to leave.
        start: Option<DrainDuration>,
        /// From then on until it has left.
        duration: Option<DrainDuration>,
        /// What the duration rests on.
        basis: Option<DrainBasis>,
        /// How fast the guest was measured to write to its memory, in bytes a second.
        dirty_bytes_per_second: Option<u64>,
        /// How fast its migration is taken to go, in bytes a second.
        bytes_per_second: Option<u64>,
        /// What that rests on.
        bandwidth_basis: Option<BandwidthBasis>,
        /// Whether the copying comes to its end by itself, where that can be told.
        converges: Option<bool>,
        /// How long the guest would stand still for its migration, where that can be told.
        downtime: Option<DrainDuration>,
    }
}

api_struct! {
    /// What would become of a pod that is no VM's.
    DrainPod {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// The node that it is to leave.
        node: String,
        /// What becomes of it.
        outcome: Option<PodOutcome>,
        /// Why.
        reasons: Vec<String>,
    }
}

api_struct! {
    /// Something that makes a drain take as long as it does.
    DrainBound {
        /// The setting, as `parallelOutboundMigrationsPerNode`; or `ResourceQuota`.
        limit: String,
        /// Its value; bytes a second for a bandwidth.
        value: Option<u64>,
        /// The node that it is about.
        node: Option<String>,
        /// The ResourceQuota, as namespace and name.
        quota: Option<String>,
        /// How many VMs wait for it at some time.
        vms: Option<u32>,
        /// How long somebody waits for it; for a bandwidth, how long the copying takes at least.
        milliseconds: Option<u64>,
    }
}

impl DrainPlan {
    /// Whether something stays.
    pub fn is_blocked(&self) -> bool {
        self.blocked == Some(true)
    }
}

impl DrainVm {
    /// Whether this is what becomes of it.
    pub fn is(&self, outcome: &DrainOutcome) -> bool {
        self.outcome.as_ref() == Some(outcome)
    }
}

impl DrainPod {
    /// Whether this is what becomes of it.
    pub fn is(&self, outcome: &PodOutcome) -> bool {
        self.outcome.as_ref() == Some(outcome)
    }
}
