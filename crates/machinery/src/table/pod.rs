//! The row of a pod: readiness, status and restarts out of the states of its containers.

use super::{age, at, condition, items, or_none, text};
use crate::duration;
use crate::meta;
use jiff::Timestamp;
use serde_json::{Value, json};

/// Name, Ready, Status, Restarts, Age; wide: IP, Node, Nominated Node, Readiness Gates.
pub(super) fn cells(pod: &Value, now: Timestamp) -> Vec<Value> {
    let summary = summarize(pod);
    let restarts = match summary.last_restart {
        Some(last) if summary.restarts > 0 => format!("{} ({} ago)", summary.restarts, duration::age(last, now)),
        _ => summary.restarts.to_string(),
    };
    let gates = items(pod, "spec.readinessGates");
    let open = gates
        .iter()
        .filter(|gate| {
            let status = text(gate, "conditionType").and_then(|ty| condition(pod, ty));
            status.and_then(|c| text(c, "status")) == Some("True")
        })
        .count();
    let gates = if gates.is_empty() { json!("<none>") } else { json!(format!("{open}/{}", gates.len())) };
    vec![
        meta::name(pod).into(),
        format!("{}/{}", summary.ready, summary.total).into(),
        summary.status.into(),
        restarts.into(),
        age(pod, now),
        or_none(pod, "status.podIP"),
        or_none(pod, "spec.nodeName"),
        or_none(pod, "status.nominatedNodeName"),
        gates,
    ]
}

struct Summary {
    ready: usize,
    total: usize,
    status: String,
    restarts: i64,
    last_restart: Option<Timestamp>,
}

fn restart_count(container: &Value) -> i64 {
    at(container, "restartCount").and_then(Value::as_i64).unwrap_or_default()
}

fn flag(container: &Value, key: &str) -> bool {
    at(container, key).and_then(Value::as_bool).unwrap_or_default()
}

/// `Error`, or what is known of an end without a reason.
fn ended(terminated: &Value) -> String {
    if let Some(reason) = text(terminated, "reason") {
        return reason.to_owned();
    }
    let number = |key: &str| at(terminated, key).and_then(Value::as_i64).unwrap_or_default();
    match number("signal") {
        0 => format!("ExitCode:{}", number("exitCode")),
        signal => format!("Signal:{signal}"),
    }
}

fn summarize(pod: &Value) -> Summary {
    let phase = text(pod, "status.phase").unwrap_or_default();
    let mut status = text(pod, "status.reason").unwrap_or(phase).to_owned();
    if condition(pod, "PodScheduled").and_then(|c| text(c, "reason")) == Some("SchedulingGated") {
        status = "SchedulingGated".to_owned();
    }
    let mut summary =
        Summary { ready: 0, total: items(pod, "spec.containers").len(), status, restarts: 0, last_restart: None };
    let sidecar = |name: Option<&str>| {
        name.is_some()
            && items(pod, "spec.initContainers")
                .iter()
                .any(|c| text(c, "name") == name && text(c, "restartPolicy") == Some("Always"))
    };
    summary.total +=
        items(pod, "spec.initContainers").iter().filter(|c| text(c, "restartPolicy") == Some("Always")).count();

    let later = |last: &mut Option<Timestamp>, container: &Value| {
        let finished: Option<Timestamp> =
            text(container, "lastState.terminated.finishedAt").and_then(|t| t.parse().ok());
        *last = (*last).max(finished);
    };
    let (mut sidecar_restarts, mut sidecar_last) = (0, None);
    let mut initializing = false;
    for (i, container) in items(pod, "status.initContainerStatuses").iter().enumerate() {
        summary.restarts += restart_count(container);
        later(&mut summary.last_restart, container);
        let beside = sidecar(text(container, "name"));
        if beside {
            sidecar_restarts += restart_count(container);
            later(&mut sidecar_last, container);
        }
        let terminated = at(container, "state.terminated");
        let waiting = text(container, "state.waiting.reason").filter(|r| *r != "PodInitializing");
        if terminated.is_some_and(|t| at(t, "exitCode").and_then(Value::as_i64).unwrap_or_default() == 0) {
            continue;
        }
        if beside && flag(container, "started") {
            summary.ready += usize::from(flag(container, "ready"));
            continue;
        }
        summary.status = match (terminated, waiting) {
            (Some(terminated), _) => format!("Init:{}", ended(terminated)),
            (None, Some(reason)) => format!("Init:{reason}"),
            (None, None) => format!("Init:{i}/{}", items(pod, "spec.initContainers").len()),
        };
        initializing = true;
        break;
    }

    let initialized = condition(pod, "Initialized").and_then(|c| text(c, "status")) == Some("True");
    if !initializing || initialized {
        summary.restarts = sidecar_restarts;
        summary.last_restart = sidecar_last;
        let mut running = false;
        for container in items(pod, "status.containerStatuses").iter().rev() {
            summary.restarts += restart_count(container);
            later(&mut summary.last_restart, container);
            if let Some(reason) = text(container, "state.waiting.reason") {
                summary.status = reason.to_owned();
            } else if let Some(terminated) = at(container, "state.terminated") {
                summary.status = ended(terminated);
            } else if flag(container, "ready") && at(container, "state.running").is_some() {
                running = true;
                summary.ready += 1;
            }
        }
        if summary.status == "Completed" && running {
            let ready = condition(pod, "Ready").and_then(|c| text(c, "status")) == Some("True");
            summary.status = if ready { "Running" } else { "NotReady" }.to_owned();
        }
    }

    if meta::is_deleting(pod) {
        if text(pod, "status.reason") == Some("NodeLost") {
            summary.status = "Unknown".to_owned();
        } else if !matches!(phase, "Succeeded" | "Failed") {
            summary.status = "Terminating".to_owned();
        }
    }
    summary
}
