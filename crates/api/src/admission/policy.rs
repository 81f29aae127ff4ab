//! MigrationPolicy on its way in.

use serde_json::Value;

use super::{Cause, Denial, Operation, Request, Verdict, configured, read};
use crate::MigrationPolicy;
use crate::config::{MAX_DOWNTIME_NEEDS_A_GATE, sift};
use crate::gates::{MIGRATION_DOWNTIME_TUNING, MIGRATION_STALL_DETECTION};

const WEBHOOK: &str = "migration-policy-validator.kubevirt.io";

pub(super) fn validate(request: &Request<'_>) -> Verdict {
    let Some(object) = request.object else { return Ok(Vec::new()) };
    let policy: MigrationPolicy = read(WEBHOOK, object)?;
    let gates = configured(request).gates;
    let old = request.old_object.filter(|_| request.operation == Operation::Update).unwrap_or(&Value::Null);
    let mut causes = Vec::new();
    let mut warnings = Vec::new();
    for fault in sift(policy.spec.overrides()).1 {
        causes.push(Cause::invalid(format!("spec.{}", fault.field), fault.why));
    }
    let new_here =
        |path: &str| object.pointer(path).is_some_and(|new| !new.is_null() && Some(new) != old.pointer(path));
    if new_here("/spec/maxDowntimeMs") && !gates.max_downtime() {
        causes.push(Cause::invalid("spec.maxDowntimeMs", MAX_DOWNTIME_NEEDS_A_GATE));
    }
    for (part, gate) in [("downtimeTuning", MIGRATION_DOWNTIME_TUNING), ("stallDetector", MIGRATION_STALL_DETECTION)] {
        let at = format!("experimental.{part}");
        if new_here(&format!("/spec/experimental/{part}")) && !gates.is_open(gate) {
            let text = format!("{at} cannot be modified without enabling the {gate} feature gate");
            causes.push(Cause::invalid(format!("spec.{at}"), text));
        }
    }
    if object.pointer("/spec/experimental").is_some_and(|value| !value.is_null()) {
        warnings.push("spec.experimental: not implemented by godwit, ignored".to_owned());
    }
    if policy.spec.selectors.is_none() {
        warnings.push("spec.selectors is missing: the policy is for no VMI".to_owned());
    }
    if causes.is_empty() { Ok(warnings) } else { Err(Box::new(Denial { warnings, ..Denial::causes(WEBHOOK, causes) })) }
}
