//! `godwit bench streams`: whether connections that are open stay open while the guest at their end moves, again and again.
//!
//! An outside client talks to the demo guest over an L2 segment. One connection carries a stream to and fro for the whole time,
//! each byte of which is verified; many others say one word before the first move and one after the last, and nothing between.

mod talk;

use crate::migrate::lab::{GUEST, Lab, Workload, booted};
use crate::migrate::ours::Ours;
use crate::migrate::plan::Mebibytes;
use crate::migrate::{Bandwidth, Error};
use serde::Serialize;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use talk::{Busy, Flow, Silent};

/// The guest's echo service.
const ECHO: u16 = 7;

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many moves.
    pub moves: usize,
    /// How many silent connections.
    pub connections: usize,
    /// Folder with the guest's `vmlinuz` and `initrd`.
    pub guest: PathBuf,
    /// How long a move may take.
    pub limit: Duration,
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
    /// Bytes of the stream that came back meanwhile, each as it was sent.
    pub stream_bytes: u64,
    /// The longest time in which nothing came back.
    pub stream_pause_ms: f64,
    /// Segments of the stream that the client's TCP sent again.
    pub retransmitted: u32,
    /// Why the guest did not move.
    pub failure: Option<String>,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The moves in order.
    pub moves: Vec<Leg>,
    /// Silent connections that were opened.
    pub connections: usize,
    /// Those that answered after the last move.
    pub answered: usize,
    /// Bytes of the stream that came back, each verified.
    pub stream_bytes: u64,
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
            "{:>4} {:>6} {:>9} {:>11} {:>11} {:>9} {:>6}",
            "move", "to", "total ms", "standstill", "stream MiB", "pause ms", "resent"
        )?;
        for (number, leg) in (1..).zip(&self.moves) {
            let standstill = leg.standstill_ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1} ms"));
            writeln!(
                f,
                "{number:>4} {:>6} {:>9.0} {standstill:>11} {:>11.1} {:>9.0} {:>6}{}",
                leg.node.as_deref().unwrap_or("-"),
                leg.total_ms,
                leg.stream_bytes as f64 / f64::from(1 << 20),
                leg.stream_pause_ms,
                leg.retransmitted,
                leg.failure.as_ref().map(|failure| format!("  {failure}")).unwrap_or_default(),
            )?;
        }
        let moved = self.moves.iter().filter(|leg| leg.node.is_some()).count();
        writeln!(
            f,
            "{moved} of {} moves; {} of {} silent connections answered on; {} bytes of the stream came back, each verified",
            self.moves.len(),
            self.answered,
            self.connections,
            self.stream_bytes
        )?;
        if self.wrong.is_empty() {
            return writeln!(f, "every connection lived");
        }
        self.wrong.iter().try_for_each(|wrong| writeln!(f, "WRONG: {wrong}"))
    }
}

/// Starts a cluster and a guest, opens the connections, and moves the guest. `tell` gets a line for a person now and then.
///
/// # Errors
/// What kept it from being tried. A connection that breaks is in the report.
pub async fn run(options: &Options, tell: &mut dyn FnMut(&str)) -> Result<Report, Error> {
    let lab = Lab::with_cluster(&options.guest).await?;
    let guest = lab.guest().await?;
    let work = Workload::quiet(Mebibytes(256), Bandwidth::Unlimited);
    let mut ours = Ours::boot(&lab, &work).await?;
    let before = booted(&guest).await?;
    let to = SocketAddr::from((GUEST, ECHO));
    let (client, count) = (lab.client()?, options.connections);
    let (busy, silent) = blocking(move || {
        let silent = Silent::open(&client, to, count)?;
        Ok::<_, Error>((Busy::start(&client, to)?, silent))
    })
    .await??;
    tell(&format!("{count} silent connections and a stream to {to} are open"));
    let mut report = Report { connections: count, ..Report::default() };
    let mut last = Flow::default();
    for number in 1..=options.moves {
        let moved = ours.migrate(options.limit).await?;
        let flow = busy.pause();
        let leg = Leg {
            node: match moved.failure {
                None => Some(format!("node{}", ours.at().await? + 1)),
                Some(_) => None,
            },
            total_ms: (moved.over_us - moved.asked_us) as f64 / 1e3,
            standstill_ms: moved.resume_us.zip(moved.stop_us).map(|(resume, stop)| (resume - stop) as f64 / 1e3),
            stream_bytes: flow.verified - last.verified,
            stream_pause_ms: flow.longest_pause.as_secs_f64() * 1e3,
            retransmitted: flow.retransmitted.saturating_sub(last.retransmitted),
            failure: moved.failure,
        };
        tell(&format!(
            "move {number} to {}: {:.0} ms, the stream paused for {:.0} ms",
            leg.node.as_deref().unwrap_or("nowhere"),
            leg.total_ms,
            leg.stream_pause_ms
        ));
        report.wrong.extend(leg.failure.as_ref().map(|failure| format!("move {number} failed: {failure}")));
        report.moves.push(leg);
        last = flow;
        if last.wrong.is_some() {
            break;
        }
    }
    let (wrong, flow) = blocking(move || (silent.ask(2), busy.finish())).await?;
    report.answered = count - wrong.len();
    report.stream_bytes = flow.verified;
    report.wrong.extend(wrong);
    report.wrong.extend(flow.wrong.map(|wrong| format!("the stream: {wrong}")));
    match guest.facts().await {
        Ok(after) if after.token != before.token => report.wrong.push("the guest was started anew".into()),
        Ok(after) if after.corrupt_pages > 0 => {
            report.wrong.push(format!("the guest counts {} damaged pages", after.corrupt_pages));
        }
        Ok(_) => {}
        Err(error) => report.wrong.push(error.to_string()),
    }
    ours.end().await?;
    Ok(report)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::io("wait for the connections", std::io::Error::other(e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_wrong_is_in_the_report_and_its_verdict() {
        let leg = Leg { node: Some("node2".into()), total_ms: 812.0, standstill_ms: Some(9.25), ..Leg::default() };
        let mut report = Report { moves: vec![leg], connections: 3, answered: 3, stream_bytes: 77, wrong: Vec::new() };
        assert!(report.is_good());
        let text = report.to_string();
        assert!(
            text.contains("1 of 1 moves; 3 of 3 silent connections") && text.contains("every connection lived"),
            "{text}"
        );
        report.wrong.push("connection 2: reset".into());
        assert!(!report.is_good() && report.to_string().contains("WRONG: connection 2: reset"));
    }
}
