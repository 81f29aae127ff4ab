//! Guests that change their QEMU on one machine: the memory stays, the rest is sent. Against a real QEMU, with the ROM guest,
//! which verifies each page when it comes back to it.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod place;

use godwit_guest_rom::{Parameters, Story};
use godwit_qemu::instance::{Error, Incoming, Outgoing, Prelaunch, Running, Settled};
use godwit_qemu::machine::{Bus, Disk, Machine};
use godwit_qemu::memory::GuestMemory;
use godwit_qemu::migration::Options;
use godwit_qemu::qmp::commands::{MigrationStatus, RunState};
use place::*;
use std::hash::{DefaultHasher, Hasher};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

/// The guest's memory in MiB.
const MIB: u64 = 16;
/// Less than any part of the guest's memory that would be worth sending: the firmware's tables and the devices.
const FEW_BYTES: u64 = 2 << 20;

fn by_reference() -> Options {
    Options { by_reference: true, ..Options::default() }
}

/// So slow that something can be done while the devices are sent.
fn slowly() -> Options {
    Options { bandwidth: Some(20_000), ..by_reference() }
}

fn with(machine: Machine, memory: &GuestMemory) -> Machine {
    Machine { shared_memory: Some(memory.clone()), ..machine }
}

async fn started(place: &Place, memory: &GuestMemory) -> (Running, Console) {
    let prelaunch = Prelaunch::launch(&qemu(), &with(place.machine("source"), memory)).await.unwrap();
    let console = Console::open(&place.path("source-serial")).await;
    (prelaunch.start().await.unwrap(), console)
}

async fn awaited(place: &Place, name: &str, memory: &GuestMemory) -> (Incoming, Console) {
    let machine = with(place.machine(name), memory);
    let socket = place.path(&format!("{name}-flight"));
    let mut incoming = Incoming::prepare_by_reference(&qemu(), &machine, &socket).await.unwrap();
    incoming.listen(Default::default()).await.unwrap();
    (incoming, Console::open(&place.path(&format!("{name}-serial"))).await)
}

async fn sent(running: Running, place: &Place, name: &str, options: &Options) -> Outgoing {
    let socket = place.path(&format!("{name}-flight"));
    running.migrate(&socket, options, None).await.map_err(|e| e.1).unwrap()
}

/// What the memory holds.
fn digest(memory: &GuestMemory) -> u64 {
    let file = std::fs::File::from(memory.descriptor().as_fd().try_clone_to_owned().unwrap());
    let mut hasher = DefaultHasher::new();
    let mut page = vec![0; 1 << 16];
    for at in (0..memory.bytes()).step_by(page.len()) {
        file.read_exact_at(&mut page, at).unwrap();
        hasher.write(&page);
    }
    hasher.finish()
}

#[tokio::test]
async fn a_guest_gets_another_qemu_and_its_memory_stays() {
    let place = Place::new(writer());
    let memory = GuestMemory::new(MIB).unwrap();
    let (mut running, mut here) = started(&place, &memory).await;
    let mut story = Story::default();
    // Once through its memory, so that all of it is there to lose.
    here.hear(&mut story, 20).await;
    for round in ["first", "second", "third"] {
        let (target, mut there) = awaited(&place, round, &memory).await;
        let departed = leave(sent(running, &place, round, &by_reference()).await).await;
        assert!(departed.facts().sent_bytes < FEW_BYTES, "{:?}", departed.facts());
        assert_eq!(target.qemu().status().await.unwrap(), RunState::Paused);
        running = run(target).await;
        departed.qemu().quit().await;
        here.drain(&mut story).await;
        // Through its memory: every page is verified when it is written to again.
        there.hear(&mut story, 20).await;
        here = there;
    }
    running.qemu().quit().await;
    here.drain(&mut story).await;
}

