//! News of the cluster: one watch a kind.

use futures::StreamExt;
use godwit_control::{Kind, Object};
use kube::api::{Api, DynamicObject};
use kube::core::ApiResource;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use tokio::sync::mpsc;
use tracing::warn;

/// How many objects are asked for at once.
const PAGE: u32 = 100;

/// A piece of news.
pub enum News {
    /// An object exists in this state.
    Here(Object),
    /// An object is gone; its last state.
    Gone(Object),
    /// A list of all objects of the kind begins.
    ListBegins(Kind),
    /// One of the list.
    Listed(Object),
    /// The list is complete: what was not in it does not exist.
    ListEnds(Kind),
    /// The watch has ended for good.
    Ended(Kind),
}

/// How to speak of a kind to the client.
pub fn resource(kind: Kind) -> ApiResource {
    ApiResource {
        group: kind.group().to_owned(),
        version: kind.version().to_owned(),
        api_version: kind.api_version(),
        kind: kind.kind().to_owned(),
        plural: kind.plural().to_owned(),
    }
}

/// Watches a kind and sends the news until nobody listens any more. Errors of the connection are retried.
pub async fn watch_kind(client: kube::Client, kind: Kind, news: mpsc::Sender<News>) {
    let api: Api<DynamicObject> = match kind.only_in() {
        Some(namespace) => Api::namespaced_with(client, namespace, &resource(kind)),
        None => Api::all_with(client, &resource(kind)),
    };
    // A page is held as it came before it is taken in, which is a multiple of what is kept of it.
    let config = watcher::Config { page_size: Some(PAGE), ..watcher::Config::default() };
    let mut stream = std::pin::pin!(watch(api, config).default_backoff());
    while let Some(event) = stream.next().await {
        let piece = match event {
            Ok(Event::Apply(object)) => typed(kind, object).map(News::Here),
            Ok(Event::Delete(object)) => typed(kind, object).map(News::Gone),
            Ok(Event::Init) => Some(News::ListBegins(kind)),
            Ok(Event::InitApply(object)) => typed(kind, object).map(News::Listed),
            Ok(Event::InitDone) => Some(News::ListEnds(kind)),
            Err(error) => {
                warn!(kind = kind.plural(), %error, "watch interrupted, trying again");
                None
            }
        };
        if let Some(piece) = piece
            && news.send(piece).await.is_err()
        {
            return;
        }
    }
    let _ = news.send(News::Ended(kind)).await;
}

fn typed(kind: Kind, object: DynamicObject) -> Option<Object> {
    let name = format!(
        "{}/{}",
        object.metadata.namespace.as_deref().unwrap_or_default(),
        object.metadata.name.as_deref().unwrap_or_default()
    );
    let read = serde_json::to_value(object).and_then(|value| Object::from_value(kind, value));
    match read {
        Ok(object) => Some(object.lean()),
        Err(error) => {
            warn!(kind = kind.kind(), name, %error, "object cannot be read and is left alone");
            None
        }
    }
}
