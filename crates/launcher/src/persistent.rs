//! What of a guest outlives its pods: the TPM's state and the EFI variables, on a claim.
//!
//! Each place where the guest has been has a folder of its own on the claim, and `current.json` says in which of them the state
//! is. A target fills its folder while the source still writes to its own, also where both see the same claim, and the
//! pointer changes when the guest is the target's. So a migration that comes to nothing has touched nothing.

use crate::rpc::Paths;
use godwit_api::VirtualMachineInstance;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const POINTER: &str = "current.json";
const TPM: &str = "tpm";
const EFI_VARIABLES: &str = "efi-variables.fd";

/// Which folders have the state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Pointer {
    #[serde(skip_serializing_if = "Option::is_none")]
    tpm: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    efi_variables: Option<String>,
}

/// One of the two things that are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// The TPM's state: a folder.
    Tpm,
    /// The EFI variables: a file.
    EfiVariables,
}

impl Kept {
    const ALL: [Kept; 2] = [Kept::Tpm, Kept::EfiVariables];

    fn is_wanted(self, vmi: &VirtualMachineInstance) -> bool {
        match self {
            Kept::Tpm => vmi.spec.domain.has_persistent_tpm(),
            Kept::EfiVariables => vmi.spec.domain.has_persistent_efi(),
        }
    }
}

impl Pointer {
    fn of(&mut self, kept: Kept) -> &mut Option<String> {
        match kept {
            Kept::Tpm => &mut self.tpm,
            Kept::EfiVariables => &mut self.efi_variables,
        }
    }

    fn read(root: &Path) -> io::Result<Pointer> {
        match std::fs::read(root.join(POINTER)) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Pointer::default()),
            Err(error) => Err(error),
        }
    }

    /// Replaces the pointer in one step.
    fn write(&self, root: &Path) -> io::Result<()> {
        let new = root.join(format!("{POINTER}.new"));
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_data()?;
        std::fs::rename(new, root.join(POINTER))
    }
}

/// The state of this place's guest on its claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PersistentState {
    root: PathBuf,
    /// This place's folder.
    own: String,
    /// Where each thing of this place's is, and whether that is what counts.
    tpm: Option<(String, bool)>,
    efi_variables: Option<(String, bool)>,
}

impl PersistentState {
    /// What the guest left when it last ran. `None`: it keeps nothing.
    pub fn resume(paths: &Paths, vmi: &VirtualMachineInstance) -> io::Result<Option<PersistentState>> {
        let Some(mut state) = Self::of(paths, vmi, vmi.uid())? else { return Ok(None) };
        let root = state.root.clone();
        let mut pointer = Pointer::read(&root)?;
        // A claim that the state has just come to, and whose target could not say so any more.
        let only = match state.folders()?.as_slice() {
            [one] => Some(one.clone()),
            _ => None,
        };
        let before = pointer.clone();
        for kept in Kept::ALL.into_iter().filter(|kept| kept.is_wanted(vmi)) {
            let folder = pointer.of(kept).get_or_insert_with(|| only.clone().unwrap_or_else(|| state.own.clone()));
            *state.place(kept) = Some((folder.clone(), true));
        }
        for folder in [&state.tpm, &state.efi_variables].into_iter().flatten() {
            std::fs::create_dir_all(root.join(&folder.0))?;
        }
        if pointer != before {
            pointer.write(&root)?;
        }
        // The guest starts: nothing of an earlier one is to be resumed.
        if let Some(tpm) = state.tpm() {
            remove_if_there(&tpm.join("tpm2-00.volatilestate"))?;
        }
        state.tidy()?;
        Ok(Some(state))
    }

    /// An empty place for what comes with a migration.
    pub fn receive(
        paths: &Paths,
        vmi: &VirtualMachineInstance,
        migration: &str,
    ) -> io::Result<Option<PersistentState>> {
        let Some(mut state) = Self::of(paths, vmi, migration)? else { return Ok(None) };
        let folder = state.root.join(&state.own);
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir(&folder)?;
        for kept in Kept::ALL.into_iter().filter(|kept| kept.is_wanted(vmi)) {
            *state.place(kept) = Some((state.own.clone(), false));
        }
        Ok(Some(state))
    }

