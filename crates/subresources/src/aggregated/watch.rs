//! The ConfigMap that tells who the front proxy is, watched.

use super::Aggregated;
use super::front_proxy::{CONFIG_MAP, FrontProxy, NAMESPACE};
use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::runtime::{WatchStreamExt, watcher};
use std::sync::Arc;

/// Keeps it up to date, for ever: kube-apiserver may be given another CA for its front proxy at any time.
pub async fn follow(aggregated: Arc<Aggregated>, client: kube::Client) {
    let api: Api<ConfigMap> = Api::namespaced(client, NAMESPACE);
    let config = watcher::Config::default().fields(&format!("metadata.name={CONFIG_MAP}"));
    let mut found = std::pin::pin!(watcher(api, config).default_backoff().applied_objects());
    while let Some(found) = found.next().await {
        let read = match found {
            Ok(map) => FrontProxy::read(&map.data.unwrap_or_default()),
            Err(error) => {
                tracing::warn!(%error, "ConfigMap {NAMESPACE}/{CONFIG_MAP} cannot be watched; trying again");
                continue;
            }
        };
        match read {
            Ok(proxy) => {
                tracing::info!("it is known who the front proxy is");
                aggregated.trust(proxy);
            }
            // What was known before stays.
            Err(error) => tracing::error!("{error}"),
        }
    }
}
