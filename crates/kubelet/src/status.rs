//! A pod's status, from what is known of its containers.

use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus,
    HostIP, Pod, PodCondition, PodIP, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::spec::{Exit, Running};

/// What a container does at the moment.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum State {
    Waiting { reason: String, message: Option<String> },
    Running { since: String },
    Terminated(ContainerStateTerminated),
}

/// What is known of a container.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ContainerInfo {
    pub(crate) name: String,
    pub(crate) image: String,
    pub(crate) image_id: String,
    pub(crate) id: String,
    pub(crate) state: State,
    pub(crate) last: Option<ContainerStateTerminated>,
    pub(crate) restarts: i32,
    pub(crate) ready: bool,
}

impl ContainerInfo {
    pub(crate) fn new(container: &Container, waiting: &str) -> Self {
        Self {
            name: container.name.clone(),
            image: container.image.clone().unwrap_or_default(),
            image_id: String::new(),
            id: String::new(),
            state: State::Waiting { reason: waiting.into(), message: None },
            last: None,
            restarts: 0,
            ready: false,
        }
    }

    pub(crate) fn run(&mut self, running: &Running) {
        self.restarts = i32::try_from(running.attempt).unwrap_or(i32::MAX);
        self.state = State::Running { since: running.started_at.clone() };
        self.ready = false;
    }

    pub(crate) fn wait(&mut self, reason: &str, message: Option<String>) {
        if let State::Terminated(terminated) = &self.state {
            self.last = Some(terminated.clone());
        }
        self.state = State::Waiting { reason: reason.into(), message };
        self.ready = false;
    }

    pub(crate) fn end(&mut self, exit: &Exit) {
        self.state = State::Terminated(ContainerStateTerminated {
            container_id: Some(self.id.clone()).filter(|id| !id.is_empty()),
            exit_code: exit.exit_code,
            finished_at: time(&exit.finished_at),
            message: exit.message.clone(),
            reason: Some(exit.reason.clone()),
            signal: exit.signal,
            started_at: exit.started_at.as_deref().and_then(time),
        });
        self.restarts = i32::try_from(exit.attempt).unwrap_or(i32::MAX);
        self.ready = false;
    }

    /// How it ended, if it did: now, or before it is started anew.
    fn ended(&self) -> Option<&ContainerStateTerminated> {
        match &self.state {
            State::Terminated(terminated) => Some(terminated),
            State::Waiting { reason, .. } if reason == "CrashLoopBackOff" => self.last.as_ref(),
            _ => None,
        }
    }

    fn status(&self, init: bool) -> ContainerStatus {
        let state = match &self.state {
            State::Waiting { reason, message } => ContainerState {
                waiting: Some(ContainerStateWaiting { reason: Some(reason.clone()), message: message.clone() }),
                ..ContainerState::default()
            },
            State::Running { since } => ContainerState {
                running: Some(ContainerStateRunning { started_at: time(since) }),
                ..ContainerState::default()
            },
            State::Terminated(terminated) => {
                ContainerState { terminated: Some(terminated.clone()), ..ContainerState::default() }
            }
        };
        let succeeded = state.terminated.as_ref().is_some_and(|terminated| terminated.exit_code == 0);
        ContainerStatus {
            name: self.name.clone(),
            image: self.image.clone(),
            image_id: self.image_id.clone(),
            container_id: Some(self.id.clone()).filter(|id| !id.is_empty()),
            ready: if init { succeeded } else { self.ready },
            started: Some(matches!(self.state, State::Running { .. })),
            restart_count: self.restarts,
            last_state: self
                .last
                .clone()
                .map(|terminated| ContainerState { terminated: Some(terminated), ..ContainerState::default() }),
            state: Some(state),
            ..ContainerStatus::default()
        }
    }
}

fn time(text: &str) -> Option<Time> {
    text.parse::<Timestamp>().ok().map(Time)
}

