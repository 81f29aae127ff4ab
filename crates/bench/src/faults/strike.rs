//! Carrying a fault out, and mending it.

use super::error::Error;
use super::guest::LOOK_EVERY;
use super::plan::{Deed, Strike, Victim};
use super::sight::View;
use super::stage::{Kind, PATIENCE, Stage};
use godwit_network::{Namespace, nat};
use godwit_standalone::{CONTROL_PLANE, Cluster, Process, find};
use kube::api::DeleteParams;
use nix::sys::signal::Signal;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long the API may take to answer before it is asked again.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// What has been done and has to be undone.
pub enum Wound {
    /// It cannot be mended, or there was nobody to be hit.
    None,
    /// A process stands still.
    Stopped(Process),
    /// One of the cluster's own processes is gone.
    Killed(String),
    /// Two nodes do not hear each other.
    Link(Cut),
    /// A node is cut off; its port on the switch.
    Uplink(String),
}

/// Rules that drop what comes from the other node, in both.
pub struct Cut {
    table: String,
    ends: Vec<Namespace>,
}

/// What a fault has done.
pub struct Blow {
    /// Whether there was a victim.
    pub landed: bool,
    /// How to mend it.
    pub wound: Wound,
}

/// Carries out `strike` on the migration `request`; `number` makes what it leaves in the cluster its own.
pub async fn land(
    stage: &Arc<Stage>,
    strike: &Strike,
    number: u32,
    view: &View,
    source: &str,
    request: &str,
) -> Result<Blow, Error> {
    let target = view.target.place.as_ref().map(|place| place.node.as_str());
    let process = match strike.victim {
        Victim::SourceQemu => view.source.qemu,
        Victim::TargetQemu => view.target.qemu,
        Victim::SourceLauncher => view.source.launcher,
        Victim::TargetLauncher => view.target.launcher,
        Victim::SourceHandler => find(&stage.layout, source),
        Victim::TargetHandler => target.and_then(|node| find(&stage.layout, node)),
        Victim::ControlPlane => find(&stage.layout, CONTROL_PLANE),
        Victim::Link | Victim::SourceUplink | Victim::TargetUplink | Victim::Migration => None,
    };
    let process = process.filter(|process| process.is_alive());
    let own = match strike.victim {
        Victim::SourceHandler => Some(source),
        Victim::TargetHandler => target,
        Victim::ControlPlane => Some(CONTROL_PLANE),
        _ => None,
    };
    let wound = match (strike.deed, strike.victim, process) {
        (Deed::Kill, _, Some(process)) => {
            process.signal(Signal::SIGKILL);
            own.map_or(Wound::None, |name| Wound::Killed(name.to_owned()))
        }
        (Deed::Stop, _, Some(process)) => {
            process.signal(Signal::SIGSTOP);
            Wound::Stopped(process)
        }
        (Deed::Cut, Victim::Link, _) => match target {
            Some(target) => Wound::Link(cut(stage, number, source, target)?),
            None => return Ok(Blow { landed: false, wound: Wound::None }),
        },
        (Deed::Cancel, ..) => {
            let landed = cancel(stage, request).await?;
            return Ok(Blow { landed, wound: Wound::None });
        }
        (Deed::Cut, victim, _) => {
            let node = if victim == Victim::SourceUplink { Some(source) } else { target };
            let Some(node) = node else { return Ok(Blow { landed: false, wound: Wound::None }) };
            stage.switch()?.links()?.set_up(node, false).await?;
            Wound::Uplink(node.to_owned())
        }
        (_, _, None) => return Ok(Blow { landed: false, wound: Wound::None }),
    };
    Ok(Blow { landed: true, wound })
}

/// Deletes a request for a migration; false where it is over and gone already. An API that does not answer is asked again.
pub async fn cancel(stage: &Stage, request: &str) -> Result<bool, Error> {
    let (api, parameters) = (stage.api(Kind::Migration), DeleteParams::default());
    let deadline = Instant::now() + PATIENCE;
    loop {
        let asked = api.delete(request, &parameters);
        let source = match tokio::time::timeout(ANSWER_WITHIN, asked).await {
            Ok(Ok(_)) => return Ok(true),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => return Ok(false),
            Ok(Err(error)) => Some(error),
            Err(_) => None,
        };
        if Instant::now() > deadline {
            let last = source.map_or_else(|| "not answering".to_owned(), |error| error.to_string());
            let what = format!("{request} is deleted");
            return Err(Error::Late { what, seconds: PATIENCE.as_secs(), last });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Undoes what can be undone.
pub async fn mend(stage: &Arc<Stage>, wound: Wound) -> Result<(), Error> {
    match wound {
        Wound::None => Ok(()),
        Wound::Stopped(process) => {
            process.signal(Signal::SIGCONT);
            Ok(())
        }
        Wound::Killed(name) => stage.mend(&name).await,
        Wound::Link(cut) => {
            for end in &cut.ends {
                nat::nft(end, &format!("delete table ip {}\n", cut.table))?;
            }
            Ok(())
        }
        Wound::Uplink(node) => Ok(stage.switch()?.links()?.set_up(&node, true).await?),
    }
}

fn cut(stage: &Stage, number: u32, one: &str, other: &str) -> Result<Cut, Error> {
    let table = format!("fault{number}");
    let mut ends = Vec::new();
    for (here, there) in [(one, other), (other, one)] {
        let namespace = stage.namespace(here)?;
        let from = Cluster::node_address(stage.cluster.number_of(there).unwrap_or_default());
        // Dropped where it comes in: who sends sees nothing but silence.
        let chain =
            |hook: &str| format!("chain {hook} {{ type filter hook {hook} priority -300; ip saddr {from} drop; }}\n");
        nat::nft(&namespace, &format!("table ip {table} {{\n{}}}\n", chain("prerouting")))?;
        ends.push(namespace);
    }
    Ok(Cut { table, ends })
}
