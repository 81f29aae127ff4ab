//! A VMI and a pod of the API, reduced to what decisions need.

use std::time::Duration;

use godwit_api::vmi::{MigrationMode as ApiMode, VirtualMachineInstance, VolumePhase};
use godwit_api::{config, names};
use godwit_launcher::rpc::MigrationMode;
use k8s_openapi::api::core::v1::Pod;

use crate::facts::{MigrationView, VmiView};

/// KubeVirt's default for `spec.terminationGracePeriodSeconds`.
const DEFAULT_GRACE_SECONDS: u64 = 30;

/// Reduces a VMI.
#[must_use]
pub fn vmi(vmi: &VirtualMachineInstance) -> VmiView {
    let status = &vmi.status;
    let grace = vmi.spec.termination_grace_period_seconds;
    VmiView {
        phase: status.phase.as_str().to_owned(),
        deleting: vmi.is_deleting(),
        grace_seconds: grace.map_or(DEFAULT_GRACE_SECONDS, |s| u64::try_from(s).unwrap_or(0)),
        node_name: status.node_name.clone().filter(|n| !n.is_empty()),
        blocks_target: vmi.annotation(names::ANNOTATION_TEST_BLOCK_TARGET_PREPARATION).is_some(),
        fails_migration: vmi.annotation(names::ANNOTATION_TEST_FORCE_MIGRATION_FAILURE).is_some(),
        link_broken: vmi
            .condition(names::conditions::SYNCHRONIZED)
            .is_some_and(|c| c.reason.as_deref() == Some(names::conditions::POST_COPY_LINK_BROKEN)),
        hotpluggable: vmi.spec.volumes.iter().filter(|v| v.is_hotpluggable()).map(|v| v.name.clone()).collect(),
        attached: attached(vmi),
        migration: migration(vmi),
    }
}

fn attached(vmi: &VirtualMachineInstance) -> Vec<String> {
    let in_spec = |name: &str| vmi.spec.volumes.iter().any(|v| v.name == name && v.is_hotpluggable());
    let there = |phase: &VolumePhase| {
        matches!(phase, VolumePhase::AttachedToNode | VolumePhase::MountedToPod | VolumePhase::Ready)
    };
    let statuses = vmi.status.volume_status.iter();
    let attached = statuses.filter(|one| {
        let pod = one.hotplug_volume.as_ref().and_then(|held| held.attach_pod_uid.as_deref());
        in_spec(&one.name) && pod.is_some_and(|uid| !uid.is_empty()) && one.phase.as_ref().is_some_and(there)
    });
    attached.map(|one| one.name.clone()).collect()
}

fn migration(vmi: &VirtualMachineInstance) -> Option<MigrationView> {
    let state = vmi.status.migration_state.as_ref()?;
    let uid = state.migration_uid.clone().filter(|u| !u.is_empty())?;
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let config = state.migration_configuration.clone().unwrap_or_default();
    // 0 is no limit.
    let progress_limit = config.progress_timeout.and_then(|s| u64::try_from(s).ok()).filter(|s| *s > 0);
    let completion_limit = config::completion_timeout_seconds(&config, config::bytes_to_copy(vmi));
    // Within a node nothing is won by it, and each end's pod would be the other's peer.
    let local = state.source_node.is_some() && state.source_node == state.target_node;
    let allow_post_copy = config.allow_post_copy.unwrap_or(false) && !local;
    Some(MigrationView {
        uid,
        source_node: text(&state.source_node),
        target_node: text(&state.target_node),
        source_pod: text(&state.source_pod),
        target_pod: text(&state.target_pod),
        target_address: state.target_node_address.clone().filter(|a| !a.is_empty()),
        over_own_network: state.migration_network_type.as_deref() == Some(names::MIGRATION_NETWORK_OWN),
        ports: state.target_direct_migration_node_ports.clone(),
        detected: state.target_node_domain_detected.unwrap_or(false),
        target_ready: state.target_node_domain_ready_timestamp.is_some(),
        start: state.start_timestamp.as_ref().map(|t| t.0),
        mode: state.mode.as_ref().and_then(mode),
        completed: state.completed.unwrap_or(false),
        failed: state.failed.unwrap_or(false),
        cause: state.failure_cause.clone(),
        abort_requested: state.abort_requested.unwrap_or(false),
        abort_status: state.abort_status.as_ref().map(|s| s.as_str().to_owned()).filter(|s| !s.is_empty()),
        bandwidth: config.bandwidth_per_migration.as_ref().and_then(|q| q.bytes().ok()).unwrap_or(0),
        disable_tls: config.disable_tls.unwrap_or(false),
        max_downtime_ms: config.max_downtime_ms,
        completion_limit: completion_limit.map(Duration::from_secs),
        progress_limit: progress_limit.map(Duration::from_secs),
        allow_auto_converge: config.allow_auto_converge.unwrap_or(false),
        allow_post_copy,
        fail_when_not_converging: config.fail_when_not_converging.unwrap_or(false),
        has_forecast: state.forecast.is_some(),
        allow_workload_disruption: config.allow_workload_disruption.unwrap_or(allow_post_copy),
    })
}

