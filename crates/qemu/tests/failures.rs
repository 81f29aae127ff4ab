//! Each kind of failure, provoked on a real QEMU: what the two ends say, and what is made of it.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod place;

use godwit_guest_rom::Story;
use godwit_qemu::blocks::Blocks;
use godwit_qemu::failure::{self, Cause, Explanation};
use godwit_qemu::instance::{Incoming, Outgoing, Prelaunch, Settled};
use godwit_qemu::machine::{Bus, Disk, Machine};
use godwit_qemu::migration::{Facts, Options};
use godwit_qemu::qmp::commands::MigrationStatus;
use place::*;
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};

fn disk(path: PathBuf) -> Disk {
    Disk::new("work", path, Bus::Virtio)
}

/// What the target says of a load that failed: an old QEMU exits, a newer one stays to be asked.
async fn told(target: &mut Incoming) -> Explanation {
    let work = async {
        loop {
            if let Some(ended) = target.qemu().process().ended() {
                return failure::of_end(&ended);
            }
            if target.look().await.is_ok() && target.facts().status == MigrationStatus::Failed {
                let facts = target.facts();
                return Explanation { cause: facts.cause.unwrap(), text: facts.error.clone().unwrap() };
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, work).await.expect("the target never says that it failed")
}

/// Sends the guest of `source` to a target that refuses it: what each end makes of it, after the guest was seen to run on.
async fn refused(place: &Place, source: &Machine, target: &Machine) -> (Facts, Explanation) {
    let prelaunch = Prelaunch::launch(&qemu(), source).await.unwrap();
    let mut here = Console::open(source.serial.as_ref().unwrap()).await;
    let source = prelaunch.start().await.unwrap();
    let mut story = Story::default();
    here.hear(&mut story, 1).await;
    let mut incoming = Incoming::launch(&qemu(), target, &place.path("flight")).await.unwrap();
    let mut outgoing = source.migrate(&place.path("flight"), &Options::default(), None).await.map_err(|e| e.1).unwrap();
    follow(&mut outgoing).await;
    let Settled::Stays(source, facts) = outgoing.settle().await else { panic!("it should have stayed") };
    let told = told(&mut incoming).await;
    assert!(facts.cause.is_some() && facts.error.is_some(), "{facts:?}");
    eprintln!("target: {told:?}\nsource: {:?}: {:?}", facts.cause, facts.error);
    here.hear(&mut story, 2).await;
    source.qemu().quit().await;
    incoming.qemu().process().kill().await;
    (facts, told)
}

#[tokio::test]
async fn another_machine_type() {
    let place = Place::new(busy());
    let target = Machine { machine_type: "pc".into(), ..place.machine("target") };
    let (_, told) = refused(&place, &place.machine("source"), &target).await;
    assert_eq!(told.cause, Cause::RefusedMachine, "{told:?}");
    assert!(told.text.contains("pc-i440fx"), "{told:?}");
}

#[tokio::test]
async fn another_size_of_memory() {
    let place = Place::new(busy());
    let target = Machine { memory_mib: 32, ..place.machine("target") };
    let (_, told) = refused(&place, &place.machine("source"), &target).await;
    assert_eq!(told.cause, Cause::RefusedMachine, "{told:?}");
}

#[tokio::test]
async fn a_device_that_the_target_lacks() {
    let place = Place::new(busy());
    let source = Machine { rng: true, ..place.machine("source") };
    let (_, told) = refused(&place, &source, &place.machine("target")).await;
    assert_eq!(told.cause, Cause::RefusedMachine, "{told:?}");
    assert!(told.text.contains("rng"), "{told:?}");
}

#[tokio::test]
async fn a_disk_that_somebody_else_writes_to() {
    let place = Place::new(busy());
    for name in ["here", "there"] {
        std::fs::write(place.path(name), vec![0u8; 1 << 20]).unwrap();
    }
    let with = |end: &str, file: &str| Machine { disks: vec![disk(place.path(file))], ..place.machine(end) };
    let other = Prelaunch::launch(&qemu(), &with("other", "there")).await.unwrap().start().await.unwrap();
    let source = Prelaunch::launch(&qemu(), &with("source", "here")).await.unwrap();
    let mut here = Console::open(&place.path("source-serial")).await;
    let source = source.start().await.unwrap();
    let mut story = Story::default();
    here.hear(&mut story, 1).await;
    let incoming = Incoming::launch(&qemu(), &with("target", "there"), &place.path("flight")).await.unwrap();
    let mut there = Console::open(&place.path("target-serial")).await;
    let mut outgoing = source.migrate(&place.path("flight"), &Options::default(), None).await.map_err(|e| e.1).unwrap();
    follow(&mut outgoing).await;
    // A target takes its disks only with the go. It is refused, harms nothing, and is repeated until it is taken.
    let Settled::Departed(departed) = outgoing.settle().await else { panic!("it did not leave") };
    let refused = incoming.go(false).await.unwrap_err();
    assert!(!refused.may_run);
    assert_eq!(refused.error.cause(), Cause::RefusedStorage, "{}", refused.error);
    other.qemu().quit().await;
    let running = run(refused.incoming).await;
    departed.qemu().quit().await;
    here.drain(&mut story).await;
    there.hear(&mut story, 2).await;
    running.qemu().quit().await;
}

#[tokio::test]
async fn a_disk_that_is_not_there() {
    let place = Place::new(busy());
    let target = Machine { disks: vec![disk(place.path("nothing"))], ..place.machine("target") };
    let error = Incoming::launch(&qemu(), &target, &place.path("flight")).await.unwrap_err();
    assert_eq!(error.cause(), Cause::RefusedStorage, "{error}");
}

#[tokio::test]
async fn a_disk_to_copy_to_that_is_too_small() {
    let place = Place::new(busy());
    std::fs::write(place.path("here"), vec![1u8; 4 << 20]).unwrap();
    std::fs::write(place.path("there"), vec![0u8; 1 << 20]).unwrap();
    let source = Machine { disks: vec![disk(place.path("here"))], ..place.machine("source") };
    let target = Machine { disks: vec![disk(place.path("there"))], ..place.machine("target") };
    let source = Prelaunch::launch(&qemu(), &source).await.unwrap().start().await.unwrap();
    let mut incoming = Incoming::launch(&qemu(), &target, &place.path("flight")).await.unwrap();
    let blocks = Blocks { socket: place.path("blocks"), disks: vec![(0, "work".into())], ..Blocks::default() };
    incoming.offer_blocks(&blocks.socket, &blocks.disks).await.unwrap();
    let (cause, text, source) = match source.migrate(&place.path("flight"), &Options::default(), Some(&blocks)).await {
        Err((source, error)) => (error.cause(), error.to_string(), source),
        Ok(mut outgoing) => {
            follow(&mut outgoing).await;
            let Settled::Stays(source, facts) = outgoing.settle().await else { panic!("it should have stayed") };
            (facts.cause.unwrap(), facts.error.unwrap(), source)
        }
    };
    assert_eq!(cause, Cause::RefusedStorage, "{text}");
    source.qemu().quit().await;
    incoming.qemu().process().kill().await;
}

#[tokio::test]
async fn a_cpu_that_the_target_does_not_have() {
    let place = Place::new(busy());
    let mut target = place.machine("target");
    target.cpu.model = Some("abacus".into());
    let error = Incoming::launch(&qemu(), &target, &place.path("flight")).await.unwrap_err();
    assert_eq!(error.cause(), Cause::RefusedCpu, "{error}");
    // One that is known, and has features that nothing here can offer.
    target.cpu.model = Some("Icelake-Server".into());
    target.cpu.features = vec![("enforce".into(), true)];
    let error = Incoming::launch(&qemu(), &target, &place.path("flight")).await.unwrap_err();
    assert_eq!(error.cause(), Cause::RefusedCpu, "{error}");
}

/// Carries the stream as handlers do, until it is aborted.
fn carry(place: &Place) -> tokio::task::JoinHandle<()> {
    let listener = UnixListener::bind(place.path("way")).unwrap();
    let to = place.path("flight");
    tokio::spawn(async move {
        let (mut here, _) = listener.accept().await.unwrap();
        let mut there = UnixStream::connect(&to).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut here, &mut there).await;
    })
}

async fn some_sent(outgoing: &mut Outgoing) {
    let work = async {
        while outgoing.facts().sent_bytes == 0 || outgoing.facts().status != MigrationStatus::Active {
            tokio::time::sleep(Duration::from_millis(5)).await;
            for event in outgoing.qemu().events() {
                outgoing.event(&event);
            }
            outgoing.look().await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, work).await.expect("nothing is sent");
}

#[tokio::test]
async fn a_link_that_is_cut() {
    let place = Place::new(busy());
    let (source, mut here) = place.source().await;
    let mut story = Story::default();
    let (mut incoming, _there) = place.target().await;
    let way = carry(&place);
    let options = Options { bandwidth: Some(500_000), ..Options::default() };
    let mut outgoing = source.migrate(&place.path("way"), &options, None).await.map_err(|e| e.1).unwrap();
    some_sent(&mut outgoing).await;
    way.abort();
    follow(&mut outgoing).await;
    let Settled::Stays(source, facts) = outgoing.settle().await else { panic!("it should have stayed") };
    assert_eq!((facts.status, facts.cause), (MigrationStatus::Failed, Some(Cause::LinkLost)), "{facts:?}");
    let told = told(&mut incoming).await;
    assert_eq!(told.cause, Cause::LinkLost, "{told:?}");
    here.hear(&mut story, 3).await;
    source.qemu().quit().await;
    incoming.qemu().process().kill().await;
}

#[tokio::test]
async fn a_target_that_is_killed() {
    let place = Place::new(busy());
    let (source, _here) = place.source().await;
    let (incoming, _there) = place.target().await;
    let options = Options { bandwidth: Some(500_000), ..Options::default() };
    let mut outgoing = source.migrate(&place.path("flight"), &options, None).await.map_err(|e| e.1).unwrap();
    some_sent(&mut outgoing).await;
    let ended = incoming.qemu().process().kill().await;
    assert_eq!(failure::of_end(&ended).cause, Cause::Killed);
    follow(&mut outgoing).await;
    let Settled::Stays(source, facts) = outgoing.settle().await else { panic!("it should have stayed") };
    assert_eq!(facts.cause, Some(Cause::LinkLost), "{facts:?}");
    source.qemu().quit().await;
}
