//! NodeMaintenance: a node that shall be empty until the object is deleted (`reference/maintenance-hypershift.md`, 1).
//!
//! Three API groups have had this kind; all are served, with the same fields. Those of the newest are the reference's, a few
//! are godwit's own, which their documentation marks.

use crate::drain::DrainPlan;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};

/// The group of the newest NodeMaintenance.
pub const GROUP_MEDIK8S: &str = "nodemaintenance.medik8s.io";
/// The group of the one before.
pub const GROUP_KUBEVIRT: &str = "nodemaintenance.kubevirt.io";
/// The group of the oldest.
pub const GROUP_OLDEST: &str = crate::names::GROUP;
/// Every group that has NodeMaintenances, with its version; the newest first.
pub const GROUPS: [(&str, &str); 3] =
    [(GROUP_MEDIK8S, "v1beta1"), (GROUP_KUBEVIRT, "v1beta1"), (GROUP_OLDEST, "v1alpha1")];

macro_rules! groups {
    ($($(#[$doc:meta])* $module:ident: $group:literal $version:literal;)*) => {
        $($(#[$doc])* pub mod $module {
            use super::{NodeMaintenanceSpec, NodeMaintenanceStatus};
            use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

            /// A node that shall be empty until this object is deleted; cluster-scoped.
            #[derive(Clone, Debug, Default, PartialEq, serde::Deserialize, schemars::JsonSchema)]
            #[serde(default)]
            pub struct NodeMaintenance {
                /// Standard object metadata.
                pub metadata: ObjectMeta,
                /// Which node, and how.
                pub spec: NodeMaintenanceSpec,
                /// How far it is.
                pub status: NodeMaintenanceStatus,
            }

            kind!(cluster NodeMaintenance, $group, $version, "nodemaintenances", [spec, status]);

            impl super::Maintenance for NodeMaintenance {
                fn meta(&self) -> &ObjectMeta {
                    &self.metadata
                }
                fn spec(&self) -> &NodeMaintenanceSpec {
                    &self.spec
                }
                fn status(&self) -> &NodeMaintenanceStatus {
                    &self.status
                }
                fn set(&mut self, metadata: ObjectMeta, status: NodeMaintenanceStatus) {
                    self.metadata = metadata;
                    self.status = status;
                }
            }
        })*
    };
}

groups! {
    /// `nodemaintenance.medik8s.io/v1beta1`.
    medik8s: "nodemaintenance.medik8s.io" "v1beta1";
    /// `nodemaintenance.kubevirt.io/v1beta1`.
    kubevirt: "nodemaintenance.kubevirt.io" "v1beta1";
    /// `kubevirt.io/v1alpha1`.
    oldest: "kubevirt.io" "v1alpha1";
}

/// What the NodeMaintenances of all groups have.
pub trait Maintenance: Clone + PartialEq + serde::Serialize {
    /// Its metadata.
    fn meta(&self) -> &ObjectMeta;
    /// What is asked for.
    fn spec(&self) -> &NodeMaintenanceSpec;
    /// How far it is.
    fn status(&self) -> &NodeMaintenanceStatus;
    /// Replaces what a controller writes.
    fn set(&mut self, metadata: ObjectMeta, status: NodeMaintenanceStatus);
}

api_struct! {
    /// What is asked for.
    NodeMaintenanceSpec {
        /// The node; never changes.
        node_name: String,
        /// Why, for people.
        reason: Option<String>,
        /// Godwit's own: until when the node has to be empty. A time (RFC 3339), or a duration such as `2h30m`, counted from
        /// the object's creation.
        deadline: Option<String>,
        /// Godwit's own: what becomes of a maintenance whose node is not empty at its deadline; unset is `Abort`.
        on_deadline: Option<OnDeadline>,
        /// Godwit's own: VMs that have left because of it come back after it has ended.
        return_home: Option<bool>,
        /// Godwit's own: so many VMs are on their way out at once; unset leaves it to the limits of migrations.
        max_parallel: Option<u32>,
        /// Godwit's own: touch nothing, only say in `status.plan` what would happen.
        dry_run: Option<bool>,
    }
}

string_enum! {
    /// What becomes of a maintenance whose node is not empty at its deadline.
    OnDeadline default Abort {
        /// It fails, and what it has done is taken back: the node takes pods again.
        Abort = "Abort",
        /// It says so and goes on.
        Continue = "Continue",
    }
}

string_enum! {
    /// How far a maintenance is.
    MaintenancePhase default Unset {
        /// Nobody has looked at it yet.
        Unset = "",
        /// The node is being emptied.
        Running = "Running",
        /// The node is empty.
        Succeeded = "Succeeded",
        /// It was given up; what it had done is taken back.
        Failed = "Failed",
    }
}

string_enum! {
    /// What a VM on a node in maintenance is doing.
    VmProgress default Waiting {
        /// It is being migrated away.
        Migrating = "Migrating",
        /// Its migration waits for something, or for its turn.
        Waiting = "Waiting",
        /// Its guest is being shut down.
        ShuttingDown = "ShuttingDown",
        /// It cannot leave by itself; the message says why.
        Blocked = "Blocked",
    }
}

always_or_default!(MaintenancePhase, VmProgress);

api_struct! {
    /// How far it is.
    NodeMaintenanceStatus {
        /// Whether it is under way, done or given up.
        phase: MaintenancePhase,
        /// How many of the pods to evict are gone, in percent; never less than 0.
        drain_progress: Option<i32>,
        /// When this status last changed.
        last_update: Option<Time>,
        /// What went wrong last; stays when it is right again.
        last_error: Option<String>,
        /// Names of the pods that are still to go.
        pending_pods: Vec<String>,
        /// The same with their namespaces.
        pending_pods_refs: Vec<PodReference>,
        /// How many pods were on the node at the start.
        #[serde(rename = "totalpods")]
        total_pods: Option<i32>,
        /// How many of them were to be evicted.
        eviction_pods: Option<i32>,
        /// How often in a row the node's lease could not be had.
        error_on_lease_count: Option<i32>,
        /// Godwit's own: the VMs that are still on the node, and what each waits for.
        virtual_machine_instances: Vec<VmStatus>,
        /// Godwit's own: with `spec.maxParallel`, the VMs whose turn it is to leave, as `namespace/name`.
        leaving: Vec<String>,
        /// Godwit's own: it has closed its node, which is to be taken back.
        closed: Option<bool>,
        /// Godwit's own: of a dry run, what would happen.
        plan: Option<DrainPlan>,
        /// Godwit's own: until when the node has to be empty, from `spec.deadline`.
        deadline: Option<Time>,
        /// Godwit's own: the deadline has passed, the node was not empty, and it goes on (`onDeadline: Continue`).
        deadline_passed: Option<bool>,
    }
}

api_struct! {
    /// A pod.
    PodReference {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    }
}

api_struct! {
    /// A VM that is still on the node.
    VmStatus {
        /// The VMI's namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// What it is doing.
        state: VmProgress,
        /// The migration that is to take it away.
        migration_name: Option<String>,
        /// Where it goes, as far as that is decided.
        target_node: Option<String>,
        /// How much of the migration is done, in tens of percent.
        progress_percent: Option<u32>,
        /// What it waits for, or why it cannot leave.
        message: Option<String>,
    }
}

impl NodeMaintenanceSpec {
    /// Until when the node has to be empty, for a maintenance made at `created`.
    ///
    /// # Errors
    /// The text is neither a time nor a positive duration; the error says so to people.
    pub fn deadline_of(&self, created: Timestamp) -> Result<Option<Timestamp>, String> {
        let Some(text) = self.deadline.as_deref().filter(|text| !text.is_empty()) else { return Ok(None) };
        if let Ok(time) = text.parse::<Timestamp>() {
            return Ok(Some(time));
        }
        let duration = text.parse::<SignedDuration>().ok().filter(SignedDuration::is_positive);
        let end = duration.and_then(|duration| created.checked_add(duration).ok());
        end.map(Some).ok_or_else(|| {
            format!("{text:?} is neither a time (as 2026-11-22T18:00:00Z) nor a duration from its creation (as 2h30m)")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_times_or_durations() {
        let created = Timestamp::from_second(1_000_000).unwrap();
        let of = |text: &str| {
            NodeMaintenanceSpec { deadline: Some(text.to_owned()), ..NodeMaintenanceSpec::default() }
                .deadline_of(created)
        };
        assert_eq!(of("2h30m"), Ok(Some(Timestamp::from_second(1_009_000).unwrap())));
        assert_eq!(of("90s"), Ok(Some(Timestamp::from_second(1_000_090).unwrap())));
        assert_eq!(of("1970-01-20T00:00:00Z"), Ok(Some(Timestamp::from_second(1_641_600).unwrap())));
        assert_eq!(of(""), Ok(None));
        for wrong in ["soon", "-5m", "0s", "5", "2026-13-01T00:00:00Z"] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_fields_are_spelled_as_the_reference_spells_them() {
        let status = NodeMaintenanceStatus {
            phase: MaintenancePhase::Running,
            drain_progress: Some(0),
            total_pods: Some(3),
            eviction_pods: Some(2),
            error_on_lease_count: Some(1),
            pending_pods: vec!["p".into()],
            pending_pods_refs: vec![PodReference { namespace: "ns".into(), name: "p".into() }],
            ..NodeMaintenanceStatus::default()
        };
        let written = serde_json::to_value(&status).unwrap();
        assert_eq!(
            written,
            serde_json::json!({
                "phase": "Running", "drainProgress": 0, "totalpods": 3, "evictionPods": 2, "errorOnLeaseCount": 1,
                "pendingPods": ["p"], "pendingPodsRefs": [{"namespace": "ns", "name": "p"}],
            })
        );
    }
}
