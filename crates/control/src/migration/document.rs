//! The table as a page for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use godwit_api::MigrationPhase as Phase;

use super::deadlines;
use super::table::{Action, Blame, Row, TABLE, rank};

fn phase(phase: &Phase) -> &str {
    match phase {
        Phase::Unset => "New",
        other => other.as_str(),
    }
}

fn action(action: &Action) -> String {
    match action {
        Action::Tell(type_, reason, text) => format!("event {} `{reason}`: {text}", type_.as_str()),
        Action::WarnVmi(reason, text) => format!("event Warning `{reason}` on the VMI: {text}"),
        other => format!("**{other:?}**"),
    }
}

/// Renders `docs/migration-states.md`.
pub fn render() -> String {
    let mut page = String::from(
        "# The life of a migration\n\n\
         Rendered from the transition table in `crates/control/src/migration/table.rs` by a test of the crate \
         `godwit-control`;\nafter a change of the table run \
         `GODWIT_BLESS=1 cargo test -p godwit-control states_page` to write it anew.\n\n\
         In a phase, the fact that counts leads to the next phase. Facts marked with ⏱ are brought about by time alone: \
         no\nphase that is not final can last for ever, unless somebody has switched its deadline off.\n\n```mermaid\nstateDiagram-v2\n    [*] --> New\n",
    );
    let mut arrows: BTreeMap<(u8, u8), (&Row, Vec<String>)> = BTreeMap::new();
    for row in TABLE.iter().filter(|row| row.from != row.to) {
        let key = (rank(&row.from), if row.to == Phase::Failed { u8::MAX } else { rank(&row.to) });
        arrows.entry(key).or_insert_with(|| (row, Vec::new())).1.push(format!("{:?}", row.fact));
    }
    for (row, facts) in arrows.values() {
        let _ = writeln!(page, "    {} --> {}: {}", phase(&row.from), phase(&row.to), facts.join(", "));
    }
    page.push_str("    Succeeded --> [*]\n    Failed --> [*]\n```\n\n| in | fact | to | does |\n|---|---|---|---|\n");
    for row in TABLE {
        let mut actions: Vec<String> = row.actions.iter().map(action).collect();
        if row.to == Phase::Failed && row.from != Phase::Failed {
            actions.push(format!("cause {}", blame(row)));
        }
        let clock = if row.fact.is_timeout() { " ⏱" } else { "" };
        let to = if row.to == row.from { "stays" } else { phase(&row.to) };
        let _ = writeln!(page, "| {} | {:?}{clock} | {to} | {} |", phase(&row.from), row.fact, actions.join("; "));
    }
    page.push_str(
        "\nCauses are those of [failures.md](failures.md). A migration that waits has the fact as `status.reason` and in its \
         condition\n`Waiting`; `status.message` says it in a sentence.\n\n## Deadlines\n\n\
         | phase | what | how long | set by |\n|---|---|---|---|\n",
    );
    for [phase, what, limit, set] in deadlines::rows() {
        let _ = writeln!(page, "| {phase} | {what} | {limit} | {set} |");
    }
    page
}

/// Why a migration has failed that this row ends.
fn blame(row: &Row) -> String {
    match row.fact.blame() {
        Some(Blame::Cause(cause)) => format!("`{cause}`"),
        Some(Blame::Reported) => "as the handler reports it (`migrationState.failureCause`)".to_owned(),
        None => "unknown".to_owned(),
    }
}
