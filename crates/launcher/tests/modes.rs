//! Post-copy, guests that are held or paused, cancellations: two launchers, spoken to as handlers do.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod pod;

use godwit_guest_rom::Story;
use godwit_launcher::record::read_departed;
use godwit_launcher::rpc::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pod::*;
use std::time::Duration;
use tokio::task::JoinHandle;

/// A guest that runs, a target that waits for it, and the way between them.
struct Pair {
    source: Pod,
    target: Pod,
    here: Console,
    there: Console,
    story: Story,
    way: JoinHandle<()>,
}

impl Pair {
    async fn start() -> Pair {
        let (source, target) = (Pod::start().await, Pod::start().await);
        source.client.start(&vm_order()).await.unwrap();
        let mut here = source.console().await;
        let mut story = Story::default();
        here.hear(&mut story, 2).await;
        let order = TargetOrder { allow_post_copy: true, ..target_order() };
        let ready = target.client.prepare_target(&order).await.unwrap();
        assert!(ready.post_copy, "post-copy needs root or vm.unprivileged_userfaultfd=1");
        let there = target.console().await;
        let way = carry(&source, "outgoing.sock", &target, &ready.socket);
        Pair { source, target, here, there, story, way }
    }

    /// Under way, with pages sent and more to send.
    async fn fly(&self, bandwidth: Option<u64>) {
        self.source.client.migrate(&order(bandwidth)).await.unwrap();
        if bandwidth.is_some() {
            self.source.until("bytes are sent", |s| status(s) == "active" && facts(s).processed_bytes > 0).await;
        }
    }

    async fn arrives(mut self) {
        self.source.until("completed", |s| status(s) == "completed").await;
        self.here.drain(&mut self.story).await;
        self.there.hear(&mut self.story, 3).await;
    }
}

fn order(bandwidth: Option<u64>) -> SourceOrder {
    SourceOrder { allow_post_copy: true, ..source_order(bandwidth) }
}

fn facts(state: &State) -> &MigrationFacts {
    state.migration.as_ref().expect("a migration")
}

fn written(pod: &Pod) -> Option<MigrationFacts> {
    read_departed(&Pod::paths(pod.folder.path()).ephemeral_disks).unwrap()
}

#[tokio::test]
async fn post_copy_is_handed_over_before_it_is_completed_and_only_once_that_is_written_down() {
    let pair = Pair::start().await;
    let (source, target) = (&pair.source, &pair.target);
    pair.fly(Some(500_000)).await;
    let state = source.client.state().await.unwrap();
    assert!(facts(&state).post_copy_possible && !facts(&state).handed_over);
    source.client.post_copy(MIGRATION).await.unwrap();
    source.client.post_copy(MIGRATION).await.unwrap();
    let state = source.until("handed over", |s| facts(s).handed_over).await;
    assert_eq!((status(&state), state.phase), ("postcopy-active", DomainPhase::HandedOver));
    assert_eq!(facts(&state).mode, MigrationMode::PostCopy);
    assert!(written(source).expect("handed over before it was written down").handed_over);
    // Nothing runs it here any more, and nothing takes it back.
    assert_eq!(refusal(source.client.unpause().await), Refusal::Conflict);
    assert_eq!(source.client.cancel(MIGRATION).await.unwrap().phase, DomainPhase::HandedOver);
    let state = target.client.go(MIGRATION).await.unwrap();
    assert_eq!(state.phase, DomainPhase::Running);
    assert!(facts(&state).gone && facts(&state).loaded && facts(&state).resume_us.is_some());
    assert!(!facts(&state).is_final(), "it runs before its memory is there: {state:?}");
    assert_eq!(target.client.go(MIGRATION).await.unwrap().phase, DomainPhase::Running, "the same go is no second one");
    let away = SourceOrder { migration_uid: "another".into(), ..order(None) };
    assert_eq!(refusal(target.client.migrate(&away).await), Refusal::Conflict, "half a guest does not move on");
    let state = source.until("completed", |s| status(s) == "completed").await;
    assert_eq!((state.phase, facts(&state).mode), (DomainPhase::MigratedAway, MigrationMode::PostCopy));
    assert_eq!(written(source).unwrap().status, "completed");
    let arrived = target.until("completed", |s| status(s) == "completed").await;
    let standstill = facts(&arrived).resume_us.unwrap() - facts(&state).stop_us.unwrap();
    eprintln!("standstill of post-copy {standstill} us");
    assert!(standstill > 0);
    pair.arrives().await;
}

