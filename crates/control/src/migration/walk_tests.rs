//! A random walk: whatever happens in a cluster, in whatever order, the promises hold.

use std::collections::BTreeMap;

use godwit_api::failure::FailureCause;
use godwit_api::names::conditions;
use godwit_api::{MigrationPhase as Phase, VirtualMachineInstanceMigration};
use proptest::prelude::*;
use serde_json::json;

use super::table::rank;
use super::tests::{cluster, migrate, name, state, tell};
use crate::testing::Cluster;
use crate::{Key, Kind, Name, Ref};

/// Something that happens in the cluster.
#[derive(Clone, Debug)]
enum Happening {
    Migrate(u8),
    Cancel(u8),
    Kubelets,
    Pass(u16),
    PodFails(u8),
    PodRemoved(u8),
    TargetListens(u8),
    SourceStarts(u8),
    SourceFails(u8),
    SourceReports(u8, u32),
    SourceAborts(u8),
    GuestMoves(u8),
    Arrives(u8),
    VmiEnds(u8),
    Decide(u8),
    Settle,
}

/// Where the guests really are, whatever the API says.
type Truth = BTreeMap<&'static str, Name>;

fn happening() -> impl Strategy<Value = Happening> {
    let vmi = 0u8..4;
    prop_oneof![
        3 => vmi.clone().prop_map(Happening::Migrate),
        1 => (0u8..16).prop_map(Happening::Cancel),
        4 => Just(Happening::Kubelets),
        2 => (0u16..1000).prop_map(Happening::Pass),
        1 => (0u16..60_000).prop_map(Happening::Pass),
        1 => (0u8..16).prop_map(Happening::PodFails),
        1 => (0u8..16).prop_map(Happening::PodRemoved),
        3 => vmi.clone().prop_map(Happening::TargetListens),
        3 => vmi.clone().prop_map(Happening::SourceStarts),
        1 => vmi.clone().prop_map(Happening::SourceFails),
        2 => (vmi.clone(), any::<u32>()).prop_map(|(vmi, bytes)| Happening::SourceReports(vmi, bytes)),
        2 => vmi.clone().prop_map(Happening::SourceAborts),
        3 => vmi.clone().prop_map(Happening::GuestMoves),
        2 => (0u8..12).prop_map(Happening::Arrives),
        1 => (0u8..8).prop_map(Happening::VmiEnds),
        12 => any::<u8>().prop_map(Happening::Decide),
        4 => Just(Happening::Settle),
    ]
}

const VMIS: [(&str, &str); 4] = [("a", "node1"), ("b", "node1"), ("c", "node1"), ("d", "node2")];

