//! Clusters that stand already when time begins.

use std::time::Duration;

use godwit_simulator::{Options, simulate};

#[test]
fn what_is_stamped_is_what_the_controllers_would_have_made() {
    let writes_with = |vms| {
        let duration = Duration::from_secs(30);
        let options = Options { nodes: 10, vms, standing: true, migrations: 0, duration, ..Options::default() };
        simulate(options).expect_sound().writes
    };
    // Controllers that would have it otherwise would write; what they write is about the installation.
    assert_eq!(writes_with(40), writes_with(0));
}

#[test]
fn its_guests_move() {
    let options = Options {
        nodes: 20,
        vms: 150,
        standing: true,
        moves: Some(12),
        duration: Duration::from_secs(120),
        seed: 3,
        ..Options::default()
    };
    let report = simulate(options);
    report.expect_sound();
    assert!(report.succeeded >= 10 && report.failed == 0, "{report:?}");
}
