//! Against a real QEMU, with the ROM guest.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod place;

use godwit_guest_rom::{Parameters, Story};
use godwit_qemu::accelerator::{self, Accelerator};
use godwit_qemu::blocks::Blocks;
use godwit_qemu::instance::{Error, Incoming, Prelaunch, Settled};
use godwit_qemu::machine::{Bus, Cache, Disk, DiskKind, Machine};
use godwit_qemu::migration::Options;
use godwit_qemu::qmp::commands::{MigrationStatus, RunState};
use place::*;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

/// QEMU 7.2's translator loses writes between two passes (`migration::tracks_writes`): the cap would make it many passes.
#[tokio::test]
async fn a_guest_that_writes_all_the_time_loses_no_page() {
    let place = Place::new(writer());
    let (source, mut here) = place.source().await;
    let mut story = Story::default();
    // Once through its memory, so that all of it is there to lose.
    here.hear(&mut story, 20).await;
    let (target, mut there) = place.target().await;
    let options = Options { bandwidth: Some(8 << 20), ..Options::default() };
    let outgoing = source.migrate(&place.path("flight"), &options, None).await.map_err(|e| e.1).unwrap();
    let departed = leave(outgoing).await;
    let _running = run(target).await;
    departed.qemu().quit().await;
    here.drain(&mut story).await;
    // Twice through its memory: every page is verified when it is written to again.
    there.hear(&mut story, 40).await;
}

#[tokio::test]
async fn a_guest_flies_and_never_runs_twice() {
    let place = Place::new(busy());
    let (source, mut here) = place.source().await;
    let mut story = Story::default();
    here.hear(&mut story, 3).await;
    let (mut target, mut there) = place.target().await;
    assert!(!target.is_loaded().await.unwrap());
    assert_eq!(source.qemu().machine_type(), target.qemu().machine_type());

    let outgoing = source.migrate(&place.path("flight"), &Options::default(), None).await.map_err(|e| e.1).unwrap();
    let departed = leave(outgoing).await;
    assert_eq!(departed.facts().status, MigrationStatus::Completed);
    assert!(departed.facts().stop_us.unwrap() > departed.facts().start_us.unwrap());
    assert!(departed.facts().sent_bytes > 0 && departed.facts().total_bytes >= 16 << 20);
    // Between the source's last word and the go nobody runs it.
    assert_eq!(departed.qemu().status().await.unwrap(), RunState::Postmigrate);
    assert_eq!(target.qemu().status().await.unwrap(), RunState::Paused);

    let mut events = target.qemu().subscribe();
    let running = run(target).await;
    let ended = departed.qemu().quit().await;
    assert!(ended.is_clean(), "{ended}");
    here.drain(&mut story).await;
    there.hear(&mut story, 5).await;
    let resumed = loop {
        let event = events.next().await.expect("QEMU has ended");
        if event.name == "RESUME" {
            break event.at_us;
        }
    };
    assert!(resumed > departed.facts().stop_us.unwrap());
    assert_eq!(running.qemu().status().await.unwrap(), RunState::Running);
    running.qemu().quit().await;
}

#[tokio::test]
async fn the_guest_flies_on_and_on() {
    let place = Place::new(busy());
    let (mut running, mut here) = place.source().await;
    let mut story = Story::default();
    here.hear(&mut story, 1).await;
    for round in 0..3 {
        let name = format!("flight{round}");
        let machine = place.machine(&format!("round{round}"));
        let incoming = Incoming::launch(&qemu(), &machine, &place.path(&name)).await.unwrap();
        let mut there = Console::open(&place.path(&format!("round{round}-serial"))).await;
        let outgoing = running.migrate(&place.path(&name), &Options::default(), None).await.map_err(|e| e.1).unwrap();
        let departed = leave(outgoing).await;
        running = run(incoming).await;
        departed.qemu().quit().await;
        here.drain(&mut story).await;
        there.hear(&mut story, 2).await;
        here = there;
    }
    running.qemu().quit().await;
}

