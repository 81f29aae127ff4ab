//! `godwit plan drain` and `godwit drain`.

use crate::args::{Drain, Output, PlanDrain};
use godwit_drain::{Ending, Options, connect, read, show};
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Something blocks, or stays.
const BLOCKED: u8 = 2;
/// Somebody ended it and it was taken back; as shells count SIGINT.
const INTERRUPTED: u8 = 130;

/// Shows what emptying nodes would do.
pub async fn plan(wanted: PlanDrain) -> anyhow::Result<ExitCode> {
    let what = &wanted.what;
    let client = connect(what.kubeconfig.as_deref(), &what.data_dir).await?;
    let plan = read::cluster(&client, what.namespace.as_deref()).await?.plan(&what.nodes, what.manner())?;
    match wanted.output {
        Output::Text => print!("{}", show::plan(&plan, show::width())),
        Output::Json => println!("{}", serde_json::to_string_pretty(&plan)?),
    }
    Ok(if plan.is_blocked() { ExitCode::from(BLOCKED) } else { ExitCode::SUCCESS })
}

/// Empties nodes.
pub async fn run(wanted: Drain) -> anyhow::Result<ExitCode> {
    // Before anything is changed: whoever ends it has it taken back.
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let (tell, mut signals) = mpsc::channel(4);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if tell.send(()).await.is_err() {
                return;
            }
        }
    });
    let what = &wanted.what;
    let client = tokio::select! {
        client = connect(what.kubeconfig.as_deref(), &what.data_dir) => client?,
        Some(()) = signals.recv() => return Ok(ExitCode::from(INTERRUPTED)),
    };
    let options = Options {
        nodes: what.nodes.clone(),
        namespace: what.namespace.clone(),
        manner: what.manner(),
        timeout: (wanted.timeout > 0).then(|| Duration::from_secs(wanted.timeout)),
        yes: wanted.yes,
        max_parallel: wanted.max_parallel,
    };
    Ok(match godwit_drain::run(&client, &options, &mut signals).await? {
        Ending::Drained => ExitCode::SUCCESS,
        Ending::NotBegun | Ending::Stays => ExitCode::from(BLOCKED),
        Ending::TakenBack => ExitCode::from(INTERRUPTED),
        Ending::Remains(_) => ExitCode::FAILURE,
    })
}
