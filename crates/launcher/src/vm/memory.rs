//! Memory that two launchers of one node have in common while a guest changes from one to the other.

use super::migration::check_name;
use super::{Refused, Stage, Vm, refused};
use crate::rpc::{LendOrder, Refusal};
use godwit_qemu::machine::Machine;
use godwit_qemu::memory::GuestMemory;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// How long the other side of a socket may take; it waits there already.
const HANDOVER_LIMIT: Duration = Duration::from_secs(5);

/// New memory of this kind, where that is wanted. A guest without it is better than none.
pub(super) fn shareable(wanted: bool, machine: &Machine) -> Option<GuestMemory> {
    let memory = wanted.then(|| GuestMemory::new(machine.memory_mib))?;
    memory.inspect_err(|error| tracing::warn!(%error, "memory that could be handed on cannot be had")).ok()
}

impl Vm {
    /// Hands the guest's memory to the handler.
    pub(super) async fn lend(&mut self, order: &LendOrder) -> Result<(), Refused> {
        check_name(&order.socket)?;
        let Stage::Running(running) = &self.stage else {
            return Err(refused(Refusal::Conflict, "no guest runs here whose memory could be handed on"));
        };
        let Some(memory) = running.qemu().shared_memory().cloned() else {
            return Err(refused(Refusal::Unsupported, "this guest's memory is its QEMU's own"));
        };
        let path = self.paths.sockets.join(&order.socket);
        let sent = meet(path, move |stream| memory.send(stream)).await;
        sent.map_err(|error| refused(Refusal::Failed, format!("handing the guest's memory on: {error}")))
    }

    /// The source's own memory, if it can be had; otherwise it is copied.
    pub(super) async fn borrow_memory(&self, socket: Option<&str>, machine: &Machine) -> Option<GuestMemory> {
        let socket = socket.filter(|socket| check_name(socket).is_ok())?;
        let came = meet(self.paths.sockets.join(socket), GuestMemory::receive).await;
        let memory =
            came.inspect_err(|error| tracing::warn!(%error, "the source's memory does not come; it is copied"));
        let memory = memory.ok()?;
        let fits = memory.bytes() == machine.memory_mib.saturating_mul(1 << 20);
        if !fits {
            tracing::warn!(
                bytes = memory.bytes(),
                "the source's memory is not as large as this machine's; it is copied"
            );
        }
        fits.then_some(memory)
    }
}

/// Connects to whoever waits behind a socket, and deals with them.
pub(crate) async fn meet<T: Send + 'static>(
    path: PathBuf,
    deal: impl FnOnce(&UnixStream) -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    let met = tokio::task::spawn_blocking(move || {
        let stream = UnixStream::connect(&path)?;
        stream.set_read_timeout(Some(HANDOVER_LIMIT))?;
        stream.set_write_timeout(Some(HANDOVER_LIMIT))?;
        deal(&stream)
    });
    met.await.map_err(std::io::Error::other)?
}
