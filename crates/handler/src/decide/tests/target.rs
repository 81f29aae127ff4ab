//! The receiving half.

use super::*;

#[test]
fn a_target_is_prepared_and_published() {
    let plan = decide(&target_facts(coming(), answers(state(DomainPhase::Undefined)), false));
    assert_eq!(plan.actions[0], Action::Wire { pod: "new".into() });
    assert_eq!(orders(&plan), ["prepare new"]);

    let plan = decide(&target_facts(coming(), answers(received(DomainPhase::Incoming, false)), true));
    assert_eq!(writes(&plan), [Change::Published]);
    assert_eq!(
        events(&plan),
        [
            ("PreparingTarget", "VirtualMachineInstance Migration Target Prepared."),
            ("PreparingTarget", "Migration Target is listening at 10.88.0.11, on ports: 4000,4001"),
        ]
    );

    let m = MigrationView { source_node: OTHER.into(), target_node: ME.into(), ..published() };
    let m = MigrationView { target_address: Some("10.88.0.11".into()), ..m };
    let plan = decide(&target_facts(m, answers(received(DomainPhase::Incoming, false)), true));
    assert_eq!(plan, Plan::default(), "nothing to do until the go");
}

#[test]
fn a_restarted_target_handler_opens_its_channels_again() {
    let plan = decide(&target_facts(coming(), answers(received(DomainPhase::Incoming, false)), false));
    assert_eq!(orders(&plan), ["prepare new"], "nobody has connected: all of it");
    let mut loaded = received(DomainPhase::Incoming, false);
    loaded.migration.as_mut().unwrap().status = "completed".into();
    let plan = decide(&target_facts(coming(), answers(loaded), false));
    assert_eq!(orders(&plan), ["control new"], "the stream is over: the go can still be received");
    let plan = decide(&target_facts(coming(), answers(received(DomainPhase::Running, true)), false));
    assert_eq!(orders(&plan), ["control new"], "the source may not know yet that the guest runs");
}

#[test]
fn a_target_never_runs_the_guest_or_gives_it_up_by_itself() {
    for launcher in [
        answers(received(DomainPhase::Incoming, false)),
        answers(state(DomainPhase::Crashed)),
        Launcher::Gone(Box::new(received(DomainPhase::Incoming, false))),
    ] {
        for open in [true, false] {
            let orders = orders(&decide(&target_facts(started(), launcher.clone(), open)));
            assert!(orders.iter().all(|o| !o.starts_with("abandon") && !o.starts_with("shutdown")), "{orders:?}");
        }
    }
}

#[test]
fn the_arrival_is_written() {
    let plan = decide(&target_facts(coming(), answers(received(DomainPhase::Running, true)), true));
    assert_eq!(writes(&plan), [Change::Arrived { resume_us: us() }, Change::Report { pod: "new".into() }]);

    // The source has written the end before this node wrote the arrival.
    let m = MigrationView { completed: true, ..coming() };
    let plan = decide(&target_facts(m.clone(), answers(received(DomainPhase::Running, true)), true));
    assert_eq!(writes(&plan)[0], Change::Arrived { resume_us: us() });
    assert!(orders(&plan).contains(&"close target".to_owned()));

    let m = MigrationView { target_ready: true, ..m };
    let mut facts = target_facts(m, answers(received(DomainPhase::Running, true)), false);
    facts.vmi.node_name = Some(ME.into());
    assert_eq!(writes(&decide(&facts)), [Change::Report { pod: "new".into() }], "an ordinary life begins");
}

#[test]
fn a_target_reports_the_end_itself_when_the_source_does_not() {
    let m = MigrationView {
        target_ready: true,
        target_address: Some("10.88.0.11".into()),
        ports: published().ports,
        detected: true,
        ..coming()
    };
    let mut facts = target_facts(m, answers(received(DomainPhase::Running, true)), true);
    facts.vmi.node_name = Some(ME.into());
    let plan = decide(&facts);
    assert!(writes(&plan).is_empty() && plan.wake.is_some());
    facts.now = now() + jiff::SignedDuration::from_secs(31);
    assert_eq!(writes(&decide(&facts)), [Change::Completed { downtime_us: None }]);
    // The source could not answer a cancellation either.
    facts.vmi.migration.as_mut().unwrap().abort_requested = true;
    assert_eq!(writes(&decide(&facts)), [Change::Abort("Failed"), Change::Completed { downtime_us: None }]);
}

#[test]
fn a_target_of_a_failed_migration_is_abandoned() {
    let m = MigrationView { completed: true, failed: true, ..coming() };
    let plan = decide(&target_facts(m.clone(), answers(received(DomainPhase::Incoming, false)), true));
    assert_eq!(orders(&plan), ["close target", &format!("abandon new {UID}")]);
    let plan = decide(&target_facts(m.clone(), answers(state(DomainPhase::Undefined)), false));
    assert_eq!(orders(&plan), ["shutdown new 0"]);
    // Whatever the API says: a guest that runs is not killed here.
    let plan = decide(&target_facts(m, answers(received(DomainPhase::Running, true)), false));
    assert!(orders(&plan).is_empty());
    // Another migration has begun meanwhile.
    let m = MigrationView { uid: "mig-2".into(), ..leaving() };
    let mut facts = target_facts(m, answers(received(DomainPhase::Incoming, false)), false);
    facts.vmi.node_name = Some(ME.into());
    assert_eq!(orders(&decide(&facts)), [format!("abandon new {UID}")]);
}
