//! QEMU driven by hand: what a person with a monitor would type, and nothing of ours in between.

use super::certificates::Authority;
use super::figures::Moved;
use super::lab::{GUEST_MAC, GUEST_UUID, Lab, TAP, Workload, command_in};
use super::monitor::Monitor;
use super::{Bandwidth, Error, now_us};
use godwit_network::Namespace;
use godwit_qemu::accelerator::Accelerator;
use godwit_qemu::machine::{Boot, Machine, Nic};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::Child;

/// Where a target listens.
const PORT: u16 = 4444;
/// How often the numbers are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(25);
/// How long a QEMU may take to end when it is told to, and a cancelled migration to be over.
const PATIENCE: Duration = Duration::from_secs(10);
/// "Unlimited": QEMU knows no such word.
const UNLIMITED: u64 = 1 << 40;
/// As many as half the cores of the machine that the reference was measured on.
const CHANNELS: u64 = 2;
/// Milliseconds.
const DOWNTIME_LIMIT: u64 = 20;

/// How it is driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// QEMU's defaults: one stream, at most 128 MiB/s, at most 300 ms of standstill, no return path; the target starts the guest
    /// by itself. A cap is the one parameter that is set, when the line has one.
    Defaults,
    /// The best parameters known (reference A1): two multifd channels, a downtime limit of 20 ms, no cap but the line's, the
    /// return path; the target is started with `-S` and continued when the source says `completed`.
    Best,
    /// The same, and QEMU encrypts each of its connections: TLS with certificates for both ends (`tls-creds-x509`).
    Tls,
}

impl Style {
    fn capabilities(self) -> &'static [&'static str] {
        match self {
            // Only events, without which nothing could be measured.
            Style::Defaults => &["events"],
            Style::Best | Style::Tls => &["events", "return-path", "multifd"],
        }
    }

    /// The target waits for `cont`.
    fn holds(self) -> bool {
        self != Style::Defaults
    }

    /// What both ends have to be told before they connect. `end`: "server" (the target) or "client".
    async fn prepare(self, monitor: &mut Monitor, certificates: &Path, end: &str) -> Result<(), Error> {
        monitor.capabilities(self.capabilities()).await?;
        if self.holds() {
            monitor.execute("migrate-set-parameters", json!({"multifd-channels": CHANNELS})).await?;
        }
        if self == Style::Tls {
            let id = format!("tls-{end}");
            let object = json!({
                "qom-type": "tls-creds-x509", "id": id, "endpoint": end, "dir": certificates, "verify-peer": true,
            });
            monitor.execute("object-add", object).await?;
            monitor.execute("migrate-set-parameters", json!({"tls-creds": id})).await?;
        }
        Ok(())
    }

    fn parameters(self, bandwidth: Bandwidth) -> Option<Value> {
        match (self, bandwidth.bytes()) {
            (Style::Defaults, None) => None,
            (Style::Defaults, Some(cap)) => Some(json!({"max-bandwidth": cap})),
            (Style::Best | Style::Tls, cap) => {
                Some(json!({"max-bandwidth": cap.unwrap_or(UNLIMITED), "downtime-limit": DOWNTIME_LIMIT}))
            }
        }
    }
}

/// What a bare guest is made of.
#[derive(Clone, Debug)]
pub struct Parts {
    /// QEMU.
    pub program: PathBuf,
    /// KVM or TCG: the same as a node would take.
    pub accelerator: Accelerator,
    /// Folder with `vmlinuz` and `initrd`.
    pub guest: PathBuf,
}

/// A running guest that no pod holds.
#[derive(Debug)]
pub struct Bare {
    parts: Parts,
    style: Style,
    work: Workload,
    folder: PathBuf,
    hosts: [Namespace; 2],
    at: usize,
    /// How many QEMUs there have been: each has files of its own.
    started: usize,
    qemu: Qemu,
}

#[derive(Debug)]
struct Qemu {
    child: Child,
    monitor: Monitor,
    log: PathBuf,
}

impl Qemu {
    async fn end(mut self) {
        let _ = tokio::time::timeout(PATIENCE, self.monitor.execute("quit", json!({}))).await;
        if tokio::time::timeout(PATIENCE, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }

    fn last_words(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&log).lines().last().unwrap_or_default().to_owned()
    }
}

