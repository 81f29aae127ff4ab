//! What the API shows of this node, passed on to one worker a VMI.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use godwit_api::names;
use godwit_api::vmi::VirtualMachineInstance;
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::mpsc::{self, UnboundedSender};

use crate::context::Context;
use crate::fence::Fence;
use crate::view;
use crate::worker::{Input, Worker};

/// Something that a watch shows.
enum Seen {
    /// By the watch of this label.
    Vmi(&'static str, Box<VirtualMachineInstance>),
    /// Not shown any more by this watch, by UID.
    VmiUnseen(&'static str, String),
    Pod(view::LauncherPod),
    PodGone(view::LauncherPod),
}

/// Watches until it is aborted.
pub async fn run(context: Arc<Context>) {
    let (sender, mut seen) = mpsc::unbounded_channel();
    let mut tasks = tokio::task::JoinSet::new();
    let node = &context.node;
    for label in [names::LABEL_NODE_NAME, names::LABEL_MIGRATION_TARGET_NODE_NAME] {
        let config = watcher::Config::default().labels(&format!("{label}={node}"));
        tasks.spawn(vmis(Api::all(context.client.clone()), label, config, sender.clone()));
    }
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}")).labels(&format!(
        "{}={}",
        names::LABEL_APP,
        names::APP_VIRT_LAUNCHER
    ));
    tasks.spawn(pods(Api::all(context.client.clone()), config, sender, context.fence.clone()));

    let mut workers = Workers::default();
    // A guest that changes its launcher on this node is shown by both.
    let mut shown: BTreeSet<(String, &str)> = BTreeSet::new();
    while let Some(seen) = seen.recv().await {
        let start = |guest: &Guest| {
            Worker::start(context.clone(), guest.uid.clone(), guest.namespace.clone(), guest.name.clone())
        };
        match seen {
            Seen::Vmi(by, vmi) => {
                shown.insert((vmi.uid().to_owned(), by));
                let (namespace, name) = vmi.namespaced_name();
                let guest = Guest { uid: vmi.uid().to_owned(), namespace: namespace.to_owned(), name: name.to_owned() };
                workers.tell(guest, Input::Vmi(Arc::new(*vmi)), start);
            }
            Seen::VmiUnseen(by, uid) => {
                shown.remove(&(uid.clone(), by));
                let still = shown.range((uid.clone(), "")..).next().is_some_and(|(other, _)| *other == uid);
                if !still {
                    workers.unseen(&uid);
                }
            }
            Seen::Pod(pod) => workers.tell(Guest::of(&pod), Input::Pod(pod), start),
            Seen::PodGone(pod) => workers.gone(&pod),
        }
    }
}

/// Whom a worker is for. Whoever may make pods says of them what they like, so a UID alone is nobody's: a pod of another namespace
/// is not the guest's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Guest {
    uid: String,
    namespace: String,
    name: String,
}

impl Guest {
    fn of(pod: &view::LauncherPod) -> Self {
        Self { uid: pod.vmi_uid.clone(), namespace: pod.namespace.clone(), name: pod.vmi_name.clone() }
    }
}

/// One worker a guest.
#[derive(Default)]
struct Workers(BTreeMap<Guest, UnboundedSender<Input>>);

impl Workers {
    /// Tells a guest's worker, or a new one where there is none.
    fn tell(&mut self, guest: Guest, input: Input, start: impl FnOnce(&Guest) -> UnboundedSender<Input>) {
        let told = match self.0.get(&guest) {
            Some(worker) => worker.send(input),
            None => Err(mpsc::error::SendError(input)),
        };
        // A worker that has ended gives the input back; a new one takes it.
        if let Err(mpsc::error::SendError(input)) = told {
            let worker = start(&guest);
            let _ = worker.send(input);
            self.0.insert(guest, worker);
        }
        self.0.retain(|_, worker| !worker.is_closed());
    }

    fn unseen(&self, uid: &str) {
        for (_, worker) in self.0.iter().filter(|(guest, _)| guest.uid == uid) {
            let _ = worker.send(Input::VmiUnseen);
        }
    }

    fn gone(&self, pod: &view::LauncherPod) {
        if let Some(worker) = self.0.get(&Guest::of(pod)) {
            let _ = worker.send(Input::PodGone(pod.name.clone()));
        }
    }
}

/// A watch is taken up again by itself; the log says what is in its way.
fn interrupted(what: &str, error: &watcher::Error, began: Instant) {
    match error {
        watcher::Error::InitialListFailed(cause) | watcher::Error::WatchStartFailed(cause)
            if crate::is_early(cause, began.elapsed()) =>
        {
            tracing::debug!("waiting for the definition of {what}");
        }
        _ => tracing::warn!(%error, "watch of {what} interrupted; it goes on by itself"),
    }
}

