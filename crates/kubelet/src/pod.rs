//! The life of one pod on this node, from the first sight of it to the last trace of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use k8s_openapi::api::core::v1::{Container, Pod};
use kube::ResourceExt;
use nix::sys::signal::Signal;
use tokio::sync::{Mutex, watch};
use tokio::task::AbortHandle;

use crate::Context;
use crate::container::Task;
use crate::env::Facts;
use crate::network::{self, PodNetwork};
use crate::plan;
use crate::process::{self, Recorded};
use crate::publish::Board;
use crate::status::PodInfo;
use crate::volumes::{self, Failure, Volumes};

/// Delay between attempts to make what a pod needs.
const RETRY: Duration = Duration::from_secs(2);

/// What was last seen of a pod in the API.
#[derive(Clone)]
pub(crate) struct Seen {
    pub(crate) pod: Arc<Pod>,
    /// The object is no more.
    pub(crate) gone: bool,
}

impl Seen {
    fn must_end(&self) -> bool {
        self.gone || self.pod.metadata.deletion_timestamp.is_some()
    }
}

/// Waits until what was last seen of the pod is so. A kubelet that ends tells nothing more of its pods, which says nothing of them: they
/// run on.
async fn until(seen: &mut watch::Receiver<Seen>, wanted: impl FnMut(&Seen) -> bool) {
    if seen.wait_for(wanted).await.is_err() {
        std::future::pending().await
    }
}

struct Aborting(AbortHandle);

impl Drop for Aborting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Life {
    context: Arc<Context>,
    pod: Arc<Pod>,
    folder: PathBuf,
    board: Board,
    starting: Arc<Mutex<()>>,
}

/// Runs a pod until nothing is left of it.
pub(crate) async fn run(context: Arc<Context>, mut seen: watch::Receiver<Seen>) {
    let pod = seen.borrow().pod.clone();
    let folder = context.pod_folder(&pod.uid().unwrap_or_default());
    let info = PodInfo::new(&pod, context.node_ip);
    let board = Board::new(context.client.clone(), &pod, info);
    let life = Life { context, pod: pod.clone(), folder, board, starting: Arc::default() };

    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    if matches!(phase, Some("Succeeded" | "Failed")) {
        // It has been lived to its end before; there is nothing to tell.
        life.release();
        until(&mut seen, Seen::must_end).await;
        life.clean().await;
        life.finish(&seen).await;
        return;
    }
    let publisher = {
        let board = life.board.clone();
        Aborting(tokio::spawn(async move { board.publish().await }).abort_handle())
    };
    let watcher = {
        let (board, mut seen) = (life.board.clone(), seen.clone());
        Aborting(
            tokio::spawn(async move {
                while seen.changed().await.is_ok() {
                    let pod = seen.borrow_and_update().pod.clone();
                    board.change(|info| info.see(&pod));
                }
            })
            .abort_handle(),
        )
    };
    let lived = tokio::select! {
        biased;
        () = until(&mut seen, Seen::must_end) => false,
        () = life.live() => true,
    };
    if lived {
        // Logs stay until the object goes; the rest is given back now.
        life.release();
        until(&mut seen, Seen::must_end).await;
    }
    life.end(&mut seen).await;
    drop((publisher, watcher));
    life.release();
    // The last status is written while the object is still there; a server that does not answer is not waited for.
    if !seen.borrow().gone {
        life.board.write().await;
    }
    life.clean().await;
    life.finish(&seen).await;
}

impl Life {
    fn spec_containers(&self) -> (Vec<Container>, Vec<Container>) {
        let spec = self.pod.spec.clone().unwrap_or_default();
        (spec.init_containers.unwrap_or_default(), spec.containers)
    }

    fn fail(&self, reason: &str, message: String) {
        self.context.events.warning(&self.pod, None, reason, message.clone());
        self.board.change(|info| info.failed = Some((reason.into(), message)));
    }

