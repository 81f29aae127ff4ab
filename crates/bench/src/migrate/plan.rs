//! What is to be measured.

use serde::Serialize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// A way of moving a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// A cluster of two nodes, asked for over its API.
    Ours,
    /// QEMU by hand over QMP, with QEMU's own defaults.
    BareDefault,
    /// QEMU by hand over QMP, with the best parameters known.
    BareBest,
    /// The same, encrypted by QEMU itself.
    BareTls,
    /// `virsh migrate --live`.
    Virsh,
}

impl Way {
    /// All of them.
    pub const ALL: [Way; 5] = [Way::Ours, Way::BareDefault, Way::BareBest, Way::BareTls, Way::Virsh];

    /// As in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            Way::Ours => "ours",
            Way::BareDefault => "bare-default",
            Way::BareBest => "bare-best",
            Way::BareTls => "bare-tls",
            Way::Virsh => "virsh",
        }
    }
}

impl FromStr for Way {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = Way::ALL.map(Way::name).join(", ");
        Way::ALL
            .into_iter()
            .find(|w| w.name() == text)
            .ok_or_else(|| format!("there is no way {text:?}; there are: {names}"))
    }
}

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Load {
    /// Nothing but its heartbeat.
    Idle,
    /// It writes to its memory at this many per cent of the link's rate.
    Percent(u32),
    /// Two thirds of its memory hold what cannot be compressed, and nothing writes to it: there is much to send.
    Full,
}

impl FromStr for Load {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "idle" {
            return Ok(Load::Idle);
        }
        if text == "full" {
            return Ok(Load::Full);
        }
        match text.trim_end_matches('%').parse() {
            Ok(percent @ 1..=400) => Ok(Load::Percent(percent)),
            _ => Err(format!("{text:?} is no load: `idle`, `full`, or per cent of the link such as `50%`")),
        }
    }
}

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Load::Idle => f.pad("idle"),
            Load::Percent(percent) => f.pad(&format!("{percent}%")),
            Load::Full => f.pad("full"),
        }
    }
}

const MIB: u64 = 1 << 20;

/// A number of MiB with its unit: `512Mi`, `4Gi`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Mebibytes(pub u64);

impl FromStr for Mebibytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, factor) = match text.strip_suffix("Gi") {
            Some(number) => (number, 1024),
            None => (text.strip_suffix("Mi").unwrap_or(text), 1),
        };
        let mib: Option<u64> = number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor));
        match mib {
            Some(mib) if (1..=1 << 20).contains(&mib) => Ok(Mebibytes(mib)),
            _ => Err(format!("{text:?} is no size: write `512Mi` or `4Gi`")),
        }
    }
}

impl std::fmt::Display for Mebibytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            mib if mib >= 1024 && mib % 1024 == 0 => f.pad(&format!("{}Gi", mib / 1024)),
            mib => f.pad(&format!("{mib}Mi")),
        }
    }
}

/// The cap of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bandwidth {
    /// None. (Bare QEMU with its defaults keeps the cap that is one of them: 128 MiB/s.)
    Unlimited,
    /// MiB a second.
    Mebibytes(Mebibytes),
}

impl Bandwidth {
    /// Bytes a second.
    pub fn bytes(self) -> Option<u64> {
        match self {
            Bandwidth::Unlimited => None,
            Bandwidth::Mebibytes(Mebibytes(mib)) => Some(mib * MIB),
        }
    }
}

impl FromStr for Bandwidth {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unlimited" {
            return Ok(Bandwidth::Unlimited);
        }
        text.parse().map(Bandwidth::Mebibytes).map_err(|e| format!("{e}, or `unlimited`"))
    }
}

impl std::fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Bandwidth::Unlimited => f.pad("unlimited"),
            Bandwidth::Mebibytes(mib) => f.pad(&format!("{mib}/s")),
        }
    }
}

/// A guest and a bandwidth.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    /// The guest's memory.
    pub memory: Mebibytes,
    /// What it does.
    pub load: Load,
    /// The cap.
    pub bandwidth: Bandwidth,
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {}, {}", self.memory, self.load, self.bandwidth)
    }
}

