//! Disks that are copied: what of them, how, and with what they go together.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod place;

use godwit_guest_rom::{Parameters, Story};
use godwit_qemu::blocks::Blocks;
use godwit_qemu::instance::{Error, Incoming, Prelaunch, Running, Settled};
use godwit_qemu::machine::{Bus, Disk, Format, Machine};
use godwit_qemu::migration::Options;
use godwit_qemu::process::find_qemu_img;
use place::*;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

fn with_disk(place: &Place, end: &str, path: PathBuf, format: Format) -> Machine {
    let mut machine = place.machine(end);
    machine.disks.push(Disk { format, ..Disk::new("work", path, Bus::Virtio) });
    machine
}

/// Moves a guest with one disk from file `from` to file `to`; how many bytes there were to copy, its memory included.
async fn move_disk(place: &Place, from: PathBuf, to: PathBuf, format: Format, above_base: bool) -> u64 {
    let prelaunch = Prelaunch::launch(&qemu(), &with_disk(place, "source", from, format)).await.unwrap();
    let mut here = Console::open(&place.path("source-serial")).await;
    let source = prelaunch.start().await.unwrap();
    let mut story = Story::default();
    here.hear(&mut story, 2).await;
    let machine = with_disk(place, "target", to, format);
    let mut target = Incoming::launch(&qemu(), &machine, &place.path("flight")).await.unwrap();
    let mut there = Console::open(&place.path("target-serial")).await;
    let above_base = above_base.then_some(0).into_iter().collect();
    let blocks = Blocks { socket: place.path("blocks"), disks: vec![(0, "work".into())], above_base };
    target.offer_blocks(&blocks.socket, &blocks.disks).await.unwrap();
    let flight = source.migrate(&place.path("flight"), &Options::default(), Some(&blocks)).await;
    let departed = leave(flight.map_err(|e| e.1).unwrap()).await;
    let bytes = departed.facts().total_bytes;
    assert!(departed.facts().remaining_bytes < 2 * MIB, "all has gone: {:?}", departed.facts());
    let running = run(target).await;
    departed.qemu().quit().await;
    here.drain(&mut story).await;
    there.hear(&mut story, 3).await;
    running.qemu().quit().await;
    bytes
}

fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

fn sparse(path: &Path, bytes: u64) -> std::fs::File {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(bytes).unwrap();
    file
}

#[tokio::test]
async fn holes_stay_holes() {
    let place = Place::new(busy());
    let (from, to) = (place.path("from"), place.path("to"));
    let file = sparse(&from, 256 * MIB);
    for at in [0, 100 * MIB, 255 * MIB] {
        file.write_all_at(&vec![0xa5; MIB as usize], at).unwrap();
    }
    file.sync_all().unwrap();
    sparse(&to, 256 * MIB);
    move_disk(&place, from.clone(), to.clone(), Format::Raw, false).await;
    let (here, there) = (allocated(&from), allocated(&to));
    assert!(here >= 3 * MIB && there >= 3 * MIB, "{here} {there}");
    assert!(there <= here + MIB, "{here} bytes are allocated at the source and {there} at the target");
    assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
}

