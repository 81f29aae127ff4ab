//! `godwit bench drain`: how long it takes to empty a node, beside what bytes, bandwidth and limits allow and what a plan said. Of
//! real guests on a cluster of its own, and of simulated ones in virtual time.

mod real;
mod report;
mod simulated;

pub use report::{Bounds, Departure, Drained, Estimate, Limits, Parts, Report, Simulated};

use crate::migrate::Bandwidth;
use godwit_api::config;
use std::path::PathBuf;
use std::time::Duration;

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Real guests on the node; 0 leaves them out.
    pub guests: u32,
    /// Simulated guests on the node; 0 leaves them out.
    pub simulated: u32,
    /// Cap of each migration of real guests.
    pub bandwidth: Bandwidth,
    /// So many migrations at once in the cluster, from a node and to one; unset leaves the defaults.
    pub parallel: Option<u32>,
    /// Decides about everything that is left open in the simulation.
    pub seed: u64,
    /// How long emptying the real node may take.
    pub limit: Duration,
}

impl Options {
    fn limits(&self) -> Limits {
        match self.parallel {
            Some(most) => Limits { cluster: most, outbound: most, inbound: most },
            None => Limits {
                cluster: config::PARALLEL_MIGRATIONS_PER_CLUSTER,
                outbound: config::PARALLEL_OUTBOUND_MIGRATIONS_PER_NODE,
                inbound: config::PARALLEL_INBOUND_MIGRATIONS_PER_NODE,
            },
        }
    }
}

/// Why nothing could be measured. A guest that does not leave is in the report.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cluster does not come up.
    #[error(transparent)]
    Cluster(#[from] godwit_standalone::Error),
    /// The witness cannot listen.
    #[error(transparent)]
    Network(#[from] godwit_network::Error),
    /// The guests' image cannot be made.
    #[error("the guests' image: {0}")]
    Image(#[from] godwit_images::Error),
    /// The plan cannot be made.
    #[error(transparent)]
    Plan(#[from] godwit_drain::Error),
    /// The API refuses what the bench asks for.
    #[error("cannot {what}: {source}")]
    Api {
        /// What was asked for.
        what: String,
        /// The answer.
        source: Box<kube::Error>,
    },
    /// A file or folder.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// Something that is not measured did not happen in time.
    #[error("{what} did not happen within {seconds} s; it is {last}")]
    Late {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: u64,
        /// What was there instead.
        last: String,
    },
    /// The simulation has broken off.
    #[error("the simulation ended without a report")]
    Simulation,
}

/// Empties a node of real guests and one of simulated ones. `tell` gets a line for a person now and then.
///
/// # Errors
/// What kept it from being measured.
pub async fn run(options: &Options, tell: &mut dyn FnMut(&str)) -> Result<Report, Error> {
    let mut report = Report::default();
    if options.guests > 0 {
        let (drained, wrong) = real::run(options, tell).await?;
        report.wrong.extend(drained.wrong("real"));
        report.wrong.extend(wrong);
        report.real = Some(drained);
    }
    if options.simulated > 0 {
        tell(&format!("a node with {} simulated guests", options.simulated));
        let (simulated, wrong) = simulated::run(options).await?;
        report.wrong.extend(simulated.drained.wrong("simulated"));
        report.wrong.extend(wrong);
        report.simulated = Some(simulated);
    }
    Ok(report)
}
