//! A heartbeat for whoever measures how long the guest stands still: numbered datagrams at fixed times.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

/// Sends `TOKEN NUMBER` to `to`, for ever.
pub fn beat(to: SocketAddrV4, every: Duration, token: &str) {
    let socket = loop {
        match UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)) {
            Ok(socket) => break socket,
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    };
    let mut due = Instant::now();
    for number in 0_u64.. {
        // One that cannot be sent is one that the witness misses.
        let _ = socket.send_to(format!("{token} {number}").as_bytes(), to);
        // A late one is not made good by a burst: that would hide how late it was.
        due = (due + every).max(Instant::now());
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}
