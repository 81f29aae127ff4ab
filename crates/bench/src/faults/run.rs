//! One run: a guest is to move, something is done to it, and in the end it is judged.

use super::error::Error;
use super::guest::{ALIVE, DISK_BLOCKS, Guest, LOOK_EVERY, Place};
use super::judge::{Evidence, Outcome, answers, breaks_link, is_excused, judge, silences};
use super::plan::{Manner, Moment, Strike, Victim};
use super::sight::{Sight, View, departed};
use super::stage::{Carrier, Kind, Stage, text};
use super::strike::{Blow, cancel, land, mend};
use crate::witness::{Beat, complaint, longest_gap};
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
    if strike.manner != Manner::Disk {
        guest.dress(stage, strike.manner).await?;
    }
    let mut sight = Sight::open(stage, guest, source.clone());
    sight.until(BEAT_LIMIT, |view| view.source.qemu.is_some() && view.source.launcher.is_some()).await;

    let name = format!("{}-run-{number}", guest.name);
    let record = |uid: &Option<String>| uid.as_deref().is_some_and(|uid| departed(stage, &source, uid).is_some());
    let mut struck = None;
    let mut left_then = false;
    let mut cancelled = false;
    let uid = if strike.moment == Moment::Before {
        let (then, blow) = hit(stage, &strike, number, &sight, &source, &name).await?;
        struck = Some((then, blow.landed));
        let ask_and_cancel = async {
            let uid = ask(stage, guest, &name).await?;
            let cancelled = if uid.is_some() { cancel_later(stage, &strike, &name).await? } else { false };
            Ok::<_, Error>((uid, cancelled))
        };
        // It may be the API that cannot be asked before it is mended.
        let (asked, mended) = tokio::join!(ask_and_cancel, heal(stage, &strike, blow));
        mended?;
        let (uid, also) = asked?;
        cancelled = also;
        uid
    } else {
        ask(stage, guest, &name).await?
    };
    if let Some(uid) = &uid {
        sight.asked(&name, uid);
    }
    if uid.is_some() && strike.moment > Moment::Before {
        sight.until(MIGRATION_LIMIT, |view| view.moment() >= strike.moment).await;
        let strike_and_heal = async {
            let (then, blow) = hit(stage, &strike, number, &sight, &source, &name).await?;
            struck = Some((then, blow.landed));
            left_then = record(&uid);
            heal(stage, &strike, blow).await
        };
        let (struck, also) = tokio::join!(strike_and_heal, cancel_later(stage, &strike, &name));
        struck?;
        cancelled = also?;
    }
    let landed = struck.as_ref().is_some_and(|(_, landed)| *landed);
    let then = struck.map(|(then, _)| then).unwrap_or_default();
    let mended = SystemTime::now();

    // Where it was refused there is nothing to end.
    let over = uid.is_none() || sight.until(MIGRATION_LIMIT, View::is_over).await;
    let view = sight.now();
    // A migration cannot succeed otherwise; its source's pod, and the record in it, may have gone before it was looked at.
    let left = left_then || view.handed_over || view.phase == "Succeeded" || record(&uid);
    // How one that was withdrawn has ended may not have been seen.
    let follows = view.post_copy && !then.whole && !matches!(then.phase.as_str(), "Succeeded" | "Failed");
    let failed_before = view.post_copy && then.phase == "Failed";
    let target = view.target.place.as_ref().map(|place| place.node.as_str()).unwrap_or_default();
    let breaks = stage.broken_since(began, &source.node, target);
    let early = breaks.iter().any(|at| view.loaded_at.is_none_or(|loaded| *at <= loaded));
    let outdated = !gets_over_any_break(view.qemu_version.as_deref());
    let again = outdated && is_broken_again(&breaks, &view.recovered);
    let spent = view.spent && !breaks.is_empty();
    let mut evidence =
        Evidence { landed, left, follows, failed_before, early, again, spent, over, ..Evidence::default() };
    let ended = SystemTime::now().max(mended);
    listen(stage, guest, &source, uid.as_deref(), ended, &mut evidence).await;
    if !evidence.beats && !is_excused(&strike, &evidence) && stage.silent_since(began) >= FENCED_FROM {
        evidence.fenced = was_fenced(stage, guest).await;
    }
    let beats = stage.witness.beats(guest.station);
    evidence.complaint = complaint(&beats);
    let view = sight.now();
    let (outcome, broken) = judge(&strike, &evidence);
    if !broken.is_empty() {
        sight.keep_logs(kept);
    }
    let migration = match uid {
        None => "refused".to_owned(),
        Some(_) if evidence.fenced => format!("fenced, {} {}", view.phase, view.reason),
        Some(_) if cancelled => format!("cancelled, {} {}", view.phase, view.reason),
        Some(_) => format!("{} {}", view.phase, view.reason),
    };
    Ok(Report {
        number,
        strike,
        struck_at: landed.then(|| then.moment()),
        outcome,
        broken,
        took: began.elapsed(),
        gap: longest_gap(&beats, before),
        migration: migration.trim().to_owned(),
    })
}

