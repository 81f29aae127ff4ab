//! Launchers, spoken to as a handler does, with the ROM guest on a real QEMU.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod pod;

use godwit_guest_rom::Story;
use godwit_launcher::client::Error;
use godwit_launcher::memory::GuestMemory;
use godwit_launcher::record::{Record, read_departed};
use godwit_launcher::rpc::*;
use godwit_launcher::serve;
use pod::*;
use serde_json::json;
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

#[tokio::test]
async fn a_guest_moves_and_the_source_ends() {
    let (source, target) = (Pod::start().await, Pod::start().await);
    let state = source.client.start(&vm_order()).await.unwrap();
    assert_eq!(state.phase, DomainPhase::Running);
    assert!(state.machine_type.as_deref().unwrap().starts_with("pc-q35-"), "{state:?}");
    let mut here = source.console().await;
    let mut story = Story::default();
    here.hear(&mut story, 2).await;
    // The same order again is no second guest.
    let again = source.client.start(&vm_order()).await.unwrap();
    assert_eq!(again.qemu_pid, state.qemu_pid);

    let ready = target.client.prepare_target(&target_order()).await.unwrap();
    assert_eq!(ready, target.client.prepare_target(&target_order()).await.unwrap());
    assert_eq!(target.client.state().await.unwrap().phase, DomainPhase::Incoming);
    let mut there = target.console().await;
    let _carrier = carry(&source, "outgoing.sock", &target, &ready.socket);

    // A go before anything has come is refused, and so is everything that does not belong to a target.
    assert_eq!(refusal(target.client.go(MIGRATION).await), Refusal::Conflict);
    assert_eq!(refusal(target.client.go("another").await), Refusal::Conflict);
    assert_eq!(refusal(target.client.start(&vm_order()).await), Refusal::Conflict);
    assert_eq!(refusal(target.client.unpause().await), Refusal::Conflict);

    source.client.migrate(&source_order(None)).await.unwrap();
    let left = source.until("completed", |s| status(s) == "completed").await;
    assert_eq!(left.phase, DomainPhase::MigratedAway);
    let written = read_departed(&Pod::paths(source.folder.path()).ephemeral_disks).unwrap();
    assert_eq!(written.expect("completed was reported before it was written down").status, "completed");
    let loaded = target.client.state().await.unwrap();
    assert_eq!(loaded.phase, DomainPhase::Incoming, "it must not run before the go");
    // What has left is not run here again by any order.
    assert_eq!(refusal(source.client.unpause().await), Refusal::Conflict);
    assert_eq!(source.client.start(&vm_order()).await.unwrap().phase, DomainPhase::MigratedAway);

    let state = target.client.go(MIGRATION).await.unwrap();
    assert_eq!(state.phase, DomainPhase::Running);
    let (facts, arrived) = (left.migration.unwrap(), state.migration.unwrap());
    assert!(arrived.loaded && arrived.gone);
    let downtime = arrived.resume_us.expect("RESUME is known with the answer") - facts.stop_us.unwrap();
    assert!(downtime > 0, "{downtime}");
    eprintln!("standstill {downtime} us, {} bytes in {:?} ms", facts.processed_bytes, facts.total_ms);
    assert_eq!(target.client.go(MIGRATION).await.unwrap().phase, DomainPhase::Running, "the same go is no second one");
    assert_eq!(refusal(target.client.abandon(MIGRATION).await), Refusal::Conflict);

    here.drain(&mut story).await;
    there.hear(&mut story, 5).await;
    let events = target.client.events().await.unwrap();
    assert!(events.windows(2).all(|w| w[0].at_us <= w[1].at_us) && events.iter().any(|e| e.event == "RESUME"));

    source.client.shutdown(Duration::ZERO).await.unwrap();
    assert_eq!(source.end().await.phase, DomainPhase::MigratedAway);
    // The guest goes on to be a guest: it hears its power button.
    target.client.shutdown(Duration::from_secs(50)).await.unwrap();
    let state = target.end().await;
    assert_eq!(state.phase, DomainPhase::Shutdown);
    assert!(!state.exit_reason.unwrap().contains("force"));
}