#[tokio::test]
async fn a_link_that_breaks_in_post_copy_is_told_by_both_ends() {
    let pair = Pair::start().await;
    pair.fly(Some(500_000)).await;
    pair.source.client.post_copy(MIGRATION).await.unwrap();
    pair.source.until("handed over", |s| facts(s).handed_over).await;
    pair.target.client.go(MIGRATION).await.unwrap();
    pair.way.abort();
    for pod in [&pair.source, &pair.target] {
        let state = pod.until("the broken link", |s| status(s) == "postcopy-paused").await;
        assert_eq!(facts(&state).cause, Some(Cause::LinkLost), "{state:?}");
        assert!(facts(&state).error.is_some());
    }
    // Nobody can run this guest any more. Both ends end when they are told to.
    assert_eq!(refusal(pair.source.client.unpause().await), Refusal::Conflict);
    pair.source.client.shutdown(Duration::ZERO).await.unwrap();
    assert_eq!(pair.source.end().await.phase, DomainPhase::MigratedAway);
    pair.target.client.shutdown(Duration::ZERO).await.unwrap();
    let state = pair.target.end().await;
    assert_eq!(state.phase, DomainPhase::Crashed, "it did not shut down: {state:?}");
}

#[tokio::test]
async fn a_link_that_breaks_in_post_copy_is_followed_by_another_one() {
    let mut pair = Pair::start().await;
    pair.fly(Some(500_000)).await;
    pair.source.client.post_copy(MIGRATION).await.unwrap();
    pair.source.until("handed over", |s| facts(s).handed_over).await;
    pair.target.client.go(MIGRATION).await.unwrap();
    for (number, notices) in [(1, true), (2, false)] {
        if notices {
            pair.way.abort();
            for pod in [&pair.source, &pair.target] {
                let state = pod.until("the broken link", |s| facts(s).broken_us.is_some()).await;
                assert!(facts(&state).recoverable, "{state:?}");
            }
            // Nothing is asked of a QEMU that may wait for a page itself.
            assert_eq!(refusal(pair.target.client.pause().await), Refusal::Conflict);
        }
        let (near, far) = (format!("near{number}.sock"), format!("far{number}.sock"));
        assert_eq!(refusal(pair.target.client.recover(MIGRATION, "../x").await), Refusal::BadRequest);
        assert_eq!(refusal(pair.target.client.recover("another", &far).await), Refusal::Conflict);
        pair.target.client.recover(MIGRATION, &far).await.unwrap();
        let way = carry_memory(&pair.source, &near, &pair.target, &far);
        pair.source.client.recover(MIGRATION, &near).await.unwrap();
        for pod in [&pair.source, &pair.target] {
            let flows = |s: &State| facts(s).recoveries == number && facts(s).broken_us.is_none();
            let state = pod.until("it flows", flows).await;
            assert_eq!((facts(&state).error.as_deref(), facts(&state).cause), (None, None), "{state:?}");
        }
        pair.way = way;
    }
    pair.source.client.migrate(&order(None)).await.unwrap();
    pair.target.until("completed", |s| status(s) == "completed").await;
    // The source writes it down when it learns of it itself.
    pair.source.until("completed", |s| status(s) == "completed").await;
    assert_eq!(written(&pair.source).unwrap().recoveries, 2);
    assert_eq!(refusal(pair.target.client.recover(MIGRATION, "x").await), Refusal::Conflict, "it is whole");
    pair.arrives().await;
}

