//! What the target's handler answers on the control channel.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use godwit_launcher::client::Client;
use godwit_launcher::rpc::{DomainPhase, MigrationRole, State};
use tokio::sync::watch;

use crate::channel::{Answer, Request, TargetControl};
use crate::facts::{self, Launcher};

/// How long to wait for the time of the resume after the launcher has taken the go.
const RESUME_LIMIT: Duration = Duration::from_secs(5);

/// The launcher that receives, seen by the control channel.
pub struct TargetAnswers {
    /// UID of the migration.
    pub uid: String,
    /// The launcher.
    pub client: Client,
    /// Its states.
    pub launcher: watch::Receiver<Launcher>,
}

impl TargetControl for TargetAnswers {
    fn answer(self: Arc<Self>, request: Request) -> BoxFuture<'static, Answer> {
        Box::pin(async move {
            match request {
                Request::Clock => Answer::Time { now_us: jiff::Timestamp::now().as_microsecond() },
                Request::Go => self.go().await,
                Request::Abandon => match self.client.abandon(&self.uid).await {
                    Ok(_) => Answer::Abandoned,
                    Err(error) => Answer::NotYet { reason: error.to_string() },
                },
            }
        })
    }
}

impl TargetAnswers {
    async fn go(&self) -> Answer {
        match self.client.go(&self.uid).await {
            Ok(state) => match resumed(&state, &self.uid) {
                Some(resume_us) => Answer::Running { resume_us },
                None => self.wait_resumed().await,
            },
            Err(error) => {
                let last = self.launcher.borrow().clone();
                match last.last() {
                    // A guest that was gone with has ended by itself since; that is no loss.
                    Some(state) if let Some(resume_us) = resumed(state, &self.uid) => Answer::Running { resume_us },
                    Some(state) if matches!(state.phase, DomainPhase::Crashed | DomainPhase::Shutdown) => {
                        let reason = state.exit_reason.clone().unwrap_or_else(|| "QEMU has ended".into());
                        Answer::Lost { reason: format!("the target's QEMU is gone: {reason}") }
                    }
                    _ => Answer::NotYet { reason: error.to_string() },
                }
            }
        }
    }

    async fn wait_resumed(&self) -> Answer {
        let mut launcher = self.launcher.clone();
        let wait = launcher.wait_for(|l| l.last().is_some_and(|s| resumed(s, &self.uid).is_some()));
        match tokio::time::timeout(RESUME_LIMIT, wait).await {
            Ok(Ok(launcher)) => match launcher.last().and_then(|s| resumed(s, &self.uid)) {
                Some(resume_us) => Answer::Running { resume_us },
                None => Answer::NotYet { reason: "the guest has not resumed yet".into() },
            },
            _ => Answer::NotYet { reason: "the launcher has not reported that the guest runs".into() },
        }
    }
}

/// When the guest resumed in this launcher after migration `uid`.
fn resumed(state: &State, uid: &str) -> Option<i64> {
    facts::migration(state, uid, MigrationRole::Target).filter(|f| f.gone).and_then(|f| f.resume_us)
}
