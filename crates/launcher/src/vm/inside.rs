//! What is asked of the guest agent, and when: facts every few seconds, and the right time after the guest stood still.

use super::{Stage, Vm};
use crate::agent;
use crate::plan::AGENT;
use crate::rpc::{DomainPhase, GuestAgentFacts};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Between two questions to the guest agent.
const ASK_EVERY: Duration = Duration::from_secs(5);
/// How long after a guest stood still its agent may take to set the clock, and between two tries. As KubeVirt has it.
const CLOCK_LIMIT: Duration = Duration::from_secs(60);
const CLOCK_EVERY: Duration = Duration::from_secs(1);

/// What came of a talk with the agent.
pub(super) enum Said {
    Facts(Box<GuestAgentFacts>),
    Clock(Result<i64, agent::Error>),
}

/// The way to the guest agent.
pub(super) struct Inside {
    /// The guest holds its end of the channel open.
    open: bool,
    /// Somebody talks to the agent; the channel carries one talk at a time.
    busy: bool,
    ask_at: Instant,
    /// The guest's clock is to be set, from the first time on and until the second.
    clock: Option<(Instant, Instant)>,
    /// By how many seconds the guest's clock is meant to differ from this host's.
    ahead_seconds: i64,
    said: (mpsc::Sender<Said>, mpsc::Receiver<Said>),
}

impl Default for Inside {
    fn default() -> Self {
        let ask_at = Instant::now();
        Self { open: false, busy: false, ask_at, clock: None, ahead_seconds: 0, said: mpsc::channel(1) }
    }
}

impl Inside {
    pub(super) fn clock_ahead(&mut self, seconds: i64) {
        self.ahead_seconds = seconds;
    }

    /// The guest runs again, and has missed some time.
    pub(super) fn stood_still(&mut self) {
        let now = Instant::now();
        self.clock = Some((now, now + CLOCK_LIMIT));
    }

    /// Something is to be asked as soon as possible.
    pub(super) fn is_due(&self) -> bool {
        self.open && !self.busy && self.clock.is_some_and(|(at, _)| at <= Instant::now())
    }

    pub(super) async fn next(&mut self) -> Said {
        match self.said.1.recv().await {
            Some(said) => said,
            // Not possible: the other end is kept beside this one.
            None => std::future::pending().await,
        }
    }
}

impl Vm {
    pub(super) fn agent_opened(&mut self, open: bool) {
        self.inside.open = open;
        self.inside.ask_at = Instant::now();
        if !open {
            self.now.guest_agent.connected = false;
        }
    }

    /// Begins a talk with the agent when one is due. Nobody waits for it: an agent may be slow, or say nothing at all.
    pub(super) fn ask_inside(&mut self) {
        let now = Instant::now();
        if let Some((_, end)) = self.inside.clock
            && end <= now
        {
            // Most guests without an agent keep time by themselves; one with an agent that does not answer is worth a word.
            if self.inside.open {
                tracing::warn!(
                    "the guest agent has not set the guest's clock, which may be late: the guest stood still"
                );
            }
            self.inside.clock = None;
        }
        let runs =
            matches!(self.stage, Stage::Running(_) | Stage::Filling(_)) && self.now.phase == DomainPhase::Running;
        if !runs || !self.inside.open || self.inside.busy {
            return;
        }
        let (socket, tell) = (self.paths.sockets.join(AGENT), self.inside.said.0.clone());
        if self.inside.is_due() {
            self.inside.busy = true;
            let ahead = self.inside.ahead_seconds;
            tokio::spawn(async move {
                let set = agent::set_clock(&socket, ahead).await;
                let said = Said::Clock(set.map(|()| jiff::Timestamp::now().as_microsecond()));
                // Nobody listens any more at the launcher's end.
                let _ = tell.send(said).await;
            });
        } else if self.inside.ask_at <= now {
            self.inside.busy = true;
            self.inside.ask_at = now + ASK_EVERY;
            tokio::spawn(async move {
                let facts = agent::ask(&socket).await;
                if let Err(error) = &facts {
                    tracing::debug!(%error, "asking the guest agent");
                }
                let _ = tell.send(Said::Facts(Box::new(facts.unwrap_or_default()))).await;
            });
        }
    }

    pub(super) fn said(&mut self, said: Said) {
        self.inside.busy = false;
        match said {
            Said::Facts(facts) => {
                let clock_set_us = self.now.guest_agent.clock_set_us;
                self.now.guest_agent = GuestAgentFacts { clock_set_us, ..*facts };
            }
            Said::Clock(Ok(at)) => {
                self.inside.clock = None;
                self.now.guest_agent.clock_set_us = Some(at);
            }
            Said::Clock(Err(agent::Error::Refused { text, unknown: true, .. })) => {
                tracing::info!(text, "the guest agent cannot set the guest's clock");
                self.inside.clock = None;
            }
            Said::Clock(Err(error)) => {
                tracing::debug!(%error, "setting the guest's clock");
                if let Some((at, _)) = &mut self.inside.clock {
                    *at = Instant::now() + CLOCK_EVERY;
                }
            }
        }
    }
}
