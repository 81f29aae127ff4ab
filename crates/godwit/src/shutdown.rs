//! How a process of the cluster is told to end.

use tokio::sync::watch;

/// Done when the sender says `true`.
pub async fn until(mut stopped: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is as good as stopped.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}