    /// From nothing to the end of all containers.
    async fn live(&self) {
        let unsupported = plan::unsupported(&self.pod);
        if !unsupported.is_empty() {
            let text = format!("not supported by this kubelet and left out: {}", unsupported.join(", "));
            self.context.events.warning(&self.pod, None, "Unsupported", text);
        }
        if let Err(error) = std::fs::create_dir_all(&self.folder) {
            return self.fail("NodeFailure", format!("make {}: {error}", self.folder.display()));
        }
        let network = self.network().await.map(Arc::new);
        let pod_ip = network.as_ref().map_or(self.context.node_ip, |network| network.ip.into());
        self.board.change(|info| info.pod_ip = Some(pod_ip));
        if let Some(network) = network.as_ref().filter(|network| network.attachments.len() > 1) {
            let (board, status) = (self.board.clone(), network.status());
            tokio::spawn(async move { board.annotate(network::STATUS, &status).await });
        }
        let facts =
            Arc::new(Facts { node_name: self.context.node_name.clone(), node_ip: self.context.node_ip, pod_ip });
        let volumes = Arc::new(self.volumes(&facts).await);

        let (init, main) = self.spec_containers();
        let task = |container: Container, init: bool| Task {
            context: self.context.clone(),
            pod: self.pod.clone(),
            container,
            init,
            pod_folder: self.folder.clone(),
            volumes: volumes.clone(),
            network: network.clone(),
            facts: facts.clone(),
            board: self.board.clone(),
            starting: self.starting.clone(),
        };
        for container in init {
            if task(container, true).run().await.exit_code != 0 {
                return; // only with restartPolicy Never: the phase is Failed now
            }
        }
        self.board.change(|info| {
            for container in &mut info.main {
                if matches!(&container.state, crate::status::State::Waiting { reason, .. } if reason == "PodInitializing") {
                    container.wait("ContainerCreating", None);
                }
            }
        });
        let tasks: Vec<Task> = main.into_iter().map(|container| task(container, false)).collect();
        join_all(tasks.iter().map(Task::run)).await;
    }

