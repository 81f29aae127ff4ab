//! Evictions of launcher pods (`reference/kubevirt-contract.md`, 2.6): a guest whose strategy is to be moved is not ended.
//! The eviction is refused with 429, which makes `kubectl drain` ask again until the guest has left, and the first one marks
//! the VMI; the evacuation controller does the rest.

use serde_json::{Value, json};

use super::Denial;
use crate::names::conditions::EVACUATION_STOPPED;
use crate::names::{
    ANNOTATION_DOMAIN, ANNOTATION_EVICTION_SOURCE, ANNOTATION_OWNER_VMI_NAME, APP_HOTPLUG_DISK, APP_VIRT_LAUNCHER,
    DESCHEDULER, LABEL_APP,
};

/// The webhook that answers for evictions, as KubeVirt names it.
const WEBHOOK: &str = "virt-launcher-eviction-interceptor.kubevirt.io";
/// The same for the pods that hold the claims of disks which come while the guest runs.
const ATTACHMENT_WEBHOOK: &str = "hotplug-pod-eviction-interceptor.kubevirt.io";
/// The annotation of an Eviction by which the descheduler gives its name.
const REQUESTED_BY: &str = "requested-by";
/// The descheduler's name there.
const DESCHEDULER_NAME: &str = "sigs.k8s.io/descheduler";

/// A request to evict a pod, and what is known of its guest.
pub struct Eviction<'a> {
    /// The pod.
    pub pod: &'a Value,
    /// The VMI that [`domain_of`] names, or why it cannot be read ([`not_found`] when there is none).
    pub vmi: Result<&'a Value, String>,
    /// The body of the request.
    pub eviction: &'a Value,
    /// The KubeVirt object's `spec.configuration.evictionStrategy`.
    pub cluster_strategy: Option<&'a str>,
}

/// What becomes of it.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// The pod may go.
    Allowed,
    /// It may not: 429.
    Refused(Box<Denial>),
    /// It may not, and before that is said the VMI is marked (not on a dry run).
    Marks(Mark, Box<Denial>),
}

/// That a VMI shall leave its node, as a write.
#[derive(Clone, Debug, PartialEq)]
pub struct Mark {
    /// The VMI's namespace.
    pub namespace: String,
    /// The VMI's name.
    pub name: String,
    /// A merge patch of the VMI. It carries the revision that it was decided on: when that is refused (409), the VMI is
    /// read again and the rule asked again.
    pub patch: Value,
}

/// Whether a pod may be evicted.
pub fn evict(request: &Eviction<'_>) -> Answer {
    let Some(name) = domain_of(request.pod) else { return Answer::Allowed };
    if is_attachment(request.pod) {
        return attachment(request, &name);
    }
    let vmi = match &request.vmi {
        Ok(vmi) => *vmi,
        Err(why) => return Answer::Refused(refuse(format!("kubevirt failed getting the vmi: {why}"))),
    };
    let strategy = vmi["spec"]["evictionStrategy"].as_str().or(request.cluster_strategy).unwrap_or("None");
    let migratable = condition(vmi, "LiveMigratable").is_some();
    match strategy {
        "LiveMigrate" if !migratable => {
            return Answer::Refused(refuse(format!(
                "VMI {name} is configured with an eviction strategy but is not live-migratable"
            )));
        }
        "LiveMigrate" | "External" => {}
        "LiveMigrateIfPossible" if migratable => {}
        _ => return Answer::Allowed,
    }
    let namespace = request.pod["metadata"]["namespace"].as_str().unwrap_or_default();
    let node = request.pod["spec"]["nodeName"].as_str().unwrap_or_default();
    let marked = vmi["status"]["evacuationNodeName"].as_str().is_some_and(|node| !node.is_empty());
    let triggered = format!("Eviction triggered evacuation of VMI \"{namespace}/{name}\"");
    // Asking again does not start again what has been given up: `kubectl drain` asks every five seconds.
    if let Some(stopped) = condition(vmi, EVACUATION_STOPPED) {
        let why = stopped["message"].as_str().unwrap_or_default();
        return Answer::Refused(refuse(format!("The evacuation of VMI \"{namespace}/{name}\" has stopped: {why}")));
    }
    if marked {
        return Answer::Refused(refuse(format!("Evacuation in progress: {triggered}")));
    }
    if vmi["status"]["nodeName"].as_str().unwrap_or_default() != node {
        return Answer::Refused(refuse("Eviction request for target Pod"));
    }
    let mut metadata = json!({"resourceVersion": vmi["metadata"]["resourceVersion"]});
    if request.eviction["metadata"]["annotations"][REQUESTED_BY] == DESCHEDULER_NAME {
        metadata["annotations"] = json!({ANNOTATION_EVICTION_SOURCE: DESCHEDULER});
    }
    let patch = json!({"metadata": metadata, "status": {"evacuationNodeName": node}});
    Answer::Marks(Mark { namespace: namespace.to_owned(), name, patch }, refuse(triggered))
}

