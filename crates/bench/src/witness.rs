//! Who runs, seen from outside: every test guest sends numbered frames, and a witness in each node's namespace takes down which
//! pod they came from and when. No part of the product carries, makes or reads them.
//!
//! The number is a counter in the guest's memory, so it goes where the guest goes. The pod is the instance: two instances of a
//! guest are two pods. As long as one instance runs at a time, the numbers rise over all nodes together; two that run go on
//! from the same number, and give themselves away with the first frame of the second.

use godwit_guest_rom::{FRAME_TYPE, Frame};
use godwit_network::capture::{Capture, Seen};
use godwit_network::{Error, Namespace};
use godwit_standalone::Cluster;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// One frame of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beat {
    /// When it came out of its pod, by the machine's clock.
    pub at: SystemTime,
    /// The node it came from.
    pub node: Arc<str>,
    /// The link to its pod, which stands for the instance.
    pub port: Arc<str>,
    /// The guest's count.
    pub count: u32,
    /// How many corrupted pages and blocks of its disk the guest has found by then.
    pub errors: u32,
    /// How many of its writes its disk has acknowledged by then.
    pub writes: u32,
}

/// What was heard of a guest since a moment.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// So many beats.
    pub beats: usize,
    /// The first of them.
    pub first: Option<Beat>,
    /// The last.
    pub last: Option<Beat>,
}

/// A guest's name: the address of its network interface.
pub type Station = [u8; 6];

type Notes = Arc<Mutex<BTreeMap<Station, Vec<Beat>>>>;

/// Listens on all nodes of a cluster.
pub struct Witness {
    heard: Notes,
    _captures: Vec<Capture>,
}

impl Witness {
    /// Begins to listen.
    ///
    /// # Errors
    /// No such namespaces, or no permission for packet sockets.
    pub fn start(cluster: &Cluster) -> Result<Self, Error> {
        let heard = Notes::default();
        let mut captures = Vec::new();
        for node in &cluster.nodes {
            let namespace = Namespace::open(&cluster.namespace(node))?;
            let (node, heard): (Arc<str>, _) = (node.as_str().into(), heard.clone());
            captures.push(Capture::start(&namespace, FRAME_TYPE, move |seen| take_down(&heard, &node, &seen))?);
        }
        Ok(Self { heard, _captures: captures })
    }

    /// All beats of a guest so far, in the order of their times.
    pub fn beats(&self, station: Station) -> Vec<Beat> {
        let mut beats = self.with(station, <[Beat]>::to_vec);
        beats.sort_by_key(|beat| beat.at);
        beats
    }

    /// The beats after this moment.
    pub fn since(&self, station: Station, moment: SystemTime) -> Heard {
        self.with(station, |beats| {
            let later = beats.iter().filter(|beat| beat.at > moment);
            Heard {
                beats: later.clone().count(),
                first: later.clone().min_by_key(|beat| beat.at).cloned(),
                last: later.max_by_key(|beat| beat.at).cloned(),
            }
        })
    }

    /// Forgets a guest that is no more.
    pub fn forget(&self, station: Station) {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).remove(&station);
    }

    fn with<T>(&self, station: Station, look: impl FnOnce(&[Beat]) -> T) -> T {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        look(heard.get(&station).map(Vec::as_slice).unwrap_or_default())
    }
}

/// Whether a link of a node's namespace leads to a pod (docs/architecture.md: kubelet calls them `v<pod uid><number>`). A frame
/// is also seen on the bridge behind it, and on the other nodes where it comes out of the tunnel between them.
fn leads_to_pod(link: &str) -> bool {
    link.strip_prefix('v').is_some_and(|rest| !rest.starts_with("x-"))
}

fn take_down(heard: &Notes, node: &Arc<str>, seen: &Seen) {
    if !leads_to_pod(&seen.link) {
        return;
    }
    let Some(frame) = Frame::parse(&seen.frame) else { return };
    let beat = Beat {
        at: seen.at,
        node: node.clone(),
        port: seen.link.as_str().into(),
        count: frame.count,
        errors: frame.errors,
        writes: frame.writes,
    };
    heard.lock().unwrap_or_else(PoisonError::into_inner).entry(frame.mac).or_default().push(beat);
}

