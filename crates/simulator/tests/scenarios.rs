//! Single migrations to which one thing happens at one phase.

use std::time::Duration;

use godwit_simulator::{Blow, Faults, MigrationPhase as Phase, Options, Report, Step, simulate};

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
fn whoever_stands_still_at_a_phase_goes_on_and_no_guest_is_lost() {
    let all = [
        Blow::StallSourceAgent,
        Blow::StallTargetAgent,
        Blow::StallSourceLauncher,
        Blow::StallTargetLauncher,
        Blow::StallSourceQemu,
        Blow::StallTargetQemu,
    ];
    for blow in all {
        hit_at_each_phase(blow, |_, report| assert_eq!(report.guests_killed, 0));
    }
}

/// One migration of a guest that goes in post-copy, or not.
fn hit_at_each_step(blow: Blow, post_copy: bool, mut expect: impl FnMut(Step, &Report)) {
    let often = if post_copy { 1000 } else { 0 };
    let faults = Faults { post_copy_per_mille: often, busy_guests_per_mille: often, ..Faults::NONE };
    for step in Step::ALL {
        for seed in 0..2 {
            let report = simulate(Options { blow_at_step: Some((step, blow)), faults, ..one_vm(seed) });
            report.expect_sound();
            assert_eq!(report.succeeded + report.failed, 1, "{blow:?} at {step:?}");
            expect(step, &report);
        }
    }
}

/// Nodes die, and nothing else happens.
fn deaths(seed: u64) -> Options {
    let faults = Faults { node_deaths_per_hour: 30, skewed_clocks_per_mille: 500, ..Faults::NONE };
    Options { vms: 4, seed, faults, migrations: 0, duration: Duration::from_secs(240), ..Options::default() }
}

#[test]
fn a_lost_nodes_vms_run_elsewhere_in_time() {
    let mut rescued = 0;
    for seed in 0..24 {
        let within = Some(Duration::from_secs(45));
        let report = simulate(Options { rescued_within: within, ..deaths(seed) });
        rescued += report.expect_sound().rescued;
    }
    assert!(rescued > 20, "{rescued}");
}

#[test]
fn nobody_is_fenced_while_only_the_api_server_is_away() {
    hit_at_each_phase(Blow::StopApiServer, |_, report| {
        assert_eq!((report.fenced, report.guests_killed), (0, 0), "{report:?}");
    });
}

#[test]
fn a_node_that_is_cut_off_from_the_api_server_alone_is_fenced() {
    let faults = Faults { api_cuts_per_hour: 60, skewed_clocks_per_mille: 500, ..Faults::NONE };
    let mut fenced = 0;
    for seed in 0..24 {
        let options = Options { vms: 4, migrations: 0, faults, duration: Duration::from_secs(200), ..one_vm(seed) };
        fenced += simulate(options).expect_sound().fenced;
    }
    assert!(fenced > 20, "{fenced}");
}

#[test]
fn everything_at_each_step_of_the_hand_over() {
    for blow in Blow::ALL {
        let deadly = matches!(blow, Blow::KillSource | Blow::KillSourceNode | Blow::KillTarget | Blow::KillTargetNode);
        hit_at_each_step(blow, false, |step, report| {
            assert!(deadly || report.guests_killed == 0, "{blow:?} at {step:?}: {report:?}");
        });
    }
}

#[test]
fn everything_at_each_step_of_a_post_copy() {
    let (mut gone, mut runs) = (0, 0);
    for blow in Blow::ALL {
        // Before the hand-over nothing but the source's death takes the guest; after it both ends and the link are needed.
        let takes_source = matches!(blow, Blow::KillSource | Blow::KillSourceNode);
        hit_at_each_step(blow, true, |step, report| {
            let handed_over = report.post_copies > 0;
            assert!(handed_over || takes_source || report.guests_killed == 0, "{blow:?} at {step:?}: {report:?}");
            (gone, runs) = (gone + report.post_copies, runs + 1);
        });
    }
    // A scenario of which nothing comes shows nothing.
    assert!(gone * 2 > runs, "{gone} of {runs} went in post-copy");
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

/// Nodes in maintenance, several at once, and everything going wrong.
#[test]
fn nodes_in_maintenance_in_all_weather() {
    let mut moved = 0;
    for seed in 0..12 {
        let (duration, vms) = (Duration::from_secs(240), 5);
        let faults = if seed < 4 { Faults::NONE } else { Faults::ALL };
        let options = Options { nodes: 4, vms, maintenances: 5, duration, faults, ..one_vm(seed) };
        moved += simulate(Options { controllers: 1 + u32::from(seed % 2 == 1), ..options }).expect_sound().succeeded;
    }
    assert!(moved > 30, "{moved}");
}