/// The claims of a running guest are not taken away from it; they go when it goes.
fn attachment(request: &Eviction<'_>, vmi: &str) -> Answer {
    let metadata = &request.pod["metadata"];
    let text = |key: &str| metadata[key].as_str().unwrap_or_default();
    let ended = |vmi: &Value| matches!(vmi["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    match &request.vmi {
        Ok(vmi) if ended(vmi) => Answer::Allowed,
        Err(why) if *why == not_found(vmi) => Answer::Allowed,
        Err(why) => Answer::Refused(refuse_as(ATTACHMENT_WEBHOOK, format!("kubevirt failed getting the vmi: {why}"))),
        Ok(_) => {
            let (pod, namespace) = (text("name"), text("namespace"));
            let why =
                format!("cannot evict hotplug pod: {pod} associated with running vmi: {vmi} in namespace {namespace}");
            Answer::Refused(refuse_as(ATTACHMENT_WEBHOOK, why))
        }
    }
}

fn is_attachment(pod: &Value) -> bool {
    pod["metadata"]["labels"][LABEL_APP] == APP_HOTPLUG_DISK
}

/// The answer when the VMI could not be marked.
pub fn not_marked(why: &str) -> Box<Denial> {
    refuse(format!("kubevirt failed marking the vmi for eviction: {why}"))
}

/// Why a VMI that is not there cannot be read.
pub fn not_found(name: &str) -> String {
    format!("virtualmachineinstances.kubevirt.io \"{name}\" not found")
}

/// The VMI whose guest a pod holds, or holds claims for; none for pods that hold none (any more).
pub fn domain_of(pod: &Value) -> Option<String> {
    let over = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    let annotation = match pod["metadata"]["labels"][LABEL_APP].as_str() {
        Some(APP_VIRT_LAUNCHER) => ANNOTATION_DOMAIN,
        Some(APP_HOTPLUG_DISK) => ANNOTATION_OWNER_VMI_NAME,
        _ => return None,
    };
    if over {
        return None;
    }
    pod["metadata"]["annotations"][annotation].as_str().map(str::to_owned)
}

/// A condition that is true.
fn condition<'a>(vmi: &'a Value, type_: &str) -> Option<&'a Value> {
    let conditions = vmi["status"]["conditions"].as_array()?;
    conditions.iter().find(|condition| condition["type"] == type_ && condition["status"] == "True")
}

fn refuse(message: impl AsRef<str>) -> Box<Denial> {
    refuse_as(WEBHOOK, message)
}