async fn vmis(
    api: Api<VirtualMachineInstance>,
    by: &'static str,
    config: watcher::Config,
    seen: UnboundedSender<Seen>,
) {
    let mut known: BTreeSet<String> = BTreeSet::new();
    let mut listed: BTreeSet<String> = BTreeSet::new();
    let mut stream = pin!(watcher(api, config).default_backoff());
    let began = Instant::now();
    while let Some(event) = stream.next().await {
        match event {
            Ok(Event::Init) => listed.clear(),
            Ok(Event::InitApply(vmi)) => {
                listed.insert(vmi.uid().to_owned());
                let _ = seen.send(Seen::Vmi(by, Box::new(vmi)));
            }
            Ok(Event::InitDone) => {
                for uid in known.difference(&listed) {
                    let _ = seen.send(Seen::VmiUnseen(by, uid.clone()));
                }
                known = std::mem::take(&mut listed);
            }
            Ok(Event::Apply(vmi)) => {
                known.insert(vmi.uid().to_owned());
                let _ = seen.send(Seen::Vmi(by, Box::new(vmi)));
            }
            Ok(Event::Delete(vmi)) => {
                known.remove(vmi.uid());
                let _ = seen.send(Seen::VmiUnseen(by, vmi.uid().to_owned()));
            }
            Err(error) => interrupted("VMIs", &error, began),
        }
    }
}

async fn pods(api: Api<Pod>, config: watcher::Config, seen: UnboundedSender<Seen>, fence: Fence) {
    let mut known: BTreeMap<String, view::LauncherPod> = BTreeMap::new();
    let mut listed: BTreeMap<String, view::LauncherPod> = BTreeMap::new();
    let mut stream = pin!(watcher(api, config).default_backoff());
    let began = Instant::now();
    while let Some(event) = stream.next().await {
        match event {
            Ok(Event::Init) => listed.clear(),
            Ok(Event::InitApply(pod)) => {
                if let Some(pod) = view::pod(&pod) {
                    listed.insert(pod.uid.clone(), pod.clone());
                    let _ = seen.send(Seen::Pod(pod));
                }
            }
            Ok(Event::InitDone) => {
                let new = std::mem::take(&mut listed);
                for (uid, pod) in &known {
                    if !new.contains_key(uid) {
                        let _ = seen.send(Seen::PodGone(pod.clone()));
                    }
                }
                known = new;
                fence.adopted().release();
            }
            Ok(Event::Apply(pod)) => {
                if let Some(pod) = view::pod(&pod) {
                    // What decisions need of a pod changes less often than the pod.
                    if known.get(&pod.uid) != Some(&pod) {
                        known.insert(pod.uid.clone(), pod.clone());
                        let _ = seen.send(Seen::Pod(pod));
                    }
                }
            }
            Ok(Event::Delete(pod)) => {
                if let Some(pod) = view::pod(&pod) {
                    known.remove(&pod.uid);
                    let _ = seen.send(Seen::PodGone(pod));
                }
            }
            Err(error) => interrupted("pods", &error, began),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_of_another_namespace_is_not_the_guests() {
        let pod = |namespace: &str| view::LauncherPod {
            namespace: namespace.to_owned(),
            name: "virt-launcher-demo-abcde".to_owned(),
            uid: format!("pod-of-{namespace}"),
            vmi_uid: "u1".to_owned(),
            vmi_name: "demo".to_owned(),
            migration_uid: None,
            addresses: Vec::new(),
            terminal: false,
            shareable_memory: false,
        };
        let mut workers = Workers::default();
        let mut started = Vec::new();
        let mut tell = |input: view::LauncherPod| {
            workers.tell(Guest::of(&input), Input::Pod(input), |guest| {
                let (sender, inputs) = mpsc::unbounded_channel();
                started.push((guest.namespace.clone(), inputs));
                sender
            });
        };
        tell(pod("foreign"));
        tell(pod("tenant"));
        tell(pod("tenant"));
        workers.gone(&pod("foreign"));
        workers.unseen("u1");
        let heard: Vec<(String, Vec<String>)> = started
            .into_iter()
            .map(|(namespace, mut inputs)| {
                let heard = std::iter::from_fn(|| inputs.try_recv().ok()).map(|input| match input {
                    Input::Pod(pod) => pod.uid,
                    Input::PodGone(name) => format!("without {name}"),
                    Input::Vmi(_) => "its VMI".to_owned(),
                    Input::VmiUnseen => "unseen".to_owned(),
                });
                (namespace, heard.collect())
            })
            .collect();
        let gone = "without virt-launcher-demo-abcde";
        assert_eq!(
            heard,
            [
                ("foreign".to_owned(), ["pod-of-foreign", gone, "unseen"].map(str::to_owned).to_vec()),
                ("tenant".to_owned(), ["pod-of-tenant", "pod-of-tenant", "unseen"].map(str::to_owned).to_vec()),
            ]
        );
    }
}
