//! The receiving half of a migration.

use std::time::Duration;

use godwit_launcher::rpc::{DomainPhase, MigrationRole};

use super::{Action, Change, Plan};
use crate::facts::{Facts, Launcher, MigrationView, PodView, is_alive, migration};

/// How long after the guest resumed here the source's handler may take to report the end; then this end does it.
const SOURCE_REPORTS_WITHIN: Duration = Duration::from_secs(30);

pub(super) fn decide(facts: &Facts, m: &MigrationView, pod: &PodView, plan: &mut Plan) {
    let open = facts.target.as_ref().filter(|t| t.uid == m.uid);
    if facts.target.is_some() && open.is_none() {
        plan.act(Action::CloseTarget);
    }
    let Launcher::Answers(state) = &pod.launcher else { return };
    let received = migration(state, &m.uid, MigrationRole::Target);

    if received.is_some_and(|f| f.gone) && is_alive(state) {
        let resume_us = received.and_then(|f| f.resume_us);
        // The control channel stays open until the source's handler has written the end: it may ask again.
        if open.is_none() {
            plan.act(Action::OpenControl { pod: pod.name.clone(), uid: m.uid.clone() });
        }
        let at = resume_us.unwrap_or_else(|| facts.now.as_microsecond());
        if !m.target_ready || facts.vmi.node_name.as_deref() != Some(&facts.node) {
            plan.write(vec![Change::Arrived { resume_us: at }, Change::Report { pod: pod.name.clone() }]);
        } else if let Some(open) = open.filter(|t| !is_published(m, t)) {
            let _ = open;
            plan.write(vec![Change::Published]);
        } else {
            let waited = Duration::from_micros(facts.now.as_microsecond().saturating_sub(at).max(0) as u64);
            if waited >= SOURCE_REPORTS_WITHIN {
                // The source's node is gone; that the guest runs here is the proof of success.
                plan.write(vec![Change::Completed { downtime_us: None }]);
                plan.event("Migrated", format!("The VirtualMachineInstance migrated to node {}.", facts.node));
            } else {
                plan.wake(SOURCE_REPORTS_WITHIN - waited);
            }
        }
        return;
    }

    if facts.vmi.is_final() || facts.vmi.deleting && received.is_none() {
        if state.phase == DomainPhase::Incoming {
            plan.act(Action::Abandon { pod: pod.name.clone(), uid: m.uid.clone() });
        }
        return;
    }
    match (state.phase, received, open) {
        (DomainPhase::Undefined, _, _) => {
            plan.act(Action::Wire { pod: pod.name.clone() });
            plan.act(Action::PrepareTarget { pod: pod.name.clone(), uid: m.uid.clone() });
        }
        // QEMU waits and nobody has connected yet: the order is repeated without harm and opens the channels.
        (DomainPhase::Incoming, Some(f), None) if f.status == "none" || f.status == "setup" => {
            plan.act(Action::PrepareTarget { pod: pod.name.clone(), uid: m.uid.clone() });
        }
        (DomainPhase::Incoming, Some(_), None) => {
            plan.act(Action::OpenControl { pod: pod.name.clone(), uid: m.uid.clone() });
        }
        (DomainPhase::Incoming, _, Some(open)) if !is_published(m, open) => {
            plan.write(vec![Change::Published]);
            if !m.detected {
                plan.event("PreparingTarget", "VirtualMachineInstance Migration Target Prepared.");
            }
            let ports = open.ports.keys().cloned().collect::<Vec<_>>().join(",");
            plan.event(
                "PreparingTarget",
                format!("Migration Target is listening at {}, on ports: {ports}", open.address),
            );
        }
        _ => {}
    }
}

fn is_published(m: &MigrationView, open: &crate::facts::TargetView) -> bool {
    m.detected && m.target_address.as_deref() == Some(open.address.as_str()) && m.ports == open.ports
}
