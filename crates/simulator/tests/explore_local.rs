use godwit_simulator::*;
fn var(name: &str) -> Option<String> {
    std::env::var(name).ok()
}
#[test]
#[ignore]
fn explore() {
    let seeds = var("SEEDS").unwrap_or("0..100".into());
    let (from, to) = seeds.split_once("..").unwrap();
    let (from, to): (u64, u64) = (from.parse().unwrap(), to.parse().unwrap());
    let begun = std::time::Instant::now();
    let options_of = |seed| {
        let mut o = run_of(seed, Faults::ALL);
        if let Some(c) = var("CONTROLLERS") {
            o.controllers = c.parse().unwrap();
        }
        if let Some(m) = var("MUTATION") {
            o.mutation = Mutation::ALL.into_iter().find(|one| format!("{one:?}") == m);
        }
        if var("BACKWARDS").is_some() {
            o.unchecked.insert(Rule::Backwards);
        }
        o.full_trace = to - from == 1;
        o
    };
    let summary = campaign(from..to, usize::MAX, options_of);
    for report in &summary.violations {
        println!("seed {}: {}", report.seed, report.violation.as_ref().unwrap());
        if to - from == 1 {
            println!("{}", report.trace.join("\n"));
            if var("SHRINK").is_some() {
                let s = shrink(&options_of(report.seed), 300).unwrap();
                println!(
                    "SHRUNK {} events of {}, {} tried\n{}\n{:?}",
                    s.report.events,
                    report.events,
                    s.tried,
                    s.report.trace.join("\n"),
                    s.options
                );
            }
        }
    }
    println!(
        "{} of {} seeds; {} events, {} good {} bad in {:?}",
        summary.violations.len(),
        summary.seeds,
        summary.events,
        summary.succeeded,
        summary.failed,
        begun.elapsed()
    );
}
#[test]
#[ignore]
fn big() {
    let n = |name: &str, default: u32| var(name).map_or(default, |t| t.parse().unwrap());
    let (nodes, vms) = (n("NODES", 1000), n("VMS", 5000));
    let begun = std::time::Instant::now();
    let report = simulate(Options {
        nodes,
        vms,
        standing: true,
        moves: Some(n("MOVES", 200)),
        seed: 1,
        duration: std::time::Duration::from_secs(n("SECONDS", 3600).into()),
        faults: if var("FAULTS").is_some() { Faults::ALL } else { Faults::NONE },
        limits: var("PARALLEL").map(|p| Limits { cluster: p.parse().unwrap(), outbound: 2, inbound: 2 }),
        ..Options::default()
    });
    println!(
        "{:?} {} events {} decisions {} writes; {} good {} bad; most {}; {:?} virtual in {:?}",
        report.violation,
        report.events,
        report.decisions,
        report.writes,
        report.succeeded,
        report.failed,
        report.most_at_once,
        report.virtual_time,
        begun.elapsed()
    );
    println!("{}", report.trace.iter().rev().take(20).rev().cloned().collect::<Vec<_>>().join("\n"));
}
