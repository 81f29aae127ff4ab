//! A guest with QEMU's guest agent, and one without any: what they tell, and how they reboot.

use super::{PATIENCE, PORTS, ask, build_demo_image, condition, facts_at, linux_vmi, runs};
use crate::common::{Cluster, status};
use godwit_network::Namespace;
use kube::api::DynamicObject;
use serde_json::{Value, json};
use std::net::IpAddr;
use std::time::Instant;

const VMIS: &str = "virtualmachineinstances";

fn guest(name: &str, agent: &str) -> Value {
    let mut vmi = linux_vmi(name, "masquerade");
    let domain = &mut vmi["spec"]["domain"];
    domain["firmware"]["kernelBoot"]["container"]["initrdPath"] = json!("/boot/initrd-agent");
    domain["firmware"]["kernelBoot"]["kernelArgs"] =
        json!(format!("console=ttyS0 quiet godwit.hostname={name} godwit.agent={agent} godwit.mount=sr0"));
    domain["devices"]["disks"] = json!([{"name": "config", "cdrom": {"bus": "scsi"}}]);
    vmi["spec"]["volumes"] = json!([{"name": "config", "cloudInitNoCloud": {"userData": "#cloud-config\n"}}]);
    vmi
}

fn has_agent(vmi: &DynamicObject) -> bool {
    condition(vmi, "AgentConnected")["status"] == "True"
}

async fn tells(cluster: &Cluster, what: &str) -> Value {
    // The launcher gives the agent a few seconds for an answer, and a slow machine may need more.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (code, told) = cluster.get_action((VMIS, "teller", what)).await;
        if code == 200 {
            return told;
        }
        assert!(Instant::now() < deadline, "{what}: {code} {told}\n{}", cluster.words());
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

/// Asks for a soft reboot, and waits until the guest has booted again where it was.
async fn reboots(cluster: &Cluster, name: &str) {
    let (_, before) = facts_at(cluster, "node1", name, PORTS[0]).await;
    let vmi = cluster.vmis().get(name).await.expect("VMI");
    let pods = cluster.launchers(name).await;
    let asked = cluster.put_action(None, (VMIS, name, "softreboot"), &Value::Null).await;
    assert_eq!(asked, (200, String::new()), "{name}\n{}", cluster.words());
    let address: IpAddr = status(&vmi, "interfaces/0/ipAddress").parse().expect("an address");
    let namespace = Namespace::open(&cluster.namespace("node1")).expect("the node's namespace");
    let deadline = Instant::now() + PATIENCE;
    let mut last = Err(String::new());
    // Of each boot it makes a new token.
    while last.as_ref().map_or(true, |facts: &Value| facts["token"] == before["token"]) {
        assert!(Instant::now() < deadline, "{name} has not booted again: {last:?}\n{}", cluster.words());
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        let namespace = namespace.clone();
        let asked = tokio::task::spawn_blocking(move || ask(&namespace, address, PORTS[0], "/"));
        last = asked.await.expect("ask");
    }
    let now = cluster.vmis().get(name).await.expect("VMI");
    assert_eq!((&now.metadata.uid, status(&now, "phase").as_str()), (&vmi.metadata.uid, "Running"));
    assert_eq!(cluster.launchers(name).await, pods);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_tells_of_itself_by_its_agent_and_reboots_with_and_without_one() {
    let cluster = Cluster::start(1).await;
    build_demo_image(&cluster);
    for (name, agent) in [("teller", "qemu"), ("silent", "none")] {
        cluster.apply(guest(name, agent)).await.expect("apply");
    }
    for name in ["teller", "silent"] {
        runs(&cluster, name).await;
    }
    let known = |vmi: &DynamicObject| has_agent(vmi) && !status(vmi, "guestOSInfo/kernelRelease").is_empty();
    let vmi = cluster.wait(&cluster.vmis(), "teller", "its agent is connected", known).await;
    assert_eq!(status(&vmi, "guestOSInfo/prettyName"), "Godwit demo guest with an agent", "{}", vmi.data);

    let told = tells(&cluster, "guestosinfo").await;
    assert!(told["guestAgentVersion"].as_str().is_some_and(|version| version.contains('.')), "{told:#}");
    assert_eq!(told["hostname"], "teller", "{told:#}");
    assert_eq!(told["os"]["kernelRelease"], status(&vmi, "guestOSInfo/kernelRelease"), "{told:#}");
    assert!(told["supportedCommands"].to_string().contains("\"guest-shutdown\""), "{told:#}");
    let pilot = json!([{"userName": "pilot", "loginTime": 1_610_612_736}]);
    assert_eq!(told["userList"], pilot, "{told:#}");
    assert_eq!(tells(&cluster, "userlist").await["items"], pilot);
    let deadline = Instant::now() + PATIENCE;
    let disk = loop {
        let list = tells(&cluster, "filesystemlist").await;
        if let Some(disk) = list["items"].as_array().and_then(|all| all.first()) {
            break disk.clone();
        }
        assert!(Instant::now() < deadline, "it has not mounted its CD: {list}\n{}", cluster.words());
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    };
    let of = |field: &str| disk[field].as_str().unwrap_or_default().to_owned();
    assert_eq!([of("diskName"), of("mountPoint"), of("fileSystemType")], ["sr0", "/mnt", "iso9660"], "{disk:#}");
    assert!(disk["totalBytes"].as_u64().is_some_and(|bytes| bytes > 0), "{disk:#}");

    // Its agent reboots it.
    reboots(&cluster, "teller").await;
    // The condition may still be the one from before.
    assert_eq!(tells(&cluster, "guestosinfo").await["hostname"], "teller");
    // This one has nothing but its power button.
    let silent = cluster.vmis().get("silent").await.expect("VMI");
    assert!(!has_agent(&silent), "{}", silent.data);
    let (code, told) = cluster.get_action((VMIS, "silent", "guestosinfo")).await;
    assert!(code == 409 && told["message"].to_string().contains("does not have guest agent connected"), "{told}");
    reboots(&cluster, "silent").await;
}
