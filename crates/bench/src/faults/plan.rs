//! What happens in which run, as a function of the seed and the run's number alone.

use std::fmt;
use std::time::Duration;

/// Whom it hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Victim {
    /// The QEMU that sends.
    SourceQemu,
    /// The QEMU that receives.
    TargetQemu,
    /// The launcher over the QEMU that sends.
    SourceLauncher,
    /// The launcher over the QEMU that receives.
    TargetLauncher,
    /// The process of the source's node: its handler and its kubelet.
    SourceHandler,
    /// The same of the target's node.
    TargetHandler,
    /// API server and controllers.
    ControlPlane,
    /// What connects the two nodes; both still reach the API.
    Link,
    /// What connects the source's node with everything.
    SourceUplink,
    /// What connects the target's node with everything.
    TargetUplink,
    /// The migration itself, as a request to the API.
    Migration,
}

/// What is done to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Deed {
    /// SIGKILL. Processes of the cluster itself are started again later, as a supervisor would.
    Kill,
    /// SIGSTOP, and SIGCONT later.
    Stop,
    /// No packet gets through in either direction, and again later.
    Cut,
    /// The request is deleted.
    Cancel,
}

/// How the guest is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Manner {
    /// Its memory, before it runs at the target.
    PreCopy,
    /// A disk of its own is copied as well.
    Disk,
    /// A part of its memory follows when it runs at the target already.
    PostCopy,
}

/// When: each begins when the migration has come so far, and lasts for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    /// Before the migration is asked for.
    Before,
    /// It has been asked for.
    Asked,
    /// The target's pod has a node.
    Placed,
    /// The target's QEMU waits.
    Waiting,
    /// The source's QEMU sends.
    Sending,
    /// The source's guest stands still.
    Stopped,
    /// The source has written down that the guest has left.
    HandedOver,
    /// The target has taken the go.
    Gone,
    /// The API says that it is over.
    Over,
}

/// One run's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strike {
    /// How the guest is moved meanwhile.
    pub manner: Manner,
    /// Whom it hits.
    pub victim: Victim,
    /// What is done to it.
    pub deed: Deed,
    /// When.
    pub moment: Moment,
    /// How long after the moment's beginning.
    pub delay: Duration,
    /// How long until it is mended.
    pub lasts: Duration,
    /// How long after the moment's beginning the migration is cancelled as well.
    pub cancelled: Option<Duration>,
}

use Deed::{Cancel, Cut, Kill, Stop};
use Victim::{
    ControlPlane, Link, Migration, SourceHandler, SourceLauncher, SourceQemu, SourceUplink, TargetHandler,
    TargetLauncher, TargetQemu, TargetUplink,
};

/// Every kind of fault; so many runs have each of them once.
pub const KINDS: [(Victim, Deed); 18] = [
    (SourceQemu, Kill),
    (SourceQemu, Stop),
    (TargetQemu, Kill),
    (TargetQemu, Stop),
    (SourceLauncher, Kill),
    (SourceLauncher, Stop),
    (TargetLauncher, Kill),
    (TargetLauncher, Stop),
    (SourceHandler, Kill),
    (SourceHandler, Stop),
    (TargetHandler, Kill),
    (TargetHandler, Stop),
    (ControlPlane, Kill),
    (ControlPlane, Stop),
    (Link, Cut),
    (SourceUplink, Cut),
    (TargetUplink, Cut),
    (Migration, Cancel),
];

/// Each kind of fault meets each of them once in as many rounds.
const MANNERS: [Manner; 3] = [Manner::PreCopy, Manner::Disk, Manner::PostCopy];
/// One run in so many is cancelled besides.
const CANCELLED: u8 = 5;
/// The longest time from the moment to that.
const CANCELLED_WITHIN: Duration = Duration::from_millis(1500);

const MOMENTS: [Moment; 9] = [
    Moment::Before,
    Moment::Asked,
    Moment::Placed,
    Moment::Waiting,
    Moment::Sending,
    Moment::Stopped,
    Moment::HandedOver,
    Moment::Gone,
    Moment::Over,
];

impl Victim {
    /// The first moment at which it is there.
    fn from(self) -> Moment {
        match self {
            TargetQemu => Moment::Waiting,
            TargetLauncher | TargetHandler | TargetUplink | Link => Moment::Placed,
            Migration => Moment::Asked,
            SourceQemu | SourceLauncher | SourceHandler | SourceUplink | ControlPlane => Moment::Before,
        }
    }
}

impl Moment {
    /// The longest delay, such that the moment is mostly not over by then. Those around the hand-over are short.
    fn longest(self, manner: Manner) -> Duration {
        Duration::from_millis(match self {
            // In post-copy memory still comes for about so long.
            Moment::Gone if manner == Manner::PostCopy => 900,
            // The memory only begins when the disk has been copied, and is slowed down for post-copy.
            Moment::Sending if manner != Manner::PreCopy => 1800,
            Moment::Before | Moment::Asked | Moment::Over => 300,
            Moment::Placed => 150,
            Moment::Waiting => 60,
            Moment::Sending => 900,
            Moment::Stopped => 30,
            Moment::HandedOver => 6,
            Moment::Gone => 40,
        })
    }
}

