//! What kind of failure it is that QEMU tells in words.
//!
//! QEMU has error texts and no codes. Those of a source mostly say only that the other end went away; why, the target's QEMU
//! says, on its standard error or (from 9.1 on) in `query-migrate`. The texts here are those of 7.2 and 10.0; each class is
//! provoked on a real QEMU by `tests/failures.rs`.

use crate::process::Ended;
use serde::{Deserialize, Serialize};

/// Of what kind a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Cause {
    /// The target cannot give the guest the CPU it has.
    RefusedCpu,
    /// The target has no room for a disk that is copied to it.
    NoSpace,
    /// The target cannot open a disk, or not as the guest needs it.
    RefusedStorage,
    /// The target's machine or devices are not the guest's.
    RefusedMachine,
    /// QEMU was killed or crashed.
    Killed,
    /// The connection broke, and nothing tells more.
    LinkLost,
    /// None of these; the text has to do. Also what a newer launcher names and this one does not know.
    #[serde(other)]
    Other,
}

/// Parts of QEMU's texts, in lower case. The first class that fits counts: a refusal breaks the connection as well.
const TEXTS: [(Cause, &[&str]); 5] = [
    (
        Cause::RefusedCpu,
        &[
            "unable to find cpu model",
            "doesn't support requested feature",
            "of device 'cpu'",
            "of device 'cpu_common'",
            "failed to set msr",
            "-cpu.",
            "cpu model",
            "cpus are not supported",
            "tsc frequency mismatch",
        ],
    ),
    (Cause::NoSpace, &["no space left", "disk quota exceeded", "not enough room"]),
    (
        Cause::RefusedStorage,
        &[
            "could not open",
            "failed to get \"",
            "read-only file system",
            "block node is read-only",
            "requested export not available",
            "different sizes",
            "could not resize",
            "cannot grow",
            "image is not in",
            "could not read l1 table",
            "copying a disk",
            "-blockdev",
            "no medium",
        ],
    ),
    (
        Cause::RefusedMachine,
        &[
            "machine type received",
            "unsupported machine type",
            "unknown savevm section",
            "unknown ramblock",
            "length mismatch",
            "size mismatch",
            "section footer",
            "error while loading state",
            "bad config data",
            "unsupported. allowed features",
            "capability ",
            "unsupported migration stream",
            "not a migration stream",
            "unknown combination of migration flags",
            "postcopy is disabled",
            "mismatched ram page size",
            "is not supported by this version",
            "-device",
            "cannot set up guest memory",
        ],
    ),
    (
        Cause::LinkLost,
        &[
            "unable to write to socket",
            "unable to read from socket",
            "unable to write to command",
            "connection reset",
            "connection refused",
            "connection timed out",
            "broken pipe",
            "no route to host",
            "network is unreachable",
            "failed to connect",
            "unexpected end-of-file",
            "channel error",
            "io failure for postcopy",
            "input/output error",
            "not enough data",
            "stream errored",
        ],
    ),
];

/// What a target says when its stream ends before its time. (One that it cannot use is `Invalid argument`.)
const STREAM_ENDED: [&str; 2] = ["load of migration failed: Input/output error", " failed: -5"];

/// The kind of failure that this text of QEMU's is about.
pub fn cause(text: &str) -> Cause {
    let text = text.to_lowercase();
    let fits = |(_, parts): &&(Cause, &[&str])| parts.iter().any(|part| text.contains(part));
    TEXTS.iter().find(fits).map_or(Cause::Other, |(cause, _)| *cause)
}

/// A failure for a person and for a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Of what kind.
    pub cause: Cause,
    /// QEMU's words.
    pub text: String,
}