#[tokio::test]
async fn a_target_killed_in_flight_leaves_the_guest_running_at_the_source() {
    let place = Place::new(busy());
    let (source, mut here) = place.source().await;
    let mut story = Story::default();
    here.hear(&mut story, 2).await;
    let (target, _there) = place.target().await;
    // Slow enough that it cannot be over before the kill.
    let options = Options { bandwidth: Some(100_000), ..Options::default() };
    let mut outgoing = source.migrate(&place.path("flight"), &options, None).await.map_err(|e| e.1).unwrap();
    active(&mut outgoing).await;
    target.qemu().process().kill().await;
    follow(&mut outgoing).await;
    assert_eq!(outgoing.facts().status, MigrationStatus::Failed);
    let Settled::Stays(source, _) = outgoing.settle().await else { panic!("it should have stayed") };
    here.hear(&mut story, 5).await;

    // And it can fly again, with a new target.
    let machine = place.machine("second");
    let second = Incoming::launch(&qemu(), &machine, &place.path("flight2")).await.unwrap();
    let mut there = Console::open(&place.path("second-serial")).await;
    let outgoing = source.migrate(&place.path("flight2"), &Options::default(), None).await.map_err(|e| e.1).unwrap();
    let departed = leave(outgoing).await;
    let running = run(second).await;
    departed.qemu().quit().await;
    here.drain(&mut story).await;
    there.hear(&mut story, 3).await;
    running.qemu().quit().await;
}

#[tokio::test]
async fn a_cancelled_flight_leaves_the_guest_running_at_the_source() {
    let place = Place::new(busy());
    let (source, mut here) = place.source().await;
    let mut story = Story::default();
    here.hear(&mut story, 2).await;
    let (target, _there) = place.target().await;
    let options = Options { bandwidth: Some(100_000), ..Options::default() };
    let mut outgoing = source.migrate(&place.path("flight"), &options, None).await.map_err(|e| e.1).unwrap();
    active(&mut outgoing).await;
    outgoing.cancel().await.unwrap();
    follow(&mut outgoing).await;
    assert_eq!(outgoing.facts().status, MigrationStatus::Cancelled);
    let Settled::Stays(source, _) = outgoing.settle().await else { panic!("it should have stayed") };
    // The target refuses to run what it does not have.
    let refused = target.go(false).await.unwrap_err();
    assert!(!refused.may_run);
    refused.incoming.qemu().process().kill().await;
    here.hear(&mut story, 5).await;
    source.qemu().quit().await;
}

#[tokio::test]
async fn a_target_that_cannot_load_the_guest_leaves_it_running_at_the_source() {
    let place = Place::new(busy());
    let (source, mut here) = place.source().await;
    let mut story = Story::default();
    here.hear(&mut story, 2).await;
    let mut machine = place.machine("target");
    machine.rng = true; // a device that the source does not have is not in the stream
    machine.memory_mib = 32;
    let mut target = Incoming::launch(&qemu(), &machine, &place.path("flight")).await.unwrap();
    let mut outgoing = source.migrate(&place.path("flight"), &Options::default(), None).await.map_err(|e| e.1).unwrap();
    follow(&mut outgoing).await;
    assert_eq!(outgoing.facts().status, MigrationStatus::Failed);
    let Settled::Stays(source, _) = outgoing.settle().await else { panic!("it should have stayed") };
    here.hear(&mut story, 5).await;
    let version = target.qemu().version();
    if (version.major, version.minor) < (9, 1) {
        let ended = tokio::time::timeout(PATIENCE, target.qemu().process().wait()).await;
        assert!(!ended.unwrap().is_clean());
    } else {
        // It stays, to be asked why.
        target.look().await.unwrap();
        assert_eq!(target.facts().status, MigrationStatus::Failed);
        assert!(target.facts().error.as_deref().is_some_and(|why| !why.is_empty()));
        target.qemu().quit().await;
    }
    source.qemu().quit().await;
}

