//! The guest's trusted platform module, a process beside QEMU.

use super::{Refused, Vm, refused};
use crate::persistent::PersistentState;
use crate::plan::{Plan, TPM_STATE};
use crate::rpc::Refusal;
use godwit_qemu::tpm::Tpm;

impl Vm {
    /// The module that QEMU connects to when it starts; it ends with QEMU.
    pub(super) fn start_tpm(&mut self, plan: &Plan) -> Result<(), Refused> {
        let Some(socket) = &plan.machine.tpm else { return Ok(()) };
        let kept = self.persistent.as_ref().and_then(PersistentState::tpm);
        let folder = kept.unwrap_or_else(|| self.paths.ephemeral_disks.join(TPM_STATE));
        let tpm = Tpm::start(&folder, socket).map_err(|error| refused(Refusal::Failed, error.to_string()))?;
        self.tpm = Some(tpm);
        Ok(())
    }

    /// A module that has ended on its own is worth a word: the guest and its next migration will only see that it fails.
    pub(super) fn look_at_tpm(&mut self) {
        let Some(ended) = self.tpm.as_ref().and_then(|tpm| tpm.process().ended()) else { return };
        self.tpm = None;
        if !ended.is_clean() {
            let how = match (ended.code, ended.signal) {
                (_, Some(signal)) => format!("signal {signal}"),
                (code, None) => format!("status {}", code.unwrap_or_default()),
            };
            let failure = format!(
                "the guest's TPM (swtpm) has ended ({how}): it fails from now on, and the guest cannot be moved until it was \
                 started anew"
            );
            tracing::error!("{failure}");
            self.now.tpm_failure = Some(failure);
        }
    }
}
