//! `godwit bench migrate`: the same guest moved in several ways on one machine, in one run, by one clock.
//!
//! A *line* is a guest (memory, load) and a bandwidth; each *way* of moving gets the same line: a fresh guest, then several
//! moves to and fro. What is measured is the same for all: see [`figures::Figures`]. Nothing is quoted from a manager's own
//! report where it can be measured from outside, and where it is quoted ([`figures::Figures::qemu_downtime_ms`]) its name says so.

pub mod bare;
pub mod beats;
mod certificates;
pub mod cost;
pub mod figures;
pub mod goals;
pub(crate) mod lab;
mod libvirt;
mod monitor;
pub(crate) mod ours;
pub mod plan;
pub mod plot;
pub mod report;
mod run;
mod virsh;

pub use plan::{Bandwidth, Line, Load, Options, Way};
pub use report::Report;
pub use run::run;

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A wrong option.
    #[error("{0}")]
    Usage(String),
    /// The cluster, or the network that both kinds of guests use.
    #[error(transparent)]
    Standalone(#[from] godwit_standalone::Error),
    /// The network.
    #[error(transparent)]
    Network(#[from] godwit_network::Error),
    /// The cluster's API.
    #[error("the cluster's API does not answer as expected: {0}")]
    Api(#[from] Box<kube::Error>),
    /// A file or a process.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        source: std::io::Error,
    },
    /// QEMU's command line.
    #[error(transparent)]
    Machine(#[from] godwit_qemu::machine::Error),
    /// QEMU's monitor.
    #[error("QEMU ({who}): {message}")]
    Monitor {
        /// Which QEMU.
        who: String,
        /// What it said, or that it said nothing.
        message: String,
    },
    /// libvirt.
    #[error("libvirt: {0}")]
    Libvirt(String),
    /// The guest did not do its part.
    #[error("the guest {0}")]
    Guest(String),
}

impl Error {
    pub(crate) fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io { what: what.into(), source }
    }
}

impl From<kube::Error> for Error {
    fn from(error: kube::Error) -> Self {
        Self::Api(Box::new(error))
    }
}

/// Microseconds since the Unix epoch by this host's clock: the clock of QEMU's events and of the kernel's packet stamps.
pub(crate) fn now_us() -> i64 {
    jiff::Timestamp::now().as_microsecond()
}
