//! Clusters that stand already when time begins.

use std::time::Duration;

use godwit_simulator::{DEFAULT_PER_NODE, Limits, Options, simulate};

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

#[test]
fn a_node_is_emptied_of_all_its_guests_within_the_limits() {
    let guests = 24;
    let options = Options {
        nodes: 4,
        vms: guests,
        standing: true,
        migrations: 0,
        empty: Some(0),
        duration: Duration::from_secs(24 * 3600),
        ..Options::default()
    };
    let report = simulate(options.clone());
    let emptied = report.expect_sound().emptied.clone().expect("a node was emptied");
    let after = emptied.after.expect("it is empty");
    assert_eq!(emptied.guests.len(), 24);
    for guest in &emptied.guests {
        let (turn, sends, ends) = (guest.turn.unwrap(), guest.sends.unwrap(), guest.ends.unwrap());
        // The last launcher may have ended a moment before its migration is said to have succeeded.
        assert!(turn <= sends && sends < ends && sends < after && guest.failed == 0, "{guest:?}");
    }
    // The plan knew each of them.
    assert_eq!((emptied.plan.vms.len(), emptied.plan.blocked), (24, Some(false)), "{:?}", emptied.plan);
    assert!(emptied.plan.vms.iter().all(|vm| vm.target_node.as_ref().is_some_and(|node| node != "node1")));
    // The limits are used up, and were they wider it would be empty sooner.
    assert_eq!((report.most_from_one_node, u64::from(guests)), (DEFAULT_PER_NODE, report.succeeded));
    let limits = Some(Limits { cluster: 12, outbound: 12, inbound: 12 });
    let wide = simulate(Options { limits, ..options.clone() });
    let sooner = wide.expect_sound().emptied.as_ref().and_then(|emptied| emptied.after).expect("it is empty");
    assert!(sooner * 2 < after, "{sooner:?} and {after:?}");

    // That somebody holds a watch on it changes nothing.
    assert_eq!(report.deciding, Duration::ZERO);
    let timed = simulate(Options { clock: Some(|| std::time::UNIX_EPOCH.elapsed().unwrap_or_default()), ..options });
    assert_eq!(timed.trace_hash, report.trace_hash);
    assert!(timed.deciding > Duration::ZERO && timed.longest_decision <= timed.deciding);
}