#[tokio::test]
async fn a_source_that_dies_in_post_copy_is_not_started_again() {
    let pair = Pair::start().await;
    pair.fly(Some(500_000)).await;
    pair.source.client.post_copy(MIGRATION).await.unwrap();
    let state = pair.source.until("handed over", |s| facts(s).handed_over).await;
    kill(Pid::from_raw(state.qemu_pid.unwrap() as i32), Signal::SIGKILL).unwrap();
    let state = pair.source.until("the end", |s| s.phase == DomainPhase::MigratedAway).await;
    assert_eq!((status(&state), facts(&state).cause), ("failed", Some(Cause::Killed)));
    assert!(facts(&state).handed_over);
    // A launcher that finds the record says the same.
    let paths = Pod::paths(pair.source.folder.path());
    pair.source.launcher.abort();
    let (_terminate, wishes) = tokio::sync::mpsc::channel(1);
    let again = tokio::spawn(godwit_launcher::serve(UID.into(), paths, wishes));
    let state = loop {
        match pair.source.client.state().await {
            Ok(state) => break state,
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    assert_eq!((state.phase, status(&state)), (DomainPhase::MigratedAway, "failed"));
    assert_eq!(pair.source.client.start(&vm_order()).await.unwrap().phase, DomainPhase::MigratedAway);
    again.abort();
}

#[tokio::test]
async fn post_copy_that_was_not_allowed_is_refused_as_such() {
    let mut pair = Pair::start().await;
    let order = SourceOrder { allow_post_copy: false, ..order(Some(500_000)) };
    pair.source.client.migrate(&order).await.unwrap();
    let state = pair.source.until("active", |s| status(s) == "active").await;
    assert!(!facts(&state).post_copy_possible);
    assert_eq!(refusal(pair.source.client.post_copy(MIGRATION).await), Refusal::Unsupported);
    assert_eq!(refusal(pair.source.client.post_copy("another").await), Refusal::Conflict);
    pair.here.hear(&mut pair.story, 2).await;
}

#[tokio::test]
async fn a_guest_paused_for_its_migration_arrives_running() {
    let pair = Pair::start().await;
    pair.fly(Some(4 << 20)).await;
    let state = pair.source.client.pause_to_migrate(MIGRATION).await.unwrap();
    assert!(facts(&state).paused_by_migration && !facts(&state).guest_paused);
    assert_eq!((facts(&state).mode, state.phase), (MigrationMode::Paused, DomainPhase::Running));
    assert_eq!(refusal(pair.source.client.unpause().await), Refusal::Conflict, "it is migrating");
    let state = pair.source.until("completed", |s| status(s) == "completed").await;
    assert!(facts(&state).handed_over && facts(&state).mode == MigrationMode::Paused);
    assert_eq!(pair.target.client.go(MIGRATION).await.unwrap().phase, DomainPhase::Running);
    pair.arrives().await;
}

#[tokio::test]
async fn a_guest_paused_for_a_migration_that_fails_runs_on() {
    let mut pair = Pair::start().await;
    pair.fly(Some(500_000)).await;
    pair.source.client.pause_to_migrate(MIGRATION).await.unwrap();
    let pid = pair.target.client.state().await.unwrap().qemu_pid.unwrap();
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
    let state = pair.source.until("failed", |s| status(s) == "failed").await;
    assert_eq!(facts(&state).cause, Some(Cause::LinkLost), "{state:?}");
    let state = pair.source.until("running", |s| s.qemu_status.as_deref() == Some("running")).await;
    assert_eq!(state.phase, DomainPhase::Running);
    assert!(!facts(&state).paused_by_migration);
    pair.here.hear(&mut pair.story, 3).await;
    let ended = pair.target.end().await;
    assert_eq!(facts(&ended).cause, Some(Cause::Killed), "{ended:?}");
}

#[tokio::test]
async fn a_guest_that_its_user_paused_moves_and_stays_paused() {
    let mut pair = Pair::start().await;
    pair.source.client.pause().await.unwrap();
    pair.fly(Some(8 << 20)).await;
    let state = pair.source.client.state().await.unwrap();
    assert_eq!(state.phase, DomainPhase::Paused);
    assert!(facts(&state).guest_paused && !facts(&state).paused_by_migration);
    let state = pair.source.until("completed", |s| status(s) == "completed").await;
    assert!(facts(&state).guest_paused);
    let state = pair.target.client.go_paused(MIGRATION).await.unwrap();
    assert_eq!((state.phase, state.qemu_status.as_deref()), (DomainPhase::Paused, Some("paused")));
    assert!(facts(&state).gone);
    // The same go again, also one that says otherwise, changes nothing: only its user unpauses it.
    assert_eq!(pair.target.client.go(MIGRATION).await.unwrap().phase, DomainPhase::Paused);
    pair.here.drain(&mut pair.story).await;
    assert_eq!(pair.target.client.unpause().await.unwrap().phase, DomainPhase::Running);
    pair.there.hear(&mut pair.story, 3).await;
}

#[tokio::test]
async fn a_paused_guest_whose_migration_is_cancelled_stays_paused_where_it_is() {
    let mut pair = Pair::start().await;
    pair.source.client.pause().await.unwrap();
    pair.fly(Some(500_000)).await;
    let state = pair.source.client.cancel(MIGRATION).await.unwrap();
    assert_eq!((status(&state), state.phase), ("cancelled", DomainPhase::Paused));
    assert_eq!(pair.source.client.unpause().await.unwrap().phase, DomainPhase::Running);
    pair.here.hear(&mut pair.story, 3).await;
}

#[tokio::test]
async fn the_answer_to_a_cancellation_says_which_it_was() {
    // In time.
    let mut pair = Pair::start().await;
    pair.fly(Some(500_000)).await;
    let state = pair.source.client.cancel(MIGRATION).await.unwrap();
    assert_eq!((status(&state), state.phase), ("cancelled", DomainPhase::Running));
    assert!(!facts(&state).handed_over);
    assert_eq!(state.qemu_status.as_deref(), Some("running"));
    pair.here.hear(&mut pair.story, 2).await;
    // In time although it was held for its end.
    let mut pair = Pair::start().await;
    pair.fly(Some(500_000)).await;
    pair.source.client.pause_to_migrate(MIGRATION).await.unwrap();
    let state = pair.source.client.cancel(MIGRATION).await.unwrap();
    assert_eq!((status(&state), state.qemu_status.as_deref()), ("cancelled", Some("running")));
    pair.here.hear(&mut pair.story, 2).await;
    // Too late.
    let pair = Pair::start().await;
    pair.fly(None).await;
    pair.source.until("completed", |s| status(s) == "completed").await;
    let state = pair.source.client.cancel(MIGRATION).await.unwrap();
    assert_eq!((status(&state), state.phase), ("completed", DomainPhase::MigratedAway));
    assert!(facts(&state).handed_over);
    pair.target.client.go(MIGRATION).await.unwrap();
    pair.arrives().await;
}

#[tokio::test]
async fn the_same_order_with_another_bandwidth_changes_it() {
    let pair = Pair::start().await;
    // 16 MiB at this rate would take minutes.
    pair.fly(Some(100_000)).await;
    let state = pair.source.client.migrate(&order(Some(8 << 20))).await.unwrap();
    assert_eq!(facts(&state).bandwidth_limit, Some(8 << 20));
    let state = pair.source.client.migrate(&order(None)).await.unwrap();
    assert_eq!(facts(&state).bandwidth_limit, None);
    pair.source.until("completed", |s| status(s) == "completed").await;
    pair.target.client.go(MIGRATION).await.unwrap();
    pair.arrives().await;
}