#[tokio::test]
async fn memory_comes_as_it_was_agreed_and_not_before() {
    let (source, target) = (Pod::start().await, Pod::start().await);
    let state = source.client.start(&vm_order()).await.unwrap();
    assert!(state.ability.zstd, "{state:?}");
    let mut here = source.console().await;
    let mut story = Story::default();
    here.hear(&mut story, 2).await;
    let order = TargetOrder { transport_follows: true, ..target_order() };
    let ready = target.client.prepare_target(&order).await.unwrap();
    assert!(ready.awaits_transport);
    assert_eq!(ready.ability, state.ability, "the same machine");
    let mut there = target.console().await;
    let incoming = Pod::paths(target.folder.path()).sockets.join(&ready.socket);
    assert!(UnixStream::connect(&incoming).await.is_err());
    let transport = Transport { channels: 2, zstd: true, preempt: false };
    assert_eq!(refusal(target.client.receive_by("another", transport).await), Refusal::Conflict);
    for wish in [transport, Transport::default()] {
        let state = target.client.receive_by(MIGRATION, wish).await.unwrap();
        assert_eq!(state.migration.unwrap().transport, transport, "the first stands");
    }
    let _carrier = carry_memory(&source, "outgoing.sock", &target, &ready.socket);
    let state = source.client.migrate(&SourceOrder { transport, ..source_order(None) }).await.unwrap();
    assert_eq!(state.migration.unwrap().transport, transport);
    source.until("completed", |s| status(s) == "completed").await;
    target.client.go(MIGRATION).await.unwrap();
    here.drain(&mut story).await;
    there.hear(&mut story, 20).await;
}

#[tokio::test]
async fn a_guest_of_an_older_launcher_keeps_its_machine_and_one_of_a_newer_is_refused() {
    let (source, target, another) = (Pod::start().await, Pod::start().await, Pod::start().await);
    let state = source.client.start(&VmOrder { machine_revision: 0, ..vm_order() }).await.unwrap();
    assert_eq!((state.machine_revision, state.guest_cpu), (Some(0), None));
    let mut here = source.console().await;
    let mut story = Story::default();
    here.hear(&mut story, 2).await;
    let mut order = target_order();
    order.vmi.status.machine_revision = Some(MACHINE_REVISION + 1);
    let refused = another.client.prepare_target(&order).await.unwrap_err();
    assert_eq!(refused.refusal(), Some(Refusal::Invalid), "{refused}");
    // Its VMI says nothing of a revision.
    order.vmi.status.machine_revision = None;
    let ready = target.client.prepare_target(&order).await.unwrap();
    assert_eq!(target.client.state().await.unwrap().machine_revision, Some(0));
    let mut there = target.console().await;
    let _carrier = moves(&source, &target, &ready.socket).await;
    here.drain(&mut story).await;
    there.hear(&mut story, 5).await;
    // Started anew it is a machine of today.
    let state = another.client.start(&VmOrder { machine_revision: 99, ..vm_order() }).await.unwrap();
    assert_eq!((state.machine_revision, state.guest_cpu), (Some(MACHINE_REVISION), Some(guest_cpu())));
}