/// The most telling of several lines: a refusal before a broken connection, the first of its kind before what followed from it.
pub fn explain<'a>(lines: impl IntoIterator<Item = &'a str>) -> Option<Explanation> {
    let lines = lines.into_iter().map(strip).filter(|line| !line.is_empty() && !line.contains("warning:"));
    let lines: Vec<(Cause, &str)> = lines.map(|line| (cause(line), line)).collect();
    // A stream that ended in the middle of a section looks like a section of another machine; the error tells them apart.
    if let Some((_, text)) = lines.iter().find(|(_, line)| STREAM_ENDED.iter().any(|end| line.ends_with(end))) {
        return Some(Explanation { cause: Cause::LinkLost, text: text.to_string() });
    }
    // Of those that are alike `min_by_key` takes the first.
    let (cause, text) = lines.into_iter().min_by_key(|(cause, _)| *cause)?;
    Some(Explanation { cause, text: text.to_string() })
}

/// What a QEMU's end means for a migration that it had a part in.
pub fn of_end(ended: &Ended) -> Explanation {
    let said = explain(ended.said.iter().map(String::as_str));
    match said {
        Some(said)
            if matches!(
                said.cause,
                Cause::RefusedCpu | Cause::NoSpace | Cause::RefusedStorage | Cause::RefusedMachine
            ) =>
        {
            said
        }
        _ if ended.signal.is_some() => Explanation { cause: Cause::Killed, text: ended.to_string() },
        Some(Explanation { cause, .. }) => Explanation { cause, text: ended.to_string() },
        None => Explanation { cause: Cause::Other, text: ended.to_string() },
    }
}

/// Without the program's name in front.
fn strip(line: &str) -> &str {
    let line = line.trim();
    match line.split_once(": ") {
        Some((program, rest)) if program.contains("qemu") && !program.contains(' ') => rest,
        _ => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_telling_line_is_taken_among_many() {
        let said = [
            "qemu-system-x86_64: warning: TCG doesn't support requested feature: CPUID.01H:ECX.pcid [bit 17]",
            "qemu-system-x86_64: Length mismatch: pc.ram: 0x1000000 in != 0x2000000: Invalid argument",
            "qemu-system-x86_64: error while loading state for instance 0x0 of device 'ram'",
            "qemu-system-x86_64: load of migration failed: Invalid argument",
        ];
        let explained = explain(said).unwrap();
        assert_eq!(explained.cause, Cause::RefusedMachine);
        assert_eq!(explained.text, "Length mismatch: pc.ram: 0x1000000 in != 0x2000000: Invalid argument");
        assert_eq!(explain([]), None);
    }

    #[test]
    fn a_refusal_tells_more_than_the_connection_that_it_broke() {
        let said =
            ["Unable to write to socket: Broken pipe", "Could not open '/d/disk.img': No such file or directory"];
        assert_eq!(explain(said).unwrap().cause, Cause::RefusedStorage);
    }

    #[test]
    fn a_stream_that_ends_in_a_section_is_no_other_machine() {
        let said = [
            "qemu-system-x86_64: check_section_footer: Read section footer failed: -5",
            "qemu-system-x86_64: load of migration failed: Invalid argument",
        ];
        assert_eq!(explain(said).unwrap().cause, Cause::LinkLost);
        let said = [
            "error while loading state for instance 0x0 of device 'ram'",
            "load of migration failed: Input/output error",
        ];
        assert_eq!(explain(said).unwrap().cause, Cause::LinkLost);
    }

    #[test]
    fn an_end_by_a_signal_is_no_refusal() {
        let ended = Ended {
            code: None,
            signal: Some(9),
            said: vec!["qemu: load of migration failed: Input/output error".into()],
        };
        assert_eq!(of_end(&ended).cause, Cause::Killed);
        let ended = Ended { code: Some(1), signal: None, ..ended };
        assert_eq!(of_end(&ended).cause, Cause::LinkLost);
        assert_eq!(of_end(&Ended { code: Some(1), ..Ended::default() }).cause, Cause::Other);
    }

    #[test]
    fn causes_of_a_newer_build_are_read() {
        assert_eq!(serde_json::from_str::<Cause>("\"refusedStorage\"").unwrap(), Cause::RefusedStorage);
        assert_eq!(serde_json::from_str::<Cause>("\"cosmicRay\"").unwrap(), Cause::Other);
    }
}
