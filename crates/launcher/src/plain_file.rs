//! Small files in a pod's folders, by whoever is not the pod: what is there is the pod's own doing. A link could lead to any file of
//! the node, and a FIFO keeps whoever opens it waiting for ever.

use std::fs::{OpenOptions, Permissions};
use std::io::{Error, Read, Result, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::libc::{O_CLOEXEC, O_NOCTTY, O_NOFOLLOW, O_NONBLOCK};

/// More than this many bytes nobody has written there in earnest.
const LIMIT: u64 = 64 * 1024;

/// What is in this file.
///
/// # Errors
/// When it is not there, is no regular file (a link is none), is longer than 64 KiB, or cannot be read.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let flags = O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(Error::other(format!("{} is no regular file", path.display())));
    }
    let mut bytes = Vec::new();
    file.take(LIMIT + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LIMIT {
        return Err(Error::other(format!("{} is longer than {LIMIT} bytes", path.display())));
    }
    Ok(bytes)
}

/// Puts a file with this content in the place of whatever has that name, wholly or not at all. A link is replaced, not followed.
///
/// # Errors
/// When it cannot be written or put there: the disk is full, say, or a folder has that name.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().ok_or_else(|| Error::other(format!("{} is in no folder", path.display())))?;
    // Its name is new: it neither follows nor opens what is there.
    let mut file = tempfile::Builder::new().permissions(Permissions::from_mode(0o644)).tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_link_is_neither_read_nor_written_through() {
        let folder = tempfile::tempdir().unwrap();
        let (of_the_node, link) = (folder.path().join("shadow"), folder.path().join("link"));
        std::fs::write(&of_the_node, "secret").unwrap();
        symlink(&of_the_node, &link).unwrap();
        assert!(read(&link).is_err());
        write(&link, b"said").unwrap();
        assert_eq!(std::fs::read(&of_the_node).unwrap(), b"secret");
        assert_eq!(read(&link).unwrap(), b"said");
    }

    #[test]
    fn a_fifo_keeps_nobody_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(read(&fifo).is_err());
        write(&fifo, b"said").unwrap();
        assert_eq!(read(&fifo).unwrap(), b"said");
    }

    #[test]
    fn what_is_too_long_or_cannot_be_replaced_is_an_error_and_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        let longest = vec![b'x'; LIMIT as usize];
        write(&file, &longest).unwrap();
        assert_eq!(read(&file).unwrap(), longest);
        std::fs::write(&file, [&longest[..], b"x"].concat()).unwrap();
        assert!(read(&file).is_err());
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        assert!(write(&file, b"said").is_err() && read(&file).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
