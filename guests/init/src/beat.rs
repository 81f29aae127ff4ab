//! The guest's sign of life: one line a second on the console and the same facts as JSON on port 80.

use crate::disk::Disk;
use crate::hardware;
use crate::memory::Memory;
use nix::time::{ClockId, clock_gettime};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// By how much `/lag` puts the clock back.
const LAG_SECONDS: i64 = 3600;

/// What the guest says of itself.
#[derive(Clone)]
pub struct Facts {
    hostname: String,
    /// Random, made once at boot: another token is another life.
    token: String,
    beats: Arc<AtomicU64>,
    memory: Arc<Memory>,
    disks: Vec<Arc<Disk>>,
}

impl Facts {
    /// Facts of a guest that has just booted.
    pub fn new(hostname: String, memory: Arc<Memory>) -> Self {
        let token = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self { hostname, token: token.trim().to_owned(), beats: Arc::default(), memory, disks: Vec::new() }
    }

    /// Begins to write to these disks.
    pub fn write_to(&mut self, names: &[String]) {
        self.disks = names.iter().map(|name| Disk::start(name, &self.token)).collect();
    }

    /// Names this life of the guest.
    pub fn token(&self) -> &str {
        &self.token
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "hostname": self.hostname,
            "token": self.token,
            "beat": self.beats.load(Ordering::Acquire),
            "uptimeMilliseconds": uptime_ms(),
            "checksum": format!("{:016x}", self.memory.checksum.load(Ordering::Acquire)),
            "verifiedPages": self.memory.verified.load(Ordering::Acquire),
            "corruptPages": self.memory.corrupt.load(Ordering::Acquire),
            "disks": self.disks.iter().map(|disk| disk.json()).collect::<Vec<_>>(),
        })
    }

    /// The same, after every block of the disks was read back.
    fn verified(&self) -> serde_json::Value {
        let disks: Vec<_> = self.disks.iter().map(|disk| disk.verify_all()).collect();
        let mut facts = self.json();
        facts["disks"] = disks.into();
        facts
    }
}

fn uptime_ms() -> i64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(|t| t.tv_sec() * 1000 + t.tv_nsec() / 1_000_000).unwrap_or(0)
}

/// Beats once a second, for ever.
pub fn forever(facts: &Facts) -> ! {
    loop {
        println!("beat {}", facts.json());
        let _ = std::io::stdout().flush();
        std::thread::sleep(Duration::from_secs(1));
        facts.beats.fetch_add(1, Ordering::AcqRel);
    }
}

/// Answers every HTTP request with the facts; one for `/verify` after all blocks of the disks were read back, one for
/// `/hardware` with what the guest is made of, one for `/lag` with the same after its clock was put back by an hour, and one for
/// `/keep` with the same after the token and the number of beats were written to where they outlive the guest.
pub fn serve(facts: &Facts, port: u16) {
    let listener = loop {
        match TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)) {
            Ok(listener) => break listener,
            Err(_) => std::thread::sleep(Duration::from_millis(500)),
        }
    };
    for mut stream in listener.incoming().flatten() {
        let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
        let mut request = [0_u8; 2048];
        let length = stream.read(&mut request).unwrap_or(0);
        let asked = request.get(..length).unwrap_or_default();
        let body = match asked.split(|byte| *byte == b' ').nth(1) {
            Some(b"/verify") => facts.verified(),
            Some(b"/hardware") => hardware::json(),
            Some(b"/lag") => {
                if let Err(error) = hardware::lag(LAG_SECONDS) {
                    println!("clock: {error}");
                }
                hardware::json()
            }
            Some(b"/keep") => {
                hardware::keep(&format!("{} {}", facts.token(), facts.beats.load(Ordering::Acquire)));
                hardware::json()
            }
            _ => facts.json(),
        }
        .to_string();
        let _ = write!(
            stream,
            "HTTP/1.0 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
    }
}