/// The fault of run `number` (from 0); the longest of those that last is `longest`.
#[must_use]
pub fn strike(seed: u64, number: u32, longest: Duration) -> Strike {
    // In each round every kind comes once, in an order of its own.
    let kinds = u32::try_from(KINDS.len()).unwrap_or(u32::MAX);
    let (round, place) = (number / kinds, number % kinds);
    let mut order: Vec<usize> = (0..KINDS.len()).collect();
    fastrand::Rng::with_seed(mixed(seed, u64::from(round) << 32)).shuffle(&mut order);
    let kind = order.get(place as usize).copied().unwrap_or_default();
    let (victim, deed) = KINDS.get(kind).copied().unwrap_or((Link, Cut));
    let manner = MANNERS.get((kind + round as usize) % MANNERS.len()).copied().unwrap_or(Manner::PreCopy);

    let mut random = fastrand::Rng::with_seed(mixed(seed, u64::from(number) + 1));
    // Where the right to run the guest passes, twice as often as elsewhere.
    let around = [Moment::Stopped, Moment::HandedOver, Moment::Gone];
    let moments: Vec<Moment> = MOMENTS.into_iter().chain(around).filter(|moment| *moment >= victim.from()).collect();
    let moment = random.choice(moments).unwrap_or(Moment::Sending);
    let delay = moment.longest(manner).mul_f64(random.f64());
    // Mostly short; the deadlines of the product, of 10 s and more, are met as well.
    let lasts = match random.u8(0..6) {
        0 => longest.mul_f64(0.3 + 0.7 * random.f64()),
        _ => longest.min(Duration::from_millis(random.u64(20..2000))),
    };
    let cancelled = (deed != Cancel && random.u8(0..CANCELLED) == 0).then(|| CANCELLED_WITHIN.mul_f64(random.f64()));
    Strike { manner, victim, deed, moment, delay, lasts, cancelled }
}

fn mixed(seed: u64, more: u64) -> u64 {
    fastrand::Rng::with_seed(seed).u64(..) ^ fastrand::Rng::with_seed(more).u64(..)
}

impl Victim {
    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            SourceQemu => "source QEMU",
            TargetQemu => "target QEMU",
            SourceLauncher => "source launcher",
            TargetLauncher => "target launcher",
            SourceHandler => "source handler",
            TargetHandler => "target handler",
            ControlPlane => "control plane",
            Link => "link between nodes",
            SourceUplink => "source's uplink",
            TargetUplink => "target's uplink",
            Migration => "migration",
        }
    }
}

impl Deed {
    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kill => "kill",
            Stop => "stop",
            Cut => "cut",
            Cancel => "cancel",
        }
    }
}

impl Manner {
    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Manner::PreCopy => "pre-copy",
            Manner::Disk => "disk",
            Manner::PostCopy => "post-copy",
        }
    }
}

impl Moment {
    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Moment::Before => "before",
            Moment::Asked => "asked for",
            Moment::Placed => "target placed",
            Moment::Waiting => "target waits",
            Moment::Sending => "sending",
            Moment::Stopped => "stopped",
            Moment::HandedOver => "handed over",
            Moment::Gone => "go taken",
            Moment::Over => "over",
        }
    }
}

impl fmt::Display for Strike {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.deed.name(), self.victim.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_secs(15);

    #[test]
    fn the_seed_decides_and_nothing_else() {
        let all = |seed| (0..200).map(|n| strike(seed, n, LONGEST)).collect::<Vec<_>>();
        assert_eq!(all(7), all(7));
        assert_ne!(all(7), all(8));
    }

    #[test]
    fn every_kind_comes_in_each_round_and_every_moment_in_a_night() {
        let kinds = KINDS.len() as u32;
        for round in 0..3 {
            let struck: Vec<_> = (0..kinds).map(|n| strike(1, round * kinds + n, LONGEST)).collect();
            assert!(KINDS.iter().all(|kind| struck.iter().any(|s| (s.victim, s.deed) == *kind)), "{struck:?}");
        }
        let rounds: Vec<_> = (0..3 * kinds).map(|n| strike(1, n, LONGEST)).collect();
        for (victim, deed) in KINDS {
            let met = |manner| rounds.iter().any(|s| (s.victim, s.deed, s.manner) == (victim, deed, manner));
            assert!(MANNERS.into_iter().all(met), "{victim:?} {deed:?}");
        }
        let night: Vec<_> = (0..200).map(|n| strike(1, n, LONGEST)).collect();
        assert!(night.iter().any(|s| s.cancelled.is_some() && s.deed != Cancel));
        assert!(MOMENTS.iter().all(|moment| night.iter().any(|s| s.moment == *moment)));
    }

    #[test]
    fn nobody_is_hit_before_it_is_there_and_nothing_lasts_too_long() {
        for n in 0..1000 {
            let strike = strike(3, n, LONGEST);
            assert!(strike.moment >= strike.victim.from(), "{strike:?}");
            assert!(strike.lasts <= LONGEST && strike.delay <= strike.moment.longest(strike.manner), "{strike:?}");
        }
    }
}