#[tokio::test]
async fn a_disk_of_its_own_moves_with_the_guest() {
    let (source, target) = (Pod::start().await, Pod::start().await);
    let work = |pod: &Pod| Pod::paths(pod.folder.path()).ephemeral_disks.join("work.img");
    let content: Vec<u8> = (0..8u32 << 20).map(|n| (n / 4096) as u8 ^ n as u8).collect();
    std::fs::create_dir_all(work(&source).parent().unwrap()).unwrap();
    std::fs::write(work(&source), &content).unwrap();
    let vmi = vmi(
        json!([{"name": "work", "emptyDisk": {"capacity": "8Mi"}}]),
        json!([{"name": "work", "disk": {"bus": "virtio"}}]),
    );
    let state = source.client.start(&VmOrder { vmi: vmi.clone(), ..vm_order() }).await.unwrap();
    let known =
        VolumeState { name: "work".into(), target: "vda".into(), size_bytes: Some(8 << 20), ..VolumeState::default() };
    assert_eq!(state.volumes, [known]);
    let mut here = source.console().await;
    let mut story = Story::default();
    here.hear(&mut story, 1).await;
    let ready = target.client.prepare_target(&TargetOrder { vmi, ..target_order() }).await.unwrap();
    let mut there = target.console().await;
    // Without a way for its blocks it must not go: the guest would find an empty disk.
    assert_eq!(refusal(source.client.migrate(&source_order(None)).await), Refusal::Invalid);
    let _memory = carry(&source, "outgoing.sock", &target, &ready.socket);
    let _blocks = carry(&source, "blocks.sock", &target, &ready.blocks_socket.unwrap());
    let order = SourceOrder { blocks_socket: Some("blocks.sock".into()), ..source_order(None) };
    source.client.migrate(&order).await.unwrap();
    let left = source.until("the end", |s| s.migration.as_ref().is_some_and(MigrationFacts::is_final)).await;
    assert_eq!(status(&left), "completed", "{left:?}");
    let state = target.client.go(MIGRATION).await.unwrap();
    let downtime = state.migration.unwrap().resume_us.unwrap() - left.migration.unwrap().stop_us.unwrap();
    eprintln!("standstill with a mirrored disk {downtime} us");
    here.drain(&mut story).await;
    there.hear(&mut story, 3).await;
    assert!(std::fs::read(work(&target)).unwrap() == content);
}

#[tokio::test]
async fn a_disk_that_has_no_room_at_the_target_is_refused_before_anything_is_copied() {
    let (source, target) = (Pod::start().await, Pod::start().await);
    let work = Pod::paths(source.folder.path()).ephemeral_disks.join("work.img");
    std::fs::create_dir_all(work.parent().unwrap()).unwrap();
    std::fs::write(&work, vec![7u8; 4 << 20]).unwrap();
    let vmi = vmi(
        json!([{"name": "work", "emptyDisk": {"capacity": "4Mi"}}]),
        json!([{"name": "work", "disk": {"bus": "virtio"}}]),
    );
    source.client.start(&VmOrder { vmi: vmi.clone(), ..vm_order() }).await.unwrap();
    let order = TargetOrder { vmi, allow_post_copy: true, ..target_order() };
    let ready = target.client.prepare_target(&order).await.unwrap();
    assert!(!ready.post_copy, "with disks that are copied there is none");
    let room = ready.rooms.get("work").unwrap();
    assert!(room.free_bytes > 8 << 20, "this machine has no room for the test: {room:?}");
    let _memory = carry(&source, "outgoing.sock", &target, &ready.socket);
    let _blocks = carry(&source, "blocks.sock", &target, &ready.blocks_socket.unwrap());
    let short = [("work".to_string(), DiskRoom { free_bytes: 1 << 20, ..room.clone() })].into();
    let order = SourceOrder { blocks_socket: Some("blocks.sock".into()), rooms: short, ..source_order(None) };
    let Err(Error::Refused { message, cause, .. }) = source.client.migrate(&order).await else { panic!("not refused") };
    assert_eq!(cause, Some(Cause::NoSpace), "{message}");
    assert!(message.contains("volume work needs") && message.contains("1048576 bytes are free"), "{message}");
    let state = source.client.state().await.unwrap();
    assert_eq!((state.phase, state.migration), (DomainPhase::Running, None), "nothing has begun");
    // With the room that there is it goes.
    source.client.migrate(&SourceOrder { rooms: ready.rooms, ..order }).await.unwrap();
    source.until("completed", |s| status(s) == "completed").await;
    target.client.go(MIGRATION).await.unwrap();
}

