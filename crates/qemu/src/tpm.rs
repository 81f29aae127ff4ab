//! A TPM 2.0 in software: `swtpm`, one process a guest.
//!
//! QEMU holds its control connection as long as it lives, and `swtpm` ends with that connection. When the guest moves, QEMU takes
//! the module's state out of the one `swtpm`, carries it in its stream and puts it into the other, whose folder is empty.

use crate::process::{Process, find};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// Why there is no module.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program is missing.
    #[error("swtpm is not installed (package swtpm; `make deps` installs it; $GODWIT_SWTPM names another)")]
    Missing,
    /// Its files or its process.
    #[error("the software TPM {what}: {error}")]
    Io {
        /// Which.
        what: String,
        /// What the system said.
        error: std::io::Error,
    },
}

/// `swtpm`: `$GODWIT_SWTPM` if set, else the first in `$PATH` and the usual places.
pub fn find_swtpm() -> Option<PathBuf> {
    find("GODWIT_SWTPM", &["swtpm"])
}

/// A running module. It is killed when this is dropped.
#[derive(Debug)]
pub struct Tpm {
    process: Process,
}

impl Tpm {
    /// Starts a module that keeps its state in `folder` and waits for QEMU at `socket`. Who connects afterwards is not too early.
    pub fn start(folder: &Path, socket: &Path) -> Result<Tpm, Error> {
        let swtpm = find_swtpm().ok_or(Error::Missing)?;
        let io = |path: &Path| {
            let what = path.display().to_string();
            move |error| Error::Io { what, error }
        };
        std::fs::create_dir_all(folder).map_err(io(folder))?;
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(socket)(error)),
            _ => {}
        }
        let listener = UnixListener::bind(socket).map_err(io(socket))?;
        let arguments = ["socket", "--tpm2", "--tpmstate", &format!("dir={},mode=0600", folder.display())]
            .into_iter()
            // It takes over the socket as its standard input.
            .chain(["--ctrl", "type=unixio,fd=0", "--terminate"])
            .map(str::to_owned)
            .collect::<Vec<_>>();
        let process = Process::spawn_with(&swtpm, &arguments, Stdio::from(OwnedFd::from(listener)), None);
        Ok(Tpm { process: process.map_err(io(&swtpm))? })
    }

    /// Its process.
    pub fn process(&self) -> &Process {
        &self.process
    }
}