fn refuse_as(webhook: &str, message: impl AsRef<str>) -> Box<Denial> {
    let mut denial = Denial::plain(webhook, message);
    denial.code = 429;
    denial.reason = "TooManyRequests".to_owned();
    Box::new(denial)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(phase: &str, node: &str) -> Value {
        json!({
            "metadata": {
                "namespace": "ns", "labels": {"kubevirt.io": "virt-launcher"}, "annotations": {"kubevirt.io/domain": "db"},
            },
            "spec": {"nodeName": node},
            "status": {"phase": phase},
        })
    }

    fn vmi(strategy: &str, migratable: &str) -> Value {
        json!({
            "metadata": {"resourceVersion": "7"},
            "spec": {"evictionStrategy": strategy},
            "status": {"nodeName": "node1", "conditions": [{"type": "LiveMigratable", "status": migratable}]},
        })
    }

    fn ask(pod: &Value, vmi: &Value, cluster_strategy: Option<&str>) -> Answer {
        evict(&Eviction { pod, vmi: Ok(vmi), eviction: &json!({}), cluster_strategy })
    }

    fn text(answer: &Answer) -> &str {
        match answer {
            Answer::Allowed => "",
            Answer::Refused(denial) | Answer::Marks(_, denial) => {
                assert_eq!((denial.code, denial.reason.as_str()), (429, "TooManyRequests"));
                denial.message.split_once("denied the request: ").unwrap().1
            }
        }
    }

    #[test]
    fn a_guest_that_is_to_be_moved_is_not_ended() {
        let triggered = "Eviction triggered evacuation of VMI \"ns/db\"";
        for (strategy, migratable, said) in [
            ("LiveMigrate", "True", triggered),
            ("LiveMigrate", "False", "VMI db is configured with an eviction strategy but is not live-migratable"),
            ("LiveMigrateIfPossible", "True", triggered),
            ("LiveMigrateIfPossible", "False", ""),
            ("External", "False", triggered),
            ("None", "True", ""),
        ] {
            let answer = ask(&pod("Running", "node1"), &vmi(strategy, migratable), None);
            assert_eq!(text(&answer), said, "{strategy} {migratable}");
            assert_eq!(matches!(answer, Answer::Marks(..)), said == triggered, "{strategy} {migratable}");
        }
    }

    #[test]
    fn the_first_eviction_marks_and_the_next_ones_say_so() {
        let pod = pod("Running", "node1");
        let mut vmi = vmi("LiveMigrate", "True");
        let Answer::Marks(mark, denial) = ask(&pod, &vmi, None) else { panic!("not marked") };
        assert_eq!((mark.namespace.as_str(), mark.name.as_str()), ("ns", "db"));
        let written = json!({"metadata": {"resourceVersion": "7"}, "status": {"evacuationNodeName": "node1"}});
        assert_eq!(mark.patch, written);
        assert!(
            denial.message.starts_with("admission webhook \"virt-launcher-eviction-interceptor.kubevirt.io\" denied")
        );
        vmi["status"]["evacuationNodeName"] = "node1".into();
        let again = ask(&pod, &vmi, None);
        assert_eq!(text(&again), "Evacuation in progress: Eviction triggered evacuation of VMI \"ns/db\"");
        assert!(matches!(again, Answer::Refused(_)));
    }

    #[test]
    fn the_claims_of_a_running_guest_stay_with_it() {
        let pod = json!({
            "metadata": {"name": "hp-volume-x", "namespace": "ns", "labels": {"kubevirt.io": "hotplug-disk"},
                "annotations": {"kubevirt.io/owner-vmi-name": "db"}},
        });
        assert_eq!(domain_of(&pod).as_deref(), Some("db"));
        let said = "cannot evict hotplug pod: hp-volume-x associated with running vmi: db in namespace ns";
        let Answer::Refused(denial) = ask(&pod, &vmi("None", "True"), None) else { panic!("allowed") };
        assert_eq!((denial.text(), denial.code), (said, 429));
        assert_eq!(denial.webhook, "hotplug-pod-eviction-interceptor.kubevirt.io");
        let mut ended = vmi("None", "True");
        ended["status"]["phase"] = "Succeeded".into();
        assert_eq!(ask(&pod, &ended, None), Answer::Allowed);
        let gone = Eviction { pod: &pod, vmi: Err(not_found("db")), eviction: &json!({}), cluster_strategy: None };
        assert_eq!(evict(&gone), Answer::Allowed);
    }

    #[test]
    fn the_pod_at_the_target_does_not_mark() {
        let answer = ask(&pod("Running", "node2"), &vmi("LiveMigrate", "True"), None);
        assert_eq!(text(&answer), "Eviction request for target Pod");
        assert!(matches!(answer, Answer::Refused(_)));
    }

    #[test]
    fn the_descheduler_is_remembered() {
        let (pod, vmi) = (pod("Running", "node1"), vmi("LiveMigrate", "True"));
        let eviction = json!({"metadata": {"annotations": {"requested-by": "sigs.k8s.io/descheduler"}}});
        let Answer::Marks(mark, _) =
            evict(&Eviction { pod: &pod, vmi: Ok(&vmi), eviction: &eviction, cluster_strategy: None })
        else {
            panic!("not marked")
        };
        assert_eq!(mark.patch["metadata"]["annotations"]["kubevirt.io/eviction-source"], "descheduler");
    }

    #[test]
    fn an_evacuation_that_has_stopped_is_not_started_again() {
        let mut vmi = vmi("LiveMigrate", "True");
        let stopped = json!({"type": "EvacuationStopped", "status": "True", "message": "It cannot move."});
        vmi["status"]["conditions"].as_array_mut().unwrap().push(stopped);
        for mark in [json!("node1"), Value::Null] {
            vmi["status"]["evacuationNodeName"] = mark;
            let answer = ask(&pod("Running", "node1"), &vmi, None);
            assert_eq!(text(&answer), "The evacuation of VMI \"ns/db\" has stopped: It cannot move.");
            assert!(matches!(answer, Answer::Refused(_)));
        }
    }

    #[test]
    fn the_cluster_has_a_strategy_for_who_has_none() {
        let mut vmi = vmi("", "True");
        vmi["spec"] = json!({});
        assert_eq!(ask(&pod("Running", "node1"), &vmi, None), Answer::Allowed);
        assert!(matches!(ask(&pod("Running", "node1"), &vmi, Some("LiveMigrate")), Answer::Marks(..)));
        vmi["spec"]["evictionStrategy"] = "None".into();
        assert_eq!(ask(&pod("Running", "node1"), &vmi, Some("LiveMigrate")), Answer::Allowed);
    }

    #[test]
    fn other_pods_and_pods_that_are_over_may_go() {
        let nothing = json!({});
        let asked = |pod: &Value| {
            evict(&Eviction { pod, vmi: Err(not_found("db")), eviction: &nothing, cluster_strategy: None })
        };
        assert_eq!(asked(&json!({"metadata": {}})), Answer::Allowed);
        assert_eq!(asked(&pod("Succeeded", "node1")), Answer::Allowed);
        let said = "kubevirt failed getting the vmi: virtualmachineinstances.kubevirt.io \"db\" not found";
        assert_eq!(text(&asked(&pod("Running", "node1"))), said);
        assert!(not_marked("no").message.ends_with("kubevirt failed marking the vmi for eviction: no"));
    }
}
