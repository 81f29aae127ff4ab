//! The handlers of other nodes: who they are, and whether the control plane is away for them as well.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use godwit_api::names::ANNOTATION_FENCE_ADDRESS;
use godwit_api::names::fence::{LEASE_PREFIX, MAX_PEERS};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, ListParams};
use serde::{Deserialize, Serialize};
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::Surroundings;
use super::rules::{Peers, counts};
use crate::channel::{read_line, write_line};
use crate::tls::Identity;

/// Where handlers answer, if nobody else is there: the same after a restart, since nobody could be told another one meanwhile.
const PORT: u16 = 8187;
/// Between two looks at who is there. A node whose lease was not renewed in between does not count.
const LEARN_EVERY: Duration = Duration::from_secs(8);
/// How long a look may take.
const LEARN_LIMIT: Duration = Duration::from_secs(4);
/// How long a peer may take to answer.
const ASK_LIMIT: Duration = Duration::from_millis(1500);
/// After a round in which all have answered, before the next one.
const AGAIN: Duration = Duration::from_secs(2);
/// Between two looks whether there is something to ask, and after a round in which somebody has not answered.
const SOON: Duration = Duration::from_millis(500);
/// Peers that are answered at the same time.
const AT_ONCE: usize = 64;

/// What a handler asks another one.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Question {
    /// For how long have you not heard that a renewal of yours was taken?
    Contact,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Silence {
    silent_ms: u64,
}

/// The other nodes, as the API last showed them.
#[derive(Default)]
pub(super) struct Others(Mutex<Known>);

#[derive(Default)]
struct Known {
    /// By node, the revision at which its lease was last seen.
    revisions: BTreeMap<String, String>,
    /// Those that renew theirs; none before that can be told.
    live: Option<BTreeSet<String>>,
    addresses: BTreeMap<String, String>,
    looks: u32,
}

impl Others {
    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As the last handler of this node knew them.
    pub(super) fn resume((live, addresses): (Peers, BTreeMap<String, String>)) -> Self {
        Self(Mutex::new(Known { live, addresses, ..Known::default() }))
    }

    /// Whom a renewal names, and where all of them answer.
    pub(super) fn to_name(&self) -> (Peers, BTreeMap<String, String>) {
        let known = self.lock();
        (known.live.clone(), known.addresses.clone())
    }

    fn learn(&self, me: &str, leases: &[Lease]) {
        let mut known = self.lock();
        known.looks = known.looks.saturating_add(1);
        let mut live = BTreeSet::new();
        let mut revisions = BTreeMap::new();
        for lease in leases {
            let name = lease.metadata.name.as_deref().and_then(|name| name.strip_prefix(LEASE_PREFIX));
            let Some(node) = name.filter(|node| *node != me) else { continue };
            let revision = lease.metadata.resource_version.clone().unwrap_or_default();
            // One that was not there before has just begun.
            if known.revisions.get(node) != Some(&revision) {
                live.insert(node.to_owned());
            }
            revisions.insert(node.to_owned(), revision);
            let annotations = lease.metadata.annotations.as_ref();
            if let Some(address) = annotations.and_then(|all| all.get(ANNOTATION_FENCE_ADDRESS)) {
                known.addresses.insert(node.to_owned(), address.clone());
            }
        }
        known.addresses.retain(|node, _| revisions.contains_key(node));
        known.revisions = revisions;
        // At the first look nobody can be told from a node that is no more.
        if known.looks > 1 {
            known.live = Some(choose(me, live));
        }
    }

    fn address(&self, node: &str) -> Option<SocketAddr> {
        self.lock().addresses.get(node)?.parse().ok()
    }
}

/// At most [`MAX_PEERS`] of them; other ones for each node.
fn choose(me: &str, all: BTreeSet<String>) -> BTreeSet<String> {
    if all.len() <= MAX_PEERS {
        return all;
    }
    let rank = |node: &String| {
        let mut hasher = DefaultHasher::new();
        (me, node).hash(&mut hasher);
        hasher.finish()
    };
    let mut ranked: Vec<String> = all.into_iter().collect();
    ranked.sort_by_key(rank);
    ranked.truncate(MAX_PEERS);
    ranked.into_iter().collect()
}

/// Looks who is there, for ever.
pub(super) async fn learn(around: Arc<Surroundings>, others: Arc<Others>) {
    let api: Api<Lease> = Api::namespaced(around.client.clone(), &around.namespace);
    loop {
        let wait = match tokio::time::timeout(LEARN_LIMIT, api.list(&ListParams::default().match_any())).await {
            Ok(Ok(list)) => {
                others.learn(&around.node, &list.items);
                LEARN_EVERY
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "the other nodes' leases cannot be read");
                SOON
            }
            Err(_) => SOON,
        };
        tokio::time::sleep(wait).await;
    }
}

