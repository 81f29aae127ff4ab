//! Which nodes can give a guest the processor that it asks for, or has.
//!
//! Handlers say on their nodes' labels what QEMU can give there (KubeVirt's names). A guest that runs keeps what it was started with: a
//! target has to have all of it, and so the guest can always come back to where it was. What the guest's own node does not say of itself
//! is asked of no other: it may have an older handler, or a guest of an older one.

use std::collections::{BTreeMap, BTreeSet};

use godwit_api::VirtualMachineInstance;
use godwit_api::kubevirt::CpuBaseline;
use godwit_api::migration::NodeVerdict;
use k8s_openapi::api::core::v1::Node;

use crate::launcher_pod::Role;
use crate::names;
use crate::object::{Name, Stored, labels};
use crate::vmi;
use crate::world::World;

/// So many nodes are named that cannot give it.
const MOST_VERDICTS: usize = 16;

/// The labels that a node has to have for the launcher pod of this role, each `true`.
pub fn wanted(vmi: &VirtualMachineInstance, role: Role<'_>, world: &World) -> BTreeSet<String> {
    match role {
        Role::Start => to_start(vmi, world),
        Role::Receive(_) => to_receive(vmi, world),
    }
}

fn label(prefix: &str, name: &str) -> String {
    format!("{prefix}{name}")
}

/// The model that the VMI asks for by its name.
fn named(vmi: &VirtualMachineInstance) -> Option<&str> {
    let model = vmi.spec.domain.cpu.as_ref().and_then(|cpu| cpu.model.as_deref());
    model.filter(|model| !["", "host-model", "host-passthrough"].contains(model))
}

fn to_start(vmi: &VirtualMachineInstance, world: &World) -> BTreeSet<String> {
    let machine = vmi.spec.domain.machine.as_ref().and_then(|machine| machine.type_.as_deref());
    let machine = machine.filter(|machine| machine.starts_with("pc-"));
    let model = named(vmi).map(|model| label(names::LABEL_PREFIX_CPU_MODEL, model));
    let machine = machine.map(|machine| label(names::LABEL_PREFIX_MACHINE_TYPE, machine));
    let wanted: BTreeSet<String> = model.into_iter().chain(machine).collect();
    // Handlers that say nothing are older than this.
    if wanted.is_empty() || !world.nodes.iter().any(|node| says(node)) { BTreeSet::new() } else { wanted }
}

/// Whether the node's handler says what processors it can give.
fn says(node: &Node) -> bool {
    let prefix = names::LABEL_PREFIX_CPU_MODEL;
    labels(&node.metadata).range(prefix.to_owned()..).next().is_some_and(|(label, _)| label.starts_with(prefix))
}

/// Guests from this machine revision on were started by launchers that spell their processor out.
const SPELLED_OUT: u32 = 4;

/// Whether the guest is an older one and some of the nodes that take guests still have an older handler. It went anywhere before, and
/// goes on doing so until the upgrade is through.
fn is_amid_upgrade(vmi: &VirtualMachineInstance, world: &World) -> bool {
    let takes = |node: &Node| labels(&node.metadata).get(names::LABEL_SCHEDULABLE).is_some_and(|value| value == "true");
    vmi.status.machine_revision.unwrap_or(0) < SPELLED_OUT && world.nodes.iter().any(|node| takes(node) && !says(node))
}

fn to_receive(vmi: &VirtualMachineInstance, world: &World) -> BTreeSet<String> {
    let Some(node) = source(vmi, world) else { return BTreeSet::new() };
    let has = labels(&node.metadata);
    let amid_upgrade = is_amid_upgrade(vmi, world);
    let mut wanted = BTreeSet::new();
    match (&vmi.status.guest_cpu, named(vmi)) {
        _ if amid_upgrade => wanted.extend(earlier(vmi, world)),
        (Some(cpu), _) => {
            wanted.insert(label(names::LABEL_PREFIX_CPU_MODEL_MIGRATION, &cpu.model));
            wanted.extend(cpu.features.iter().map(|feature| label(names::LABEL_PREFIX_CPU_FEATURE, feature)));
        }
        (None, Some(model)) => {
            wanted.insert(label(names::LABEL_PREFIX_CPU_MODEL, model));
        }
        // It has its node's own processor, or that of the node where it was started.
        (None, None) => match earlier(vmi, world) {
            earlier if earlier.is_empty() => wanted.extend(of_host(vmi, has)),
            earlier => wanted.extend(earlier),
        },
    }
    if !amid_upgrade {
        let machine = vmi.status.machine.as_ref().and_then(|machine| machine.type_.as_deref());
        wanted.extend(machine.map(|machine| label(names::LABEL_PREFIX_MACHINE_TYPE, machine)));
    }
    // Every handler says it. A translated processor is of any vendor.
    if vmi.status.accelerator.as_deref() == Some("kvm") {
        wanted.extend(has.keys().filter(|label| label.starts_with(names::LABEL_PREFIX_CPU_VENDOR)).cloned());
    }
    kept(wanted, has)
}

