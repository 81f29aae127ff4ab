//! Memory over several connections, plain and compressed, on a real QEMU.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod place;

use godwit_guest_rom::Story;
use godwit_qemu::instance::{Incoming, Prelaunch, Settled};
use godwit_qemu::machine::Machine;
use godwit_qemu::migration::Options;
use godwit_qemu::qmp::commands::MigrationStatus;
use godwit_qemu::transport::Transport;
use nix::sys::socket::{Backlog, listen};
use place::*;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::copy_bidirectional;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

const PLAIN: Transport = Transport { channels: 2, zstd: false, preempt: false };
const ZSTD: Transport = Transport { channels: 2, zstd: true, preempt: false };

/// Carries the connections to `to` as handlers do, and counts them.
fn carry(from: PathBuf, to: PathBuf, count: Arc<AtomicUsize>) -> JoinHandle<()> {
    let listener = UnixListener::bind(from).unwrap();
    tokio::spawn(async move {
        while let Ok((mut here, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::Relaxed);
            // QEMU reads what a new connection says first, and nothing else meanwhile.
            here.readable().await.unwrap();
            let mut there = UnixStream::connect(&to).await.unwrap();
            tokio::spawn(async move { copy_bidirectional(&mut here, &mut there).await });
        }
    })
}

/// A second version to move to and fro, started first with the older one; the same when none is named.
fn other() -> PathBuf {
    std::env::var_os("GODWIT_QEMU_OTHER").map_or_else(qemu, PathBuf::from)
}

fn with_balloon(mut machine: Machine) -> Machine {
    machine.balloon = true;
    machine.free_page_hint = true;
    machine
}

/// Moves a writing guest on and on; none of its pages may be lost.
async fn moves(transport: Transport, bandwidth: Option<u64>, rounds: usize) {
    let place = Place::new(writer());
    let prelaunch = Prelaunch::launch(&qemu(), &with_balloon(place.machine("source"))).await.unwrap();
    let mut here = Console::open(&place.path("source-serial")).await;
    let mut running = prelaunch.start().await.unwrap();
    assert!(running.qemu().ability().channels >= 2 && running.qemu().ability().zstd, "{:?}", running.qemu().ability());
    let mut story = Story::default();
    // Once through its memory, so that all of it is there to lose.
    here.hear(&mut story, 20).await;
    for round in 0..rounds {
        let end = format!("round{round}");
        let socket = place.path(&end);
        let mut machine = with_balloon(place.machine(&end));
        machine.machine_type = running.qemu().machine_type().to_owned();
        let program = if round % 2 == 0 { other() } else { qemu() };
        let mut incoming = Incoming::prepare(&program, &machine, &socket, false).await.unwrap();
        let mut there = Console::open(&place.path(&format!("{end}-serial"))).await;
        assert!(UnixStream::connect(&socket).await.is_err(), "nobody can connect before it is agreed how");
        assert_eq!(incoming.listen(transport).await.unwrap(), transport);
        assert_eq!(incoming.listen(Transport::default()).await.unwrap(), transport, "the first stands");
        let out = place.path(&format!("{end}-out"));
        let count = Arc::new(AtomicUsize::new(0));
        let carrier = carry(out.clone(), socket, count.clone());
        let options = Options { bandwidth, transport, ..Options::default() };
        let outgoing = running.migrate(&out, &options, None).await.map_err(|e| e.1).unwrap();
        let departed = leave(outgoing).await;
        assert_eq!(departed.facts().status, MigrationStatus::Completed);
        eprintln!("{transport:?} {:?} ms, {} bytes", departed.facts().total_ms, departed.facts().sent_bytes);
        running = run(incoming).await;
        departed.qemu().quit().await;
        carrier.abort();
        assert_eq!(count.load(Ordering::Relaxed), transport.connections());
        here.drain(&mut story).await;
        // Once and a half through its memory.
        there.hear(&mut story, 30).await;
        here = there;
    }
    running.qemu().quit().await;
}

#[tokio::test]
async fn over_several_connections_no_page_is_lost() {
    moves(PLAIN, None, 3).await;
}

#[tokio::test]
async fn compressed_no_page_is_lost() {
    moves(ZSTD, Some(8 << 20), 3).await;
}

#[tokio::test]
async fn a_guest_comes_back_to_one_connection() {
    let place = Place::new(writer());
    let (source, mut here) = place.source().await;
    let mut story = Story::default();
    here.hear(&mut story, 20).await;
    let mut first = Incoming::prepare(&qemu(), &place.machine("first"), &place.path("first"), false).await.unwrap();
    first.listen(ZSTD).await.unwrap();
    let mut there = Console::open(&place.path("first-serial")).await;
    let options = Options { transport: ZSTD, ..Options::default() };
    let outgoing = source.migrate(&place.path("first"), &options, None).await.map_err(|e| e.1).unwrap();
    let departed = leave(outgoing).await;
    let running = run(first).await;
    departed.qemu().quit().await;
    here.drain(&mut story).await;
    // What it was told as a target does not bind it as a source.
    let (second, mut last) = place.target().await;
    let outgoing = running.migrate(&place.path("flight"), &Options::default(), None).await.map_err(|e| e.1).unwrap();
    let departed = leave(outgoing).await;
    let running = run(second).await;
    departed.qemu().quit().await;
    there.drain(&mut story).await;
    last.hear(&mut story, 30).await;
    running.qemu().quit().await;
}

#[tokio::test]
async fn a_guest_is_not_held_for_ever_for_connections_that_do_not_come_about() {
    let place = Place::new(writer());
    let (source, mut here) = place.source().await;
    let mut story = Story::default();
    here.hear(&mut story, 2).await;
    // Takes two connections into its backlog and accepts none: the third is waited for.
    let listener = UnixListener::bind(place.path("nobody")).unwrap();
    listen(&listener, Backlog::new(1).unwrap()).unwrap();
    let options = Options { transport: PLAIN, ..Options::default() };
    let mut outgoing = source.migrate(&place.path("nobody"), &options, None).await.map_err(|e| e.1).unwrap();
    // Where writes are not seen it was held, and must not run on in a migration that has not begun to see them.
    let given_up = outgoing.facts().error.clone();
    assert_eq!(given_up.is_some(), !outgoing.qemu().tracks_writes(), "{given_up:?}");
    here.hear(&mut story, 3).await;
    outgoing.cancel().await.unwrap();
    drop(listener);
    follow(&mut outgoing).await;
    let Settled::Stays(source, _) = outgoing.settle().await else { panic!("it should have stayed") };
    here.hear(&mut story, 3).await;
    source.qemu().quit().await;
}

#[tokio::test]
async fn a_target_that_dies_leaves_the_guest_where_it_was() {
    let place = Place::new(writer());
    let (source, mut here) = place.source().await;
    let mut story = Story::default();
    here.hear(&mut story, 20).await;
    let mut target = Incoming::prepare(&qemu(), &place.machine("target"), &place.path("flight"), false).await.unwrap();
    target.listen(PLAIN).await.unwrap();
    let options = Options { transport: PLAIN, bandwidth: Some(100_000), ..Options::default() };
    let mut outgoing = source.migrate(&place.path("flight"), &options, None).await.map_err(|e| e.1).unwrap();
    active(&mut outgoing).await;
    target.qemu().process().kill().await;
    follow(&mut outgoing).await;
    assert_eq!(outgoing.facts().status, MigrationStatus::Failed);
    let Settled::Stays(source, _) = outgoing.settle().await else { panic!("it should have stayed") };
    here.hear(&mut story, 25).await;
    source.qemu().quit().await;
}
