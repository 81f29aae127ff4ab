//! A mark beside an image that an unfinished copy is being written to, so that another try knows what it may write over. It is set before
//! anything is written, and goes when the guest is to run with the image.

use std::io;
use std::path::{Path, PathBuf};

/// The mark of `disk.img` is `disk.img.unfinished`.
fn mark_of(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".unfinished");
    name.into()
}

/// Whether the image is an unfinished copy.
pub fn is_set(image: &Path) -> bool {
    mark_of(image).exists()
}

/// Says that the image is an unfinished copy from now on.
pub fn set(image: &Path) -> io::Result<()> {
    let mark = mark_of(image);
    std::fs::File::create(&mark)?.sync_all()?;
    // The name has to be there as well before the image is.
    mark.parent().map_or(Ok(()), |folder| std::fs::File::open(folder)?.sync_all())
}

/// Says that it is none any more.
pub fn remove(image: &Path) -> io::Result<()> {
    // Looked for first: of a folder that can only be read the system refuses to remove even what is not there.
    if is_set(image) { std::fs::remove_file(mark_of(image)) } else { Ok(()) }
}
