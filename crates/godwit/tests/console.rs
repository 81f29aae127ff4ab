//! What only the guest's node can do, asked of the API server: the serial console, which stays with its guest, pause, reset.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::streams::{self, Console, Screen};
use common::{Cluster, kill_hard, status};
use godwit_guest_rom::Parameters;
use kube::api::DynamicObject;
use serde_json::Value;
use std::time::{Duration, Instant};

const VMIS: &str = "virtualmachineinstances";

async fn ask(cluster: &Cluster, action: &str) -> (u16, String) {
    cluster.put_action(None, (VMIS, "talker", action), &Value::Null).await
}

fn is(condition: &'static str) -> impl Fn(&DynamicObject) -> bool {
    move |vmi| {
        let all = vmi.data["status"]["conditions"].as_array();
        all.is_some_and(|all| all.iter().any(|one| one["type"] == condition && one["status"] == "True"))
    }
}

async fn migrates(cluster: &Cluster, name: &str) {
    cluster.migrate("talker", name).await;
    let over = |migration: &DynamicObject| ["Succeeded", "Failed"].contains(&status(migration, "phase").as_str());
    let migration = cluster.wait(&cluster.migrations(), name, "it is over", over).await;
    assert_eq!(status(&migration, "phase"), "Succeeded", "{}\n{}", migration.data, cluster.words());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_console_follows_its_guest_through_two_migrations() {
    let mut cluster = Cluster::start(2).await;
    // Five beats a second. QEMU's socket holds not even three hundred bytes of a serial port, and this guest does not wait long for a
    // port that is busy: one that says more is too much for a launcher that gets no processor for a while.
    cluster.build_rom_image(Parameters { beat_ticks: 20, ..Parameters::default() });
    cluster.start_rom_guest("talker").await;
    cluster.wait(&cluster.vmis(), "talker", "it can be moved", is("LiveMigratable")).await;

    let console = Console::open(&cluster, "talker").await;
    console.hears(10, &cluster).await;
    for name in ["away", "home"] {
        let mut screen = Screen::open(&cluster, "talker").await;
        let pixels = usize::from(screen.size.0) * usize::from(screen.size.1);
        assert!(pixels >= 640 * 400, "{:?}", screen.size);
        assert_eq!(screen.picture().await, pixels);
        migrates(&cluster, name).await;
        let node = status(&cluster.vmis().get("talker").await.expect("VMI"), "nodeName");
        // What QEMU shows is the source's.
        assert_eq!(screen.closes().await, format!("the guest has moved to {node}: connect again"));
        console.hears(10, &cluster).await;
    }
    // One looks at a time.
    let first = Screen::open(&cluster, "talker").await;
    assert_eq!(streams::open(&cluster, "talker", "vnc?preserveSession=true").await.err(), Some(409));
    let mut second = Screen::open(&cluster, "talker").await;
    assert!(first.closes().await.contains("somebody else has opened"));
    assert!(second.picture().await > 0);

    // Its node's handler is killed while a migration is under way, whatever becomes of that.
    cluster.migrate("talker", "shot").await;
    let begun =
        |migration: &DynamicObject| !["", "Pending", "Scheduling"].contains(&status(migration, "phase").as_str());
    cluster.wait(&cluster.migrations(), "shot", "it has begun", begun).await;
    kill_hard(cluster.pid(&status(&cluster.vmis().get("talker").await.expect("VMI"), "nodeName")));
    cluster.up_again(2).await;
    let over = |migration: &DynamicObject| ["Succeeded", "Failed"].contains(&status(migration, "phase").as_str());
    cluster.wait(&cluster.migrations(), "shot", "it is over", over).await;
    console.hears(10, &cluster).await;
    console.is_complete();

    // A newer console takes the older one's place. Who opened which is told.
    let newer = Console::open(&cluster, "talker").await;
    console.closes(&cluster).await;
    newer.hears(10, &cluster).await;
    let log = cluster.log_of_streams();
    let opened: Vec<&str> = log.lines().filter(|line| line.contains("a stream is opened")).collect();
    assert_eq!(opened.len(), 6, "two consoles, four screens: {opened:#?}");
    let from = match cluster.real {
        Some(_) => godwit_standalone::CONTROL_PLANE_ADDRESS.to_string(),
        None => "127.0.0.1:".to_owned(),
    };
    for word in ["kubernetes-admin", &from, "default/talker", "console"] {
        assert!(opened[0].contains(word), "{word}: {opened:#?}");
    }

    // A paused guest says nothing, and goes on where it was.
    assert_eq!(ask(&cluster, "unpause").await.0, 409);
    assert_eq!(ask(&cluster, "pause").await, (200, String::new()));
    cluster.wait(&cluster.vmis(), "talker", "it is paused", is("Paused")).await;
    let said = "Operation cannot be fulfilled on virtualmachineinstance.kubevirt.io \"talker\": VMI is already paused";
    assert_eq!(ask(&cluster, "pause").await, (409, said.to_owned()));
    assert_eq!(ask(&cluster, "unpause").await, (200, String::new()));
    cluster.wait(&cluster.vmis(), "talker", "it runs on", |vmi| !is("Paused")(vmi)).await;
    newer.hears(10, &cluster).await;
    newer.is_complete();

    // Reset, it starts over.
    assert_eq!(ask(&cluster, "reset").await, (200, String::new()));
    let deadline = Instant::now() + Duration::from_secs(120);
    while !newer.heard().contains("start ") {
        assert!(Instant::now() < deadline, "it does not start over\n{}", cluster.words());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // There is no agent in it.
    for (action, wanted) in [("guestosinfo", 409), ("console", 400)] {
        assert_eq!(cluster.get_action((VMIS, "talker", action)).await.0, wanted, "{action}");
    }

    cluster.vmis().delete("talker", &Default::default()).await.expect("delete");
    assert_eq!(newer.closes(&cluster).await, None, "as KubeVirt closes it");
}
