//! Whether a pod would exceed a ResourceQuota: the rule of Kubernetes' admission, asked beforehand.

use std::collections::{BTreeMap, BTreeSet};

use godwit_api::VirtualMachineInstanceMigration;
use godwit_machinery::quota::{self, Amounts};
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use crate::launcher_pod::{self, Role};
use crate::object::{Name, Stored};
use crate::plan::View;
use crate::world::World;

/// The sentence of Kubernetes' admission when one more such pod would exceed a quota of its namespace.
pub fn exceeded(pod: &Pod, world: &World) -> Option<String> {
    refusal(pod, &Amounts::new(), world)
}

/// The same when other pods that the quotas do not know yet ask for `more`.
fn refusal(pod: &Pod, more: &Amounts, world: &World) -> Option<String> {
    let mut quotas = world.quotas.within(pod.namespace()).filter(|quota| !quota.deleting()).peekable();
    quotas.peek()?;
    let pod = serde_json::to_value(pod).ok()?;
    quotas.find_map(|quota| {
        let quota = serde_json::to_value(quota.as_ref()).ok()?;
        let mut used = quota::taken(&quota);
        quota::add_all(&mut used, more);
        quota::refusal(&quota, &used, "", "pods", &pod)
    })
}

/// What is left of the quotas while slots are given: pods that are about to be made count already.
pub struct Headroom<'a> {
    view: &'a View<'a>,
    /// What pods that are about to be made ask for, by namespace.
    coming: BTreeMap<String, Amounts>,
    refused: BTreeSet<String>,
}

impl<'a> Headroom<'a> {
    /// Nothing has been taken yet.
    pub fn new(view: &'a View<'a>) -> Self {
        Self { view, coming: BTreeMap::new(), refused: BTreeSet::new() }
    }

    /// Whether the quotas have room for this migration's target pod. Once one of a namespace has been refused, the others
    /// of the namespace wait behind it.
    pub fn takes(&mut self, migration: &VirtualMachineInstanceMigration) -> bool {
        let namespace = migration.namespace();
        if self.view.world.quotas.within(namespace).next().is_none() {
            return true;
        }
        if self.refused.contains(namespace) {
            return false;
        }
        let Some(pod) = target_pod(migration, self.view) else { return true };
        let view = self.view;
        let coming = self.coming.entry(namespace.to_owned()).or_insert_with(|| promised(namespace, view));
        let taken = refusal(&pod, coming, view.world).is_none();
        if !taken {
            self.refused.insert(namespace.to_owned());
        }
        taken
    }

    /// The migration's target pod is going to be made.
    pub fn take(&mut self, migration: &VirtualMachineInstanceMigration) {
        if let Some(coming) = self.coming.get_mut(migration.namespace())
            && let Some(pod) = target_pod(migration, self.view)
        {
            quota::add_all(coming, &usage(&pod));
        }
    }
}

fn usage(pod: &Pod) -> Amounts {
    quota::usage("", "pods", &serde_json::to_value(pod).unwrap_or(Value::Null))
}

fn target_pod(migration: &VirtualMachineInstanceMigration, view: &View<'_>) -> Option<Pod> {
    let vmi = view.world.vmis.get(&Name::new(migration.namespace(), migration.vmi_name()))?;
    Some(launcher_pod::build(vmi, Role::Receive(migration), view))
}

/// What the pods of migrations ask for that have a slot and no pod yet.
pub(crate) fn promised(namespace: &str, view: &View<'_>) -> Amounts {
    let mut sum = Amounts::new();
    for (uid, holder) in view.world.turns().holders() {
        let migration = holder.migration.as_ref().filter(|name| name.namespace == namespace);
        let Some(migration) = migration.and_then(|name| view.world.migrations.get(name)) else { continue };
        if view.world.pods_of_migration(uid).next().is_none()
            && let Some(pod) = target_pod(migration, view)
        {
            quota::add_all(&mut sum, &usage(&pod));
        }
    }
    sum
}