/// Faults that were shorter, all together, fence nobody: a lease lasts twice as long.
const FENCED_FROM: Duration = Duration::from_secs(10);
/// How long the API may take to say that a guest was fenced: its node may have to come back first.
const FENCED_WITHIN: Duration = Duration::from_secs(30);

/// Whether the API says that the guest was fenced, soon.
pub async fn was_fenced(stage: &Stage, guest: &Guest) -> bool {
    let deadline = Instant::now() + FENCED_WITHIN;
    while !stage.was_fenced(&guest.name).await {
        if Instant::now() > deadline {
            return false;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    true
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

/// Cancels the migration, if that belongs to the strike; whether it did.
async fn cancel_later(stage: &Stage, strike: &Strike, request: &str) -> Result<bool, Error> {
    let Some(after) = strike.cancelled else { return Ok(false) };
    tokio::time::sleep(after).await;
    cancel(stage, request).await
}

/// Waits for the strike's own time, and strikes; what the migration looked like just before.
async fn hit(
    stage: &Arc<Stage>,
    strike: &Strike,
    number: u32,
    sight: &Sight,
    source: &Place,
    request: &str,
) -> Result<(View, Blow), Error> {
    tokio::time::sleep(strike.delay).await;
    let view = sight.now();
    if breaks_link(strike)
        && let Some(hit) = carrier(strike, &view, source)
    {
        stage.breaks(hit);
    }
    if silences(strike) {
        stage.silences(strike.lasts);
    }
    let blow = land(stage, strike, number, &view, &source.node, request).await?;
    Ok((view, blow))
}

/// What of that which carries memory a strike hits.
fn carrier(strike: &Strike, view: &View, source: &Place) -> Option<Carrier> {
    let target = view.target.place.as_ref().map(|place| place.node.clone());
    Some(match strike.victim {
        Victim::SourceHandler | Victim::SourceUplink => Carrier::Node(source.node.clone()),
        Victim::TargetHandler | Victim::TargetUplink => Carrier::Node(target?),
        Victim::Link => Carrier::Link(source.node.clone(), target?),
        _ => return None,
    })
}

/// Whether what carries memory was broken once more before it had gone on over another link.
fn is_broken_again(breaks: &[Instant], recovered: &[Instant]) -> bool {
    let goes_on_between = |first: &Instant, next: &Instant| recovered.iter().any(|at| first < at && at < next);
    breaks.windows(2).any(|pair| matches!(pair, [first, next] if !goes_on_between(first, next)))
}

/// QEMU since 8.2 (docs/hand-over.md, *When the link breaks in post-copy*).
fn gets_over_any_break(version: Option<&str>) -> bool {
    let mut numbers = version.unwrap_or_default().split('.').map_while(|number| number.parse::<u32>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (8, 2)
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
pub async fn has_ended(stage: &Stage, guest: &Guest) -> bool {
    let vmi = guest.look(stage).await;
    vmi.is_some_and(|vmi| matches!(text(&vmi, "/status/phase").as_str(), "Failed" | "Succeeded"))
}

/// Listens until the guest is heard and the API says where it is, or until the API says that it has ended. What came out of it
/// before `from`, the migration's end, may have been an instance's last.
async fn listen(
    stage: &Stage,
    guest: &Guest,
    source: &Place,
    migration: Option<&str>,
    from: SystemTime,
    evidence: &mut Evidence,
) {
    let short: String = source.uid.chars().filter(char::is_ascii_alphanumeric).take(8).collect();
    let deadline = Instant::now() + BEAT_LIMIT;
    loop {
        let heard = stage.witness.since(guest.station, from);
        let vmi = guest.look(stage).await;
        let at = |pointer| vmi.as_ref().map(|vmi| text(vmi, pointer)).unwrap_or_default();
        let (phase, node) = (at("/status/phase"), at("/status/nodeName"));
        evidence.beats = heard.beats >= ALIVE;
        evidence.told = match &heard.last {
            Some(beat) if evidence.beats => {
                evidence.at_source = beat.port.starts_with(&format!("v{short}"));
                phase == "Running" && node == *beat.node
            }
            _ => matches!(phase.as_str(), "Failed" | "Succeeded"),
        };
        // Each block once, those included whose write was under way.
        let read = |beats: (&Beat, &Beat)| beats.1.writes.wrapping_sub(beats.0.writes) > DISK_BLOCKS;
        evidence.unread = guest.disk && !heard.first.as_ref().zip(heard.last.as_ref()).is_some_and(read);
        evidence.cancelled = vmi.as_ref().and_then(|vmi| answer_to_cancellation(vmi, migration));
        let late = Instant::now() > deadline;
        // A guest that is told to have ended must be silent for as long as a living one needs to be heard.
        let silent = from.elapsed().is_ok_and(|since| since >= SILENCE);
        let lives = evidence.beats && !evidence.unread && answers(evidence);
        if late || evidence.told && (lives || !evidence.beats && silent) {
            evidence.words = format!(
                "VMI {}, witness: {} beats since, last {:?}",
                vmi.map_or_else(|| "not there".to_owned(), |vmi| vmi.data["status"].to_string()),
                heard.beats,
                heard.last
            );
            return;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What the VMI says came of the cancellation of this migration, if it was cancelled.
fn answer_to_cancellation(vmi: &DynamicObject, migration: Option<&str>) -> Option<String> {
    let state = vmi.data.pointer("/status/migrationState")?;
    if migration.is_none() || state["migrationUid"].as_str() != migration {
        return None;
    }
    let status = state["abortStatus"].as_str().unwrap_or_default();
    (state["abortRequested"] == true || !status.is_empty()).then(|| status.to_owned())
}

/// No guest that runs is silent for so long.
const SILENCE: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_break_counts_only_before_memory_goes_on() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!is_broken_again(&[], &[]));
        assert!(!is_broken_again(&[at(1)], &[]));
        assert!(is_broken_again(&[at(1), at(2)], &[]));
        assert!(is_broken_again(&[at(1), at(2)], &[at(3)]));
        assert!(!is_broken_again(&[at(1), at(4)], &[at(3), at(5)]));
        assert!(is_broken_again(&[at(1), at(4), at(5)], &[at(3)]));
    }

    #[test]
    fn which_qemu_gets_over_any_break() {
        for (version, survives) in [("7.2.22", false), ("8.1.5", false), ("8.2.0", true), ("10.0.2", true), ("", false)]
        {
            assert_eq!(gets_over_any_break(Some(version)), survives, "{version}");
        }
        assert!(!gets_over_any_break(None));
    }
}
