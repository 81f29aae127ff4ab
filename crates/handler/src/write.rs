//! Changes of a VMI as one merge patch, containing only what differs and only what is the handler's to write.

use std::collections::BTreeMap;

use godwit_api::names::{self, conditions as c, events};
use godwit_api::vmi::{
    PersistentVolumeClaimInfo, VirtualMachineInstance, VmiNetworkInterface, VolumePhase, VolumeStatus,
};
use godwit_api::{Condition, condition};
use godwit_launcher::rpc::{DomainPhase, MigrationMode, State};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::{Map, Value, json};

use crate::decide::Change;
use crate::dirty_rate;
use crate::expect;
use crate::facts::TargetView;
use crate::networks;
use crate::progress;
use crate::view;

/// What a patch is made from, beside the VMI.
pub struct Sources<'a> {
    /// This node.
    pub node: &'a str,
    /// The time.
    pub now: Timestamp,
    /// The last words of the launchers, by pod.
    pub launchers: &'a BTreeMap<String, State>,
    /// The pods' addresses.
    pub addresses: &'a BTreeMap<String, Vec<String>>,
    /// The listening half.
    pub target: Option<&'a TargetView>,
    /// What the link to a migration's target was seen to carry, in bytes a second.
    pub link_rate: Option<u64>,
    /// LiveMigratable and StorageLiveMigratable as they should be, and the migration method.
    pub migratable: &'a Migratable,
}

/// What follows from spec and claims about moving the VM.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Migratable {
    /// The claims of the VMI's volumes, by claim name.
    pub claims: BTreeMap<String, PersistentVolumeClaimInfo>,
    /// Conditions LiveMigratable and StorageLiveMigratable.
    pub conditions: Vec<Condition>,
    /// `status.migrationMethod`.
    pub method: Option<String>,
}

