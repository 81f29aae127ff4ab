//! VirtualMachine on its way in.

use serde_json::{Value, json};

use super::{Cause, Denial, Operation, Request, Verdict, object_at, read, set_default, spec};
use crate::unimplemented::{Effect, VM_FIELDS, uses};
use crate::vm::RunStrategy;
use crate::{VirtualMachine, vmi::VirtualMachineInstanceSpec};

const WEBHOOK: &str = "virtualmachine-validator.kubevirt.io";
const RUNNING_DEPRECATED: &str = "spec.running is deprecated, please use spec.runStrategy instead.";

/// Machine type and architecture are fixed when the VM is made, so that later defaults do not change it.
pub(super) fn mutate(request: &Request<'_>, object: &mut Value) {
    if request.operation == Operation::Delete {
        return;
    }
    let Some(spec) = object.pointer_mut("/spec/template/spec") else { return };
    set_default(spec, "architecture", json!("amd64"));
    let machine = object_at(spec, "domain").and_then(|domain| object_at(domain, "machine"));
    if let Some(machine) = machine {
        set_default(machine, "type", json!(super::vmi::DEFAULT_MACHINE));
    }
}

pub(super) fn validate(request: &Request<'_>) -> Verdict {
    let Some(object) = request.object else { return Ok(Vec::new()) };
    // what was taken once may keep its spec: labels, finalizers and the like change without looking at it again
    let before = request.old_object.and_then(|old| old.get("spec"));
    if request.operation == Operation::Update && before.is_some() && before == object.get("spec") {
        return Ok(Vec::new());
    }
    let vm: VirtualMachine = read(WEBHOOK, object)?;
    let mut causes = Vec::new();
    let mut warnings = Vec::new();
    let Some(template) = &vm.spec.template else {
        let cause = Cause::required("spec.template", "missing virtual machine template.");
        return Err(Box::new(Denial::causes(WEBHOOK, vec![cause])));
    };
    if vm.spec.running.is_some() {
        warnings.push(RUNNING_DEPRECATED.to_owned());
    }
    spec::object_name(vm.metadata.name.as_deref(), &mut causes);
    run_strategy(&vm, &mut causes);
    for found in uses(object.get("spec").unwrap_or(&Value::Null), "spec", VM_FIELDS) {
        match found.effect {
            Effect::Harmless => warnings.push(found.message()),
            Effect::GuestDiffers => causes.push(Cause::unsupported(&found.path, found.message())),
        }
    }
    let raw = object.pointer("/spec/template/spec").unwrap_or(&Value::Null);
    let at = "spec.template.spec";
    // the defaults of a VMI are made when the VMI is made; here they only help to see what is wrong
    let mut completed = raw.clone();
    super::vmi::complete_spec(&mut completed, request.namespace, request.name, None);
    let completed: VirtualMachineInstanceSpec = read(WEBHOOK, &completed)?;
    spec::unimplemented(raw, at, &mut causes, &mut warnings);
    spec::check(&completed, at, &mut causes);
    super::vmi::reserved_labels(template.metadata.labels.as_ref(), "spec.template.metadata.labels", &mut causes);
    if causes.is_empty() { Ok(warnings) } else { Err(Box::new(Denial { warnings, ..Denial::causes(WEBHOOK, causes) })) }
}

fn run_strategy(vm: &VirtualMachine, causes: &mut Vec<Cause>) {
    let strategy = vm.spec.run_strategy.as_ref().filter(|strategy| **strategy != RunStrategy::Unset);
    match (vm.spec.running, strategy) {
        (Some(_), Some(_)) => {
            let text = "Running and RunStrategy are mutually exclusive. Note that Running is deprecated, please use \
                        RunStrategy instead";
            causes.push(Cause::invalid("spec.running", text));
        }
        (None, None) => causes.push(Cause::required("spec.running", "RunStrategy must be specified")),
        _ => {}
    }
    match strategy {
        Some(strategy) if !strategy.is_known() => {
            causes.push(Cause::unsupported("spec.runStrategy", format!("Invalid RunStrategy ({strategy})")));
        }
        Some(RunStrategy::WaitAsReceiver) => {
            let text = "RunStrategy WaitAsReceiver (migration from another cluster) is not implemented by godwit";
            causes.push(Cause::unsupported("spec.runStrategy", text));
        }
        _ => {}
    }
}
