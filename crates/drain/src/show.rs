//! A plan for people.

use std::collections::BTreeMap;
use std::fmt::Write;

use godwit_api::drain::{
    BandwidthBasis, DrainBasis, DrainBound, DrainDuration, DrainOutcome, DrainPlan, DrainVm, PodOutcome,
};
use godwit_control::drain::rate;

/// Between two columns.
const GAP: &str = "   ";

/// How many characters fit into a line of the terminal; none if it goes elsewhere.
pub fn width() -> Option<usize> {
    let terminal = console::Term::stdout();
    terminal.is_term().then(|| usize::from(terminal.size().1))
}

/// The plan as a table and a few sentences. Where its lines do not fit into `width`, the reasons get lines of their own.
pub fn plan(plan: &DrainPlan, width: Option<usize>) -> String {
    let mut out = String::new();
    if plan.vms.is_empty() {
        line(&mut out, format_args!("no VMs on {}", plan.nodes.join(", ")));
    } else {
        let rows = plan.vms.iter().map(|vm| {
            [
                format!("{}/{}", vm.namespace, vm.name),
                vm.node.clone(),
                outcome(vm).to_owned(),
                vm.target_node.clone().unwrap_or_else(|| "-".to_owned()),
                vm.start.as_ref().map_or_else(|| "-".to_owned(), begins),
                vm.duration.as_ref().map_or_else(|| "-".to_owned(), duration),
                vm.basis.as_ref().map_or("-", basis).to_owned(),
                vm.reasons.join("; "),
            ]
        });
        table(&mut out, ["VM", "ON", "WOULD", "TO", "FROM", "TAKES", "BY", "WHY"], rows.collect(), width);
    }
    pods(plan, &mut out);
    out.push('\n');
    line(&mut out, format_args!("{}", sum(plan)));
    for bound in plan.bounds.iter().filter(|bound| bound.milliseconds > Some(0)) {
        line(&mut out, format_args!("  {}", bounded(bound)));
    }
    bandwidths(plan, &mut out);
    if plan.vms.iter().any(|vm| vm.basis == Some(DrainBasis::Size)) {
        out.push_str("  by size: never measured, so the memory's size over the bandwidth; how fast the guest writes is not known\n");
    }
    for note in &plan.notes {
        line(&mut out, format_args!("  note: {note}"));
    }
    out
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String does not fail.
    let _ = writeln!(out, "{text}");
}

fn table<const N: usize>(out: &mut String, head: [&str; N], rows: Vec<[String; N]>, width: Option<usize>) {
    let all: Vec<[String; N]> = std::iter::once(head.map(str::to_owned)).chain(rows).collect();
    let mut widths = [0; N];
    for row in &all {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let whole: usize = widths.iter().map(|width| width + GAP.len()).sum();
    let apart = width.is_some_and(|width| whole > width + GAP.len());
    for (index, row) in all.iter().enumerate() {
        let in_line = if apart { N.saturating_sub(1) } else { N };
        let mut text = String::new();
        for (width, cell) in widths.iter().zip(row).take(in_line) {
            let _ = write!(text, "{cell:width$}{GAP}");
        }
        line(out, format_args!("{}", text.trim_end()));
        // Its head would stand above nothing.
        if let Some(last) = row.last().filter(|last| apart && index > 0 && !last.is_empty()) {
            line(out, format_args!("    {last}"));
        }
    }
}

fn pods(plan: &DrainPlan, out: &mut String) {
    if plan.pods.is_empty() {
        return;
    }
    let count = |outcome: PodOutcome| plan.pods.iter().filter(|pod| pod.is(&outcome)).count();
    let (evicted, ignored) = (count(PodOutcome::Evict), count(PodOutcome::Ignore));
    out.push('\n');
    line(out, format_args!("other pods: {evicted} evicted, {ignored} left alone (of DaemonSets, or made by the node)"));
    for pod in plan.pods.iter().filter(|pod| !pod.is(&PodOutcome::Ignore)) {
        let word = match &pod.outcome {
            Some(PodOutcome::Evict) => "is evicted",
            Some(PodOutcome::Wait) => "waits",
            _ => "BLOCKS",
        };
        let why = if pod.reasons.is_empty() { String::new() } else { format!(": {}", pod.reasons.join("; ")) };
        line(out, format_args!("  {}/{} {word}{why}", pod.namespace, pod.name));
    }
}

/// What becomes of a VM, in a word or two.
pub fn outcome(vm: &DrainVm) -> &'static str {
    match &vm.outcome {
        Some(DrainOutcome::Migrate) => "migrate",
        Some(DrainOutcome::ShutDown) if vm.restarts == Some(true) => "restart",
        Some(DrainOutcome::ShutDown) => "shut down",
        Some(DrainOutcome::External) => "external",
        _ => "BLOCK",
    }
}

fn basis(basis: &DrainBasis) -> &str {
    match basis {
        DrainBasis::Progress => "progress",
        DrainBasis::LastMigration => "last move",
        DrainBasis::DirtyRate => "measured",
        DrainBasis::Forecast => "forecast",
        DrainBasis::Size => "size",
        DrainBasis::GracePeriod => "grace",
        DrainBasis::Other(other) => other,
    }
}

