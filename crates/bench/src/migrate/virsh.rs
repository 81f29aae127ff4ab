//! libvirt: the same guest, moved by `virsh migrate --live`. What is measured comes from a second monitor of each QEMU, the same
//! instrument that [`super::bare`] uses.

use super::bare::Parts;
use super::figures::Moved;
use super::lab::{GUEST_MAC, GUEST_UUID, Lab, TAP, Workload};
use super::libvirt::{Host, Programs, complaint};
use super::monitor::{Event, Monitor};
use super::{Bandwidth, Error, now_us};
use godwit_qemu::accelerator::Accelerator;
use std::path::Path;
use std::time::{Duration, Instant};

/// Name of the domain.
const NAME: &str = "bench";
/// How often the numbers are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(25);
/// How long an aborted migration may take to be over, and QEMU's last events to arrive.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the target's `RESUME` may take to arrive here when virsh has ended.
const LATE: Duration = Duration::from_secs(1);

/// A running guest of libvirt's.
#[derive(Debug)]
pub struct Virsh {
    hosts: [Host; 2],
    at: usize,
    monitor: Monitor,
    bandwidth: Bandwidth,
}

impl Virsh {
    /// Starts a libvirtd on each host, and boots the guest on the first.
    pub async fn boot(lab: &Lab, parts: &Parts, work: &Workload) -> Result<Self, Error> {
        let programs = Programs::find().map_err(Error::Libvirt)?;
        let start = async |number: usize| {
            let folder = lab.folder().join(format!("libvirt-{number}"));
            Host::start(programs.clone(), number, lab.host(number)?, folder).await
        };
        let mut hosts = [start(0).await?, start(1).await?];
        for host in &mut hosts {
            host.ready(&parts.program, virt_type(parts.accelerator)).await?;
        }
        let [first, _] = &hosts;
        let file = lab.folder().join("domain.xml");
        std::fs::write(&file, domain(parts, work)).map_err(|e| Error::io("write the domain's XML", e))?;
        first.virsh(&["create", &file.to_string_lossy()]).await?;
        let monitor = Monitor::connect(&first.shared("monitor"), "the source").await?;
        Ok(Self { hosts, at: 0, monitor, bandwidth: work.bandwidth })
    }

    /// Where the guest is: the number of the host, from 0.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Ends it, and the daemons.
    pub async fn end(self) {
        drop(self.monitor);
        for host in self.hosts {
            host.end().await;
        }
    }

    /// Moves the guest to the other host. An error is one of the instrument; a guest that does not move is a [`Moved::failure`].
    pub async fn migrate(&mut self, limit: Duration) -> Result<Moved, Error> {
        let to = 1 - self.at;
        let [first, second] = &self.hosts;
        let (source, target) = if self.at == 0 { (first, second) } else { (second, first) };
        while self.monitor.try_event().is_some() {} // of the guest's life so far
        let socket = target.shared("monitor");
        let _ = std::fs::remove_file(&socket); // of a QEMU that has ended
        let mut command = source.client();
        command.args(["migrate", "--live", "--domain", NAME, "--desturi", &target.uri()]);
        command.args(["--migrateuri", &format!("tcp://{}", Lab::address(to))]);
        if let Bandwidth::Mebibytes(cap) = self.bandwidth {
            command.args(["--bandwidth", &cap.0.to_string()]);
        }
        let mut moved = Moved { asked_us: now_us(), ..Moved::default() };
        let virsh = command.spawn().map_err(|e| Error::io("start virsh", e))?;
        let ended = virsh.wait_with_output();
        tokio::pin!(ended);
        let arriving = Monitor::connect(&socket, "the target");
        tokio::pin!(arriving);
        let mut arrived: Option<Monitor> = None;
        let mut look = tokio::time::interval(LOOK_EVERY);
        let deadline = Instant::now() + limit;
        let mut given_up = false;
        let mut gone = false;
        let output = loop {
            let awaited = arrived.is_none();
            let told = async {
                match &mut arrived {
                    Some(monitor) => monitor.event().await,
                    None => std::future::pending().await,
                }
            };
            let until = if given_up { deadline + PATIENCE } else { deadline };
            tokio::select! {
                output = &mut ended => break output.map_err(|e| Error::io("wait for virsh", e))?,
                event = self.monitor.event(), if !gone => match event {
                    Some(event) => {
                        left(&mut moved, &event);
                        // It ends the source soon after.
                        if event.status == "completed"
                            && let Ok(info) = self.monitor.execute("query-migrate", serde_json::json!({})).await
                        {
                            moved.last_look(&info, now_us());
                        }
                    }
                    None => gone = true,
                },
                Some(event) = told => came(&mut moved, &event),
                monitor = &mut arriving, if awaited => arrived = Some(monitor?),
                _ = look.tick(), if !gone && moved.sending_us.is_some() && moved.stop_us.is_none() => {
                    if let Ok(info) = self.monitor.execute("query-migrate", serde_json::json!({})).await {
                        moved.look(&info, now_us());
                    }
                }
                () = tokio::time::sleep_until(until.into()) => {
                    if given_up {
                        return Err(Error::Guest("moves no more, and its migration cannot be aborted".into()));
                    }
                    given_up = true;
                    source.virsh(&["domjobabort", NAME]).await?;
                }
            }
        };
        moved.over_us = now_us();
        if !output.status.success() {
            let said = complaint(&output.stderr);
            moved.failure = Some(match given_up {
                true => format!("it did not end within {} s and was aborted: {said}", limit.as_secs()),
                false => said,
            });
            return Ok(moved);
        }
        let mut arrived = arrived.ok_or_else(|| Error::Libvirt("the target's QEMU has shown no monitor".into()))?;
        while moved.resume_us.is_none() {
            match tokio::time::timeout(LATE, arrived.event()).await {
                Ok(Some(event)) => came(&mut moved, &event),
                Ok(None) | Err(_) => break,
            }
        }
        self.monitor = arrived;
        self.at = to;
        Ok(moved)
    }
}