/// What the node says of itself.
fn kept(wanted: BTreeSet<String>, has: &BTreeMap<String, String>) -> BTreeSet<String> {
    wanted.into_iter().filter(|label| has.get(label).is_some_and(|value| value == "true")).collect()
}

/// What the guest's node says of its own processor.
fn of_host(vmi: &VirtualMachineInstance, has: &BTreeMap<String, String>) -> Vec<String> {
    let model = vmi.spec.domain.cpu.as_ref().and_then(|cpu| cpu.model.as_deref());
    let passthrough = model == Some("host-passthrough");
    let named = has.keys().filter_map(|label| label.strip_prefix(names::LABEL_PREFIX_HOST_MODEL_CPU));
    let prefix = if passthrough { names::LABEL_PREFIX_HOST_MODEL_CPU } else { names::LABEL_PREFIX_CPU_MODEL_MIGRATION };
    let models = named.map(|model| label(prefix, model));
    let required = has.keys().filter_map(|label| label.strip_prefix(names::LABEL_PREFIX_HOST_MODEL_REQUIRED_FEATURES));
    models.chain(required.map(|feature| label(names::LABEL_PREFIX_CPU_FEATURE, feature))).collect()
}

/// What of the processor its pod was placed by on an earlier way: that of the node where it was started. What its VMI asks of nodes says
/// nothing of that, and the pod that started it was placed by nothing else.
fn earlier(vmi: &VirtualMachineInstance, world: &World) -> BTreeSet<String> {
    let prefixes =
        [names::LABEL_PREFIX_CPU_MODEL_MIGRATION, names::LABEL_PREFIX_HOST_MODEL_CPU, names::LABEL_PREFIX_CPU_FEATURE];
    let pod = vmi::current_pod(vmi, world).filter(|pod| pod.label(names::LABEL_MIGRATION_JOB_UID).is_some());
    let selector = pod.and_then(|pod| pod.spec.as_ref()).and_then(|spec| spec.node_selector.as_ref());
    let keys = selector.into_iter().flat_map(BTreeMap::keys).filter(|key| !vmi.spec.node_selector.contains_key(*key));
    keys.filter(|key| prefixes.iter().any(|prefix| key.starts_with(prefix))).cloned().collect()
}

fn source<'a>(vmi: &VirtualMachineInstance, world: &'a World) -> Option<&'a Node> {
    let name = vmi.status.node_name.as_deref()?;
    world.nodes.get(&Name::cluster(name)).map(AsRef::as_ref)
}

/// Whether no node but the guest's own can give it its processor and machine, although there are others. One that is yet to say
/// what it has may: it has just joined, or its handler is still to be upgraded.
pub fn is_nowhere_else(vmi: &VirtualMachineInstance, world: &World) -> bool {
    let wanted = to_receive(vmi, world);
    let mut others = others(vmi, world).peekable();
    let may = |node: &Node| if says(node) { lacks(node, &wanted).next().is_none() } else { may_yet_say(node) };
    !wanted.is_empty() && others.peek().is_some() && !others.any(may)
}

/// Whether a silent node has a handler, or may get one: control planes often have none and never will.
fn may_yet_say(node: &Node) -> bool {
    let has = labels(&node.metadata);
    has.contains_key(names::LABEL_SCHEDULABLE) || !has.contains_key(names::LABEL_CONTROL_PLANE)
}

fn others<'a>(vmi: &'a VirtualMachineInstance, world: &'a World) -> impl Iterator<Item = &'a Node> {
    let own = vmi.status.node_name.as_deref();
    world.nodes.iter().map(AsRef::as_ref).filter(move |node: &&Node| Some(node.name()) != own)
}

fn lacks<'a>(node: &'a Node, wanted: &'a BTreeSet<String>) -> impl Iterator<Item = &'a str> {
    let has = labels(&node.metadata);
    wanted.iter().filter(|label| has.get(*label).is_none_or(|value| value != "true")).map(String::as_str)
}