/// The machine that a launcher makes of the VMI of [`super::ours`]: the same devices, so that the same is sent.
fn machine(parts: &Parts, work: &Workload, folder: &Path, number: usize) -> Machine {
    let socket = |name: &str| folder.join(format!("{name}-{number}"));
    let boot = Boot::Kernel {
        kernel: parts.guest.join("vmlinuz"),
        initrd: Some(parts.guest.join("initrd")),
        arguments: work.arguments.clone(),
    };
    let mut machine = Machine::new(socket("monitor"), work.memory.0, boot);
    machine.name = "bench".into();
    machine.accelerator = parts.accelerator;
    machine.rng = true;
    machine.balloon = true;
    machine.serial = Some(socket("serial"));
    machine.guest_agent = Some(socket("agent"));
    machine.uuid = Some(GUEST_UUID.into());
    machine.nics =
        vec![Nic { tap: TAP.into(), mac: GUEST_MAC.into(), model: "virtio".into(), mtu: Some(1500), boot_index: None }];
    machine
}

impl Bare {
    /// Boots the guest on the first host.
    pub async fn boot(lab: &Lab, parts: Parts, style: Style, work: Workload) -> Result<Self, Error> {
        let hosts = [lab.host(0)?, lab.host(1)?];
        let folder = lab.folder().to_owned();
        if style == Style::Tls {
            let authority = Authority::new()?;
            for host in 0..hosts.len() {
                authority.equip(&certificates_of(&folder, host), Lab::address(host).into())?;
            }
        }
        let mut qemu = spawn(&parts, &machine(&parts, &work, &folder, 0), &hosts[0], "the source", true).await?;
        qemu.monitor.execute("cont", json!({})).await?;
        Ok(Self { parts, style, work, folder, hosts, at: 0, started: 1, qemu })
    }

    /// Where the guest is: the number of the host, from 0.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Ends it.
    pub async fn end(self) {
        self.qemu.end().await;
    }

    /// Moves the guest to the other host. An error is one of the instrument; a guest that does not move is a [`Moved::failure`].
    pub async fn migrate(&mut self, limit: Duration) -> Result<Moved, Error> {
        let to = 1 - self.at;
        let mut moved = Moved { asked_us: now_us(), ..Moved::default() };
        let mut machine = machine(&self.parts, &self.work, &self.folder, self.started);
        machine.incoming = true;
        self.started += 1;
        let mut target = spawn(&self.parts, &machine, &self.hosts[to], "the target", self.style.holds()).await?;
        self.style.prepare(&mut target.monitor, &certificates_of(&self.folder, to), "server").await?;
        let uri = format!("tcp:{}:{PORT}", Lab::address(to));
        target.monitor.execute("migrate-incoming", json!({"uri": uri})).await?;
        moved.target_ready_ms = Some((now_us() - moved.asked_us) as f64 / 1e3);

        let source = &mut self.qemu.monitor;
        while source.try_event().is_some() {} // of the guest's life so far
        self.style.prepare(source, &certificates_of(&self.folder, self.at), "client").await?;
        if let Some(parameters) = self.style.parameters(self.work.bandwidth) {
            source.execute("migrate-set-parameters", parameters).await?;
        }
        moved.sending_us = Some(now_us());
        source.execute("migrate", json!({"uri": uri})).await?;
        let outcome = self.follow(&mut target, &mut moved, limit).await?;
        moved.over_us = now_us();
        match outcome {
            Ok(completed_us) => {
                if let Some(resumed) = moved.resume_us {
                    moved.over_us = resumed.max(completed_us);
                }
                self.numbers(&mut moved).await?;
                let source = std::mem::replace(&mut self.qemu, target);
                self.at = to;
                source.end().await;
            }
            Err(failure) => {
                let said = target.last_words();
                moved.failure = Some(if said.is_empty() { failure } else { format!("{failure}; the target: {said}") });
                target.end().await;
            }
        }
        Ok(moved)
    }