fn sum(plan: &DrainPlan) -> String {
    let count = |outcome: DrainOutcome| plan.vms.iter().filter(|vm| vm.is(&outcome)).count();
    let (moves, ends) = (count(DrainOutcome::Migrate), count(DrainOutcome::ShutDown));
    let stays = count(DrainOutcome::Block);
    let others = plan.pods.iter().filter(|pod| pod.is(&PodOutcome::Block)).count();
    let mut text = format!("{}: {moves} migrated, {ends} shut down", plan.nodes.join(", "));
    if let Some(whole) = &plan.duration {
        let _ = write!(text, ", in {}", duration(whole));
    }
    let external = count(DrainOutcome::External);
    if external > 0 {
        let _ = write!(text, "; {external} wait for somebody else to move them");
    }
    match (stays, others) {
        (0, 0) => text.push_str("; nothing blocks"),
        (_, 0) => _ = write!(text, "; {stays} BLOCK"),
        _ => _ = write!(text, "; {stays} VMs and {others} other pods BLOCK"),
    }
    text
}

fn bounded(bound: &DrainBound) -> String {
    let on = bound.node.as_ref().map(|node| format!(" on {node}")).unwrap_or_default();
    let time = milliseconds(bound.milliseconds.unwrap_or(0));
    let vms = bound.vms.unwrap_or(0);
    let value = bound.value.unwrap_or(0);
    if bound.limit == "bandwidthPerMigration" {
        return format!("{}{on} ({}): {vms} VMs take {time} to copy once", bound.limit, rate(value));
    }
    if let Some(quota) = &bound.quota {
        return format!("{} {quota}: {vms} VMs wait until others have left, {time} in all", bound.limit);
    }
    format!("{}{on} ({value}): {vms} VMs wait for it, {time} in all", bound.limit)
}

/// What the migrations' bandwidths rest on: one line for each pair of nodes, or each node, or what else is the same.
fn bandwidths(plan: &DrainPlan, out: &mut String) {
    let mut all: BTreeMap<(u64, String), u32> = BTreeMap::new();
    for vm in plan.vms.iter().filter(|vm| vm.is(&DrainOutcome::Migrate)) {
        let (Some(each), Some(basis)) = (vm.bytes_per_second, &vm.bandwidth_basis) else { continue };
        let text = match basis {
            BandwidthBasis::Pair => {
                format!("measured from {} to {}", vm.node, vm.target_node.as_deref().unwrap_or("?"))
            }
            BandwidthBasis::Node => format!("measured on migrations from and to {}", vm.node),
            BandwidthBasis::Cluster => "measured on migrations between other nodes".to_owned(),
            BandwidthBasis::Configured => "what is allowed; nothing slower was measured".to_owned(),
            BandwidthBasis::Assumed => "assumed: nothing is configured and nothing was measured".to_owned(),
            BandwidthBasis::Other(other) => other.clone(),
        };
        *all.entry((each, text)).or_default() += 1;
    }
    for ((each, text), vms) in all.iter().rev() {
        line(out, format_args!("  bandwidth: {} for {vms} VMs: {text}", rate(*each)));
    }
}

fn begins(start: &DrainDuration) -> String {
    match start.milliseconds {
        Some(0) => "now".to_owned(),
        Some(ms) => format!("+{}", milliseconds(ms)),
        None => "?".to_owned(),
    }
}

/// A time with its interval.
pub fn duration(time: &DrainDuration) -> String {
    let one = |ms: Option<u64>| ms.map_or_else(|| "?".to_owned(), milliseconds);
    format!("{} ({} to {})", one(time.milliseconds), one(time.min_milliseconds), one(time.max_milliseconds))
}

/// A time with its unit.
pub fn milliseconds(ms: u64) -> String {
    match ms {
        0..10_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        10_000..120_000 => format!("{} s", ms / 1000),
        120_000..7_200_000 => format!("{} min", ms / 60_000),
        _ => format!("{} h {} min", ms / 3_600_000, ms / 60_000 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_for_people() {
        let texts = [0, 950, 9_999, 10_000, 119_999, 120_000, 7_199_999, 7_200_000, 90_000_000].map(milliseconds);
        assert_eq!(texts, ["0.0 s", "0.9 s", "9.9 s", "10 s", "119 s", "2 min", "119 min", "2 h 0 min", "25 h 0 min"]);
    }

    #[test]
    fn a_plan_says_what_blocks() {
        let vm = |name: &str, outcome: DrainOutcome| DrainVm {
            namespace: "default".into(),
            name: name.into(),
            node: "node1".into(),
            outcome: Some(outcome),
            reasons: vec![
                "evictionStrategy LiveMigrate, and it cannot be migrated".into(),
                "volume root: local".into(),
            ],
            ..DrainVm::default()
        };
        let all = DrainPlan {
            nodes: vec!["node1".into()],
            vms: vec![vm("a", DrainOutcome::Migrate), vm("b", DrainOutcome::Block)],
            ..DrainPlan::default()
        };
        let told = plan(&all, None);
        let lines: Vec<&str> = told.lines().collect();
        assert!(lines[0].starts_with("VM          ON      WOULD     TO"), "{told}");
        assert!(lines[2].contains("BLOCK") && lines[2].ends_with("cannot be migrated; volume root: local"), "{told}");
        assert!(told.contains("node1: 1 migrated, 0 shut down; 1 BLOCK"), "{told}");
        assert_eq!(plan(&all, Some(200)), told, "there is room");
        let narrow = plan(&all, Some(80));
        let lines: Vec<&str> = narrow.lines().collect();
        assert_eq!(lines[0].split_whitespace().last(), Some("BY"), "{narrow}");
        assert!(lines[3].starts_with("default/b") && lines[3].len() < 80, "{narrow}");
        assert_eq!(lines[4], "    evictionStrategy LiveMigrate, and it cannot be migrated; volume root: local");
    }
}
