//! What components tell Prometheus under `/metrics`: which metrics there are, with which labels, and what they mean.
//!
//! Where KubeVirt has a metric of the same meaning, its name and its labels are KubeVirt's; the others begin with `godwit_`. All are gauges:
//! they are worked out when they are asked for, from what the API says at that moment, and nothing is counted in between. So a
//! controller that takes over goes on where the one before it was.

use std::collections::BTreeMap;

/// A family has no more series than this, however many VMs there are: the newest, or the worst, are told. How many are left out is
/// told by [`SERIES_LEFT_OUT`].
pub const MOST_SERIES: usize = 1_000;

/// Who tells a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Teller {
    /// Each controller.
    Controller,
    /// The controller that decides.
    Leader,
    /// Each node's handler.
    Handler,
    /// Each `godwit api`.
    Api,
}

/// A metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// Who tells it.
    pub tellers: &'static [Teller],
    /// What it means, with its unit.
    pub help: &'static str,
}

macro_rules! metrics {
    ($($id:ident $name:literal $labels:expr, $tellers:expr, $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $id: Metric = Metric { name: $name, labels: &$labels, tellers: &$tellers, help: $help };
        )*

        /// Every metric, in the order of the documentation.
        pub const ALL: &[Metric] = &[$($id),*];
    };
}

/// A VMI, as KubeVirt's metrics name one.
const VMI: [&str; 3] = ["node", "namespace", "name"];
/// A migration, as KubeVirt's metrics name one.
const MIGRATION: [&str; 3] = ["vmi", "vmim", "namespace"];

