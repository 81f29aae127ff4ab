//! What decisions cost in a large cluster: `cargo run --release -p godwit-runtime --example scale [nodes] [vms]`.

use std::time::Instant;

use godwit_api::Installation;
use godwit_control::{Effect, Key, Kind, Name, Object, Settings, Source, View, World, placement, turns};
use jiff::Timestamp;
use serde_json::{Value, json};

struct Scale {
    world: World,
    revision: u64,
}

impl Scale {
    fn put(&mut self, kind: Kind, mut value: Value) -> Option<godwit_control::Change> {
        self.revision += 1;
        value["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        let object = Object::from_value(kind, value).expect("the example's own objects can be read");
        self.world.apply(object, Source::Watch)
    }
}

fn main() {
    let mut sizes = std::env::args().skip(1).filter_map(|text| text.parse::<usize>().ok());
    let (nodes, vms) = (sizes.next().unwrap_or(10_000), sizes.next().unwrap_or(50_000));
    let mut scale = Scale { world: World::default(), revision: 0 };
    let begin = Instant::now();
    build(&mut scale, nodes, vms);
    println!("{nodes} nodes, {vms} VMs with a pod and a pending migration each: {:?} to take in", begin.elapsed());

    let settings = Settings::standalone("/data");
    let now = Timestamp::from_second(2_000_000_000).unwrap_or_default();
    let decide = |scale: &Scale, key: &Key| key.decide(&View { now, world: &scale.world, settings: &settings });
    let measure = |what: &str, times: u32, work: &mut dyn FnMut(u32)| {
        let begin = Instant::now();
        (0..times).for_each(&mut *work);
        println!("{what}: {:?}", begin.elapsed() / times);
    };
    measure("grant of slots with all waiting", 20, &mut |_| {
        assert!(!decide(&scale, &Key::Turns).effects.is_empty());
    });
    measure("what one waiting migration is told", 1_000, &mut |number| {
        decide(&scale, &Key::Migration(Name::new("default", format!("job{number:06}"))));
    });
    let free = json!({"kubernetes.io/os": "linux"});
    let pinned = json!({"kubernetes.io/hostname": format!("node{:05}", nodes / 2)});
    let nowhere = json!({"zone": "moon"});
    for (what, selector) in
        [("a pod that fits anywhere", free), ("a pod for one node", pinned), ("a pod for no node", nowhere)]
    {
        let name = Name::new("default", "new");
        scale.put(Kind::Pod, pod("new", "new", None, selector));
        measure(&format!("placement of {what}"), 20, &mut |_| {
            assert!(!decide(&scale, &Key::Placement(name.clone())).effects.is_empty());
        });
        let Some(held) = scale.world.pods.get(&name).cloned() else { continue };
        measure("  verdicts on it", 5, &mut |_| {
            placement::verdicts(&held, &View { now, world: &scale.world, settings: &settings });
        });
    }
    // A slot is given: what has to be looked at again.
    let plan = decide(&scale, &Key::Turns);
    let Some(Effect::Patch(_, patch)) = plan.effects.first() else { return };
    let mut ledger = ledger();
    ledger["data"] = patch["data"].clone();
    let begin = Instant::now();
    let change = scale.put(Kind::ConfigMap, ledger);
    let keys = change.map(|change| Key::affected(&change, &scale.world)).unwrap_or_default();
    println!(
        "{} slots given: {:?} to take in, {} decisions follow",
        patch["data"].as_object().map_or(0, |all| all.len()),
        begin.elapsed(),
        keys.len()
    );
    let change = scale.put(Kind::Node, node(1, "heartbeat"));
    let keys = change.map(|change| Key::affected(&change, &scale.world)).unwrap_or_default();
    println!("a node's heartbeat: {} decisions follow", keys.len());
    println!("{} wait for their turn", scale.world.turns().waiting());
}

fn ledger() -> Value {
    let name = turns::reference(&Installation::USUAL).name;
    json!({"metadata": {"namespace": name.namespace, "name": name.name, "uid": "ledger",
        "creationTimestamp": "2020-01-01T00:00:00Z"}})
}

fn node(number: usize, heartbeat: &str) -> Value {
    let name = format!("node{number:05}");
    json!({
        "metadata": {"name": name, "uid": name, "annotations": {"example/heartbeat": heartbeat}, "labels": {
            "kubernetes.io/hostname": name, "kubevirt.io/schedulable": "true", "kubernetes.io/os": "linux",
        }},
        "status": {
            "allocatable": {"cpu": "64", "memory": "512Gi", "pods": "500"},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

fn pod(name: &str, vmi: &str, node: Option<&str>, selector: Value) -> Value {
    json!({
        "metadata": {
            "name": name, "namespace": "default", "uid": format!("pod-{name}"),
            "labels": {"kubevirt.io": "virt-launcher", "kubevirt.io/created-by": format!("uid-{vmi}"), "vm.kubevirt.io/name": vmi},
            "annotations": {"kubevirt.io/domain": vmi},
        },
        "spec": {"nodeName": node, "nodeSelector": selector, "containers": [{"name": "compute", "resources": {
            "requests": {"cpu": "200m", "memory": "2Gi"},
        }}]},
        "status": {"phase": if node.is_some() { "Running" } else { "Pending" }},
    })
}

fn build(scale: &mut Scale, nodes: usize, vms: usize) {
    scale.put(Kind::ConfigMap, ledger());
    let migrations = json!({"parallelMigrationsPerCluster": 25});
    scale.put(
        Kind::KubeVirt,
        json!({"metadata": {"namespace": "kubevirt", "name": "kubevirt"}, "spec": {"configuration": {"migrations": migrations}}}),
    );
    for number in 0..nodes {
        scale.put(Kind::Node, node(number, ""));
    }
    for number in 0..vms {
        let (vmi, node) = (format!("vm{number:06}"), format!("node{:05}", number % nodes));
        scale.put(
            Kind::VirtualMachineInstance,
            json!({
                "metadata": {"name": vmi, "namespace": "default", "uid": format!("uid-{vmi}")},
                "spec": {"domain": {"memory": {"guest": "2Gi"}, "devices": {}}},
                "status": {"phase": "Running", "nodeName": node},
            }),
        );
        scale.put(Kind::Pod, pod(&format!("pod-{vmi}"), &vmi, Some(&node), json!({})));
        scale.put(
            Kind::Migration,
            json!({
                "metadata": {"name": format!("job{number:06}"), "namespace": "default", "uid": format!("uid-job{number}"),
                    "creationTimestamp": "2033-01-01T00:00:00Z"},
                "spec": {"vmiName": vmi}, "status": {"phase": "Pending"},
            }),
        );
    }
}
