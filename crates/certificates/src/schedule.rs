//! What is due when: decided on certificates' dates alone.
//!
//! A certificate is replaced when two thirds of its life are over. For a CA that is done in steps, so that nobody ever meets a
//! certificate whose CA it does not know: the next CA is made and published; when it has been known everywhere for a while it
//! signs, and the one before it stays published until it is over, and with it all that it has signed (nothing outlives its CA).

use std::time::Duration;

/// How long certificates live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetimes {
    /// A CA.
    pub authority: Duration,
    /// What it signs.
    pub certificate: Duration,
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Clocks may differ by so much at most: certificates begin that long before they are made.
const SKEW: Duration = Duration::from_secs(5 * 60);
/// How long a CA is published at most before it signs.
const SETTLE: Duration = Duration::from_secs(60 * 60);

impl Default for Lifetimes {
    fn default() -> Self {
        Self { authority: DAY * 90, certificate: DAY * 10 }
    }
}

impl Lifetimes {
    /// Checks that they go together: what a CA signs in its last third, and what is still to be signed until the next one does,
    /// has to fit into its life.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn checked(self) -> Result<Self, String> {
        let Self { authority, certificate } = self;
        if certificate < Duration::from_secs(5) {
            return Err(format!("a certificate cannot live for {certificate:?}: five seconds are the least"));
        }
        if authority < certificate * 5 {
            return Err(format!(
                "a CA that lives for {authority:?} cannot sign certificates that live for {certificate:?}: it has to live five \
                 times as long"
            ));
        }
        Ok(self)
    }

    /// How long a new CA is known everywhere before it signs.
    pub fn settle(&self) -> Duration {
        (self.authority / 12).min(SETTLE)
    }

    /// How often one looks whether something is due.
    pub fn look(&self) -> Duration {
        (self.certificate / 20).clamp(Duration::from_millis(250), Duration::from_secs(10))
    }
}

/// How long before the time of its making a certificate begins that lives so long.
pub fn backdate(lifetime: Duration) -> Duration {
    (lifetime / 10).min(SKEW)
}

/// From when to when a certificate counts, in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// The first second.
    pub not_before: i64,
    /// The last second.
    pub not_after: i64,
}

impl Validity {
    /// That of a certificate made now, which does not outlive what it is signed by.
    pub fn from(now: i64, lifetime: Duration, within: Option<Validity>) -> Self {
        let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        let end = now.saturating_add(seconds(lifetime));
        Self {
            not_before: now.saturating_sub(seconds(backdate(lifetime))),
            not_after: within.map_or(end, |issuer| end.min(issuer.not_after)),
        }
    }

    /// When it is to be replaced.
    pub fn renew_at(&self) -> i64 {
        let life = self.not_after.saturating_sub(self.not_before).max(0);
        self.not_before.saturating_add(life / 3 * 2 + life % 3 * 2 / 3)
    }

    /// Whether it counts no more.
    pub fn is_over(&self, now: i64) -> bool {
        now > self.not_after
    }
}

/// The CAs that there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// The one that signs.
    pub current: Option<Validity>,
    /// The one that will sign.
    pub next: Option<Validity>,
    /// Those that have signed.
    pub previous: Vec<Validity>,
}

/// What is to be done with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// None can sign: make one that does at once.
    Begin,
    /// Make the next one and publish it.
    Prepare,
    /// The next one signs from now on.
    Promote,
    /// Take away those that are over.
    Forget,
}