async fn run_tool(program: &Path, arguments: &[&str]) {
    let output = tokio::process::Command::new(program).args(arguments).output().await.unwrap();
    assert!(output.status.success(), "{program:?} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Two overlays over one base of 32 MiB, the source's with 2 MiB of its own.
async fn overlays(place: &Place, second_base: bool) -> (PathBuf, PathBuf) {
    let img = find_qemu_img().expect("these tests need qemu-img: `make deps` installs it");
    let bases = ["base", if second_base { "other-base" } else { "base" }].map(|name| place.path(name));
    for base in &bases {
        std::fs::write(base, vec![0x11; 32 * MIB as usize]).unwrap();
    }
    let overlays = ["from", "to"].map(|name| place.path(name));
    for (base, overlay) in bases.iter().zip(&overlays) {
        let (base, overlay) = (base.to_str().unwrap(), overlay.to_str().unwrap());
        run_tool(&img, &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, overlay]).await;
    }
    let write = ["-f", "qcow2", "-c", "write -q -P 0x77 5M 2M", overlays[0].to_str().unwrap()];
    run_tool(&img.with_file_name("qemu-io"), &write).await;
    let [from, to] = overlays;
    (from, to)
}

async fn same(one: &Path, two: &Path) {
    let img = find_qemu_img().unwrap();
    run_tool(&img, &["check", "-q", "-f", "qcow2", two.to_str().unwrap()]).await;
    run_tool(&img, &["compare", "-q", one.to_str().unwrap(), two.to_str().unwrap()]).await;
}

#[tokio::test]
async fn above_a_base_that_both_ends_have_only_what_was_written_is_copied() {
    let place = Place::new(busy());
    let (from, to) = overlays(&place, false).await;
    let bytes = move_disk(&place, from.clone(), to.clone(), Format::Qcow2, true).await;
    // 2 MiB of the disk and the memory.
    assert!(bytes < 24 * MIB, "{bytes} bytes were to be copied");
    assert!(allocated(&to) < 4 * MIB, "{} bytes of it are allocated", allocated(&to));
    same(&from, &to).await;
}

#[tokio::test]
async fn over_another_base_everything_is_copied() {
    let place = Place::new(busy());
    let (from, to) = overlays(&place, true).await;
    // What lies below is another one at the target.
    std::fs::write(place.path("other-base"), vec![0x22; 32 * MIB as usize]).unwrap();
    let bytes = move_disk(&place, from.clone(), to.clone(), Format::Qcow2, false).await;
    assert!(bytes >= 32 * MIB, "{bytes} bytes were to be copied");
    same(&from, &to).await;
}

#[tokio::test]
async fn with_disks_under_way_there_is_no_post_copy() {
    let place = Place::new(busy());
    let (from, to) = (place.path("from"), place.path("to"));
    sparse(&from, 4 * MIB);
    sparse(&to, 4 * MIB);
    let machine = with_disk(&place, "source", from, Format::Raw);
    let source = Prelaunch::launch(&qemu(), &machine).await.unwrap().start().await.unwrap();
    let machine = with_disk(&place, "target", to, Format::Raw);
    let mut target = Incoming::launch_for(&qemu(), &machine, &place.path("flight"), true).await.unwrap();
    let blocks = Blocks { socket: place.path("blocks"), disks: vec![(0, "work".into())], ..Blocks::default() };
    target.offer_blocks(&blocks.socket, &blocks.disks).await.unwrap();
    let options = Options { bandwidth: Some(100_000), post_copy: true, ..Options::default() };
    let flight = source.migrate(&place.path("flight"), &options, Some(&blocks)).await;
    let mut outgoing = flight.map_err(|e| e.1).unwrap();
    let refused = outgoing.switch_to_post_copy().await.unwrap_err();
    assert!(matches!(refused, Error::Unsupported(why) if why.contains("disks")), "{refused}");
    outgoing.cancel().await.unwrap();
    follow(&mut outgoing).await;
    let Settled::Stays(source, _) = outgoing.settle().await else { panic!("it should have stayed") };
    source.qemu().quit().await;
    target.qemu().process().kill().await;
}

/// A link of a MiB or so a second between a mirror and its target, at the socket that this returns.
fn narrow(place: &Place, target: &Path) -> PathBuf {
    let (here, target) = (place.path("narrow"), target.to_owned());
    let listener = tokio::net::UnixListener::bind(&here).unwrap();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let far = tokio::net::UnixStream::connect(&target).await.unwrap();
            let ((mut near_in, mut near_out), (mut far_in, mut far_out)) = (near.into_split(), far.into_split());
            tokio::spawn(async move { tokio::io::copy(&mut far_in, &mut near_out).await });
            tokio::spawn(async move {
                let mut piece = vec![0; 16 << 10];
                loop {
                    let length = tokio::io::AsyncReadExt::read(&mut near_in, &mut piece).await.unwrap_or(0);
                    if length == 0 {
                        return;
                    }
                    tokio::time::sleep(std::time::Duration::from_millis(16)).await;
                    if tokio::io::AsyncWriteExt::write_all(&mut far_out, &piece[..length]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    here
}

/// A guest that writes all over its disk, and a target that waits for it and its disk.
struct Writing {
    place: Place,
    source: Running,
    target: Incoming,
    here: Console,
    there: Console,
    story: Story,
}

impl Writing {
    /// After `beats` beats of the guest.
    async fn start(beats: u32) -> Writing {
        let place = Place::new(Parameters { disk_blocks: 64, disk_stride: 16, ..Parameters::default() });
        let (from, to) = (place.path("from"), place.path("to"));
        for path in [&from, &to] {
            std::fs::File::create(path).unwrap().set_len(8 * MIB).unwrap();
        }
        let prelaunch = Prelaunch::launch(&qemu(), &with_disk(&place, "source", from, Format::Raw)).await.unwrap();
        let mut here = Console::open(&place.path("source-serial")).await;
        let source = prelaunch.start().await.unwrap();
        let mut story = Story::default();
        here.hear(&mut story, beats).await;
        let machine = with_disk(&place, "target", to, Format::Raw);
        let mut target = Incoming::launch(&qemu(), &machine, &place.path("flight")).await.unwrap();
        let there = Console::open(&place.path("target-serial")).await;
        target.offer_blocks(&place.path("blocks"), &[(0, "work".into())]).await.unwrap();
        Writing { place, source, target, here, there, story }
    }
}

/// It dirties 64 pieces of 64 KiB, the mirror's granularity, faster than these 4 MiB go over the link: it would never be done.
#[tokio::test]
async fn a_guest_that_writes_faster_than_its_disk_is_copied_waits_for_its_writes_with_auto_converge() {
    let Writing { place, source, target, mut here, mut there, mut story } = Writing::start(20).await;
    let socket = narrow(&place, &place.path("blocks"));
    let blocks = Blocks { socket, disks: vec![(0, "work".into())], ..Blocks::default() };
    let options = Options { auto_converge: true, ..Options::default() };
    let flight = source.migrate(&place.path("flight"), &options, Some(&blocks)).await;
    let departed = leave(flight.map_err(|e| e.1).unwrap()).await;
    let running = run(target).await;
    departed.qemu().quit().await;
    here.drain(&mut story).await;
    there.hear(&mut story, 20).await;
    assert_eq!(story.complaint(), None);
    running.qemu().quit().await;
}

/// A link that takes what a mirror has in flight and never answers, until it is broken off.
#[tokio::test]
async fn a_copy_that_was_given_up_over_a_link_that_hangs_is_in_no_later_ones_way() {
    let Writing { place, source, target, mut here, mut there, mut story } = Writing::start(10).await;

    let listener = tokio::net::UnixListener::bind(place.path("hangs")).unwrap();
    let (far, hung) = (place.path("blocks"), std::sync::Arc::new(tokio::sync::Notify::new()));
    let hangs = hung.clone();
    let link = tokio::spawn(async move {
        let (near, _) = listener.accept().await.unwrap();
        let far = tokio::net::UnixStream::connect(far).await.unwrap();
        let ((mut near_in, mut near_out), (mut far_in, mut far_out)) = (near.into_split(), far.into_split());
        let answers = async move { tokio::io::copy(&mut far_in, &mut near_out).await };
        let asks = async move {
            // The greeting and a little of the disk.
            let mut first = tokio::io::AsyncReadExt::take(&mut near_in, 100 << 10);
            tokio::io::copy(&mut first, &mut far_out).await.unwrap();
            hangs.notify_one();
            std::future::pending::<()>().await;
        };
        tokio::join!(answers, asks)
    });
    let blocks =
        |socket: &str| Blocks { socket: place.path(socket), disks: vec![(0, "work".into())], ..Blocks::default() };
    let flight = source.migrate(&place.path("flight"), &Options::default(), Some(&blocks("hangs"))).await;
    let mut outgoing = flight.map_err(|e| e.1).unwrap();
    hung.notified().await;
    outgoing.cancel().await.unwrap();
    let Settled::Stays(source, _) = outgoing.settle().await else { panic!("it has not begun") };
    link.abort();
    here.hear(&mut story, 3).await;

    let flight = source.migrate(&place.path("flight"), &Options::default(), Some(&blocks("blocks"))).await;
    let departed = leave(flight.map_err(|e| e.1).unwrap()).await;
    let running = run(target).await;
    departed.qemu().quit().await;
    here.drain(&mut story).await;
    there.hear(&mut story, 20).await;
    assert_eq!(story.complaint(), None);
    running.qemu().quit().await;
}