#[tokio::test]
async fn a_migration_to_nowhere_is_an_error_and_the_guest_runs_on() {
    let place = Place::new(busy());
    let (source, mut here) = place.source().await;
    let mut story = Story::default();
    match source.migrate(&place.path("nobody"), &Options::default(), None).await {
        // This QEMU refuses at once; another may begin and fail.
        Err((source, error)) => {
            assert!(matches!(error, Error::Qmp(_)), "{error}");
            here.hear(&mut story, 3).await;
            source.qemu().quit().await;
        }
        Ok(mut outgoing) => {
            follow(&mut outgoing).await;
            let Settled::Stays(source, _) = outgoing.settle().await else { panic!("it should have stayed") };
            here.hear(&mut story, 3).await;
            source.qemu().quit().await;
        }
    }
}

#[tokio::test]
async fn a_machine_that_cannot_be_built_tells_qemus_reason() {
    let place = Place::new(busy());
    let mut machine = place.machine("source");
    machine.machine_type = "abacus".into();
    let error = Prelaunch::launch(&qemu(), &machine).await.unwrap_err();
    assert!(error.to_string().contains("abacus") || error.to_string().contains("machine"), "{error}");
    let error = Prelaunch::launch(Path::new("/nonexistent/qemu"), &machine).await.unwrap_err();
    assert!(error.to_string().contains("make deps"), "{error}");
}

#[tokio::test]
async fn the_power_button_ends_the_guest_in_order() {
    let place = Place::new(busy());
    for machine_type in ["q35", "pc"] {
        let mut machine = place.machine(machine_type);
        machine.machine_type = machine_type.into();
        let prelaunch = Prelaunch::launch(&qemu(), &machine).await.unwrap();
        let mut console = Console::open(&place.path(&format!("{machine_type}-serial"))).await;
        let running = prelaunch.start().await.unwrap();
        console.hear(&mut Story::default(), 1).await;
        running.qemu().power_button().await.unwrap();
        let ended = tokio::time::timeout(PATIENCE, running.qemu().process().wait()).await.unwrap();
        assert!(ended.is_clean(), "{machine_type}: {ended}");
    }
}

#[tokio::test]
async fn the_probe_gives_an_answer_that_holds() {
    let probe = accelerator::probe(&qemu()).await;
    eprintln!("{}: {}", probe.accelerator, probe.reason);
    assert!(!probe.reason.is_empty());
    let place = Place::new(busy());
    let mut machine = place.machine("probed");
    machine.accelerator = probe.accelerator;
    let prelaunch = Prelaunch::launch(&qemu(), &machine).await.unwrap();
    let mut console = Console::open(&place.path("probed-serial")).await;
    let running = prelaunch.start().await.unwrap();
    console.hear(&mut Story::default(), 2).await;
    running.qemu().quit().await;
}

#[tokio::test]
async fn kvm_flies_where_it_opens() {
    if std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("not tested: /dev/kvm does not open on this machine");
        return;
    }
    let place = Place::new(Parameters { pages_per_tick: 4, ..busy() });
    let kvm = |end: &str| {
        let mut machine = Machine { accelerator: Accelerator::Kvm, ..place.machine(end) };
        // An emulating KVM lacks what `host` asks for.
        machine.cpu.model = Some("qemu64".into());
        machine
    };
    let prelaunch = Prelaunch::launch(&qemu(), &kvm("source")).await.unwrap();
    let mut here = Console::open(&place.path("source-serial")).await;
    let source = prelaunch.start().await.unwrap();
    let mut story = Story::default();
    here.hear(&mut story, 2).await;
    let target = Incoming::launch(&qemu(), &kvm("target"), &place.path("flight")).await.unwrap();
    let mut there = Console::open(&place.path("target-serial")).await;
    let outgoing = source.migrate(&place.path("flight"), &Options::default(), None).await.map_err(|e| e.1).unwrap();
    let departed = leave(outgoing).await;
    let running = run(target).await;
    departed.qemu().quit().await;
    here.drain(&mut story).await;
    there.hear(&mut story, 3).await;
    running.qemu().quit().await;
}

