//! Hands a guest's memory from one launcher of this node to another: as a descriptor, so that both map the same pages.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use godwit_launcher::client::Client;
use godwit_launcher::memory::GuestMemory;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

use crate::sockets::SocketDir;

/// How long a launcher may take to come to the socket and to deal with what is there.
const MEET_LIMIT: Duration = Duration::from_secs(10);

/// Memory that waits behind a socket for the launcher that shall have it. Dropping it ends the wait.
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
    let socket = name(uid, "in")?;
    let listener = dir.listen(&socket)?;
    let task = tokio::spawn(async move {
        if let Err(error) = meet(&listener, move |stream| memory.send(stream)).await {
            tracing::warn!(%error, "handing the source's memory to the target's launcher");
        }
    });
    Ok(Offered { socket, dir, task })
}
