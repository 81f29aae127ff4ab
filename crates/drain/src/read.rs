//! Reads all of a cluster that a plan needs. Lists only; nothing is ever written.

use godwit_api::Installation;
use godwit_api::drain::DrainPlan;
use godwit_control::drain::{Manner, Terms};
use godwit_control::{Kind, Object, Settings, Source, View, World, drain, names};
use jiff::Timestamp;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, ListParams};
use serde::de::DeserializeOwned;

use crate::{Error, code, words};

/// What a plan cannot do without.
const NEEDED: [Kind; 3] = [Kind::VirtualMachineInstance, Kind::Pod, Kind::Node];
/// What makes it better, and what is not known without it; a cluster may not have it, or not show it.
const WANTED: [(Kind, &str); 13] = [
    (Kind::VirtualMachine, "which guests are started again after a shutdown"),
    (Kind::Migration, "which migrations are under way"),
    (Kind::KubeVirt, "which limits and which strategy are configured, so the defaults are taken"),
    (Kind::PersistentVolumeClaim, "which claims keep a VM where it is"),
    (Kind::PersistentVolume, "which nodes reach a volume"),
    (Kind::StorageClass, "which nodes a new volume can be on"),
    (Kind::Namespace, "which policies are for a namespace"),
    (Kind::MigrationPolicy, "which policies change a migration"),
    (Kind::MigrationRecord, "what earlier migrations got of the links"),
    (Kind::ResourceQuota, "whether quotas let target pods in"),
    (Kind::NodeMaintenance, "which other nodes are to be emptied"),
    (Kind::KubeVirtNodeMaintenance, "which other nodes are to be emptied"),
    (Kind::OldestNodeMaintenance, "which other nodes are to be emptied"),
];
/// Objects of one answer.
const PAGE: u32 = 500;

/// A cluster as it was read.
pub struct Cluster {
    /// Its objects.
    pub world: World,
    /// Its PodDisruptionBudgets; `None` if they could not be read.
    pub budgets: Option<Vec<PodDisruptionBudget>>,
    /// What could not be read, in sentences.
    pub notes: Vec<String>,
    settings: Settings,
}

/// Reads the cluster. Its configuration is that of the KubeVirt object in `namespace`, or, where none is named, of the one that there is.
///
/// # Errors
/// [`Error::NoKubeVirt`], or [`Error::Read`] when VMIs, pods or nodes cannot be listed. What else cannot be is noted.
pub async fn cluster(client: &Client, namespace: Option<&str>) -> Result<Cluster, Error> {
    let settings = Settings::standalone("/");
    let (installation, kubevirts, doubt) = find(client, namespace).await;
    let mut cluster =
        Cluster { world: World::of(installation.clone()), budgets: None, notes: Vec::from_iter(doubt), settings };
    cluster.world.set_clock(Timestamp::now());
    for kind in NEEDED {
        let listed = list::<DynamicObject>(&all(client, kind)).await;
        match listed {
            Ok(objects) => cluster.take(kind, objects),
            Err(error) if kind == Kind::VirtualMachineInstance && code(&error) == Some(404) => {
                return Err(Error::NoKubeVirt);
            }
            Err(error) => return Err(Error::Read { what: kind.plural().to_owned(), why: words(&error) }),
        }
    }
    let mut absent = Vec::new();
    let mut kubevirts = Some(kubevirts);
    for (kind, without) in WANTED {
        let listed = match kubevirts.take_if(|_| kind == Kind::KubeVirt) {
            Some(listed) => listed,
            None => list::<DynamicObject>(&all(client, kind)).await,
        };
        match listed {
            Ok(objects) => cluster.take(kind, objects),
            // None of them, then.
            Err(error) if code(&error) == Some(404) => absent.push(format!("{}.{}", kind.plural(), kind.group())),
            Err(error) => cluster.notes.push(unread(&format!("{}.{}", kind.plural(), kind.group()), without, &error)),
        }
    }
    if !absent.is_empty() {
        cluster.notes.push(format!("this cluster does not serve {}", absent.join(", ")));
    }
    // Two maps are meant: the old form of the configuration, and who has a turn.
    let maps: Api<DynamicObject> =
        Api::namespaced_with(client.clone(), installation.namespace(), &resource(Kind::ConfigMap));
    match list::<DynamicObject>(&maps).await {
        Ok(objects) => cluster.take(Kind::ConfigMap, objects),
        Err(error) if code(&error) == Some(404) => {}
        Err(error) => cluster.notes.push(unread("configmaps", "which migrations have a turn", &error)),
    }
    match list::<PodDisruptionBudget>(&Api::all(client.clone())).await {
        Ok(budgets) => cluster.budgets = Some(budgets),
        Err(error) => {
            cluster.notes.push(unread("poddisruptionbudgets.policy", "which of them keep a pod where it is", &error));
        }
    }
    Ok(cluster)
}

