//! Clients of a cluster's API server.

use anyhow::Context;
use std::path::Path;

/// A client with this kubeconfig, or without one as a pod of a cluster (or as kubectl would find it).
///
/// # Errors
/// A kubeconfig that cannot be used, or none at all.
pub async fn client(kubeconfig: Option<&Path>) -> anyhow::Result<kube::Client> {
    match kubeconfig {
        Some(path) => Ok(godwit_standalone::client(path).await?),
        None => Ok(godwit_standalone::client_of(kube::Config::infer().await.context(NOWHERE)?)?),
    }
}

/// The same for controllers, to whom a "not now" is an answer (see [`godwit_standalone::impatient_client`]).
///
/// # Errors
/// As [`client`].
pub async fn impatient_client(kubeconfig: Option<&Path>) -> anyhow::Result<kube::Client> {
    let Some(path) = kubeconfig else {
        let mut config = kube::Config::infer().await.context(NOWHERE)?;
        config.default_retry = false;
        return Ok(godwit_standalone::client_of(config)?);
    };
    Ok(godwit_standalone::impatient_client(path).await?)
}

const NOWHERE: &str = "no --kubeconfig, and this is no pod of a cluster";
