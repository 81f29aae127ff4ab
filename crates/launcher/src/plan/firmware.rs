//! The firmware that a VMI asks for.

use super::{Error, Inputs, invalid};
use crate::persistent::PersistentState;
use godwit_api::vmi::DomainSpec;
use godwit_qemu::machine::{Boot, Efi};
use std::path::{Path, PathBuf};

/// Where distributions keep OVMF's code and its empty variables; the larger of the two sizes first.
const PLAIN: [(&str, &str); 3] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
];
/// The same that boots only what is signed, with Microsoft's keys.
const SECURE: [(&str, &str); 2] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd", "/usr/share/edk2/ovmf/OVMF_VARS.secboot.fd"),
];
/// The guest's variables, among its other files of this place.
const VARIABLES: &str = "efi-variables.fd";

/// EFI firmware where it is asked for; none is SeaBIOS.
pub(super) fn efi(inputs: &Inputs<'_>, boot: &Boot) -> Result<Option<Efi>, Error> {
    let bootloader = inputs.vmi.spec.domain.firmware.as_ref().and_then(|firmware| firmware.bootloader.as_ref());
    let Some(asked) = bootloader.and_then(|bootloader| bootloader.efi.as_ref()) else { return Ok(None) };
    if matches!(boot, Boot::Rom(_)) {
        return Err(invalid(
            "spec.domain.firmware: a kernelBoot that takes the firmware's place and efi exclude each other",
        ));
    }
    let secure = asked.is_secure();
    let places = if secure { &SECURE[..] } else { &PLAIN[..] };
    let there = |(code, variables): &&(&str, &str)| Path::new(code).is_file() && Path::new(variables).is_file();
    let Some((code, empty)) = places.iter().find(there) else {
        let kind = if secure { "EFI firmware with secure boot" } else { "EFI firmware" };
        return Err(invalid(format!("{kind} is not installed on this node (package ovmf; `make deps` installs it)")));
    };
    let kept = inputs.persistent.and_then(PersistentState::efi_variables);
    let variables = kept.unwrap_or_else(|| inputs.paths.ephemeral_disks.join(VARIABLES));
    provide(Path::new(empty), &variables)
        .map_err(|error| invalid(format!("making the EFI variables {}: {error}", variables.display())))?;
    Ok(Some(Efi { code: PathBuf::from(code), variables, secure }))
}

/// Makes the guest's own variables of the empty ones, unless it has some.
fn provide(empty: &Path, variables: &Path) -> std::io::Result<()> {
    if variables.exists() {
        return Ok(());
    }
    if let Some(folder) = variables.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let new = variables.with_extension("new");
    // Their bytes only: the empty ones may be read-only.
    std::fs::write(&new, std::fs::read(empty)?)?;
    std::fs::rename(new, variables)
}

/// System management mode: as asked for, and always for secure boot. None leaves it to QEMU.
pub(super) fn system_management(domain: &DomainSpec, efi: Option<&Efi>) -> Option<bool> {
    let asked = domain.features.as_ref().and_then(|features| features.smm.as_ref());
    match efi {
        Some(efi) if efi.secure => Some(true),
        _ => asked.map(|smm| smm.enabled.unwrap_or(true)),
    }
}
