//! `godwit bench storage`: whether a guest that writes all the time keeps every acknowledged write while it moves, again and again.
//!
//! The demo guest writes numbered blocks to several disks, past its own cache and with a flush after every eight: disks on
//! shared claims, one for each cache mode, and one of its own that every move copies. It reads each block back before it
//! writes it again, and all of them after each move. At the end the images are looked at from outside.

mod image;

use crate::migrate::lab::{Attached, GUEST, Lab, Workload, booted};
use crate::migrate::ours::Ours;
use crate::migrate::plan::Mebibytes;
use crate::migrate::{Bandwidth, Error};
use godwit_network::Namespace;
use image::Image;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Bytes of each disk.
const SIZE: &str = "8Mi";
/// How long the guest may take to read everything back.
const VERIFY: Duration = Duration::from_secs(60);
/// How long the guest may take until it has written to every disk.
const BEGIN: Duration = Duration::from_secs(60);

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many moves.
    pub moves: usize,
    /// The cap on each, for memory and disks.
    pub bandwidth: Bandwidth,
    /// Folder with the guest's `vmlinuz` and `initrd`.
    pub guest: PathBuf,
    /// How long a move may take.
    pub limit: Duration,
}

/// What the guest says of one disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Told {
    /// The kernel's name of it.
    pub name: String,
    /// What its blocks carry, in hexadecimal digits.
    pub token: String,
    /// Number of the last write that a flush has followed.
    pub acknowledged: u64,
    /// Blocks read back so far.
    pub verified_blocks: u64,
    /// Blocks that did not hold what was last written to them.
    pub wrong_blocks: u64,
    /// The first of them.
    pub first_wrong: Option<String>,
    /// The longest that eight writes and their flush took since the last move.
    pub worst_milliseconds: f64,
}

/// One move.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Leg {
    /// The node that the guest came to; none if it did not move.
    pub node: Option<String>,
    /// From the VMIM's creation to `Succeeded`.
    pub total_ms: f64,
    /// `STOP` at the source to `RESUME` at the target.
    pub standstill_ms: Option<f64>,
    /// The longest that eight writes and their flush took on any disk, since the move before.
    pub worst_write_ms: f64,
    /// Writes that were acknowledged since the move before, on all disks.
    pub writes: u64,
    /// Why the guest did not move.
    pub failure: Option<String>,
}

/// A disk at the end.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Disk {
    /// What it was.
    pub what: String,
    /// What the guest says of it.
    pub told: Told,
    /// Blocks that were looked at from outside.
    pub looked_at: usize,
    /// Those that held something older than what was acknowledged, or nothing of this guest's.
    pub lost: usize,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The moves in order.
    pub moves: Vec<Leg>,
    /// The disks.
    pub disks: Vec<Disk>,
    /// Everything that must not be.
    pub wrong: Vec<String>,
}

impl Report {
    /// Whether every move was made and nothing was lost.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.wrong.is_empty()
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{:>4} {:>6} {:>9} {:>11} {:>14} {:>8}",
            "move", "to", "total ms", "standstill", "worst write", "writes"
        )?;
        for (number, leg) in (1..).zip(&self.moves) {
            let standstill = leg.standstill_ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1} ms"));
            writeln!(
                f,
                "{number:>4} {:>6} {:>9.0} {standstill:>11} {:>11.0} ms {:>8}{}",
                leg.node.as_deref().unwrap_or("-"),
                leg.total_ms,
                leg.worst_write_ms,
                leg.writes,
                leg.failure.as_ref().map(|failure| format!("  {failure}")).unwrap_or_default(),
            )?;
        }
        for disk in &self.disks {
            let Disk { what, told, looked_at, lost } = disk;
            writeln!(
                f,
                "{}: {what}: {} writes acknowledged, {} blocks read back, {} wrong; from outside {lost} of {looked_at} lost",
                told.name, told.acknowledged, told.verified_blocks, told.wrong_blocks
            )?;
        }
        let moved = self.moves.iter().filter(|leg| leg.node.is_some()).count();
        writeln!(f, "{moved} of {} moves", self.moves.len())?;
        if self.wrong.is_empty() {
            return writeln!(f, "no acknowledged write was lost");
        }
        self.wrong.iter().try_for_each(|wrong| writeln!(f, "WRONG: {wrong}"))
    }
}

/// The disks, in the order in which the guest names them: vda, vdb, …
fn disks() -> Vec<Attached> {
    let shared = |cache: &str| Attached {
        name: format!("shared-{cache}"),
        cache: Some(cache.to_owned()),
        volume: json!({"persistentVolumeClaim": {"claimName": format!("shared-{cache}")}}),
    };
    let own = Attached { name: "own".into(), cache: None, volume: json!({"emptyDisk": {"capacity": SIZE}}) };
    vec![shared("none"), shared("writethrough"), shared("writeback"), own]
}

