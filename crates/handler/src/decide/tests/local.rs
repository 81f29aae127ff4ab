//! A guest that changes its launcher and not its node: both ends are this handler's.

use super::*;

fn staying(m: MigrationView) -> MigrationView {
    MigrationView { source_node: ME.into(), target_node: ME.into(), ..m }
}

fn both(m: MigrationView, old: Launcher, new: Launcher) -> Facts {
    let mut target = pod("new", new);
    target.migration_uid = Some(UID.into());
    let mut facts = facts("Running", vec![pod("old", old), target]);
    facts.vmi.migration = Some(staying(m));
    facts
}

fn open(facts: Facts) -> Facts {
    let target = target_facts(coming(), Launcher::Waiting, true).target;
    Facts { target, source: Some(link()), ..facts }
}

#[test]
fn both_ends_are_prepared_and_the_guest_is_sent() {
    let (running, waiting) =
        (|| answers(state(DomainPhase::Running)), || answers(received(DomainPhase::Incoming, false)));
    let plan = decide(&both(leaving(), running(), answers(state(DomainPhase::Undefined))));
    assert_eq!(orders(&plan), ["prepare new"], "the guest's own life goes on: {plan:?}");

    let mut facts = open(both(leaving(), running(), waiting()));
    facts.source = None;
    assert!(writes(&decide(&facts)).contains(&Change::Published));

    let m = MigrationView { target_address: Some("10.88.0.11".into()), ..published() };
    let mut facts = open(both(m.clone(), running(), waiting()));
    facts.source = None;
    assert_eq!(orders(&decide(&facts)), ["dial old true"], "and its channels stay open");
    assert_eq!(orders(&decide(&open(both(m, running(), waiting())))), ["migrate old"]);
}

#[test]
fn after_the_go_the_new_pod_is_the_guests_and_the_old_one_ends() {
    let mut facts = open(both(started(), answers(sent("completed")), answers(received(DomainPhase::Running, true))));
    facts.source = Some(SourceView { go: Go::Running(us()), ..link() });
    let plan = decide(&facts);
    let writes = writes(&plan);
    assert!(writes.iter().any(|change| matches!(change, Change::Completed { .. })), "{writes:?}");
    assert!(
        writes.contains(&Change::Arrived { resume_us: us() }) && writes.contains(&Change::Report { pod: "new".into() })
    );
    assert!(!writes.contains(&Change::Report { pod: "old".into() }), "{writes:?}");
    assert_eq!(orders(&plan), [""; 0], "nothing is ended before it is written");

    let over = MigrationView { completed: true, target_ready: true, ..started() };
    let facts = open(both(over, answers(sent("completed")), answers(received(DomainPhase::Running, true))));
    let plan = decide(&facts);
    assert!(orders(&plan).contains(&"shutdown old 0".to_owned()), "{plan:?}");
    assert!(orders(&plan).contains(&"close target".to_owned()) && orders(&plan).contains(&"close source".to_owned()));
    assert!(!orders(&plan).iter().any(|order| order.ends_with("new 0") || order.starts_with("abandon")), "{plan:?}");
}

#[test]
fn one_that_fails_leaves_the_guest_in_its_pod() {
    let over = MigrationView { completed: true, failed: true, ..started() };
    let facts = open(both(over, answers(state(DomainPhase::Running)), answers(received(DomainPhase::Incoming, false))));
    let plan = decide(&facts);
    assert!(orders(&plan).contains(&format!("abandon new {UID}")), "{plan:?}");
    assert!(orders(&plan).contains(&"close target".to_owned()) && orders(&plan).contains(&"close source".to_owned()));
    assert_eq!(writes(&plan), [Change::Report { pod: "old".into() }]);
}
