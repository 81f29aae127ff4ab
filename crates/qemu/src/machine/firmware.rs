//! EFI firmware and the trusted platform module.

use super::{Arguments, Error, path_value};
use std::path::{Path, PathBuf};

/// EFI firmware (OVMF): code that is only read, and a store of variables that is this guest's own.
///
/// Both are flash chips for the guest. Their content goes with the guest when it moves; QEMU writes the variables to the file at
/// the target as soon as the guest runs there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Efi {
    /// The code.
    pub code: PathBuf,
    /// The variables.
    pub variables: PathBuf,
    /// Code and variables are of the kind that only boots what is signed, and only the firmware itself writes to its flash.
    pub secure: bool,
}

const CODE: &str = "firmware-code";
const VARIABLES: &str = "firmware-variables";

impl Efi {
    /// What `-machine` is told, beginning with a comma.
    pub(super) fn machine_options(&self) -> String {
        format!(",pflash0={CODE},pflash1={VARIABLES}")
    }

    pub(super) fn arguments(&self, out: &mut Arguments) -> Result<(), Error> {
        // The code is shared with other guests, nobody writes to it: a lock would only be in the way.
        let chip = |node: &str, path: &Path, how: &str| {
            Ok::<_, Error>(format!(
                "driver=raw,node-name={node},read-only={how},file.driver=file,file.filename={}",
                path_value(path)?
            ))
        };
        out.pair("-blockdev", chip(CODE, &self.code, "on")? + ",file.locking=off");
        out.pair("-blockdev", chip(VARIABLES, &self.variables, "off")?);
        if self.secure {
            out.pair("-global", "driver=cfi.pflash01,property=secure,value=on");
        }
        Ok(())
    }
}

/// A TPM 2.0 whose control socket (`swtpm`'s) is at this path.
pub(super) fn tpm_arguments(socket: &Path, out: &mut Arguments) -> Result<(), Error> {
    out.pair("-chardev", format!("socket,id=tpm-control,path={}", path_value(socket)?));
    out.pair("-tpmdev", "emulator,id=tpm-backend,chardev=tpm-control");
    out.pair("-device", "tpm-crb,id=tpm0,tpmdev=tpm-backend");
    Ok(())
}