metrics! {
    INFO "kubevirt_info" ["kubeversion"], [Teller::Controller, Teller::Handler, Teller::Api], "1; the label says which version this process is";
    CONTROLLER_READY "kubevirt_virt_controller_ready_status" [], [Teller::Controller], "1 when the controller could decide: it has listed everything";
    CONTROLLER_LEADING "kubevirt_virt_controller_leading_status" [], [Teller::Controller], "1 when the controller decides: it holds the lease";
    API_READY "kubevirt_virt_api_ready_status" [], [Teller::Api], "1 when webhooks and subresources are answered";
    HANDLER_READY "kubevirt_virt_handler_ready_status" [], [Teller::Handler], "1 when the handler looks after its node, 0 while it waits for the one before it to end";
    CERTIFICATE_END "godwit_certificate_not_after_timestamp_seconds" ["certificate"], [Teller::Api, Teller::Handler], "Until when a certificate counts, in seconds since 1970. virt-api: `ca`, `serving` (to kube-apiserver), `calling` (to handlers); virt-handler: `node`";

    VMI_PHASES "kubevirt_vmi_phase_count" ["node", "phase"], [Teller::Leader], "VMIs by node and phase (in small letters); without a node the label is empty";
    VMIS_OUTDATED "kubevirt_vmi_number_of_outdated" [], [Teller::Leader], "VMIs that run in another launcher than new ones would";
    VMI_NON_EVICTABLE "kubevirt_vmi_non_evictable" VMI, [Teller::Leader], "1 for each VMI on a node whose evictionStrategy is LiveMigrate and that cannot be migrated: it keeps its node from being emptied. Others have no series";

    MIGRATIONS_UNSET "kubevirt_vmi_migrations_in_unset_phase" [], [Teller::Leader], "Migrations that nobody has looked at yet";
    MIGRATIONS_PENDING "kubevirt_vmi_migrations_in_pending_phase" [], [Teller::Leader], "Migrations that wait";
    MIGRATIONS_SCHEDULING "kubevirt_vmi_migrations_in_scheduling_phase" [], [Teller::Leader], "Migrations whose target pod is not ready yet";
    MIGRATIONS_RUNNING "kubevirt_vmi_migrations_in_running_phase" [], [Teller::Leader], "Migrations whose target pod is ready and that are not over";
    MIGRATIONS_WAITING "godwit_vmi_migrations_waiting" ["limit"], [Teller::Leader], "Pending migrations by the setting whose limit they wait for; empty where only the next decision is waited for";
    MIGRATION_SUCCEEDED "kubevirt_vmi_migration_succeeded" MIGRATION, [Teller::Leader], "1 for each migration that has succeeded and whose object is still there (5 of a VMI are kept)";
    MIGRATION_FAILED "kubevirt_vmi_migration_failed" MIGRATION, [Teller::Leader], "1 for each migration that has failed and whose object is still there (5 of a VMI are kept)";
    MIGRATION_FAILURES "godwit_vmi_migration_failures_in_a_row" ["namespace", "name"], [Teller::Leader], "How many of a VMI's migrations have failed since one succeeded, of those whose objects are still there, without cancelled ones. Others than failing VMIs have no series";

    MIGRATION_START "kubevirt_vmi_migration_start_time_seconds" ["node", "namespace", "name", "migration_name"], [Teller::Leader], "When the VMI's last migration began to send, in seconds since 1970; the node is where the guest is now";
    MIGRATION_END "kubevirt_vmi_migration_end_time_seconds" ["node", "namespace", "name", "migration_name", "status"], [Teller::Leader], "When the VMI's last migration was over, in seconds since 1970; the status is `succeeded` or `failed`";
    MIGRATION_DATA_TOTAL "kubevirt_vmi_migration_data_total_bytes" VMI, [Teller::Leader], "Of a migration under way: bytes to be copied, as known now";
    MIGRATION_DATA_PROCESSED "kubevirt_vmi_migration_data_processed_bytes" VMI, [Teller::Leader], "Of a migration under way: bytes copied so far, repeated pages included";
    MIGRATION_DATA_REMAINING "kubevirt_vmi_migration_data_remaining_bytes" VMI, [Teller::Leader], "Of a migration under way: bytes still to copy";
    MIGRATION_DIRTY_RATE "kubevirt_vmi_migration_dirty_memory_rate_bytes" VMI, [Teller::Leader], "Of a migration under way: how fast the guest changes its memory, in bytes a second";
    MIGRATION_RATE "kubevirt_vmi_migration_memory_transfer_rate_bytes" VMI, [Teller::Leader], "Of a migration under way: how fast memory goes, in bytes a second";
    MIGRATION_EXPECTED_END "godwit_vmi_migration_expected_end_timestamp_seconds" VMI, [Teller::Leader], "Of a migration under way: when it will be over as far as the rates of now tell, in seconds since 1970";
    MIGRATION_CONVERGES "godwit_vmi_migration_converges" VMI, [Teller::Leader], "Of a migration under way: 1 when its copying comes to its end by itself as its passes so far tell, 0 when not; no series while they do not tell";
    MIGRATION_DURATION "godwit_vmi_migration_duration_seconds" VMI, [Teller::Leader], "How long the VMI's last migration took, if it has succeeded";
    MIGRATION_DOWNTIME "godwit_vmi_migration_downtime_seconds" VMI, [Teller::Leader], "How long the guest stood still in its last migration, from its stop at the source to its start at the target, if it has succeeded";
    FORECAST_DURATION "godwit_vmi_migration_forecast_duration_seconds" VMI, [Teller::Leader], "How long the VMI's last migration, or the one under way, was expected to take when it began";
    FORECAST_DOWNTIME "godwit_vmi_migration_forecast_downtime_seconds" VMI, [Teller::Leader], "How long the guest was expected to stand still in its last migration, or the one under way, when it began";

    EVACUATIONS "godwit_vmi_evacuations" ["node", "state"], [Teller::Leader], "VMIs that are to leave their node, by what they do: `migrating`, `waiting` (for its turn, for the end of a pause or of another migration), `external` (somebody else has to move it), `blocked` (given up, see godwit_vmi_evacuation_blocked)";
    EVACUATION_BLOCKED "godwit_vmi_evacuation_blocked" ["node", "namespace", "name", "reason"], [Teller::Leader], "1 for each VMI that is to leave its node and is not moved any more: its condition EvacuationStopped, with the reason `NotLiveMigratable` or `AttemptsUsedUp`";
    EVACUATION_START "godwit_vmi_evacuation_start_timestamp_seconds" VMI, [Teller::Leader], "Since when a VMI is to leave its node, in seconds since 1970";
    EVACUATION_FAILED "godwit_vmi_evacuation_failed_attempts" VMI, [Teller::Leader], "How many attempts to move a VMI away from its node have failed in this evacuation";

    MAINTENANCE "godwit_node_maintenance" ["maintenance", "node", "phase"], [Teller::Leader], "1 for each NodeMaintenance, with its phase; empty while nobody has looked at it";
    MAINTENANCE_DRAINED "godwit_node_maintenance_drained_ratio" ["maintenance", "node"], [Teller::Leader], "How much of the node is empty, from 0 to 1 (status.drainProgress)";
    MAINTENANCE_PODS "godwit_node_maintenance_pending_pods" ["maintenance", "node"], [Teller::Leader], "Pods that are still to go";
    MAINTENANCE_VMIS "godwit_node_maintenance_vmis" ["maintenance", "node", "state"], [Teller::Leader], "VMIs that are still on the node, by what they do: Migrating, Waiting, ShuttingDown, Blocked";
    MAINTENANCE_DEADLINE "godwit_node_maintenance_deadline_timestamp_seconds" ["maintenance", "node"], [Teller::Leader], "Until when the node has to be empty, in seconds since 1970, where there is a deadline";
    MAINTENANCE_FORECAST "godwit_node_maintenance_forecast_seconds" ["maintenance", "node"], [Teller::Leader], "Of a dry run: how long it would take until everything that can leave has left";

    NODE_CLOSED "godwit_node_closed" ["node"], [Teller::Leader], "1 for a node that takes no new pods, since it is cordoned or carries the drain taint; 0 for the others";
    HANDLER_HEARD "godwit_node_handler_heard" ["node"], [Teller::Leader], "1 while the handler of a node renews its fence lease in time, 0 when it has run out: its guests end, or have ended. No series for nodes that never had a handler";
    NODE_FENCED "godwit_node_fenced" ["node"], [Teller::Leader], "1 for a node whose guests are known to have ended since its handler was not heard, and are started elsewhere; 0 for the others that have a handler";

    SERIES_LEFT_OUT "godwit_metrics_series_left_out" ["metric"], [Teller::Leader], "How many series of a metric are not told, since there are more than 1,000 of it";
}

