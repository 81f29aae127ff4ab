//! What cannot be taken back is decided on what is, not on what a cache still says.
//!
//! A patch is guarded by the revision of the object that it changes. A decision that rests on another object as well has no
//! such guard: with two controllers at work (a leader that has lost its lease and does not know yet), or a watch that is
//! behind, one may know the pod of a guest and not yet its VMI. So a plan that deletes something, or ends a migration or a
//! VMI, first reads the VMI that it is about and the pod that it rests on; when one of them is another than the one that was
//! decided on, the plan ends there and the decision is taken again.

use serde_json::Value;

use crate::key::Key;
use crate::launcher_pod::{self, Role};
use crate::object::{Kind, Name, Ref, Stored};
use crate::plan::{Effect, Plan, View};
use crate::vmi;

/// Final phases, of migrations and of VMIs.
const ENDS: [&str; 2] = ["Succeeded", "Failed"];

/// Puts the confirmations that a plan needs in front of it.
pub fn confirmed(key: &Key, view: &View<'_>, mut plan: Plan) -> Plan {
    if !plan.effects.iter().any(ends_something) {
        return plan;
    }
    let Some(name) = vmi_of(key, view) else { return plan };
    let vmi = view.world.vmis.get(&name);
    let mut rests_on = vec![Ref::new(Kind::VirtualMachineInstance, name)];
    // Whether a guest or a migration is lost is told by its pod.
    let pod = match (key, vmi) {
        (Key::Vmi(_), Some(vmi)) => Some(vmi::current_pod_name(vmi)),
        (Key::Migration(name), Some(vmi)) => {
            let migration = view.world.migrations.get(name);
            migration.map(|migration| launcher_pod::name(vmi, Role::Receive(migration)))
        }
        _ => None,
    };
    if let (Some(pod), Some(vmi)) = (pod, vmi) {
        rests_on.push(Ref::new(Kind::Pod, Name::new(vmi.namespace(), pod)));
    }
    let confirm = |target: Ref| {
        let held = view.world.get(target.kind, &target.name);
        Effect::Confirm { target, revision: held.and_then(|held| held.metadata().resource_version.clone()) }
    };
    plan.effects.splice(0..0, rests_on.into_iter().map(confirm));
    plan
}

/// The VMI that a decision is about.
fn vmi_of(key: &Key, view: &View<'_>) -> Option<Name> {
    match key {
        Key::Vmi(name) => Some(name.clone()),
        Key::Migration(name) => {
            let migration = view.world.migrations.get(name)?;
            Some(Name::new(migration.namespace(), migration.vmi_name()))
        }
        _ => None,
    }
}

fn ends_something(effect: &Effect) -> bool {
    let phase_of = |patch: &Value| patch.pointer("/status/phase").and_then(Value::as_str).map(str::to_owned);
    match effect {
        Effect::Delete { .. } | Effect::Evict { .. } => true,
        Effect::PatchStatus(target, patch) if target.kind == Kind::Migration => {
            phase_of(patch).is_some_and(|phase| ENDS.contains(&phase.as_str()))
        }
        Effect::Patch(target, patch) if target.kind == Kind::VirtualMachineInstance => {
            let failed = patch.pointer("/status/migrationState/failed").and_then(Value::as_bool);
            failed == Some(true) || phase_of(patch).is_some_and(|phase| ENDS.contains(&phase.as_str()))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{self, Cluster};

    fn plan_that_deletes() -> Plan {
        let pod = Ref::new(Kind::Pod, Name::new("default", "p"));
        let effects = vec![Effect::Delete { target: pod, uid: "u".to_owned(), grace_seconds: None }];
        Plan { effects, wake_at: None }
    }

    fn confirms(plan: &Plan) -> Option<(String, Option<String>)> {
        match plan.effects.first() {
            Some(Effect::Confirm { target, revision }) => Some((target.to_string(), revision.clone())),
            _ => None,
        }
    }

    #[test]
    fn what_ends_something_reads_its_vmi_first() {
        let mut cluster = Cluster::new();
        let key = Key::Vmi(Name::new("default", "vm"));
        let absent = confirmed(&key, &testing::view(&cluster.world, &cluster.settings), plan_that_deletes());
        assert_eq!(confirms(&absent), Some(("VirtualMachineInstance default/vm".to_owned(), None)));

        let vmi = json!({"metadata": {"namespace": "default", "name": "vm", "uid": "v"}, "spec": {"domain": {"devices": {}}}});
        cluster.put(Kind::VirtualMachineInstance, vmi);
        let held = confirmed(&key, &testing::view(&cluster.world, &cluster.settings), plan_that_deletes());
        assert!(confirms(&held).is_some_and(|(_, revision)| revision.is_some()), "{held:?}");
        // Its pod is not known: the plan goes on only if there is none.
        assert!(matches!(&held.effects[1], Effect::Confirm { target, revision: None } if target.kind == Kind::Pod));
    }

    #[test]
    fn what_ends_nothing_reads_nothing() {
        let cluster = Cluster::new();
        let key = Key::Vmi(Name::new("default", "vm"));
        let target = Ref::new(Kind::VirtualMachineInstance, Name::new("default", "vm"));
        let mut plan = Plan::nothing();
        plan.push(Effect::Patch(target.clone(), json!({"status": {"phase": "Scheduling"}})));
        assert_eq!(confirms(&confirmed(&key, &testing::view(&cluster.world, &cluster.settings), plan)), None);
        assert_eq!(
            confirms(&confirmed(
                &Key::Node("n".into()),
                &testing::view(&cluster.world, &cluster.settings),
                plan_that_deletes()
            )),
            None
        );
    }
}
