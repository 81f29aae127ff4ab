//! Following one launcher over its socket.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use godwit_launcher::client::Client;
use godwit_launcher::rpc::{DomainPhase, State};
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::facts::{self, Launcher};
use crate::fence::Fence;
use crate::fence::tell::Telling;
use crate::ownership::Peer;
use crate::sockets::SocketDir;

/// Between two looks for the socket of a launcher that has just been started.
const SOON: Duration = Duration::from_millis(15);
/// The same when it is not that new any more, or has ended.
const LATER: Duration = Duration::from_millis(250);
/// How long a launcher counts as just started.
const NEW: Duration = Duration::from_secs(20);

/// A launcher, its latest state, and whoever is to be woken by a change of it.
pub struct Follower {
    /// For orders.
    pub client: Client,
    /// The folder of its sockets, as the node sees it.
    pub folder: PathBuf,
    states: watch::Sender<Launcher>,
    pid: Arc<AtomicU32>,
    task: JoinHandle<()>,
    _telling: Telling,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Follower {
    /// Begins to follow the launcher whose `sockets` volume is `folder`; `wake` is notified on each change. It is told until when
    /// its guest, called `guest`, may run.
    #[must_use]
    pub fn start(folder: PathBuf, wake: Arc<Notify>, fence: Fence, guest: String) -> Self {
        let (states, _) = watch::channel(Launcher::Waiting);
        let client = Client::new(folder.join("launcher.sock"));
        let pid = Arc::new(AtomicU32::new(0));
        let task =
            tokio::spawn(follow(folder.clone(), client.clone(), states.clone(), pid.clone(), wake, fence.clone()));
        let telling = Telling::start(folder.clone(), fence, guest);
        Self { client, folder, states, pid, task, _telling: telling }
    }

    /// The latest.
    #[must_use]
    pub fn now(&self) -> Launcher {
        self.states.borrow().clone()
    }

    /// To wait for changes.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Launcher> {
        self.states.subscribe()
    }

    /// Takes a state that came as the answer to an order, so that the next decision knows that it was given. Where the
    /// stream has told of it already, the stream is the newer one.
    pub fn learn(&self, state: State) {
        self.states.send_if_modified(|launcher| {
            let known = launcher.last().is_some_and(|old| {
                let migration = |s: &State| s.migration.as_ref().map(|m| (m.uid.clone(), m.role));
                old.phase != DomainPhase::Undefined && migration(old) == migration(&state)
            });
            if known || matches!(launcher, Launcher::Gone(_)) {
                return false;
            }
            *launcher = Launcher::Answers(Box::new(state));
            true
        });
    }

    /// The launcher's process id as this node counts, 0 before it answered.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.load(Ordering::Acquire)
    }
}

async fn follow(
    folder: PathBuf,
    client: Client,
    states: watch::Sender<Launcher>,
    pid: Arc<AtomicU32>,
    wake: Arc<Notify>,
    fence: Fence,
) {
    let began = Instant::now();
    loop {
        let peer = peer(&folder).await.ok().flatten();
        if let Some(peer) = peer {
            fence.met().note(&folder, peer);
        }
        if let Some(peer) = peer
            && let Ok(mut watch) = client.watch().await
        {
            pid.store(peer, Ordering::Release);
            loop {
                match watch.next().await {
                    Ok(Some(state)) => {
                        states.send_replace(Launcher::Answers(Box::new(state)));
                        wake.notify_one();
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::info!(socket = %client.socket().display(), %error, "launcher's stream ended");
                        break;
                    }
                }
            }
            // One that was killed right after it had written down that its guest has left could not tell it any more.
            let recorded = written_down(&folder);
            let gone = states.send_if_modified(|launcher| match launcher {
                Launcher::Answers(state) => {
                    let told = state.fenced || state.migration.as_ref().is_some_and(facts::has_left);
                    let last = recorded.filter(|_| !told).map(|last| after(state, last));
                    let last = last.unwrap_or_else(|| (**state).clone());
                    *launcher = Launcher::Gone(Box::new(last));
                    true
                }
                _ => false,
            });
            if gone {
                wake.notify_one();
            }
        }
        let waiting = matches!(*states.borrow(), Launcher::Waiting);
        if waiting && let Some(state) = written_down(&folder) {
            states.send_replace(Launcher::Gone(Box::new(state)));
            wake.notify_one();
        }
        let new = began.elapsed() < NEW && waiting;
        tokio::time::sleep(if new { SOON } else { LATER }).await;
    }
}

/// The `ephemeral-disks` volume of the pod with this `sockets` volume.
pub(crate) fn disks_of(sockets: &Path) -> Option<PathBuf> {
    Some(sockets.parent()?.join("ephemeral-disks"))
}

