//! Until when this node's guests may run: the argument of docs/fencing.md as a value. Times are those of one clock that never
//! jumps and counts the machine's sleep; whoever calls reads it.

use std::collections::BTreeSet;
use std::time::Duration;

use godwit_api::names::fence::{DURATION, PUT_OFF, SILENCE};

/// The nodes that are asked before the fence is put off: empty where there is no other node, none where they are not known.
pub type Peers = Option<BTreeSet<String>>;

/// What a handler knows of its lease.
#[derive(Clone, Debug)]
pub struct Rules {
    until: Option<Duration>,
    /// When the last renewal that was answered was; before the first, when this process began: its predecessor may have had
    /// an answer until then.
    answered: Duration,
    /// What the last answered renewal said of the peers.
    stands: Peers,
    /// What was said by renewals that nobody has answered: each may stand.
    unanswered: Vec<Peers>,
}

impl Rules {
    /// A handler that has just begun holds nothing.
    #[must_use]
    pub fn new(now: Duration) -> Self {
        Self { until: None, answered: now, stands: None, unanswered: Vec::new() }
    }

    /// A renewal is about to be sent that names these peers.
    pub fn sends(&mut self, peers: Peers) {
        self.unanswered.push(peers);
    }

    /// It was answered: whatever was sent before it is settled.
    pub fn answered(&mut self, sent: Duration, now: Duration, peers: Peers) {
        self.until = self.until.max(Some(sent + DURATION));
        self.answered = now;
        self.stands = peers;
        self.unanswered.clear();
    }

    /// Until when guests may run here, if anybody has said so.
    #[must_use]
    pub fn until(&self) -> Option<Duration> {
        self.until
    }

    /// Whether guests may run here now.
    #[must_use]
    pub fn is_held(&self, now: Duration) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// For how long no renewal was answered: what other handlers are told.
    #[must_use]
    pub fn silent_for(&self, now: Duration) -> Duration {
        now.saturating_sub(self.answered)
    }

    /// Whom to ask before the fence may be put off; none when it may not: the controller may count this node as dead by
    /// nobody's word.
    #[must_use]
    pub fn to_ask(&self) -> Peers {
        let mut all = self.stands.clone()?;
        for sent in &self.unanswered {
            all.extend(sent.clone()?);
        }
        Some(all)
    }

    /// All of them, asked at `asked`, have said by `now` that they have had no contact for [`SILENCE`].
    pub fn put_off(&mut self, asked: Duration, now: Duration) {
        if self.is_held(now) {
            self.until = self.until.max(Some(asked + PUT_OFF));
        }
    }
}

/// Whether a handler that has been silent for this long tells so in a way that counts.
#[must_use]
pub fn counts(silent_for: Duration) -> bool {
    silent_for >= SILENCE
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn peers(names: &[&str]) -> Peers {
        Some(names.iter().map(|name| (*name).to_owned()).collect())
    }

    #[test]
    fn it_counts_from_the_sending_and_only_what_was_answered_counts() {
        let mut rules = Rules::new(s(100));
        assert!(!rules.is_held(s(100)));
        rules.sends(None);
        assert!(!rules.is_held(s(101)), "nobody has answered");
        rules.answered(s(100), s(104), None);
        assert_eq!(rules.until(), Some(s(120)));
        assert!(rules.is_held(s(119)) && !rules.is_held(s(120)));
        assert_eq!(rules.silent_for(s(117)), s(13));
        // An answer that comes after the deadline is worth what is left of its own time.
        rules.answered(s(110), s(125), None);
        assert!(rules.is_held(s(125)) && !rules.is_held(s(130)));
    }

    #[test]
    fn all_that_the_controller_may_have_read_are_asked() {
        let mut rules = Rules::new(s(0));
        assert_eq!(rules.to_ask(), None);
        rules.sends(peers(&["b"]));
        assert_eq!(rules.to_ask(), None, "before it the lease may say anything");
        rules.answered(s(0), s(1), peers(&["b"]));
        assert_eq!(rules.to_ask(), peers(&["b"]));
        rules.sends(peers(&["c"]));
        assert_eq!(rules.to_ask(), peers(&["b", "c"]));
        rules.answered(s(2), s(3), peers(&["c"]));
        assert_eq!(rules.to_ask(), peers(&["c"]));
        rules.sends(None);
        assert_eq!(rules.to_ask(), None);
        rules.answered(s(4), s(5), Some(BTreeSet::new()));
        assert_eq!(rules.to_ask(), peers(&[]));
    }

    #[test]
    fn what_has_passed_is_not_put_off_any_more() {
        let mut rules = Rules::new(s(0));
        rules.answered(s(0), s(0), peers(&[]));
        rules.put_off(s(5), s(6));
        assert_eq!(rules.until(), Some(s(20)), "never brought nearer");
        rules.put_off(s(19), s(19));
        assert_eq!(rules.until(), Some(s(29)));
        rules.put_off(s(28), s(29));
        assert!(!rules.is_held(s(29)));
    }
}