/// MiB that a guest with a load keeps; it writes to one half of them again and again.
const WORKING_SET_MIB: u64 = 192;

impl Line {
    /// MiB a second that the guest writes, where the link carries `link` bytes a second without a cap.
    pub fn dirty_mib_per_second(&self, link: u64) -> u64 {
        let carried = self.bandwidth.bytes().map_or(link, |cap| cap.min(link));
        match self.load {
            Load::Idle | Load::Full => 0,
            Load::Percent(percent) => (carried * u64::from(percent) / 100 / MIB).max(1),
        }
    }

    /// MiB that the guest keeps and verifies.
    pub fn working_set_mib(&self) -> u64 {
        match self.load {
            Load::Idle => 1,
            // A guest needs the rest for its system.
            Load::Percent(_) => WORKING_SET_MIB.min(self.memory.0 / 2),
            Load::Full => self.memory.0 * 2 / 3,
        }
    }

    /// Safe in a file name.
    pub fn slug(&self) -> String {
        let text = format!("{}-{}-{}", self.memory, self.load, self.bandwidth);
        text.replace('%', "pc").replace("/s", "ps").to_lowercase()
    }
}

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Options {
    /// Guests' memory.
    pub memory: Vec<Mebibytes>,
    /// Loads.
    pub load: Vec<Load>,
    /// Caps.
    pub bandwidth: Vec<Bandwidth>,
    /// Ways of moving.
    pub ways: Vec<Way>,
    /// Moves a line and way.
    pub runs: usize,
    /// Folder with `vmlinuz` and `initrd`.
    pub guest: PathBuf,
    /// Bytes a second that the link carries without a cap; none: measured first, when a load needs it.
    pub link: Option<u64>,
    /// A move that takes longer is given up, and counts as one that does not end.
    pub limit: Duration,
}

impl Options {
    /// Every combination, in order.
    pub fn lines(&self) -> Vec<Line> {
        let mut lines = Vec::new();
        for memory in &self.memory {
            for load in &self.load {
                for bandwidth in &self.bandwidth {
                    lines.push(Line { memory: *memory, load: *load, bandwidth: *bandwidth });
                }
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_as_they_are_written() {
        for text in ["512Mi", "1Gi", "4Gi", "1536Mi"] {
            assert_eq!(text.parse::<Mebibytes>().unwrap().to_string(), text);
        }
        for text in ["unlimited", "64Mi"] {
            assert_eq!(text.parse::<Bandwidth>().unwrap().to_string().trim_end_matches("/s"), text);
        }
        for text in ["idle", "10%", "full"] {
            assert_eq!(text.parse::<Load>().unwrap().to_string(), text);
        }
        for way in Way::ALL {
            assert_eq!(way.name().parse(), Ok(way));
        }
        assert_eq!("50".parse(), Ok(Load::Percent(50)));
        for bad in ["", "0Mi", "x", "-1Gi", "99999999999999999999Gi"] {
            assert!(bad.parse::<Mebibytes>().is_err(), "{bad}");
        }
        assert!("0%".parse::<Load>().is_err());
        assert!("scp".parse::<Way>().is_err());
    }

    #[test]
    fn the_load_follows_the_cap_and_the_link() {
        let line = |load, bandwidth: &str| Line { memory: Mebibytes(512), load, bandwidth: bandwidth.parse().unwrap() };
        let link = 300 * MIB;
        assert_eq!(line(Load::Percent(50), "64Mi").dirty_mib_per_second(link), 32);
        assert_eq!(line(Load::Percent(50), "unlimited").dirty_mib_per_second(link), 150);
        assert_eq!(line(Load::Percent(50), "1Gi").dirty_mib_per_second(link), 150, "no more than the link");
        assert_eq!(line(Load::Idle, "64Mi").dirty_mib_per_second(link), 0);
        assert_eq!(line(Load::Percent(10), "64Mi").slug(), "512mi-10pc-64mips");
    }
}
