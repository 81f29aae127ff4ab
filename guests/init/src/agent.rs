//! The part of the QEMU guest agent's protocol that a control plane needs to know a guest: addresses, names, power-off.
//! (https://qemu.readthedocs.io/en/latest/interop/qemu-ga-ref.html)

use nix::ifaddrs::getifaddrs;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::time::Duration;

const PORT_NAME: &str = "org.qemu.guest_agent.0";

/// Serves the agent channel for ever; without one, returns.
///
/// The port stays open all the time, as qemu-ga's does: closing it would tell the host that the agent is gone. While nobody
/// is at the other end, reads end at once.
pub fn serve(hostname: &str) {
    let Some(path) = find_port() else { return };
    let Ok(mut port) = OpenOptions::new().read(true).write(true).open(&path) else { return };
    let mut pending = Vec::new();
    let mut chunk = [0_u8; 4096];
    loop {
        match port.read(&mut chunk) {
            Ok(length) if length > 0 => pending.extend_from_slice(chunk.get(..length).unwrap_or_default()),
            _ => std::thread::sleep(Duration::from_millis(100)),
        }
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            answer(&line, hostname, &mut port);
        }
    }
}

/// Runs QEMU's guest agent, and again when it ends.
pub fn run_qemus() {
    let Some(path) = find_port() else { return };
    loop {
        let started = std::process::Command::new("/bin/qemu-ga")
            .args(["--method=virtio-serial", "--path", &path, "--statedir=/tmp", "--pidfile=/tmp/qemu-ga.pid"])
            .spawn();
        // The reaper of process 1 may collect it first: any end is an end.
        let ended = started.and_then(|mut child| child.wait());
        println!("qemu-ga: {ended:?}");
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn find_port() -> Option<String> {
    for _ in 0..25 {
        for entry in std::fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            let name = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim() == PORT_NAME {
                return Some(format!("/dev/{}", entry.file_name().to_string_lossy()));
            }
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    None
}

fn answer(line: &[u8], hostname: &str, out: &mut impl Write) {
    // guest-sync-delimited is preceded by 0xFF so that a parser can find its way back.
    let text: Vec<u8> = line.iter().copied().filter(|byte| *byte != 0xFF).collect();
    let Ok(request) = serde_json::from_slice::<Value>(&text) else { return };
    let command = request["execute"].as_str().unwrap_or_default();
    let reply = match command {
        "guest-sync" | "guest-sync-delimited" => json!({"return": request["arguments"]["id"]}),
        "guest-ping" => json!({"return": {}}),
        "guest-info" => json!({"return": {"version": env!("CARGO_PKG_VERSION"), "supported_commands": supported()}}),
        "guest-get-host-name" => json!({"return": {"host-name": hostname}}),
        "guest-network-get-interfaces" => json!({"return": interfaces()}),
        "guest-get-osinfo" => json!({"return": os_info()}),
        "guest-get-timezone" => json!({"return": {"zone": "UTC", "offset": 0}}),
        "guest-get-users" | "guest-get-fsinfo" => json!({"return": []}),
        "guest-set-time" => set_time(&request["arguments"]["time"]),
        "guest-shutdown" => {
            match request["arguments"]["mode"].as_str() {
                Some("reboot") => crate::boot::start_over(),
                _ => crate::boot::power_off(),
            }
            return;
        }
        other => {
            json!({"error": {"class": "CommandNotFound", "desc": format!("The command {other} has not been found")}})
        }
    };
    let mut bytes = reply.to_string().into_bytes();
    bytes.push(b'\n');
    if command == "guest-sync-delimited" {
        bytes.insert(0, 0xFF);
    }
    let _ = out.write_all(&bytes);
}

/// Nanoseconds since the epoch, as the host has them.
fn set_time(nanoseconds: &Value) -> Value {
    let Some(time) = nanoseconds.as_i64() else {
        return json!({"error": {"class": "GenericError", "desc": "time is missing"}});
    };
    let time = TimeSpec::new(time.div_euclid(1_000_000_000), time.rem_euclid(1_000_000_000));
    match clock_settime(ClockId::CLOCK_REALTIME, time) {
        Ok(()) => json!({"return": {}}),
        Err(error) => json!({"error": {"class": "GenericError", "desc": error.to_string()}}),
    }
}

fn supported() -> Value {
    [
        "guest-sync",
        "guest-sync-delimited",
        "guest-ping",
        "guest-info",
        "guest-get-host-name",
        "guest-network-get-interfaces",
        "guest-get-osinfo",
        "guest-get-timezone",
        "guest-get-users",
        "guest-get-fsinfo",
        "guest-set-time",
        "guest-shutdown",
    ]
    .iter()
    .map(|name| json!({"name": name, "enabled": true, "success-response": *name != "guest-shutdown"}))
    .collect()
}

fn os_info() -> Value {
    let Ok(system) = nix::sys::utsname::uname() else { return json!({}) };
    json!({
        "id": "godwit", "name": "Godwit demo guest", "pretty-name": "Godwit demo guest",
        "version": env!("CARGO_PKG_VERSION"), "version-id": env!("CARGO_PKG_VERSION"),
        "kernel-release": system.release().to_string_lossy(), "kernel-version": system.version().to_string_lossy(),
        "machine": system.machine().to_string_lossy(),
    })
}

fn interfaces() -> Value {
    let mut found: BTreeMap<String, (String, Vec<Value>)> = BTreeMap::new();
    for item in getifaddrs().into_iter().flatten() {
        let entry = found.entry(item.interface_name.clone()).or_default();
        let Some(address) = item.address else { continue };
        let bits = |octets: &[u8]| octets.iter().map(|o| o.count_ones()).sum::<u32>();
        if let Some(ip) = address.as_sockaddr_in() {
            let prefix = item.netmask.and_then(|m| m.as_sockaddr_in().map(|m| bits(&m.ip().octets()))).unwrap_or(32);
            entry.1.push(json!({"ip-address": ip.ip().to_string(), "ip-address-type": "ipv4", "prefix": prefix}));
        } else if let Some(ip) = address.as_sockaddr_in6() {
            let prefix = item.netmask.and_then(|m| m.as_sockaddr_in6().map(|m| bits(&m.ip().octets()))).unwrap_or(128);
            entry.1.push(json!({"ip-address": ip.ip().to_string(), "ip-address-type": "ipv6", "prefix": prefix}));
        } else if let Some(mac) = address.as_link_addr().and_then(nix::sys::socket::LinkAddr::addr) {
            entry.0 = mac.map(|octet| format!("{octet:02x}")).join(":");
        }
    }
    found
        .into_iter()
        .map(|(name, (mac, addresses))| json!({"name": name, "hardware-address": mac, "ip-addresses": addresses}))
        .collect()
}