/// Why the other nodes cannot take the guest, by name.
pub fn verdicts(vmi: &VirtualMachineInstance, world: &World) -> Vec<NodeVerdict> {
    let wanted = to_receive(vmi, world);
    let verdict = |node: &Node| NodeVerdict {
        node_name: node.name().to_owned(),
        reasons: vec![format!("it does not offer {}", in_words(lacks(node, &wanted)))],
    };
    others(vmi, world).map(verdict).take(MOST_VERDICTS).collect()
}

/// What a guest has, or asks for, in words.
pub fn describe(vmi: &VirtualMachineInstance) -> String {
    let cpu = match (&vmi.status.guest_cpu, named(vmi)) {
        (Some(cpu), _) if cpu.features.is_empty() => format!("CPU model {}", cpu.model),
        (Some(cpu), _) => format!("CPU model {} with {} features beyond it", cpu.model, cpu.features.len()),
        (None, Some(model)) => format!("CPU model {model}"),
        (None, None) => "its node's own CPU".to_owned(),
    };
    match vmi.status.machine.as_ref().and_then(|machine| machine.type_.as_deref()) {
        Some(machine) => format!("{cpu}, machine type {machine}"),
        None => cpu,
    }
}

/// Labels as what they stand for: `CPU model Haswell, CPU features avx2, bmi1`.
fn in_words<'a>(labels: impl Iterator<Item = &'a str>) -> String {
    let (mut features, mut others) = (Vec::new(), Vec::new());
    for label in labels {
        let (prefix, name) = label.split_once('/').unwrap_or(("", label));
        match prefix.split('.').next().unwrap_or_default() {
            "cpu-feature" => features.push(name),
            "cpu-vendor" => others.push(format!("CPUs of {name}")),
            "machine-type" => others.push(format!("machine type {name}")),
            _ => others.push(format!("CPU model {name}")),
        }
    }
    match features.as_slice() {
        [] => {}
        [one] => others.push(format!("CPU feature {one}")),
        several => others.push(format!("CPU features {}", several.join(", "))),
    }
    others.join(", ")
}

/// The greatest CPU model that all nodes have which say what they have, those as well that are closed or silent: they come back.
/// Among models that have the same number of features (as the least of the nodes counts them) the name decides.
pub fn baseline(world: &World) -> CpuBaseline {
    let mut common: Option<BTreeMap<String, usize>> = None;
    let mut nodes = 0;
    for said in world.nodes.iter().filter_map(|node| models(node)) {
        nodes += 1;
        common = Some(match common {
            None => said,
            Some(mut common) => {
                common.retain(|model, features| {
                    said.get(model).inspect(|said| *features = **said.min(&&*features)).is_some()
                });
                common
            }
        });
    }
    let common = common.unwrap_or_default().into_iter().filter(|(model, _)| !is_version(model));
    let greatest = common.max_by(|(one, few), (other, many)| few.cmp(many).then_with(|| one.cmp(other)));
    CpuBaseline { model: greatest.map(|(model, _)| model), nodes }
}

/// Whether a node's word on its CPU models has changed.
pub fn changes_baseline(before: Option<&Node>, after: Option<&Node>) -> bool {
    let said =
        |node: Option<&Node>| node.and_then(|node| node.annotation(names::ANNOTATION_CPU_MODELS).map(str::to_owned));
    said(before) != said(after)
}

/// The models that a node has and how many features each has; none where its handler does not say.
fn models(node: &Node) -> Option<BTreeMap<String, usize>> {
    serde_json::from_str(node.annotation(names::ANNOTATION_CPU_MODELS)?).ok()
}

