//! How a guest's memory is carried: over how many connections, and whether compressed. Both QEMUs are told the same before
//! the first byte. Pure: the rules, which docs/data-plane.md gives with their figures.

use serde::{Deserialize, Serialize};

/// The way that both ends have agreed on. Nothing is QEMU's plain stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Transport {
    /// Connections that carry pages beside the main one (QEMU's `multifd`); 0: the main one carries everything.
    pub channels: u8,
    /// Pages are compressed (`multifd-compression=zstd`). Only with channels.
    pub zstd: bool,
    /// In post-copy a further connection brings the pages that the target waits for, past what is under way on the main one
    /// (`postcopy-preempt`). Only without channels.
    pub preempt: bool,
}

impl Transport {
    /// How many connections QEMU opens.
    #[must_use]
    pub fn connections(self) -> usize {
        1 + usize::from(self.channels) + usize::from(self.preempt)
    }
}

/// What one end can do. An end that says nothing of this, since it is older, can do nothing but the plain stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Ability {
    /// The most channels that are of use there.
    pub channels: u8,
    /// Its QEMU can compress.
    pub zstd: bool,
    /// Its QEMU counts against a cap what it sends, and not what that was before it was compressed.
    pub counts_compressed: bool,
    /// Its QEMU sees every page that the guest writes to ([`crate::migration::tracks_writes`]); where not, the guest is sent in one pass.
    pub tracks_writes: bool,
    /// Its QEMU can take pages that are waited for over a connection of their own.
    pub preempt: bool,
}

impl Ability {
    /// What is left of it where something else, on the same node, has only so many cores.
    #[must_use]
    pub fn within(self, cores: usize) -> Self {
        Ability { channels: self.channels.min(channels_for(cores)), ..self }
    }
}

/// The most channels that help: with 4 or 8 on two cores nothing was won over 2, and guests stood still for longer.
const MOST_CHANNELS: usize = 8;
/// Guest memory that one channel compresses in a second, in bytes. Measured: 830 MiB over two channels in 1.4 s.
const COMPRESSES: u64 = 256 << 20;

/// The channels that a machine with so many cores has room for: half of the cores, which the guest needs as well. On two cores
/// two of them still were three times as fast as the plain stream; one core has no room for any.
#[must_use]
pub fn channels_for(cores: usize) -> u8 {
    if cores < 2 {
        return 0;
    }
    u8::try_from((cores / 2).clamp(2, MOST_CHANNELS)).unwrap_or(0)
}

/// What else the choice depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// The target has the source's own memory: nothing of it is carried.
    pub by_reference: bool,
    /// Both ends are ready for post-copy, which was asked for.
    pub post_copy: bool,
    /// The cap in bytes a second; none is no cap.
    pub bandwidth: Option<u64>,
    /// What the link between the two nodes took in bytes a second while memory waited for it, the last time.
    pub measured: Option<u64>,
}

/// Why memory goes over one connection although both ends could do more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Single {
    /// QEMU up to 10.0 does not combine it with post-copy. Post-copy was asked for by name, so it goes first.
    PostCopy,
}

impl Single {
    /// For people.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Single::PostCopy => {
                "memory goes over one connection, uncompressed: QEMU cannot combine several (multifd) with post-copy, which is allowed"
            }
        }
    }
}

/// The way that two ends take which can do this much, and why it is not more, where that is a choice.
#[must_use]
pub fn choose(ours: Ability, theirs: Ability, wish: &Wish) -> (Transport, Option<Single>) {
    let channels = ours.channels.min(theirs.channels);
    if wish.by_reference {
        return (Transport::default(), None);
    }
    let several = channels >= 2 && ours.tracks_writes;
    if wish.post_copy {
        // QEMU (10.0 too) sends a page that is waited for whatever the cap says; whoever carries the connections keeps to it.
        let preempt = ours.preempt && theirs.preempt;
        return (Transport { preempt, ..Transport::default() }, several.then_some(Single::PostCopy));
    }
    if !several {
        return (Transport::default(), None);
    }
    let zstd = ours.zstd && theirs.zstd && link_bound(channels, ours, wish);
    (Transport { channels, zstd, preempt: false }, None)
}

