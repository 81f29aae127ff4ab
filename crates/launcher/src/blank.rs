//! Images with nothing on them.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

/// Most bytes that are read. An image that has more than this written, even if only zeros, is not taken for blank: whoever waits
/// for the answer does not wait for long.
const MOST: u64 = 1 << 30;
/// How much is read at once.
const PIECE: usize = 1 << 20;

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blank {
    /// Holes and zeros only.
    Yes,
    /// Something else is at this offset.
    No(u64),
    /// It is not known: there is too much to read.
    TooLong,
}

impl Blank {
    /// Why `what` is not written over.
    pub fn refusal(self, what: &str) -> String {
        let found = match self {
            Blank::Yes => return format!("{what} is blank"),
            Blank::No(at) => format!("there is data at byte {at}"),
            Blank::TooLong => format!("more than {MOST} bytes of it are allocated, which takes too long to read"),
        };
        format!(
            "{what} is not blank, and is not written over: {found}. Take an empty claim, or remove what is on this one"
        )
    }
}

/// Looks at a file or a block device.
pub fn look(path: &Path) -> io::Result<Blank> {
    let file = File::open(path)?;
    let mut piece = vec![0; PIECE];
    let (mut at, mut read) = (0_u64, 0_u64);
    loop {
        // Where it knows no holes, all of it is data.
        let from = match lseek(&file, i64::try_from(at).map_err(io::Error::other)?, Whence::SeekData) {
            Ok(from) => u64::try_from(from).map_err(io::Error::other)?,
            Err(Errno::ENXIO) => return Ok(Blank::Yes),
            Err(Errno::EINVAL) => at,
            Err(error) => return Err(error.into()),
        };
        let length = file.read_at(&mut piece, from)?;
        let found = piece.get(..length).unwrap_or_default();
        if found.is_empty() {
            return Ok(Blank::Yes);
        }
        if let Some(place) = found.iter().position(|byte| *byte != 0) {
            return Ok(Blank::No(from + place as u64));
        }
        (at, read) = (from + length as u64, read + length as u64);
        if read > MOST {
            return Ok(Blank::TooLong);
        }
    }
}

/// How many bytes a file or a block device has.
pub fn size(path: &Path) -> io::Result<u64> {
    // What stat(2) says of a device is 0.
    File::open(path)?.seek(SeekFrom::End(0))
}

/// Takes everything off a block device again.
pub fn wipe(device: &Path) -> io::Result<()> {
    let length = i64::try_from(size(device)?).map_err(io::Error::other)?;
    let device = File::options().write(true).open(device)?;
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(&device, flags, 0, length)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_zeros_are_blank() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let file = File::create(&path).unwrap();
        assert_eq!(look(&path).unwrap(), Blank::Yes, "empty");
        file.set_len(1 << 40).unwrap();
        assert_eq!(look(&path).unwrap(), Blank::Yes, "a hole");
        file.write_all_at(&[0; 3 << 20], 1 << 30).unwrap();
        assert_eq!(look(&path).unwrap(), Blank::Yes, "zeros");
        file.write_all_at(&[1], 1 << 35).unwrap();
        assert_eq!(look(&path).unwrap(), Blank::No(1 << 35));
        wipe(&path).unwrap();
        assert_eq!((look(&path).unwrap(), size(&path).unwrap()), (Blank::Yes, 1 << 40));
        assert!(Blank::No(7).refusal("the disk").contains("data at byte 7"));
    }
}
