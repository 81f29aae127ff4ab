//! The process of an attachment pod: it holds the claims of disks that come while the guest runs, on the guest's node, and
//! gives their images away as open files.
//!
//! Whoever can reach its socket is the node's handler, which hands the file on to the launcher. So no file system has to be
//! brought into a pod that runs already, and a claim is in use as long as this pod is there.

use crate::copy_mark;
use crate::volumes;
use godwit_api::names::ATTACHMENT_SOCKET;
use godwit_qemu::descriptor;
use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Result};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};

/// How long a guest's handler may take to say what it wants, and to take it.
const LIMIT: Duration = Duration::from_secs(10);
/// The longest name of a volume.
const LONGEST_NAME: u64 = 63;

/// A claim in this pod. Written `NAME:rw:BYTES:PATH`, or with `ro`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The volume's name in the VMI.
    pub volume: String,
    /// Nobody writes to it.
    pub read_only: bool,
    /// Its size; an image that is not there is made as large.
    pub bytes: u64,
    /// Where it is in this pod: the folder of `disk.img`, or a block device.
    pub path: PathBuf,
}

impl FromStr for Claim {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut parts = text.splitn(4, ':');
        let (Some(volume), Some(mode @ ("ro" | "rw")), Some(bytes), Some(path)) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(format!("{text:?} is not NAME:rw:BYTES:PATH"));
        };
        let bytes = bytes.parse().map_err(|error| format!("{bytes:?} is no size: {error}"))?;
        Ok(Claim { volume: volume.to_owned(), read_only: mode == "ro", bytes, path: path.into() })
    }
}

impl std::fmt::Display for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mode = if self.read_only { "ro" } else { "rw" };
        write!(f, "{}:{mode}:{}:{}", self.volume, self.bytes, self.path.display())
    }
}

impl Claim {
    /// Opens its image, which is made where there is none.
    fn open(&self) -> Result<OwnedFd> {
        let mut path = self.path.clone();
        if path.is_dir() {
            path.push("disk.img");
            if !self.read_only {
                // Whoever plugs it in uses what is on it, also where it was left by an unfinished copy.
                copy_mark::remove(&path)?;
                if !path.exists() {
                    volumes::make_sparse(&self.volume, &path, self.bytes)
                        .map_err(|error| Error::new(error.kind(), error))?;
                }
            }
        }
        Ok(std::fs::OpenOptions::new().read(true).write(!self.read_only).open(&path)?.into())
    }
}

/// Gives the claims' images away on a socket in `sockets` until SIGTERM.
pub async fn run(claims: Vec<Claim>, sockets: &Path) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        ended = serve(claims, sockets) => ended,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

async fn serve(claims: Vec<Claim>, sockets: &Path) -> Result<()> {
    // What cannot be opened is told by the pod, before anybody asks.
    for claim in &claims {
        match claim.open() {
            // The node's handler gives it to this user when it asks for it.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                tracing::info!(volume = claim.volume, %error, "not open to this user yet");
            }
            opened => {
                opened.map_err(|error| Error::new(error.kind(), format!("volume {}: {error}", claim.volume)))?;
            }
        }
    }
    let claims = Arc::new(claims);
    let socket = sockets.join(ATTACHMENT_SOCKET);
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket)?;
    tracing::info!(claims = claims.len(), "the claims can be used");
    loop {
        let (stream, _) = listener.accept().await?;
        let (stream, claims) = (stream.into_std()?, claims.clone());
        tokio::task::spawn_blocking(move || match give(&stream, &claims) {
            Ok(volume) => tracing::info!(volume, "handed to the node's handler"),
            Err(error) => tracing::warn!(%error, "nothing was handed over"),
        });
    }
}

fn give(stream: &UnixStream, claims: &[Claim]) -> Result<String> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    let mut wanted = String::new();
    BufReader::new(stream.take(LONGEST_NAME + 1)).read_line(&mut wanted)?;
    let claim = claims.iter().find(|claim| wanted.strip_suffix('\n') == Some(claim.volume.as_str()));
    let claim = claim.ok_or_else(|| Error::new(ErrorKind::NotFound, "a volume that is not here was asked for"))?;
    descriptor::send(claim.open()?.as_fd(), stream)?;
    Ok(claim.volume.clone())
}

/// Asks on a connection to such a process for the image of a volume. Blocks, for as long as the stream's timeouts allow.
pub fn ask(stream: &UnixStream, volume: &str) -> Result<OwnedFd> {
    use std::io::Write;
    let mut stream = stream;
    stream.write_all(format!("{volume}\n").as_bytes())?;
    descriptor::receive(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn claims_are_read_as_they_are_written() {
        let claim = Claim { volume: "data".into(), read_only: false, bytes: 4096, path: "/a:b".into() };
        assert_eq!(claim.to_string().parse(), Ok(claim.clone()));
        let fixed = Claim { read_only: true, ..claim };
        assert_eq!(fixed.to_string().parse(), Ok(fixed));
        for bad in ["", "a", "a:rw", "a:rw:1", "a:xx:1:/p", "a:rw:x:/p"] {
            assert!(bad.parse::<Claim>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_folder_that_is_not_open_to_this_user_is_told_as_that() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: only root becomes another user");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let claim = Claim { volume: "data".into(), read_only: false, bytes: 8192, path: folder.path().to_owned() };
        // Of this thread alone: its file system user, and with it the power to open what is others'.
        let kind = std::thread::spawn(move || {
            nix::unistd::setfsuid(nix::unistd::Uid::from_raw(107));
            claim.open().map(drop).map_err(|error| error.kind())
        });
        assert_eq!(kind.join().unwrap(), Err(ErrorKind::PermissionDenied));
    }

    #[tokio::test]
    async fn an_image_is_made_once_and_given_to_who_asks_for_it_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let claim = Claim { volume: "data".into(), read_only: false, bytes: 8192, path: folder.path().join("claim") };
        std::fs::create_dir(&claim.path).unwrap();
        let sockets = folder.path().to_owned();
        let image = claim.path.join("disk.img");
        let serving = tokio::spawn(async move { serve(vec![claim], &sockets).await });
        let socket = folder.path().join(ATTACHMENT_SOCKET);
        while !socket.exists() {
            tokio::task::yield_now().await;
        }
        let get = |volume: &'static str| {
            let socket = socket.clone();
            tokio::task::spawn_blocking(move || ask(&UnixStream::connect(socket)?, volume))
        };
        let first = std::fs::File::from(get("data").await.unwrap().unwrap());
        assert_eq!(first.metadata().unwrap().len(), 8192);
        first.write_all_at(b"kept", 4000).unwrap();
        let again = std::fs::File::from(get("data").await.unwrap().unwrap());
        let mut read = [0; 4];
        again.read_exact_at(&mut read, 4000).unwrap();
        assert_eq!(&read, b"kept");
        assert!(get("other").await.unwrap().is_err());
        assert!(image.exists());
        serving.abort();
    }
}
