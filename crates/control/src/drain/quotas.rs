//! What is left of ResourceQuotas while pods come and go in the plan.

use std::collections::BTreeMap;
use std::sync::Arc;

use godwit_machinery::quantity::Quantity;
use godwit_machinery::quota::{self, Amounts};
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use crate::object::{Name, Stored};
use crate::plan::View;

/// A pod that would be made or goes, as quotas see it.
#[derive(Clone, Debug)]
pub struct Counted {
    namespace: String,
    object: Value,
}

impl Counted {
    pub fn of(pod: &Pod) -> Self {
        let object = serde_json::to_value(pod).unwrap_or(Value::Null);
        Self { namespace: pod.namespace().to_owned(), object }
    }
}

/// The pods that quotas count, by job.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    /// Those that were made.
    pub came: BTreeMap<usize, Counted>,
    /// Those that were left.
    pub went: BTreeMap<usize, Counted>,
}

#[derive(Clone)]
struct Quota {
    name: Name,
    object: Value,
    used: Amounts,
}

/// All quotas of the cluster, and what is taken of them at a moment of the plan.
#[derive(Clone)]
pub struct Quotas {
    quotas: BTreeMap<String, Vec<Quota>>,
    /// What the others of a namespace are told once one of it was refused at this moment: they wait behind it.
    refused: BTreeMap<String, Refusal>,
}

/// Why a pod may not be made now.
#[derive(Clone)]
pub struct Refusal {
    /// The quota.
    pub quota: Name,
    /// The server's words and how much is missing, or who is waited for.
    pub says: Arc<str>,
}

impl Quotas {
    /// As they are now; pods of migrations that have a slot and no pod yet count already.
    pub fn of(view: &View<'_>) -> Self {
        let mut quotas: BTreeMap<String, Vec<Quota>> = BTreeMap::new();
        for quota in view.world.quotas.iter().filter(|quota| !quota.deleting()) {
            let Ok(object) = serde_json::to_value(quota.as_ref()) else { continue };
            let used = quota::taken(&object);
            let of_namespace = quotas.entry(quota.namespace().to_owned()).or_default();
            of_namespace.push(Quota { name: quota.key(), object, used });
        }
        for (namespace, all) in &mut quotas {
            let promised = crate::quota::promised(namespace, view);
            all.iter_mut().for_each(|quota| quota::add_all(&mut quota.used, &promised));
        }
        Self { quotas, refused: BTreeMap::new() }
    }

    /// Whether any counts pods of this namespace.
    pub fn count(&self, namespace: &str) -> bool {
        self.quotas.contains_key(namespace)
    }

    /// Time has passed: who was refused asks again.
    pub fn tick(&mut self) {
        self.refused.clear();
    }

    /// Why nothing of this namespace can be made now, if somebody of it was refused already: whoever comes after that need not
    /// ask with a pod.
    pub fn refused(&self, namespace: &str) -> Option<Refusal> {
        self.refused.get(namespace).cloned()
    }

    /// Why this pod of a VMI cannot be made now, if it cannot.
    pub fn ask(&mut self, vmi: &Name, pod: &Counted) -> Option<Refusal> {
        if let Some(refusal) = self.refused(&pod.namespace) {
            return Some(refusal);
        }
        let of_namespace = self.quotas.get(&pod.namespace)?;
        let refusal = of_namespace.iter().find_map(|quota| {
            let words = quota::refusal(&quota.object, &quota.used, "", "pods", &pod.object)?;
            let says = match missing(quota, &pod.object) {
                missing if missing.is_empty() => words,
                missing => format!("{words}; {missing} is missing"),
            };
            Some(Refusal { quota: quota.name.clone(), says: says.into() })
        })?;
        let quota = refusal.quota.clone();
        let says = format!("It waits behind {vmi}, for which ResourceQuota {quota} has no room.").into();
        self.refused.insert(pod.namespace.clone(), Refusal { quota, says });
        Some(refusal)
    }

    /// A pod is made.
    pub fn take(&mut self, pod: &Counted) {
        self.change(pod, |amount, more| amount.plus(more));
    }

    /// A pod has ended.
    pub fn give_back(&mut self, pod: &Counted) {
        self.change(pod, |amount, less| amount.minus(less));
    }

    fn change(&mut self, pod: &Counted, how: impl Fn(Quantity, Quantity) -> Quantity) {
        let Some(of_namespace) = self.quotas.get_mut(&pod.namespace) else { return };
        let usage = quota::usage("", "pods", &pod.object);
        for quota in of_namespace.iter_mut().filter(|quota| quota::in_scope(&quota.object, "", "pods", &pod.object)) {
            for (name, amount) in &usage {
                if let Some(used) = quota.used.get_mut(name) {
                    *used = how(*used, *amount);
                }
            }
        }
    }
}

/// How much of what is missing.
fn missing(quota: &Quota, pod: &Value) -> String {
    let hard = quota::hard(&quota.object);
    let wanted = quota::usage("", "pods", pod);
    let over = wanted.iter().filter_map(|(name, amount)| {
        let used = quota.used.get(name).copied();
        let sum = used.map_or(*amount, |used| used.plus(*amount));
        let limit = hard.get(name)?;
        (sum > *limit).then(|| format!("{name}={}", sum.minus(*limit)))
    });
    over.collect::<Vec<_>>().join(",")
}