    /// Until the guest runs at the target and the source has completed (when that was), or until it is known that it stays (why).
    async fn follow(
        &mut self,
        target: &mut Qemu,
        moved: &mut Moved,
        limit: Duration,
    ) -> Result<Result<i64, String>, Error> {
        let deadline = Instant::now() + limit;
        let mut look = tokio::time::interval(LOOK_EVERY);
        let mut completed: Option<i64> = None;
        let mut continued = false;
        let mut failure: Option<String> = None;
        let mut given_up = None;
        loop {
            if let (Some(at), true) = (completed, moved.resume_us.is_some()) {
                return Ok(Ok(at));
            }
            tokio::select! {
                event = self.qemu.monitor.event() => {
                    let Some(event) = event else {
                        return Err(Error::Guest(format!("is lost, its QEMU ended: {}", self.qemu.last_words())));
                    };
                    moved.note("source", &event);
                    match (event.name.as_str(), event.status.as_str()) {
                        ("STOP", _) => moved.stop_us = Some(event.at_us),
                        ("MIGRATION", "completed") => completed = Some(event.at_us),
                        ("MIGRATION", "failed") => failure = Some("QEMU says `failed`".into()),
                        ("MIGRATION", "cancelled") => failure = given_up.take().or(failure),
                        _ => {}
                    }
                }
                event = target.monitor.event() => {
                    let Some(event) = event else {
                        let said = target.last_words();
                        return match completed {
                            // Without a return path the source does not know whether the target has loaded it all.
                            Some(_) => Err(Error::Guest(format!("is lost: the source completed and the target ended: {said}"))),
                            None => Ok(Err(format!("the target ended: {said}"))),
                        };
                    };
                    moved.note("target", &event);
                    if event.name == "RESUME" {
                        moved.resume_us = Some(event.at_us);
                    }
                }
                _ = look.tick(), if completed.is_none() => self.look(moved).await?,
                () = tokio::time::sleep_until((deadline + PATIENCE).into()) => {
                    return Err(Error::Guest("moves no more, and its migration cannot be cancelled".into()));
                }
            }
            if completed.is_some() && self.style.holds() && !continued {
                target.monitor.execute("cont", json!({})).await?;
                continued = true;
            }
            if let Some(failure) = failure.take() {
                return Ok(Err(failure));
            }
            if completed.is_none() && given_up.is_none() && Instant::now() > deadline {
                given_up = Some(format!("it did not end within {} s and was cancelled", limit.as_secs()));
                self.qemu.monitor.execute("migrate_cancel", json!({})).await?;
            }
        }
    }

    async fn look(&mut self, moved: &mut Moved) -> Result<(), Error> {
        let info = self.qemu.monitor.execute("query-migrate", json!({})).await?;
        moved.look(&info, now_us());
        Ok(())
    }

    async fn numbers(&mut self, moved: &mut Moved) -> Result<(), Error> {
        let info = self.qemu.monitor.execute("query-migrate", json!({})).await?;
        moved.last_look(&info, moved.over_us);
        Ok(())
    }
}

/// Where QEMU finds the certificates of a host.
fn certificates_of(folder: &Path, host: usize) -> PathBuf {
    folder.join(format!("tls-{host}"))
}

/// Starts a QEMU in a namespace. Unless `held`, it runs its guest by itself as soon as it has one, as is QEMU's default.
async fn spawn(parts: &Parts, machine: &Machine, host: &Namespace, who: &str, held: bool) -> Result<Qemu, Error> {
    let mut arguments = machine.arguments(0)?;
    if !held {
        arguments.retain(|argument| argument != "-S");
    }
    let log = machine.monitor.with_extension("log");
    let output = std::fs::File::create(&log).map_err(|e| Error::io("make QEMU's log", e))?;
    let errors = output.try_clone().map_err(|e| Error::io("make QEMU's log", e))?;
    let mut command = command_in(host, &parts.program);
    command.args(&arguments).stdin(Stdio::null()).stdout(output).stderr(errors);
    let mut child = command.spawn().map_err(|e| Error::io(format!("start {}", parts.program.display()), e))?;
    let connected = tokio::select! {
        connected = Monitor::connect(&machine.monitor, who) => connected,
        ended = child.wait() => {
            let said = std::fs::read(&log).unwrap_or_default();
            let said = String::from_utf8_lossy(&said).trim().to_owned();
            let status = ended.map(|status| status.to_string()).unwrap_or_default();
            Err(Error::Monitor { who: who.to_owned(), message: format!("it ended ({status}): {said}") })
        }
    };
    Ok(Qemu { child, monitor: connected?, log })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_set_nothing_but_a_cap() {
        let cap: Bandwidth = "64Mi".parse().unwrap();
        assert_eq!(Style::Defaults.parameters(Bandwidth::Unlimited), None);
        assert_eq!(Style::Defaults.parameters(cap), Some(json!({"max-bandwidth": 64 << 20})));
        assert_eq!(Style::Best.parameters(cap), Some(json!({"max-bandwidth": 64 << 20, "downtime-limit": 20})));
        assert!(!Style::Defaults.capabilities().contains(&"return-path"));
    }
}
