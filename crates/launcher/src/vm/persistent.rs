//! When what has come with the guest is what counts of its persistent state.

use super::{Refused, Stage, Vm, refused};
use crate::persistent::{Kept, PersistentState};
use crate::rpc::Refusal;
use std::io;
use std::os::unix::fs::FileExt;

/// What the claim has, or why it cannot be used.
pub(super) fn kept(state: io::Result<Option<PersistentState>>) -> Result<Option<PersistentState>, Refused> {
    state.map_err(|error| refused(Refusal::Failed, format!("the claim with the guest's persistent state: {error}")))
}

impl Vm {
    /// The TPM has all of its state before the guest runs; from then on the guest may change it.
    pub(super) fn keep_tpm(&mut self) {
        let Some(state) = self.persistent.as_mut().filter(|state| state.awaits(Kept::Tpm)) else { return };
        // The guest belongs here in any case; it is tried again.
        if let Err(error) = state.take_over(Kept::Tpm) {
            tracing::warn!(%error, "the claim cannot be told that the TPM's state has come here");
        }
    }

    /// What has come with the guest and is not said to count yet. The EFI variables are written when the guest begins to run: QEMU
    /// does that before its processors do anything. For one that came paused it is done here.
    pub(super) async fn keep_state(&mut self) {
        let paused = match &self.stage {
            Stage::Running(running) => running.is_paused(),
            Stage::Filling(filling) if !filling.is_paused() => false,
            _ => return,
        };
        let Some(state) = &self.persistent else { return };
        let variables = state.awaits(Kept::EfiVariables);
        if !variables && !state.awaits(Kept::Tpm) {
            return;
        }
        self.keep_tpm();
        let written = variables && (!paused || self.write_variables().await);
        let Some(state) = &mut self.persistent else { return };
        if written && let Err(error) = state.take_over(Kept::EfiVariables) {
            tracing::warn!(%error, "the claim cannot be told that the EFI variables have come here");
        }
        if !state.awaits(Kept::Tpm) && !state.awaits(Kept::EfiVariables) {
            let state = state.clone();
            tokio::task::spawn_blocking(move || {
                if let Err(error) = state.tidy() {
                    tracing::warn!(%error, "what the source had of the guest's persistent state stays on the claim");
                }
            });
        }
    }

    /// Writes the variables of a guest that stands still to their file. Says whether they are there: if not, they will be when it runs.
    async fn write_variables(&self) -> bool {
        let (Some(efi), Some(qemu)) = (&self.efi, self.stage.qemu()) else { return false };
        let copy = efi.variables.with_extension("arrived");
        let written = match qemu.save_efi_variables(efi, &copy).await {
            // Into the file that QEMU has open: it writes the same there, later.
            Ok(()) => std::fs::read(&copy).and_then(|bytes| {
                let file = std::fs::File::options().write(true).open(&efi.variables)?;
                file.write_all_at(&bytes, 0)?;
                file.sync_all()
            }),
            Err(error) => Err(io::Error::other(error)),
        };
        let _ = std::fs::remove_file(&copy);
        if let Err(error) = &written {
            tracing::warn!(%error, "the EFI variables of a paused guest are written when it runs");
        }
        written.is_ok()
    }

    /// The guest did not come here.
    pub(super) fn discard_state(&mut self) {
        let Some(state) = self.persistent.take() else { return };
        if let Err(error) = state.discard() {
            tracing::warn!(%error, "what has come of the guest's persistent state in vain stays on the claim");
        }
    }
}
