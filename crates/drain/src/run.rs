//! `godwit drain`: the plan, carried out by evictions, and taken back when told to.

use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use godwit_api::VirtualMachineInstance;
use godwit_api::drain::{DrainPlan, PodOutcome};
use godwit_control::drain::{Manner, window};
use godwit_control::{Name, Stored};
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, DeleteParams, EvictParams, Preconditions};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::abort::{self, Before};
use crate::course::{ASK_AGAIN, Answer, Course, Standing, is_evacuation};
use crate::lines::Lines;
use crate::watch::{self, Facts};
use crate::{Error, code, read, show, words};

/// While it is taken back, what remains is looked at this often at least.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Taking back is given up after this long, and what remains is said.
const TAKE_BACK: Duration = Duration::from_secs(120);
/// What has been taken back is shown as it is when the watches tell it, or after this long.
const CATCH_UP: Duration = Duration::from_secs(5);
/// Evictions are answered within this time, or counted as not answered.
const PATIENCE: Duration = Duration::from_secs(35);

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Options {
    /// The nodes to be emptied.
    pub nodes: Vec<String>,
    /// Where KubeVirt is installed, if it need not be found.
    pub namespace: Option<String>,
    /// How to go about pods that are no VM's.
    pub manner: Manner,
    /// Take it back after this long; `None` never.
    pub timeout: Option<Duration>,
    /// Begin without asking, also when something will stay.
    pub yes: bool,
    /// So many VMs are on their way or in line at the same time; as many as the limits allow if not said.
    pub max_parallel: Option<usize>,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The nodes are empty.
    Drained,
    /// It was not begun, for something blocks it or nobody wanted it.
    NotBegun,
    /// Something stays; the rest has left, and the nodes are cordoned.
    Stays,
    /// It was taken back: nothing remains of it.
    TakenBack,
    /// It was to be taken back, and this remains.
    Remains(Vec<String>),
}

/// Empties nodes. `signals` gives one piece for each time that somebody wants it to end.
///
/// # Errors
/// What cannot be read before it begins, or a node that cannot be cordoned.
pub async fn run(client: &Client, options: &Options, signals: &mut mpsc::Receiver<()>) -> Result<Ending, Error> {
    let cluster = tokio::select! {
        read = read::cluster(client, options.namespace.as_deref()) => read?,
        Some(()) = signals.recv() => return Ok(not_begun()),
    };
    let plan = cluster.plan(&options.nodes, options.manner)?;
    tell!("{}", show::plan(&plan, show::width()).trim_end());
    let refused = plan
        .pods
        .iter()
        .any(|pod| pod.is(&PodOutcome::Block) && pod.reasons.iter().any(|why| why.contains("; use --")));
    if refused {
        tell!("\nnot begun: some pods go only if a flag says so");
        return Ok(Ending::NotBegun);
    }
    if !options.yes {
        tokio::select! {
            agreed = agreed(&plan) => if !agreed {
                return Ok(Ending::NotBegun);
            },
            Some(()) = signals.recv() => return Ok(not_begun()),
        }
    }
    tell!();
    let nodes = plan.nodes.clone();
    let mut before = Before {
        marked: cluster.world.vmis.iter().filter(|vmi| is_marked(vmi)).map(|vmi| vmi.key()).collect(),
        migrations: cluster.world.migrations.iter().map(|one| one.uid().to_owned()).collect(),
        cordoned: BTreeSet::new(),
    };
    if let Some(ending) = cordon(client, &nodes, &mut before, signals).await? {
        return Ok(ending);
    }
    let window = options.max_parallel.unwrap_or_else(|| window(&cluster.world, nodes.len()));
    drop(cluster);
    let drain =
        Drain { client, options, nodes: &nodes, before, begun: Instant::now(), lines: Lines::new(), plan: &plan };
    Ok(drain.carry_out(Course::new(&plan, options.manner, window), signals).await)
}

/// Somebody ended it before anything was changed.
fn not_begun() -> Ending {
    tell!("\ninterrupted: nothing has been changed");
    Ending::TakenBack
}