/// A machine with a disk of its own of 16 MiB, made by `fill`.
fn with_disk(place: &Place, end: &str, fill: impl FnOnce(&mut [u8])) -> Machine {
    let path = place.path(&format!("{end}-disk"));
    let mut content = vec![0u8; 16 << 20];
    fill(&mut content);
    std::fs::write(&path, content).unwrap();
    let mut machine = place.machine(end);
    machine.disks.push(Disk::new("work", path, Bus::Virtio));
    machine
}

fn pattern(content: &mut [u8]) {
    content.iter_mut().enumerate().for_each(|(n, b)| *b = (n / 4096) as u8 ^ n as u8);
}

fn blocks(place: &Place, end: &str) -> Blocks {
    Blocks { socket: place.path(&format!("{end}-blocks")), disks: vec![(0, "work".into())], ..Blocks::default() }
}

#[tokio::test]
async fn a_disk_that_is_not_shared_flies_along() {
    let place = Place::new(busy());
    let prelaunch = Prelaunch::launch(&qemu(), &with_disk(&place, "source", pattern)).await.unwrap();
    let mut here = Console::open(&place.path("source-serial")).await;
    let source = prelaunch.start().await.unwrap();
    let mut story = Story::default();
    here.hear(&mut story, 2).await;
    let machine = with_disk(&place, "target", |_| {});
    let mut target = Incoming::launch(&qemu(), &machine, &place.path("flight")).await.unwrap();
    let mut there = Console::open(&place.path("target-serial")).await;
    let blocks = blocks(&place, "target");
    target.offer_blocks(&blocks.socket, &blocks.disks).await.unwrap();

    let flight = source.migrate(&place.path("flight"), &Options::default(), Some(&blocks)).await;
    let outgoing = flight.map_err(|e| e.1).unwrap();
    let departed = leave(outgoing).await;
    assert!(departed.facts().total_bytes >= 32 << 20, "the disk counts: {:?}", departed.facts());
    let running = run(target).await;
    departed.qemu().quit().await;
    here.drain(&mut story).await;
    there.hear(&mut story, 3).await;
    running.qemu().quit().await;
    assert!(std::fs::read(place.path("source-disk")).unwrap() == std::fs::read(place.path("target-disk")).unwrap());
}

#[tokio::test]
async fn what_a_guest_writes_to_its_disk_flies_along_and_it_notices_what_is_lost() {
    // A round takes sixteen ticks or more, so every four beats are longer than one.
    let place = Place::new(Parameters { disk_blocks: 8, disk_stride: 500, beat_ticks: 20, ..busy() });
    let prelaunch = Prelaunch::launch(&qemu(), &with_disk(&place, "source", |_| {})).await.unwrap();
    let mut here = Console::open(&place.path("source-serial")).await;
    let source = prelaunch.start().await.unwrap();
    let mut story = Story::default();
    here.hear(&mut story, 4).await;
    let machine = with_disk(&place, "target", |_| {});
    let mut target = Incoming::launch(&qemu(), &machine, &place.path("flight")).await.unwrap();
    let mut there = Console::open(&place.path("target-serial")).await;
    let blocks = blocks(&place, "target");
    target.offer_blocks(&blocks.socket, &blocks.disks).await.unwrap();
    let flight = source.migrate(&place.path("flight"), &Options::default(), Some(&blocks)).await;
    let departed = leave(flight.map_err(|e| e.1).unwrap()).await;
    let _running = run(target).await;
    departed.qemu().quit().await;
    here.drain(&mut story).await;
    there.hear(&mut story, 8).await;

    // Somebody else writes to all its blocks but one: it cannot have read them all before, and writes none without reading it.
    let disk = std::fs::File::options().write(true).open(place.path("target-disk")).unwrap();
    for block in 1..8 {
        disk.write_all_at(&[0; 4096], block * 500 * 4096).unwrap();
    }
    let complaint = there.complaint(&mut story).await;
    assert!(complaint.contains("of the disk is corrupted"), "{complaint}");
}