/// One value of a metric.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// The labels' values, in the order of [`Metric::labels`].
    pub labels: Vec<String>,
    /// Its value.
    pub value: f64,
}

/// What is told in one answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    families: BTreeMap<Metric, Family>,
}

/// The series of one metric, each with its rank: where there are too many, those of the highest rank are told.
#[derive(Clone, Debug, Default, PartialEq)]
struct Family {
    series: Vec<(i64, Series)>,
    left_out: usize,
}

impl Family {
    fn trim(&mut self) {
        // Stable: of the same rank the first ones stay.
        self.series.sort_by_key(|(rank, _)| std::cmp::Reverse(*rank));
        self.left_out += self.series.len().saturating_sub(MOST_SERIES);
        self.series.truncate(MOST_SERIES);
    }
}

impl Figures {
    /// Adds a value.
    pub fn tell<const N: usize>(&mut self, metric: Metric, labels: [&str; N], value: f64) {
        self.tell_ranked(metric, labels, value, 0);
    }

    /// Adds a value; where there are too many, those of a higher rank go first.
    pub fn tell_ranked<const N: usize>(&mut self, metric: Metric, labels: [&str; N], value: f64, rank: i64) {
        debug_assert_eq!(labels.len(), metric.labels.len(), "{}", metric.name);
        let family = self.families.entry(metric).or_default();
        family.series.push((rank, Series { labels: labels.map(str::to_owned).into(), value }));
        if family.series.len() >= 2 * MOST_SERIES {
            family.trim();
        }
    }