/// What is wrong with a guest's beats, which are in the order of their times; none if one instance after another ran, each going
/// on where the one before had stopped, with its memory whole.
#[must_use]
pub fn complaint(beats: &[Beat]) -> Option<String> {
    let mut left: Vec<&str> = Vec::new();
    for (last, beat) in beats.iter().zip(beats.iter().skip(1)) {
        let later = beat.at.duration_since(last.at).unwrap_or_default();
        let both = format!(
            "beat {} from {} on {} came {:.1} ms after beat {} from {} on {}",
            beat.count,
            beat.port,
            beat.node,
            later.as_secs_f64() * 1e3,
            last.count,
            last.port,
            last.node
        );
        if last.port != beat.port {
            left.push(&last.port);
        }
        if left.contains(&&*beat.port) {
            return Some(format!("two instances run: {both}, but had been superseded before"));
        }
        if beat.count <= last.count {
            let what = if last.port == beat.port { "the guest was started again" } else { "two instances ran" };
            return Some(format!("{what}: {both}"));
        }
    }
    beats.iter().find(|beat| beat.errors > 0).map(|beat| {
        format!(
            "what was written is lost: at beat {} on {} the guest counts {} damaged pages and blocks",
            beat.count, beat.node, beat.errors
        )
    })
}

/// Whether two instances of a guest were heard side by side, in beats that are in the order of their times. Other than for
/// [`complaint`] an instance may begin anew where the one before had ended, as a VM does that is started again.
#[must_use]
pub fn overlap(beats: &[Beat]) -> Option<String> {
    let mut left: Vec<&str> = Vec::new();
    for (last, beat) in beats.iter().zip(beats.iter().skip(1)) {
        if last.port != beat.port {
            left.push(&last.port);
        }
        if left.contains(&&*beat.port) {
            return Some(format!(
                "two instances run: beat {} from {} on {} came after beat {} from {} on {}",
                beat.count, beat.port, beat.node, last.count, last.port, last.node
            ));
        }
    }
    None
}

/// The longest time between two beats that ends after `from`.
#[must_use]
pub fn longest_gap(beats: &[Beat], from: SystemTime) -> Duration {
    let pairs = beats.iter().zip(beats.iter().skip(1)).filter(|(_, after)| after.at > from);
    pairs.filter_map(|(before, after)| after.at.duration_since(before.at).ok()).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(story: &[(&str, u32)]) -> Vec<Beat> {
        let beat = |(n, (port, count)): (usize, &(&str, u32))| Beat {
            at: SystemTime::UNIX_EPOCH + Duration::from_millis(20 * n as u64),
            node: "node1".into(),
            port: (*port).into(),
            count: *count,
            errors: 0,
            writes: 0,
        };
        story.iter().enumerate().map(beat).collect()
    }

    #[test]
    fn one_after_another_is_right() {
        assert_eq!(complaint(&[]), None);
        assert_eq!(complaint(&told(&[("va", 1), ("va", 2), ("vb", 3), ("vb", 5), ("vc", 6)])), None);
    }

    #[test]
    fn one_that_begins_anew_runs_alone_unless_the_first_is_heard_again() {
        assert_eq!(overlap(&told(&[("va", 1), ("va", 2), ("vb", 1), ("vb", 2)])), None);
        assert!(overlap(&told(&[("va", 1), ("vb", 1), ("va", 2)])).is_some());
    }

    #[test]
    fn a_second_instance_gives_itself_away() {
        for story in [
            // The source goes on beside the target: same numbers,
            &[("va", 1), ("va", 2), ("vb", 3), ("va", 3)][..],
            // later numbers, the ones between were not heard,
            &[("va", 1), ("vb", 2), ("va", 4)],
            // or the target begins before the source has ended.
            &[("va", 1), ("va", 3), ("vb", 3), ("vb", 4)],
        ] {
            assert!(complaint(&told(story)).is_some_and(|c| c.starts_with("two instances")), "{story:?}");
        }
    }

    #[test]
    fn a_restart_and_lost_memory_are_seen() {
        let again = complaint(&told(&[("va", 7), ("va", 1)]));
        assert!(again.is_some_and(|c| c.starts_with("the guest was started again")));
        let mut beats = told(&[("va", 1), ("vb", 2)]);
        beats[1].errors = 3;
        assert!(complaint(&beats).is_some_and(|c| c.starts_with("what was written is lost")));
    }

    #[test]
    fn gaps_count_when_they_end_after_the_beginning() {
        let beats = told(&[("va", 1), ("va", 2), ("vb", 3)]);
        let at = |ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        assert_eq!(longest_gap(&beats, at(10)), Duration::from_millis(20));
        assert_eq!(longest_gap(&beats, at(40)), Duration::ZERO);
    }

    #[test]
    fn only_links_to_pods_count() {
        assert!(leads_to_pod("v1a2b3c4d0"));
        assert!(!leads_to_pod("vx-br-lab") && !leads_to_pod("br-lab") && !leads_to_pod("eth0"));
    }
}
