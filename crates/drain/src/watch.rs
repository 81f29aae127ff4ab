//! What is known while nodes are emptied: their pods, and all VMIs and migrations, from one watch each.

use std::collections::{BTreeMap, BTreeSet};

use futures::StreamExt;
use godwit_api::{VirtualMachineInstance, VirtualMachineInstanceMigration};
use godwit_control::{Kind, Name, Object};
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, DynamicObject};
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::read::{resource, typed};

/// One watch: pods of a node, or all objects of a kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Topic {
    kind: Kind,
    node: Option<String>,
}

/// A piece of news.
pub enum News {
    /// An object exists in this state.
    Here(Topic, Object),
    /// An object is gone.
    Gone(Topic, Name),
    /// A list begins.
    ListBegins(Topic),
    /// A list is complete: what was not in it does not exist.
    ListEnds(Topic),
    /// The server cannot be reached, or refuses; it is tried again.
    Trouble(String),
}

/// Watches until nobody listens any more.
pub fn begin(client: &Client, nodes: &[String]) -> (JoinSet<()>, mpsc::Receiver<News>, Facts) {
    let (tell, news) = mpsc::channel(1024);
    let mut tasks = JoinSet::new();
    let whole = [Kind::VirtualMachineInstance, Kind::Migration].map(|kind| Topic { kind, node: None });
    let pods = nodes.iter().map(|node| Topic { kind: Kind::Pod, node: Some(node.clone()) });
    let topics: Vec<Topic> = whole.into_iter().chain(pods).collect();
    for topic in &topics {
        tasks.spawn(follow(client.clone(), topic.clone(), tell.clone()));
    }
    (tasks, news, Facts { unlisted: topics.into_iter().collect(), ..Facts::default() })
}

async fn follow(client: Client, topic: Topic, tell: mpsc::Sender<News>) {
    let api: Api<DynamicObject> = Api::all_with(client, &resource(topic.kind));
    let config = match &topic.node {
        Some(node) => watcher::Config::default().fields(&format!("spec.nodeName={node}")),
        None => watcher::Config::default(),
    };
    let mut stream = std::pin::pin!(watch(api, config).default_backoff());
    while let Some(event) = stream.next().await {
        let here =
            |object: DynamicObject| typed(topic.kind, object).ok().map(|object| News::Here(topic.clone(), object));
        let piece = match event {
            Ok(Event::Apply(object) | Event::InitApply(object)) => here(object),
            Ok(Event::Delete(object)) => Some(News::Gone(topic.clone(), Name::of(&object.metadata))),
            Ok(Event::Init) => Some(News::ListBegins(topic.clone())),
            Ok(Event::InitDone) => Some(News::ListEnds(topic.clone())),
            Err(error) => Some(News::Trouble(error.to_string())),
        };
        if let Some(piece) = piece
            && tell.send(piece).await.is_err()
        {
            return;
        }
    }
}

/// All that is known.
#[derive(Default)]
pub struct Facts {
    /// The pods of the nodes.
    pub pods: BTreeMap<Name, Arc<Pod>>,
    /// All VMIs.
    pub vmis: BTreeMap<Name, Arc<VirtualMachineInstance>>,
    /// All migrations.
    pub migrations: BTreeMap<Name, Arc<VirtualMachineInstanceMigration>>,
    /// What has not been listed yet.
    unlisted: BTreeSet<Topic>,
    /// What a list under way has had so far.
    seen: BTreeMap<Topic, BTreeSet<Name>>,
}

impl Facts {
    /// Whether everything has been listed once.
    pub fn are_complete(&self) -> bool {
        self.unlisted.is_empty()
    }

    /// Takes in a piece of news.
    pub fn take(&mut self, news: News) {
        match news {
            News::Here(topic, object) => {
                if let Some(seen) = self.seen.get_mut(&topic) {
                    seen.insert(object.name());
                }
                let name = object.name();
                match object {
                    Object::Pod(pod) => _ = self.pods.insert(name, pod),
                    Object::VirtualMachineInstance(vmi) => _ = self.vmis.insert(name, vmi),
                    Object::Migration(migration) => _ = self.migrations.insert(name, migration),
                    _ => {}
                }
            }
            News::Gone(topic, name) => self.remove(&topic, &name),
            News::ListBegins(topic) => _ = self.seen.insert(topic, BTreeSet::new()),
            News::ListEnds(topic) => {
                let seen = self.seen.remove(&topic).unwrap_or_default();
                let missing: Vec<Name> = self.names(&topic).into_iter().filter(|name| !seen.contains(name)).collect();
                for name in missing {
                    self.remove(&topic, &name);
                }
                self.unlisted.remove(&topic);
            }
            News::Trouble(_) => {}
        }
    }

    fn names(&self, topic: &Topic) -> Vec<Name> {
        match topic.kind {
            Kind::Pod => {
                let on = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.clone()) == topic.node;
                self.pods.iter().filter(|(_, pod)| on(pod)).map(|(name, _)| name.clone()).collect()
            }
            Kind::VirtualMachineInstance => self.vmis.keys().cloned().collect(),
            _ => self.migrations.keys().cloned().collect(),
        }
    }

    fn remove(&mut self, topic: &Topic, name: &Name) {
        match topic.kind {
            Kind::Pod => _ = self.pods.remove(name),
            Kind::VirtualMachineInstance => _ = self.vmis.remove(name),
            _ => _ = self.migrations.remove(name),
        }
    }
}
