//! Which settings a migration runs under: the cluster's, in each of its forms, and those of policies.

use crate::common::{Cluster, status};
use crate::stage::NARROW;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use serde_json::{Value, json};

impl Cluster {
    async fn policy(&self, name: &str, spec: Value) {
        let resource =
            ApiResource::from_gvk(&GroupVersionKind::gvk("migrations.kubevirt.io", "v1alpha1", "MigrationPolicy"));
        let mut resource = resource;
        resource.plural = "migrationpolicies".to_owned();
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let policy = json!({"apiVersion": "migrations.kubevirt.io/v1alpha1", "kind": "MigrationPolicy",
            "metadata": {"name": name}, "spec": spec});
        api.patch(name, &PatchParams::apply("test"), &Patch::Apply(&policy)).await.expect("apply the policy");
    }

    /// Moves a guest and gives it up once it runs under its settings; what the VMI says they are.
    async fn settings(&self, vmi: &str, name: &str) -> DynamicObject {
        self.migrate(vmi, name).await;
        self.comes_to(name, "Running").await;
        let vmi = self.vmis().get(vmi).await.expect("VMI");
        self.cancel(name).await;
        vmi
    }
}

fn setting(vmi: &DynamicObject, name: &str) -> String {
    status(vmi, &format!("migrationState/migrationConfiguration/{name}"))
}

fn policy_name(vmi: &DynamicObject) -> String {
    status(vmi, "migrationState/migrationPolicyName")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_policy_that_fits_best_overrides_the_cluster_and_others_do_not() {
    let cluster = Cluster::with_rom(2, 64).await;
    let label = Patch::Merge(json!({"metadata": {"labels": {"team": "birds"}}}));
    let namespaces: Api<DynamicObject> =
        Api::all_with(cluster.client.clone(), &ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Namespace")));
    namespaces.patch("default", &Default::default(), &label).await.expect("label the namespace");
    let mut vmi = crate::common::rom_vmi("labelled");
    vmi["metadata"]["labels"] = json!({"size": "small", "tier": "gold"});
    cluster.start_on(vmi, "node1").await;
    cluster.narrow("node1", NARROW);

    let bandwidth = |bandwidth: &str, namespace: Value, vmi: Value| {
        json!({"bandwidthPerMigration": bandwidth,
            "selectors": {"namespaceSelector": namespace, "virtualMachineInstanceSelector": vmi}})
    };
    cluster.policy("elsewhere", bandwidth("7Mi", json!({"team": "fish"}), json!({}))).await;
    cluster.policy("half", bandwidth("7Mi", json!({"team": "birds"}), json!({"size": "large"}))).await;
    cluster.policy("nobody", json!({"bandwidthPerMigration": "7Mi"})).await;
    let vmi = cluster.settings("labelled", "without").await;
    assert_eq!((policy_name(&vmi), setting(&vmi, "bandwidthPerMigration")), (String::new(), "64Mi".into()));

    cluster.policy("namespace", bandwidth("8Mi", json!({"team": "birds"}), json!({}))).await;
    let vmi = cluster.settings("labelled", "namespaced").await;
    assert_eq!((policy_name(&vmi), setting(&vmi, "bandwidthPerMigration")), ("namespace".into(), "8Mi".into()));
    assert_eq!(setting(&vmi, "progressTimeout"), "150");

    let mut finer = bandwidth("9Mi", json!({"team": "birds"}), json!({"size": "small", "tier": "gold"}));
    finer["completionTimeoutPerGiB"] = json!(1234);
    finer["allowAutoConverge"] = json!(true);
    cluster.policy("finer", finer).await;
    let vmi = cluster.settings("labelled", "finer").await;
    assert_eq!((policy_name(&vmi), setting(&vmi, "bandwidthPerMigration")), ("finer".into(), "9Mi".into()));
    assert_eq!(setting(&vmi, "completionTimeoutPerGiB"), "1234");
    assert_eq!(setting(&vmi, "allowAutoConverge"), "true");
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_act_at_once_in_each_of_their_forms() {
    let cluster = Cluster::with_rom(2, 64).await;
    cluster.start_rom_guest_on("guest", "node1").await;
    cluster.narrow("node1", NARROW);
    let vmi = cluster.settings("guest", "defaults").await;
    for (name, value) in [
        ("parallelMigrationsPerCluster", "5"),
        ("parallelOutboundMigrationsPerNode", "2"),
        ("bandwidthPerMigration", "64Mi"),
        ("completionTimeoutPerGiB", "800"),
        ("progressTimeout", "150"),
    ] {
        assert_eq!(setting(&vmi, name), value, "{name}: {}", vmi.data["status"]["migrationState"]);
    }

    // The lab's ConfigMap.
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kubevirt-config", "namespace": "kubevirt"},
        "data": {"migrations": "parallelMigrationsPerCluster: \"6\"\nprogressTimeout: 151\ncompletionTimeoutPerGiB: 801\n"}});
    let maps: Api<DynamicObject> = Api::namespaced_with(
        cluster.client.clone(),
        "kubevirt",
        &ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "ConfigMap")),
    );
    maps.patch("kubevirt-config", &PatchParams::apply("test"), &Patch::Apply(&map)).await.expect("apply");
    let vmi = cluster.settings("guest", "map").await;
    let seen = |vmi: &DynamicObject| {
        ["parallelMigrationsPerCluster", "progressTimeout", "completionTimeoutPerGiB"].map(|name| setting(vmi, name))
    };
    assert_eq!(seen(&vmi), ["6", "151", "801"]);

    // The old guide's name wins over it, and today's over both.
    let old = Patch::Merge(json!({"spec": {"configuration": {"migrationConfiguration":
        {"progressTimeout": 152, "completionTimeoutPerGiB": 802}}}}));
    cluster.kubevirt().patch("kubevirt", &Default::default(), &old).await.expect("patch");
    let vmi = cluster.settings("guest", "old").await;
    assert_eq!(seen(&vmi), ["6", "152", "802"]);
    cluster.configure(json!({"completionTimeoutPerGiB": 803})).await;
    let vmi = cluster.settings("guest", "new").await;
    assert_eq!(seen(&vmi), ["6", "152", "803"]);
}