/// What a launcher that is no more has written down: about its guest's departure, as the go may still have to be given, or that
/// it was fenced.
fn written_down(sockets: &Path) -> Option<State> {
    let disks = disks_of(sockets)?;
    if let Some(facts) = godwit_launcher::record::read_departed(&disks).ok()? {
        return Some(State { phase: DomainPhase::MigratedAway, migration: Some(facts), ..State::default() });
    }
    let fenced = godwit_launcher::fence::read(&disks)?;
    Some(State { phase: DomainPhase::Crashed, fenced: true, exit_reason: Some(fenced.reason), ..State::default() })
}

/// The state that was written down, with what else was known of a guest that was fenced: its migration ended with it.
fn after(known: &State, last: State) -> State {
    if last.fenced {
        let (fenced, phase, exit_reason) = (true, last.phase, last.exit_reason);
        return State { fenced, phase, exit_reason, ..known.clone() };
    }
    last
}

/// Who listens on the launcher's socket, if anybody does.
///
/// # Errors
/// When that cannot be told: this process has too many open files, or the launcher stands still and its queue of connections is
/// full.
pub(crate) async fn peer(folder: &Path) -> io::Result<Option<u32>> {
    use io::ErrorKind::{ConnectionRefused, NotADirectory, NotFound};
    match listener(folder).await {
        Ok(pid) => Ok(Some(pid)),
        Err(error) if matches!(error.kind(), NotFound | NotADirectory | ConnectionRefused) => Ok(None),
        Err(error) => Err(error),
    }
}

async fn listener(folder: &Path) -> io::Result<u32> {
    let stream: UnixStream = SocketDir::open(folder.to_owned())?.connect("launcher.sock").await?;
    Ok(Peer::of(&stream)?.pid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_launcher::record::Record;
    use godwit_launcher::rpc::{MigrationFacts, MigrationRole};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;
    use tokio::sync::oneshot;

    /// Answers one watch with one state, and dies when told.
    async fn die_after(listener: UnixListener, state: State, die: oneshot::Receiver<()>) {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            // Whoever only looks who listens here sends nothing.
            if stream.read(&mut [0; 1024]).await.is_ok_and(|length| length > 0) {
                let mut answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n\r\n".to_vec();
                answer.extend(serde_json::to_vec(&state).unwrap());
                answer.push(b'\n');
                stream.write_all(&answer).await.unwrap();
                let _ = die.await;
                return;
            }
        }
    }

    #[tokio::test]
    async fn nobody_listens_only_where_the_socket_says_so() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(peer(&folder.path().join("none")).await.unwrap(), None);
        assert_eq!(peer(folder.path()).await.unwrap(), None);
        let full = crate::testing::FullSocket::listen(folder.path());
        assert!(peer(folder.path()).await.is_err(), "it listens, and stands still");
        drop(full);
        assert_eq!(peer(folder.path()).await.unwrap(), None, "it has ended and left its socket");
        let _listener = UnixListener::bind(folder.path().join("second")).unwrap();
        std::fs::rename(folder.path().join("second"), folder.path().join("launcher.sock")).unwrap();
        assert_eq!(peer(folder.path()).await.unwrap(), Some(std::process::id()));
    }

    #[tokio::test]
    async fn what_a_killed_launcher_has_written_down_counts_as_told() {
        let pod = tempfile::tempdir().unwrap();
        let (sockets, disks) = (pod.path().join("sockets"), pod.path().join("ephemeral-disks"));
        std::fs::create_dir_all(&sockets).unwrap();
        let mut record = Record::prepare(&disks).unwrap();
        let sent = MigrationFacts { status: "device".into(), ..MigrationFacts::new("mig", MigrationRole::Source) };
        let state = State { phase: DomainPhase::Running, migration: Some(sent.clone()), ..State::default() };
        let listener = UnixListener::bind(sockets.join("launcher.sock")).unwrap();
        let (kill, die) = oneshot::channel();
        let launcher = tokio::spawn(die_after(listener, state, die));
        let follower = Follower::start(sockets, Arc::new(Notify::new()), Fence::begin(), "default/vm".into());
        let mut states = follower.subscribe();
        states.wait_for(|launcher| matches!(launcher, Launcher::Answers(_))).await.unwrap();

        record.write(&MigrationFacts { status: "completed".into(), handed_over: true, ..sent }).unwrap();
        kill.send(()).unwrap();
        launcher.await.unwrap();
        let gone = states.wait_for(|launcher| matches!(launcher, Launcher::Gone(_))).await.unwrap().clone();
        assert!(gone.last().and_then(|s| s.migration.as_ref()).is_some_and(facts::has_left), "{gone:?}");
    }
}
