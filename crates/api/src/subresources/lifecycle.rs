//! `start`, `stop`, `restart` and `migrate` of VMs.
//!
//! What a run strategy leaves to nobody's wish is changed in the spec; else the wish is put into `status.stateChangeRequests`,
//! and the VM's controller meets it.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Deed, Found, INSTANCES, MACHINES, Refusal, Request, Write, bad, conflict, dry_run};
use crate::names::{ANNOTATION_REQUESTED_BY, MIGRATE_VM_GENERATE_NAME};
use crate::{RunStrategy, VirtualMachine, VirtualMachineInstance, VmiPhase};

/// Where migrations are made.
const MIGRATIONS: &str = "virtualmachineinstancemigrations";
const NOT_RUNNING: &str = "VM is not running";
/// The grace of a forced restart, in seconds: the shortest with which a guest is told at all.
const FORCED_GRACE: i64 = 1;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct StartOptions {
    paused: bool,
    dry_run: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct StopOptions {
    /// Seconds that the guest has to end.
    grace_period: Option<i64>,
    dry_run: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct RestartOptions {
    /// Seconds; 0 forces, anything else is refused.
    grace_period_seconds: Option<i64>,
    dry_run: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct MigrateOptions {
    dry_run: Vec<String>,
    added_node_selector: BTreeMap<String, String>,
}

pub(super) fn start(request: &Request<'_>) -> Result<Deed, Refusal> {
    let vm = request.machine()?;
    let vmi = request.maybe_instance()?;
    let phase = vmi.as_ref().map(|vmi| &vmi.read.status.phase);
    let over = matches!(phase, Some(VmiPhase::Succeeded | VmiPhase::Failed));
    if phase.is_some_and(|phase| !matches!(phase, VmiPhase::Unset | VmiPhase::Unknown)) && !over {
        return Err(conflict("VM is already running"));
    }
    let options: StartOptions = request.options()?;
    let data = if options.paused { json!({ "paused": "true" }) } else { Value::Null };
    let start = || change("Start", None, &data);
    let strategy = vm.read.spec.effective_run_strategy();
    let write = match strategy {
        // The controller turns the strategy into Always when it meets the wish.
        RunStrategy::Halted if options.paused => ask(&vm, vec![start()])?,
        RunStrategy::Halted => run(&vm, true),
        RunStrategy::RerunOnFailure if phase == Some(&VmiPhase::Failed) => {
            return Err(conflict(format!("{strategy} does not support starting VM from failed state")));
        }
        RunStrategy::RerunOnFailure | RunStrategy::Manual => match vmi.as_ref().filter(|_| over) {
            Some(vmi) => ask(&vm, vec![change("Stop", Some(vmi), &Value::Null), start()])?,
            None => ask(&vm, vec![start()])?,
        },
        _ => return Err(conflict(format!("{strategy} does not support manual start requests"))),
    };
    Ok(Deed { code: 202, writes: vec![write], dry_run: dry_run(&options.dry_run)? })
}

pub(super) fn stop(request: &Request<'_>) -> Result<Deed, Refusal> {
    let options: StopOptions = request.options()?;
    let vm = request.machine()?;
    let vmi = request.maybe_instance()?.filter(|vmi| !vmi.read.is_final());
    if options.grace_period.is_some_and(|seconds| seconds < 0) {
        return Err(bad("gracePeriod has to be greater or equal to 0"));
    }
    let strategy = vm.read.spec.effective_run_strategy();
    let mut writes = Vec::new();
    match (&strategy, &vmi) {
        (RunStrategy::Halted | RunStrategy::RerunOnFailure | RunStrategy::Manual, None) => {
            return Err(conflict(NOT_RUNNING));
        }
        (RunStrategy::Halted, Some(vmi)) => {
            let before = vmi.read.spec.termination_grace_period_seconds;
            let shorter = |seconds| before.is_none_or(|before| seconds < before);
            if !options.grace_period.is_some_and(shorter) {
                return Err(conflict(format!(
                    "{strategy} only supports manual stop requests with a shorter graceperiod"
                )));
            }
            writes.push(ask(&vm, vec![change("Stop", Some(vmi), &Value::Null)])?);
        }
        (RunStrategy::RerunOnFailure | RunStrategy::Manual, Some(vmi)) => {
            writes.push(ask(&vm, vec![change("Stop", Some(vmi), &Value::Null)])?);
        }
        _ => writes.push(run(&vm, false)),
    }
    if let (Some(vmi), Some(seconds)) = (&vmi, options.grace_period) {
        writes.push(grace(vmi, seconds));
    }
    Ok(Deed { code: 202, writes, dry_run: dry_run(&options.dry_run)? })
}

pub(super) fn restart(request: &Request<'_>) -> Result<Deed, Refusal> {
    let options: RestartOptions = request.options()?;
    match options.grace_period_seconds {
        Some(seconds) if seconds > 0 => {
            return Err(bad("For force restart, only gracePeriod=0 is supported for now"));
        }
        Some(seconds) if seconds < 0 => return Err(bad("gracePeriod has to be greater or equal to 0")),
        _ => {}
    }
    let vm = request.machine()?;
    let strategy = vm.read.spec.effective_run_strategy();
    if matches!(strategy, RunStrategy::Halted | RunStrategy::Once) {
        return Err(conflict(format!("RunStategy {strategy} does not support manual restart requests")));
    }
    let vmi = request.maybe_instance()?.ok_or_else(|| conflict(format!("{NOT_RUNNING}: {}", RunStrategy::Halted)))?;
    let changes = vec![change("Stop", Some(&vmi), &Value::Null), change("Start", None, &Value::Null)];
    let mut writes = vec![ask(&vm, changes)?];
    if options.grace_period_seconds.is_some() {
        writes.push(grace(&vmi, FORCED_GRACE));
    }
    Ok(Deed { code: 202, writes, dry_run: dry_run(&options.dry_run)? })
}

pub(super) fn migrate(request: &Request<'_>) -> Result<Deed, Refusal> {
    let options: MigrateOptions = request.options()?;
    request.machine()?;
    let vmi = request.instance()?;
    if vmi.read.status.phase != VmiPhase::Running {
        return Err(conflict(NOT_RUNNING));
    }
    let mut migration = json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstanceMigration",
        "metadata": {
            "generateName": MIGRATE_VM_GENERATE_NAME,
            "annotations": {ANNOTATION_REQUESTED_BY: request.user},
        },
        "spec": {"vmiName": request.name},
    });
    if !options.added_node_selector.is_empty() {
        migration["spec"]["addedNodeSelector"] = json!(options.added_node_selector);
    }
    let write = Write::Create { resource: MIGRATIONS, object: migration };
    Ok(Deed { code: 202, writes: vec![write], dry_run: dry_run(&options.dry_run)? })
}

/// One entry of `status.stateChangeRequests`.
fn change(action: &str, vmi: Option<&Found<VirtualMachineInstance>>, data: &Value) -> Value {
    let mut change = json!({ "action": action });
    if let Some(uid) = vmi.and_then(|vmi| vmi.read.metadata.uid.as_deref()) {
        change["uid"] = json!(uid);
    }
    if !data.is_null() {
        change["data"] = data.clone();
    }
    change
}

/// Leaves wishes to the VM's controller. A stop takes the place of whatever is wished for; anything else waits for its end.
fn ask(vm: &Found<VirtualMachine>, changes: Vec<Value>) -> Result<Write, Refusal> {
    let stops = matches!(changes.as_slice(), [only] if only["action"] == "Stop");
    if !vm.read.status.state_change_requests.is_empty() && !stops {
        return Err(Refusal::Internal("unable to complete request: stop/start already underway".to_owned()));
    }
    Ok(vm.patch(MACHINES, true, json!({ "status": {"stateChangeRequests": changes, "startFailure": null} })))
}

/// Says in the spec whether the VM runs, in the field in which it was said.
fn run(vm: &Found<VirtualMachine>, running: bool) -> Write {
    let strategy = if running { RunStrategy::Always } else { RunStrategy::Halted };
    let spec = match &vm.read.spec.run_strategy {
        Some(said) if *said != RunStrategy::Unset => json!({ "runStrategy": strategy }),
        _ => json!({ "running": running }),
    };
    vm.patch(MACHINES, false, json!({ "spec": spec }))
}

/// Gives a guest another time to end, also when that has begun: its node's handler orders the end anew for a shorter one.
fn grace(vmi: &Found<VirtualMachineInstance>, seconds: i64) -> Write {
    vmi.follow_up(INSTANCES, json!({ "spec": {"terminationGracePeriodSeconds": seconds} }))
}
