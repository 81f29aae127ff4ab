//! The dialling half's streams: memory and blocks, on their way out of QEMU's sockets and into the channels.

use std::sync::Arc;

use godwit_launcher::carry::depart;
use godwit_launcher::carry::pace::{self, Pace, Paced, Share};
use godwit_launcher::carry::pump::{self, Carried};
use tokio::net::UnixListener;
use tokio::sync::watch;

use crate::channel::{self, Dialled, StreamKey, Target};
use crate::facts::Launcher;
use crate::source_link::DIAL_LIMIT;

/// Carries QEMU's memory through this process. `begins` is called when QEMU comes.
pub async fn carry_memory(
    uid: String,
    listener: UnixListener,
    channels: Vec<Dialled>,
    launcher: watch::Receiver<Launcher>,
    carried: Arc<Carried>,
    begins: impl FnOnce(),
) {
    let limit = |launcher: &Launcher| pace::limit_of_post_copy(launcher.last(), &uid);
    match depart::carry_memory(listener, channels, launcher, limit, carried.clone(), begins).await {
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