#[tokio::test]
async fn a_target_that_dies_while_disks_are_copied_leaves_the_guest_where_it_was() {
    let place = Place::new(busy());
    let prelaunch = Prelaunch::launch(&qemu(), &with_disk(&place, "source", pattern)).await.unwrap();
    let mut here = Console::open(&place.path("source-serial")).await;
    let source = prelaunch.start().await.unwrap();
    let mut story = Story::default();
    let machine = with_disk(&place, "target", |_| {});
    let mut target = Incoming::launch(&qemu(), &machine, &place.path("flight")).await.unwrap();
    let there = blocks(&place, "target");
    target.offer_blocks(&there.socket, &there.disks).await.unwrap();
    // The memory is so slow that the mirror is there for long.
    let options = Options { bandwidth: Some(100_000), ..Options::default() };
    let flight = source.migrate(&place.path("flight"), &options, Some(&there)).await;
    let mut outgoing = flight.map_err(|e| e.1).unwrap();
    target.qemu().process().kill().await;
    follow(&mut outgoing).await;
    assert_eq!(outgoing.facts().status, MigrationStatus::Failed, "{:?}", outgoing.facts());
    assert!(outgoing.facts().error.is_some());
    let Settled::Stays(source, _) = outgoing.settle().await else { panic!("it should have stayed") };
    here.hear(&mut story, 3).await;

    // And it can move later.
    let machine = with_disk(&place, "second", |_| {});
    let mut target = Incoming::launch(&qemu(), &machine, &place.path("second")).await.unwrap();
    let there = blocks(&place, "second");
    target.offer_blocks(&there.socket, &there.disks).await.unwrap();
    let flight = source.migrate(&place.path("second"), &Options::default(), Some(&there)).await;
    let outgoing = flight.map_err(|e| e.1).unwrap();
    let departed = leave(outgoing).await;
    let running = run(target).await;
    departed.qemu().quit().await;
    running.qemu().quit().await;
    assert!(std::fs::read(place.path("source-disk")).unwrap() == std::fs::read(place.path("second-disk")).unwrap());
}

#[tokio::test]
async fn a_flight_cancelled_while_disks_are_copied_leaves_no_mirror_behind() {
    let place = Place::new(busy());
    let prelaunch = Prelaunch::launch(&qemu(), &with_disk(&place, "source", pattern)).await.unwrap();
    let mut here = Console::open(&place.path("source-serial")).await;
    let mut source = prelaunch.start().await.unwrap();
    let mut story = Story::default();
    for round in 0..2 {
        let end = format!("target{round}");
        let machine = with_disk(&place, &end, |_| {});
        let mut target = Incoming::launch(&qemu(), &machine, &place.path(&end)).await.unwrap();
        let there = blocks(&place, &end);
        target.offer_blocks(&there.socket, &there.disks).await.unwrap();
        let options = Options { bandwidth: Some(100_000), ..Options::default() };
        let flight = source.migrate(&place.path(&end), &options, Some(&there)).await;
        let mut outgoing = flight.map_err(|e| e.1).unwrap();
        if round == 1 {
            // Later: in the middle of the memory.
            let mut events = outgoing.qemu().subscribe();
            while outgoing.facts().status != MigrationStatus::Active && !outgoing.facts().is_final() {
                tokio::select! {
                    event = events.next() => outgoing.event(&event.unwrap()),
                    () = tokio::time::sleep(Duration::from_millis(5)) => {}
                }
                outgoing.advance().await.unwrap();
            }
        }
        outgoing.cancel().await.unwrap();
        follow(&mut outgoing).await;
        assert_eq!(outgoing.facts().status, MigrationStatus::Cancelled, "round {round}: {:?}", outgoing.facts());
        let Settled::Stays(stays, _) = outgoing.settle().await else { panic!("it should have stayed") };
        source = stays;
        target.qemu().process().kill().await;
        here.hear(&mut story, 2).await;
    }
    source.qemu().quit().await;
}