/// What QEMU reports never exceeds the cap.
#[tokio::test(flavor = "multi_thread")]
async fn the_bandwidth_limit_is_kept() {
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.start_rom_guest_on("slow", "node1").await;
    cluster.configure(json!({"bandwidthPerMigration": "2Mi"})).await;
    cluster.migrate("slow", "move").await;
    cluster.has_moved("slow", "move").await;
    let vmi = cluster.vmis().get("slow").await.expect("VMI");
    let number = |name: &str| {
        let said = status(&vmi, &format!("migrationState/progress/{name}"));
        said.parse::<u64>().unwrap_or_else(|_| panic!("{name} is {said:?}: {}", vmi.data["status"]["migrationState"]))
    };
    let (bytes, milliseconds, downtime) =
        (number("bytesProcessed"), number("totalMilliseconds"), number("downtimeMilliseconds"));
    // The cap is for what is sent while the guest runs. What follows while it stands still (the pages that it wrote
    // last: at most all that it writes to, 4 MiB) is sent as fast as it goes.
    let written = 4 << 20;
    let sent = bytes.saturating_sub(written);
    let most = (2 << 20) * milliseconds.saturating_sub(downtime) / 1000;
    // QEMU counts in windows of 100 ms.
    assert!(
        sent <= most + most / 10 + (2 << 20) / 10,
        "{bytes} bytes in {milliseconds} ms, of which {downtime} ms still"
    );
    assert_eq!(setting(&vmi, "bandwidthPerMigration"), "2Mi");
}

/// By the rules of the oldest document, which are chosen with an annotation.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_gate_nothing_migrates_where_gates_count() {
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.start_rom_guest_on("guest", "node1").await;
    cluster.configure(json!({})).await;
    let gates = |gates: Value| {
        Patch::Merge(json!({"spec": {"configuration": {"developerConfiguration": {"featureGates": gates}}}}))
    };
    let kubevirt = cluster.kubevirt();
    kubevirt.patch("kubevirt", &Default::default(), &gates(json!(["DataVolumes"]))).await.expect("patch");
    // Today the gate is part of KubeVirt.
    cluster.migrate("guest", "today").await;
    cluster.has_moved("guest", "today").await;
    let rules = Patch::Merge(json!({"metadata": {"annotations": {"godwit.io/feature-gates": "v1alpha3"}}}));
    kubevirt.patch("kubevirt", &Default::default(), &rules).await.expect("patch");
    let refused = cluster.ask(&crate::stage::migration("then", "guest")).await;
    assert_eq!(
        refused.refused(400),
        "admission webhook \"migration-create-validator.kubevirt.io\" denied the request: LiveMigration feature gate is \
         not enabled in kubevirt resource"
    );
    kubevirt.patch("kubevirt", &Default::default(), &gates(json!(["LiveMigration"]))).await.expect("patch");
    cluster.migrate("guest", "then").await;
    cluster.has_moved("guest", "then").await;
}
