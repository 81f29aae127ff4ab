//! One run: a guest is to move, something is done to it, and in the end it is judged.

use super::error::Error;
use super::guest::{ALIVE, Guest, LOOK_EVERY, Place};
use super::judge::{Evidence, Outcome, judge};
use super::plan::{Moment, Strike};
use super::sight::{Sight, View, has_left};
use super::stage::{Kind, Stage, text};
use super::strike::{Blow, land, mend};
use crate::witness::{complaint, longest_gap};
use kube::api::{DynamicObject, PostParams};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// How long a migration may take to come to the moment of the fault, and to its end after everything is mended. The product's own
/// deadlines are shorter, except that of a target which is never prepared (180 s).
const MIGRATION_LIMIT: Duration = Duration::from_secs(240);
/// How long a guest may take to be heard again after that, and the API to say where it is.
const BEAT_LIMIT: Duration = Duration::from_secs(90);

/// A run that is over.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its number, from 0.
    pub number: u32,
    /// What was done.
    pub strike: Strike,
    /// How far the migration had come when it was done; none if there was no victim any more.
    pub struck_at: Option<Moment>,
    /// What became of the guest.
    pub outcome: Outcome,
    /// Which promises were broken.
    pub broken: Vec<String>,
    /// From the request to the verdict.
    pub took: Duration,
    /// The longest time without a heartbeat.
    pub gap: Duration,
    /// The migration's phase and reason.
    pub migration: String,
}

/// Carries out run `number` on a guest that runs. When a promise is broken, the launchers' logs are kept in `kept`.
pub async fn run(stage: &Arc<Stage>, guest: &Guest, number: u32, strike: Strike, kept: &Path) -> Result<Report, Error> {
    let began = Instant::now();
    let before = SystemTime::now();
    let source = settled(stage, guest).await?;
    let mut sight = Sight::open(stage, guest, source.clone());
    sight.until(BEAT_LIMIT, |view| view.source.qemu.is_some() && view.source.launcher.is_some()).await;

    let name = format!("{}-run-{number}", guest.name);
    let record = |uid: &Option<String>| uid.as_deref().is_some_and(|uid| has_left(stage, &source, uid));
    let mut struck = None;
    let mut left_then = false;
    let uid = if strike.moment == Moment::Before {
        let (at, blow) = hit(stage, &strike, number, &sight, &source).await?;
        struck = Some((at, blow.landed));
        // It may be the API that cannot be asked before it is mended.
        let (uid, mended) = tokio::join!(ask(stage, guest, &name), heal(stage, &strike, blow));
        mended?;
        uid?
    } else {
        ask(stage, guest, &name).await?
    };
    if let Some(uid) = &uid {
        sight.asked(&name, uid);
    }
    if uid.is_some() && strike.moment > Moment::Before {
        sight.until(MIGRATION_LIMIT, |view| view.moment() >= strike.moment).await;
        let (at, blow) = hit(stage, &strike, number, &sight, &source).await?;
        struck = Some((at, blow.landed));
        left_then = record(&uid);
        heal(stage, &strike, blow).await?;
    }
    let landed = struck.is_some_and(|(_, landed)| landed);
    let mended = SystemTime::now();

    // Where it was refused there is nothing to end.
    let over = uid.is_none() || sight.until(MIGRATION_LIMIT, View::is_over).await;
    let view = sight.now();
    // A migration cannot succeed otherwise; its source's pod, and the record in it, may have gone before it was looked at.
    let left = left_then || view.handed_over || view.phase == "Succeeded" || record(&uid);
    let mut evidence = Evidence { landed, left, over, ..Evidence::default() };
    listen(stage, guest, &source, mended, &mut evidence).await;
    let beats = stage.witness.beats(guest.station);
    evidence.complaint = complaint(&beats);
    let view = sight.now();
    let (outcome, broken) = judge(&strike, &evidence);
    if !broken.is_empty() {
        sight.keep_logs(kept);
    }
    let migration = if uid.is_none() { "refused".to_owned() } else { format!("{} {}", view.phase, view.reason) };
    Ok(Report {
        number,
        strike,
        struck_at: struck.filter(|_| landed).map(|(at, _)| at),
        outcome,
        broken,
        took: began.elapsed(),
        gap: longest_gap(&beats, before),
        migration: migration.trim().to_owned(),
    })
}

