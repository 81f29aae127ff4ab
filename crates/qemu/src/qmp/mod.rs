//! The QEMU Machine Protocol over a unix socket.
//!
//! Commands carry an id, so that many can be in flight; events are kept in order with QEMU's own microsecond stamps, and
//! every subscriber sees all of them, also those before it came. The protocol is QEMU's `docs/interop/qmp-spec`.

mod client;
pub mod commands;

pub use client::{Events, Qmp};
use serde::Deserialize;
use serde_json::Value;
use std::path::PathBuf;
use std::time::Duration;

/// Why a command did not give an answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The monitor's socket does not answer.
    #[error("QEMU's monitor {socket} does not answer: {message}")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        message: String,
    },
    /// QEMU refused the command.
    #[error("QEMU refused `{command}`: {description} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class, for example `GenericError`, `CommandNotFound`.
        class: String,
        /// QEMU's sentence.
        description: String,
    },
    /// The connection ended, usually because QEMU did.
    #[error("QEMU's monitor closed before `{command}` was answered")]
    Closed {
        /// The command.
        command: String,
    },
    /// QEMU did not answer in time. Whether it carried the command out is not known.
    #[error("QEMU did not answer `{command}` within {after:?}")]
    Timeout {
        /// The command.
        command: String,
        /// How long was waited.
        after: Duration,
    },
    /// The answer is not what this build understands.
    #[error("QEMU's answer to `{command}` cannot be read: {message}")]
    Unreadable {
        /// The command.
        command: String,
        /// What is wrong with it.
        message: String,
    },
}

impl Error {
    /// Whether the monitor is gone.
    pub fn is_closed(&self) -> bool {
        matches!(self, Error::Closed { .. } | Error::Connect { .. })
    }
}

/// One event of QEMU's.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its place in the order, from 0.
    pub number: u64,
    /// Microseconds since the Unix epoch, by the host's clock; QEMU's own stamp.
    pub at_us: i64,
    /// Name, for example `STOP`.
    pub name: String,
    /// Data; null if none.
    pub data: Value,
}

impl Event {
    /// The text member `key` of the data.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.data.get(key).and_then(Value::as_str)
    }
}

#[derive(Deserialize)]
struct Stamp {
    #[serde(default)]
    seconds: i64,
    #[serde(default)]
    microseconds: i64,
}

/// One line from QEMU. Unknown members are ignored; which kind it is follows from the members it has.
#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    event: Option<String>,
    timestamp: Option<Stamp>,
    data: Option<Value>,
    id: Option<Value>,
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    class: String,
    #[serde(default)]
    desc: String,
}
