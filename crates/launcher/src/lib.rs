//! One VM: owns one QEMU and serves a small local RPC
//!
//! The process in the pod's container `compute`. It turns a VirtualMachineInstance and the files in the pod into a QEMU,
//! supervises it, and answers one handler over a unix socket: facts out, orders in. It decides nothing that a controller
//! could decide; what it does guard, alone, is that no guest is run twice (see [`rpc`] and docs/architecture.md, "Hand-over").

pub mod agent;
pub mod attachment;
mod blank;
pub mod carry;
pub mod client;
pub mod console;
mod copy_mark;
pub mod fence;
pub mod iso;
pub mod persistent;
pub mod plain_file;
pub mod plan;
pub mod record;
pub mod rooms;
pub mod rpc;
pub mod server;
pub mod vm;
pub mod volumes;

use rpc::{DomainPhase, Paths, State};
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

pub use godwit_qemu::accelerator::{Accelerator, Probe};
pub use godwit_qemu::processors::{HostModel, Processors};
pub use godwit_qemu::qmp::commands::VersionTriple;
pub use godwit_qemu::{descriptor, memory};

/// What a launcher is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Name of the VMI.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its UID; orders about another VMI are refused.
    pub uid: String,
}

/// Why a launcher ends badly. Its process exits with a status that is not 0, so that the pod fails and says why.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The guest is lost, or could not be received.
    #[error("{0}")]
    Crashed(String),
    /// The RPC socket cannot be offered.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// How long an answer that is on its way may take after the VM's end.
const LAST_ANSWERS: Duration = Duration::from_millis(300);

/// The process: runs until its VM has ended. SIGTERM and SIGINT shut the guest down.
pub async fn run(options: Options) -> Result<(), Error> {
    tracing::info!(vmi = options.name, namespace = options.namespace, uid = options.uid, "launcher starts");
    let (tell, terminate) = mpsc::channel(4);
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind).map_err(|source| Error::Io {
            action: "listening to signals of",
            path: "/proc/self".into(),
            source,
        })?;
        let tell = tell.clone();
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                if tell.send(()).await.is_err() {
                    return;
                }
            }
        });
    }
    let state = serve(options.uid, Paths::default(), terminate).await?;
    tracing::info!(phase = ?state.phase, reason = state.exit_reason, "launcher ends");
    match state.phase {
        DomainPhase::Crashed => Err(Error::Crashed(state.exit_reason.unwrap_or_else(|| "QEMU has ended".into()))),
        _ => Ok(()),
    }
}

/// Serves the VM of this uid with its files and sockets in `paths` until it has ended; gives its last state.
pub async fn serve(uid: String, paths: Paths, terminate: mpsc::Receiver<()>) -> Result<State, Error> {
    let io = |action, path: &std::path::Path| {
        let path = path.to_path_buf();
        move |source| Error::Io { action, path, source }
    };
    std::fs::create_dir_all(&paths.sockets).map_err(io("making", &paths.sockets))?;
    let socket = paths.rpc_socket();
    let watchdog =
        fence::Watchdog::start(paths.ephemeral_disks.clone()).map_err(io("watching over", &paths.sockets))?;
    let fence = watchdog.fence();
    let carrier = carry::Carrier::new(paths.sockets.clone());
    let (vm, states) = vm::Vm::new(paths.clone(), uid, fence.clone(), carrier.clone())
        .map_err(io("reading the record in", &paths.ephemeral_disks))?;
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).map_err(io("listening on", &socket))?;
    let (orders, requests) = mpsc::channel(16);
    let router = server::router(orders, states, fence, carrier, paths.sockets.join(plan::AGENT));
    let server = tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the RPC has ended");
        }
    });
    let state = vm.run(requests, terminate).await;
    let _ = std::fs::remove_file(&socket);
    tokio::time::sleep(LAST_ANSWERS).await;
    server.abort();
    Ok(state)
}

/// Finds out which accelerator this machine can offer (see [`godwit_qemu::accelerator`]). Takes half a second where KVM does
/// not serve: ask once for a node, and give the answer with each order.
pub async fn probe_accelerator() -> Probe {
    match godwit_qemu::process::find_qemu() {
        Some(qemu) => godwit_qemu::accelerator::probe(&qemu).await,
        None => Probe {
            accelerator: Accelerator::Tcg,
            reason: "QEMU is not installed (package qemu-system-x86; `make deps` installs it)".into(),
        },
    }
}

/// What the installed QEMU can give to guests on this machine, with this accelerator. Takes about a second: ask once for a node.
///
/// # Errors
/// Where there is none, or it does not answer: in a sentence.
pub async fn processors(accelerator: Accelerator) -> Result<Processors, String> {
    let program = godwit_qemu::process::find_qemu().ok_or("QEMU is not installed")?;
    godwit_qemu::processors::ask(&program, accelerator).await.map_err(|error| error.to_string())
}

/// The version that the installed QEMU says it is, such as `7.2.22`; none where there is none.
pub async fn qemu_version() -> Option<VersionTriple> {
    let program = godwit_qemu::process::find_qemu()?;
    let output = tokio::process::Command::new(program).arg("--version").kill_on_drop(true).output().await.ok()?;
    version_in(&String::from_utf8_lossy(&output.stdout))
}

/// What an accelerator cannot do in this version of QEMU and what mends it, in a sentence; none where nothing is missing.
pub fn shortcoming(accelerator: Accelerator, version: VersionTriple) -> Option<&'static str> {
    (!godwit_qemu::migration::tracks_writes(accelerator, version)).then_some(
        "translated guests of a QEMU before 9.0 are sent in one pass and stand still while what they wrote meanwhile \
         follows; `make deps QEMU=backports` brings one that does better",
    )
}

/// The version in `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`.
fn version_in(text: &str) -> Option<VersionTriple> {
    let word = text.split("version ").nth(1)?.split_whitespace().next()?;
    let mut numbers = word.split('.').map(|n| {
        let digits = n.find(|c: char| !c.is_ascii_digit()).map_or(n, |end| &n[..end]);
        digits.parse::<u32>().ok()
    });
    let (major, minor) = (numbers.next()??, numbers.next()??);
    Some(VersionTriple { major, minor, micro: numbers.next().flatten().unwrap_or(0) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_version_is_read() {
        let read = |text: &str| version_in(text).map(|v| v.to_string());
        let said = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright (c) 2003-2022";
        assert_eq!(read(said).as_deref(), Some("7.2.22"));
        assert_eq!(read("QEMU emulator version 10.1.0-rc1").as_deref(), Some("10.1.0"));
        assert_eq!(read("QEMU emulator version x"), None);
        assert_eq!(read("no such program"), None);
    }

    #[test]
    fn only_a_translator_before_9_has_a_shortcoming() {
        let version = |major| VersionTriple { major, minor: 2, micro: 0 };
        assert!(shortcoming(Accelerator::Tcg, version(7)).is_some_and(|s| s.contains("QEMU=backports")));
        assert_eq!(shortcoming(Accelerator::Tcg, version(10)), None);
        assert_eq!(shortcoming(Accelerator::Kvm, version(7)), None);
    }
}