    /// Puts an end to it: what is too much is left out, and that is told.
    pub fn conclude(&mut self) {
        let mut left_out = Vec::new();
        for (metric, family) in &mut self.families {
            family.trim();
            if family.left_out > 0 {
                left_out.push((metric.name, family.left_out));
            }
        }
        for (name, count) in left_out {
            self.tell(SERIES_LEFT_OUT, [name], count as f64);
        }
    }

    /// Every metric that has a value, with its series.
    pub fn families(&self) -> impl Iterator<Item = (&Metric, impl Iterator<Item = &Series>)> {
        self.families.iter().map(|(metric, family)| (metric, family.series.iter().map(|(_, series)| series)))
    }

    /// The value of a series, if it is told.
    pub fn value<const N: usize>(&self, metric: Metric, labels: [&str; N]) -> Option<f64> {
        let series = self.families.get(&metric)?.series.iter().find(|(_, one)| one.labels.iter().eq(labels))?;
        Some(series.1.value)
    }

    /// How many series of a metric are told.
    pub fn count(&self, metric: Metric) -> usize {
        self.families.get(&metric).map_or(0, |family| family.series.len())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_once_there_and_prometheus_takes_them() {
        let names: BTreeSet<&str> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len());
        for metric in ALL {
            assert!(["kubevirt_", "godwit_"].iter().any(|prefix| metric.name.starts_with(prefix)), "{}", metric.name);
            // Whatever ends so is a counter, or a part of a histogram.
            for end in ["_total", "_count", "_sum", "_bucket", "_info"] {
                let known = ["kubevirt_vmi_phase_count", "kubevirt_info"].contains(&metric.name);
                assert!(known || !metric.name.ends_with(end), "{}", metric.name);
            }
            for word in metric.labels.iter().chain([&metric.name]) {
                let good = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_';
                assert!(!word.is_empty() && word.chars().all(good), "{word}");
            }
            // The encoder puts it there.
            assert!(!metric.help.ends_with('.') && !metric.tellers.is_empty(), "{}", metric.name);
        }
    }

    #[test]
    fn of_too_many_the_highest_are_told_and_the_rest_is_counted() {
        let mut figures = Figures::default();
        let most = i64::try_from(MOST_SERIES).unwrap();
        for number in 0..5 * most {
            figures.tell_ranked(MIGRATION_FAILURES, ["ns", &format!("vm{number}")], 1.0, number);
            figures.tell(VMI_NON_EVICTABLE, ["n", "ns", &format!("vm{number}")], 1.0);
        }
        figures.tell(MIGRATIONS_PENDING, [], 3.0);
        figures.conclude();
        assert_eq!((figures.count(MIGRATION_FAILURES), figures.count(VMI_NON_EVICTABLE)), (MOST_SERIES, MOST_SERIES));
        assert_eq!(figures.value(MIGRATION_FAILURES, ["ns", &format!("vm{}", 5 * most - 1)]), Some(1.0));
        assert_eq!(figures.value(MIGRATION_FAILURES, ["ns", &format!("vm{}", 4 * most - 1)]), None);
        assert_eq!(figures.value(VMI_NON_EVICTABLE, ["n", "ns", "vm0"]), Some(1.0), "of the same rank the first");
        let left_out = |name| figures.value(SERIES_LEFT_OUT, [name]);
        assert_eq!(left_out(MIGRATION_FAILURES.name), Some(4.0 * most as f64));
        assert_eq!(left_out(VMI_NON_EVICTABLE.name), Some(4.0 * most as f64));
        assert_eq!((left_out(MIGRATIONS_PENDING.name), figures.count(SERIES_LEFT_OUT)), (None, 2));
    }
}
