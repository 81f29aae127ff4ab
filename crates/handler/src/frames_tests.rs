//! Which frames follow a guest, and that they arrive in a tap whole.

use super::*;
use godwit_network::{Mac, VethEnd};
use std::process::Command;
use tokio::io::AsyncWriteExt;

const STOPPED: Duration = Duration::from_secs(1000);

fn at(ms: i64) -> SystemTime {
    let since = STOPPED.as_millis() as i64 + ms;
    SystemTime::UNIX_EPOCH + Duration::from_millis(since as u64)
}

fn heard(ms: i64, group: bool) -> (u8, Heard) {
    (0, Heard { at: at(ms), group, bytes: vec![0; 64] })
}

fn times(due: &[(u8, Heard)]) -> Vec<i64> {
    due.iter().map(|(_, f)| f.at.duration_since(at(-1_000)).unwrap().as_millis() as i64 - 1_000).collect()
}

#[test]
fn what_may_be_unread_and_all_that_came_later_follows_the_guest() {
    let kept = [-500, -51, -50, -1, 0, 3, 900].into_iter().map(|ms| heard(ms, false)).collect();
    assert_eq!(times(&due(kept, at(0), at(5))), [-50, -1, 0, 3, 900]);
    // From when the target's taps hear their segments on they hear groups by themselves.
    let kept = [-20, 4, 6].into_iter().map(|ms| heard(ms, true)).chain([heard(7, false)]).collect();
    assert_eq!(times(&due(kept, at(0), at(5))), [-20, 4, 7]);
}

#[test]
fn many_frames_from_before_leave_room_for_those_after() {
    let kept = (0..900).map(|n| heard(-40, n % 2 == 0)).chain((0..100).map(|_| heard(1, false))).collect();
    let due = times(&due(kept, at(0), at(5)));
    assert_eq!((due.len(), due[0], due[UNREAD_FRAMES]), (UNREAD_FRAMES + 100, -40, 1));
}

#[test]
fn what_is_kept_is_bounded_and_the_newest_stays() {
    let mut kept = Kept::default();
    for n in 0..3000 {
        kept.push(0, heard(n, false).1);
    }
    let frames: Vec<_> = kept.take().into();
    assert_eq!((frames.len(), times(&frames)[0], kept.bytes), (KEPT.0, 2000, 0));
    for _ in 0..300 {
        kept.push(0, Heard { bytes: vec![0; LARGEST], ..heard(0, false).1 });
    }
    assert_eq!(kept.take().len(), KEPT.1 / LARGEST);
}

#[test]
fn the_end_is_near_unless_much_is_left_and_goes_slowly() {
    const GIB: u64 = 1 << 30;
    let facts = |left: u64, rate: u64| MigrationFacts {
        status: "active".into(),
        remaining_bytes: left,
        bytes_per_second: rate,
        ..MigrationFacts::new("u", MigrationRole::Source)
    };
    let start = Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    let first = |facts: &MigrationFacts| Distance::default().is_near(Some(facts), start);
    assert!(Distance::default().is_near(None, start));
    assert!(first(&facts(GIB, 0)), "it may be zeros");
    assert!(!first(&facts(8 * GIB, GIB)));
    assert!(first(&facts(8 * GIB, 4 * GIB)));
    assert!(first(&MigrationFacts { status: "device".into(), ..facts(8 * GIB, 0) }));
    assert!(first(&MigrationFacts { paused_by_migration: true, ..facts(8 * GIB, 0) }));
    assert!(first(&MigrationFacts { mode: MigrationMode::PostCopy, ..facts(8 * GIB, 0) }));

    // Little is sent, and yet much becomes less: what is left is zeros.
    let mut distance = Distance::default();
    assert!(!distance.is_near(Some(&facts(8 * GIB, 1 << 20)), at(0)));
    assert!(!distance.is_near(Some(&facts(8 * GIB, 1 << 20)), at(100)));
    assert!(distance.is_near(Some(&facts(7 * GIB, 1 << 20)), at(200)));
    assert!(distance.is_near(Some(&facts(7 * GIB, 1 << 20)), at(210)), "too early to tell anew");
    assert!(!distance.is_near(Some(&facts(7 * GIB, 1 << 20)), at(400)));
}

#[test]
fn the_guest_leaves_when_it_stands_still_for_the_switchover_only() {
    let facts = |status: &str, stop_us| MigrationFacts {
        status: status.into(),
        stop_us,
        ..MigrationFacts::new("u", MigrationRole::Source)
    };
    let us = STOPPED.as_micros() as i64;
    assert_eq!(guest(None), Guest::Here);
    assert_eq!(guest(Some(&facts("active", None))), Guest::Here);
    assert_eq!(guest(Some(&facts("active", Some(us)))), Guest::Here, "held by its migration, with much to send yet");
    for status in ["device", "completed"] {
        assert_eq!(guest(Some(&facts(status, Some(us)))), Guest::Leaving(at(0)), "{status}");
    }
    let left = MigrationFacts { handed_over: true, ..facts("postcopy-active", Some(us)) };
    assert_eq!(guest(Some(&left)), Guest::Leaving(at(0)));
    for status in ["failed", "cancelled"] {
        assert_eq!(guest(Some(&facts(status, Some(us)))), Guest::Stays, "{status}");
        let lost = MigrationFacts { handed_over: true, ..facts(status, Some(us)) };
        assert_eq!(guest(Some(&lost)), Guest::Leaving(at(0)), "its last copy is at the target");
    }
}

/// A namespace with a process in it, both gone when dropped.
struct Scratch {
    name: String,
    child: std::process::Child,
}

