//! The rest of what KubeVirt's clients count on.

use crate::common::{Cluster, kubectls, rom_vmi, status, text};
use crate::stage::{NARROW, annotated, condition, is_over, migration, phase, uid};
use kube::api::{DynamicObject, PostParams};
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_leaves_nothing() {
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.start_rom_guest_on("stayer", "node1").await;
    let (pod, node) = cluster.only_launcher("stayer").await;
    let wanted: DynamicObject = serde_json::from_value(migration("dry", "stayer")).expect("an object");
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    let said = cluster.migrations().create(&dry, &wanted).await.expect("create");
    // It says what would have been.
    let labels = said.metadata.labels.expect("labels");
    assert_eq!(labels.get("kubevirt.io/vmi-name").map(String::as_str), Some("stayer"));
    let finalizers = said.metadata.finalizers.expect("finalizers");
    assert_eq!(finalizers, ["kubevirt.io/migrationJobFinalize"]);
    assert!(cluster.migrations().get_opt("dry").await.expect("get").is_none());
    // And refuses what would have been refused.
    let missing: DynamicObject = serde_json::from_value(migration("dry", "missing")).expect("an object");
    let refused = cluster.migrations().create(&dry, &missing).await.expect_err("refused");
    assert!(refused.to_string().contains("the VMI \"default/missing\" does not exist"), "{refused}");
    // Changing and deleting one that is there leaves it as it is, too.
    cluster.cordon("node2", true).await;
    cluster.ask(&migration("wet", "stayer")).await.made();
    let before = cluster.comes_to("wet", "Scheduling").await;
    if let Some(kubectl) = kubectls().pop() {
        cluster.kubectl(&kubectl, &["label", "vmim", "wet", "a=b", "--dry-run=server"]);
        cluster.kubectl(&kubectl, &["delete", "vmim", "wet", "--dry-run=server"]);
    }
    let after = cluster.migration("wet").await;
    assert_eq!((after.metadata.labels, after.metadata.deletion_timestamp), (before.metadata.labels, None));
    cluster.cancel("wet").await;
    cluster.stays("stayer", &node, &pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_added_node_selector_chooses_the_target_and_is_forgotten() {
    let cluster = Cluster::with_rom(3, 3).await;
    let mut vmi = rom_vmi("chosen");
    vmi["spec"]["nodeSelector"] = json!({"kubernetes.io/os": "linux"});
    cluster.apply(vmi).await.expect("apply");
    cluster.wait(&cluster.vmis(), "chosen", "it runs", |v| phase(v) == "Running").await;
    let before = cluster.vmis().get("chosen").await.expect("VMI");
    let from = status(&before, "nodeName");
    // Both of the others in turn: no accident.
    let others: Vec<String> = (1..=3).map(|n| format!("node{n}")).filter(|node| *node != from).collect();
    for node in others.iter().chain([&from]) {
        let mut wanted = migration(&format!("to-{node}"), "chosen");
        // What the VM asks for itself wins.
        wanted["spec"]["addedNodeSelector"] =
            json!({"kubernetes.io/hostname": node, "kubernetes.io/os": "something else"});
        cluster.ask(&wanted).await.made();
        assert_eq!(cluster.has_moved("chosen", &format!("to-{node}")).await, *node);
    }
    let after = cluster.vmis().get("chosen").await.expect("VMI");
    assert_eq!(after.data["spec"], before.data["spec"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_asked_for_at_the_same_instant_one_is_made() {
    let cluster = Cluster::with_rom(2, 64).await;
    cluster.start_rom_guest_on("wanted", "node1").await;
    cluster.narrow("node1", NARROW);
    let asked: Vec<_> = (0..8).map(|n| migration(&format!("move-{n}"), "wanted")).collect();
    let answers = futures::future::join_all(asked.iter().map(|wanted| cluster.ask(wanted))).await;
    let made: Vec<String> = answers.iter().filter(|a| a.code == 201).map(crate::stage::Answer::made).collect();
    assert!(!made.is_empty());
    for answer in answers.iter().filter(|answer| answer.code != 201) {
        let of = made.iter().find(|uid| {
            answer.refused(400)
                == format!(
                    "admission webhook \"migration-create-validator.kubevirt.io\" denied the request: in-flight \
                     migration detected. Active migration job ({uid}) is currently already in progress for VMI wanted."
                )
        });
        assert!(of.is_some(), "{}", answer.body);
    }
    // Should two have slipped past each other, the controller lets one of them go.
    let mut running = 0;
    for n in 0..8 {
        let name = format!("move-{n}");
        if cluster.migrations().get_opt(&name).await.expect("get").is_none() {
            continue;
        }
        let settled = |m: &DynamicObject| is_over(m) || phase(m) == "Running";
        let m = cluster.wait(&cluster.migrations(), &name, "it runs or is refused", settled).await;
        running += usize::from(phase(&m) == "Running");
    }
    assert_eq!(running, 1);
    let vmi = cluster.vmis().get("wanted").await.expect("VMI");
    assert!(made.contains(&status(&vmi, "migrationState/migrationUid")), "{}", vmi.data);
}

#[tokio::test(flavor = "multi_thread")]
async fn five_finished_migrations_of_a_vmi_are_kept() {
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.configure(json!({"bandwidthPerMigration": "0"})).await;
    cluster.start_rom_guest_on("shuttle", "node1").await;
    for n in 0..6 {
        let name = format!("trip-{n}");
        cluster.migrate("shuttle", &name).await;
        cluster.has_moved("shuttle", &name).await;
    }
    cluster.wait_gone(&cluster.migrations(), "trip-0").await;
    let list = cluster.migrations().list(&Default::default()).await.expect("list");
    let mut names: Vec<String> = list.items.iter().filter_map(|m| m.metadata.name.clone()).collect();
    names.sort();
    assert_eq!(names, ["trip-1", "trip-2", "trip-3", "trip-4", "trip-5"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_applied_again_is_unchanged() {
    let Some(kubectl) = kubectls().pop() else { return };
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.start_rom_guest_on("mover", "node1").await;
    let manifest = migration("job", "mover").to_string();
    let apply = || cluster.try_kubectl(&kubectl, &["apply", "-f", "-"], Some(&manifest));
    assert!(text(&apply().stdout).contains("created"));
    cluster.has_moved("mover", "job").await;
    let before = cluster.migration("job").await;
    let again = apply();
    assert!(text(&again.stdout).contains("unchanged"), "{}{}", text(&again.stdout), text(&again.stderr));
    assert_eq!(uid(&cluster.migration("job").await), uid(&before));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_blocker_is_told_and_the_first_in_kubevirts_words() {
    let cluster = Cluster::with_rom(2, 3).await;
    let mut vmi = rom_vmi("homely");
    for claim in ["data", "logs"] {
        cluster
            .apply(json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claim},
                "spec": {"storageClassName": "local", "accessModes": ["ReadWriteOnce"],
                    "resources": {"requests": {"storage": "1Mi"}}}}))
            .await
            .expect("apply");
    }
    vmi["spec"]["domain"]["devices"]["disks"] =
        json!([{"name": "a", "disk": {"bus": "virtio"}}, {"name": "b", "disk": {"bus": "virtio"}}]);
    vmi["spec"]["volumes"] = json!([{"name": "a", "persistentVolumeClaim": {"claimName": "data"}},
        {"name": "b", "persistentVolumeClaim": {"claimName": "logs"}}]);
    cluster.apply(vmi).await.expect("apply");
    let told = |v: &DynamicObject| phase(v) == "Running" && condition(v, "LiveMigratable").is_some();
    let vmi = cluster.wait(&cluster.vmis(), "homely", "it says whether it can move", told).await;
    let live = condition(&vmi, "LiveMigratable").expect("a condition");
    assert_eq!((&live["status"], &live["reason"]), (&json!("False"), &json!("DisksNotLiveMigratable")));
    let message = live["message"].as_str().expect("a message");
    let words = |claim: &str| {
        format!(
            "cannot migrate VMI: PVC {claim} is not shared, live migration requires that all PVCs must be shared (using \
             ReadWriteMany access mode)"
        )
    };
    assert!(message.starts_with(&words("data")) && message.contains(&words("logs")), "{message}");
    let storage = condition(&vmi, "StorageLiveMigratable").expect("a condition");
    assert_eq!((&storage["status"], &storage["reason"]), (&json!("False"), &json!("NotMigratable")));
    let refused = cluster.ask(&migration("move", "homely")).await;
    assert_eq!(
        refused.refused(400),
        format!(
            "admission webhook \"migration-create-validator.kubevirt.io\" denied the request: Cannot migrate VMI, Reason: \
             DisksNotLiveMigratable, Message: {message}"
        )
    );
}

/// As the oldest of the documents has it: the old version, which is answered with a warning.
#[tokio::test(flavor = "multi_thread")]
async fn manifests_of_the_old_version_still_migrate() {
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.start_rom_guest_on("veteran", "node1").await;
    let mut old = migration("move", "veteran");
    old["apiVersion"] = json!("kubevirt.io/v1alpha3");
    let path = "/apis/kubevirt.io/v1alpha3/namespaces/default/virtualmachineinstancemigrations";
    let answer = cluster.post(path, &old, "").await;
    answer.made();
    let warning = "kubevirt.io/v1alpha3 is now deprecated and will be removed in a future release.";
    assert!(answer.warnings.iter().any(|said| said.contains(warning)), "{:?}", answer.warnings);
    cluster.has_moved("veteran", "move").await;
}

/// KubeVirt's two columns first, as they are there; ours behind them.
#[tokio::test(flavor = "multi_thread")]
async fn kubectl_shows_where_a_migration_is_and_how_it_went() {
    let Some(kubectl) = kubectls().pop() else { return };
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.start_rom_guest_on("shown", "node1").await;
    cluster.narrow("node1", NARROW);
    cluster.migrate("shown", "move").await;
    let under_way = |m: &DynamicObject| {
        let percent = status(m, "migrationState/progress/percent").parse::<u64>().unwrap_or(0);
        is_over(m) || percent > 0
    };
    let running = cluster.wait(&cluster.migrations(), "move", "it has come a bit", under_way).await;
    assert_eq!(phase(&running), "Running", "{}", running.data["status"]);
    // All of it is in the migration itself, while it runs.
    for field in ["bytesTotal", "bytesProcessed", "bytesRemaining", "bytesPerSecond"] {
        let value = status(&running, &format!("migrationState/progress/{field}"));
        assert!(value.parse::<u64>().is_ok(), "{field} is {value:?}: {}", running.data["status"]);
    }
    let row = |table: &str, at: usize| -> Vec<String> {
        table.lines().nth(at).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
    };
    let table = cluster.kubectl(&kubectl, &["get", "vmim"]);
    let headings = ["NAME", "PHASE", "VMI", "SOURCE", "TARGET", "PROGRESS", "DOWNTIME", "AGE"];
    assert_eq!(row(&table, 0)[..8], headings, "{table}");
    assert_eq!(row(&table, 1)[..5], ["move", "Running", "shown", "node1", "node2"], "{table}");
    assert!(row(&table, 1)[5].strip_suffix('%').is_some_and(|percent| percent.parse::<u8>().is_ok()), "{table}");
    cluster.widen("node1");
    cluster.has_moved("shown", "move").await;
    let table = cluster.kubectl(&kubectl, &["get", "vmim"]);
    assert_eq!(row(&table, 1)[..6], ["move", "Succeeded", "shown", "node1", "node2", "100%"], "{table}");
    assert!(row(&table, 1)[6].parse::<u64>().is_ok() && row(&table, 1)[7] == "ms", "no downtime: {table}");
    let told = cluster.kubectl(&kubectl, &["describe", "vmim", "move"]);
    for part in [
        "Phase:",
        "Succeeded",
        "Target Node Domain Ready Timestamp:",
        "Total Milliseconds:",
        "Downtime Milliseconds:",
        "SuccessfulCreate",
        "Created migration target pod virt-launcher-shown-",
        "SuccessfulHandOver",
        "SuccessfulMigration",
    ] {
        assert!(told.contains(part), "no {part:?} in\n{told}");
    }
}

/// The source's handler fails it, as KubeVirt's own tests make it.
#[tokio::test(flavor = "multi_thread")]
async fn failures_are_told_and_leave_a_record() {
    let cluster = Cluster::with_rom(2, 3).await;
    let hook = "kubevirt.io/func-test-force-launcher-migration-failure";
    cluster.start_on(annotated(rom_vmi("stayer"), hook, "true"), "node1").await;
    let (pod, node) = cluster.only_launcher("stayer").await;
    cluster.migrate("stayer", "move").await;
    let over = cluster.wait(&cluster.migrations(), "move", "it is over", is_over).await;
    assert_eq!(phase(&over), "Failed");
    let said = status(&over, "migrationState/failureReason");
    assert!(said.contains("Failed migration to satisfy functional test condition"), "{said}");
    assert!(status(&over, "message").contains(&said), "{}", status(&over, "message"));
    cluster.is_told("move", "Warning", "FailedMigration", "source node reported migration failed").await;
    cluster.stays("stayer", &node, &pod).await;
    let record = the_record(&cluster, &over).await;
    assert_eq!(record["result"], "Failed");
    assert_eq!(record["reason"], status(&over, "reason").as_str(), "{record}");
    assert_eq!(record["message"], status(&over, "message").as_str(), "{record}");
}

/// Who asked is who the certificate of the kubeconfig says it is, whatever the manifest claims.
#[tokio::test(flavor = "multi_thread")]
async fn the_history_outlives_the_migration() {
    let Some(kubectl) = kubectls().pop() else { return };
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.start_rom_guest_on("mover", "node1").await;
    let manifest = annotated(migration("move", "mover"), "godwit.io/requested-by", "somebody else").to_string();
    let asked = cluster.try_kubectl(&kubectl, &["create", "-f", "-"], Some(&manifest));
    assert!(asked.status.success(), "{}", text(&asked.stderr));
    cluster.has_moved("mover", "move").await;
    let over = cluster.migration("move").await;
    cluster.cancel("move").await;
    let record = the_record(&cluster, &over).await;
    assert_eq!((&record["result"], &record["mode"]), (&json!("Succeeded"), &json!("PreCopy")), "{record}");
    for field in ["downtimeMilliseconds", "bytesProcessed", "totalMilliseconds"] {
        let told = over.data.pointer(&format!("/status/migrationState/progress/{field}"));
        assert!(told.is_some_and(Value::is_u64), "{}", over.data["status"]);
        assert_eq!(record.get(field), told, "{field}: {record}");
    }
    for absent in ["reason", "message", "evacuatedNode"] {
        assert_eq!(record.get(absent).filter(|value| !value.is_null()), None, "{absent}: {record}");
    }
    let whoami = cluster.kubectl(&kubectl, &["auth", "whoami", "-o", "jsonpath={.status.userInfo.username}"]);
    assert_eq!(record["requestedBy"], whoami.trim(), "{record}");
    let table = cluster.kubectl(&kubectl, &["get", "mrec"]);
    let row = |at: usize| table.lines().nth(at).unwrap_or_default().split_whitespace().collect::<Vec<_>>();
    let headings = ["NAME", "VMI", "FROM", "TO", "RESULT", "REASON", "DOWNTIME", "BYTES", "BY", "AGE"];
    assert_eq!(row(0), headings, "{table}");
    // Of a success there is no reason, and its cell is empty.
    let downtime = record["downtimeMilliseconds"].to_string();
    assert_eq!(row(1)[1..7], ["mover", "node1", "node2", "Succeeded", &downtime, "ms"], "{table}");
    assert!(row(1).contains(&whoami.trim()), "{table}");
    assert_eq!(table.lines().count(), 2, "{table}");
}

/// The one record of a migration, which says whose it is, where it went and when.
async fn the_record(cluster: &Cluster, migration: &DynamicObject) -> Value {
    let records = cluster.api("godwit.io", "v1alpha1", "MigrationRecord");
    let list = records.list(&Default::default()).await.expect("list");
    let of = |record: &&DynamicObject| record.data["spec"]["migrationUID"] == uid(migration);
    let mut found = list.items.iter().filter(of);
    let record = found.next().expect("a record").data["spec"].clone();
    assert!(found.next().is_none(), "there are two: {:?}", list.items);
    for (field, wanted) in [
        ("vmiName", migration.data["spec"]["vmiName"].as_str().unwrap_or_default().to_owned()),
        ("migrationName", migration.metadata.name.clone().unwrap_or_default()),
        ("sourceNode", status(migration, "migrationState/sourceNode")),
        ("targetNode", status(migration, "migrationState/targetNode")),
    ] {
        assert_eq!(record[field], wanted.as_str(), "{field}: {record}");
        assert_ne!(wanted, "", "{field}: {}", migration.data);
    }
    for field in ["requestedBy", "requestedAt", "endedAt"] {
        assert!(record[field].as_str().is_some_and(|value| !value.is_empty()), "{field}: {record}");
    }
    record
}