fn happen(cluster: &mut Cluster, truth: &mut Truth, jobs: &mut u32, what: &Happening) {
    let vmi = |index: u8| VMIS[usize::from(index) % VMIS.len()].0;
    let alive =
        |cluster: &Cluster, index: u8| cluster.world.vmis.get(&name(vmi(index))).is_some_and(|vmi| !vmi.is_final());
    let handed = |cluster: &Cluster, index: u8| {
        let state = state(cluster, vmi(index));
        state["migrationUid"].is_string() && state["completed"] != true
    };
    let pick = |names: Vec<Name>, index: u8| names.get(usize::from(index) % names.len().max(1)).cloned();
    let now = cluster.now.to_string();
    match what {
        Happening::Migrate(index) => {
            *jobs += 1;
            migrate(cluster, &format!("job{jobs}"), vmi(*index));
        }
        Happening::Cancel(index) => {
            if let Some(job) = pick(cluster.world.names_of(Kind::Migration), *index) {
                cluster.delete(&Ref::new(Kind::Migration, job));
            }
        }
        Happening::Kubelets => cluster.run_kubelets(),
        Happening::Pass(seconds) => cluster.pass(i64::from(*seconds)),
        // Only pods without a guest: what a lost guest means is another test's matter.
        Happening::PodFails(index) => {
            if let Some(pod) = pick(idle_pods(cluster, truth), *index) {
                cluster.patch(Kind::Pod, &pod, json!({"status": {"phase": "Failed"}}));
            }
        }
        Happening::PodRemoved(index) => {
            if let Some(pod) = pick(idle_pods(cluster, truth), *index) {
                cluster.remove(Kind::Pod, &pod);
            }
        }
        Happening::TargetListens(index) if alive(cluster, *index) && handed(cluster, *index) => {
            tell(cluster, vmi(*index), json!({"targetNodeAddress": "10.0.0.1"}));
        }
        Happening::SourceStarts(index)
            if alive(cluster, *index)
                && handed(cluster, *index)
                && state(cluster, vmi(*index))["targetNodeAddress"].is_string() =>
        {
            tell(cluster, vmi(*index), json!({"startTimestamp": now}));
        }
        Happening::SourceFails(index)
            if alive(cluster, *index) && handed(cluster, *index) && !has_moved(cluster, truth, vmi(*index)) =>
        {
            tell(cluster, vmi(*index), json!({"failed": true, "completed": true, "failureReason": "link broke"}));
        }
        Happening::SourceReports(index, bytes) if alive(cluster, *index) && handed(cluster, *index) => {
            let before = state(cluster, vmi(*index))["progress"]["bytesProcessed"].as_u64().unwrap_or(0);
            let progress = json!({"bytesProcessed": before + u64::from(*bytes)});
            tell(cluster, vmi(*index), json!({"progress": progress}));
        }
        // Too late when the guest has moved.
        Happening::SourceAborts(index)
            if alive(cluster, *index)
                && handed(cluster, *index)
                && state(cluster, vmi(*index))["abortRequested"] == true =>
        {
            let answer = match has_moved(cluster, truth, vmi(*index)) {
                true => json!({"abortStatus": "Failed"}),
                false => json!({
                    "abortStatus": "Succeeded", "failed": true, "completed": true, "failureCause": "Cancelled",
                    "failureReason": "Live migration has been aborted",
                }),
            };
            tell(cluster, vmi(*index), answer);
        }
        Happening::GuestMoves(index) if alive(cluster, *index) && handed(cluster, *index) => {
            let told = state(cluster, vmi(*index));
            let target = name(told["targetPod"].as_str().unwrap_or_default());
            let ready = cluster.world.pods.get(&target).is_some_and(|pod| !crate::placement::is_finished(pod));
            if ready && told["startTimestamp"].is_string() {
                truth.insert(vmi(*index), target);
            }
        }
        // The two handlers report in any order, or one of them only.
        Happening::Arrives(index) if alive(cluster, *index) && has_moved(cluster, truth, vmi(*index)) => {
            let node = state(cluster, vmi(*index))["targetNode"].clone();
            match index % 3 {
                0 => tell(cluster, vmi(*index), json!({"completed": true, "endTimestamp": now})),
                _ => cluster.patch(
                    Kind::VirtualMachineInstance,
                    &name(vmi(*index)),
                    json!({"status": {"nodeName": node}}),
                ),
            }
        }
        Happening::VmiEnds(index) if *index < 4 && alive(cluster, *index) => {
            cluster.patch(Kind::VirtualMachineInstance, &name(vmi(*index)), json!({"status": {"phase": "Succeeded"}}));
        }
        Happening::Settle => cluster.settle(),
        Happening::Decide(index) => {
            let keys = Key::all(&cluster.world);
            if let Some(key) = keys.get(usize::from(*index) % keys.len()) {
                cluster.step(key);
            }
        }
        _ => {}
    }
}

/// Target pods that do not hold a guest.
fn idle_pods(cluster: &Cluster, truth: &Truth) -> Vec<Name> {
    let targets = cluster.world.pods.iter().filter(|pod| {
        pod.metadata.labels.iter().flatten().any(|(key, _)| key == crate::names::LABEL_MIGRATION_JOB_UID)
    });
    targets.map(|pod| crate::Stored::key(pod.as_ref())).filter(|pod| !truth.values().any(|home| home == pod)).collect()
}

/// Whether the guest runs in the target pod of the migration that its VMI carries.
fn has_moved(cluster: &Cluster, truth: &Truth, vmi: &str) -> bool {
    truth.get(vmi).is_some_and(|home| state(cluster, vmi)["targetPod"] == json!(home.name))
}

