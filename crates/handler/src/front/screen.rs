//! A guest's screen: QEMU's VNC on a unix socket in the launcher's folder, carried as it is. One at a time, as in KubeVirt.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::{Path, Query, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::sync::oneshot;

use super::{SCREEN, becomes, refuse, sockets};

/// The name of QEMU's socket.
const SOCKET: &str = godwit_launcher::plan::SCREEN;

/// The screens that are open on this node.
pub(super) struct Screens {
    kubelet_root: PathBuf,
    /// By pod; whoever drops one of these closes that screen.
    open: Mutex<BTreeMap<String, oneshot::Sender<()>>>,
}

impl Screens {
    pub(super) fn of(kubelet_root: PathBuf) -> Self {
        Self { kubelet_root, open: Mutex::default() }
    }

    /// The place of the only screen of this pod; none where somebody else has it and it is to be `preserved`. It is over when a newer
    /// one has come.
    fn take(&self, uid: &str, preserve: bool) -> Option<oneshot::Receiver<()>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, screen| !screen.is_closed());
        if preserve && open.contains_key(uid) {
            return None;
        }
        let (replaced, over) = oneshot::channel();
        open.insert(uid.to_owned(), replaced);
        Some(over)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Wish {
    preserve: bool,
}

pub(super) async fn open(
    State(screens): State<Arc<Screens>>,
    Path(uid): Path<String>,
    Query(wish): Query<Wish>,
    mut request: Request,
) -> Response {
    let dir = match sockets(&screens.kubelet_root, &uid) {
        Ok(dir) => dir,
        Err(refused) => return *refused,
    };
    let Some(upgrade) = request.extensions_mut().remove::<hyper::upgrade::OnUpgrade>() else {
        return refuse(StatusCode::BAD_REQUEST, format!("a screen needs a connection that can become {SCREEN}"));
    };
    let mut guest = match dir.connect(SOCKET).await {
        Ok(guest) => guest,
        Err(error) => return refuse(StatusCode::NOT_IMPLEMENTED, format!("the guest's screen: {error}")),
    };
    let Some(over) = screens.take(&uid, wish.preserve) else {
        return refuse(StatusCode::CONFLICT, "Active VNC connection. Request denied.");
    };
    tokio::spawn(async move {
        let Ok(client) = upgrade.await else { return };
        let mut client = TokioIo::new(client);
        tokio::select! {
            // Either end may go at any time.
            _ = tokio::io::copy_bidirectional(&mut client, &mut guest) => {}
            _ = over => {}
        }
    });
    becomes(SCREEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_screen_closes_the_older_one_unless_that_is_to_be_preserved() {
        let screens = Screens::of(PathBuf::new());
        let mut first = screens.take("a", true).unwrap();
        assert!(screens.take("a", true).is_none());
        assert!(screens.take("b", true).is_some());
        assert_eq!(first.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        let second = screens.take("a", false).unwrap();
        assert_eq!(first.try_recv(), Err(oneshot::error::TryRecvError::Closed));
        drop(second);
        assert!(screens.take("a", true).is_some(), "nobody looks any more");
    }
}