/// Takes an event of the source's QEMU.
fn left(moved: &mut Moved, event: &Event) {
    moved.note("source", event);
    match (event.name.as_str(), event.status.as_str()) {
        ("MIGRATION", "setup") => moved.sending_us = Some(event.at_us),
        ("STOP", _) => moved.stop_us = Some(event.at_us),
        _ => {}
    }
}

/// Takes an event of the target's QEMU.
fn came(moved: &mut Moved, event: &Event) {
    moved.note("target", event);
    match (event.name.as_str(), event.status.as_str()) {
        ("MIGRATION", "setup") => moved.target_ready_ms = Some((event.at_us - moved.asked_us) as f64 / 1e3),
        ("RESUME", _) => moved.resume_us = Some(event.at_us),
        _ => {}
    }
}

fn virt_type(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "qemu",
    }
}

/// The same machine as a launcher makes: the same processor, devices and network, and a monitor for the instruments.
fn domain(parts: &Parts, work: &Workload) -> String {
    let file = |name: &str| escaped(&absolute(&parts.guest.join(name)));
    let memory = work.memory.0;
    let (cpu, translator) = match parts.accelerator {
        Accelerator::Kvm => ("<cpu mode='host-passthrough'/>", String::new()),
        Accelerator::Tcg => (
            "<cpu mode='maximum' check='none'><feature policy='disable' name='la57'/></cpu>",
            format!("<tcg><tb-cache unit='MiB'>{}</tb-cache></tcg>", (memory / 4).clamp(4, 512)),
        ),
    };
    format!(
        "<domain type='{}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{NAME}</name>
  <uuid>{GUEST_UUID}</uuid>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{}</kernel>
    <initrd>{}</initrd>
    <cmdline>{}</cmdline>
  </os>
  <features><acpi/><apic/><vmport state='off'/>{translator}</features>
  {cpu}
  <devices>
    <emulator>{}</emulator>
    <interface type='ethernet'>
      <mac address='{GUEST_MAC}'/>
      <target dev='{TAP}' managed='no'/>
      <model type='virtio'/>
      <mtu size='1500'/>
    </interface>
    <serial type='unix'><source mode='bind' path='/run/host/serial'/></serial>
    <channel type='unix'>
      <source mode='bind' path='/run/host/agent'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
    <memballoon model='virtio' freePageReporting='on'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-qmp'/>
    <qemu:arg value='unix:/run/host/monitor,server=on,wait=off'/>
  </qemu:commandline>
</domain>
",
        virt_type(parts.accelerator),
        file("vmlinuz"),
        file("initrd"),
        escaped(&work.arguments),
        escaped(&absolute(&parts.program)),
    )
}

fn absolute(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).to_string_lossy().into_owned()
}

/// As text in XML.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&apos;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::plan::Mebibytes;

    #[test]
    fn the_domain_has_the_guests_memory_kernel_and_processor() {
        let work = Workload { arguments: "a='b' c&d".into(), ..Workload::quiet(Mebibytes(1024), Bandwidth::Unlimited) };
        let mut parts = Parts {
            program: "/usr/bin/qemu-system-x86_64".into(),
            accelerator: Accelerator::Tcg,
            guest: "/guests/a&b".into(),
        };
        let xml = domain(&parts, &work);
        for part in [
            "type='qemu'",
            "<memory unit='MiB'>1024</memory>",
            "<kernel>/guests/a&amp;b/vmlinuz</kernel>",
            "<cmdline>a=&apos;b&apos; c&amp;d</cmdline>",
            "<tb-cache unit='MiB'>256</tb-cache>",
            "mode='maximum'",
        ] {
            assert!(xml.contains(part), "no {part} in {xml}");
        }
        parts.accelerator = Accelerator::Kvm;
        let xml = domain(&parts, &work);
        assert!(xml.contains("type='kvm'") && xml.contains("host-passthrough") && !xml.contains("tb-cache"), "{xml}");
    }

    #[test]
    fn the_figures_come_from_both_monitors() {
        let event = |name: &str, status: &str, at_us| Event { at_us, name: name.into(), status: status.into() };
        let mut moved = Moved { asked_us: 1_000, ..Moved::default() };
        came(&mut moved, &event("MIGRATION", "setup", 61_000));
        left(&mut moved, &event("MIGRATION", "setup", 70_000));
        left(&mut moved, &event("STOP", "", 90_000));
        came(&mut moved, &event("RESUME", "", 95_000));
        assert_eq!((moved.target_ready_ms, moved.sending_us), (Some(60.0), Some(70_000)));
        assert_eq!((moved.stop_us, moved.resume_us), (Some(90_000), Some(95_000)));
        let steps: Vec<&str> = moved.steps.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(steps, ["target setup", "source setup", "source STOP", "target RESUME"]);
    }
}
