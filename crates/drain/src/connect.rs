//! Which cluster is meant.

use std::path::{Path, PathBuf};

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use crate::Error;

/// A client for the cluster of this kubeconfig; without one, of `KUBECONFIG`, else of the standalone cluster in `data_dir` if
/// there is one, else as `kubectl` finds it.
///
/// Refusals with 429 come back at once: whoever evicts has to know of them.
///
/// # Errors
/// [`Error::NoCluster`].
pub async fn connect(kubeconfig: Option<&Path>, data_dir: &Path) -> Result<Client, Error> {
    let failed = |error: &dyn std::fmt::Display| Error::NoCluster(error.to_string());
    let own = data_dir.join("kubeconfig");
    let file: Option<PathBuf> = match kubeconfig {
        Some(file) => Some(file.to_owned()),
        None if std::env::var_os("KUBECONFIG").is_none() && own.exists() => Some(own),
        None => None,
    };
    let mut config = match file {
        Some(file) => {
            let read = Kubeconfig::read_from(&file).map_err(|error| failed(&error))?;
            Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await.map_err(|error| failed(&error))?
        }
        None => Config::infer().await.map_err(|error| failed(&error))?,
    };
    config.default_retry = false;
    Client::try_from(config).map_err(|error| failed(&error))
}