/// What a migration says of itself, unless it is new: what it waits for, why it failed and what to do, how it went.
fn speaks(migration: &VirtualMachineInstanceMigration) -> Result<(), &'static str> {
    let status = &migration.status;
    if status.phase == Phase::Unset {
        return Ok(());
    }
    let message = status.message.as_deref().filter(|message| !message.is_empty()).ok_or("no message")?;
    let said = |type_: &str| {
        let condition = migration.condition(type_).filter(|condition| condition.is_true());
        condition.is_some_and(|condition| condition.reason == status.reason && condition.message == status.message)
    };
    match status.phase {
        Phase::Failed => {
            let cause = FailureCause::from(status.reason.as_deref().unwrap_or_default());
            if !cause.is_known() || !message.ends_with(cause.remedy()) {
                return Err("no cause, or not its remedy");
            }
            said(conditions::MIGRATION_FAILED).then_some(()).ok_or("no condition of its failure")
        }
        Phase::Succeeded => Ok(()),
        _ => said(conditions::MIGRATION_WAITING).then_some(()).ok_or("no condition of its wait"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_promises_hold(happenings in proptest::collection::vec(happening(), 1..160)) {
        let mut cluster = cluster(&VMIS);
        let mut jobs = 0;
        let mut truth: Truth = VMIS.iter().map(|(vmi, _)| (*vmi, name(&crate::names::launcher_pod(vmi, &format!("uid-{vmi}"))))).collect();
        let mut reached: BTreeMap<Name, Phase> = BTreeMap::new();
        let mut sent: BTreeMap<Name, u64> = BTreeMap::new();
        for what in &happenings {
            happen(&mut cluster, &mut truth, &mut jobs, what);
            let mut under_way: BTreeMap<String, u32> = BTreeMap::new();
            let (mut in_cluster, mut on_node) = (0, BTreeMap::<String, u32>::new());
            for migration in cluster.world.migrations.iter() {
                let key = crate::Stored::key(migration.as_ref());
                let phase = migration.status.phase.clone();
                if let Err(silence) = speaks(migration) {
                    prop_assert!(false, "{}: {:?}", silence, migration.status);
                }
                let progress = migration.status.migration_state.as_ref().and_then(|state| state.progress.as_ref());
                let bytes = progress.and_then(|progress| progress.bytes_processed).unwrap_or(0);
                let before = sent.insert(key.clone(), bytes).unwrap_or(0);
                prop_assert!(bytes >= before, "{} bytes came after {}", bytes, before);
                if let Some(before) = reached.insert(key, phase.clone()) {
                    prop_assert!(rank(&phase) >= rank(&before), "{:?} came after {:?}", phase, before);
                    prop_assert!(!before.is_final() || phase == before, "{:?} left {:?}", phase, before);
                }
                if phase.is_running() {
                    *under_way.entry(migration.vmi_name().to_owned()).or_default() += 1;
                    in_cluster += 1;
                    let vmi = cluster.world.vmis.get(&name(migration.vmi_name()));
                    let state = vmi.and_then(|vmi| vmi.status.migration_state.as_ref());
                    let own = state.filter(|state| state.migration_uid.as_deref() == Some(migration.uid()));
                    if let Some(node) = own.and_then(|state| state.source_node.clone()) {
                        *on_node.entry(node).or_default() += 1;
                    }
                }
            }
            prop_assert!(under_way.values().all(|count| *count <= 1), "two migrations of one VMI: {:?}", under_way);
            prop_assert!(in_cluster <= 5 && on_node.values().all(|count| *count <= 2), "{} {:?}", in_cluster, on_node);
            if matches!(what, Happening::Settle) {
                for migration in cluster.world.migrations.iter().filter(|migration| !migration.is_final()) {
                    let plan = cluster.decide(&Key::Migration(crate::Stored::key(migration.as_ref())));
                    prop_assert!(plan.wake_at.is_some(), "no deadline: {:?}", migration.status);
                }
            }
            for (vmi, home) in &truth {
                let living = cluster.world.vmis.get(&name(vmi)).is_some_and(|vmi| !vmi.is_final());
                let pod = cluster.world.pods.get(home);
                let stands = pod.is_some_and(|pod| !crate::Stored::deleting(pod.as_ref()));
                prop_assert!(!living || stands, "the home {} of the living guest {} is being removed", home, vmi);
            }
        }
        // With time alone, everything ends.
        for _ in 0..6 {
            cluster.run_kubelets();
            cluster.settle();
            cluster.pass(200_000);
        }
        cluster.settle();
        for migration in cluster.world.migrations.iter() {
            prop_assert!(migration.is_final(), "{:?}", migration.status);
            prop_assert!(migration.metadata.finalizers.is_none());
        }
    }
}