/// Somebody did not wait for these nodes to be opened again.
fn left_behind(nodes: &[String], before: &Before) -> Ending {
    let nodes = nodes.iter().filter(|node| !before.cordoned.contains(*node));
    let remains: Vec<String> = nodes.map(|node| format!("node {node} may be cordoned")).collect();
    tell!("not everything was taken back: {}", remains.join("; "));
    Ending::Remains(remains)
}

/// Cordons the nodes. How it ended, if somebody ended it meanwhile.
async fn cordon(
    client: &Client,
    nodes: &[String],
    before: &mut Before,
    signals: &mut mpsc::Receiver<()>,
) -> Result<Option<Ending>, Error> {
    for (index, node) in nodes.iter().enumerate() {
        // A write that is under way is waited for, or it would come after it has been taken back.
        let mut interrupted = false;
        let mut cordoning = std::pin::pin!(abort::cordon(client, node));
        let cordoned = loop {
            tokio::select! {
                cordoned = &mut cordoning => break cordoned,
                Some(()) = signals.recv() => {
                    if interrupted {
                        return Ok(Some(left_behind(nodes.get(..=index).unwrap_or_default(), before)));
                    }
                    tell!("interrupted: everything is taken back; once more ends at once");
                    interrupted = true;
                }
            }
        };
        let done = match &cordoned {
            Ok(false) => {
                tell!("node {node} is cordoned");
                index + 1
            }
            Ok(true) => {
                tell!("node {node} was cordoned already");
                before.cordoned.insert(node.clone());
                index + 1
            }
            Err(_) => index,
        };
        interrupted |= signals.try_recv().is_ok();
        if cordoned.is_ok() && !interrupted {
            continue;
        }
        let mut remains = Vec::new();
        tokio::select! {
            () = abort::uncordon_all(client, nodes.iter().take(done), before, &mut remains) => {}
            Some(()) = signals.recv() => return Ok(Some(left_behind(nodes.get(..done).unwrap_or_default(), before))),
        }
        if let Err(error) = cordoned {
            let why = [vec![words(&error)], remains].concat().join("; ");
            return Err(Error::Write { what: format!("cordon node {node}"), why });
        }
        if remains.is_empty() {
            tell!("taken back: nothing has been changed");
            return Ok(Some(Ending::TakenBack));
        }
        tell!("not everything could be taken back; what remains: {}", remains.join("; "));
        return Ok(Some(Ending::Remains(remains)));
    }
    Ok(None)
}

fn is_marked(vmi: &VirtualMachineInstance) -> bool {
    vmi.status.evacuation_node_name.is_some()
}

/// Whether to begin: somebody at a terminal is asked; otherwise only if nothing blocks.
async fn agreed(plan: &DrainPlan) -> bool {
    if !(std::io::stdin().is_terminal() && std::io::stdout().is_terminal()) {
        if plan.is_blocked() {
            tell!("\nnot begun: something blocks. With --yes the rest leaves all the same");
        }
        return !plan.is_blocked();
    }
    print!("\n{} [y/N] ", if plan.is_blocked() { "Something blocks. Move the rest?" } else { "Go on?" });
    let _ = std::io::stdout().flush();
    // In a thread of its own, which nobody waits for: the runtime would not end before somebody has pressed a key.
    let (tell, told) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let mut answer = String::new();
        let read = std::io::stdin().read_line(&mut answer);
        // Nobody waits for it any more when it was interrupted.
        let _ = tell.send(read.is_ok() && matches!(answer.trim(), "y" | "Y" | "yes"));
    });
    told.await.unwrap_or(false)
}

/// A drain that has begun.
struct Drain<'a> {
    client: &'a Client,
    options: &'a Options,
    nodes: &'a [String],
    before: Before,
    begun: Instant,
    lines: Lines,
    plan: &'a DrainPlan,
}

/// The answer to an eviction.
type Answered = (Name, Answer);

