//! NodeMaintenance on its way in: the reference's rules (`reference/maintenance-hypershift.md`, 1.6).

use jiff::Timestamp;
use serde_json::Value;

use super::{Denial, Operation, Request, Verdict, read};
use crate::maintenance::{GROUPS, medik8s::NodeMaintenance};

const WEBHOOK: &str = "vnodemaintenance.kb.io";

pub(super) fn validate(request: &Request<'_>) -> Verdict {
    let Some(object) = request.object else { return Ok(Vec::new()) };
    let maintenance: NodeMaintenance = read(WEBHOOK, object)?;
    let refuse = |message: String| Err(Box::new(Denial::forbidden(WEBHOOK, message)));
    let node = &maintenance.spec.node_name;
    let dry = |value: &Value| value.pointer("/spec/dryRun").and_then(Value::as_bool).unwrap_or(false);
    let node_of =
        |value: &Value| value.pointer("/spec/nodeName").and_then(Value::as_str).unwrap_or_default().to_owned();
    let old = request.old_object.filter(|_| request.operation == Operation::Update);
    match old {
        Some(old) if node_of(old) != *node => return refuse("updating spec.NodeName isn't allowed".to_owned()),
        Some(old) if dry(object) && !dry(old) => {
            return refuse("a maintenance that has begun cannot become a dry run, delete it instead".to_owned());
        }
        Some(_) => {}
        None if request.lookup.get("Node", "", node).is_none() => {
            return refuse(format!("invalid nodeName, no node with name {node} found"));
        }
        None => {}
    }
    if !dry(object) && old.is_none_or(dry) {
        let own = |other: &Value| other.pointer("/metadata/uid") == object.pointer("/metadata/uid");
        let there = GROUPS.iter().any(|(group, _)| {
            let all = request.lookup.list(&format!("NodeMaintenance.{group}"), "", None);
            all.iter().any(|other| node_of(other) == *node && !dry(other) && !own(other))
        });
        if there {
            return refuse(format!("invalid nodeName, a NodeMaintenance for node {node} already exists"));
        }
    }
    if let Err(wrong) = maintenance.spec.deadline_of(Timestamp::UNIX_EPOCH) {
        return refuse(format!("invalid deadline, {wrong}"));
    }
    Ok(Vec::new())
}
