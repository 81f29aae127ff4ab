//! One live line a VM, or plain lines where nobody sits at a terminal.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use console::{Term, measure_text_width, truncate_str};
use godwit_control::Name;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use jiff::Timestamp;

use crate::course::Standing;
use crate::show;

/// A bar is drawn where a line has room for this many characters.
const ROOM_FOR_A_BAR: usize = 60;
/// As long is it.
const BAR: usize = 10;
/// No name is cut to less.
const SHORTEST_NAME: usize = 10;

/// What is on the screen.
#[derive(Default)]
pub struct Lines {
    /// All lines are one to it: it draws them anew where they are, and other words above them.
    screen: Option<ProgressBar>,
    /// In the order of the plan.
    rows: Vec<Row>,
    places: BTreeMap<Name, usize>,
    /// How far the whole is.
    whole: String,
    taken_back: bool,
    /// What was said last, so that nothing is said twice.
    said: BTreeMap<Name, String>,
    /// How many have not left, as it was said last.
    left: Option<usize>,
}

/// What a line says of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    name: String,
    percent: u32,
    text: String,
    /// Where there is no room for all, those of the least are seen.
    rank: u8,
}

impl Lines {
    /// An empty screen.
    pub fn new() -> Self {
        let screen = std::io::stdout().is_terminal().then(block);
        Self { screen, ..Self::default() }
    }

    /// Says something in passing.
    pub fn say(&self, text: &str) {
        match &self.screen {
            Some(screen) => screen.println(text),
            None => tell!("{text}"),
        }
    }

    /// Somebody has pressed Ctrl-C. The terminal has shown that in the midst of the lines, and nobody knows any more where they
    /// are: they stay as they were, and others come below.
    pub fn interrupted(&mut self, text: &str) {
        if let Some(screen) = &mut self.screen {
            let before = std::mem::replace(screen, block());
            before.set_draw_target(ProgressDrawTarget::hidden());
            before.finish();
            tell!();
        }
        self.say(text);
    }

    /// Nobody is to leave any more.
    pub fn taking_back(&mut self) {
        self.taken_back = true;
    }