/// Whether the link carries less than half of the memory that the channels compress meanwhile; of a measured one less than a
/// quarter, since a target that was busy looks like a slower link.
fn link_bound(channels: u8, ours: Ability, wish: &Wish) -> bool {
    let compresses = u64::from(channels) * COMPRESSES;
    let cap = wish.bandwidth.filter(|cap| *cap > 0 && ours.counts_compressed);
    cap.is_some_and(|cap| cap <= compresses / 2) || wish.measured.is_some_and(|rate| rate <= compresses / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: Ability =
        Ability { channels: 2, zstd: true, counts_compressed: true, tracks_writes: true, preempt: false };
    const EIGHT: Ability = Ability { channels: 8, ..TWO };

    #[test]
    fn half_of_the_cores_carry_memory() {
        let channels = [1, 2, 3, 4, 6, 8, 16, 64].map(channels_for);
        assert_eq!(channels, [0, 2, 2, 2, 3, 4, 8, 8]);
        assert_eq!(EIGHT.within(4), TWO);
        assert_eq!(Ability::default().within(64), Ability::default());
    }

    #[test]
    fn the_lesser_end_counts_and_an_older_one_gets_the_plain_stream() {
        let wish = Wish::default();
        let two = Transport { channels: 2, ..Transport::default() };
        assert_eq!(choose(EIGHT, TWO, &wish), (two, None));
        assert_eq!(choose(TWO, EIGHT, &wish), (two, None));
        assert_eq!(choose(EIGHT, Ability::default(), &wish), (Transport::default(), None));
        assert_eq!(choose(Ability::default(), EIGHT, &wish), (Transport::default(), None));
        let one_pass = Ability { tracks_writes: false, ..EIGHT };
        assert_eq!(choose(one_pass, EIGHT, &wish), (Transport::default(), None), "it is sent in one pass");
        assert_eq!(choose(EIGHT, one_pass, &wish).0.channels, 8, "the target does not send");
        assert_eq!(two.connections(), 3);
        assert_eq!(Transport::default().connections(), 1);
    }

    #[test]
    fn post_copy_goes_before_channels_and_that_is_said() {
        let wish = Wish { post_copy: true, bandwidth: Some(1 << 20), ..Wish::default() };
        assert_eq!(choose(TWO, TWO, &wish), (Transport::default(), Some(Single::PostCopy)));
        // Nothing is given up where nothing was to be had.
        assert_eq!(choose(TWO, Ability::default(), &wish), (Transport::default(), None));
    }

    #[test]
    fn pages_that_are_waited_for_have_a_connection_of_their_own_where_both_ends_know_how() {
        let wish = Wish { post_copy: true, ..Wish::default() };
        let both = Ability { preempt: true, ..TWO };
        let preempt = Transport { preempt: true, ..Transport::default() };
        assert_eq!(choose(both, both, &wish), (preempt, Some(Single::PostCopy)));
        assert_eq!(preempt.connections(), 2);
        assert_eq!(choose(both, TWO, &wish).0, Transport::default());
        assert_eq!(choose(TWO, both, &wish).0, Transport::default());
        let few = Ability { channels: 0, ..both };
        assert_eq!(choose(few, both, &wish), (preempt, None), "also where nothing is given up for it");
        assert!(!choose(both, both, &Wish::default()).0.preempt, "nobody waits for a page in pre-copy");
        let capped = |bandwidth| choose(both, both, &Wish { bandwidth: Some(bandwidth), ..wish }).0.preempt;
        assert!(capped(0) && capped(64 << 20), "the cap is kept by whoever carries them");
        assert!(!choose(both, both, &Wish { by_reference: true, ..wish }).0.preempt, "no page is sent");
    }

    #[test]
    fn it_is_compressed_where_the_link_is_what_it_waits_for() {
        let zstd = |ours, theirs, wish: Wish| choose(ours, theirs, &wish).0.zstd;
        let capped = |bandwidth| Wish { bandwidth: Some(bandwidth), ..Wish::default() };
        assert!(!zstd(TWO, TWO, Wish::default()), "nothing is known of the link");
        assert!(zstd(TWO, TWO, capped(64 << 20)));
        assert!(zstd(TWO, TWO, capped(256 << 20)));
        assert!(!zstd(TWO, TWO, capped((256 << 20) + 1)));
        assert!(!zstd(TWO, TWO, capped(0)), "no cap");
        assert!(zstd(EIGHT, EIGHT, capped(1 << 30)), "more channels compress more");
        let without = Ability { zstd: false, ..TWO };
        assert!(!zstd(TWO, without, capped(1 << 20)) && !zstd(without, TWO, capped(1 << 20)));
        let older = Ability { counts_compressed: false, ..TWO };
        assert!(!zstd(older, TWO, capped(1 << 20)), "the cap would hold back what is not sent");
        assert!(zstd(TWO, older, capped(1 << 20)), "the target does not count");
        let measured = |rate| Wish { measured: Some(rate), ..Wish::default() };
        assert!(zstd(older, TWO, measured(117 << 20)), "a gigabit a second");
        assert!(!zstd(TWO, TWO, measured(200 << 20)));
        assert!(zstd(TWO, TWO, Wish { bandwidth: Some(10 << 30), ..measured(100 << 20) }));
    }
}