impl Scratch {
    fn new(what: &str) -> Self {
        let name = format!("gw-frames-test-{what}-{}", std::process::id());
        let namespace = Namespace::create(&name).unwrap();
        let child = namespace.run(|| Command::new("sleep").arg("600").spawn().unwrap()).unwrap();
        Self { name, child }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = Namespace::delete(&self.name);
    }
}

fn port(number: u8) -> Port {
    Port {
        number,
        pod_interface: "pod1".into(),
        bridge: "k6t-1".into(),
        tap: "tap1".into(),
        mac: Mac([2, 0, 0x5e, 0, 0x53, 1]),
    }
}

/// An Ethernet frame of an experimental type (RFC 7042) with a number in it.
fn frame(to: Mac, number: u8) -> Vec<u8> {
    let mut frame = to.0.to_vec();
    frame.extend([2, 0, 0x5e, 0, 0x53, 9, 0x88, 0xb5, number]);
    frame.resize(60, 0);
    frame
}

/// Hears what comes in at a source, hands it on through a pipe, and reads it at the other end of the target's tap, where QEMU
/// would be: frames for the guest and for groups, not those for others.
#[tokio::test]
async fn frames_go_from_a_pods_interface_into_a_tap_and_nowhere_else() {
    let (source, target) = (Scratch::new("s"), Scratch::new("t"));
    let (ours, theirs) = (Namespace::open(&source.name).unwrap(), Namespace::open(&target.name).unwrap());
    let links = ours.links().unwrap();
    let end = |name| VethEnd { namespace: &ours, name, mac: None };
    links.veth(&end("pod1"), &end("wire1"), Some(1500)).await.unwrap();
    // As in a pod: its interface is a bridge's port, which takes all frames.
    links.bridge("k6t-1", None).await.unwrap();
    links.set_master("pod1", Some("k6t-1")).await.unwrap();
    let links = theirs.links().unwrap();
    links.bridge("k6t-1", None).await.unwrap();
    links.tap("tap1", godwit_network::TapOptions::default()).await.unwrap();
    links.set_up("tap1", true).await.unwrap();
    // The end that QEMU holds.
    let mut qemu = godwit_network::open_tap(&theirs, "tap1", godwit_network::TapOptions::default()).unwrap();
    assert_eq!(links.get("tap1").await.unwrap().unwrap().master, None);
    crate::networks::join(target.child.id(), &[port(0)]).await.unwrap();
    let bridge = links.get("k6t-1").await.unwrap().unwrap();
    assert_eq!(links.get("tap1").await.unwrap().unwrap().master, Some(bridge.index));

    let kept = Shared::default();
    // The kernel serves the last that came first: what this one has heard the others have been offered.
    let (hears, heard) = std::sync::mpsc::channel();
    let _always = Listener::start(&ours, "pod1", port(3).mac, move |f| {
        let _ = hears.send(f.bytes.get(24).copied());
    })
    .await
    .unwrap();
    let listeners = listen(source.child.id(), &[port(3)], &kept).await.unwrap();
    let ears = Ears { listeners, now: Mutex::new((true, None)) };
    let wire = Sender::open(&ours, "wire1").await.unwrap();
    let guest = port(3).mac;
    // While it does not listen nothing is heard.
    ears.hear(false);
    wire.send(&[vec![0; 10], frame(guest, 77)].concat()).unwrap();
    while heard.recv().unwrap() != Some(77) {}
    ears.hear(true);
    let sent = [(guest, 1), (Mac([2, 0, 0x5e, 0, 0x53, 2]), 2), (Mac([0xff; 6]), 3), (guest, 4)];
    for (to, number) in sent {
        let mut bytes = vec![0; 10];
        bytes.extend(frame(to, number));
        wire.send(&bytes).unwrap();
    }
    let wanted = |f: &(u8, Heard)| f.1.bytes.get(22..24) == Some(&[0x88, 0xb5]);
    let mut frames = Vec::new();
    while frames.len() < 3 {
        kept.1.notified().await;
        frames.extend(kept.0.lock().unwrap().take().into_iter().filter(wanted));
    }
    let groups: Vec<bool> = frames.iter().map(|(_, f)| f.group).collect();
    assert_eq!(groups, [false, true, false]);

    let inlets = inlets(target.child.id(), &[port(3)]).await.unwrap();
    let (mut out, mut back) = tokio::io::duplex(1 << 16);
    for (number, frame) in &frames {
        write(&mut out, *number, &frame.bytes).await.unwrap();
    }
    // A port that the target does not have.
    write(&mut out, 9, &frames[0].1.bytes).await.unwrap();
    drop(out);
    take(&mut back, &inlets).await.unwrap();
    let seen = tokio::task::spawn_blocking(move || {
        let mut seen = Vec::new();
        let mut buffer = [0; 2048];
        // The tap is on a bridge, whose own words come too.
        while seen.len() < 3 {
            let length = std::io::Read::read(&mut qemu, &mut buffer).unwrap();
            let frame = &buffer[10..length];
            if frame[12..14] == [0x88, 0xb5] {
                seen.push((frame[0] == 0xff, frame[14]));
            }
        }
        seen
    });
    assert_eq!(seen.await.unwrap(), [(false, 1), (true, 3), (false, 4)]);
}

#[tokio::test]
async fn a_frame_that_is_none_ends_the_connection() {
    let (mut out, mut back) = tokio::io::duplex(1 << 10);
    out.write_u8(0).await.unwrap();
    out.write_u32(u32::MAX).await.unwrap();
    assert!(take(&mut back, &Inlets::new()).await.is_err());
    let (mut out, mut back) = tokio::io::duplex(1 << 10);
    out.write_u8(0).await.unwrap();
    out.write_u32(60).await.unwrap();
    drop(out);
    assert!(take(&mut back, &Inlets::new()).await.is_err(), "cut off in the middle");
}