    /// Where a VM stands.
    pub fn vm(&mut self, vmi: &Name, standing: &Standing, now: Timestamp) {
        if self.screen.is_some() {
            let row = row(vmi, standing, now, self.taken_back);
            match self.places.get(vmi).and_then(|place| self.rows.get_mut(*place)) {
                Some(known) => *known = row,
                None => {
                    self.places.insert(vmi.clone(), self.rows.len());
                    self.rows.push(row);
                }
            }
            return;
        }
        // Plainly, only what is new of its kind is a line; not each per cent, but each quarter.
        let word = coarse(standing);
        if self.said.get(vmi) != Some(&word) {
            if self.said.contains_key(vmi) || *standing != Standing::Waits {
                tell!("{vmi}: {}", told(standing, now));
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

    /// How far the whole is; all of it is drawn. Plainly, it is a line whenever another one has left.
    pub fn whole(&mut self, left: usize, all: usize, begun: Duration, rest: Option<Duration>) {
        let time = |time: Duration| show::milliseconds(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        let rest = match rest {
            _ if self.taken_back => "taking it back".to_owned(),
            Some(rest) => format!("about {} more", time(rest)),
            None => "longer than expected".to_owned(),
        };
        self.whole = format!("{} of {all} have left, {}", all.saturating_sub(left), time(begun));
        let whole = format!("{}, {rest}", self.whole);
        let Some(screen) = &self.screen else {
            if self.left.replace(left).is_some_and(|before| before != left) && left > 0 {
                tell!("{whole}");
            }
            return;
        };
        let (height, width) = Term::stdout().size();
        screen.set_message(drawn(&self.rows, &whole, usize::from(width), usize::from(height)).join("\n"));
    }

    /// Leaves the screen as it is; what is said from now on comes below it.
    pub fn end(&mut self) {
        let Some(screen) = self.screen.take() else { return };
        screen.finish_and_clear();
        let (_, width) = Term::stdout().size();
        for line in self.last(usize::from(width)) {
            tell!("{line}");
        }
    }

    /// What stays on the screen: all lines, though it may scroll, and nothing of what is still to come.
    fn last(&self, width: usize) -> Vec<String> {
        drawn(&self.rows, &self.whole, width, usize::MAX)
    }
}

/// Lines that are drawn anew where they are.
fn block() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout()).with_style(style)
}

/// What is drawn on a screen of this size: a line a VM, as far as there is room, and one for the whole.
fn drawn(rows: &[Row], whole: &str, width: usize, height: usize) -> Vec<String> {
    // A line that is full would move the cursor to the next one.
    let width = width.saturating_sub(1).max(1);
    // One for the whole, one for the cursor.
    let most = height.saturating_sub(2).max(1);
    let mut seen: Vec<(usize, &Row)> = rows.iter().enumerate().collect();
    let mut unseen = 0;
    if seen.len() > most {
        let most = most.saturating_sub(1);
        seen.sort_by_key(|(index, row)| (row.rank, *index));
        unseen = seen.len() - most;
        seen.truncate(most);
        seen.sort_by_key(|(index, _)| *index);
    }
    let longest = seen.iter().map(|(_, row)| measure_text_width(&row.name)).max().unwrap_or(0);
    let room = longest.min((width * 2 / 5).max(SHORTEST_NAME));
    let cut = |text: &str| truncate_str(text, width, "…").into_owned();
    let mut lines: Vec<String> = seen
        .into_iter()
        .map(|(_, row)| {
            let name = shortened(&row.name, room);
            let bar = if width >= ROOM_FOR_A_BAR { format!("{}  ", bar(row.percent)) } else { String::new() };
            cut(&format!("{name:room$}  {bar}{}", row.text))
        })
        .collect();
    if unseen > 0 {
        lines.push(cut(&format!("and {unseen} more")));
    }
    lines.push(cut(whole));
    lines
}

/// A name that fits, with its beginning and its end.
fn shortened(name: &str, room: usize) -> String {
    let all: Vec<char> = name.chars().collect();
    if all.len() <= room {
        return name.to_owned();
    }
    let end = room.saturating_sub(1) / 3;
    let begin = room.saturating_sub(1).saturating_sub(end);
    let (begin, end) = (all.iter().take(begin), all.iter().skip(all.len().saturating_sub(end)));
    begin.chain(['…'].iter()).chain(end).collect()
}

fn bar(percent: u32) -> String {
    let full = usize::try_from(percent.min(100)).unwrap_or(0) * BAR / 100;
    format!("{}{}", "█".repeat(full), "░".repeat(BAR.saturating_sub(full)))
}

/// A line of the screen: what matters most comes first, for the rest may be cut off.
fn row(vmi: &Name, standing: &Standing, now: Timestamp, taken_back: bool) -> Row {
    let (text, percent, rank) = match standing {
        Standing::Moves { target, percent, phase, end } => {
            let to = target.as_ref().map(|node| format!("to {node}")).unwrap_or_else(|| "moves".to_owned());
            let text = match (percent, rest(*end, now)) {
                (Some(percent), Some(rest)) => format!("{percent}%  {rest} more  {to}"),
                (Some(percent), None) => format!("{percent}%  {to}"),
                (None, _) => format!("{to} ({phase})"),
            };
            (text, percent.unwrap_or(0), 0)
        }
        Standing::Left(to, downtime) => {
            let to = to.as_ref().map(|node| format!("on {node}")).unwrap_or_else(|| "has left".to_owned());
            let still = downtime.map(|ms| format!(", stood still for {ms} ms")).unwrap_or_default();
            (format!("{to}{still}"), 100, 4)
        }
        Standing::Ended => (told(standing, now), 100, 4),
        Standing::ShutsDown => (told(standing, now), 0, 0),
        Standing::Arrived(_) => (told(standing, now), 100, 0),
        _ if taken_back => ("stays where it is".to_owned(), 0, 3),
        Standing::Stays(..) => (told(standing, now), 0, 1),
        Standing::Queued(_) => (told(standing, now), 0, 2),
        Standing::Waits => (told(standing, now), 0, 3),
    };
    Row { name: vmi.to_string(), percent, text, rank }
}

/// How long it still takes.
fn rest(end: Option<Timestamp>, now: Timestamp) -> Option<String> {
    let rest = u64::try_from(end?.duration_since(now).as_millis()).ok()?;
    Some(show::milliseconds(rest))
}

fn told(standing: &Standing, now: Timestamp) -> String {
    match standing {
        Standing::Waits => "waits".to_owned(),
        Standing::Queued(None) => "is to leave".to_owned(),
        Standing::Queued(Some(why)) => format!("is to leave; {why}"),
        Standing::Moves { phase, target, percent, end } => {
            let to = target.as_ref().map(|node| format!(" to {node}")).unwrap_or_default();
            let part = percent.map(|percent| format!(", {percent}%")).unwrap_or_default();
            let rest = rest(*end, now).map(|rest| format!(", {rest} more")).unwrap_or_default();
            format!("migrates{to} ({phase}{part}{rest})")
        }
        Standing::ShutsDown => "is shut down".to_owned(),
        Standing::Arrived(node) => format!("runs on {node}; the pod that it was in ends"),
        Standing::Left(to, downtime) => {
            let to = to.as_ref().map(|node| format!(", runs on {node}")).unwrap_or_default();
            let still = downtime.map(|ms| format!(", stood still for {ms} ms")).unwrap_or_default();
            format!("has left{to}{still}")
        }
        Standing::Ended => "has ended".to_owned(),
        Standing::Stays(why, true) => format!("STAYS: {why}"),
        Standing::Stays(why, false) => format!("is refused for now: {why}"),
    }
}

/// What of it is worth a line of its own.
fn coarse(standing: &Standing) -> String {
    match standing {
        Standing::Moves { target, percent, .. } => {
            format!("moves {target:?} {:?}", percent.map(|percent| percent / 25))
        }
        Standing::Left(to, _) => format!("left {to:?}"),
        other => told(other, Timestamp::UNIX_EPOCH),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(all: &[(&str, u8)]) -> Vec<Row> {
        let row = |(name, rank): &(&str, u8)| Row {
            name: (*name).to_owned(),
            percent: 42,
            text: "42%  12 s more  to node3".to_owned(),
            rank: *rank,
        };
        all.iter().map(row).collect()
    }

    fn screen(rows: &[Row], width: usize, height: usize) -> Vec<String> {
        drawn(rows, "1 of 3 have left, 12 s, about 2 min more", width, height)
    }

    #[test]
    fn a_line_holds_what_matters_at_each_width() {
        let rows = rows(&[("default/a", 0), ("default/a-guest-with-a-rather-long-name-of-fifty-characters", 0)]);
        assert_eq!(
            screen(&rows, 80, 24),
            [
                format!("{:31}  ████░░░░░░  42%  12 s more  to node3", "default/a"),
                "default/a-guest-with…characters  ████░░░░░░  42%  12 s more  to node3".to_owned(),
                "1 of 3 have left, 12 s, about 2 min more".to_owned(),
            ]
        );
        let narrow = screen(&rows, 40, 24);
        assert_eq!(narrow[1], "default/a-…ters  42%  12 s more  to no…");
        for (width, lines) in [(80, screen(&rows, 80, 24)), (40, narrow), (20, screen(&rows, 20, 24))] {
            assert!(lines.iter().all(|line| measure_text_width(line) < width), "{width}: {lines:#?}");
        }
    }

    #[test]
    fn where_there_is_no_room_for_all_those_that_move_are_seen() {
        let all: Vec<(String, u8)> =
            (0..30).map(|n| (format!("default/vm{n:02}"), if n == 17 { 0 } else { 3 })).collect();
        let all: Vec<(&str, u8)> = all.iter().map(|(name, rank)| (name.as_str(), *rank)).collect();
        let lines = screen(&rows(&all), 80, 10);
        assert_eq!(lines.len(), 9, "and the cursor's: {lines:#?}");
        assert!(lines[6].starts_with("default/vm17"), "{lines:#?}");
        assert_eq!(lines[7], "and 23 more");
        assert_eq!(screen(&rows(&all), 80, usize::MAX).len(), 31);
    }

    #[test]
    fn what_stays_on_the_screen_says_nothing_of_what_is_to_come() {
        let mut lines = Lines { screen: Some(ProgressBar::hidden()), ..Lines::default() };
        lines.vm(&Name::new("default", "a"), &Standing::Waits, Timestamp::UNIX_EPOCH);
        lines.taking_back();
        lines.whole(3, 4, Duration::from_secs(12), None);
        let drawn = lines.screen.as_ref().unwrap().message();
        assert!(drawn.ends_with("\n1 of 4 have left, 12 s, taking it back"), "{drawn}");
        assert_eq!(lines.last(80).last().unwrap(), "1 of 4 have left, 12 s");
    }

    #[test]
    fn plainly_each_quarter_of_the_way_is_worth_a_line() {
        let at = |percent| Standing::Moves {
            phase: "Running".to_owned(),
            target: Some("node2".to_owned()),
            percent,
            end: None,
        };
        let ways = [None, Some(0), Some(7), Some(24), Some(25), Some(49), Some(50), Some(99), Some(100)];
        let mut words: Vec<String> = ways.into_iter().map(|percent| coarse(&at(percent))).collect();
        words.dedup();
        assert_eq!(words.len(), 6, "unknown, the four quarters, and all: {words:?}");
    }

    #[test]
    fn what_was_taken_back_does_not_wait_any_more() {
        let vmi = Name::new("default", "a");
        let said = |standing: Standing, taken_back| row(&vmi, &standing, Timestamp::UNIX_EPOCH, taken_back).text;
        assert_eq!(said(Standing::Waits, false), "waits");
        assert_eq!(said(Standing::Waits, true), "stays where it is");
        assert_eq!(said(Standing::Stays("no".to_owned(), false), true), "stays where it is");
        assert_eq!(said(Standing::Left(Some("node2".to_owned()), Some(12)), true), "on node2, stood still for 12 ms");
    }
}