/// What is known of a pod.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PodInfo {
    pub(crate) host_ip: IpAddr,
    pub(crate) pod_ip: Option<IpAddr>,
    pub(crate) started: Timestamp,
    /// `Always`, `OnFailure`, `Never`.
    pub(crate) restart_policy: String,
    pub(crate) init: Vec<ContainerInfo>,
    pub(crate) main: Vec<ContainerInfo>,
    /// Set when the pod as a whole has failed: reason and message.
    pub(crate) failed: Option<(String, String)>,
    /// What keeps the pod from being ready though its containers are, in Kubernetes' words: its readiness gates.
    pub(crate) shut_gates: Vec<String>,
}

impl PodInfo {
    pub(crate) fn new(pod: &Pod, host_ip: IpAddr) -> Self {
        let spec = pod.spec.clone().unwrap_or_default();
        let init: Vec<ContainerInfo> =
            spec.init_containers.iter().flatten().map(|c| ContainerInfo::new(c, "PodInitializing")).collect();
        let waiting = if init.is_empty() { "ContainerCreating" } else { "PodInitializing" };
        let started = pod.status.as_ref().and_then(|status| status.start_time.as_ref()).map(|time| time.0);
        Self {
            host_ip,
            pod_ip: None,
            started: started.unwrap_or_else(Timestamp::now),
            restart_policy: spec.restart_policy.unwrap_or_else(|| "Always".into()),
            init,
            main: spec.containers.iter().map(|c| ContainerInfo::new(c, waiting)).collect(),
            failed: None,
            shut_gates: shut_gates(pod),
        }
    }

    /// Takes in what others have written into the pod.
    pub(crate) fn see(&mut self, pod: &Pod) {
        self.shut_gates = shut_gates(pod);
    }

    /// The phase, by the rules of Kubernetes' kubelet.
    pub(crate) fn phase(&self) -> &'static str {
        if self.failed.is_some() {
            return "Failed";
        }
        let always = self.restart_policy == "Always";
        let never = self.restart_policy == "Never";
        for init in &self.init {
            match init.ended() {
                Some(ended) if ended.exit_code == 0 => {}
                Some(_) if never => return "Failed",
                _ => return "Pending",
            }
        }
        let mut ended = 0;
        let mut failed = 0;
        let mut running = false;
        for container in &self.main {
            match (&container.state, container.ended()) {
                (State::Running { .. }, _) => running = true,
                (_, Some(terminated)) => {
                    ended += 1;
                    failed += usize::from(terminated.exit_code != 0);
                }
                _ => return "Pending",
            }
        }
        match (running || ended == 0 || always, failed) {
            (true, _) => "Running",
            (false, 0) => "Succeeded",
            (false, _) if never => "Failed",
            (false, _) => "Running",
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        matches!(self.phase(), "Succeeded" | "Failed")
    }

    /// The kubelet's own conditions. Those of others (readiness gates, DisruptionTarget) are not its to write.
    fn conditions(&self, phase: &str, before: &[PodCondition]) -> Vec<PodCondition> {
        let initialized = self.init.iter().all(|init| init.ended().is_some_and(|ended| ended.exit_code == 0));
        let unready: Vec<&str> = self.main.iter().filter(|c| !c.ready).map(|c| c.name.as_str()).collect();
        let ready = unready.is_empty();
        let (reason, message) = match phase {
            "Succeeded" => (Some("PodCompleted"), None),
            "Failed" => (Some("PodFailed"), None),
            _ if ready => (None, None),
            _ => (Some("ContainersNotReady"), Some(format!("containers with unready status: [{}]", unready.join(" ")))),
        };
        let gated = ready && !self.shut_gates.is_empty();
        let why_not = if gated {
            (Some("ReadinessGatesNotReady"), Some(self.shut_gates.join(", ")))
        } else {
            (reason, message.clone())
        };
        let not_initialized = (Some("ContainersNotInitialized"), None);
        let all = [
            ("PodReadyToStartContainers", self.pod_ip.is_some() && !self.is_over(), (None, None)),
            ("Initialized", initialized, if initialized { (None, None) } else { not_initialized }),
            ("Ready", ready && !gated, why_not),
            ("ContainersReady", ready, (reason, message)),
            ("PodScheduled", true, (None, None)),
        ];
        all.into_iter()
            .map(|(kind, status, (reason, message))| {
                let status = if status { "True" } else { "False" };
                // The time is that of the change, not of the last look.
                let same = before.iter().find(|known| known.type_ == kind && known.status == status);
                PodCondition {
                    type_: kind.into(),
                    status: status.into(),
                    reason: reason.map(str::to_owned),
                    message,
                    last_transition_time: same
                        .and_then(|known| known.last_transition_time.clone())
                        .or_else(|| Some(Time(Timestamp::now()))),
                    ..PodCondition::default()
                }
            })
            .collect()
    }

