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

    let mut workers: BTreeMap<String, UnboundedSender<Input>> = BTreeMap::new();
    // A guest that changes its launcher on this node is shown by both.
    let mut shown: BTreeSet<(String, &str)> = BTreeSet::new();
    while let Some(seen) = seen.recv().await {
        let (uid, namespace, name, input) = match seen {
            Seen::Vmi(by, vmi) => {
                shown.insert((vmi.uid().to_owned(), by));
                let (namespace, name) = vmi.namespaced_name();
                (vmi.uid().to_owned(), namespace.to_owned(), name.to_owned(), Input::Vmi(Arc::new(*vmi)))
            }
            Seen::VmiUnseen(by, uid) => {
                shown.remove(&(uid.clone(), by));
                let still = shown.range((uid.clone(), "")..).next().is_some_and(|(other, _)| *other == uid);
                if let Some(worker) = workers.get(&uid).filter(|_| !still) {
                    let _ = worker.send(Input::VmiUnseen);
                }
                continue;
            }
            Seen::Pod(pod) => (pod.vmi_uid.clone(), pod.namespace.clone(), pod.vmi_name.clone(), Input::Pod(pod)),
            Seen::PodGone(pod) => {
                if let Some(worker) = workers.get(&pod.vmi_uid) {
                    let _ = worker.send(Input::PodGone(pod.name));
                }
                continue;
            }
        };
        let start = |uid: &String| Worker::start(context.clone(), uid.clone(), namespace, name);
        match workers.get(&uid) {
            // A worker that has ended gives the input back; a new one takes it.
            Some(worker) => {
                if let Err(mpsc::error::SendError(input)) = worker.send(input) {
                    let worker = start(&uid);
                    let _ = worker.send(input);
                    workers.insert(uid, worker);
                }
            }
            None => {
                let worker = start(&uid);
                let _ = worker.send(input);
                workers.insert(uid, worker);
            }
        }
        workers.retain(|_, worker| !worker.is_closed());
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
