//! The life of one container: image, start, readiness, end, start again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_images::{PullPolicy, Unpacked};
use k8s_openapi::api::core::v1::{Container, Pod};
use kube::ResourceExt;
use nix::sys::signal::Signal;
use tokio::sync::Mutex;

use crate::Context;
use crate::backoff::Backoff;
use crate::cgroup::Group;
use crate::env::{self, Facts};
use crate::network::PodNetwork;
use crate::plan;
use crate::probes::Check;
use crate::process::{self, Recorded};
use crate::publish::Board;
use crate::spec::{self, ContainerSpec, EXIT, Exit, LOG, Running, TERMINATION_LOG};
use crate::status::ContainerInfo;
use crate::volumes::Volumes;

/// The most of a container's last words that is kept (Kubernetes' limit).
const LAST_WORDS: usize = 4096;
/// Pods of these kinds (label `kubevirt.io`) are ready when this file is in their volume `sockets`.
const MARKS: [(&str, &str); 2] = [("virt-launcher", "launcher.sock"), ("hotplug-disk", "hotplug.sock")];

/// One container of a pod.
pub(crate) struct Task {
    pub(crate) context: Arc<Context>,
    pub(crate) pod: Arc<Pod>,
    pub(crate) container: Container,
    pub(crate) init: bool,
    pub(crate) pod_folder: PathBuf,
    pub(crate) volumes: Arc<Volumes>,
    pub(crate) network: Option<Arc<PodNetwork>>,
    pub(crate) facts: Arc<Facts>,
    pub(crate) board: Board,
    /// Held while a container is being started, so that an end that is asked for meanwhile finds it.
    pub(crate) starting: Arc<Mutex<()>>,
}

impl Task {
    fn folder(&self) -> PathBuf {
        self.pod_folder.join("containers").join(&self.container.name)
    }

    fn group(&self) -> Group {
        self.context.group(&self.pod, &self.container.name)
    }

    fn change(&self, change: impl FnOnce(&mut ContainerInfo)) {
        let name = &self.container.name;
        let init = self.init;
        self.board.change(|pod| {
            let list = if init { &mut pod.init } else { &mut pod.main };
            if let Some(info) = list.iter_mut().find(|info| info.name == *name) {
                change(info);
            }
        });
    }

    fn warn(&self, reason: &str, message: impl Into<String>) {
        self.context.events.warning(&self.pod, Some(&self.container.name), reason, message);
    }

    fn normal(&self, reason: &str, message: impl Into<String>) {
        self.context.events.normal(&self.pod, Some(&self.container.name), reason, message);
    }