    /// The pod's network, made if need be; none if it uses the node's.
    async fn network(&self) -> Option<PodNetwork> {
        if self.pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true) {
            return None;
        }
        loop {
            match self.context.networks.attach(&self.pod, &self.folder).await {
                Ok(network) => return Some(network),
                Err(error) => {
                    let text = format!("Failed to create pod sandbox: {error}");
                    self.context.events.warning(&self.pod, None, "FailedCreatePodSandBox", text);
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn volumes(&self, facts: &Facts) -> Volumes {
        let waiting = |reason: &str, message: String| {
            self.board.change(|info| {
                for container in info.init.iter_mut().chain(&mut info.main) {
                    container.wait(reason, Some(message.clone()));
                }
            });
        };
        let mut backoff = crate::backoff::Backoff::default();
        let mut said = String::new();
        loop {
            match volumes::prepare(&self.context, &self.pod, &self.folder, facts).await {
                Ok(volumes) => return volumes,
                Err(Failure::Mount(text)) => {
                    // Once, not every two seconds.
                    if text != said {
                        self.context.events.warning(&self.pod, None, "FailedMount", text.clone());
                        said = text;
                    }
                    tokio::time::sleep(RETRY).await;
                }
                Err(Failure::Image { reference, error }) => {
                    let (reason, message) = (error.waiting_reason(), error.cause());
                    let text = format!("Failed to pull image {reference:?}: {message}");
                    self.context.events.warning(&self.pod, None, "Failed", text);
                    self.context.events.warning(&self.pod, None, "Failed", format!("Error: {reason}"));
                    waiting(reason, error.to_string());
                    let delay = backoff.next(std::time::Instant::now(), 0);
                    let back_off = || {
                        if reason == "ErrImagePull" {
                            let text = format!("Back-off pulling image {reference:?}");
                            self.context.events.normal(&self.pod, None, "BackOff", text.clone());
                            waiting("ImagePullBackOff", format!("{text}: {reason}: {message}"));
                        }
                    };
                    self.context.wait_for_image(&reference, delay, back_off).await;
                }
            }
        }
    }

    /// Ends all containers that run.
    async fn end(&self, seen: &mut watch::Receiver<Seen>) {
        let _no_more_starts = self.starting.lock().await;
        let (init, main) = self.spec_containers();
        let grace = {
            let seen = seen.borrow();
            let asked = seen.pod.metadata.deletion_grace_period_seconds;
            let own = seen.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
            Duration::from_secs(u64::try_from(asked.or(own).unwrap_or(30)).unwrap_or(0))
        };
        // One that is deleted by force meanwhile ends at once.
        let limit = |mut seen: watch::Receiver<Seen>| async move {
            tokio::select! {
                () = tokio::time::sleep(grace) => {}
                () = until(&mut seen, |seen| seen.gone) => {}
            }
        };
        let containers = init.iter().map(|c| (c, true)).chain(main.iter().map(|c| (c, false)));
        join_all(containers.map(|(container, init)| {
            let until = limit(seen.clone());
            async move {
                let folder = self.folder.join("containers").join(&container.name);
                let group = self.context.group(&self.pod, &container.name);
                let exit = match process::recorded(&folder) {
                    Recorded::Running(running) => {
                        let text = format!("Stopping container {}", container.name);
                        self.context.events.normal(&self.pod, Some(&container.name), "Killing", text);
                        process::stop(&folder, &running, &group, Signal::SIGTERM, until).await
                    }
                    Recorded::Ended(exit) => exit,
                    Recorded::Nothing => return,
                };
                self.board.change(|info| {
                    let list = if init { &mut info.init } else { &mut info.main };
                    if let Some(info) = list.iter_mut().find(|info| info.name == container.name)
                        && !matches!(info.state, crate::status::State::Terminated(_))
                    {
                        info.end(&exit);
                    }
                });
            }
        }))
        .await;
    }

    /// Gives back what only a running pod needs. Can be repeated.
    fn release(&self) {
        self.context.networks.detach(&self.folder);
        release_folder(&self.folder);
        let group = self.context.pod_group(&self.pod);
        group.kill();
        group.remove();
    }

    /// Removes the pod's folder.
    async fn clean(&self) {
        remove_folder(&self.folder).await;
    }

    async fn finish(&self, seen: &watch::Receiver<Seen>) {
        if !seen.borrow().gone {
            self.board.delete().await;
        }
    }
}

/// Unmounts and deletes the volumes in a pod's folder.
pub(crate) fn release_folder(folder: &Path) {
    if let Err(error) = volumes::remove(folder) {
        tracing::warn!(%error, folder = %folder.display(), "cannot remove a pod's volumes");
    }
}

/// Removes a pod's folder.
pub(crate) async fn remove_folder(folder: &Path) {
    for _ in 0..50 {
        match std::fs::remove_dir_all(folder) {
            Ok(()) => return,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            // A shim may be writing its last file.
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
    tracing::warn!(folder = %folder.display(), "cannot remove a pod's folder");
}

/// Ends a pod of which only the folder is left: its object went while this kubelet did not look.
pub(crate) async fn remove_orphan(context: &Context, uid: &str) {
    let folder = context.pod_folder(uid);
    tracing::info!(uid, "removing a pod that is no more");
    for container in std::fs::read_dir(folder.join("containers")).into_iter().flatten().flatten() {
        if let Recorded::Running(running) = process::recorded(&container.path()) {
            let name = container.file_name().to_string_lossy().into_owned();
            let group = crate::cgroup::Group::new(context.group_name(uid).join(name));
            let grace = tokio::time::sleep(Duration::from_secs(2));
            process::stop(&container.path(), &running, &group, Signal::SIGTERM, grace).await;
        }
    }
    context.networks.detach(&folder);
    release_folder(&folder);
    let group = crate::cgroup::Group::new(context.group_name(uid));
    group.kill();
    group.remove();
    remove_folder(&folder).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guests run on while their node's kubelet is away, whatever has ended it.
    #[tokio::test]
    async fn a_kubelet_that_ends_says_nothing_of_its_pods() {
        let (kubelet, mut seen) = watch::channel(Seen { pod: Arc::default(), gone: false });
        drop(kubelet);
        assert!(futures::poll!(std::pin::pin!(until(&mut seen, Seen::must_end))).is_pending());
        let (kubelet, mut gone) = watch::channel(Seen { pod: Arc::default(), gone: true });
        drop(kubelet);
        assert!(futures::poll!(std::pin::pin!(until(&mut gone, Seen::must_end))).is_ready());
    }
}
