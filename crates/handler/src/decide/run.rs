//! A guest that belongs to this node: start it, say how it is, end it.

use std::time::Duration;

use godwit_api::names::events::reason;
use godwit_launcher::fence;
use godwit_launcher::rpc::{DomainPhase, MigrationRole, RebootFacts, State};

use super::{Action, Change, Plan, end};
use crate::facts::{Facts, Launcher, MigrationView, PodView, VmiView, migration};

/// For how long it is news that a reboot was given up.
const NEWS: Duration = Duration::from_secs(60);

/// The migration to here is over and went well; the API may not say so in full yet, if this handler restarted in between.
pub(super) fn arrived(facts: &Facts, m: &MigrationView, plan: &mut Plan) {
    if facts.vmi.node_name.as_deref() == Some(&facts.node) && m.target_ready {
        return;
    }
    let Some(state) = facts.pods.get(&m.target_pod).and_then(|p| p.launcher.state()) else { return };
    if let Some(f) = migration(state, &m.uid, MigrationRole::Target).filter(|f| f.gone) {
        let resume_us = f.resume_us.unwrap_or_else(|| facts.now.as_microsecond());
        plan.write(vec![Change::Arrived { resume_us }, Change::Report { pod: m.target_pod.clone() }]);
        plan.event("Created", "VirtualMachineInstance defined.");
    }
}

/// The guest's own life.
pub(super) fn decide(facts: &Facts, pod: &PodView, plan: &mut Plan) {
    let vmi = &facts.vmi;
    if vmi.is_final() {
        return;
    }
    let state = match &pod.launcher {
        Launcher::Waiting => return,
        Launcher::Answers(state) => state,
        // How it ended may have been its last word; without one the pod's end tells the controller.
        Launcher::Gone(state) => {
            ended(vmi.phase.as_str(), state, plan);
            return;
        }
    };
    match state.phase {
        DomainPhase::Undefined if vmi.deleting => end(pod, 0, plan),
        DomainPhase::Undefined if vmi.phase == "Scheduled" => {
            plan.act(Action::Wire { pod: pod.name.clone() });
            plan.act(Action::Start { pod: pod.name.clone() });
            plan.event("Created", "VirtualMachineInstance defined.");
        }
        // A running VMI is never started a second time: what ran here is gone.
        DomainPhase::Undefined if vmi.phase == "Running" && pod.migration_uid.is_none() => {
            plan.write(vec![Change::Phase("Failed")]);
            plan.warn("Stopped", "The VirtualMachineInstance crashed.");
        }
        DomainPhase::Running | DomainPhase::Paused => {
            plan.act(Action::Wire { pod: pod.name.clone() });
            let begins = vmi.phase == "Scheduled";
            let mut changes = Vec::new();
            if begins {
                changes.push(Change::Phase("Running"));
            }
            changes.push(Change::Report { pod: pod.name.clone() });
            plan.write(changes);
            if begins {
                plan.event("Started", "VirtualMachineInstance started.");
            }
            tell_reboot(facts, pod, state, plan);
            if vmi.deleting {
                end(pod, vmi.grace_seconds, plan);
            } else {
                change_disks(vmi, pod, state, plan);
            }
        }
        _ => ended(vmi.phase.as_str(), state, plan),
    }
}

/// A guest that was to reboot by its power button and has not powered down: said once. A restarted handler does not know what was
/// said, and says only what is new.
fn tell_reboot(facts: &Facts, pod: &PodView, state: &State, plan: &mut Plan) {
    let Some(RebootFacts { asked_us, given_up_us: Some(at) }) = state.reboot else { return };
    let age = u64::try_from(facts.now.as_microsecond().saturating_sub(at)).unwrap_or(0);
    if pod.reboot_told == Some(asked_us) || Duration::from_micros(age) > NEWS {
        return;
    }
    let waited = at.saturating_sub(asked_us) / 1_000_000;
    plan.act(Action::RebootTold { pod: pod.name.clone(), asked_us });
    plan.warn(
        reason::SOFT_REBOOT_FAILED,
        format!(
            "The guest has not powered down within {waited} s of its power button, and runs on. Restart its VM, reset the \
             VirtualMachineInstance, or run a guest agent in it."
        ),
    );
}

/// Disks come and go while the guest runs, but not while it moves: both ends have the same.
fn change_disks(vmi: &VmiView, pod: &PodView, state: &State, plan: &mut Plan) {
    if vmi.phase != "Running" || vmi.migration.as_ref().is_some_and(|m| !m.completed) {
        return;
    }
    let has = |name: &String| state.volumes.iter().any(|disk| disk.name == *name);
    let missing: Vec<String> = vmi.attached.iter().filter(|name| !has(name)).cloned().collect();
    let surplus = state.volumes.iter().any(|disk| disk.place.is_some() && !vmi.hotpluggable.contains(&disk.name));
    if surplus || !missing.is_empty() {
        plan.act(Action::ChangeDisks { pod: pod.name.clone(), missing });
    }
}

/// The guest is over: say how.
fn ended(phase: &str, state: &State, plan: &mut Plan) {
    if !matches!(phase, "Scheduled" | "Running") {
        return;
    }
    match state.phase {
        DomainPhase::Shutdown => {
            plan.write(vec![Change::Phase("Succeeded")]);
            plan.event("Stopped", "The VirtualMachineInstance was shut down.");
        }
        DomainPhase::Crashed if state.fenced => {
            plan.write(vec![Change::Phase("Failed")]);
            let why = state.exit_reason.as_deref().unwrap_or(fence::REASON);
            plan.warn(reason::GUEST_FENCED, format!("The VirtualMachineInstance was stopped. {why}"));
        }
        DomainPhase::Crashed => {
            plan.write(vec![Change::Phase("Failed")]);
            let why = state.exit_reason.as_deref().map(|r| format!(" {r}")).unwrap_or_default();
            plan.warn("Stopped", format!("The VirtualMachineInstance crashed.{why}"));
        }
        _ => {}
    }
}