/// What is due. `published`: since when the next CA is known to be published everywhere.
pub fn due(held: &Held, published: Option<i64>, now: i64, lifetimes: &Lifetimes) -> Option<Step> {
    let next = held.next.filter(|next| !next.is_over(now));
    let Some(current) = held.current.filter(|current| !current.is_over(now)) else {
        // Nothing that is signed by a CA that is over counts: whatever is not published yet is not worse.
        return Some(if next.is_some() { Step::Promote } else { Step::Begin });
    };
    if next.is_none() && now >= current.renew_at() {
        return Some(Step::Prepare);
    }
    let settle = i64::try_from(lifetimes.settle().as_secs()).unwrap_or(i64::MAX);
    if next.is_some() && published.is_some_and(|since| now >= since.saturating_add(settle)) {
        return Some(Step::Promote);
    }
    held.previous.iter().any(|old| old.is_over(now)).then_some(Step::Forget)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_certificate_is_renewed_at_two_thirds_of_its_life() {
        let one = Validity { not_before: 1000, not_after: 1300 };
        assert_eq!(one.renew_at(), 1200);
        assert!(!one.is_over(1300) && one.is_over(1301));
        assert_eq!(Validity { not_before: 0, not_after: 8 }.renew_at(), 5);
        let odd = Validity { not_before: 5, not_after: 1 };
        assert_eq!(odd.renew_at(), 5);
    }

    #[test]
    fn nothing_outlives_its_issuer_and_clocks_may_differ() {
        let authority = Validity { not_before: 0, not_after: 100_000 };
        let hour = Duration::from_secs(3600);
        let one = Validity::from(50_000, hour, Some(authority));
        assert_eq!(one, Validity { not_before: 50_000 - 300, not_after: 53_600 });
        assert_eq!(Validity::from(99_000, hour, Some(authority)).not_after, 100_000);
    }

    #[test]
    fn lifetimes_have_to_go_together() {
        assert!(Lifetimes::default().checked().is_ok());
        let of = |authority, certificate| Lifetimes {
            authority: Duration::from_secs(authority),
            certificate: Duration::from_secs(certificate),
        };
        assert!(of(40, 8).checked().is_ok());
        assert!(of(39, 8).checked().unwrap_err().contains("five times as long"));
        assert!(of(40, 1).checked().unwrap_err().contains("five seconds are the least"));
    }

    #[test]
    fn a_ca_is_replaced_in_steps() {
        let lifetimes = Lifetimes { authority: Duration::from_secs(1200), certificate: Duration::from_secs(100) };
        let due = |held: &Held, published, now| due(held, published, now, &lifetimes);
        let mut held = Held::default();
        assert_eq!(due(&held, None, 0), Some(Step::Begin));
        held.current = Some(Validity { not_before: 0, not_after: 1200 });
        assert_eq!(due(&held, None, 799), None);
        assert_eq!(due(&held, None, 800), Some(Step::Prepare));
        held.next = Some(Validity { not_before: 800, not_after: 2000 });
        assert_eq!(due(&held, None, 1000), None, "nobody knows it yet");
        assert_eq!(due(&held, Some(1000), 1099), None);
        assert_eq!(due(&held, Some(1000), 1100), Some(Step::Promote));
        assert_eq!(due(&held, None, 1201), Some(Step::Promote), "the current one is over");
        let held = Held { current: held.next, next: None, previous: vec![Validity { not_before: 0, not_after: 1200 }] };
        assert_eq!(due(&held, None, 1200), None);
        assert_eq!(due(&held, None, 1201), Some(Step::Forget));
        let over = Held { next: held.current, current: held.current, ..Held::default() };
        assert_eq!(due(&over, None, 3000), Some(Step::Begin));
    }

    proptest! {
        /// Whenever it is looked at, and however late the CA is published: as long as that succeeds at all and somebody looks
        /// more often than a certificate lives, whoever trusts what is published trusts every certificate that is in use.
        #[test]
        fn nobody_meets_a_certificate_whose_ca_is_not_published(
            certificate in 5_u64..50, times in 5_u64..20, pauses in prop::collection::vec((1_i64..4, any::<bool>()), 50..400),
        ) {
            let lifetimes = Lifetimes {
                authority: Duration::from_secs(certificate * times), certificate: Duration::from_secs(certificate),
            };
            let mut held = Held::default();
            let mut published: Vec<Validity> = Vec::new();
            let mut known_since = None;
            let mut signed: Vec<(Validity, Validity)> = Vec::new();
            let mut now = 1_000_000;
            for (pause, publishes) in pauses {
                now += pause;
                if publishes {
                    published = held.current.into_iter().chain(held.next).chain(held.previous.clone()).collect();
                    known_since = known_since.or(held.next.map(|_| now));
                }
                match due(&held, known_since, now, &lifetimes) {
                    Some(Step::Begin) => {
                        held = Held { current: Some(Validity::from(now, lifetimes.authority, None)), ..Held::default() };
                        known_since = None;
                        // The first one, or after a time when nothing counted: it is published before it is used.
                        published = held.current.into_iter().collect();
                    }
                    Some(Step::Prepare) => {
                        held.next = Some(Validity::from(now, lifetimes.authority, None));
                        known_since = None;
                    }
                    Some(Step::Promote) => {
                        let known = known_since.is_some();
                        held.previous.extend(held.current.take());
                        held.current = held.next.take();
                        known_since = None;
                        if !known {
                            published.extend(held.current);
                        }
                    }
                    Some(Step::Forget) => held.previous.retain(|old| !old.is_over(now)),
                    None => {}
                }
                if let Some(authority) = held.current {
                    signed.push((Validity::from(now, lifetimes.certificate, Some(authority)), authority));
                }
                signed.retain(|(one, _)| !one.is_over(now));
                for (_, authority) in &signed {
                    prop_assert!(published.contains(authority), "{now}: {authority:?} signed and is not in {published:?}");
                }
            }
        }
    }
}
