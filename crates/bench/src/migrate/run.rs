//! The run: every line in every way, with the same instruments around each move.

use super::bare::{Bare, Parts, Style};
use super::beats::Witness;
use super::cost::{Members, Meter, link_bytes};
use super::figures::{Figures, Moved};
use super::lab::{Lab, Workload, booted};
use super::libvirt::Programs;
use super::ours::Ours;
use super::report::{Entry, LeftOut, Machine, Report};
use super::virsh::Virsh;
use super::{Error, Line, Load, Options, Way, now_us};
use godwit_qemu::{accelerator, process};
use godwit_standalone::demo::{Facts, Guest};
use godwit_standalone::fabric;
use std::time::Duration;

/// Pings are this far apart.
const PING_EVERY: Duration = Duration::from_millis(10);
/// How long an answer may take: one that is late on a busy machine is not lost.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the instruments watch before and after a move.
const AROUND: Duration = Duration::from_secs(1);
/// Until a guest that has just booted has come to rest.
const REST: Duration = Duration::from_secs(2);

/// Measures. `tell` gets a line for a person now and then.
///
/// # Errors
/// What kept it from measuring. That a guest does not move, or not well, is a result and no error.
pub async fn run(options: &Options, tell: &mut dyn FnMut(&str)) -> Result<Report, Error> {
    for file in ["vmlinuz", "initrd"] {
        if !options.guest.join(file).exists() {
            let folder = options.guest.display();
            return Err(Error::Usage(format!(
                "{folder} has no {file}: run `make guest`, or name its folder with --guest"
            )));
        }
    }
    let program =
        process::find_qemu().ok_or_else(|| Error::Usage("there is no QEMU here: `make deps` installs it".into()))?;
    let probe = accelerator::probe(&program).await;
    let parts = Parts { program, accelerator: probe.accelerator, guest: options.guest.clone() };
    let mut report = Report::new(Machine::look(&parts.program, probe.accelerator), options);
    let mut ways = Vec::new();
    for way in &options.ways {
        match way {
            Way::Virsh => match Programs::find() {
                Ok(programs) => {
                    report.machine.libvirt = programs.version();
                    ways.push(Way::Virsh);
                }
                Err(why) => report.left_out.push(LeftOut { what: Way::Virsh.name().into(), why }),
            },
            way => ways.push(*way),
        }
    }
    let lines = options.lines();
    let link = match options.link {
        Some(link) => link,
        None if lines.iter().all(|line| !matches!(line.load, Load::Percent(_))) => 0,
        None => {
            tell("measuring what the link carries: bare QEMU, one stream, no cap");
            measure_link(&parts, options.limit).await?
        }
    };
    report.link_bytes_per_second = (link > 0).then_some(link);
    for line in lines {
        for way in &ways {
            tell(&format!("{line}: {}", way.name()));
            let entry = match measure(&parts, options, line, *way, link, tell).await {
                Ok(entry) => entry,
                // One line that cannot be measured must not cost the others.
                Err(error) => {
                    tell(&format!("  not measured: {error}"));
                    report.left_out.push(LeftOut { what: format!("{line}: {}", way.name()), why: error.to_string() });
                    continue;
                }
            };
            report.entries.push(entry);
        }
    }
    Ok(report)
}

/// Bytes a second that one stream of QEMU's carries here without a cap: what a load is a part of.
async fn measure_link(parts: &Parts, limit: Duration) -> Result<u64, Error> {
    let lab = Lab::without_cluster().await?;
    let mut bare = Bare::boot(&lab, parts.clone(), Style::Defaults, Workload::full()).await?;
    let guest = lab.guest().await?;
    booted(&guest).await?;
    tokio::time::sleep(REST).await;
    let moved = bare.migrate(limit).await?;
    bare.end().await;
    let figures = Figures::of(moved);
    match (figures.transfer_ms, figures.qemu_bytes) {
        (Some(ms), Some(bytes)) if ms > 0.0 => Ok((bytes as f64 / ms * 1e3) as u64),
        _ => Err(Error::Guest(format!("that measures the link did not move: {}", figures.failure.unwrap_or_default()))),
    }
}

/// A guest that can be moved.
enum Carrier {
    Ours(Ours),
    Bare(Box<Bare>),
    Virsh(Box<Virsh>),
}

impl Carrier {
    async fn at(&self) -> Result<usize, Error> {
        match self {
            Carrier::Ours(ours) => ours.at().await,
            Carrier::Bare(bare) => Ok(bare.at()),
            Carrier::Virsh(virsh) => Ok(virsh.at()),
        }
    }

    async fn migrate(&mut self, limit: Duration) -> Result<Moved, Error> {
        match self {
            Carrier::Ours(ours) => ours.migrate(limit).await,
            Carrier::Bare(bare) => bare.migrate(limit).await,
            Carrier::Virsh(virsh) => virsh.migrate(limit).await,
        }
    }

    async fn end(self) -> Result<(), Error> {
        match self {
            Carrier::Ours(ours) => ours.end().await,
            Carrier::Bare(bare) => {
                bare.end().await;
                Ok(())
            }
            Carrier::Virsh(virsh) => {
                virsh.end().await;
                Ok(())
            }
        }
    }
}

