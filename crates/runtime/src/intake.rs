//! News of the cluster: one watch a kind.

use std::time::Duration;

use futures::StreamExt;
use godwit_api::Installation;
use godwit_control::{Kind, Object};
use kube::api::{Api, DynamicObject};
use kube::core::ApiResource;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

/// How many objects are asked for at once.
const PAGE: u32 = 100;
/// The first pause before a list after a watch was refused since what it would begin with is no longer kept; it doubles with each
/// further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// A piece of news.
pub enum News {
    /// An object exists in this state.
    Here(Object),
    /// An object is gone; its last state.
    Gone(Object),
    /// A list of all objects of the kind begins. It is asked for when the answer is given: what is known by then and is not in it is
    /// gone, while what is made later, and known before the list has come, is only younger than the list.
    ListBegins(Kind, oneshot::Sender<()>),
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

/// The objects of a kind that matter to an installation.
pub fn kind_api(client: &kube::Client, kind: Kind, installation: &Installation) -> Api<DynamicObject> {
    match kind.only_in(installation) {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource(kind)),
        None => Api::all_with(client.clone(), &resource(kind)),
    }
}

/// Watches a kind and sends the news until nobody listens any more. Errors of the connection are retried.
pub async fn watch_kind(api: Api<DynamicObject>, kind: Kind, news: mpsc::Sender<News>) {
    // A page is held as it came before it is taken in, which is a multiple of what is kept of it.
    let config = watcher::Config { page_size: Some(PAGE), ..watcher::Config::default() };
    let mut pause = FIRST_PAUSE;
    loop {
        let mut stream = std::pin::pin!(watch(api.clone(), config.clone()).default_backoff());
        let expired = loop {
            let Some(event) = stream.next().await else { break false };
            let piece = match event {
                Ok(Event::Apply(object)) => {
                    pause = FIRST_PAUSE;
                    typed(kind, object).map(News::Here)
                }
                Ok(Event::Delete(object)) => {
                    pause = FIRST_PAUSE;
                    typed(kind, object).map(News::Gone)
                }
                Ok(Event::Init) => {
                    let (ready, is_ready) = oneshot::channel();
                    if news.send(News::ListBegins(kind, ready)).await.is_err() {
                        return;
                    }
                    // Nobody answers who does not listen any more, which the next piece finds out.
                    let _ = is_ready.await;
                    None
                }
                Ok(Event::InitApply(object)) => typed(kind, object).map(News::Listed),
                Ok(Event::InitDone) => Some(News::ListEnds(kind)),
                Err(error) => {
                    warn!(kind = kind.plural(), %error, "watch interrupted, trying again");
                    if is_refused_as_expired(&error) {
                        break true;
                    }
                    None
                }
            };
            if let Some(piece) = piece
                && news.send(piece).await.is_err()
            {
                return;
            }
        };
        if !expired {
            break;
        }
        tokio::time::sleep(pause).await;
        pause = LONGEST_PAUSE.min(pause * 2);
    }
    let _ = news.send(News::Ended(kind)).await;
}

/// Whether the server refuses the watch since it no longer keeps what it would begin with. kube's watcher lists anew when it is told so
/// in the stream, and asks for the same watch for ever when it is told so by the status of the answer.
fn is_refused_as_expired(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 410)
}

fn typed(kind: Kind, mut object: DynamicObject) -> Option<Object> {
    // It would be left out in the end, and takes the most until then.
    object.metadata.managed_fields = None;
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