fn mode(mode: &ApiMode) -> Option<MigrationMode> {
    match mode {
        ApiMode::PreCopy => Some(MigrationMode::PreCopy),
        ApiMode::PostCopy => Some(MigrationMode::PostCopy),
        ApiMode::Paused => Some(MigrationMode::Paused),
        ApiMode::Other(_) => None,
    }
}

/// A launcher pod, reduced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LauncherPod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// The VMI that it was made for.
    pub vmi_uid: String,
    /// That VMI's name.
    pub vmi_name: String,
    /// The migration that it was made for.
    pub migration_uid: Option<String>,
    /// Addresses of the pod, the first one first.
    pub addresses: Vec<String>,
    /// Phase Succeeded or Failed.
    pub terminal: bool,
    /// The guest's memory is to be such that a target on this node can map it.
    pub shareable_memory: bool,
}

/// Reduces a pod; `None` when it is no launcher's.
#[must_use]
pub fn pod(pod: &Pod) -> Option<LauncherPod> {
    use names as n;
    let meta = &pod.metadata;
    let labels = meta.labels.as_ref()?;
    let label = |key: &str| labels.get(key).filter(|v| !v.is_empty()).cloned();
    let annotation = |key: &str| meta.annotations.as_ref()?.get(key).cloned();
    if label(n::LABEL_APP)? != n::APP_VIRT_LAUNCHER {
        return None;
    }
    let status = pod.status.as_ref();
    let mut addresses: Vec<String> =
        status.and_then(|s| s.pod_ips.as_ref()).into_iter().flatten().map(|ip| ip.ip.clone()).collect();
    if addresses.is_empty() {
        addresses.extend(status.and_then(|s| s.pod_ip.clone()));
    }
    Some(LauncherPod {
        namespace: meta.namespace.clone()?,
        name: meta.name.clone()?,
        uid: meta.uid.clone()?,
        vmi_uid: label(n::LABEL_CREATED_BY)?,
        vmi_name: annotation(n::ANNOTATION_DOMAIN).or_else(|| label(n::LABEL_DEPRECATED_VM_NAME))?,
        migration_uid: label(n::LABEL_MIGRATION_JOB_UID),
        addresses,
        terminal: status.and_then(|s| s.phase.as_deref()).is_some_and(is_terminal),
        shareable_memory: annotation(n::ANNOTATION_GUEST_MEMORY).as_deref() == Some(n::GUEST_MEMORY_SHAREABLE),
    })
}

/// Whether all processes of a pod in this phase have ended.
#[must_use]
pub fn is_terminal(phase: &str) -> bool {
    matches!(phase, "Succeeded" | "Failed")
}