impl Drain<'_> {
    async fn carry_out(mut self, mut course: Course, signals: &mut mpsc::Receiver<()>) -> Ending {
        let (_watches, mut news, mut facts) = watch::begin(self.client, self.nodes);
        let mut evictions: JoinSet<Answered> = JoinSet::new();
        let deadline = self.options.timeout.map(|timeout| tokio::time::Instant::from_std(self.begun + timeout));
        let end = loop {
            if facts.are_complete() {
                let next = course.next(self.begun.elapsed(), &facts);
                self.show(&course, &facts);
                if next.left == 0 {
                    break Ending::Drained;
                }
                if !next.stuck.is_empty() && evictions.is_empty() && next.evict.is_empty() {
                    self.lines.end();
                    for why in &next.stuck {
                        tell!("stays: {why}");
                    }
                    tell!(
                        "{} cannot be emptied; what could leave has left, and no new pods come",
                        self.nodes.join(", ")
                    );
                    break Ending::Stays;
                }
                for (pod, uid) in next.evict {
                    evictions.spawn(evict(self.client.clone(), pod, uid));
                }
            }
            tokio::select! {
                piece = news.recv() => match piece {
                    Some(watch::News::Trouble(why)) => self.lines.say(&format!("the server does not tell: {why}")),
                    Some(piece) => {
                        facts.take(piece);
                        while let Ok(piece) = news.try_recv() {
                            facts.take(piece);
                        }
                    }
                    None => break self.take_back(&course, &mut facts, &mut news, &mut evictions, signals).await,
                },
                Some(Ok((pod, answer))) = evictions.join_next() => {
                    course.answered(&pod, answer, self.begun.elapsed(), &facts);
                }
                Some(()) = signals.recv() => {
                    self.lines.interrupted("interrupted: everything is taken back; once more ends at once");
                    break self.take_back(&course, &mut facts, &mut news, &mut evictions, signals).await;
                }
                () = until(deadline) => {
                    let after = self.options.timeout.unwrap_or_default().as_secs();
                    self.lines.say(&format!("not done after {after} s: everything is taken back"));
                    break self.take_back(&course, &mut facts, &mut news, &mut evictions, signals).await;
                }
                () = tokio::time::sleep(ASK_AGAIN) => {}
            }
        };
        self.lines.end();
        if end == Ending::Drained {
            tell!("{} drained in {}", self.nodes.join(", "), elapsed(self.begun));
        }
        end
    }

    fn show(&mut self, course: &Course, facts: &Facts) {
        let now = jiff::Timestamp::now();
        let mut left = 0;
        for vmi in &course.order {
            let standing = course.standing(vmi, facts);
            left += usize::from(!matches!(standing, Standing::Left(..) | Standing::Ended));
            self.lines.vm(vmi, &standing, now);
        }
        for (pod, why) in course
            .refusals(facts)
            .filter(|(pod, _)| facts.pods.get(*pod).is_some_and(|pod| godwit_control::vmi_of_pod(pod).is_none()))
        {
            self.lines.pod(pod, why);
        }
        let whole = self.plan.duration.as_ref().and_then(|whole| whole.milliseconds).map(Duration::from_millis);
        let begun = self.begun.elapsed();
        let rest = whole.and_then(|whole| whole.checked_sub(begun));
        self.lines.whole(left, self.plan.vms.len().max(course.order.len()), begun, rest);
    }

    /// Takes everything back, until nothing remains or somebody has enough of it.
    async fn take_back(
        &mut self,
        course: &Course,
        facts: &mut Facts,
        news: &mut mpsc::Receiver<watch::News>,
        evictions: &mut JoinSet<Answered>,
        signals: &mut mpsc::Receiver<()>,
    ) -> Ending {
        self.lines.taking_back();
        // What has been asked for is answered first, or a mark would come behind our back.
        let mut left = loop {
            tokio::select! {
                answered = evictions.join_next() => if answered.is_none() { break Vec::new() },
                Some(()) = signals.recv() => break vec!["evictions that have not been answered".to_owned()],
            }
        };
        let mut told: BTreeSet<String> = BTreeSet::new();
        let deadline = tokio::time::Instant::now() + TAKE_BACK;
        let mut since: Option<Instant> = None;
        if left.is_empty() {
            loop {
                let look = tokio::select! {
                    look = abort::take_back(self.client, self.nodes, &self.before) => look,
                    Some(()) = signals.recv() => {
                        left.push("what has not been looked at any more".to_owned());
                        break;
                    }
                };
                left = look.remains;
                self.show(course, facts);
                let clear = left.is_empty() && !look.touched;
                // The lines show what the watches have told so far.
                if clear && (!self.is_behind(facts) || since.get_or_insert_with(Instant::now).elapsed() > CATCH_UP) {
                    self.lines.end();
                    tell!("taken back: no VM is to leave, and {}", self.cordons());
                    return Ending::TakenBack;
                }
                for text in &left {
                    if told.insert(text.clone()) {
                        self.lines.say(text);
                    }
                }
                tokio::select! {
                    Some(piece) = news.recv(), if !look.touched => {
                        facts.take(piece);
                        while let Ok(piece) = news.try_recv() {
                            facts.take(piece);
                        }
                    }
                    () = tokio::time::sleep(LOOK_AGAIN) => {}
                    () = until(Some(deadline)) => break,
                    Some(()) = signals.recv() => break,
                }
            }
        }
        self.lines.end();
        tell!("not everything could be taken back; what remains:");
        for text in &left {
            tell!("  {text}");
        }
        Ending::Remains(left)
    }

    /// Whether something that has been cancelled goes on as far as the watches have told.
    fn is_behind(&self, facts: &Facts) -> bool {
        facts.migrations.values().any(|one| {
            is_evacuation(one, self.nodes)
                && !one.status.phase.is_final()
                && !self.before.migrations.contains(Stored::uid(one.as_ref()))
        })
    }

    fn cordons(&self) -> String {
        let stay: Vec<&str> = self.before.cordoned.iter().map(String::as_str).collect();
        match stay.as_slice() {
            [] => format!("{} may take pods again", self.nodes.join(", ")),
            stay => format!("what was cordoned before is ({})", stay.join(", ")),
        }
    }
}

