//! Telling launchers until when their guests may run.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_launcher::client::Client;
use godwit_launcher::rpc::Refusal;
use tokio::task::JoinHandle;

use super::{Fence, enforce};

/// How long a launcher may take to hear it.
const LIMIT: Duration = Duration::from_secs(2);
/// Before one that has not heard is told again.
const AGAIN: Duration = Duration::from_millis(250);

/// Tells the launcher whose `sockets` volume is `folder`, and whose guest is called `guest`, each time that is later, until it is
/// dropped.
pub(crate) struct Telling(JoinHandle<()>);

impl Drop for Telling {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Telling {
    pub(crate) fn start(folder: PathBuf, fence: Fence, guest: String) -> Self {
        Self(tokio::spawn(tell(folder, fence, guest)))
    }
}

async fn tell(folder: PathBuf, fence: Fence, guest: String) {
    let client = Client::new(folder.join("launcher.sock")).with_timeout(LIMIT);
    let mut until = fence.subscribe();
    let (mut old, mut unmarked) = (false, false);
    loop {
        let now = *until.borrow_and_update();
        let mut told = true;
        if let Some(now) = now {
            match client.run_until(fence.order(now)).await {
                Ok(_) => {}
                // An older launcher. Its guest is this handler's to fence.
                Err(error) if error.refusal() == Some(Refusal::NotFound) => {
                    if !std::mem::replace(&mut old, true) {
                        tracing::info!(socket = %client.socket().display(), "the launcher is older and does not fence itself");
                    }
                }
                // It hangs, or is not there.
                Err(error) => {
                    tracing::debug!(%error, "a launcher was not told until when its guest may run");
                    told = false;
                }
            }
        }
        if now.is_some() && told {
            let marked = fence.mark(&folder, &guest).await;
            if let Err(error) = &marked
                && !unmarked
            {
                tracing::warn!(%error, guest, folder = %folder.display(), "cannot mark a guest as leased; trying again");
            }
            unmarked = marked.is_err();
            told = !unmarked;
        }
        let again = async { if told { std::future::pending().await } else { tokio::time::sleep(AGAIN).await } };
        tokio::select! {
            changed = until.changed() => if changed.is_err() { return },
            () = again => {}
        }
    }
}

/// The launchers that a handler finds when it starts, by what is on its node: the API may not show their pods for a while, and
/// their guests must not pay for that.
#[derive(Default)]
pub(crate) struct Adopted(Mutex<Found>);

#[derive(Default)]
struct Found {
    telling: Vec<Telling>,
    /// They are others' to tell.
    released: bool,
}

impl Adopted {
    fn lock(&self) -> MutexGuard<'_, Found> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells all whose guests are under this node's lease.
    pub(super) async fn find(&self, kubelet_root: &Path, fence: &Fence) {
        let root = kubelet_root.to_owned();
        let leased = tokio::task::spawn_blocking(move || enforce::leased(&root)).await.unwrap_or_default();
        let mut found = self.lock();
        if !found.released {
            let tell = |(folder, guest)| Telling::start(folder, fence.clone(), guest);
            found.telling.extend(leased.into_iter().map(tell));
        }
    }

    /// The API has shown which pods are here: those are told by whoever follows them, and what it does not show gets no more time.
    pub(crate) fn release(&self) {
        *self.lock() = Found { telling: Vec::new(), released: true };
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    use super::*;
    use crate::sockets::SocketDir;

    /// Waits until a launcher is told something, and answers.
    async fn hear(listener: &UnixListener) -> String {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut heard = Vec::new();
        while !heard.ends_with(b"}") {
            assert!(stream.read_buf(&mut heard).await.unwrap() > 0);
        }
        let state = serde_json::to_vec(&godwit_launcher::rpc::State::default()).unwrap();
        let head =
            format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", state.len());
        stream.write_all(&[head.as_bytes(), &state].concat()).await.unwrap();
        String::from_utf8(heard).unwrap()
    }

    #[tokio::test]
    async fn a_launcher_that_the_api_does_not_show_yet_is_told_until_it_does() {
        let root = tempfile::tempdir().unwrap();
        let volume = |uid: &str| {
            let folder = SocketDir::path_of(root.path(), uid);
            std::fs::create_dir_all(&folder).unwrap();
            (UnixListener::bind(folder.join("launcher.sock")).unwrap(), folder)
        };
        let ((leased, folder), _other) = (volume("a"), volume("b"));
        Fence::begin().mark(&folder, "default/vm").await.unwrap();
        let fence = Fence::begin();
        fence.adopted().find(root.path(), &fence).await;
        assert_eq!(fence.adopted().lock().telling.len(), 1, "nobody else's guest is under the lease");
        fence.answered(fence.now(), None, None);
        let heard = hear(&leased).await;
        assert!(heard.starts_with("PUT /v1/run-until "), "{heard}");
        fence.adopted().release();
        while fence.0.until.receiver_count() > 0 {
            tokio::task::yield_now().await;
        }
        fence.adopted().find(root.path(), &fence).await;
        assert!(fence.adopted().lock().telling.is_empty(), "the API was quicker");
    }
}
