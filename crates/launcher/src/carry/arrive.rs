//! The receiving end: connections that lead to the other end, each into one of QEMU's.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::pump::{Carried, prepare_local, pump};
use crate::rpc::Transport;

/// What the connections of one link of a memory stream know of each other.
#[derive(Debug, Default)]
pub struct Arrivals {
    /// The main one has been connected to QEMU.
    main: watch::Sender<bool>,
    /// One of them has broken.
    broken: watch::Sender<bool>,
}

/// How a connection ended that did not break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was dialled ahead in vain: it has said nothing, and may be dialled again.
    Unused,
    /// It is at its end.
    Over,
}

impl Arrivals {
    /// Carries connection `number` into QEMU, which `connect` reaches. If one breaks the others end with it: a QEMU that waits for
    /// the page that it would have brought must not wait for ever.
    ///
    /// # Errors
    /// When it breaks, or another one has.
    pub async fn carry<S>(
        &self,
        (number, transport): (u8, Transport),
        mut stream: S,
        connect: impl Future<Output = io::Result<UnixStream>>,
        carried: Arc<Carried>,
    ) -> io::Result<Ended>
    where
        S: AsyncBufRead + AsyncWrite + Unpin,
    {
        let mut broken = self.broken.subscribe();
        let mut main = self.main.subscribe();
        let work = async {
            let begins = async {
                let first = stream.fill_buf();
                if waits_for_a_byte(number, transport) {
                    return first.await.map(|first| !first.is_empty());
                }
                tokio::select! {
                    first = first => first.map(|first| !first.is_empty()),
                    _ = main.wait_for(|connected| *connected) => Ok(true),
                }
            };
            if !matches!(begins.await, Ok(true)) {
                return Ok(Ended::Unused);
            }
            // Before 8.0 it takes its first connection for the main one.
            if number > 0 {
                let _ = main.wait_for(|connected| *connected).await;
            }
            let local = connect.await?;
            prepare_local(&local)?;
            if number == 0 {
                self.main.send_replace(true);
            }
            pump(local, stream, carried).await.map(|()| Ended::Over)
        };
        let result = tokio::select! {
            result = work => result,
            _ = broken.wait_for(|broken| *broken) => {
                Err(io::Error::new(io::ErrorKind::ConnectionAborted, "another connection of this memory stream broke"))
            }
        };
        if result.is_err() {
            self.broken.send_replace(true);
        }
        result
    }
}

/// QEMU reads the first bytes of its main connection and of a channel before it does anything else, so there have to be some. The
/// connection for missing pages has to be there before: a target that needs one while it loads devices does nothing else until
/// the page has come over it.
fn waits_for_a_byte(number: u8, transport: Transport) -> bool {
    number == 0 || !transport.preempt
}
