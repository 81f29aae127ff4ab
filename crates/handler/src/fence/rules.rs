//! Until when this node's guests may run: the argument of docs/fencing.md as a value. Times are those of one clock that never
//! jumps and counts the machine's sleep; whoever calls reads it.

use std::collections::BTreeSet;
use std::time::Duration;

use godwit_api::names::fence::{DURATION, PUT_OFF, SILENCE};
use serde::{Deserialize, Serialize};

/// The nodes that are asked before the fence is put off: empty where there is no other node, none where they are not known.
pub type Peers = Option<BTreeSet<String>>;

/// What a handler knows of its lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rules {
    until: Option<Duration>,
    /// When it was last heard here that a renewal had been taken; before that, when this process began: its predecessor may have
    /// heard so until then.
    contact: Duration,
    /// Whom the lease may name: those of the last answered renewal, and of each one sent since, which may have been taken. None
    /// where one of these knew nobody.
    may_stand: Peers,
}

impl Rules {
    /// A handler that has just begun and was left nothing ([`super::kept`]) holds nothing.
    #[must_use]
    pub fn new(now: Duration) -> Self {
        Self { until: None, contact: now, may_stand: None }
    }

    /// A renewal is about to be sent that names these peers.
    pub fn sends(&mut self, peers: Peers) {
        let both = self.may_stand.take().zip(peers);
        self.may_stand = both.map(|(mut all, more)| {
            all.extend(more);
            all
        });
    }

    /// It was answered: whatever was sent before it is settled.
    pub fn answered(&mut self, sent: Duration, now: Duration, peers: Peers) {
        self.until = self.until.max(Some(sent + DURATION));
        self.contact = now;
        self.may_stand = peers;
    }

    /// The lease was read, and has changed since it was last seen here: a renewal was taken whose answer was lost. The next one
    /// carries that revision, and shows others that this node has contact, so it may not say otherwise. Guests get no more time by it.
    pub fn finds_news(&mut self, now: Duration) {
        self.contact = now;
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

    /// For how long it was not heard that a renewal had been taken: what other handlers are told.
    #[must_use]
    pub fn silent_for(&self, now: Duration) -> Duration {
        now.saturating_sub(self.contact)
    }

    /// Whom to ask before the fence may be put off; none when it may not: the controller may count this node as dead by
    /// nobody's word.
    #[must_use]
    pub fn to_ask(&self) -> Peers {
        self.may_stand.clone()
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
    fn news_in_the_lease_is_contact_and_gives_guests_no_time() {
        let mut rules = Rules::new(s(0));
        rules.answered(s(0), s(1), None);
        rules.finds_news(s(12));
        assert_eq!((rules.silent_for(s(14)), rules.until()), (s(2), Some(s(20))));
    }

    #[test]
    fn renewals_that_nobody_answers_do_not_pile_up() {
        let mut rules = Rules::new(s(0));
        rules.answered(s(0), s(1), peers(&["b"]));
        rules.sends(peers(&["c"]));
        let once = rules.clone();
        (0..1000).for_each(|_| rules.sends(peers(&["b", "c"])));
        assert_eq!(rules, once);
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