/// Everything at once, except network interfaces, whose taps need a network namespace of their own.
fn with_everything(place: &Place, end: &str, machine_type: &str) -> Machine {
    let mut machine = with_disk(place, end, |_| {});
    let first = machine.disks[0].clone();
    for (bus, kind) in [(Bus::Sata, DiskKind::CdRom), (Bus::Sata, DiskKind::Disk), (Bus::Scsi, DiskKind::Disk)] {
        let path = place.path(&format!("{end}-disk{}", machine.disks.len()));
        std::fs::write(&path, vec![0u8; 1 << 20]).unwrap();
        let read_only = kind == DiskKind::CdRom;
        let serial = Some("serial, with a comma".to_string());
        machine.disks.push(Disk { path, bus, kind, read_only, serial, boot_index: Some(9), ..first.clone() });
        machine.disks.last_mut().unwrap().boot_index = Some(machine.disks.len() as u32);
    }
    machine.disks[0].cache = Cache::Writethrough;
    machine.machine_type = machine_type.into();
    machine.cpu.cores = 2;
    machine.rng = true;
    machine.balloon = true;
    machine.free_page_hint = true;
    machine.guest_agent = Some(place.path(&format!("{end}-agent")));
    machine.uuid = Some("5cd0a2f1-0000-4000-8000-000000000001".into());
    machine.serial_number = Some("S,1".into());
    machine.clock_offset_seconds = 3600;
    machine
}

#[tokio::test]
async fn a_machine_with_every_device_is_built_and_flies() {
    for machine_type in ["q35", "pc"] {
        let place = Place::new(busy());
        let machine = with_everything(&place, "source", machine_type);
        let prelaunch = Prelaunch::launch(&qemu(), &machine).await.unwrap();
        let mut here = Console::open(&place.path("source-serial")).await;
        let source = prelaunch.start().await.unwrap();
        let mut story = Story::default();
        here.hear(&mut story, 1).await;
        let mut machine = with_everything(&place, "target", machine_type);
        machine.machine_type = source.qemu().machine_type().to_string();
        let target = Incoming::launch(&qemu(), &machine, &place.path("flight")).await.unwrap();
        let mut there = Console::open(&place.path("target-serial")).await;
        let flight = source.migrate(&place.path("flight"), &Options::default(), None).await;
        let outgoing = flight.map_err(|e| e.1).unwrap();
        let departed = leave(outgoing).await;
        let running = run(target).await;
        departed.qemu().quit().await;
        here.drain(&mut story).await;
        there.hear(&mut story, 2).await;
        running.qemu().quit().await;
    }
}

/// A guest of 16 MiB that writes to 4 MiB of it as fast as it can: the shortest window sees much of that.
#[tokio::test]
async fn what_a_guest_writes_is_measured_while_it_runs() {
    let place = Place::new(Parameters { pages_per_tick: 1024, first: 0x10_0000, last: 0x50_0000, ..busy() });
    let (mut source, mut here) = place.source().await;
    here.hear(&mut Story::default(), 3).await;
    let qemu = source.qemu().clone();
    let window = qemu.write_windows()[0];
    let busy = qemu.written_within(window).await.unwrap();
    assert!(busy.within_ms == window && busy.bytes > 0 && busy.bytes <= 16 << 20, "{busy:?}");
    let present = qemu.memory_present().expect("the kernel tells what is there");
    assert!((4 << 20..=16 << 20).contains(&present), "{present}");
    source.pause().await.unwrap();
    let still = qemu.written_within(1000).await.unwrap();
    assert_eq!(still.bytes, 0, "a guest that stands still writes nothing");
    assert!(still.margin > 0, "a page may have been overlooked");
    qemu.quit().await;
}
