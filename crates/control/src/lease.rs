//! Who decides: of several controllers only the one that holds the lease does.
//!
//! It spares writes that would be refused; that nothing goes wrong when two decide at once is the business of the
//! revisions that each write carries. Times are those of a clock that never jumps, each controller's own: nobody trusts
//! the clock of another.

use std::time::Duration;

use godwit_api::Installation;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};

use crate::names;
use crate::object::Name;

/// Who holds the lease, or would.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Namespace and name of the lease.
    pub lease: Name,
    /// Under which name to hold it. No two running controllers may have the same, and one that is restarted goes on faster
    /// with the name it had.
    pub holder: String,
}

impl Candidate {
    /// For the lease that KubeVirt's controllers hold as well, in the namespace of the usual installation, so that of both only one
    /// decides.
    pub fn new(holder: impl Into<String>) -> Self {
        let lease = Name::new(Installation::USUAL.namespace(), names::CONTROLLER_LEASE);
        Self { lease, holder: holder.into() }
    }
}

/// Others take the lease when it has not been renewed for this long (KubeVirt's).
pub const DURATION: Duration = Duration::from_secs(15);
/// Who has not renewed it for this long stops deciding, well before others begin (KubeVirt's).
pub const GIVE_UP: Duration = Duration::from_secs(10);
/// Between two looks at the lease; each look of the holder renews it (KubeVirt's).
pub const LOOK_EVERY: Duration = Duration::from_secs(2);

/// The lease as one controller has seen it.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The lease, `None` while there is none.
    pub lease: Option<Lease>,
    /// When it was first seen in this state.
    pub since: Duration,
}

impl Seen {
    /// Takes in a fresh reading.
    pub fn look(&mut self, now: Duration, lease: Option<Lease>) {
        let revision = |lease: &Option<Lease>| lease.as_ref().and_then(|lease| lease.metadata.resource_version.clone());
        if revision(&lease) != revision(&self.lease) || lease.is_some() != self.lease.is_some() {
            self.since = now;
        }
        self.lease = lease;
    }
}

/// What to do about the lease.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Create it like this.
    Create(Box<Lease>),
    /// Replace it with this, if it has not changed.
    Replace(Box<Lease>),
    /// It is another's.
    Wait,
}

/// Decides about the lease on behalf of a candidate. `now` is the own clock's, `time` only for people to read.
///
/// A lease under the own name is taken back at once: after a restart nobody else has that name.
pub fn decide_lease(now: Duration, seen: &Seen, candidate: &Candidate, time: Timestamp) -> Step {
    let me = candidate.holder.as_str();
    let Some(lease) = &seen.lease else {
        let metadata = ObjectMeta {
            namespace: Some(candidate.lease.namespace.to_string()),
            name: Some(candidate.lease.name.to_string()),
            ..ObjectMeta::default()
        };
        return Step::Create(Box::new(Lease { metadata, spec: Some(held(me, time, None)) }));
    };
    let spec = lease.spec.clone().unwrap_or_default();
    let holder = spec.holder_identity.as_deref().unwrap_or_default();
    let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    let allowed = seconds.map_or(DURATION, Duration::from_secs);
    let expired = now.saturating_sub(seen.since) >= allowed;
    if holder == me || holder.is_empty() || expired {
        let spec = held(me, time, Some(spec));
        return Step::Replace(Box::new(Lease { spec: Some(spec), ..lease.clone() }));
    }
    Step::Wait
}

/// The lease, held by `me` from now on or still.
fn held(me: &str, time: Timestamp, before: Option<LeaseSpec>) -> LeaseSpec {
    let now = Some(MicroTime(time));
    let mut spec = before.unwrap_or_default();
    if spec.holder_identity.as_deref() != Some(me) {
        spec.lease_transitions = Some(spec.lease_transitions.map_or(0, |count| count.saturating_add(1)));
        spec.acquire_time = now.clone();
    }
    spec.holder_identity = Some(me.to_owned());
    spec.lease_duration_seconds = Some(i32::try_from(DURATION.as_secs()).unwrap_or(i32::MAX));
    spec.renew_time = now;
    spec
}