#[tokio::test]
async fn of_a_container_disk_only_what_the_guest_wrote_is_copied_where_the_image_is_the_same() {
    for same in [true, false] {
        let (source, target) = (Pod::start().await, Pod::start().await);
        for (pod, byte) in [(&source, 1u8), (&target, if same { 1 } else { 2 })] {
            let image = Pod::paths(pod.folder.path()).container_disks.join("root/disk/disk.img");
            std::fs::create_dir_all(image.parent().unwrap()).unwrap();
            std::fs::write(image, vec![byte; 32 << 20]).unwrap();
        }
        let vmi = vmi(
            json!([{"name": "root", "containerDisk": {"image": "x"}}]),
            json!([{"name": "root", "disk": {"bus": "virtio"}}]),
        );
        source.client.start(&VmOrder { vmi: vmi.clone(), ..vm_order() }).await.unwrap();
        source.until("the image is known", |s| s.volumes.iter().all(|v| v.base.is_some())).await;
        let ready = target.client.prepare_target(&TargetOrder { vmi, ..target_order() }).await.unwrap();
        let _memory = carry(&source, "outgoing.sock", &target, &ready.socket);
        let _blocks = carry(&source, "blocks.sock", &target, &ready.blocks_socket.unwrap());
        let blocks_socket = Some("blocks.sock".into());
        let order = SourceOrder { blocks_socket, rooms: ready.rooms, ..source_order(None) };
        source.client.migrate(&order).await.unwrap();
        let left = source.until("completed", |s| status(s) == "completed").await.migration.unwrap();
        // 16 MiB of memory, and the disk or nothing of it.
        assert_eq!(left.total_bytes >= 40 << 20, !same, "{left:?}");
        target.client.go(MIGRATION).await.unwrap();
    }
}