/// The patch, or `None` when nothing would change. It carries the revision that it was made from.
#[must_use]
pub fn patch(vmi: &VirtualMachineInstance, changes: &[Change], from: &Sources<'_>) -> Option<Value> {
    let mut status = Map::new();
    let mut migration = Map::new();
    let mut labels = Map::new();
    let now = Time(from.now);
    for change in changes {
        match change {
            Change::Phase(phase) => {
                if vmi.status.phase.as_str() != *phase {
                    status.insert("phase".into(), json!(phase));
                    let mut stamps = serde_json::to_value(&vmi.status.phase_transition_timestamps)
                        .ok()
                        .and_then(|v| if let Value::Array(a) = v { Some(a) } else { None })
                        .unwrap_or_default();
                    if !stamps.iter().any(|s| s.get("phase").and_then(Value::as_str) == Some(phase)) {
                        stamps.push(json!({ "phase": phase, "phaseTransitionTimestamp": seconds(from.now) }));
                        status.insert("phaseTransitionTimestamps".into(), Value::Array(stamps));
                    }
                }
            }
            Change::Report { pod } => {
                if let Some(state) = from.launchers.get(pod) {
                    report(vmi, state, from.addresses.get(pod), from.migratable, &now, &mut status);
                }
            }
            Change::Unsynchronized(why) => {
                let mut conditions = vmi.status.conditions.clone();
                let condition =
                    Condition::new(c::SYNCHRONIZED, false).because("Synchronizing with the Domain failed.", why);
                if condition::set(&mut conditions, condition, &now) {
                    status.insert("conditions".into(), json!(conditions));
                }
            }
            Change::LinkBroken { node } => {
                let why = format!(
                    "The link to node {node} broke while the guest's memory followed it (post-copy). The guest stands still \
                     when it needs what is missing, and goes on when the link is back."
                );
                let mut conditions = vmi.status.conditions.clone();
                let condition = Condition::new(c::SYNCHRONIZED, false).because(c::POST_COPY_LINK_BROKEN, why);
                if condition::set(&mut conditions, condition, &now) {
                    status.insert("conditions".into(), json!(conditions));
                }
            }
            Change::Arrived { resume_us } => {
                let at = time_of(*resume_us, from.now);
                labels.insert(names::LABEL_NODE_NAME.into(), json!(from.node));
                status.insert("nodeName".into(), json!(from.node));
                // Its data came along.
                if !vmi.status.migrated_volumes.is_empty() {
                    status.insert("migratedVolumes".into(), Value::Null);
                }
                // One that has only changed its launcher is still to leave.
                if vmi.status.evacuation_node_name.as_deref().is_some_and(|node| node != from.node) {
                    status.insert("evacuationNodeName".into(), Value::Null);
                }
                migration.insert("targetNodeDomainDetected".into(), json!(true));
                migration.insert("targetNodeDomainReadyTimestamp".into(), at.clone());
                merge(&mut migration, "targetState", json!({ "domainDetected": true, "domainReadyTimestamp": at }));
            }
            Change::Published => {
                let Some(target) = from.target else { continue };
                let mut ports = Map::new();
                // A merge patch adds to a map: what was published before has to be taken out.
                for old in vmi.status.migration_state.iter().flat_map(|m| m.target_direct_migration_node_ports.keys()) {
                    ports.insert(old.clone(), Value::Null);
                }
                for (port, inner) in &target.ports {
                    ports.insert(port.clone(), json!(inner));
                }
                // From now on copies may come; another try must not take them for somebody's data.
                if vmi.status.migrated_volumes.iter().any(|moved| moved.receiving != Some(true)) {
                    let mut moved = vmi.status.migrated_volumes.clone();
                    moved.iter_mut().for_each(|moved| moved.receiving = Some(true));
                    status.insert("migratedVolumes".into(), json!(moved));
                }
                migration.insert("targetNodeAddress".into(), json!(target.address));
                migration.insert("targetDirectMigrationNodePorts".into(), Value::Object(ports.clone()));
                migration.insert("migrationNetworkType".into(), json!(network_type(target.over_own_network)));
                migration.insert("targetNodeDomainDetected".into(), json!(true));
                merge(
                    &mut migration,
                    "targetState",
                    json!({
                        "nodeAddress": target.address,
                        "directMigrationNodePorts": ports,
                        "domainDetected": true,
                    }),
                );
            }
            Change::Network { own } => {
                migration.insert("migrationNetworkType".into(), json!(network_type(*own)));
            }
            Change::Started(start_us) => {
                migration.insert("startTimestamp".into(), time_of(*start_us, from.now));
                migration.insert("mode".into(), json!("PreCopy"));
            }
            Change::Forecast(made) => {
                migration.insert("forecast".into(), expect::shown(made));
            }
            Change::Mode(mode) => {
                migration.insert("mode".into(), json!(mode_word(*mode)));
            }
            Change::GivingUp(cause) => {
                migration.insert("failureCause".into(), json!(cause));
            }
            Change::Progress { pod } => {
                if let Some(state) = from.launchers.get(pod)
                    && let Some(facts) = &state.migration
                {
                    let before = vmi.status.migration_state.as_ref().and_then(|m| m.progress.clone());
                    let m = view::vmi(vmi).migration.unwrap_or_default();
                    let rest = expect::rest(state, facts, &m, from.link_rate);
                    let report = progress::report(facts, rest, &before.unwrap_or_default(), from.now);
                    merge(&mut migration, "progress", report);
                }
            }
            Change::Abort(abort) => {
                migration.insert("abortStatus".into(), json!(abort));
            }
            Change::Completed { downtime_us } => {
                migration.insert("completed".into(), json!(true));
                migration.insert("endTimestamp".into(), seconds(from.now));
                // It was to be given up, and was quicker.
                if vmi.status.migration_state.as_ref().is_some_and(|m| m.failure_cause.is_some()) {
                    migration.insert("failureCause".into(), Value::Null);
                }
                merge(&mut migration, "progress", progress::end());
                // All of it is there; the source's last numbers may be from before, or never have come.
                merge(&mut migration, "progress", json!({ "percent": 100, "bytesRemaining": 0 }));
                if let Some(us) = downtime_us {
                    let ms = u64::try_from(us.saturating_add(500) / 1000).unwrap_or(0);
                    merge(&mut migration, "progress", json!({ "downtimeMilliseconds": ms }));
                }
            }
            Change::Failed(failure) => {
                migration.insert("completed".into(), json!(true));
                migration.insert("failed".into(), json!(true));
                migration.insert("failureReason".into(), json!(failure.reason));
                migration.insert("failureCause".into(), json!(failure.cause));
                migration.insert("endTimestamp".into(), seconds(from.now));
                // Nothing is expected any more.
                if vmi.status.migration_state.as_ref().is_some_and(|m| m.progress.is_some()) {
                    merge(&mut migration, "progress", progress::end());
                }
            }
        }
    }
    if !migration.is_empty() {
        status.insert("migrationState".into(), Value::Object(migration));
    }
    if status.is_empty() && labels.is_empty() {
        return None;
    }
    let mut metadata = json!({ "resourceVersion": vmi.metadata.resource_version });
    if let (false, Some(metadata)) = (labels.is_empty(), metadata.as_object_mut()) {
        metadata.insert("labels".into(), Value::Object(labels));
    }
    let mut patch = json!({ "metadata": metadata });
    if let (false, Some(patch)) = (status.is_empty(), patch.as_object_mut()) {
        patch.insert("status".into(), Value::Object(status));
    }
    Some(patch)
}

