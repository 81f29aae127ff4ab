//! Real namespaces: two nodes on a fabric, one segment over both, a guest behind address translation.
//! Needs root, like everything that uses this crate.

#![allow(clippy::unwrap_used)] // a test fails by it

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::Duration;

use godwit_network::capture::Capture;
use godwit_network::dhcp::{Lease, Server};
use godwit_network::nat::{Masquerade, Protocol};
use godwit_network::pinger::Pinger;
use godwit_network::{Links, Mac, Namespace, Route, TapOptions, VethEnd, VxlanOptions};

/// Namespaces of one test; all deleted on drop.
struct Scratch(String);

impl Scratch {
    fn new(test: &str) -> Self {
        Self(format!("gwt{}-{test}-", std::process::id()))
    }

    fn namespace(&self, name: &str) -> (Namespace, Links) {
        let namespace = Namespace::create(&format!("{}{name}", self.0)).unwrap();
        let links = namespace.links().unwrap();
        (namespace, links)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = Namespace::delete_prefix(&self.0);
    }
}

fn ip(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

/// A namespace with `eth0` at `address`/24 on bridge `br` of the namespace of `fabric`.
async fn attach(scratch: &Scratch, fabric: &Links, bridge: &str, name: &str, address: &str) -> (Namespace, Links) {
    let (namespace, links) = scratch.namespace(name);
    let port = format!("p-{name}");
    let ends = (
        VethEnd { namespace: &namespace, name: "eth0", mac: None },
        VethEnd { namespace: fabric.namespace(), name: &port, mac: None },
    );
    links.veth(&ends.0, &ends.1, Some(1500)).await.unwrap();
    fabric.set_master(&port, Some(bridge)).await.unwrap();
    if !address.is_empty() {
        links.add_address("eth0", IpAddr::V4(ip(address)), 24).await.unwrap();
    }
    (namespace, links)
}

async fn pings(from: &Namespace, to: &str, count: u32) -> godwit_network::pinger::Report {
    let pinger = Pinger::start(from, ip(to), Duration::from_millis(10)).unwrap();
    tokio::time::sleep(Duration::from_millis(10) * count).await;
    tokio::task::spawn_blocking(move || pinger.stop()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn links_are_made_changed_and_deleted() {
    let scratch = Scratch::new("links");
    let (_a, links) = scratch.namespace("a");
    links.bridge("br0", Some("02:00:00:00:00:01".parse().unwrap())).await.unwrap();
    assert!(links.bridge("br0", None).await.unwrap_err().is_exists());
    links.ensure_bridge("br0").await.unwrap();
    links.tap("tap0", TapOptions { owner: Some(107), ..TapOptions::default() }).await.unwrap();
    assert!(links.ensure_bridge("tap0").await.is_err());
    links.set_master("tap0", Some("br0")).await.unwrap();
    links.set_mtu("tap0", 1400).await.unwrap();
    links.set_mac("tap0", Mac([2, 0, 0, 0, 0, 9])).await.unwrap();
    links.set_txqueuelen("tap0", 200).await.unwrap();
    links.set_up("tap0", true).await.unwrap();
    let bridge = links.get("br0").await.unwrap().unwrap();
    assert_eq!((bridge.kind.as_deref(), bridge.mac), (Some("bridge"), Some(Mac([2, 0, 0, 0, 0, 1]))));
    let tap = links.get("tap0").await.unwrap().unwrap();
    assert_eq!((tap.mtu, tap.up, tap.master, tap.mac), (1400, true, Some(bridge.index), Some(Mac([2, 0, 0, 0, 0, 9]))));
    links.add_address("br0", ip("10.0.2.1").into(), 24).await.unwrap();
    links.add_address("br0", ip("10.0.2.1").into(), 24).await.unwrap();
    assert_eq!(links.addresses("br0").await.unwrap(), [(IpAddr::V4(ip("10.0.2.1")), 24)]);
    let route = Route { destination: (ip("10.9.0.0"), 16), gateway: Some(ip("10.0.2.7")), link: None };
    links.set_route(&route).await.unwrap();
    links.set_route(&route).await.unwrap();
    links.delete_route(&route).await.unwrap();
    links.delete_route(&route).await.unwrap();
    links.set_forwarding("tap0", Mac([2, 0, 0, 0, 0, 5]), None).await.unwrap();
    links.set_neighbour("br0", ip("10.0.2.2").into(), Mac([2, 0, 0, 0, 0, 5])).await.unwrap();
    links.delete_address("br0", ip("10.0.2.1").into()).await.unwrap();
    assert_eq!(links.addresses("br0").await.unwrap(), []);
    let (b, other) = scratch.namespace("b");
    links.rename("tap0", "tap1").await.unwrap();
    links.move_to("tap1", &b).await.unwrap();
    assert!(other.get("tap1").await.unwrap().is_some());
    assert_eq!(other.delete_prefix("tap").await.unwrap(), 1);
    links.delete("br0").await.unwrap();
    links.delete("br0").await.unwrap();
    assert!(links.set_up("br0", true).await.unwrap_err().is_missing());
    assert!(links.bridge("name-of-17-bytes-", None).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_capture_gives_what_comes_in_and_leaves_out_what_goes_out() {
    const ARP: u16 = 0x0806;
    let scratch = Scratch::new("cap");
    let (_fabric, fabric) = scratch.namespace("f");
    fabric.bridge("br", None).await.unwrap();
    let (asks, links) = attach(&scratch, &fabric, "br", "a", "192.168.9.1").await;
    let (answers, _) = attach(&scratch, &fabric, "br", "b", "192.168.9.2").await;
    let asker = links.get("eth0").await.unwrap().unwrap().mac.unwrap();
    let (tell, seen) = std::sync::mpsc::channel();
    let before = std::time::SystemTime::now();
    let capture = Capture::start(&answers, ARP, move |frame| drop(tell.send(frame))).unwrap();
    assert!(pings(&asks, "192.168.9.2", 10).await.received > 0);
    drop(capture);
    let seen: Vec<_> = seen.iter().collect();
    assert!(!seen.is_empty(), "nothing can be pinged before it was asked for its address");
    for frame in seen {
        assert_eq!((frame.link.as_str(), &frame.frame[6..12]), ("eth0", &asker.0[..]), "its own answers go out");
        assert!(frame.at >= before && frame.frame[12..14] == ARP.to_be_bytes());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_segment_spans_nodes() {
    let scratch = Scratch::new("vx");
    let (_fabric, fabric) = scratch.namespace("fabric");
    fabric.bridge("fabric", None).await.unwrap();
    let mut guests = Vec::new();
    for number in 1..=2 {
        let name = format!("n{number}");
        let (_node, links) = attach(&scratch, &fabric, "fabric", &name, &format!("10.88.0.1{number}")).await;
        links.bridge("br", None).await.unwrap();
        let options = VxlanOptions { vni: 77, device: "eth0", group: Some(ip("239.88.1.2")), local: None, port: 4789 };
        links.vxlan("vx-br", &options, Some(1450)).await.unwrap();
        links.set_master("vx-br", Some("br")).await.unwrap();
        guests.push(attach(&scratch, &links, "br", &format!("g{number}"), &format!("192.168.9.{number}")).await);
    }
    let report = pings(&guests[0].0, "192.168.9.2", 30).await;
    assert!(report.received > 20, "{report:?}");
    assert_eq!((report.lost, report.duplicates), (0, 0), "{report:?}");
    let nobody = pings(&guests[0].0, "192.168.9.77", 3).await;
    assert_eq!(nobody.received, 0);
    assert_eq!(nobody.lost, nobody.sent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_masqueraded_guest_is_reached_at_the_pods_address() {
    let scratch = Scratch::new("nat");
    let (_fabric, fabric) = scratch.namespace("f");
    fabric.bridge("cni0", None).await.unwrap();
    let (client, _) = attach(&scratch, &fabric, "cni0", "c", "10.244.1.9").await;
    let (pod, pod_links) = attach(&scratch, &fabric, "cni0", "p", "10.244.1.5").await;
    pod_links.bridge("k6t-eth0", None).await.unwrap();
    pod_links.add_address("k6t-eth0", ip("10.0.2.1").into(), 24).await.unwrap();
    let (guest, guest_links) = attach(&scratch, &pod_links, "k6t-eth0", "g", "").await;
    let mut nat = Masquerade::new("eth0", "k6t-eth0");
    nat.apply(&pod).unwrap();
    nat.apply(&pod).unwrap();

    // The guest learns its address from our server, with an ordinary client.
    let mac = guest_links.get("eth0").await.unwrap().unwrap().mac.unwrap();
    let lease = Lease {
        mac,
        address: ip("10.0.2.2"),
        prefix: 24,
        server: ip("10.0.2.1"),
        router: Some(ip("10.0.2.1")),
        dns: vec![ip("10.96.0.10")],
        search: vec!["svc.cluster.local".into()],
        hostname: Some("guest".into()),
        mtu: Some(1450),
    };
    let server = Server::start(&pod, "k6t-eth0", lease).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("told");
    std::fs::write(&script, "#!/bin/sh\nenv\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let output = guest
        .run(|| {
            Command::new("/bin/busybox")
                .args(["udhcpc", "-i", "eth0", "-n", "-q", "-f", "-t", "10", "-T", "1", "-s"])
                .arg(&script)
                .stdin(Stdio::null())
                .output()
        })
        .unwrap()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text} {}", String::from_utf8_lossy(&output.stderr));
    for line in ["ip=10.0.2.2", "router=10.0.2.1", "hostname=guest", "mtu=1450", "dns=10.96.0.10"] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
    drop(server);
    guest_links.add_address("eth0", ip("10.0.2.2").into(), 24).await.unwrap();
    let default = Route { destination: (Ipv4Addr::UNSPECIFIED, 0), gateway: Some(ip("10.0.2.1")), link: None };
    guest_links.set_route(&default).await.unwrap();

    // In: pings and connections to the pod's address reach the guest. Out: the guest appears with the pod's address.
    let report = pings(&client, "10.244.1.5", 10).await;
    assert_eq!(report.lost, 0, "{report:?}");
    let speak = |to: &str, from: &Namespace, port: u16| {
        from.connect(SocketAddr::new(IpAddr::V4(ip(to)), port), Duration::from_secs(2))
    };
    let serve = |listener: std::net::TcpListener| {
        std::thread::spawn(move || {
            let (mut stream, peer) = listener.accept().unwrap();
            stream.write_all(peer.ip().to_string().as_bytes()).unwrap();
        })
    };
    let heard = |mut stream: std::net::TcpStream| {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let server = serve(guest.listen("0.0.0.0:8080".parse().unwrap()).unwrap());
    assert_eq!(heard(speak("10.244.1.5", &client, 8080).unwrap()), "10.244.1.9");
    server.join().unwrap();
    let server = serve(client.listen("0.0.0.0:8081".parse().unwrap()).unwrap());
    assert_eq!(heard(speak("10.244.1.9", &guest, 8081).unwrap()), "10.244.1.5");
    server.join().unwrap();
    let server = serve(guest.listen("0.0.0.0:8082".parse().unwrap()).unwrap());
    assert_eq!(heard(speak("127.0.0.1", &pod, 8082).unwrap()), "10.0.2.1");
    server.join().unwrap();

    // With declared ports the rest stays the pod's own.
    nat.ports = BTreeSet::from([(Protocol::Tcp, 80)]);
    nat.apply(&pod).unwrap();
    let _listener = guest.listen("0.0.0.0:8080".parse().unwrap()).unwrap();
    assert!(speak("10.244.1.5", &client, 8080).is_err());
    nat.interface = "eth0\" jump";
    assert!(nat.apply(&pod).is_err());
}