    /// The status to be written; `before` is the one that was written last.
    pub(crate) fn status(&self, before: Option<&PodStatus>) -> PodStatus {
        let phase = self.phase();
        let conditions = before.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
        let ip = self.pod_ip.map(|ip| ip.to_string());
        PodStatus {
            phase: Some(phase.into()),
            conditions: Some(self.conditions(phase, conditions)),
            host_ip: Some(self.host_ip.to_string()),
            host_ips: Some(vec![HostIP { ip: self.host_ip.to_string() }]),
            pod_ips: ip.clone().map(|ip| vec![PodIP { ip }]),
            pod_ip: ip,
            start_time: Some(Time(self.started)),
            reason: self.failed.as_ref().map(|(reason, _)| reason.clone()),
            message: self.failed.as_ref().map(|(_, message)| message.clone()),
            init_container_statuses: (!self.init.is_empty())
                .then(|| self.init.iter().map(|container| container.status(true)).collect()),
            container_statuses: Some(self.main.iter().map(|container| container.status(false)).collect()),
            qos_class: before.and_then(|status| status.qos_class.clone()),
            ..PodStatus::default()
        }
    }
}

/// The readiness gates of a pod whose conditions are missing or not `True`, as Kubernetes' kubelet says it.
fn shut_gates(pod: &Pod) -> Vec<String> {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let gates = pod.spec.iter().flat_map(|spec| spec.readiness_gates.iter().flatten());
    let shut = gates.filter_map(|gate| {
        let kind = &gate.condition_type;
        match conditions.iter().find(|condition| condition.type_ == *kind) {
            None => Some(format!("corresponding condition of pod readiness gate {kind:?} does not exist.")),
            Some(condition) if condition.status == "True" => None,
            Some(other) => {
                Some(format!("the status of pod readiness gate {kind:?} is not \"True\", but {}", other.status))
            }
        }
    });
    shut.collect()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{PodReadinessGate, PodSpec};

    use super::*;

    fn info(policy: &str, init: usize, main: usize) -> PodInfo {
        let containers =
            |count| (0..count).map(|n| Container { name: format!("c{n}"), ..Container::default() }).collect();
        let spec = PodSpec {
            restart_policy: Some(policy.into()),
            init_containers: Some(containers(init)),
            containers: containers(main),
            ..PodSpec::default()
        };
        PodInfo::new(&Pod { spec: Some(spec), ..Pod::default() }, "10.88.0.11".parse().unwrap())
    }

    fn exit(code: i32) -> Exit {
        Exit {
            attempt: 0,
            exit_code: code,
            signal: None,
            reason: "x".into(),
            message: None,
            started_at: None,
            finished_at: crate::spec::now(),
        }
    }

    fn running() -> Running {
        let process = crate::spec::Process { pid: 1, start: 1 };
        Running { attempt: 0, shim: process, main: process, started_at: crate::spec::now() }
    }

    #[test]
    fn phases_follow_kubernetes() {
        let mut pod = info("Never", 0, 2);
        assert_eq!(pod.phase(), "Pending");
        pod.main[0].run(&running());
        assert_eq!(pod.phase(), "Pending", "one is not started yet");
        pod.main[1].run(&running());
        assert_eq!(pod.phase(), "Running");
        pod.main[0].end(&exit(0));
        assert_eq!(pod.phase(), "Running");
        pod.main[1].end(&exit(0));
        assert_eq!(pod.phase(), "Succeeded");
        pod.main[1].end(&exit(1));
        assert_eq!(pod.phase(), "Failed");
        pod.restart_policy = "OnFailure".into();
        assert_eq!(pod.phase(), "Running", "it will be started again");
        pod.restart_policy = "Always".into();
        pod.main[1].wait("CrashLoopBackOff", None);
        assert_eq!(pod.phase(), "Running");
        assert_eq!(pod.main[1].last.as_ref().map(|last| last.exit_code), Some(1));
    }

    #[test]
    fn init_containers_hold_a_pod_back() {
        let mut pod = info("Never", 1, 1);
        pod.init[0].run(&running());
        assert_eq!(pod.phase(), "Pending");
        pod.init[0].end(&exit(0));
        assert_eq!(pod.phase(), "Pending");
        pod.main[0].run(&running());
        assert_eq!(pod.phase(), "Running");
        pod.init[0].end(&exit(1));
        assert_eq!(pod.phase(), "Failed");
    }

    #[test]
    fn conditions_keep_their_times_until_they_change() {
        let mut pod = info("Never", 0, 1);
        let mut first = pod.status(None);
        let old = Time("2020-01-01T00:00:00Z".parse().unwrap());
        first.conditions.iter_mut().flatten().for_each(|c| c.last_transition_time = Some(old.clone()));
        pod.main[0].run(&running());
        pod.main[0].ready = true;
        let conditions = pod.status(Some(&first)).conditions.unwrap();
        let of = |kind: &str| conditions.iter().find(|c| c.type_ == kind).unwrap();
        assert_eq!(of("Initialized").last_transition_time.as_ref(), Some(&old));
        assert_ne!(of("Ready").last_transition_time.as_ref(), Some(&old));
        assert_eq!(of("Ready").status, "True");
    }

    #[test]
    fn a_pod_is_ready_when_its_gates_are_open() {
        let condition = |kind: &str, status: &str| PodCondition {
            type_: kind.into(),
            status: status.into(),
            ..PodCondition::default()
        };
        let mut pod = Pod {
            spec: Some(PodSpec {
                containers: vec![Container { name: "c".into(), ..Container::default() }],
                readiness_gates: Some(vec![PodReadinessGate { condition_type: "gate".into() }]),
                ..PodSpec::default()
            }),
            ..Pod::default()
        };
        let mut info = PodInfo::new(&pod, "10.88.0.11".parse().unwrap());
        info.main[0].run(&running());
        info.main[0].ready = true;
        let of = |info: &PodInfo, kind: &str| {
            let conditions = info.status(None).conditions.unwrap();
            assert!(conditions.iter().all(|one| one.type_ != "gate"), "the gate's condition is not the kubelet's");
            let found = conditions.into_iter().find(|one| one.type_ == kind).unwrap();
            (found.status, found.reason, found.message)
        };
        let shut = |message: &str| {
            let reason = Some("ReadinessGatesNotReady".to_owned());
            ("False".to_owned(), reason, Some(message.to_owned()))
        };
        let open = ("True".to_owned(), None, None);
        let missing = shut("corresponding condition of pod readiness gate \"gate\" does not exist.");
        assert_eq!(of(&info, "Ready"), missing);
        assert_eq!(of(&info, "ContainersReady"), open);

        pod.status.get_or_insert_default().conditions = Some(vec![condition("gate", "False")]);
        info.see(&pod);
        assert_eq!(of(&info, "Ready"), shut("the status of pod readiness gate \"gate\" is not \"True\", but False"));

        pod.status.get_or_insert_default().conditions = Some(vec![condition("gate", "True")]);
        info.see(&pod);
        assert_eq!(of(&info, "Ready"), open);

        info.main[0].ready = false;
        assert_eq!(of(&info, "Ready").1.as_deref(), Some("ContainersNotReady"));
    }
}