/// The lease, given back so that the next controller need not wait; `None` when it is not held by `me`.
pub fn given_back(lease: &Lease, me: &str) -> Option<Lease> {
    let mut spec = lease.spec.clone().filter(|spec| spec.holder_identity.as_deref() == Some(me))?;
    spec.holder_identity = Some(String::new());
    Some(Lease { spec: Some(spec), ..lease.clone() })
}

/// Until when a write of the lease lets its writer decide; it counts from when the write was sent.
pub fn leads_until(sent: Duration) -> Duration {
    sent.saturating_add(GIVE_UP)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn written(step: Step, revision: &str) -> Lease {
        let (Step::Create(lease) | Step::Replace(lease)) = step else { panic!("it waits") };
        let metadata = ObjectMeta { resource_version: Some(revision.to_owned()), ..lease.metadata };
        Lease { metadata, ..*lease }
    }

    fn step(now: u64, seen: &Seen, me: &str) -> Step {
        decide_lease(seconds(now), seen, &Candidate::new(me), Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn the_first_takes_it_and_the_second_waits_until_it_is_not_renewed() {
        let (mut a, mut b) = (Seen::default(), Seen::default());
        let lease = written(step(0, &a, "a"), "1");
        a.look(seconds(0), Some(lease.clone()));
        b.look(seconds(3), Some(lease));
        assert_eq!(step(17, &b, "b"), Step::Wait);
        // A renewal starts the time anew, seen by b's own clock.
        let renewed = written(step(14, &a, "a"), "2");
        assert_eq!(renewed.spec.as_ref().unwrap().lease_transitions, Some(0));
        b.look(seconds(18), Some(renewed.clone()));
        b.look(seconds(20), Some(renewed));
        assert_eq!(step(32, &b, "b"), Step::Wait);
        let taken = written(step(33, &b, "b"), "3").spec.unwrap();
        assert_eq!((taken.holder_identity.as_deref(), taken.lease_transitions), (Some("b"), Some(1)));
    }

    #[test]
    fn the_own_lease_is_taken_back_at_once_and_a_given_back_one_by_anybody() {
        let mut seen = Seen::default();
        let lease = written(step(0, &seen, "a"), "1");
        seen.look(seconds(0), Some(lease.clone()));
        assert!(matches!(step(0, &seen, "a"), Step::Replace(_)), "after a restart");
        assert_eq!(given_back(&lease, "b"), None);
        seen.look(seconds(1), given_back(&lease, "a"));
        assert!(matches!(step(1, &seen, "b"), Step::Replace(_)));
    }

    /// A controller: what it has seen, until when it leads, and a write that has been sent and not arrived.
    #[derive(Default)]
    struct Controller {
        seen: Seen,
        until: Duration,
        sent: Option<(Duration, Step)>,
    }

    proptest! {
        #[test]
        fn never_two_lead(events in proptest::collection::vec((0..3_usize, 0..3_u8, 0..6_000_u64), 1..300)) {
            let names = ["a", "b", "c"];
            let mut all: [Controller; 3] = Default::default();
            let (mut now, mut lease, mut revision) = (Duration::ZERO, None::<Lease>, 0);
            for (who, what, pause) in events {
                now += Duration::from_millis(pause);
                let one = &mut all[who];
                match what {
                    0 => one.seen.look(now, lease.clone()),
                    1 if one.sent.is_none() => {
                        let me = Candidate::new(names[who]);
                        one.sent = Some((now, decide_lease(now, &one.seen, &me, Timestamp::UNIX_EPOCH)));
                    }
                    _ => {
                        let Some((sent, step)) = one.sent.take() else { continue };
                        let fits = match &step {
                            Step::Create(_) => lease.is_none(),
                            Step::Replace(new) => lease.as_ref().is_some_and(|held| {
                                held.metadata.resource_version == new.metadata.resource_version
                            }),
                            Step::Wait => false,
                        };
                        if fits {
                            revision += 1;
                            lease = Some(written(step, &revision.to_string()));
                            one.until = leads_until(sent);
                        }
                    }
                }
                let leaders = all.iter().filter(|one| now < one.until).count();
                prop_assert!(leaders <= 1, "{leaders} lead at {now:?}");
            }
        }
    }
}
