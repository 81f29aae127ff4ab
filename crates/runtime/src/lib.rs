//! The shell around `godwit_control`: watches the cluster, keeps the [`World`](godwit_control::World), asks for decisions and
//! carries them out over `kube::Client`.
//!
//! One task owns the world. News come in from one watch per kind and from the answers to our own writes (so that a decision
//! always knows what the one before it has written); whatever a change touches is decided again at once; writes run
//! beside it, one plan a lane at a time. The clock is read here and nowhere in the decisions.

mod events;
mod execute;
mod intake;
mod leader;
mod leftovers;
mod run;
mod scrape;
#[cfg(test)]
mod tests;

use godwit_api::Installation;
use godwit_control::lease::Candidate;
use godwit_control::{Kind, Noun, Settings};

pub use run::run;
pub use scrape::{Scraper, Scrapes, scraping};

/// What to run.
pub struct Options {
    /// Who this is, as reported in events (`reportingInstance`): a pod's or a host's name.
    pub identity: String,
    /// Where godwit is installed. [`Self::lease`] names its own namespace.
    pub installation: Installation,
    /// How the installation is set up.
    pub settings: Settings,
    /// What to decide about. [`Noun::STANDALONE`] for the standalone mode.
    pub nouns: Vec<Noun>,
    /// Decides only while it holds this lease. `None` decides without one.
    pub lease: Option<Candidate>,
    /// Told when everything has been listed, from when on this controller can take over.
    pub listed: Option<tokio::sync::watch::Sender<bool>>,
    /// Who asks for figures.
    pub scrapes: Option<Scrapes>,
    /// Another identity for placement (`system:kube-scheduler`); the main client places when there is none.
    pub scheduler: Option<kube::Client>,
}

impl Options {
    /// Everything on, for the standalone mode with this data directory.
    pub fn standalone(identity: impl Into<String>, data_dir: &str) -> Self {
        let identity = identity.into();
        Self {
            // The store is open in one process only.
            lease: Some(Candidate::new(identity.clone())),
            identity,
            installation: Installation::default(),
            settings: Settings::standalone(data_dir),
            nouns: Noun::STANDALONE.to_vec(),
            listed: None,
            scrapes: None,
            scheduler: None,
        }
    }

    /// What there is to decide beside an API server alone, with volumes in this data directory.
    pub fn bare(identity: impl Into<String>, data_dir: &str) -> Self {
        Self { nouns: Noun::BARE.to_vec(), ..Self::standalone(identity, data_dir) }
    }

    /// What there is to decide on a Kubernetes cluster. The launcher's image is to be set.
    pub fn cluster(identity: impl Into<String>) -> Self {
        let standalone = Self::standalone(identity, "");
        Self { settings: Settings::cluster(), nouns: Noun::CLUSTER.to_vec(), ..standalone }
    }
}

/// Why the controllers stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A watch ended for good, which watches never do by themselves.
    #[error("the watch of {} ended unexpectedly; restart the controllers", .0.plural())]
    WatchEnded(Kind),
}