/// Puts the fence off for as long as all that matter say that the control plane is away for them too.
pub(super) async fn put_off(around: Arc<Surroundings>, others: Arc<Others>) {
    let fence = &around.fence;
    let mut said = None;
    loop {
        let mut wait = SOON;
        if !counts(fence.silent_for()) {
            said = None;
        } else if fence.is_held()
            && let Some(peers) = fence.to_ask()
        {
            let asked = fence.now();
            let answers = join_all(peers.iter().map(|node| ask(&around, &others, node))).await;
            let against: Vec<String> = peers
                .iter()
                .zip(answers)
                .filter_map(|(node, answer)| Some(format!("{node}: {}", answer.err()?)))
                .collect();
            if against.is_empty() {
                fence.put_off(asked);
                wait = AGAIN;
            }
            if said.as_ref() != Some(&against) {
                match against.is_empty() {
                    true => tracing::warn!(
                        asked = peers.len(),
                        "no node has contact with the control plane: nobody can start this node's guests elsewhere, they run on"
                    ),
                    false => tracing::warn!(
                        against = against.join("; "),
                        "this node's lease is not renewed, and its guests may be started elsewhere: they are stopped when it ends"
                    ),
                }
                said = Some(against);
            }
        }
        tokio::time::sleep(wait).await;
    }
}

/// Asks one; an error says why its answer does not put the fence off.
async fn ask(around: &Surroundings, others: &Others, node: &str) -> Result<(), String> {
    let address = others.address(node).ok_or("its handler's address is not known")?;
    let asking = async {
        let config = Identity::load(&around.tls).and_then(|own| own.client(node)).map_err(io::Error::other)?;
        let stream = TcpStream::connect(address).await?;
        let stream = TlsConnector::from(config).connect(address.ip().into(), stream).await?;
        let mut stream = BufReader::new(stream);
        write_line(&mut stream, &Question::Contact).await?;
        let answer: Option<Silence> = read_line(&mut stream).await?;
        answer.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
    };
    let answer = match tokio::time::timeout(ASK_LIMIT, asking).await {
        Ok(answer) => answer.map_err(|error| error.to_string())?,
        Err(_) => return Err("it does not answer".to_owned()),
    };
    match counts(Duration::from_millis(answer.silent_ms)) {
        true => Ok(()),
        false => Err("it has contact with the control plane".to_owned()),
    }
}

/// Where other handlers ask this one.
pub(super) struct Door {
    listener: TcpListener,
    pub(super) address: SocketAddr,
}

impl Door {
    /// Opens it; none, with a line in the log, where that cannot be.
    pub(super) async fn open(address: IpAddr) -> Option<Self> {
        let listener = match TcpListener::bind((address, PORT)).await {
            Ok(listener) => Ok(listener),
            Err(_) => TcpListener::bind((address, 0)).await,
        };
        let opened = listener.and_then(|listener| Ok(Self { address: listener.local_addr()?, listener }));
        opened.inspect_err(|error| tracing::error!(%error, "other handlers cannot ask this one")).ok()
    }

    /// Answers for ever.
    pub(super) async fn serve(self, around: Arc<Surroundings>) {
        let permits = Arc::new(Semaphore::new(AT_ONCE));
        loop {
            let Ok(permit) = permits.clone().acquire_owned().await else { return };
            match self.listener.accept().await {
                Ok((stream, peer)) => {
                    let around = around.clone();
                    tokio::spawn(async move {
                        let answered = tokio::time::timeout(ASK_LIMIT * 2, answer(stream, &around)).await;
                        if let Ok(Err(error)) = answered {
                            tracing::info!(%peer, %error, "a question about the control plane was not answered");
                        }
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "taking another handler's connection");
                    tokio::time::sleep(SOON).await;
                }
            }
        }
    }
}

async fn answer(stream: TcpStream, around: &Surroundings) -> io::Result<()> {
    let config = Identity::load(&around.tls).and_then(|own| own.server()).map_err(io::Error::other)?;
    let stream = TlsAcceptor::from(config).accept(stream).await?;
    let mut stream = BufReader::new(stream);
    if let Some(Question::Contact) = read_line(&mut stream).await? {
        let silent = around.fence.silent_for();
        write_line(&mut stream, &Silence { silent_ms: u64::try_from(silent.as_millis()).unwrap_or(0) }).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn lease(node: &str, revision: u32) -> Lease {
        let address = format!("10.0.0.{revision}:8186");
        serde_json::from_value(
            json!({"metadata": {"name": format!("virt-handler-{node}"), "resourceVersion": revision.to_string(),
            "annotations": {ANNOTATION_FENCE_ADDRESS: address}}}),
        )
        .unwrap()
    }

    fn names(others: &Others) -> Option<Vec<String>> {
        Some(others.to_name().0?.into_iter().collect())
    }

    #[test]
    fn only_nodes_that_renew_are_named_and_nobody_before_that_can_be_told() {
        let others = Others::default();
        others.learn("a", &[lease("a", 1), lease("b", 2), lease("gone", 3)]);
        assert_eq!(names(&others), None);
        others.learn("a", &[lease("a", 5), lease("b", 6), lease("gone", 3), lease("new", 7)]);
        assert_eq!(names(&others), Some(vec!["b".to_owned(), "new".to_owned()]));
        assert_eq!(others.address("b"), Some("10.0.0.6:8186".parse().unwrap()));
        others.learn("a", &[lease("a", 8), lease("b", 6)]);
        assert_eq!(names(&others), Some(vec![]), "nobody is left");
    }

    #[test]
    fn of_many_the_same_few_are_asked_and_other_nodes_ask_others() {
        let all: BTreeSet<String> = (0..200).map(|number| format!("node{number}")).collect();
        assert_eq!(choose("a", all.clone()).len(), MAX_PEERS);
        assert_eq!(choose("a", all.clone()), choose("a", all.clone()));
        assert_ne!(choose("a", all.clone()), choose("b", all));
    }
}
