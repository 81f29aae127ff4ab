//! A folder with the ROM guest and its QEMUs.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(dead_code, reason = "each of the tests uses a part of it")]

use godwit_guest_rom::{Parameters, Story};
use godwit_qemu::instance::{Arrived, Departed, Filling, Incoming, Outgoing, Prelaunch, Running, Serving, Settled};
use godwit_qemu::machine::{Boot, Machine};
use godwit_qemu::migration::Facts;
use godwit_qemu::process::find_qemu;
use godwit_qemu::qmp::commands::MigrationStatus;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixStream;

/// Generous: the machine is busy, and only a hang shall fail.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn qemu() -> PathBuf {
    find_qemu().expect("these tests need qemu-system-x86_64: `make deps` installs it")
}

/// A folder for one guest; everything in it goes with it. QEMU goes with its handle.
pub struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    pub fn new(parameters: Parameters) -> Place {
        let place = Place { folder: tempfile::tempdir().unwrap() };
        std::fs::write(place.path("rom"), godwit_guest_rom::image(parameters)).unwrap();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn machine(&self, end: &str) -> Machine {
        let mut machine = Machine::new(self.path(&format!("{end}-qmp")), 16, Boot::Rom(self.path("rom")));
        machine.serial = Some(self.path(&format!("{end}-serial")));
        machine
    }

    pub async fn source(&self) -> (Running, Console) {
        let prelaunch = Prelaunch::launch(&qemu(), &self.machine("source")).await.unwrap();
        let console = Console::open(&self.path("source-serial")).await;
        (prelaunch.start().await.unwrap(), console)
    }

    pub async fn target(&self) -> (Incoming, Console) {
        let incoming = Incoming::launch(&qemu(), &self.machine("target"), &self.path("flight")).await.unwrap();
        let console = Console::open(&self.path("target-serial")).await;
        (incoming, console)
    }
}

pub struct Console {
    lines: tokio::io::Lines<BufReader<UnixStream>>,
}

impl Console {
    pub async fn open(path: &Path) -> Console {
        Console { lines: BufReader::new(UnixStream::connect(path).await.unwrap()).lines() }
    }

    /// Listens until `beats` more beats have been heard.
    pub async fn hear(&mut self, story: &mut Story, beats: u32) {
        let goal = story.beats() + beats;
        let work = async {
            while story.beats() < goal {
                let line = self.lines.next_line().await.unwrap().expect("the console has ended");
                story.hear(&line);
            }
        };
        tokio::time::timeout(PATIENCE, work).await.expect("the guest does not beat");
        assert_eq!(story.complaint(), None);
    }

    /// Listens until the guest says that something is wrong.
    pub async fn complaint(&mut self, story: &mut Story) -> String {
        let work = async {
            loop {
                if let Some(complaint) = story.complaint() {
                    return complaint.to_owned();
                }
                let line = self.lines.next_line().await.unwrap().expect("the console has ended");
                story.hear(&line);
            }
        };
        tokio::time::timeout(PATIENCE, work).await.expect("the guest does not complain")
    }

    /// Takes what is there already, to its end (after QEMU's).
    pub async fn drain(&mut self, story: &mut Story) {
        while let Ok(Some(line)) = self.lines.next_line().await {
            story.hear(&line);
        }
        assert_eq!(story.complaint(), None);
    }
}

/// Follows the migration to QEMU's last word.
pub async fn follow(outgoing: &mut Outgoing) {
    let mut events = outgoing.qemu().subscribe();
    let work = async {
        while !outgoing.facts().is_final() {
            tokio::select! {
                event = events.next() => outgoing.event(&event.expect("QEMU has ended")),
                () = tokio::time::sleep(Duration::from_millis(20)) => outgoing.look().await.unwrap(),
            }
        }
    };
    tokio::time::timeout(PATIENCE, work).await.expect("the migration does not end");
}

/// Waits until QEMU says that it sends.
pub async fn active(outgoing: &mut Outgoing) {
    let mut events = outgoing.qemu().subscribe();
    while outgoing.facts().status != MigrationStatus::Active {
        outgoing.event(&events.next().await.unwrap());
    }
}

/// Follows the migration until the guest has left.
pub async fn leave(mut outgoing: Outgoing) -> Departed {
    follow(&mut outgoing).await;
    let Settled::Departed(departed) = outgoing.settle().await else { panic!("it did not leave") };
    departed
}

/// Waits until the guest has left with the switch to post-copy.
pub async fn hand_over(mut outgoing: Outgoing) -> Serving {
    let work = async {
        loop {
            outgoing = match outgoing.hand_over().await {
                Ok(serving) => return serving,
                Err(outgoing) => *outgoing,
            };
            assert!(!outgoing.facts().is_final(), "{:?}", outgoing.facts());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, work).await.expect("it never goes over to post-copy")
}

/// What a go brings in post-copy, as long as memory is missing.
pub fn filling(arrived: Arrived) -> Filling {
    match arrived {
        Arrived::Filling(filling) => filling,
        Arrived::Whole(..) => panic!("a part of its memory should be missing"),
    }
}

/// Waits until all of the guest's memory has come; what is known then.
pub async fn fill(mut filling: Filling) -> (Running, Facts) {
    let work = async {
        loop {
            filling.look().await.unwrap();
            let facts = filling.facts().clone();
            filling = match filling.settle() {
                Ok(running) => return (running, facts),
                Err(filling) => *filling,
            };
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, work).await.expect("its memory never comes")
}

/// Waits until all of the guest's memory has been sent.
pub async fn serve(mut serving: Serving) -> Departed {
    let work = async {
        loop {
            serving.look().await.unwrap();
            serving = match serving.settle() {
                Ok(departed) => return departed,
                Err(serving) => *serving,
            };
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, work).await.expect("its memory is never sent")
}

/// A guest that writes to nearly all of its memory, again and again, and verifies each page when it comes back to it.
pub fn writer() -> Parameters {
    Parameters { token: 0xf11, pages_per_tick: 20, last: 0xd0_0000, ..Parameters::default() }
}

pub fn busy() -> Parameters {
    Parameters { token: 0xfeed, pages_per_tick: 50, ..Parameters::default() }
}

/// The guest after a go that had everything.
pub async fn run(target: Incoming) -> Running {
    match target.go(false).await.map_err(|e| e.error).unwrap() {
        Arrived::Whole(running, _) => running,
        Arrived::Filling(_) => panic!("a part of its memory is missing"),
    }
}