/// Waits until the API says where the guest lives, and nothing else is going on with it.
async fn settled(stage: &Stage, guest: &Guest) -> Result<Place, Error> {
    let deadline = Instant::now() + MIGRATION_LIMIT;
    loop {
        if let Some(place) = guest.place(stage).await {
            return Ok(place);
        }
        if Instant::now() > deadline {
            let last = guest.look(stage).await.map_or_else(String::new, |vmi| vmi.data.to_string());
            let what = format!("{} has a pod", guest.name);
            return Err(Error::Late { what, seconds: MIGRATION_LIMIT.as_secs(), last });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Waits for the strike's own time, and strikes; how far the migration had come just before.
async fn hit(
    stage: &Arc<Stage>,
    strike: &Strike,
    number: u32,
    sight: &Sight,
    source: &Place,
) -> Result<(Moment, Blow), Error> {
    tokio::time::sleep(strike.delay).await;
    let view = sight.now();
    let blow = land(stage, strike, number, &view, &source.node).await?;
    Ok((view.moment(), blow))
}

/// Lets the fault last, and mends it.
async fn heal(stage: &Arc<Stage>, strike: &Strike, blow: Blow) -> Result<(), Error> {
    if blow.landed {
        tokio::time::sleep(strike.lasts).await;
    }
    mend(stage, blow.wound).await
}

/// Asks for the migration; none if it is refused, because the guest is dead already, say.
async fn ask(stage: &Stage, guest: &Guest, name: &str) -> Result<Option<String>, Error> {
    let migration: DynamicObject = serde_json::from_value(json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
        "metadata": {"name": name}, "spec": {"vmiName": guest.name},
    }))
    .map_err(|error| Error::Api { what: format!("make {name}"), source: kube::Error::SerdeError(error) })?;
    let deadline = Instant::now() + MIGRATION_LIMIT;
    loop {
        let api = stage.api(Kind::Migration);
        match api.create(&PostParams::default(), &migration).await {
            Ok(made) => return Ok(made.metadata.uid),
            // An answer that was lost on its way: it is there.
            Err(kube::Error::Api(status)) if status.code == 409 && status.reason == "AlreadyExists" => {
                if let Ok(Some(made)) = api.get_opt(name).await {
                    return Ok(made.metadata.uid);
                }
            }
            // Dead already, from a fault before the request. Whatever else is in its way passes.
            Err(kube::Error::Api(status)) if (400..500).contains(&status.code) && has_ended(stage, guest).await => {
                return Ok(None);
            }
            Err(source) if Instant::now() > deadline => {
                return Err(Error::Api { what: format!("ask for {name}"), source });
            }
            Err(_) => {}
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Whether the API says that nothing will run this guest any more.
async fn has_ended(stage: &Stage, guest: &Guest) -> bool {
    let vmi = guest.look(stage).await;
    vmi.is_some_and(|vmi| matches!(text(&vmi, "/status/phase").as_str(), "Failed" | "Succeeded"))
}

/// Listens until the guest is heard and the API says where it is, or until the API says that it has ended.
async fn listen(stage: &Stage, guest: &Guest, source: &Place, mended: SystemTime, evidence: &mut Evidence) {
    let short: String = source.uid.chars().filter(char::is_ascii_alphanumeric).take(8).collect();
    let deadline = Instant::now() + BEAT_LIMIT;
    // What came out before the migration's end may have been an instance's last.
    let from = SystemTime::now().max(mended);
    loop {
        let (count, last) = stage.witness.since(guest.station, from);
        let vmi = guest.look(stage).await;
        let at = |pointer| vmi.as_ref().map(|vmi| text(vmi, pointer)).unwrap_or_default();
        let (phase, node) = (at("/status/phase"), at("/status/nodeName"));
        evidence.beats = count >= ALIVE;
        evidence.told = match &last {
            Some(beat) if evidence.beats => {
                evidence.at_source = beat.port.starts_with(&format!("v{short}"));
                phase == "Running" && node == *beat.node
            }
            _ => matches!(phase.as_str(), "Failed" | "Succeeded"),
        };
        let late = Instant::now() > deadline;
        // A guest that is told to have ended must be silent for as long as a living one needs to be heard.
        let silent = from.elapsed().is_ok_and(|since| since >= SILENCE);
        if late || evidence.told && (evidence.beats || silent) {
            evidence.words = format!(
                "VMI {}, witness: {} beats since, last {last:?}",
                vmi.map_or_else(|| "not there".to_owned(), |vmi| vmi.data["status"].to_string()),
                count
            );
            return;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// No guest that runs is silent for so long.
const SILENCE: Duration = Duration::from_secs(2);