/// Puts members into an object that is a member of `map`.
fn merge(map: &mut Map<String, Value>, key: &str, more: Value) {
    let entry = map.entry(key).or_insert_with(|| json!({}));
    if let (Some(entry), Value::Object(more)) = (entry.as_object_mut(), more) {
        entry.extend(more);
    }
}

/// Kubernetes' times have whole seconds.
fn seconds(at: Timestamp) -> Value {
    let whole = Timestamp::from_second(at.as_second()).unwrap_or(at);
    json!(whole.to_string())
}

fn time_of(us: i64, fallback: Timestamp) -> Value {
    seconds(Timestamp::from_microsecond(us).unwrap_or(fallback))
}

/// The word for a migration over the network for migrations, or over the nodes' own.
fn network_type(own: bool) -> &'static str {
    if own { names::MIGRATION_NETWORK_OWN } else { names::MIGRATION_NETWORK_POD }
}

fn mode_word(mode: MigrationMode) -> &'static str {
    match mode {
        MigrationMode::PreCopy => "PreCopy",
        MigrationMode::PostCopy => "PostCopy",
        MigrationMode::Paused => "Paused",
    }
}

/// What the launcher says about the guest, where the VMI says something else.
fn report(
    vmi: &VirtualMachineInstance,
    state: &State,
    addresses: Option<&Vec<String>>,
    migratable: &Migratable,
    now: &Time,
    status: &mut Map<String, Value>,
) {
    let old = &vmi.status;
    let mut conditions = old.conditions.clone();
    let mut changed = false;
    let broken = state.tpm_failure.as_deref();
    for condition in &migratable.conditions {
        // Only its launcher knows, and only QEMU's failure would say so otherwise.
        let broken = broken.filter(|_| condition.type_ == c::LIVE_MIGRATABLE && condition.is_true());
        let condition = match broken {
            Some(why) => &Condition::new(c::LIVE_MIGRATABLE, false).because(c::live_migratable::TPM, why),
            None => condition,
        };
        changed |= condition::set(&mut conditions, condition.clone(), now);
    }
    changed |= condition::remove(&mut conditions, c::SYNCHRONIZED);
    changed |= match state.guest_agent.connected {
        true => condition::set(&mut conditions, Condition::new(c::AGENT_CONNECTED, true), now),
        false => condition::remove(&mut conditions, c::AGENT_CONNECTED),
    };
    let held = state.migration.as_ref().filter(|m| m.paused_by_migration);
    // A guest that stands still for its migration is no paused one to its launcher; post-copy's switch is too short to tell.
    let stands_still = state.phase == DomainPhase::Paused || held.is_some_and(|m| m.mode == MigrationMode::Paused);
    changed |= match stands_still {
        true => {
            let (reason, message) = match state.qemu_status.as_deref() {
                Some("io-error") => c::paused::IO_ERROR,
                _ if held.is_some() => c::paused::BY_MIGRATION_MONITOR,
                _ => c::paused::BY_USER,
            };
            condition::set(&mut conditions, Condition::new(c::PAUSED, true).because(reason, message), now)
        }
        false => condition::remove(&mut conditions, c::PAUSED),
    };
    if changed {
        set(status, "conditions", json!(conditions));
    }

    let interfaces = interfaces(vmi, state, addresses);
    if interfaces != old.interfaces {
        set(status, "interfaces", json!(interfaces));
    }
    let volumes = volumes(vmi, state, &migratable.claims);
    if volumes != old.volume_status {
        set(status, "volumeStatus", json!(volumes));
    }
    if let Some(method) = &migratable.method
        && old.migration_method.as_ref().map(|m| m.as_str()) != Some(method.as_str())
    {
        set(status, "migrationMethod", json!(method));
    }
    if old.migration_transport.as_deref() != Some(names::MIGRATION_TRANSPORT_UNIX) {
        set(status, "migrationTransport", json!(names::MIGRATION_TRANSPORT_UNIX));
    }
    let accelerator = state.accelerator.map(|a| a.as_str().to_owned());
    if accelerator.is_some() && accelerator != old.accelerator {
        set(status, "accelerator", json!(accelerator));
    }
    if state.qemu_version.is_some() && state.qemu_version != old.qemu_version {
        set(status, "qemuVersion", json!(state.qemu_version));
    }
    if let Some(told) = dirty_rate::news(vmi, &state.memory) {
        set(status, "dirtyRate", json!(told));
    }
    // Targets build the same; a guest whose launcher knows of none has none.
    if state.machine_revision.is_some() && state.machine_revision != old.machine_revision {
        set(status, "machineRevision", json!(state.machine_revision));
    }
    if state.guest_cpu.is_some() && state.guest_cpu != old.guest_cpu {
        set(status, "guestCpu", json!(state.guest_cpu));
    }
    let machine = old.machine.as_ref().map(|m| json!(m)).and_then(|m| m.get("type").cloned());
    if let Some(real) = &state.machine_type
        && machine.as_ref().and_then(Value::as_str) != Some(real)
    {
        set(status, "machine", json!({ "type": real }));
    }
    if old.current_cpu_topology.is_none() {
        let cpu = vmi.spec.domain.cpu.clone().unwrap_or_default();
        let at_least_one = |n: Option<u32>| n.filter(|n| *n > 0).unwrap_or(1);
        set(
            status,
            "currentCPUTopology",
            json!({
                "cores": at_least_one(cpu.cores),
                "sockets": at_least_one(cpu.sockets),
                "threads": at_least_one(cpu.threads),
            }),
        );
    }
    if let Some(os) = &state.guest_agent.os {
        let os = json!({
            "name": os.name, "kernelRelease": os.kernel_release, "version": os.version, "prettyName": os.pretty_name,
            "versionId": os.version_id, "kernelVersion": os.kernel_version, "machine": os.machine, "id": os.id,
        });
        if old.guest_os_info.as_ref().map(|o| json!(o)).as_ref() != Some(&os) {
            set(status, "guestOSInfo", os);
        }
    }
}

