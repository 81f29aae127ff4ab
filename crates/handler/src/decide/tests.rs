//! Each situation that a handler meets, and what it does then.

use godwit_launcher::rpc::{MigrationFacts, MigrationRole, State};
use jiff::Timestamp;

use super::*;
use crate::facts::{Go, SourceView, TargetView, VmiView};

mod ends;
mod hand_over;
mod life;
mod limits;
mod local;
mod post_copy;
mod source;
mod target;

const ME: &str = "node1";
const OTHER: &str = "node2";
const UID: &str = "mig-1";

fn now() -> Timestamp {
    "2026-11-20T20:00:00Z".parse().unwrap()
}

fn us() -> i64 {
    now().as_microsecond()
}

fn state(phase: DomainPhase) -> State {
    State { vmi_uid: "vmi".into(), phase, ..State::default() }
}

fn answers(state: State) -> Launcher {
    Launcher::Answers(Box::new(state))
}

fn pod(name: &str, launcher: Launcher) -> PodView {
    PodView {
        name: name.into(),
        migration_uid: None,
        terminal: false,
        shutdown_ordered: None,
        reboot_told: None,
        launcher,
    }
}

fn facts(phase: &str, pods: Vec<PodView>) -> Facts {
    Facts {
        peer_ended: None,
        running_for: None,
        measure_asked: true,
        node: ME.into(),
        now: now(),
        vmi: VmiView { phase: phase.into(), grace_seconds: 30, node_name: Some(ME.into()), ..VmiView::default() },
        known_for: Duration::ZERO,
        pods: pods.into_iter().map(|p| (p.name.clone(), p)).collect(),
        target: None,
        source: None,
    }
}

/// A migration away from this node, handed over by the controller.
fn leaving() -> MigrationView {
    MigrationView {
        uid: UID.into(),
        source_node: ME.into(),
        target_node: OTHER.into(),
        source_pod: "old".into(),
        target_pod: "new".into(),
        completion_limit: Some(Duration::from_secs(800)),
        progress_limit: Some(Duration::from_secs(150)),
        ..MigrationView::default()
    }
}

/// The same once the target has published where it listens.
fn published() -> MigrationView {
    MigrationView {
        target_address: Some("10.88.0.12".into()),
        ports: [("4000".to_owned(), 0), ("4001".to_owned(), 49152)].into(),
        detected: true,
        ..leaving()
    }
}

fn started() -> MigrationView {
    MigrationView { start: Some(now()), ..published() }
}

fn sent(status: &str) -> State {
    let mut facts = MigrationFacts::new(UID, MigrationRole::Source);
    facts.status = status.into();
    facts.start_us = Some(us());
    facts.handed_over = status == "completed" || status.starts_with("postcopy");
    // As the launcher does it: with `completed` the guest has left.
    let phase = match status {
        "completed" => DomainPhase::MigratedAway,
        _ if facts.handed_over => DomainPhase::HandedOver,
        _ => DomainPhase::Running,
    };
    State { migration: Some(facts), ..state(phase) }
}

fn with_stop(mut state: State, stop_us: i64) -> State {
    state.migration.as_mut().unwrap().stop_us = Some(stop_us);
    state
}

fn source_facts(m: MigrationView, launcher: Launcher, link: Option<SourceView>) -> Facts {
    let mut facts = facts("Running", vec![pod("old", launcher)]);
    facts.vmi.migration = Some(m);
    facts.source = link;
    facts
}

fn link() -> SourceView {
    SourceView { uid: UID.into(), ready: true, ..SourceView::default() }
}

/// A migration to this node.
fn coming() -> MigrationView {
    MigrationView { source_node: OTHER.into(), target_node: ME.into(), ..leaving() }
}

fn received(phase: DomainPhase, gone: bool) -> State {
    let mut facts = MigrationFacts::new(UID, MigrationRole::Target);
    facts.gone = gone;
    // Without post-copy the go comes only when all is there.
    if gone {
        facts.status = "completed".into();
    }
    facts.resume_us = gone.then(us);
    State { migration: Some(facts), ..state(phase) }
}

fn target_facts(m: MigrationView, launcher: Launcher, open: bool) -> Facts {
    let mut new = pod("new", launcher);
    new.migration_uid = Some(UID.into());
    let mut facts = facts("Running", vec![new]);
    facts.vmi.node_name = Some(OTHER.into());
    facts.vmi.migration = Some(m);
    facts.target = open.then(|| TargetView {
        uid: UID.into(),
        address: "10.88.0.11".into(),
        over_own_network: false,
        ports: [("4000".to_owned(), 0), ("4001".to_owned(), 49152)].into(),
    });
    facts
}

fn writes(plan: &Plan) -> Vec<Change> {
    plan.actions
        .iter()
        .filter_map(|a| if let Action::Write(c) = a { Some(c.clone()) } else { None })
        .flatten()
        .collect()
}

fn events(plan: &Plan) -> Vec<(&str, &str)> {
    plan.actions
        .iter()
        .filter_map(|a| {
            if let Action::Event { reason, message, .. } = a { Some((*reason, message.as_str())) } else { None }
        })
        .collect()
}

/// What would touch a launcher, in short.
fn orders(plan: &Plan) -> Vec<String> {
    plan.actions
        .iter()
        .filter_map(|a| match a {
            Action::Write(_) | Action::Event { .. } | Action::Wire { .. } | Action::RebootTold { .. } => None,
            Action::Start { pod } => Some(format!("start {pod}")),
            Action::ChangeDisks { pod, missing } => Some(format!("disks {pod} {missing:?}")),
            Action::PrepareTarget { pod, .. } => Some(format!("prepare {pod}")),
            Action::OpenControl { pod, .. } => Some(format!("control {pod}")),
            Action::CloseTarget => Some("close target".into()),
            Action::Abandon { pod, uid } => Some(format!("abandon {pod} {uid}")),
            Action::Dial { pod, memory } => Some(format!("dial {pod} {memory}")),
            Action::Measure { pod } => Some(format!("measure {pod}")),
            Action::Migrate { pod } => Some(format!("migrate {pod}")),
            Action::Limit { pod } => Some(format!("limit {pod}")),
            Action::Cancel { pod, .. } => Some(format!("cancel {pod}")),
            Action::Disrupt { pod, how, .. } => Some(format!("{how:?} {pod}")),
            Action::CloseSource => Some("close source".into()),
            Action::Shutdown { pod, grace_seconds } => Some(format!("shutdown {pod} {grace_seconds}")),
        })
        .collect()
}

/// What is written as the migration's failure.
fn failed(plan: &Plan) -> Option<Failure> {
    writes(plan).into_iter().find_map(|c| if let Change::Failed(failure) = c { Some(failure) } else { None })
}

fn failure(plan: &Plan) -> String {
    failed(plan).map(|failure| failure.reason).unwrap_or_default()
}

fn cause(plan: &Plan) -> FailureCause {
    failed(plan).expect("the migration fails").cause
}

fn aborted() -> Failure {
    Failure::new(FailureCause::Cancelled, "Live migration has been aborted")
}
