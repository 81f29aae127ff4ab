//! What a guest sees of itself is the same after a move, and its clock is right.

use super::{PATIENCE, PORTS, ask, build_demo_image, claim, condition, facts_at, linux_vmi, runs, succeeds};
use crate::common::{Cluster, status};
use godwit_launcher::rpc::State;
use godwit_network::Namespace;
use kube::api::DynamicObject;
use serde_json::{Value, json};
use std::time::{Duration, Instant, SystemTime};

/// A clock that is off by more has not been set: `/lag` puts it back by an hour.
const NEARLY: i64 = 600;

/// What the guest says of its hardware, as soon as it is as wanted.
pub async fn hardware(cluster: &Cluster, vmi: &str, path: &'static str, wanted: impl Fn(&Value) -> bool) -> Value {
    let namespace = Namespace::open(&cluster.namespace("node1")).expect("the node's namespace");
    let deadline = Instant::now() + PATIENCE;
    let mut last = Err(String::new());
    while Instant::now() < deadline {
        let object = cluster.vmis().get(vmi).await.expect("VMI");
        if let Ok(address) = status(&object, "interfaces/0/ipAddress").parse() {
            let namespace = namespace.clone();
            last = tokio::task::spawn_blocking(move || ask(&namespace, address, PORTS[0], path)).await.expect("ask");
            if let Ok(hardware) = &last
                && wanted(hardware)
            {
                return hardware.clone();
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{vmi} {path} is not as wanted: {last:#?}\n{}", cluster.words());
}

/// By how many seconds a clock of the guest's is ahead of ours.
fn ahead(hardware: &Value, clock: &str) -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs();
    hardware[clock].as_i64().expect(clock) - i64::try_from(now).expect("before the sun's end")
}

/// Without what goes on by itself: the clocks, and which of them Linux trusts. It compares them with one another all the time, and
/// gives up the processor's when that is late, as a translated one may be on a busy machine, whether its guest moves or not.
fn still(hardware: &Value) -> Value {
    let mut still = hardware.clone();
    for moving in ["wallSeconds", "rtcSeconds", "clockSource"] {
        still.as_object_mut().expect("an object").remove(moving);
    }
    still
}

/// The pod that the guest is in, once its last migration is over.
pub async fn place(cluster: &Cluster, vmi: &str) -> String {
    let object = cluster.vmis().get(vmi).await.expect("VMI");
    match status(&object, "migrationState/targetPod") {
        none if none.is_empty() => cluster.launchers(vmi).await.remove(0).0,
        pod => pod,
    }
}

async fn launcher_says(cluster: &Cluster, vmi: &str, what: &str, wanted: impl Fn(&State) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    let pod = place(cluster, vmi).await;
    let mut last = None;
    while Instant::now() < deadline {
        let state = cluster.with_launcher(&pod, async |launcher| launcher.state().await).await;
        if state.as_ref().is_ok_and(&wanted) {
            return;
        }
        last = Some(state);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{vmi}'s launcher never says {what}: {last:#?}\n{}", cluster.words());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_with_many_devices_finds_them_all_after_its_moves_and_its_clock_is_right() {
    let cluster = Cluster::start(2).await;
    build_demo_image(&cluster);
    let config = |bridge: &str| json!({"cniVersion": "0.3.1", "name": bridge, "type": "bridge", "bridge": bridge});
    for object in [
        claim("shared", "shared", "ReadWriteMany"),
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "config"}, "data": {"a": "b"}}),
        json!({"apiVersion": "k8s.cni.cncf.io/v1", "kind": "NetworkAttachmentDefinition",
            "metadata": {"name": "second"}, "spec": {"config": config("br-second").to_string()}}),
        json!({"apiVersion": "k8s.cni.cncf.io/v1", "kind": "NetworkAttachmentDefinition",
            "metadata": {"name": "third"}, "spec": {"config": config("br-third").to_string()}}),
    ] {
        cluster.apply(object).await.expect("apply");
    }
    let mut vmi = linux_vmi("owner", "masquerade");
    let domain = &mut vmi["spec"]["domain"];
    domain["cpu"] = json!({"sockets": 2, "cores": 2, "threads": 2});
    domain["clock"] = json!({"utc": {}, "timer": {
        "hpet": {"present": false}, "pit": {"tickPolicy": "delay"}, "rtc": {"tickPolicy": "catchup"},
    }});
    // QEMU's own guest agent, as a user's guest has it.
    domain["firmware"]["kernelBoot"]["container"]["initrdPath"] = json!("/boot/initrd-agent");
    domain["firmware"]["kernelBoot"]["kernelArgs"] =
        json!("console=ttyS0 quiet godwit.hostname=owner godwit.agent=qemu");
    domain["devices"]["disks"] = json!([
        {"name": "work", "disk": {"bus": "virtio"}, "serial": "WORK-1"},
        {"name": "shared", "disk": {"bus": "virtio"}, "serial": "SHARED-1"},
        {"name": "scratch", "disk": {"bus": "scsi"}, "serial": "SCRATCH-1"},
        {"name": "config", "cdrom": {"bus": "scsi"}},
        // The demo guest's kernel has no driver for it: it is there all the same, and has to be at the target.
        {"name": "seed", "cdrom": {"bus": "sata"}},
    ]);
    domain["devices"]["interfaces"] = json!([
        {"name": "default", "masquerade": {}}, {"name": "second", "bridge": {}}, {"name": "third", "bridge": {}},
    ]);
    vmi["spec"]["networks"] = json!([
        {"name": "default", "pod": {}}, {"name": "second", "multus": {"networkName": "second"}},
        {"name": "third", "multus": {"networkName": "third"}},
    ]);
    vmi["spec"]["volumes"] = json!([
        {"name": "work", "emptyDisk": {"capacity": "8Mi"}},
        {"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}},
        {"name": "scratch", "emptyDisk": {"capacity": "4Mi"}},
        {"name": "config", "configMap": {"name": "config"}},
        {"name": "seed", "cloudInitNoCloud": {"userData": "#cloud-config\n"}},
    ]);
    cluster.apply(vmi).await.expect("apply");
    let vmi = runs(&cluster, "owner").await;
    assert_eq!(condition(&vmi, "LiveMigratable")["status"], "True", "{}", vmi.data);
    let agent = |vmi: &DynamicObject| condition(vmi, "AgentConnected")["status"] == "True";
    cluster.wait(&cluster.vmis(), "owner", "its agent is connected", agent).await;
    let (_, living) = facts_at(&cluster, "node1", "owner", PORTS[0]).await;

    let before = hardware(&cluster, "owner", "/hardware", |_| true).await;
    assert_eq!(before["cpus"], 8, "{before:#}");
    let disks: Vec<(&str, Option<&str>, bool)> = before["disks"]
        .as_array()
        .expect("disks")
        .iter()
        .map(|disk| (disk["name"].as_str().expect("name"), disk["serial"].as_str(), disk["readOnly"] == true))
        .filter(|(name, ..)| !name.starts_with("sr"))
        .collect();
    let wanted = [("sda", Some("SCRATCH-1"), false), ("vda", Some("WORK-1"), false), ("vdb", Some("SHARED-1"), false)];
    assert_eq!(disks, wanted, "{before:#}");
    assert!(before["disks"].to_string().contains("\"sr0\""), "{before:#}");
    assert_eq!(before["cards"].as_array().map(Vec::len), Some(3), "{before:#}");

    // An hour late, it moves; the agent has the right time for it at the other end.
    for (round, paused) in [("running", false), ("paused", true)] {
        let late = hardware(&cluster, "owner", "/lag", |_| true).await;
        assert!(ahead(&late, "wallSeconds") < -NEARLY, "{late:#}");
        if paused {
            let pod = place(&cluster, "owner").await;
            cluster.with_launcher(&pod, async |launcher| launcher.pause().await.expect("pause")).await;
            let by_user = |vmi: &DynamicObject| condition(vmi, "Paused")["reason"] == "PausedByUser";
            cluster.wait(&cluster.vmis(), "owner", "it is paused", by_user).await;
        }
        cluster.migrate("owner", round).await;
        succeeds(&cluster, round).await;
        if paused {
            launcher_says(&cluster, "owner", "it is paused", |state| {
                state.phase == godwit_launcher::rpc::DomainPhase::Paused
            })
            .await;
            let pod = place(&cluster, "owner").await;
            cluster.with_launcher(&pod, async |launcher| launcher.unpause().await.expect("unpause")).await;
        }
        let right = |hardware: &Value| ahead(hardware, "wallSeconds").abs() < NEARLY;
        let after = hardware(&cluster, "owner", "/hardware", right).await;
        assert!(ahead(&after, "rtcSeconds").abs() < NEARLY, "{after:#}");
        assert_eq!(still(&after), still(&before), "{round}");
        launcher_says(&cluster, "owner", "who is in it", |state| {
            state.guest_agent.connected && state.guest_agent.clock_set_us.is_some()
        })
        .await;
        let (_, facts) = facts_at(&cluster, "node1", "owner", PORTS[0]).await;
        assert_eq!((&facts["token"], &facts["corruptPages"]), (&living["token"], &json!(0)), "{round}");
        let vmi = cluster.wait(&cluster.vmis(), "owner", "its agent is connected", agent).await;
        assert_eq!(status(&vmi, "migrationState/mode"), "PreCopy", "{}", vmi.data);
    }
}

/// The file with the EFI variables in a launcher's pod, as its node sees it.
async fn efi_variables(cluster: &Cluster, pod: &str) -> Vec<u8> {
    let pod = cluster.pods().get(pod).await.expect("pod");
    let node = pod.data["spec"]["nodeName"].as_str().expect("a node");
    let folder = cluster.data_dir().join("nodes").join(node).join("pods").join(pod.metadata.uid.expect("uid"));
    let file = folder.join("volumes/kubernetes.io~empty-dir/ephemeral-disks/efi-variables.fd");
    std::fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_takes_its_tpm_and_its_efi_variables_along() {
    let cluster = Cluster::start(2).await;
    build_demo_image(&cluster);
    let mut vmi = linux_vmi("keeper", "masquerade");
    let domain = &mut vmi["spec"]["domain"];
    domain["memory"] = json!({"guest": "256Mi"});
    domain["devices"]["tpm"] = json!({});
    domain["firmware"]["bootloader"] = json!({"efi": {"secureBoot": false}});
    cluster.apply(vmi).await.expect("apply");
    let vmi = runs(&cluster, "keeper").await;
    assert_eq!(condition(&vmi, "LiveMigratable")["status"], "True", "{}", vmi.data);
    let (_, living) = facts_at(&cluster, "node1", "keeper", PORTS[0]).await;
    let before = hardware(&cluster, "keeper", "/hardware", |before| !before["tpmRegister"].is_null()).await;
    assert_eq!(before["efiVariable"], living["token"], "{before:#}");
    let register = before["tpmRegister"].as_str().expect("a TPM");
    assert!(register.len() == 64 && register.contains(|digit| digit != '0'), "it was measured into: {before:#}");

    // Twice: the second time with what has come.
    for round in ["first", "second"] {
        cluster.migrate("keeper", round).await;
        succeeds(&cluster, round).await;
        // A TPM that does not answer within the driver's time is asked again; what it answers has to be the same.
        let after = hardware(&cluster, "keeper", "/hardware", |after| !after["tpmRegister"].is_null()).await;
        assert_eq!(still(&after), still(&before), "{round}");
        let variables = efi_variables(&cluster, &place(&cluster, "keeper").await).await;
        let name: Vec<u8> = "GodwitLife".bytes().flat_map(|byte| [byte, 0]).collect();
        assert!(variables.windows(name.len()).any(|part| part == name), "the file has not got the variable ({round})");
    }
}