async fn measure(
    parts: &Parts,
    options: &Options,
    line: Line,
    way: Way,
    link: u64,
    tell: &mut dyn FnMut(&str),
) -> Result<Entry, Error> {
    let lab = match way {
        Way::Ours => Lab::with_cluster(&parts.guest).await?,
        _ => Lab::without_cluster().await?,
    };
    let guest = lab.guest().await?;
    let witness = lab.witness()?;
    let others = if way == Way::Ours { Ours::processes(&lab) } else { Vec::new() };
    let members = Members { prefix: lab.cluster.namespace_prefix(), others };
    let work = Workload::of(&line, link);
    let style = match way {
        Way::BareBest => Style::Best,
        Way::BareTls => Style::Tls,
        _ => Style::Defaults,
    };
    let mut carrier = match way {
        Way::Ours => Carrier::Ours(Ours::boot(&lab, &work).await?),
        Way::Virsh => Carrier::Virsh(Box::new(Virsh::boot(&lab, parts, &work).await?)),
        _ => Carrier::Bare(Box::new(Bare::boot(&lab, parts.clone(), style, work).await?)),
    };
    let mut facts = booted(&guest).await?;
    tokio::time::sleep(REST).await;
    let mut entry = Entry { line, way, runs: Vec::new() };
    for _ in 0..options.runs {
        let around = Around { lab: &lab, guest: &guest, witness: &witness, members: &members };
        let (figures, after) = around.one_move(&mut carrier, &facts, options.limit).await?;
        tell(&format!("  {}", super::report::in_short(&figures)));
        // A guest that did not move once will not the next time, and waiting for it takes long.
        let stays = figures.failure.is_some();
        let lost = figures.wrong.is_some();
        entry.runs.push(figures);
        match after {
            Some(after) if !stays && !lost => facts = after,
            _ => break,
        }
    }
    drop(witness);
    carrier.end().await?;
    Ok(entry)
}

/// The instruments around a move.
struct Around<'a> {
    lab: &'a Lab,
    guest: &'a Guest,
    witness: &'a Witness,
    members: &'a Members,
}

impl Around<'_> {
    /// Moves the guest once, and asks it afterwards (none: it does not answer).
    async fn one_move(
        &self,
        carrier: &mut Carrier,
        before: &Facts,
        limit: Duration,
    ) -> Result<(Figures, Option<Facts>), Error> {
        let host = self.lab.host(carrier.at().await?)?;
        let load_before = load();
        self.witness.clear();
        let pinger = self.guest.start_pinging(PING_EVERY)?;
        tokio::time::sleep(AROUND).await;
        let meter = Meter::start(self.members.clone())?;
        let bytes_before = link_bytes(&host, fabric::UPLINK)?;
        let moved = carrier.migrate(limit).await?;
        let wire_bytes = link_bytes(&host, fabric::UPLINK)?.saturating_sub(bytes_before);
        let cpu_seconds = meter.seconds_until(moved.over_us);
        drop(meter);
        tokio::time::sleep(AROUND).await;
        let pings = tokio::task::spawn_blocking(move || pinger.stop_within(PATIENCE))
            .await
            .map_err(|e| Error::io("end the pings", std::io::Error::other(e)))?;
        let (asked, over, resumed) = (moved.asked_us, moved.over_us, moved.resume_us);
        let stood = moved.stop_us.zip(resumed).unwrap_or_default();
        let standing: Vec<_> = pings.between(stood.0, stood.1).collect();
        let margin = i64::try_from(AROUND.as_micros()).unwrap_or_default();
        let witness = self.witness.testify(asked, (over + margin).min(now_us()), resumed.unwrap_or(over));
        let after = self.guest.facts().await.ok();
        let wrong = wrong(before, after.as_ref()).or_else(|| witness.wrong.clone());
        let damaged_pages = after.as_ref().map_or(0, |after| after.corrupt_pages.saturating_sub(before.corrupt_pages));
        let figures = Figures {
            witness,
            ping_gap_ms: pings.longest_gap_us as f64 / 1e3,
            pings_lost: pings.lost,
            pings_doubled: pings.duplicates,
            pings_standing: standing.len() as u64,
            pings_standing_lost: standing.iter().filter(|ping| ping.rtt_us.is_none()).count() as u64,
            wire_bytes,
            cpu_seconds,
            damaged_pages,
            load_before,
            wrong,
            ..Figures::of(moved)
        };
        Ok((figures, after))
    }
}

/// What must never be after a move. (Damaged pages are counted by themselves.)
fn wrong(before: &Facts, after: Option<&Facts>) -> Option<String> {
    let Some(after) = after else { return Some("the guest does not answer after the move".into()) };
    if before.token != after.token {
        Some("the guest was started anew".into())
    } else if after.uptime_milliseconds < before.uptime_milliseconds || after.beat < before.beat {
        Some("the guest went back in time".into())
    } else if before.checksum != after.checksum {
        Some("the guest's memory has changed where nobody writes".into())
    } else {
        None
    }
}

/// The machine's load over the last minute.
pub(super) fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(token: &str, uptime: u64, checksum: &str) -> Facts {
        serde_json::from_value(serde_json::json!({
            "hostname": "g", "token": token, "beat": 3, "uptimeMilliseconds": uptime, "checksum": checksum,
            "verifiedPages": 0, "corruptPages": 0,
        }))
        .unwrap()
    }

    #[test]
    fn another_life_a_step_back_and_changed_memory_are_wrong() {
        let before = facts("a", 10, "x");
        assert_eq!(wrong(&before, Some(&facts("a", 20, "x"))), None);
        assert!(wrong(&before, Some(&facts("b", 20, "x"))).unwrap().contains("anew"));
        assert!(wrong(&before, Some(&facts("a", 9, "x"))).unwrap().contains("back"));
        assert!(wrong(&before, Some(&facts("a", 20, "y"))).unwrap().contains("memory"));
        assert!(wrong(&before, None).unwrap().contains("answer"));
    }
}