    fn of(paths: &Paths, vmi: &VirtualMachineInstance, own: &str) -> io::Result<Option<PersistentState>> {
        if !vmi.spec.domain.has_persistent_state() {
            return Ok(None);
        }
        let root = paths.persistent_state.clone();
        if !root.is_dir() {
            let message = format!("the pod has no volume at {} for what the guest is to keep", root.display());
            return Err(io::Error::new(io::ErrorKind::NotFound, message));
        }
        Ok(Some(PersistentState { root, own: own.to_owned(), tpm: None, efi_variables: None }))
    }

    fn place(&mut self, kept: Kept) -> &mut Option<(String, bool)> {
        match kept {
            Kept::Tpm => &mut self.tpm,
            Kept::EfiVariables => &mut self.efi_variables,
        }
    }

    fn folders(&self) -> io::Result<Vec<String>> {
        let mut folders = Vec::new();
        for entry in std::fs::read_dir(&self.root)? {
            let entry = entry?;
            // A file system may have something of its own there.
            if entry.file_type()?.is_dir() && entry.file_name() != "lost+found" {
                folders.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        Ok(folders)
    }

    /// The folder for the TPM's state.
    pub fn tpm(&self) -> Option<PathBuf> {
        self.tpm.as_ref().map(|(folder, _)| self.root.join(folder).join(TPM))
    }

    /// The file with the EFI variables.
    pub fn efi_variables(&self) -> Option<PathBuf> {
        self.efi_variables.as_ref().map(|(folder, _)| self.root.join(folder).join(EFI_VARIABLES))
    }

    /// Whether what this place has of it is not yet what counts.
    pub fn awaits(&self, kept: Kept) -> bool {
        let place = match kept {
            Kept::Tpm => &self.tpm,
            Kept::EfiVariables => &self.efi_variables,
        };
        place.as_ref().is_some_and(|(_, counts)| !counts)
    }

    /// From now on what this place has of it counts.
    pub fn take_over(&mut self, kept: Kept) -> io::Result<()> {
        let Some((folder, _)) = self.place(kept).clone() else { return Ok(()) };
        let mut pointer = Pointer::read(&self.root)?;
        *pointer.of(kept) = Some(folder.clone());
        pointer.write(&self.root)?;
        *self.place(kept) = Some((folder, true));
        Ok(())
    }

    /// Removes what does not count any more, once all that does is on the disk.
    pub fn tidy(&self) -> io::Result<()> {
        let pointer = Pointer::read(&self.root)?;
        let counts =
            |folder: &String| [&pointer.tpm, &pointer.efi_variables].into_iter().flatten().any(|f| f == folder);
        let folders = self.folders()?;
        for folder in folders.iter().filter(|folder| counts(folder)) {
            sync(&self.root.join(folder))?;
        }
        File::open(&self.root)?.sync_all()?;
        for folder in folders.iter().filter(|folder| !counts(folder)) {
            std::fs::remove_dir_all(self.root.join(folder))?;
        }
        Ok(())
    }

    /// The guest did not come here: removes what was received, unless it counts.
    pub fn discard(&self) -> io::Result<()> {
        let counts = |place: &Option<(String, bool)>| place.as_ref().is_some_and(|(_, counts)| *counts);
        if counts(&self.tpm) || counts(&self.efi_variables) {
            return Ok(());
        }
        std::fs::remove_dir_all(self.root.join(&self.own))
    }
}

/// Forces a folder and the files in it to the disk.
fn sync(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => sync(&entry.path())?,
            // The TPM replaces its files.
            kind if kind.is_file() => match File::open(entry.path()) {
                Ok(file) => file.sync_all()?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            },
            _ => {}
        }
    }
    File::open(folder)?.sync_all()
}

