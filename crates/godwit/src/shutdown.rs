//! How a process of the cluster is told to end.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Done when the sender says `true`.
pub async fn until(mut stopped: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is as good as stopped.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// What ends when this process is asked to: by SIGTERM, or by SIGINT (Ctrl-C).
///
/// # Errors
/// Signals cannot be listened to.
pub fn asked() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
