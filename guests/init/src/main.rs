//! Process 1 of the demo guest. It is all that runs there: it loads the virtio drivers, gives `eth0` its address,
//! fills memory with a pattern that it verifies for ever, beats once a second on the console, answers HTTP with the
//! same facts on port 80, echoes on port 7, and speaks enough of the QEMU guest agent's protocol to report its addresses.
//!
//! Kernel command line: `godwit.ip=ADDR/PREFIX`, `godwit.gw=ADDR`, `godwit.hostname=NAME`, `godwit.wss=MiB` (memory kept
//! and verified, default 16), `godwit.dirty=MiB/s` (rate of rewriting it, default 1), `godwit.witness=ADDR:PORT` (send a
//! numbered datagram there every `godwit.witness-us` microseconds, default 2000), `godwit.disks=NAME,…` (write to the first
//! 4 MiB of these disks all the time, and verify them; `GET /verify` reads all of it back), `godwit.ports=PORT,…` (where it
//! answers HTTP, default 80), `godwit.agent=qemu|none` (QEMU's own guest agent in the place of ours, where it is on board, or
//! no agent at all), `godwit.mount=NAME` (mounts this CD at `/mnt`).
//!
//! `GET /hardware` says what the guest is made of, `GET /lag` puts its clock back by an hour first, `GET /keep` writes to
//! its TPM and its EFI variables first.

mod agent;
mod beat;
mod boot;
mod disk;
mod echo;
mod hardware;
mod memory;
mod net;
mod witness;

use std::thread;

fn main() {
    boot::mount_all();
    let options = boot::Options::from_command_line();
    boot::load_modules();
    boot::set_hostname(&options.hostname);
    if let Err(error) = net::configure(&options) {
        println!("net: {error}");
    }
    let memory = memory::start(options.working_set_mib, options.dirty_mib_per_second);
    let mut facts = beat::Facts::new(options.hostname.clone(), memory);
    facts.write_to(&options.disks);
    hardware::mark(facts.token());
    for port in options.ports {
        let served = facts.clone();
        thread::spawn(move || beat::serve(&served, port));
    }
    thread::spawn(echo::serve);
    if let Some(to) = options.witness {
        let token = facts.token().to_owned();
        thread::spawn(move || witness::beat(to, options.witness_every, &token));
    }
    if let Some(cd) = options.mount {
        thread::spawn(move || boot::mount_cd(&cd));
    }
    let hostname = options.hostname;
    match options.agent {
        boot::Agent::Own => drop(thread::spawn(move || agent::serve(&hostname))),
        boot::Agent::Qemus => drop(thread::spawn(agent::run_qemus)),
        boot::Agent::None => {}
    }
    thread::spawn(boot::power_button);
    thread::spawn(boot::reap);
    beat::forever(&facts);
}