    /// Runs it until it is not to be started again; an init container until it succeeds.
    pub(crate) async fn run(&self) -> Exit {
        let policy = self.pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()).unwrap_or("Always");
        let mut backoff = Backoff::default();
        loop {
            let exit = match process::recorded(&self.folder()) {
                Recorded::Ended(exit) => exit,
                Recorded::Running(running) => self.watch(running).await,
                Recorded::Nothing if policy == "Never" && self.has_run_before() => {
                    let exit = process::lost(0, None);
                    let _ = std::fs::create_dir_all(self.folder());
                    let _ = spec::write(&self.folder(), EXIT, &exit);
                    exit
                }
                Recorded::Nothing => self.start(0).await,
            };
            let exit = self.with_last_words(exit);
            self.change(|info| info.end(&exit));
            self.group().remove();
            let again = match policy {
                "Never" => false,
                "OnFailure" => exit.exit_code != 0,
                _ => !self.init || exit.exit_code != 0,
            };
            if !again {
                return exit;
            }
            let delay = backoff.next(Instant::now(), 1);
            if !delay.is_zero() {
                let name = &self.container.name;
                let text = format!(
                    "back-off {}s restarting failed container={name} pod={}",
                    delay.as_secs(),
                    self.pod.name_any()
                );
                self.warn(
                    "BackOff",
                    format!("Back-off restarting failed container {name} in pod {}", self.pod.name_any()),
                );
                self.change(|info| info.wait("CrashLoopBackOff", Some(text)));
                tokio::time::sleep(delay).await;
            }
            // How it ends is on disk; the loop begins with that.
            self.start(exit.attempt.saturating_add(1)).await;
        }
    }

    /// Whether the API says that it has been started, though nothing is known of it here: the node has lost its disk.
    fn has_run_before(&self) -> bool {
        let status = self.pod.status.as_ref();
        let mut lists = status.into_iter().flat_map(|s| [&s.container_statuses, &s.init_container_statuses]).flatten();
        lists.any(|list| {
            list.iter().any(|known| {
                let state = known.state.as_ref();
                known.name == self.container.name
                    && state.is_some_and(|s| s.running.is_some() || s.terminated.is_some())
            })
        })
    }

    /// Starts it and waits for its end.
    async fn start(&self, attempt: u32) -> Exit {
        let spec = self.prepare(attempt).await;
        self.normal("Created", format!("Created container: {}", self.container.name));
        let permit = self.starting.clone().lock_owned().await;
        let godwit = self.context.godwit.clone();
        let folder = spec.folder.clone();
        let id = format!("godwit://{}", spec.id);
        self.change(|info| info.id.clone_from(&id));
        // A task of its own: it is not torn off in the middle when the pod is to end.
        let started = tokio::spawn(async move {
            let started = process::start(&godwit, &spec).await;
            drop(permit);
            started
        });
        let failure = match started.await {
            Ok(Ok(running)) => {
                self.normal("Started", format!("Started container {}", self.container.name));
                return self.watch(running).await;
            }
            Ok(Err(reason)) => reason,
            Err(error) => error.to_string(),
        };
        self.warn("Failed", format!("Error: failed to start container {:?}: {failure}", self.container.name));
        let exit = Exit {
            attempt,
            exit_code: 128,
            signal: None,
            reason: "StartError".into(),
            message: Some(failure),
            started_at: Some(spec::now()),
            finished_at: spec::now(),
        };
        let _ = spec::write(&folder, EXIT, &exit);
        exit
    }

    /// Gathers all that is needed, trying again until it is there.
    async fn prepare(&self, attempt: u32) -> ContainerSpec {
        loop {
            let image = self.image().await;
            match self.plan(attempt, image).await {
                Ok(spec) => return spec,
                Err((reason, message)) => {
                    self.warn("Failed", format!("Error: {message}"));
                    self.change(|info| info.wait(reason, Some(message)));
                    tokio::time::sleep(Duration::from_secs(5)).await;
                }
            }
        }
    }

    async fn plan(&self, attempt: u32, image: Option<Unpacked>) -> Result<ContainerSpec, (&'static str, String)> {
        let config = |message: String| ("CreateContainerConfigError", message);
        let image_env = match &image {
            Some(image) => image.config.env.clone().unwrap_or_default(),
            None => env::of_host(std::env::vars_os()),
        };
        let env = env::resolve(&self.context.client, &self.pod, &self.container, &image_env, &self.facts);
        let env = env.await.map_err(config)?;
        let folder = self.folder();
        let create = |message: String| ("CreateContainerError", message);
        std::fs::create_dir_all(&folder).map_err(|e| create(format!("make {}: {e}", folder.display())))?;
        let cgroups = self.group().create(&plan::limits(&self.container)).map_err(|e| create(e.to_string()))?;
        plan::make(plan::Parts {
            pod: &self.pod,
            container: &self.container,
            attempt,
            pod_folder: &self.pod_folder,
            folder,
            image,
            godwit: &self.context.godwit,
            env,
            volumes: &self.volumes,
            network: self.network.as_deref(),
            cgroups,
        })
        .map_err(config)
    }

    /// The image, unpacked; none for the node's own system.
    async fn image(&self) -> Option<Unpacked> {
        let image = self.container.image.clone().unwrap_or_default();
        if plan::is_host(&image) {
            self.normal("Pulled", format!("Container image {image:?} already present on machine"));
            self.change(|info| info.image_id = format!("{image}@{}", env!("CARGO_PKG_VERSION")));
            return None;
        }
        let policy = PullPolicy::of(self.container.image_pull_policy.as_deref(), &image);
        let mut backoff = Backoff::default();
        loop {
            let images = &self.context.images;
            let asked = policy == PullPolicy::Always && !images.is_local(&image).unwrap_or(false);
            let present = matches!(images.resolve(&image), Ok(Some(_))) && !asked;
            if !present && policy != PullPolicy::Never {
                self.normal("Pulling", format!("Pulling image {image:?}"));
            }
            let begun = Instant::now();
            let error = match self.context.image(&image, policy).await {
                Ok(unpacked) => {
                    self.normal(
                        "Pulled",
                        if present {
                            format!("Container image {image:?} already present on machine")
                        } else {
                            format!("Successfully pulled image {image:?} in {}ms", begun.elapsed().as_millis())
                        },
                    );
                    self.change(|info| info.image_id.clone_from(&unpacked.digest));
                    return Some(unpacked);
                }
                Err(error) => error,
            };
            let reason = error.waiting_reason();
            self.warn("Failed", format!("Failed to pull image {image:?}: {}", error.cause()));
            self.warn("Failed", format!("Error: {reason}"));
            self.change(|info| info.wait(reason, Some(error.to_string())));
            let delay = backoff.next(Instant::now(), 0);
            let back_off = || {
                if reason == "ErrImagePull" {
                    self.normal("BackOff", format!("Back-off pulling image {image:?}"));
                    let text = format!("Back-off pulling image {image:?}: {reason}: {}", error.cause());
                    self.change(|info| info.wait("ImagePullBackOff", Some(text)));
                }
            };
            self.context.wait_for_image(&image, delay, back_off).await;
        }
    }

    /// Follows a running container to its end.
    async fn watch(&self, running: Running) -> Exit {
        self.change(|info| {
            info.run(&running);
            if info.id.is_empty() {
                info.id = format!("godwit://{}/{}/{}", self.pod.uid().unwrap_or_default(), info.name, running.attempt);
            }
        });
        let folder = self.folder();
        let end = process::exit_of(&folder, &running);
        tokio::select! {
            exit = end => return exit,
            // Comes back only when a probe says that the container is dead.
            () = self.probe() => {}
        }
        let grace = self.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
        let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
        process::stop(&folder, &running, &self.group(), Signal::SIGTERM, tokio::time::sleep(grace)).await
    }

    /// Finds out whether it is ready and alive, for as long as it runs.
    async fn probe(&self) {
        let check = |probe: &Option<k8s_openapi::api::core::v1::Probe>, what: &str| {
            let probe = probe.as_ref()?;
            match Check::new(probe, &self.container, self.facts.pod_ip) {
                Ok(check) => Some(check),
                Err(text) => {
                    self.warn(
                        "Unsupported",
                        format!("{what} is not carried out: {text} are not supported by this kubelet"),
                    );
                    None
                }
            }
        };
        if self.init {
            return std::future::pending().await;
        }
        let kind = self.pod.labels().get("kubevirt.io").map(String::as_str);
        if let Some((_, mark)) = MARKS.iter().find(|(app, _)| kind == Some(app)) {
            self.mark(mark).await;
        }
        if let Some(check) = check(&self.container.startup_probe, "startupProbe")
            && !repeat(&check, true).await
        {
            self.dead("Startup");
            return;
        }
        let liveness = check(&self.container.liveness_probe, "livenessProbe");
        let readiness = check(&self.container.readiness_probe, "readinessProbe");
        let alive = async {
            match &liveness {
                Some(check) => {
                    repeat(check, false).await;
                    self.dead("Liveness");
                }
                None => std::future::pending().await,
            }
        };
        let ready = async {
            match &readiness {
                Some(check) => self.readiness(check).await,
                None => self.change(|info| info.ready = true),
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = alive => {}
            () = ready => {}
        }
    }

    async fn readiness(&self, check: &Check) {
        tokio::time::sleep(check.initial_delay).await;
        let (mut good, mut bad) = (0, 0);
        loop {
            match check.once().await {
                Ok(()) => (good, bad) = (good + 1, 0),
                Err(error) => {
                    (good, bad) = (0, bad + 1);
                    self.warn("Unhealthy", format!("Readiness probe failed: {error}"));
                }
            }
            if good >= check.success_threshold {
                self.change(|info| info.ready = true);
            } else if bad >= check.failure_threshold {
                self.change(|info| info.ready = false);
            }
            tokio::time::sleep(check.period).await;
        }
    }

    fn dead(&self, what: &str) {
        let name = &self.container.name;
        self.normal("Killing", format!("Container {name} failed {} probe, will be restarted", what.to_lowercase()));
    }

    /// Waits for its socket: soon in most cases, so first it looks often.
    async fn mark(&self, socket: &str) {
        let mark = self.pod_folder.join("volumes/kubernetes.io~empty-dir/sockets").join(socket);
        let mut pause = Duration::from_millis(2);
        while !mark.exists() {
            tokio::time::sleep(pause).await;
            pause = (pause + pause / 8).min(Duration::from_millis(200));
        }
    }

    /// Adds what the container has left in its termination log, or the end of its output.
    fn with_last_words(&self, mut exit: Exit) -> Exit {
        if exit.message.is_some() {
            return exit;
        }
        let end_of = |path: PathBuf| -> Option<String> {
            let text = std::fs::read(path).ok()?;
            let text = text.get(text.len().saturating_sub(LAST_WORDS)..)?;
            Some(String::from_utf8_lossy(text).trim_end().to_owned()).filter(|text| !text.is_empty())
        };
        exit.message = end_of(self.folder().join(TERMINATION_LOG));
        let fall_back = self.container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError");
        if exit.message.is_none() && fall_back && exit.exit_code != 0 {
            let log = end_of(self.folder().join(LOG)).unwrap_or_default();
            let lines: Vec<&str> = log.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect();
            exit.message = Some(lines.join("\n")).filter(|text| !text.is_empty());
        }
        exit
    }
}

/// Checks until it fails too often in a row (then `false`), or with `once` until it succeeds (then `true`).
async fn repeat(check: &Check, once: bool) -> bool {
    tokio::time::sleep(check.initial_delay).await;
    let mut bad = 0;
    loop {
        match check.once().await {
            Ok(()) if once => return true,
            Ok(()) => bad = 0,
            Err(_) => bad += 1,
        }
        if bad >= check.failure_threshold {
            return false;
        }
        tokio::time::sleep(check.period).await;
    }
}