/// Starts a cluster and a guest that writes, and moves it. `tell` gets a line for a person now and then.
///
/// # Errors
/// What kept it from being tried. A write that is lost is in the report.
pub async fn run(options: &Options, tell: &mut dyn FnMut(&str)) -> Result<Report, Error> {
    let lab = Lab::with_cluster(&options.guest).await?;
    let guest = lab.guest().await?;
    let disks = disks();
    let mut work = Workload::quiet(Mebibytes(256), options.bandwidth);
    let letters: Vec<String> = (b'a'..).take(disks.len()).map(|letter| format!("vd{}", char::from(letter))).collect();
    work.arguments += &format!(" godwit.disks={}", letters.join(","));
    image::claim(&lab.layout, disks.iter(), SIZE).await?;
    work.disks.clone_from(&disks);
    let mut ours = Ours::boot(&lab, &work).await?;
    let before = booted(&guest).await?;
    let client = lab.client()?;
    let mut last = begun(&client, disks.len()).await?;
    tell(&format!("the guest writes to {} disks", last.len()));
    let mut report = Report::default();
    for number in 1..=options.moves {
        let moved = ours.migrate(options.limit).await?;
        let now = ask(&client, "/verify").await?;
        let writes = |told: &[Told]| told.iter().map(|disk| disk.acknowledged).sum::<u64>();
        let leg = Leg {
            node: match moved.failure {
                None => Some(format!("node{}", ours.at().await? + 1)),
                Some(_) => None,
            },
            total_ms: (moved.over_us - moved.asked_us) as f64 / 1e3,
            standstill_ms: moved.resume_us.zip(moved.stop_us).map(|(resume, stop)| (resume - stop) as f64 / 1e3),
            worst_write_ms: now.iter().map(|disk| disk.worst_milliseconds).fold(0.0, f64::max),
            writes: writes(&now).saturating_sub(writes(&last)),
            failure: moved.failure,
        };
        tell(&format!(
            "move {number} to {}: {:.0} ms, {} writes since the last, the longest {:.0} ms",
            leg.node.as_deref().unwrap_or("nowhere"),
            leg.total_ms,
            leg.writes,
            leg.worst_write_ms
        ));
        report.wrong.extend(leg.failure.as_ref().map(|failure| format!("move {number} failed: {failure}")));
        if leg.writes == 0 {
            report.wrong.push(format!("move {number}: nothing was written since the one before"));
        }
        let is_wrong = now.iter().any(|disk| disk.wrong_blocks > 0);
        report.moves.push(leg);
        last = now;
        if is_wrong {
            break;
        }
    }
    let after = guest.facts().await?;
    if after.token != before.token {
        report.wrong.push("the guest was started anew".into());
    }
    if after.corrupt_pages > 0 {
        report.wrong.push(format!("the guest counts {} damaged pages", after.corrupt_pages));
    }
    // Opened before the guest ends: what is its own goes with its pod.
    let own = ours.own_disks().await?;
    let mut images = Vec::new();
    for disk in &disks {
        images.push(Image::open(&lab.layout, &ours.client(), disk, &own).await?);
    }
    let last = ask(&client, "/").await?;
    ours.end().await?;
    for ((image, told), disk) in images.into_iter().zip(last).zip(&disks) {
        let (looked_at, lost) = image.look(&told)?;
        if told.wrong_blocks > 0 {
            let first = told.first_wrong.as_deref().unwrap_or_default();
            report.wrong.push(format!("{}: {} wrong blocks, first: {first}", told.name, told.wrong_blocks));
        }
        if lost > 0 {
            report.wrong.push(format!("{}: {lost} of {looked_at} blocks in its image are lost", told.name));
        }
        let cache = disk.cache.as_ref().map(|cache| format!(", cache {cache}")).unwrap_or_default();
        report.disks.push(Disk { what: format!("{}{cache}", disk.name), told, looked_at, lost });
    }
    Ok(report)
}

/// Waits until every disk was written to.
async fn begun(client: &Namespace, disks: usize) -> Result<Vec<Told>, Error> {
    let deadline = tokio::time::Instant::now() + BEGIN;
    loop {
        let told = ask(client, "/").await?;
        if told.len() == disks && told.iter().all(|disk| disk.acknowledged > 0) {
            return Ok(told);
        }
        if tokio::time::Instant::now() > deadline {
            return Err(Error::Guest(format!(
                "does not write to all its disks (an old guest? `make guest`): it says {told:?}"
            )));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Asks the guest about its disks.
async fn ask(client: &Namespace, path: &'static str) -> Result<Vec<Told>, Error> {
    #[derive(Deserialize)]
    struct Facts {
        #[serde(default)]
        disks: Vec<Told>,
    }
    let client = client.clone();
    let asked = move || {
        let mut stream = client.connect(SocketAddr::from((GUEST, 80)), VERIFY).map_err(std::io::Error::other)?;
        stream.set_read_timeout(Some(VERIFY))?;
        // In one piece: the guest reads once.
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = tokio::task::spawn_blocking(asked).await.map_err(std::io::Error::other).flatten();
    let answer = answer.map_err(|e| Error::io("ask the guest about its disks", e))?;
    let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
    let facts: Facts = serde_json::from_str(body)
        .map_err(|e| Error::Guest(format!("says nothing that can be read about its disks: {e} in {answer:?}")))?;
    Ok(facts.disks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_lost_is_in_the_report_and_its_verdict() {
        let leg = Leg { node: Some("node2".into()), total_ms: 812.0, writes: 80, ..Leg::default() };
        let told = Told { name: "vda".into(), acknowledged: 80, ..Told::default() };
        let disk = Disk { what: "own".into(), told, looked_at: 80, lost: 0 };
        let mut report = Report { moves: vec![leg], disks: vec![disk], wrong: Vec::new() };
        let text = report.to_string();
        assert!(report.is_good() && text.contains("vda: own: 80 writes acknowledged"), "{text}");
        assert!(text.contains("1 of 1 moves\nno acknowledged write was lost"), "{text}");
        report.wrong.push("vda: 1 of 80 blocks in its image are lost".into());
        assert!(!report.is_good() && report.to_string().contains("WRONG: vda: 1 of 80"));
    }
}