fn remove_if_there(file: &Path) -> io::Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const FIRST: &str = "first";

    fn vmi(uid: &str) -> VirtualMachineInstance {
        serde_json::from_value(json!({
            "metadata": {"name": "vm", "namespace": "default", "uid": uid},
            "spec": {"domain": {
                "devices": {"tpm": {"persistent": true}},
                "firmware": {"bootloader": {"efi": {"persistent": true}}},
            }},
        }))
        .unwrap()
    }

    fn claim() -> (tempfile::TempDir, Paths) {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::under(folder.path());
        std::fs::create_dir_all(&paths.persistent_state).unwrap();
        (folder, paths)
    }

    fn write(state: &PersistentState, text: &str) {
        std::fs::create_dir_all(state.tpm().unwrap()).unwrap();
        std::fs::write(state.tpm().unwrap().join("tpm2-00.permall"), text).unwrap();
        std::fs::write(state.efi_variables().unwrap(), text).unwrap();
    }

    fn read(state: &PersistentState) -> [String; 2] {
        let files = [state.tpm().unwrap().join("tpm2-00.permall"), state.efi_variables().unwrap()];
        files.map(|file| std::fs::read_to_string(file).unwrap_or_default())
    }

    fn started(paths: &Paths, uid: &str) -> PersistentState {
        PersistentState::resume(paths, &vmi(uid)).unwrap().unwrap()
    }

    fn coming(paths: &Paths, migration: &str) -> PersistentState {
        PersistentState::receive(paths, &vmi("any"), migration).unwrap().unwrap()
    }

    #[test]
    fn what_a_guest_left_is_there_when_it_starts_again() {
        let (_folder, paths) = claim();
        write(&started(&paths, FIRST), "kept");
        assert_eq!(read(&started(&paths, "second")), ["kept", "kept"]);
        std::fs::write(started(&paths, "third").tpm().unwrap().join("tpm2-00.volatilestate"), "old").unwrap();
        assert!(!started(&paths, "fourth").tpm().unwrap().join("tpm2-00.volatilestate").exists());
    }

    #[test]
    fn a_migration_that_comes_to_nothing_has_touched_nothing() {
        let (_folder, paths) = claim();
        let source = started(&paths, FIRST);
        write(&source, "kept");
        let target = coming(&paths, "m1");
        write(&target, "half");
        assert_eq!(read(&started(&paths, "after a crash")), ["kept", "kept"]);
        let target = coming(&paths, "m2");
        write(&target, "half");
        target.discard().unwrap();
        assert_eq!(source.folders().unwrap(), [FIRST]);
        assert_eq!(read(&source), ["kept", "kept"]);
    }

    #[test]
    fn what_has_come_counts_from_the_moment_that_says_so() {
        let (_folder, paths) = claim();
        let source = started(&paths, FIRST);
        write(&source, "old");
        let mut target = coming(&paths, "m1");
        write(&target, "new");
        target.take_over(Kept::Tpm).unwrap();
        assert!(!target.awaits(Kept::Tpm) && target.awaits(Kept::EfiVariables));
        // The pod is gone between the two.
        assert_eq!(read(&started(&paths, "again")), ["new", "old"]);
        let mut target = coming(&paths, "m2");
        write(&target, "newer");
        for kept in Kept::ALL {
            target.take_over(kept).unwrap();
        }
        target.discard().unwrap();
        target.tidy().unwrap();
        assert_eq!(target.folders().unwrap(), ["m2"]);
        assert_eq!(read(&started(&paths, "again")), ["newer", "newer"]);
    }

    #[test]
    fn a_claim_of_its_own_is_taken_as_it_was_left() {
        let (_folder, paths) = claim();
        write(&coming(&paths, "m1"), "came");
        // Its launcher was lost before it could say that it counts; the controller knows.
        assert_eq!(read(&started(&paths, "again")), ["came", "came"]);
    }

    #[test]
    fn a_pod_without_the_volume_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = PersistentState::resume(&Paths::under(folder.path()), &vmi(FIRST)).unwrap_err();
        assert!(error.to_string().contains("persistent-state"), "{error}");
    }
}
