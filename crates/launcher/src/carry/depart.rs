//! The sending end: connections that QEMU opens, each into the next one that leads to the other end.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::pace::{Pace, Paced, Share};
use super::pump::{Carried, pump};

/// Carries QEMU's memory: QEMU opens its connections in their order, the main one first, and each gets the next channel. When
/// one breaks the others end with it. In post-copy a cap is kept here, since QEMU does not count what is waited for: `limit` tells
/// it, in bytes a second, by what `states` says. `begins` is called when QEMU opens the first.
///
/// # Errors
/// The first error of any of them.
pub async fn carry_memory<C, T>(
    listener: UnixListener,
    channels: Vec<C>,
    mut states: watch::Receiver<T>,
    limit: impl Fn(&T) -> Option<u64>,
    carried: Arc<Carried>,
    begins: impl FnOnce(),
) -> io::Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let pace = Arc::new(Pace::new(limit(&states.borrow_and_update())));
    let mut listener = Some(listener);
    let mut begins = Some(begins);
    let mut followed = true;
    let mut channels = channels.into_iter();
    // Ends the others with the first that breaks.
    let mut pumps = JoinSet::new();
    loop {
        if channels.len() == 0 {
            listener = None;
        }
        // One that QEMU has never opened is the one for pages that are waited for, where nobody did.
        if pumps.is_empty() && (begins.is_none() || listener.is_none()) {
            return Ok(());
        }
        let accepted = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            accepted = accepted => {
                if let (local, Some(channel)) = (accepted?.0, channels.next()) {
                    let share = if begins.is_none() { Share::Urgent } else { Share::Ordinary };
                    if let Some(begins) = begins.take() {
                        begins();
                    }
                    pumps.spawn(pump(Paced::new(local, pace.clone(), share), channel, carried.clone()));
                }
            }
            changed = states.changed(), if followed => {
                followed = changed.is_ok();
                pace.set(limit(&states.borrow_and_update()));
            }
            Some(ended) = pumps.join_next() => ended.map_err(io::Error::other)??,
        }
    }
}
