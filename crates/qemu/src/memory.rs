//! Guest memory that more than one QEMU can map: a file without a name (memfd), made by whoever starts QEMU.
//!
//! It is there as long as somebody holds it or has it mapped, so that nothing remains of the memory of a guest that is gone.

use crate::descriptor;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// A file that neither grows nor shrinks any more: QEMU would be killed (SIGBUS) where mapped memory is cut off.
const SEALS: SealFlag = SealFlag::F_SEAL_GROW.union(SealFlag::F_SEAL_SHRINK).union(SealFlag::F_SEAL_SEAL);

/// The memory of one guest. Cheap to clone.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    file: Arc<OwnedFd>,
    bytes: u64,
}

/// The same memory, not the same content.
impl PartialEq for GuestMemory {
    fn eq(&self, other: &Self) -> bool {
        self.file.as_raw_fd() == other.file.as_raw_fd()
    }
}

impl Eq for GuestMemory {}

impl GuestMemory {
    /// New memory of so many MiB, all of it zero; pages come as they are touched.
    pub fn new(mib: u64) -> Result<GuestMemory> {
        let bytes = mib.checked_mul(1 << 20).filter(|bytes| i64::try_from(*bytes).is_ok() && *bytes > 0);
        let bytes = bytes.ok_or_else(|| Error::new(ErrorKind::InvalidInput, format!("{mib} MiB are not possible")))?;
        let file = memfd_create("guest-memory", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&file, i64::try_from(bytes).unwrap_or(i64::MAX))?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS))?;
        Ok(GuestMemory { file: Arc::new(file), bytes })
    }

    /// The memory behind a descriptor that came from elsewhere. It has to be what [`GuestMemory::new`] makes.
    pub fn adopt(file: OwnedFd) -> Result<GuestMemory> {
        // Only a memfd has seals.
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
        if !seals.is_ok_and(|seals| seals.contains(SEALS)) {
            return Err(Error::new(ErrorKind::InvalidData, "what came is not a guest's memory"));
        }
        let bytes = u64::try_from(nix::sys::stat::fstat(&file)?.st_size).unwrap_or(0);
        Ok(GuestMemory { file: Arc::new(file), bytes })
    }

    /// How much the guest has.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How much of it is there: what was never touched is not.
    pub fn present_bytes(&self) -> Result<u64> {
        Ok(u64::try_from(nix::sys::stat::fstat(&self.file)?.st_blocks).unwrap_or(0).saturating_mul(512))
    }

    /// The descriptor. A QEMU has to inherit it under this number.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where a process that has inherited the descriptor finds it.
    pub(crate) fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
    }

    /// Hands it on. Blocks.
    pub fn send(&self, to: &UnixStream) -> Result<()> {
        descriptor::send(self.file.as_fd(), to)
    }

    /// Takes what [`GuestMemory::send`] hands on. Blocks, for as long as the stream's read timeout allows.
    pub fn receive(from: &UnixStream) -> Result<GuestMemory> {
        GuestMemory::adopt(descriptor::receive(from)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn what_is_handed_on_is_the_same_memory() {
        let memory = GuestMemory::new(2).unwrap();
        assert_eq!((memory.bytes(), memory.present_bytes().unwrap()), (2 << 20, 0));
        let (here, there) = UnixStream::pair().unwrap();
        memory.send(&here).unwrap();
        let other = GuestMemory::receive(&there).unwrap();
        assert_eq!(other.bytes(), 2 << 20);
        let file = |memory: &GuestMemory| std::fs::File::from(memory.file.try_clone().unwrap());
        file(&memory).write_all_at(b"page", 1 << 20).unwrap();
        let mut read = [0; 4];
        file(&other).read_exact_at(&mut read, 1 << 20).unwrap();
        assert_eq!(&read, b"page");
        assert!(file(&other).set_len(1).is_err(), "it cannot be cut off");
        drop(here);
        assert!(GuestMemory::receive(&there).is_err(), "nothing more comes");
    }

    #[test]
    fn nothing_but_a_guests_memory_is_taken() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        assert!(GuestMemory::adopt(file.into()).is_err());
        let open = memfd_create("open", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        assert!(GuestMemory::adopt(open).is_err(), "it could still be cut off");
        assert!(GuestMemory::new(0).is_err());
    }
}
