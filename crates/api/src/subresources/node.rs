//! What the guest's node carries out, or tells: `pause`, `guestosinfo`, `console` and their like.

use k8s_openapi::api::core::v1::Pod;
use serde::Deserialize;
use serde_json::Value;

use super::{CONSOLE, Errand, Found, Refusal, Request, VNC, bad, conflict, dry_run, missing, place};
use crate::names::conditions::{AGENT_CONNECTED, PAUSED};
use crate::{Condition, VirtualMachineInstance, VmiPhase};

const VM_NOT_RUNNING: &str = "VM is not running";
const NOT_RUNNING: &str = "VMI is not running";

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Options {
    dry_run: Vec<String>,
}

pub(super) fn decide(request: &Request<'_>) -> Result<Errand, Refusal> {
    let vmi = request.instance()?;
    allows(&vmi, request)?;
    let stream = matches!(request.action, CONSOLE | VNC);
    let options: Options = if stream { Options::default() } else { request.options()? };
    let pod = |name: &str| -> Option<Pod> {
        request.lookup.get("Pod", request.namespace, name).and_then(|pod| serde_json::from_value(pod).ok())
    };
    let place = place::of_guest(&vmi.read, pod).ok_or_else(|| {
        Refusal::Internal(format!("the guest of VMI {}/{} is on no node", request.namespace, request.name))
    })?;
    let vmi_uid = vmi.read.metadata.uid.clone().unwrap_or_default();
    Ok(Errand { action: request.action.to_owned(), vmi_uid, place, dry_run: dry_run(&options.dry_run)? })
}

fn allows(vmi: &Found<VirtualMachineInstance>, request: &Request<'_>) -> Result<(), Refusal> {
    let phase = &vmi.read.status.phase;
    let runs = *phase == VmiPhase::Running;
    let is = |condition: &str| vmi.read.condition(condition).is_some_and(Condition::is_true);
    let probe = vmi.raw.pointer("/spec/livenessProbe").filter(|probe| !probe.is_null());
    match request.action {
        "pause" if !runs => Err(conflict(VM_NOT_RUNNING)),
        "pause" if probe.is_some_and(|probe| probe.get("guestAgentPing").is_none_or(Value::is_null)) => {
            let text = "Pausing VMIs with a non-GuestAgentPing LivenessProbe is not supported";
            Err(Refusal::Forbidden(text.to_owned()))
        }
        "pause" if is(PAUSED) => Err(conflict("VMI is already paused")),
        "unpause" if !runs => Err(conflict(NOT_RUNNING)),
        "unpause" if !is(PAUSED) => Err(conflict("VMI is not paused")),
        "reset" if !runs => Err(Refusal::Internal(format!("Failed to reset non-running VMI with phase {phase}"))),
        "softreboot" if !runs => Err(conflict(VM_NOT_RUNNING)),
        "softreboot" if is(PAUSED) => Err(conflict("VMI is paused")),
        "softreboot"
            if !is(AGENT_CONNECTED)
                && vmi.raw.pointer("/spec/domain/features/acpi/enabled") == Some(&Value::Bool(false)) =>
        {
            Err(conflict("VMI neither have the agent connected nor the ACPI feature enabled"))
        }
        "guestosinfo" | "userlist" | "filesystemlist" if !runs => Err(conflict(NOT_RUNNING)),
        "guestosinfo" | "userlist" | "filesystemlist" if !is(AGENT_CONNECTED) => {
            Err(conflict("VMI does not have guest agent connected"))
        }
        CONSOLE if vmi.read.spec.domain.devices.autoattach_serial_console == Some(false) => {
            Err(bad("No serial consoles are present."))
        }
        CONSOLE if *phase == VmiPhase::Failed => Err(conflict("VMI is in failed status")),
        CONSOLE if !runs => Err(bad(NOT_RUNNING)),
        VNC if vmi.read.spec.domain.devices.autoattach_graphics_device == Some(false) => {
            Err(bad("No graphics devices are present."))
        }
        VNC if *phase == VmiPhase::Failed => Err(conflict("VMI is in failed status")),
        VNC if !runs => Err(bad(NOT_RUNNING)),
        VNC if !vmi.read.has_screen() => Err(bad(
            "No graphics devices are present: the guest was started by an older version, which gave it none. Restart its VM",
        )),
        "pause" | "unpause" | "reset" | "softreboot" | "guestosinfo" | "userlist" | "filesystemlist" | CONSOLE
        | VNC => Ok(()),
        other => Err(Refusal::Internal(missing(request.resource, other))),
    }
}
