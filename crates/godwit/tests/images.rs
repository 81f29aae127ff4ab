//! Images: made, taken over, listed, removed; and what is said of one that is not there.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::events::Said;
use common::{Cluster, ROM_IMAGE, godwit, status, text};
use kube::api::DynamicObject;
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

fn run(folder: &Path, arguments: &[&str]) -> String {
    let output = godwit(folder, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn build_list_import_remove() {
    let folder = tempfile::tempdir().expect("folder");
    let data = folder.path().join("data");
    let file = folder.path().join("hello.txt");
    std::fs::write(&file, "hello").expect("write");
    let pair = format!("{}:/etc/hello.txt", file.display());
    let built = run(&data, &["image", "build", "godwit.local/hello:1", &pair]);
    let digest = built.trim().strip_prefix("godwit.local/hello:1 sha256:").expect("name and digest").to_owned();
    assert_eq!(run(&data, &["image", "build", "godwit.local/hello:1", &pair]), built, "the same files, the same image");
    let listed = run(&data, &["image", "list"]);
    assert!(listed.contains("godwit.local/hello:1") && listed.contains(&digest), "{listed}");

    // The store is an OCI layout: packed, it is an archive as other tools make them.
    let archive = folder.path().join("hello.tar");
    let packed =
        Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(data.join("images")).arg(".").output().expect("tar");
    assert!(packed.status.success(), "{}", text(&packed.stderr));
    let other = folder.path().join("other");
    let archive = archive.display().to_string();
    let imported = run(&other, &["image", "import", &archive]);
    assert!(imported.contains("godwit.local/hello:1") && imported.contains(&digest), "{imported}");
    let renamed = run(&other, &["image", "import", &archive, "godwit.local/renamed:2"]);
    assert!(renamed.contains("godwit.local/renamed:2") && renamed.contains(&digest), "{renamed}");

    run(&other, &["image", "remove", "godwit.local/hello:1"]);
    let listed = run(&other, &["image", "list"]);
    assert!(!listed.contains("hello:1") && listed.contains("renamed:2"), "{listed}");
    let again = godwit(&other, &["image", "remove", "godwit.local/hello:1"]);
    assert!(!again.status.success());
    assert!(text(&again.stderr).contains("godwit.local/hello:1"), "{}", text(&again.stderr));
    let nothing = godwit(&other, &["image", "build", "godwit.local/none:1", "/no/such/file:/x"]);
    assert!(text(&nothing.stderr).contains("/no/such/file"), "{}", text(&nothing.stderr));
}

fn waiting(pod: &DynamicObject) -> (String, String) {
    let all = ["containerStatuses", "initContainerStatuses"];
    all.iter()
        .filter_map(|list| pod.data.pointer(&format!("/status/{list}"))?.as_array())
        .flatten()
        .filter_map(|container| container.pointer("/state/waiting"))
        .map(|waiting| {
            let word = |key: &str| waiting[key].as_str().unwrap_or_default().to_owned();
            (word("reason"), word("message"))
        })
        .find(|(reason, _)| reason == "ErrImagePull" || reason == "ImagePullBackOff")
        .unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_image_is_named_and_taken_when_it_comes() {
    let cluster = Cluster::start(1).await;
    const LATE: &str = "godwit.local/late:1";
    cluster
        .apply(json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "late"},
            "spec": {"restartPolicy": "Never", "containers": [
                {"name": "main", "image": LATE, "command": ["/bin/busybox", "true"]}]},
        }))
        .await
        .expect("apply");
    cluster.apply(common::rom_vmi("early")).await.expect("apply");

    let pod = cluster.wait(&cluster.pods(), "late", "it waits for its image", |p| !waiting(p).0.is_empty()).await;
    assert!(waiting(&pod).1.contains(LATE), "{:?}", waiting(&pod));
    let refused = |vmi: &DynamicObject| synchronized(vmi).is_some();
    let vmi = cluster.wait(&cluster.vmis(), "early", "it says what it waits for", refused).await;
    let (reason, message) = synchronized(&vmi).expect("condition");
    assert!(["ErrImagePull", "ImagePullBackOff"].contains(&reason.as_str()), "{}", vmi.data);
    assert!(message.contains(ROM_IMAGE), "{message}");
    let failed = |event: &Said| event.reason == "Failed" && event.message.contains(LATE);
    cluster.hears_of("Pod", "late", "which image it lacks", failed).await;

    let built = cluster.godwit(&["image", "build", LATE, "/bin/busybox:/bin/busybox"]);
    assert!(built.status.success(), "{}", text(&built.stderr));
    cluster.build_rom_image(godwit_guest_rom::Parameters::default());
    cluster.wait(&cluster.pods(), "late", "it is over", |pod| status(pod, "phase") == "Succeeded").await;
    let runs = |vmi: &DynamicObject| status(vmi, "phase") == "Running" && synchronized(vmi).is_none();
    cluster.wait(&cluster.vmis(), "early", "it runs", runs).await;
}

/// Reason and message of the condition `Synchronized` when it is false.
fn synchronized(vmi: &DynamicObject) -> Option<(String, String)> {
    let conditions = vmi.data.pointer("/status/conditions")?.as_array()?;
    let found = conditions.iter().find(|c| c["type"] == "Synchronized" && c["status"] == "False")?;
    let word = |key: &str| found.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    Some((word("reason"), word("message")))
}
