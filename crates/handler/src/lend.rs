//! Hands open files to the pods of this node: a guest's memory, so that two launchers map the same pages, the images of disks that
//! come while a guest runs, and the connections of a migration.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use godwit_api::names::ATTACHMENT_SOCKET;
use godwit_launcher::client::Client;
use godwit_launcher::memory::GuestMemory;
use godwit_launcher::{attachment, descriptor};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

use crate::confine;
use crate::ownership::{self, Peer};
use crate::sockets::SocketDir;

/// How long a launcher may take to come to the socket and to deal with what is there.
const MEET_LIMIT: Duration = Duration::from_secs(10);

/// What waits behind a socket for the launcher that shall have it. Dropping it ends the wait.
pub struct Offered {
    /// The socket's name, for the order.
    pub socket: String,
    dir: Arc<SocketDir>,
    task: JoinHandle<()>,
}

impl Drop for Offered {
    fn drop(&mut self) {
        self.task.abort();
        self.dir.remove(&self.socket);
    }
}

fn name(uid: &str, end: &str) -> io::Result<String> {
    let name = format!("memory-{end}-{}.sock", uid.get(..8).unwrap_or(uid));
    SocketDir::is_name(&name).then_some(name).ok_or_else(|| io::Error::other("the migration's uid is no uid"))
}

/// Waits for the launcher and deals with it. The dealing blocks for no longer than the limit.
async fn meet<T: Send + 'static>(
    listener: &UnixListener,
    deal: impl FnOnce(&std::os::unix::net::UnixStream) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (stream, _) = tokio::time::timeout(MEET_LIMIT, listener.accept()).await??;
    let stream = stream.into_std()?;
    let dealt = tokio::task::spawn_blocking(move || {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(MEET_LIMIT))?;
        stream.set_write_timeout(Some(MEET_LIMIT))?;
        deal(&stream)
    });
    dealt.await.map_err(io::Error::other)?
}

/// Has the source's launcher hand its guest's memory over.
pub async fn borrow(client: &Client, dir: &SocketDir, uid: &str) -> Result<GuestMemory, String> {
    let socket = name(uid, "out").map_err(|e| e.to_string())?;
    let listener = dir.listen(&socket).map_err(|e| format!("cannot listen on {socket}: {e}"))?;
    let came = meet(&listener, GuestMemory::receive);
    let (ordered, came) = tokio::join!(client.lend_memory(uid, &socket), came);
    dir.remove(&socket);
    ordered.map_err(|e| e.to_string())?;
    came.map_err(|e| e.to_string())
}

/// Offers memory to the target's launcher.
pub fn offer(memory: GuestMemory, dir: Arc<SocketDir>, uid: &str) -> io::Result<Offered> {
    wait_behind(name(uid, "in")?, dir, move |stream| memory.send(stream))
}

/// Offers the image of a disk to a launcher; `number` tells several of one order apart.
pub fn offer_image(image: OwnedFd, dir: Arc<SocketDir>, number: usize) -> io::Result<Offered> {
    wait_behind(format!("disk-{number}.sock"), dir, move |stream| descriptor::send(image.as_fd(), stream))
}

fn wait_behind(
    socket: String,
    dir: Arc<SocketDir>,
    deal: impl FnOnce(&std::os::unix::net::UnixStream) -> io::Result<()> + Send + 'static,
) -> io::Result<Offered> {
    let listener = dir.listen(&socket)?;
    let offered = socket.clone();
    let task = tokio::spawn(async move {
        if let Err(error) = meet(&listener, deal).await {
            tracing::warn!(%error, socket, "handing something to a launcher");
        }
    });
    Ok(Offered { socket: offered, dir, task })
}

/// Hands a migration's connections over to a launcher, for these connections alone.
pub fn hand(connections: Vec<OwnedFd>, dir: Arc<SocketDir>) -> io::Result<Offered> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    connections.iter().try_for_each(confine::to_its_connection)?;
    let socket = format!("hand-{}.sock", NEXT.fetch_add(1, Ordering::Relaxed));
    wait_behind(socket, dir, move |stream| {
        connections.iter().try_for_each(|connection| descriptor::send(connection.as_fd(), stream))
    })
}

/// Gets the image of a volume from the attachment pod of this UID, which is on this node.
pub async fn image(kubelet_root: &Path, pod_uid: &str, volume: &str) -> io::Result<OwnedFd> {
    // It becomes a part of a path.
    if !SocketDir::is_name(pod_uid) {
        return Err(io::Error::other(format!("{pod_uid:?} is no pod's UID")));
    }
    let dir = SocketDir::open(SocketDir::path_of(kubelet_root, pod_uid))?;
    let volume = volume.to_owned();
    let asked = tokio::task::spawn_blocking(move || {
        let stream = std::os::unix::net::UnixStream::connect(dir.socket(ATTACHMENT_SOCKET)?.path())?;
        stream.set_read_timeout(Some(MEET_LIMIT))?;
        stream.set_write_timeout(Some(MEET_LIMIT))?;
        ownership::Pod::of(Peer::of(&stream)?, &dir)?.give_volume(&volume);
        attachment::ask(&stream, &volume)
    });
    asked.await.map_err(io::Error::other)?
}