/// Where the cluster's KubeVirt is installed, its object, as that of the installation, and what is not sure about it. That this is asked
/// for need not be allowed in all namespaces.
async fn find(
    client: &Client,
    namespace: Option<&str>,
) -> (Installation, Result<Vec<DynamicObject>, kube::Error>, Option<String>) {
    let named = namespace.map_or_else(Installation::default, Installation::new);
    let listed = match list::<DynamicObject>(&all(client, Kind::KubeVirt)).await {
        Err(error) if code(&error) == Some(403) => {
            let within = Api::namespaced_with(client.clone(), named.namespace(), &resource(Kind::KubeVirt));
            list(&within).await.map_err(|_| error)
        }
        listed => listed,
    };
    let mut found = match listed {
        Ok(found) => found,
        Err(error) => return (named, Err(error), None),
    };
    let place = |object: &DynamicObject| object.metadata.namespace.clone().unwrap_or_default();
    let places: Vec<String> = found.iter().map(place).collect();
    let installation = match (namespace, found.as_slice()) {
        (None, [only]) => Installation::new(place(only)),
        _ => named,
    };
    let own = installation.namespace();
    let doubt = (!places.is_empty() && !places.iter().any(|place| place == own)).then(|| {
        format!(
            "there is no KubeVirt object in the namespace {own}, so the defaults are taken for limits and strategy; there is one in {}: \
             see --namespace",
            places.join(", ")
        )
    });
    found.retain(|object| place(object) == own);
    if let [only] = found.as_mut_slice() {
        // Some installations have it under another name; its configuration is meant all the same.
        only.metadata.name = Some(names::KUBEVIRT_NAME.to_owned());
    }
    (installation, Ok(found), doubt)
}

/// What is not known because of a kind that could not be read.
fn unread(kind: &str, without: &str, error: &kube::Error) -> String {
    format!("not known: {without}; {} could not be read: {}", kind.trim_end_matches('.'), words(error))
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

fn all(client: &Client, kind: Kind) -> Api<DynamicObject> {
    Api::all_with(client.clone(), &resource(kind))
}

async fn list<T: Clone + DeserializeOwned + std::fmt::Debug>(api: &Api<T>) -> Result<Vec<T>, kube::Error> {
    let mut found = Vec::new();
    let mut params = ListParams::default().limit(PAGE);
    loop {
        let page = api.list(&params).await?;
        found.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(found),
        }
    }
}

/// An object of a kind, if it can be read as one.
pub(crate) fn typed(kind: Kind, object: DynamicObject) -> Result<Object, serde_json::Error> {
    serde_json::to_value(object).and_then(|value| Object::from_value(kind, value))
}

impl Cluster {
    fn take(&mut self, kind: Kind, objects: Vec<DynamicObject>) {
        for object in objects {
            let name = object.metadata.name.clone().unwrap_or_default();
            match typed(kind, object) {
                Ok(object) => drop(self.world.apply(object, Source::Watch)),
                Err(error) => self.notes.push(format!("{} {name} could not be read: {error}", kind.kind())),
            }
        }
    }

    /// What would become of everything on these nodes if they were emptied now.
    ///
    /// # Errors
    /// [`Error::NoSuchNode`].
    pub fn plan(&self, nodes: &[String], manner: Manner) -> Result<DrainPlan, Error> {
        let known: Vec<String> = self.world.nodes.names().map(|name| name.name.to_string()).collect();
        if let Some(name) = nodes.iter().find(|node| !known.contains(node)) {
            return Err(Error::NoSuchNode { name: name.clone(), known });
        }
        let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
        let view = View { now: Timestamp::now(), world: &self.world, settings: &self.settings };
        let terms = Terms { manner, budgets: self.budgets.as_deref() };
        let mut plan = drain::plan(&view, &nodes, &terms);
        plan.notes.extend(self.notes.iter().cloned());
        Ok(plan)
    }
}
