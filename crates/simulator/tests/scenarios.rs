//! Single migrations to which one thing happens at one phase.

use std::time::Duration;

use godwit_simulator::{Blow, Faults, MigrationPhase as Phase, Options, Report, simulate};

const PHASES: [Phase; 6] =
    [Phase::Pending, Phase::Scheduling, Phase::Scheduled, Phase::PreparingTarget, Phase::TargetReady, Phase::Running];

fn one_vm(seed: u64) -> Options {
    Options { vms: 1, seed, duration: Duration::from_secs(20), ..Options::default() }
}

/// One migration of one VM, hit at each phase, with a few seeds each.
fn hit_at_each_phase(blow: Blow, expect: impl Fn(&Phase, &Report)) {
    for phase in PHASES {
        for seed in 0..3 {
            let report = simulate(Options { blow: Some((phase.clone(), blow)), ..one_vm(seed) });
            report.expect_sound();
            assert_eq!(report.succeeded + report.failed, 1, "{blow:?} at {}", phase.as_str());
            expect(&phase, &report);
        }
    }
}

#[test]
fn happy_path() {
    for seed in 0..20 {
        let report = simulate(one_vm(seed));
        report.expect_sound();
        assert_eq!((report.succeeded, report.failed, report.guests_killed), (1, 0, 0), "seed {seed}");
    }
}

#[test]
fn every_vm_arrives_when_nothing_goes_wrong() {
    let options = Options { vms: 6, nodes: 4, migrations: 2, seed: 7, ..Options::default() };
    let report = simulate(options);
    report.expect_sound();
    assert_eq!(report.failed, 0);
    assert!(report.succeeded >= 6, "{report:?}");
}

#[test]
fn cancelled_at_each_phase() {
    hit_at_each_phase(Blow::Cancel, |phase, report| {
        assert_eq!(report.guests_killed, 0);
        // While it runs the end may come first.
        assert!(report.failed == 1 || *phase == Phase::Running, "{} {report:?}", phase.as_str());
    });
}

#[test]
fn target_dies_at_each_phase() {
    hit_at_each_phase(Blow::KillTarget, |_, _| {});
}

#[test]
fn target_pod_is_deleted_at_each_phase() {
    hit_at_each_phase(Blow::DeleteTargetPod, |_, _| {});
}

#[test]
fn targets_node_dies_at_each_phase() {
    hit_at_each_phase(Blow::KillTargetNode, |_, _| {});
}

#[test]
fn source_dies_at_each_phase() {
    hit_at_each_phase(Blow::KillSource, |_, _| {});
}

#[test]
fn sources_node_dies_at_each_phase() {
    hit_at_each_phase(Blow::KillSourceNode, |_, _| {});
}

#[test]
fn controllers_restart_at_each_phase() {
    hit_at_each_phase(Blow::RestartController, |phase, report| {
        assert_eq!((report.succeeded, report.guests_killed), (1, 0), "at {}", phase.as_str());
    });
}

#[test]
fn agents_restart_at_each_phase() {
    hit_at_each_phase(Blow::RestartSourceAgent, |_, report| assert_eq!(report.guests_killed, 0));
    hit_at_each_phase(Blow::RestartTargetAgent, |_, report| assert_eq!(report.guests_killed, 0));
}

#[test]
fn links_are_cut_at_each_phase() {
    hit_at_each_phase(Blow::CutLink, |_, report| assert_eq!(report.guests_killed, 0));
}

#[test]
fn sources_node_is_cut_off_at_each_phase() {
    hit_at_each_phase(Blow::CutSourceNode, |_, report| assert_eq!(report.guests_killed, 0));
}

#[test]
fn targets_node_is_cut_off_at_each_phase() {
    hit_at_each_phase(Blow::CutTargetNode, |_, report| assert_eq!(report.guests_killed, 0));
}

#[test]
fn limits_hold_for_20_vms_on_4_nodes() {
    for seed in 0..2 {
        let options = Options { nodes: 4, vms: 20, seed, at_once: true, ..Options::default() };
        let report = simulate(options);
        report.expect_sound();
        assert_eq!((report.succeeded, report.failed), (20, 0));
        // They are used to the full, and never exceeded (which every run checks after every event).
        assert_eq!((report.most_at_once, report.most_from_one_node), (5, 2));
    }
}

#[test]
fn everything_at_each_phase_on_caches_that_lag() {
    let faults =
        Faults { late_news_per_mille: 400, conflicts_per_mille: 100, lost_answers_per_mille: 50, ..Faults::NONE };
    for blow in Blow::ALL {
        for phase in PHASES {
            for seed in 100..103 {
                simulate(Options { blow: Some((phase.clone(), blow)), faults, ..one_vm(seed) }).expect_sound();
            }
        }
    }
}