fn set(status: &mut Map<String, Value>, key: &str, value: Value) {
    status.insert(key.to_owned(), value);
}

/// The volumes in the order of the spec, as the launcher has them as disks; what is not known now stays as it was. Of disks that
/// come and go the controller says how far they have come, up to the guest.
fn volumes(
    vmi: &VirtualMachineInstance,
    state: &State,
    claims: &BTreeMap<String, PersistentVolumeClaimInfo>,
) -> Vec<VolumeStatus> {
    let known = |name: &str| vmi.status.volume_status.iter().find(|old| old.name == name);
    let disk = |name: &str| state.volumes.iter().find(|disk| disk.name == name);
    let one = |volume: &godwit_api::vmi::Volume| {
        let old = known(&volume.name);
        let disk = disk(&volume.name);
        // The controller has not seen it yet.
        if volume.is_hotpluggable() && old.is_none() {
            return None;
        }
        let claim = volume.persistent_volume_claim.as_ref().and_then(|source| claims.get(&source.claim_name));
        let mut status = VolumeStatus {
            name: volume.name.clone(),
            target: disk.map(|d| d.target.clone()).or_else(|| old.map(|o| o.target.clone())).unwrap_or_default(),
            persistent_volume_claim_info: claim
                .cloned()
                .or_else(|| old.and_then(|o| o.persistent_volume_claim_info.clone())),
            size: disk
                .and_then(|d| d.size_bytes)
                .and_then(|bytes| i64::try_from(bytes).ok())
                .or_else(|| old.and_then(|o| o.size)),
            ..old.cloned().unwrap_or_default()
        };
        if volume.is_hotpluggable() && disk.is_some() && status.is_being_changed() {
            status.phase = Some(VolumePhase::Ready);
            status.reason = Some(events::reason::VOLUME_READY.to_owned());
            status.message = Some(events::volume_ready(&volume.name));
        }
        Some(status)
    };
    let goes = |old: &&VolumeStatus| {
        old.hotplug_volume.is_some() && !vmi.spec.volumes.iter().any(|volume| volume.name == old.name)
    };
    let gone = |old: &VolumeStatus| {
        let mut status = old.clone();
        if disk(&old.name).is_none() {
            status.phase = Some(VolumePhase::UnMountedFromPod);
            status.reason = Some(events::reason::VOLUME_UNMOUNTED.to_owned());
            status.message = Some(events::volume_unmounted(&old.name));
        }
        status
    };
    // The controller's own: no disk of the guest.
    let kept = vmi.status.volume_status.iter().filter(|status| status.name == names::PERSISTENT_STATE_VOLUME);
    let stay = vmi.spec.volumes.iter().filter_map(one).chain(kept.cloned());
    stay.chain(vmi.status.volume_status.iter().filter(goes).map(gone)).collect()
}

