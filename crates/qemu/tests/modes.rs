//! How a migration comes to its end: post-copy, a guest that is held, a guest that was paused, a cancellation at any moment.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod place;

use godwit_guest_rom::{Parameters, Story};
use godwit_qemu::instance::{Arrived, Incoming, Outgoing, Prelaunch, Settled};
use godwit_qemu::machine::Machine;
use godwit_qemu::migration::{Mode, Options};
use godwit_qemu::qmp::commands::{MigrationStatus, RunState};
use place::*;
use std::time::Duration;

/// A megabyte a second: 16 MiB of memory take longer than any of these tests needs to get at them.
const SLOW: u64 = 1 << 20;

fn slow() -> Options {
    Options { bandwidth: Some(SLOW), post_copy: true, ..Options::default() }
}

async fn target(place: &Place) -> (Incoming, Console) {
    let machine = place.machine("target");
    let incoming = Incoming::launch_for(&qemu(), &machine, &place.path("flight"), true).await.unwrap();
    assert!(incoming.can_post_copy(), "post-copy needs root or vm.unprivileged_userfaultfd=1");
    (incoming, Console::open(&place.path("target-serial")).await)
}

/// Sent until the guest has written to pages that were sent.
async fn some_sent(outgoing: &mut Outgoing, bytes: u64) {
    let work = async {
        while outgoing.facts().sent_bytes < bytes {
            tokio::time::sleep(Duration::from_millis(5)).await;
            outgoing.look().await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, work).await.expect("nothing is sent");
}

#[tokio::test]
async fn in_post_copy_the_guest_runs_at_the_target_before_its_memory_is_there_and_loses_none_of_it() {
    let place = Place::new(writer());
    let (source, mut here) = place.source().await;
    let mut story = Story::default();
    // Once through its memory, so that all of it is there to lose.
    here.hear(&mut story, 20).await;
    let (incoming, mut there) = target(&place).await;
    let options = Options { bandwidth: Some(4 * SLOW), ..slow() };
    let mut outgoing = source.migrate(&place.path("flight"), &options, None).await.map_err(|e| e.1).unwrap();
    active(&mut outgoing).await;
    some_sent(&mut outgoing, 2 << 20).await;
    assert!(outgoing.can_post_copy());
    assert!(incoming.qemu().status().await.unwrap() == RunState::Inmigrate);
    outgoing.switch_to_post_copy().await.unwrap();
    let serving = hand_over(outgoing).await;
    assert_eq!(serving.facts().mode, Mode::PostCopy);
    // From here on the source never runs it, and the target waits for its go.
    assert_eq!(serving.qemu().status().await.unwrap(), RunState::FinishMigrate);
    let mut filling = filling(incoming.go(false).await.map_err(|e| e.error).unwrap());
    // What it still had to say at the source is heard later.
    let mut after = story.clone();
    there.hear(&mut after, 2).await;
    filling.look().await.unwrap();
    assert_eq!(filling.facts().status, MigrationStatus::PostcopyActive, "it runs before all is there");
    let (running, _) = fill(filling).await;
    let departed = serve(serving).await;
    assert_eq!(departed.qemu().status().await.unwrap(), RunState::Postmigrate);
    assert!(departed.facts().stop_us.is_some());
    departed.qemu().quit().await;
    here.drain(&mut story).await;
    assert!(story.beats() < after.beats());
    // Twice through its memory: every page is verified when it is written to again.
    there.hear(&mut after, 40).await;
    running.qemu().quit().await;
}

#[tokio::test]
async fn a_guest_that_was_handed_over_is_lost_with_its_source_and_both_ends_say_so() {
    let place = Place::new(writer());
    let (source, mut here) = place.source().await;
    here.hear(&mut Story::default(), 20).await;
    let (incoming, _there) = target(&place).await;
    let mut outgoing = source.migrate(&place.path("flight"), &slow(), None).await.map_err(|e| e.1).unwrap();
    active(&mut outgoing).await;
    outgoing.switch_to_post_copy().await.unwrap();
    let mut serving = hand_over(outgoing).await;
    let mut filling = filling(incoming.go(false).await.map_err(|e| e.error).unwrap());
    // The target's QEMU dies: the source says that the link is gone, and does not run the guest.
    filling.qemu().process().kill().await;
    let work = async {
        while serving.facts().status != MigrationStatus::PostcopyPaused {
            tokio::time::sleep(Duration::from_millis(5)).await;
            serving.look().await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, work).await.expect("the broken link is not noticed");
    assert!(serving.facts().error.is_some());
    assert_eq!(serving.qemu().status().await.unwrap(), RunState::FinishMigrate);
    assert!(filling.look().await.is_err());
    serving.qemu().process().kill().await;
}

#[tokio::test]
async fn a_source_that_dies_in_post_copy_leaves_a_target_that_says_that_it_waits() {
    let place = Place::new(writer());
    let (source, mut here) = place.source().await;
    here.hear(&mut Story::default(), 20).await;
    let (incoming, _there) = target(&place).await;
    let mut outgoing = source.migrate(&place.path("flight"), &slow(), None).await.map_err(|e| e.1).unwrap();
    active(&mut outgoing).await;
    outgoing.switch_to_post_copy().await.unwrap();
    let serving = hand_over(outgoing).await;
    let mut filling = filling(incoming.go(false).await.map_err(|e| e.error).unwrap());
    serving.qemu().process().kill().await;
    let work = async {
        while filling.facts().status != MigrationStatus::PostcopyPaused {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let _ = filling.look().await;
            for event in filling.qemu().events() {
                filling.event(&event);
            }
        }
    };
    tokio::time::timeout(PATIENCE, work).await.expect("the broken link is not noticed");
    assert!(filling.facts().error.is_some());
    filling.qemu().process().kill().await;
}

#[tokio::test]
async fn post_copy_that_was_not_allowed_is_refused_and_the_guest_runs_on() {
    let place = Place::new(busy());
    let (source, mut here) = place.source().await;
    let mut story = Story::default();
    let (target, _there) = place.target().await;
    let options = Options { bandwidth: Some(100_000), ..Options::default() };
    let mut outgoing = source.migrate(&place.path("flight"), &options, None).await.map_err(|e| e.1).unwrap();
    active(&mut outgoing).await;
    let refused = outgoing.switch_to_post_copy().await.unwrap_err();
    assert!(matches!(refused, godwit_qemu::instance::Error::Unsupported(_)), "{refused}");
    here.hear(&mut story, 2).await;
    outgoing.cancel().await.unwrap();
    follow(&mut outgoing).await;
    let Settled::Stays(source, _) = outgoing.settle().await else { panic!("it should have stayed") };
    target.qemu().process().kill().await;
    source.qemu().quit().await;
}

#[tokio::test]
async fn a_held_guest_arrives_and_its_standstill_counts_from_then() {
    let place = Place::new(writer());
    let (source, mut here) = place.source().await;
    let mut story = Story::default();
    here.hear(&mut story, 20).await;
    let (incoming, mut there) = target(&place).await;
    let options = Options { bandwidth: Some(8 << 20), ..slow() };
    let mut outgoing = source.migrate(&place.path("flight"), &options, None).await.map_err(|e| e.1).unwrap();
    active(&mut outgoing).await;
    outgoing.hold().await.unwrap();
    assert!(outgoing.is_held());
    assert_eq!(outgoing.facts().mode, Mode::Paused);
    let departed = leave(outgoing).await;
    let facts = departed.facts();
    assert_eq!((facts.status, facts.mode), (MigrationStatus::Completed, Mode::Paused));
    assert!(facts.end_us.unwrap() - facts.stop_us.unwrap() > 100_000, "it stood still while it was sent: {facts:?}");
    let running = run(incoming).await;
    departed.qemu().quit().await;
    here.drain(&mut story).await;
    there.hear(&mut story, 40).await;
    running.qemu().quit().await;
}

#[tokio::test]
async fn a_held_guest_whose_migration_fails_or_is_cancelled_runs_on() {
    for fails in [true, false] {
        let place = Place::new(busy());
        let (source, mut here) = place.source().await;
        let mut story = Story::default();
        here.hear(&mut story, 2).await;
        let (incoming, _there) = target(&place).await;
        let mut outgoing = source.migrate(&place.path("flight"), &slow(), None).await.map_err(|e| e.1).unwrap();
        active(&mut outgoing).await;
        outgoing.hold().await.unwrap();
        if fails {
            incoming.qemu().process().kill().await;
        } else {
            outgoing.cancel().await.unwrap();
        }
        follow(&mut outgoing).await;
        let Settled::Stays(source, facts) = outgoing.settle().await else { panic!("it should have stayed") };
        assert_eq!(facts.status == MigrationStatus::Failed, fails, "{facts:?}");
        assert!(!source.is_paused());
        here.hear(&mut story, 5).await;
        incoming.qemu().process().kill().await;
        source.qemu().quit().await;
    }
}

#[tokio::test]
async fn a_paused_guest_flies_paused_and_on_and_runs_when_it_is_unpaused() {
    let place = Place::new(writer());
    let (mut running, mut here) = place.source().await;
    let mut story = Story::default();
    here.hear(&mut story, 5).await;
    running.pause().await.unwrap();
    for round in 0..2 {
        let name = format!("flight{round}");
        let machine = place.machine(&format!("round{round}"));
        let incoming = Incoming::launch(&qemu(), &machine, &place.path(&name)).await.unwrap();
        let there = Console::open(&place.path(&format!("round{round}-serial"))).await;
        let flight = running.migrate(&place.path(&name), &Options::default(), None).await;
        let outgoing = flight.map_err(|e| e.1).unwrap();
        assert!(outgoing.is_paused() && !outgoing.is_held());
        let departed = leave(outgoing).await;
        assert_eq!(departed.facts().stop_us, None, "it stood still already");
        let Arrived::Whole(arrived, _) = incoming.go(true).await.map_err(|e| e.error).unwrap() else {
            panic!("not whole")
        };
        assert!(arrived.is_paused());
        assert_eq!(arrived.qemu().status().await.unwrap(), RunState::Paused);
        departed.qemu().quit().await;
        here.drain(&mut story).await;
        here = there;
        running = arrived;
    }
    running.unpause().await.unwrap();
    here.hear(&mut story, 25).await;
    running.qemu().quit().await;
}

#[tokio::test]
async fn a_paused_guest_whose_migration_fails_stays_paused_and_can_be_unpaused() {
    let place = Place::new(busy());
    let with_rng = |end: &str, rng| Machine { rng, ..place.machine(end) };
    let prelaunch = Prelaunch::launch(&qemu(), &with_rng("source", true)).await.unwrap();
    let mut here = Console::open(&place.path("source-serial")).await;
    let mut source = prelaunch.start().await.unwrap();
    let mut story = Story::default();
    here.hear(&mut story, 2).await;
    source.pause().await.unwrap();
    for round in 0..3 {
        // The last one lacks a device, which it finds out when it has all of the memory.
        let machine = with_rng(&format!("target{round}"), round < 2);
        let name = format!("flight{round}");
        let incoming = Incoming::launch(&qemu(), &machine, &place.path(&name)).await.unwrap();
        let bandwidth = (round < 2).then_some(100_000);
        let options = Options { bandwidth, ..Options::default() };
        let mut outgoing = source.migrate(&place.path(&name), &options, None).await.map_err(|e| e.1).unwrap();
        match round {
            0 => incoming.qemu().process().kill().await,
            1 => {
                outgoing.cancel().await.unwrap();
                Default::default()
            }
            _ => Default::default(),
        };
        follow(&mut outgoing).await;
        let Settled::Stays(stays, _) = outgoing.settle().await else { panic!("it should have stayed") };
        assert!(stays.is_paused());
        incoming.qemu().process().kill().await;
        source = stays;
    }
    source.unpause().await.unwrap();
    assert_eq!(source.qemu().status().await.unwrap(), RunState::Running);
    here.hear(&mut story, 5).await;
    source.qemu().quit().await;
}

/// The cancellation comes a little later in each round, from the first moment to after the end.
#[tokio::test]
async fn a_cancellation_at_any_moment_leaves_one_guest_that_runs() {
    let place = Place::new(busy());
    let (mut running, mut here) = place.source().await;
    let mut story = Story::default();
    here.hear(&mut story, 2).await;
    let (mut left, mut stayed) = (0, 0);
    for round in 0..14u64 {
        let name = format!("flight{round}");
        let machine = place.machine(&format!("round{round}"));
        let incoming = Incoming::launch_for(&qemu(), &machine, &place.path(&name), true).await.unwrap();
        let there = Console::open(&place.path(&format!("round{round}-serial"))).await;
        let options = Options { bandwidth: None, ..slow() };
        let flight = running.migrate(&place.path(&name), &options, None).await;
        let mut outgoing = flight.map_err(|e| e.1).unwrap();
        // Every third is held when it is cancelled, every third on its way to post-copy.
        match round % 3 {
            1 => drop(outgoing.hold().await),
            2 => drop(outgoing.switch_to_post_copy().await),
            _ => {}
        }
        if round == 13 {
            follow(&mut outgoing).await;
        } else {
            tokio::time::sleep(Duration::from_millis(round * round / 4)).await;
        }
        outgoing.cancel().await.unwrap();
        let handed = match outgoing.hand_over().await {
            Ok(_) => panic!("a cancelled migration is not handed over"),
            Err(outgoing) => outgoing,
        };
        let mut outgoing = *handed;
        follow(&mut outgoing).await;
        match outgoing.settle().await {
            Settled::Departed(departed) => {
                left += 1;
                running = run(incoming).await;
                departed.qemu().quit().await;
                here.drain(&mut story).await;
                here = there;
            }
            Settled::Stays(stays, facts) => {
                stayed += 1;
                assert_eq!(facts.status, MigrationStatus::Cancelled, "round {round}: {facts:?}");
                assert!(incoming.go(false).await.is_err(), "round {round}: what was cancelled must not run there");
                running = stays;
            }
            Settled::Unclear(outgoing, error) => panic!("round {round}: {error}: {:?}", outgoing.facts()),
        }
        assert_eq!(running.qemu().status().await.unwrap(), RunState::Running, "round {round}");
        here.hear(&mut story, 1).await;
    }
    eprintln!("{stayed} stayed, {left} had left");
    assert!(stayed > 0 && left > 0, "{stayed} stayed, {left} had left");
    running.qemu().quit().await;
}

#[tokio::test]
async fn a_guest_that_outruns_its_link_is_slowed_down_where_that_is_allowed() {
    // All of 13 MiB once in 0.7 s, over a link of 4 MiB a second.
    let place = Place::new(Parameters { pages_per_tick: 50, ..writer() });
    let (source, mut here) = place.source().await;
    if !source.qemu().tracks_writes() {
        let version = source.qemu().version();
        eprintln!("skipped: under TCG QEMU {version} sends a guest in one pass, and slows it down only between passes");
        return;
    }
    let mut story = Story::default();
    here.hear(&mut story, 10).await;
    let (target, mut there) = target(&place).await;
    let options = Options { bandwidth: Some(4 * SLOW), auto_converge: true, ..Options::default() };
    let options = Options { post_copy: true, ..options };
    let mut outgoing = source.migrate(&place.path("flight"), &options, None).await.map_err(|e| e.1).unwrap();
    active(&mut outgoing).await;
    let work = async {
        while outgoing.facts().throttle_percent.is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
            outgoing.look().await.unwrap();
            assert!(!outgoing.facts().is_final(), "it came to its end without: {:?}", outgoing.facts());
        }
    };
    tokio::time::timeout(PATIENCE, work).await.expect("it is not slowed down");
    let percent = outgoing.facts().throttle_percent.unwrap();
    eprintln!("slowed down by {percent} % in pass {}", outgoing.facts().passes);
    assert!((1..=99).contains(&percent), "{percent}");
    outgoing.limit_bandwidth(None).await.unwrap();
    let departed = leave(outgoing).await;
    let running = run(target).await;
    departed.qemu().quit().await;
    here.drain(&mut story).await;
    there.hear(&mut story, 20).await;
    running.qemu().quit().await;
}

#[tokio::test]
async fn one_byte_a_second_is_a_cap() {
    let place = Place::new(writer());
    let (source, mut here) = place.source().await;
    let mut story = Story::default();
    here.hear(&mut story, 20).await;
    let (incoming, _there) = target(&place).await;
    let options = Options { bandwidth: Some(1), ..slow() };
    let mut outgoing = source.migrate(&place.path("flight"), &options, None).await.map_err(|e| e.1).unwrap();
    active(&mut outgoing).await;
    // Without a cap it is over long before this many beats of a tenth of a second.
    here.hear(&mut story, 10).await;
    outgoing.look().await.unwrap();
    assert_eq!(outgoing.facts().status, MigrationStatus::Active);
    assert!(outgoing.facts().sent_bytes < 4 << 20, "{:?}", outgoing.facts());
    outgoing.cancel().await.unwrap();
    follow(&mut outgoing).await;
    let Settled::Stays(source, _) = outgoing.settle().await else { panic!("it should have stayed") };
    incoming.qemu().process().kill().await;
    source.qemu().quit().await;
}

#[tokio::test]
async fn the_bandwidth_can_be_changed_on_the_way() {
    let place = Place::new(writer());
    let (source, mut here) = place.source().await;
    let mut story = Story::default();
    here.hear(&mut story, 20).await;
    let (incoming, mut there) = target(&place).await;
    // At this rate it would take more than two minutes.
    let options = Options { bandwidth: Some(100_000), ..slow() };
    let mut outgoing = source.migrate(&place.path("flight"), &options, None).await.map_err(|e| e.1).unwrap();
    active(&mut outgoing).await;
    assert_eq!(outgoing.bandwidth(), Some(100_000));
    outgoing.limit_bandwidth(None).await.unwrap();
    assert_eq!(outgoing.bandwidth(), None);
    let departed = leave(outgoing).await;
    let running = run(incoming).await;
    departed.qemu().quit().await;
    here.drain(&mut story).await;
    there.hear(&mut story, 5).await;
    running.qemu().quit().await;
}
