//! Open files that travel over unix sockets (`SCM_RIGHTS`, unix(7)).

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::{Error, ErrorKind, IoSlice, IoSliceMut, Result};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// The byte that a descriptor travels with.
const BYTE: [u8; 1] = *b"m";

/// Hands an open file on. Blocks.
pub fn send(file: BorrowedFd<'_>, to: &UnixStream) -> Result<()> {
    let files = [file.as_raw_fd()];
    let message = [ControlMessage::ScmRights(&files)];
    sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(&BYTE)], &message, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Takes what [`send`] hands on. Blocks, for as long as the stream's read timeout allows.
pub fn receive(from: &UnixStream) -> Result<OwnedFd> {
    let mut byte = [0];
    let mut room = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let mut buffers = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(from.as_raw_fd(), &mut buffers, Some(&mut room), flags)?;
    let mut files = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(came) = part {
            // SAFETY: the kernel has just made these descriptors for this process, and nobody else knows of them.
            files.extend(came.into_iter().map(|file| unsafe { OwnedFd::from_raw_fd(file) }));
        }
    }
    files.pop().ok_or_else(|| Error::new(ErrorKind::UnexpectedEof, "nothing was handed over"))
}
