//! One live line a VM, or plain lines where nobody sits at a terminal.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use godwit_control::Name;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use jiff::Timestamp;

use crate::course::Standing;
use crate::show;

/// What is on the screen.
pub struct Lines {
    bars: Option<MultiProgress>,
    whole: Option<ProgressBar>,
    vms: BTreeMap<Name, ProgressBar>,
    /// What was said last, so that nothing is said twice.
    said: BTreeMap<Name, String>,
}

impl Lines {
    /// An empty screen.
    pub fn new() -> Self {
        let bars = std::io::stdout().is_terminal().then(MultiProgress::new);
        let whole = bars.as_ref().map(|bars| bars.add(bar("{elapsed:>5}  {wide_bar} {pos}/{len}  {msg}")));
        Self { bars, whole, vms: BTreeMap::new(), said: BTreeMap::new() }
    }

    /// Says something in passing.
    pub fn say(&self, text: &str) {
        match &self.bars {
            Some(bars) => _ = bars.println(text),
            None => tell!("{text}"),
        }
    }

    /// Where a VM stands.
    pub fn vm(&mut self, vmi: &Name, standing: &Standing, now: Timestamp) {
        let (text, percent) = told(standing, now);
        if let Some(bars) = &self.bars {
            let line = self.vms.entry(vmi.clone()).or_insert_with(|| {
                let line = bar("{prefix:<32.32} {bar:20} {wide_msg}");
                line.set_length(100);
                line.set_prefix(vmi.to_string());
                match &self.whole {
                    Some(whole) => bars.insert_before(whole, line),
                    None => bars.add(line),
                }
            });
            line.set_position(u64::from(percent));
            line.set_message(text);
            return;
        }
        // Plainly, only what is new of its kind is a line; not each per cent.
        let word = coarse(standing);
        if self.said.get(vmi) != Some(&word) {
            if self.said.contains_key(vmi) || *standing != Standing::Waits {
                tell!("{vmi}: {text}");
            }
            self.said.insert(vmi.clone(), word);
        }
    }

    /// What another pod was told.
    pub fn pod(&mut self, pod: &Name, why: &str) {
        if self.said.get(pod).map(String::as_str) != Some(why) {
            self.say(&format!("pod {pod}: {why}"));
            self.said.insert(pod.clone(), why.to_owned());
        }
    }

    /// How far the whole is.
    pub fn whole(&self, left: usize, all: usize, rest: Option<Duration>) {
        let Some(whole) = &self.whole else { return };
        whole.set_length(u64::try_from(all).unwrap_or(u64::MAX));
        whole.set_position(u64::try_from(all.saturating_sub(left)).unwrap_or(0));
        whole.set_message(match rest {
            Some(rest) => {
                format!("about {} more", show::milliseconds(u64::try_from(rest.as_millis()).unwrap_or(u64::MAX)))
            }
            None => "longer than expected".to_owned(),
        });
    }

    /// Leaves the screen as it is.
    pub fn end(&self) {
        self.vms.values().chain(&self.whole).for_each(ProgressBar::abandon);
    }
}

fn bar(template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::no_length().with_style(style)
}

fn told(standing: &Standing, now: Timestamp) -> (String, u32) {
    match standing {
        Standing::Waits => ("waits".to_owned(), 0),
        Standing::Queued(None) => ("is to leave".to_owned(), 0),
        Standing::Queued(Some(why)) => (format!("is to leave; {why}"), 0),
        Standing::Moves { phase, target, percent, end } => {
            let to = target.as_ref().map(|node| format!(" to {node}")).unwrap_or_default();
            let part = percent.map(|percent| format!(", {percent}%")).unwrap_or_default();
            let rest = end.and_then(|end| u64::try_from(end.duration_since(now).as_millis()).ok());
            let rest = rest.map(|rest| format!(", {} more", show::milliseconds(rest))).unwrap_or_default();
            (format!("migrates{to} ({phase}{part}{rest})"), percent.unwrap_or(0))
        }
        Standing::ShutsDown => ("is shut down".to_owned(), 0),
        Standing::Left(to, downtime) => {
            let to = to.as_ref().map(|node| format!(", runs on {node}")).unwrap_or_default();
            let still = downtime.map(|ms| format!(", stood still for {ms} ms")).unwrap_or_default();
            (format!("has left{to}{still}"), 100)
        }
        Standing::Ended => ("has ended".to_owned(), 100),
        Standing::Stays(why, true) => (format!("STAYS: {why}"), 0),
        Standing::Stays(why, false) => (format!("is refused for now: {why}"), 0),
    }
}

/// What of it is worth a line of its own.
fn coarse(standing: &Standing) -> String {
    match standing {
        Standing::Moves { target, .. } => format!("moves {target:?}"),
        Standing::Left(to, _) => format!("left {to:?}"),
        other => told(other, Timestamp::UNIX_EPOCH).0,
    }
}
