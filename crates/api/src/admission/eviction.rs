//! Evictions of launcher pods (`reference/kubevirt-contract.md`, 2.6). There is no evacuation yet: an eviction that KubeVirt
//! would answer by moving the guest is refused, so that `kubectl drain` waits instead of ending it.

use super::Denial;
use serde_json::Value;

/// The webhook that answers for evictions, as KubeVirt names it.
const WEBHOOK: &str = "virt-launcher-eviction-interceptor.kubevirt.io";

/// Whether this pod may be evicted. `vmi` is the VMI that the pod's annotation `kubevirt.io/domain` names ([`domain_of`]),
/// `cluster_strategy` the KubeVirt object's `spec.configuration.evictionStrategy`.
///
/// # Errors
/// 429, which makes clients try again: the guest's strategy is to be moved and it is still here.
pub fn evict(pod: &Value, vmi: Option<&Value>, cluster_strategy: Option<&str>) -> Result<(), Box<Denial>> {
    let Some(name) = domain_of(pod) else { return Ok(()) };
    let Some(vmi) = vmi else { return Err(refuse(format!("kubevirt failed getting the vmi: {name} not found"))) };
    let strategy = vmi["spec"]["evictionStrategy"].as_str().or(cluster_strategy).unwrap_or("None");
    let conditions = vmi["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let migratable = conditions.iter().any(|c| c["type"] == "LiveMigratable" && c["status"] == "True");
    match strategy {
        "LiveMigrate" if !migratable => {
            Err(refuse(format!("VMI {name} is configured with an eviction strategy but is not live-migratable")))
        }
        "LiveMigrate" | "External" => Err(refuse(in_the_way(&name, strategy))),
        "LiveMigrateIfPossible" if migratable => Err(refuse(in_the_way(&name, strategy))),
        _ => Ok(()),
    }
}

/// The VMI whose guest a pod holds; none for pods that hold none (any more).
pub fn domain_of(pod: &Value) -> Option<String> {
    let over = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    let launcher = pod["metadata"]["labels"]["kubevirt.io"] == "virt-launcher";
    if over || !launcher {
        return None;
    }
    pod["metadata"]["annotations"]["kubevirt.io/domain"].as_str().map(str::to_owned)
}

fn in_the_way(name: &str, strategy: &str) -> String {
    format!(
        "VMI {name} has the eviction strategy {strategy} and is still on this node; evictions do not move VMs yet: \
         create a VirtualMachineInstanceMigration for it, the eviction succeeds when it has left"
    )
}

fn refuse(message: String) -> Box<Denial> {
    let mut denial = Denial::plain(WEBHOOK, message);
    denial.code = 429;
    denial.reason = "TooManyRequests".to_owned();
    Box::new(denial)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(phase: &str) -> Value {
        json!({
            "metadata": {"labels": {"kubevirt.io": "virt-launcher"}, "annotations": {"kubevirt.io/domain": "db"}},
            "status": {"phase": phase},
        })
    }

    fn vmi(strategy: &str, migratable: &str) -> Value {
        json!({
            "spec": {"evictionStrategy": strategy},
            "status": {"conditions": [{"type": "LiveMigratable", "status": migratable}]},
        })
    }

    #[test]
    fn a_guest_that_is_to_be_moved_is_not_ended() {
        for (strategy, migratable, allowed) in [
            ("LiveMigrate", "True", false),
            ("LiveMigrate", "False", false),
            ("LiveMigrateIfPossible", "True", false),
            ("LiveMigrateIfPossible", "False", true),
            ("External", "False", false),
            ("None", "True", true),
        ] {
            let answer = evict(&pod("Running"), Some(&vmi(strategy, migratable)), None);
            assert_eq!(answer.is_ok(), allowed, "{strategy} {migratable}");
            if let Err(denial) = answer {
                assert_eq!(denial.code, 429);
            }
        }
    }

    #[test]
    fn the_cluster_has_a_strategy_for_who_has_none() {
        let vmi = json!({"spec": {}, "status": {}});
        assert!(evict(&pod("Running"), Some(&vmi), None).is_ok());
        assert!(evict(&pod("Running"), Some(&vmi), Some("LiveMigrate")).is_err());
    }

    #[test]
    fn other_pods_and_pods_that_are_over_may_go() {
        assert!(evict(&json!({"metadata": {}}), None, None).is_ok());
        assert!(evict(&pod("Succeeded"), None, None).is_ok());
        assert!(evict(&pod("Running"), None, None).is_err());
    }
}