/// Whether this is a model in one of its versions (`Nehalem-v2`); the model itself is there too.
fn is_version(model: &str) -> bool {
    model.rsplit_once("-v").is_some_and(|(_, number)| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::object::Kind;
    use crate::testing::Cluster;

    fn node(cluster: &mut Cluster, name: &str, has: &[&str]) {
        let labels: BTreeMap<&str, &str> = has.iter().map(|label| (*label, "true")).collect();
        cluster.put(Kind::Node, json!({"metadata": {"name": name, "labels": labels}}));
    }

    fn vmi(model: Value, status: Value) -> VirtualMachineInstance {
        let spec = json!({"domain": {"cpu": {"model": model}}});
        let metadata = json!({"name": "vmi", "namespace": "default", "uid": "u"});
        serde_json::from_value(json!({"metadata": metadata, "spec": spec, "status": status})).unwrap()
    }

    const WESTMERE: &str = "cpu-model.node.kubevirt.io/Westmere";
    const TO_WESTMERE: &str = "cpu-model-migration.node.kubevirt.io/Westmere";
    const AVX: &str = "cpu-feature.node.kubevirt.io/avx";
    const MORE: &str = "cpu-feature.node.kubevirt.io/more";
    const Q35: &str = "machine-type.node.kubevirt.io/pc-q35-7.2";

    #[test]
    fn a_named_model_is_asked_for_once_nodes_say_what_they_have() {
        let mut cluster = Cluster::new();
        node(&mut cluster, "silent", &["kubevirt.io/schedulable"]);
        let asks = vmi(json!("Westmere"), json!({}));
        assert!(to_start(&asks, &cluster.world).is_empty());
        node(&mut cluster, "says", &["cpu-model.node.kubevirt.io/Penryn"]);
        assert_eq!(to_start(&asks, &cluster.world), BTreeSet::from([WESTMERE.to_owned()]));
        for host in [json!(null), json!("host-model"), json!("host-passthrough")] {
            assert!(to_start(&vmi(host, json!({})), &cluster.world).is_empty());
        }
    }

    #[test]
    fn a_guest_goes_only_where_its_processor_is_and_from_where_it_can_return() {
        let mut cluster = Cluster::new();
        node(&mut cluster, "a", &[WESTMERE, TO_WESTMERE, AVX, Q35]);
        node(&mut cluster, "b", &[WESTMERE, TO_WESTMERE, Q35]);
        let status = json!({
            "nodeName": "a", "guestCpu": {"model": "Westmere", "features": ["avx", "unsaid"]},
            "machine": {"type": "pc-q35-7.2"},
        });
        let runs = vmi(json!(null), status);
        let wanted = to_receive(&runs, &cluster.world);
        assert_eq!(
            wanted,
            BTreeSet::from([TO_WESTMERE, AVX, Q35].map(str::to_owned)),
            "its node does not say `unsaid`"
        );
        assert!(is_nowhere_else(&runs, &cluster.world));
        let verdicts = verdicts(&runs, &cluster.world);
        assert_eq!(verdicts[0].node_name, "b");
        assert_eq!(verdicts[0].reasons, ["it does not offer CPU feature avx"]);
        node(&mut cluster, "c", &[TO_WESTMERE, AVX, Q35, MORE]);
        assert!(!is_nowhere_else(&runs, &cluster.world));
    }

    #[test]
    fn a_node_that_has_not_said_yet_is_waited_for() {
        let status = json!({"nodeName": "a", "guestCpu": {"model": "Westmere", "features": []}, "machineRevision": 4});
        let runs = vmi(json!(null), status);
        let with = |name: &str, has: &[&str]| {
            let mut cluster = Cluster::new();
            node(&mut cluster, "a", &[WESTMERE, TO_WESTMERE]);
            node(&mut cluster, "b", &["cpu-model.node.kubevirt.io/Penryn"]);
            node(&mut cluster, name, has);
            cluster
        };
        assert!(is_nowhere_else(&runs, &with("b", &["cpu-model.node.kubevirt.io/Nehalem"]).world));
        assert!(!is_nowhere_else(&runs, &with("joins", &[]).world));
        assert!(!is_nowhere_else(&runs, &with("older", &["kubevirt.io/schedulable"]).world));
        assert!(is_nowhere_else(&runs, &with("plane", &[names::LABEL_CONTROL_PLANE]).world), "it has no handler");
        let both = [names::LABEL_CONTROL_PLANE, "kubevirt.io/schedulable"];
        assert!(!is_nowhere_else(&runs, &with("plane", &both).world));
    }

    #[test]
    fn an_older_guest_asks_for_nothing_new_before_all_handlers_are_new() {
        let mut cluster = Cluster::new();
        let vendor = "cpu-vendor.node.kubevirt.io/Intel";
        let host = "host-model-cpu.node.kubevirt.io/Westmere";
        node(&mut cluster, "a", &["kubevirt.io/schedulable", host, WESTMERE, TO_WESTMERE, vendor, Q35]);
        node(&mut cluster, "b", &["kubevirt.io/schedulable", vendor]);
        let status = |revision: u32| json!({"nodeName": "a", "accelerator": "kvm", "machine": {"type": "pc-q35-7.2"}, "machineRevision": revision});
        for model in [json!(null), json!("Westmere")] {
            let older = vmi(model.clone(), status(3));
            assert_eq!(to_receive(&older, &cluster.world), BTreeSet::from([vendor.to_owned()]));
            assert!(to_receive(&vmi(model, status(4)), &cluster.world).len() > 1);
        }
        node(&mut cluster, "b", &["kubevirt.io/schedulable", WESTMERE, vendor]);
        let older = vmi(json!(null), status(3));
        assert_eq!(to_receive(&older, &cluster.world), BTreeSet::from([TO_WESTMERE, vendor, Q35].map(str::to_owned)));
    }

    #[test]
    fn the_baseline_is_the_greatest_model_of_all_nodes() {
        let mut cluster = Cluster::new();
        assert_eq!(baseline(&cluster.world), CpuBaseline::default());
        let mut says = |name: &str, models: Value, closed: bool| {
            let annotations = json!({ names::ANNOTATION_CPU_MODELS: models.to_string() });
            let metadata = json!({"name": name, "annotations": annotations});
            cluster.put(Kind::Node, json!({"metadata": metadata, "spec": {"unschedulable": closed}}));
            baseline(&cluster.world)
        };
        let first = says("a", json!({"Haswell": 60, "Westmere": 40, "Westmere-v2": 41, "qemu64": 20}), false);
        assert_eq!(first, CpuBaseline { model: Some("Haswell".into()), nodes: 1 });
        let both = says("b", json!({"Westmere": 39, "Westmere-v2": 41, "qemu64": 20}), true);
        assert_eq!(both, CpuBaseline { model: Some("Westmere".into()), nodes: 2 }, "a node that is closed comes back");
        let apart = says("c", json!({"Opteron_G1": 20}), false);
        assert_eq!(apart, CpuBaseline { model: None, nodes: 3 });
    }

    #[test]
    fn a_guest_with_its_nodes_own_processor_stays_among_such() {
        let mut cluster = Cluster::new();
        let host = ["host-model-cpu.node.kubevirt.io/Westmere", "host-model-required-features.node.kubevirt.io/avx"];
        let vendor = "cpu-vendor.node.kubevirt.io/Intel";
        node(&mut cluster, "a", &[host[0], host[1], TO_WESTMERE, AVX, vendor]);
        let status = json!({"nodeName": "a", "accelerator": "kvm"});
        let wanted = to_receive(&vmi(json!("host-model"), status.clone()), &cluster.world);
        assert_eq!(wanted, BTreeSet::from([TO_WESTMERE, AVX, vendor].map(str::to_owned)));
        let passed = to_receive(&vmi(json!("host-passthrough"), status), &cluster.world);
        assert_eq!(passed, BTreeSet::from([host[0], AVX, vendor].map(str::to_owned)));
        // What its VMI asks for by name takes nothing of that away, neither before nor after it has moved.
        let machine = json!({"type": "pc-q35-7.2"});
        let pod = |migration: Option<&str>, selector: &[&str]| {
            let selector: BTreeMap<&str, &str> = selector.iter().map(|label| (*label, "true")).collect();
            let mut labels = json!({"kubevirt.io/created-by": "u"});
            if let Some(migration) = migration {
                labels[names::LABEL_MIGRATION_JOB_UID] = json!(migration);
            }
            let metadata = json!({"name": names::launcher_pod("vmi", "u"), "namespace": "default", "labels": labels});
            json!({"metadata": metadata, "spec": {"nodeName": "a", "nodeSelector": selector, "containers": []}})
        };
        node(&mut cluster, "a", &[host[0], host[1], TO_WESTMERE, AVX, vendor, Q35, MORE]);
        let mut runs = vmi(json!(null), json!({"nodeName": "a", "accelerator": "kvm", "machine": machine}));
        runs.spec.node_selector.insert(MORE.to_owned(), "true".to_owned());
        let all = BTreeSet::from([TO_WESTMERE, AVX, vendor, Q35].map(str::to_owned));
        for (migration, selector) in [(None, [Q35, MORE].as_slice()), (Some("m"), &[MORE, Q35, vendor])] {
            cluster.put(Kind::Pod, pod(migration, selector));
            assert_eq!(to_receive(&runs, &cluster.world), all, "{selector:?}");
        }
        // What it has come with is asked for again, instead of what this node has beyond it.
        cluster.put(Kind::Pod, pod(Some("m"), &[AVX, Q35, vendor]));
        assert_eq!(to_receive(&runs, &cluster.world), BTreeSet::from([AVX, vendor, Q35].map(str::to_owned)));
        // A node that is alone refuses nothing: there the scheduler says that it is.
        assert!(!is_nowhere_else(&vmi(json!("host-model"), json!({"nodeName": "a"})), &cluster.world));
    }
}
