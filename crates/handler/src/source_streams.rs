//! The dialling half's streams: memory and blocks, on their way out of QEMU's sockets and into the channels.

use std::sync::Arc;

use tokio::net::UnixListener;
use tokio::sync::watch;

use crate::channel::{self, Dialled, StreamKey, Target};
use crate::facts::Launcher;
use crate::pace::{self, Pace, Paced, Share};
use crate::pump::{self, Carried};
use crate::source_link::DIAL_LIMIT;

/// Carries QEMU's memory: QEMU opens its connections in their order, the main one first, and each gets the next channel. When
/// one breaks the others end with it. In post-copy a cap is kept here, since QEMU does not count what is waited for.
pub async fn carry_memory(
    uid: String,
    listener: UnixListener,
    channels: Vec<Dialled>,
    mut launcher: watch::Receiver<Launcher>,
    carried: Arc<Carried>,
) {
    let pace = Arc::new(Pace::new(pace::limit_of_post_copy(launcher.borrow_and_update().last(), &uid)));
    let result = async {
        let mut listener = Some(listener);
        let mut begun = false;
        let mut followed = true;
        let mut channels = channels.into_iter();
        // Ends the others with the first that breaks.
        let mut pumps = tokio::task::JoinSet::new();
        loop {
            if channels.len() == 0 {
                listener = None;
            }
            // One that QEMU has never opened is the one for pages that are waited for, where nobody did.
            if pumps.is_empty() && (begun || listener.is_none()) {
                return Ok::<(), std::io::Error>(());
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
                        let share = if begun { Share::Urgent } else { Share::Ordinary };
                        begun = true;
                        pumps.spawn(pump::pump(Paced::new(local, pace.clone(), share), channel, carried.clone()));
                    }
                }
                changed = launcher.changed(), if followed => {
                    followed = changed.is_ok();
                    pace.set(pace::limit_of_post_copy(launcher.borrow_and_update().last(), &uid));
                }
                Some(ended) = pumps.join_next() => ended.map_err(std::io::Error::other)??,
            }
        }
    };
    match result.await {
        Ok(()) => tracing::info!(migration = %uid, bytes = carried.total(), "memory stream at its end"),
        Err(error) => tracing::warn!(migration = %uid, bytes = carried.total(), %error, "memory stream broke"),
    }
}

/// One channel for each connection that QEMU opens: one a disk.
pub async fn carry_blocks(
    uid: String,
    listener: UnixListener,
    (target, port, key): (Target, u16, StreamKey),
    mut launcher: watch::Receiver<Launcher>,
    cap: Option<u64>,
    carried: Arc<Carried>,
) {
    let pace = Arc::new(Pace::new(cap));
    // Ends the connections with the listener.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let local = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((local, _)) => Paced::new(local, pace.clone(), Share::Ordinary),
                Err(_) => break,
            },
            Ok(()) = launcher.changed() => {
                pace.set(pace::share_of_disks(launcher.borrow_and_update().last(), &uid, cap));
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let (uid, target, key, carried) = (uid.clone(), target.clone(), key.clone(), carried.clone());
        connections.spawn(async move {
            match target.dial_stream(&key, (channel::BLOCKS, port), 0, DIAL_LIMIT).await {
                Ok(channel) => {
                    if let Err(error) = pump::pump(local, channel, carried).await {
                        tracing::warn!(migration = %uid, %error, "a disk's stream broke");
                    }
                }
                Err(error) => tracing::warn!(migration = %uid, %error, "a disk's stream cannot be opened"),
            }
        });
    }
}