/// The interfaces in the order of the spec. Behind masquerade the pod's addresses are the guest's; bridged to the pod network they
/// are those that it was given, unless its agent says otherwise; on a segment only the guest knows, so what its agent said
/// last stays until it says something else.
fn interfaces(vmi: &VirtualMachineInstance, state: &State, pod: Option<&Vec<String>>) -> Vec<VmiNetworkInterface> {
    let Ok(plans) = networks::plan(vmi) else { return vmi.status.interfaces.clone() };
    plans
        .into_iter()
        .map(|plan| {
            let mac = plan.mac.to_string();
            let old = vmi.status.interfaces.iter().find(|i| i.name.as_deref() == Some(&plan.name));
            let agent = state.guest_agent.interfaces.iter().find(|i| {
                state.guest_agent.connected && i.mac.as_deref().is_some_and(|m| m.eq_ignore_ascii_case(&mac))
            });
            let said = agent.map(|a| a.addresses.clone()).filter(|a| !a.is_empty());
            let kept = || old.map(|o| o.ip_addresses.clone()).unwrap_or_default();
            let of_pod = || pod.cloned().filter(|a| !a.is_empty());
            let addresses = match plan.binding {
                networks::Binding::Masquerade { .. } => of_pod().unwrap_or_else(kept),
                networks::Binding::Bridge if plan.has_pod_address() => said.or_else(of_pod).unwrap_or_else(kept),
                networks::Binding::Bridge => said.unwrap_or_else(kept),
            };
            let interface_name = agent.map(|a| a.name.clone()).or_else(|| old.and_then(|o| o.interface_name.clone()));
            VmiNetworkInterface {
                ip_address: preferred(&addresses),
                ip_addresses: addresses,
                mac: Some(mac),
                name: Some(plan.name),
                info_source: Some(if interface_name.is_some() { "domain, guest-agent" } else { "domain" }.into()),
                interface_name,
                pod_interface_name: Some(plan.pod_interface),
                queue_count: Some(1),
                link_state: Some("up".into()),
            }
        })
        .collect()
}

/// The address to show in one column: IPv4 first, link-local last.
fn preferred(addresses: &[String]) -> Option<String> {
    let rank = |a: &&String| match a.parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V4(v4)) if !v4.is_link_local() => 0,
        Ok(std::net::IpAddr::V6(v6)) if !v6.is_unicast_link_local() => 1,
        _ => 2,
    };
    addresses.iter().min_by_key(rank).cloned()
}

#[cfg(test)]
#[path = "write_tests.rs"]
mod tests;