#[tokio::test]
async fn a_launcher_that_starts_again_after_the_departure_says_so_and_starts_nothing() {
    let pod = Pod::start().await;
    let facts = MigrationFacts { status: "completed".into(), ..MigrationFacts::new(MIGRATION, MigrationRole::Source) };
    let paths = Pod::paths(pod.folder.path());
    Record::prepare(&paths.ephemeral_disks).unwrap().write(&facts).unwrap();
    pod.launcher.abort();
    let (_terminate, wishes) = mpsc::channel(1);
    let again = tokio::spawn(serve(UID.into(), paths.clone(), wishes));
    let state = loop {
        match pod.client.state().await {
            Ok(state) if state.phase == DomainPhase::MigratedAway => break state,
            _ => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    assert_eq!(state.migration, Some(facts));
    assert_eq!(pod.client.start(&vm_order()).await.unwrap().phase, DomainPhase::MigratedAway);
    pod.client.shutdown(Duration::ZERO).await.unwrap();
    again.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_cancelled_migration_leaves_the_guest_and_the_target_is_abandoned() {
    let (source, target) = (Pod::start().await, Pod::start().await);
    source.client.start(&vm_order()).await.unwrap();
    let mut here = source.console().await;
    let mut story = Story::default();
    here.hear(&mut story, 1).await;
    let ready = target.client.prepare_target(&target_order()).await.unwrap();
    let _carrier = carry(&source, "outgoing.sock", &target, &ready.socket);
    source.client.migrate(&source_order(Some(100_000))).await.unwrap();
    source.until("bytes are sent", |s| s.migration.as_ref().is_some_and(|m| m.processed_bytes > 0)).await;
    // Half of the guest is there: it must not run.
    assert_eq!(refusal(target.client.go(MIGRATION).await), Refusal::Conflict);
    source.client.cancel(MIGRATION).await.unwrap();
    let state = source.until("cancelled", |s| status(s) == "cancelled").await;
    assert_eq!(state.phase, DomainPhase::Running);
    here.hear(&mut story, 3).await;
    assert_eq!(read_departed(&Pod::paths(source.folder.path()).ephemeral_disks).unwrap(), None);
    // QEMU 7.2 exits by itself when its source goes away, which may be before the handler abandons it.
    let _ = target.client.abandon(MIGRATION).await;
    let ended = target.end().await;
    assert!(ended.phase.is_final(), "{ended:?}");

    // And it can leave later.
    let second = Pod::start().await;
    let mut order = target_order();
    order.migration_uid = "22222222-0000-4000-8000-000000000002".into();
    let ready = second.client.prepare_target(&order).await.unwrap();
    let mut there = second.console().await;
    let _carrier = carry(&source, "second.sock", &second, &ready.socket);
    let order = SourceOrder { migration_uid: order.migration_uid, socket: "second.sock".into(), ..source_order(None) };
    source.client.migrate(&order).await.unwrap();
    source.until("completed", |s| status(s) == "completed").await;
    second.client.go(&order.migration_uid).await.unwrap();
    here.drain(&mut story).await;
    there.hear(&mut story, 3).await;
}

#[tokio::test]
async fn a_target_that_dies_in_flight_ends_badly_and_the_guest_runs_on() {
    let (source, target) = (Pod::start().await, Pod::start().await);
    source.client.start(&vm_order()).await.unwrap();
    let mut here = source.console().await;
    let mut story = Story::default();
    here.hear(&mut story, 1).await;
    let ready = target.client.prepare_target(&target_order()).await.unwrap();
    let _carrier = carry(&source, "outgoing.sock", &target, &ready.socket);
    source.client.migrate(&source_order(Some(100_000))).await.unwrap();
    source.until("bytes are sent", |s| s.migration.as_ref().is_some_and(|m| m.processed_bytes > 0)).await;
    let pid = target.client.state().await.unwrap().qemu_pid.unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL).unwrap();
    let state = target.end().await;
    assert_eq!((state.phase, status(&state)), (DomainPhase::Crashed, "failed"));
    assert!(state.exit_reason.unwrap().contains("killed"));
    let state = source.until("failed", |s| status(s) == "failed").await;
    assert_eq!(state.phase, DomainPhase::Running);
    here.hear(&mut story, 3).await;
    assert_eq!(refusal(source.client.go(MIGRATION).await), Refusal::Conflict, "a source takes no go");
}

#[tokio::test]
async fn an_idle_target_can_be_abandoned() {
    let target = Pod::start().await;
    target.client.prepare_target(&target_order()).await.unwrap();
    assert_eq!(target.client.abandon(MIGRATION).await.unwrap().phase, DomainPhase::Shutdown);
    assert_eq!(refusal(target.client.go(MIGRATION).await), Refusal::Conflict, "what was abandoned is not run");
    assert_eq!(target.end().await.phase, DomainPhase::Shutdown);
}

#[tokio::test]
async fn the_end_of_a_guest_is_told_with_its_reason() {
    // By SIGTERM: the button, then the end.
    let pod = Pod::start().await;
    pod.client.start(&vm_order()).await.unwrap();
    pod.console().await.hear(&mut Story::default(), 1).await;
    pod.terminate.send(()).await.unwrap();
    assert_eq!(pod.end().await.phase, DomainPhase::Shutdown);

    // At once.
    let pod = Pod::start().await;
    pod.client.start(&vm_order()).await.unwrap();
    pod.client.shutdown(Duration::ZERO).await.unwrap();
    let state = pod.end().await;
    assert_eq!(state.phase, DomainPhase::Shutdown);
    assert!(state.exit_reason.unwrap().contains("force"));

    // By a crash.
    let pod = Pod::start().await;
    let state = pod.client.start(&vm_order()).await.unwrap();
    let pid = nix::unistd::Pid::from_raw(state.qemu_pid.unwrap() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    let mut watch = pod.client.watch().await.unwrap();
    let mut last = None;
    while let Ok(Some(state)) = watch.next().await {
        last = Some(state);
    }
    assert_eq!(last.unwrap().phase, DomainPhase::Crashed, "the stream tells the end before it ends");
    assert_eq!(pod.end().await.phase, DomainPhase::Crashed);
}

#[tokio::test]
async fn a_guest_is_paused_and_unpaused() {
    let pod = Pod::start().await;
    pod.client.start(&vm_order()).await.unwrap();
    assert_eq!(pod.client.pause().await.unwrap().phase, DomainPhase::Paused);
    assert_eq!(pod.client.unpause().await.unwrap().phase, DomainPhase::Running);
    pod.console().await.hear(&mut Story::default(), 1).await;
}

#[tokio::test]
async fn bad_orders_are_refused_with_a_reason() {
    let pod = Pod::start().await;
    let mut order = vm_order();
    order.vmi.metadata.uid = Some("somebody else".into());
    assert_eq!(refusal(pod.client.start(&order).await), Refusal::Conflict);
    let mut order = vm_order();
    order.vmi.spec.volumes.clear();
    assert_eq!(refusal(pod.client.start(&order).await), Refusal::Invalid);
    let mut order = vm_order();
    order.vmi.spec.domain.machine = Some(godwit_api::vmi::Machine { type_: Some("abacus".into()) });
    assert_eq!(refusal(pod.client.start(&order).await), Refusal::Failed);
    // None of these has spoilt anything.
    assert_eq!(pod.client.state().await.unwrap().phase, DomainPhase::Undefined);
    assert_eq!(pod.client.start(&vm_order()).await.unwrap().phase, DomainPhase::Running);
    // A source to nowhere.
    let refused = pod.client.migrate(&source_order(None)).await;
    assert!(matches!(refused, Err(Error::Refused { reason: Refusal::Failed, .. })) || refused.is_ok());
    let state = pod.until("failed", |s| status(s) == "failed").await;
    assert_eq!(state.phase, DomainPhase::Running);
    let order = SourceOrder { migration_uid: "x".into(), socket: "../x".into(), ..source_order(None) };
    assert_eq!(refusal(pod.client.migrate(&order).await), Refusal::BadRequest);
}

#[tokio::test]
async fn bytes_that_are_no_order_are_refused() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let pod = Pod::start().await;
    for (request, status) in [
        ("PUT /v1/vm HTTP/1.1\r\nHost: l\r\nContent-Length: 4\r\n\r\nnull", "400"),
        ("PUT /v1/vm HTTP/1.1\r\nHost: l\r\nContent-Length: 2\r\n\r\n{]", "400"),
        ("GET /v2 HTTP/1.1\r\nHost: l\r\n\r\n", "404"),
        ("DELETE /v1/vm HTTP/1.1\r\nHost: l\r\n\r\n", "404"),
        ("\0\0\0\r\n\r\n", "400"),
    ] {
        let mut stream = UnixStream::connect(Pod::paths(pod.folder.path()).rpc_socket()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = vec![0u8; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer[9..], status.as_bytes(), "{request:?}");
    }
    assert_eq!(pod.client.state().await.unwrap().phase, DomainPhase::Undefined);
}

#[tokio::test]
async fn what_a_guest_writes_is_measured_and_told() {
    let pod = Pod::start().await;
    let state = pod.client.start(&vm_order()).await.unwrap();
    assert_eq!(state.memory, MemoryFacts::default());
    pod.client.measure().await.unwrap();
    let state = pod.until("all times are measured", |s| s.memory.measured_us.is_some()).await;
    let memory = &state.memory;
    assert!(memory.present_bytes > 0 && memory.present_bytes <= memory.total_bytes, "{memory:?}");
    assert!(memory.written.is_sorted_by_key(|written| written.within_ms), "{memory:?}");
    assert!(memory.written.len() >= 3, "{memory:?}");
    // A guest that stands still has nothing to tell; what it did before stays known.
    pod.client.pause().await.unwrap();
    let state = pod.client.measure().await.unwrap();
    assert_eq!(state.memory.written.len(), state.memory.written.len().max(3));
}

/// What the handler does between two launchers of one node.
async fn hand_on(source: &Pod, target: &Pod) -> (GuestMemory, JoinHandle<std::io::Result<()>>) {
    let listen = |pod: &Pod| UnixListener::bind(Pod::paths(pod.folder.path()).sockets.join("memory.sock")).unwrap();
    let (from, to) = (listen(source), listen(target));
    let came = async {
        let (stream, _) = from.accept().await.unwrap();
        let stream = stream.into_std().unwrap();
        stream.set_nonblocking(false).unwrap();
        tokio::task::spawn_blocking(move || GuestMemory::receive(&stream)).await.unwrap().unwrap()
    };
    let (lent, memory) = tokio::join!(source.client.lend_memory(MIGRATION, "memory.sock"), came);
    lent.unwrap();
    let handed = memory.clone();
    let waiting = tokio::spawn(async move {
        let (stream, _) = to.accept().await?;
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        handed.send(&stream)
    });
    (memory, waiting)
}

#[tokio::test]
async fn a_guest_changes_launchers_of_one_node_and_its_memory_stays() {
    let (source, target) = (Pod::start().await, Pod::start().await);
    let order = VmOrder { shareable_memory: true, ..vm_order() };
    let state = source.client.start(&order).await.unwrap();
    assert!(state.shareable_memory);
    let mut here = source.console().await;
    let mut story = Story::default();
    here.hear(&mut story, 5).await;
    let (memory, waiting) = hand_on(&source, &target).await;
    assert_eq!(memory.bytes(), 16 << 20);
    drop(memory);
    let order = TargetOrder { memory_socket: Some("memory.sock".into()), ..target_order() };
    let ready = target.client.prepare_target(&order).await.unwrap();
    waiting.await.unwrap().unwrap();
    assert!(ready.by_reference);
    let mut there = target.console().await;
    let _carrier = carry_memory(&source, "outgoing.sock", &target, &ready.socket);
    source.client.migrate(&SourceOrder { by_reference: true, ..source_order(None) }).await.unwrap();
    let state = source.until("completed", |s| status(s) == "completed").await;
    let facts = state.migration.unwrap();
    assert!(facts.by_reference && facts.processed_bytes < 2 << 20, "{facts:?}");
    let state = target.client.go(MIGRATION).await.unwrap();
    assert!(state.shareable_memory && state.migration.unwrap().by_reference, "and on it goes");
    source.client.shutdown(Duration::ZERO).await.unwrap();
    source.end().await;
    here.drain(&mut story).await;
    there.hear(&mut story, 20).await;
}

#[tokio::test]
async fn memory_that_cannot_be_handed_on_is_copied() {
    let (source, target) = (Pod::start().await, Pod::start().await);
    let state = source.client.start(&vm_order()).await.unwrap();
    assert!(!state.shareable_memory);
    assert_eq!(refusal(source.client.lend_memory(MIGRATION, "memory.sock").await), Refusal::Unsupported);
    assert_eq!(refusal(source.client.lend_memory(MIGRATION, "../x").await), Refusal::BadRequest);
    // Nobody waits there.
    let order = TargetOrder { memory_socket: Some("nobody.sock".into()), shareable_memory: true, ..target_order() };
    let ready = target.client.prepare_target(&order).await.unwrap();
    assert!(!ready.by_reference);
    assert!(target.client.state().await.unwrap().shareable_memory, "its own can be handed on later");
}

/// A VMI with a disk that comes while the guest runs, which it has as `target`, if it has it.
fn with_late_disk(target: Option<&str>) -> godwit_api::VirtualMachineInstance {
    let mut vmi = serde_json::to_value(vm_order().vmi).unwrap();
    let append = |list: &mut serde_json::Value, item: serde_json::Value| match list.as_array_mut() {
        Some(items) => items.push(item),
        None => *list = json!([item]),
    };
    let claim = json!({"name": "late", "persistentVolumeClaim": {"claimName": "late", "hotpluggable": true}});
    append(&mut vmi["spec"]["volumes"], claim);
    let disk = json!({"name": "late", "disk": {"bus": "scsi"}, "serial": "LATE"});
    append(&mut vmi["spec"]["domain"]["devices"]["disks"], disk);
    if let Some(target) = target {
        vmi["status"]["volumeStatus"] = json!([{"name": "late", "target": target, "phase": "Ready",
            "hotplugVolume": {"attachPodUID": "p"},
            "persistentVolumeClaimInfo": {"claimName": "late", "accessModes": ["ReadWriteMany"]}}]);
    }
    serde_json::from_value(vmi).unwrap()
}

/// Hands the image to whoever comes to this socket of the pod's.
fn hand_over(pod: &Pod, socket: &str, image: &std::path::Path) -> std::thread::JoinHandle<()> {
    use std::os::fd::AsFd;
    let listener = std::os::unix::net::UnixListener::bind(Pod::paths(pod.folder.path()).sockets.join(socket)).unwrap();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(image).unwrap();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        godwit_launcher::descriptor::send(file.as_fd(), &stream).unwrap();
    })
}

#[tokio::test]
async fn a_disk_that_came_while_the_guest_ran_goes_along_and_can_be_taken_out_there() {
    let (source, target, without) = (Pod::start().await, Pod::start().await, Pod::start().await);
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let sockets = |name: &str| std::collections::BTreeMap::from([("late".to_owned(), name.to_owned())]);

    let order = DisksOrder { vmi: with_late_disk(None), sockets: sockets("late.sock") };
    assert_eq!(refusal(source.client.change_disks(&order).await), Refusal::Conflict, "no guest runs");
    source.client.start(&vm_order()).await.unwrap();
    let mut here = source.console().await;
    let mut story = Story::default();
    here.hear(&mut story, 2).await;
    let handed = hand_over(&source, "late.sock", image.path());
    let state = source.client.change_disks(&order).await.unwrap();
    handed.join().unwrap();
    let late = state.volumes.iter().find(|volume| volume.name == "late").unwrap();
    let place = late.place.expect("it came late");
    assert_eq!(late.size_bytes, Some(1 << 20));
    assert_eq!(source.client.change_disks(&order).await.unwrap().volumes, state.volumes, "once");

    // A target must have it, too.
    let vmi = with_late_disk(Some(&late.target));
    let order = TargetOrder { vmi: vmi.clone(), ..target_order() };
    let refused = without.client.prepare_target(&order).await.unwrap_err();
    assert_eq!(refused.refusal(), Some(Refusal::Invalid), "{refused}");
    let handed = hand_over(&target, "disk-0.sock", image.path());
    let order = TargetOrder { disk_sockets: sockets("disk-0.sock"), ..order };
    let ready = target.client.prepare_target(&order).await.unwrap();
    handed.join().unwrap();
    let mut there = target.console().await;
    let _carrier = moves(&source, &target, &ready.socket).await;
    here.drain(&mut story).await;
    there.hear(&mut story, 5).await;
    let state = target.client.state().await.unwrap();
    let came = state.volumes.iter().find(|volume| volume.name == "late").unwrap();
    assert_eq!((came.place, came.size_bytes), (Some(place), Some(1 << 20)));

    let order = DisksOrder { vmi: vm_order().vmi, sockets: Default::default() };
    let state = target.client.change_disks(&order).await.unwrap();
    assert!(state.volumes.iter().all(|volume| volume.name != "late"), "{state:?}");
    there.hear(&mut story, 2).await;
    // And again: its place is free.
    let handed = hand_over(&target, "again.sock", image.path());
    let order = DisksOrder { vmi, sockets: sockets("again.sock") };
    let state = target.client.change_disks(&order).await.unwrap();
    handed.join().unwrap();
    assert_eq!(state.volumes.iter().find_map(|volume| volume.place), Some(place));
}