async fn until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn elapsed(begun: Instant) -> String {
    show::milliseconds(u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX))
}

pub(crate) async fn evict(client: Client, pod: Name, uid: String) -> Answered {
    let api: Api<Pod> = Api::namespaced(client, &pod.namespace);
    let same = Preconditions { uid: Some(uid), resource_version: None };
    let delete = DeleteParams { preconditions: Some(same), ..DeleteParams::default() };
    let params = EvictParams { delete_options: Some(delete), ..EvictParams::default() };
    let answer = match tokio::time::timeout(PATIENCE, api.evict(&pod.name, &params)).await {
        Ok(Ok(_)) => Answer::Granted,
        Ok(Err(error)) => match code(&error) {
            // Gone, or another one by that name.
            Some(404 | 409) => Answer::Granted,
            // What comes by itself goes by itself: a budget, and whatever is wrong with the server. And no answer at all.
            Some(429 | 500..) | None => Answer::Refused(refusal(&error)),
            Some(_) if is_going(&error) => Answer::Refused(refusal(&error)),
            Some(_) => Answer::Denied(refusal(&error)),
        },
        Err(_) => Answer::Refused("the server has not answered in time".to_owned()),
    };
    (pod, answer)
}

/// Whether the namespace is being deleted: nothing can be made in it, not even an eviction, and its pods go all the same.
fn is_going(error: &kube::Error) -> bool {
    let kube::Error::Api(status) = error else { return false };
    let causes = status.details.iter().flat_map(|details| &details.causes);
    causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
}

/// What a refusal says, with the details that the message leaves out.
fn refusal(error: &kube::Error) -> String {
    let mut text = words(error);
    if let kube::Error::Api(status) = error
        && let Some(details) = &status.details
    {
        for cause in details.causes.iter().filter(|cause| !cause.message.is_empty()) {
            text = format!("{text} {}", cause.message);
        }
    }
    // The name of the webhook is for those who configure it.
    text.split_once("denied the request: ").map(|(_, why)| why.to_owned()).unwrap_or(text)
}