/// What each device of ours does when it is loaded is in question here, so the machine has one of each; the source's end must
/// not touch anything any more either.
#[tokio::test]
async fn neither_end_touches_memory_between_the_stop_and_the_go() {
    let place = Place::new(busy());
    let memory = GuestMemory::new(MIB).unwrap();
    let machine = |name: &str| {
        let mut machine = with(place.machine(name), &memory);
        (machine.rng, machine.balloon, machine.guest_agent) = (true, true, Some(place.path(&format!("{name}-agent"))));
        for (number, bus) in [Bus::Virtio, Bus::Sata, Bus::Scsi].into_iter().enumerate() {
            let path = place.path(&format!("disk{number}"));
            std::fs::File::options().create(true).append(true).open(&path).unwrap().set_len(1 << 20).unwrap();
            machine.disks.push(Disk::new(format!("disk{number}"), path, bus));
        }
        machine
    };
    let prelaunch = Prelaunch::launch(&qemu(), &machine("source")).await.unwrap();
    let mut here = Console::open(&place.path("source-serial")).await;
    let mut story = Story::default();
    let mut source = prelaunch.start().await.unwrap();
    here.hear(&mut story, 5).await;
    source.pause().await.unwrap();
    let before = digest(&memory);

    let socket = place.path("flight");
    let mut target = Incoming::prepare_by_reference(&qemu(), &machine("target"), &socket).await.unwrap();
    target.listen(Default::default()).await.unwrap();
    let mut there = Console::open(&place.path("target-serial")).await;
    assert_eq!(digest(&memory), before, "a QEMU that waits has written to the guest's memory");
    let outgoing = source.migrate(&socket, &by_reference(), None).await.map_err(|e| e.1).unwrap();
    let departed = leave(outgoing).await;
    while !target.is_loaded().await.unwrap() {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    assert_eq!(digest(&memory), before, "loading the devices has written to the guest's memory");
    departed.qemu().quit().await;
    assert_eq!(digest(&memory), before, "the source's end has written to the guest's memory");
    let mut running = run(target).await;
    here.drain(&mut story).await;
    there.hear(&mut story, 5).await;
    running.pause().await.unwrap();
    assert_ne!(digest(&memory), before, "the guest writes, and that is seen");
}

#[tokio::test]
async fn a_target_that_is_killed_leaves_the_guest_with_its_memory() {
    let place = Place::new(writer());
    let memory = GuestMemory::new(MIB).unwrap();
    let (source, mut here) = started(&place, &memory).await;
    let mut story = Story::default();
    here.hear(&mut story, 20).await;
    let (target, _there) = awaited(&place, "killed", &memory).await;
    let mut outgoing = sent(source, &place, "killed", &slowly()).await;
    active(&mut outgoing).await;
    target.qemu().process().kill().await;
    follow(&mut outgoing).await;
    let Settled::Stays(source, facts) = outgoing.settle().await else { panic!("it should have stayed") };
    assert_eq!(facts.status, MigrationStatus::Failed);
    here.hear(&mut story, 20).await;

    // The next one gets it, and after that it can be copied like any other.
    let (target, mut there) = awaited(&place, "next", &memory).await;
    let departed = leave(sent(source, &place, "next", &by_reference()).await).await;
    let running = run(target).await;
    departed.qemu().quit().await;
    here.drain(&mut story).await;
    there.hear(&mut story, 20).await;
    let away = Incoming::launch(&qemu(), &place.machine("away"), &place.path("away-flight")).await.unwrap();
    let mut far = Console::open(&place.path("away-serial")).await;
    let departed = leave(sent(running, &place, "away", &Options::default()).await).await;
    assert!(departed.facts().sent_bytes > FEW_BYTES, "{:?}", departed.facts());
    let _running = run(away).await;
    departed.qemu().quit().await;
    there.drain(&mut story).await;
    far.hear(&mut story, 20).await;
}

#[tokio::test]
async fn a_cancellation_leaves_the_guest_with_its_memory() {
    let place = Place::new(writer());
    let memory = GuestMemory::new(MIB).unwrap();
    let (source, mut here) = started(&place, &memory).await;
    let mut story = Story::default();
    here.hear(&mut story, 20).await;
    let (target, _there) = awaited(&place, "target", &memory).await;
    let mut outgoing = sent(source, &place, "target", &slowly()).await;
    active(&mut outgoing).await;
    outgoing.cancel().await.unwrap();
    follow(&mut outgoing).await;
    let Settled::Stays(_source, facts) = outgoing.settle().await else { panic!("it should have stayed") };
    assert_eq!(facts.status, MigrationStatus::Cancelled);
    let refused = target.go(false).await.map(drop).unwrap_err();
    assert!(!refused.may_run);
    here.hear(&mut story, 20).await;
}

/// Pages that came would be written into the memory that the guest still runs in.
#[tokio::test]
async fn a_target_by_reference_takes_no_pages() {
    let place = Place::new(writer());
    let memory = GuestMemory::new(MIB).unwrap();
    let (mut source, mut here) = started(&place, &memory).await;
    let mut story = Story::default();
    here.hear(&mut story, 20).await;
    source.pause().await.unwrap();
    let before = digest(&memory);
    let (_target, _there) = awaited(&place, "target", &memory).await;
    let mut outgoing = sent(source, &place, "target", &Options::default()).await;
    follow(&mut outgoing).await;
    let Settled::Stays(mut source, _) = outgoing.settle().await else { panic!("it should have stayed") };
    assert_eq!(digest(&memory), before);
    source.unpause().await.unwrap();
    here.hear(&mut story, 20).await;
}

#[tokio::test]
async fn memory_that_is_qemus_own_is_copied_into_memory_that_is_not() {
    let place = Place::new(Parameters { token: 0x0ee, ..writer() });
    let (source, mut here) = place.source().await;
    let mut story = Story::default();
    here.hear(&mut story, 20).await;
    let Err((source, error)) = source.migrate(&place.path("target-flight"), &by_reference(), None).await else {
        panic!("its memory cannot be handed on")
    };
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
    let machine = with(place.machine("target"), &GuestMemory::new(MIB).unwrap());
    let target = Incoming::launch(&qemu(), &machine, &place.path("target-flight")).await.unwrap();
    let mut there = Console::open(&place.path("target-serial")).await;
    let departed = leave(sent(source, &place, "target", &Options::default()).await).await;
    let _running = run(target).await;
    departed.qemu().quit().await;
    here.drain(&mut story).await;
    there.hear(&mut story, 20).await;
}

/// Elsewhere such memory is sent like any other: QEMU fetches what is missing with userfaultfd on shared memory.
#[tokio::test]
async fn memory_that_could_be_handed_on_follows_its_guest_in_post_copy() {
    let place = Place::new(writer());
    let (source, mut here) = started(&place, &GuestMemory::new(MIB).unwrap()).await;
    let mut story = Story::default();
    here.hear(&mut story, 20).await;
    let machine = with(place.machine("away"), &GuestMemory::new(MIB).unwrap());
    let incoming = Incoming::launch_for(&qemu(), &machine, &place.path("away-flight"), true).await.unwrap();
    assert!(incoming.can_post_copy(), "post-copy needs root or vm.unprivileged_userfaultfd=1");
    let mut there = Console::open(&place.path("away-serial")).await;
    let options = Options { bandwidth: Some(4 << 20), post_copy: true, ..Options::default() };
    let mut outgoing = sent(source, &place, "away", &options).await;
    active(&mut outgoing).await;
    outgoing.switch_to_post_copy().await.unwrap();
    let serving = hand_over(outgoing).await;
    let filling = filling(incoming.go(false).await.map_err(|e| e.error).unwrap());
    let (running, _) = fill(filling).await;
    serve(serving).await.qemu().quit().await;
    here.drain(&mut story).await;
    // Twice through its memory: every page is verified when it is written to again.
    there.hear(&mut story, 40).await;
    running.qemu().quit().await;
}
