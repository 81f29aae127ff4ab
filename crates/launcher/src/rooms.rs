//! Whether the target has room for the disks that are copied to it, and what of them it has already.

use crate::blank;
use crate::plan::WritableDisk;
use crate::rpc::DiskRoom;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// What the file system needs for itself beside a disk's content, and qcow2 for its tables.
const SPARE: u64 = 1 << 20;
/// How much of an image is read at once.
const PIECE: usize = 1 << 20;

/// What there is for the disk whose file is `path`.
pub fn look(path: &Path, base: Option<String>) -> std::io::Result<DiskRoom> {
    let metadata = std::fs::metadata(path)?;
    if metadata.file_type().is_block_device() {
        // As large as it is; whether that is enough was looked at.
        return Ok(DiskRoom { filesystem: metadata.rdev(), free_bytes: u64::MAX, base });
    }
    let filesystem = metadata.dev();
    let stat = nix::sys::statvfs::statvfs(path)?;
    let free_bytes = stat.blocks_available().saturating_mul(stat.fragment_size());
    Ok(DiskRoom { filesystem, free_bytes, base })
}

/// SHA-256 of a file, in hexadecimal digits.
pub fn digest(path: &Path) -> std::io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let mut piece = vec![0u8; PIECE];
    let mut hash = Sha256::new();
    loop {
        match file.read(&mut piece)? {
            0 => break,
            n => hash.update(piece.get(..n).unwrap_or_default()),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// How many bytes a copy of the disk takes at the target: holes stay holes.
pub fn needed(disk: &WritableDisk, above_base: bool) -> std::io::Result<u64> {
    // `st_blocks` counts in 512 bytes, whatever the file system's block (stat(2)).
    let allocated = |path: &Path| match std::fs::metadata(path)? {
        // Which of its blocks were never written it does not tell.
        device if device.file_type().is_block_device() => blank::size(path),
        file => Ok(file.blocks().saturating_mul(512)),
    };
    let mut bytes = allocated(&disk.path)?;
    if let Some(base) = disk.base.as_deref().filter(|_| !above_base) {
        bytes = bytes.saturating_add(allocated(base)?);
    }
    Ok(bytes.saturating_add(SPARE))
}

/// What is wrong when the disks `needs` (volumes and bytes) have not enough room.
pub fn shortage(needs: &[(&str, u64)], rooms: &BTreeMap<String, DiskRoom>) -> Option<String> {
    let mut filesystems: BTreeMap<u64, (u64, u64, Vec<String>)> = BTreeMap::new();
    for (volume, bytes) in needs {
        let Some(room) = rooms.get(*volume) else { continue };
        let (free, wanted, names) = filesystems.entry(room.filesystem).or_insert((u64::MAX, 0, Vec::new()));
        *free = room.free_bytes.min(*free);
        *wanted = wanted.saturating_add(*bytes);
        names.push(format!("volume {volume} needs {bytes} bytes"));
    }
    let short: Vec<String> = filesystems
        .values()
        .filter(|(free, wanted, _)| wanted > free)
        .map(|(free, _, names)| format!("{}, and {free} bytes are free", names.join(", ")))
        .collect();
    (!short.is_empty()).then(|| format!("not enough room at the target: {}", short.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rooms(of: &[(&str, u64, u64)]) -> BTreeMap<String, DiskRoom> {
        let room = |(name, filesystem, free_bytes): &(&str, u64, u64)| {
            (name.to_string(), DiskRoom { filesystem: *filesystem, free_bytes: *free_bytes, base: None })
        };
        of.iter().map(room).collect()
    }

    #[test]
    fn disks_on_one_file_system_share_its_room() {
        let needs = [("a", 60), ("b", 60), ("c", 5)];
        assert_eq!(shortage(&needs, &rooms(&[("a", 1, 100), ("b", 2, 100), ("c", 3, 5)])), None);
        assert_eq!(
            shortage(&needs, &rooms(&[("a", 1, 100), ("b", 1, 100), ("c", 3, 4)])).as_deref(),
            Some(
                "not enough room at the target: volume a needs 60 bytes, volume b needs 60 bytes, and 100 bytes are free; \
                 volume c needs 5 bytes, and 4 bytes are free"
            )
        );
        assert_eq!(shortage(&needs, &BTreeMap::new()), None, "an older target says nothing");
    }

    #[test]
    fn holes_need_no_room() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(1 << 40).unwrap();
        let disk = WritableDisk {
            number: 0,
            volume: "work".into(),
            path: path.clone(),
            base: None,
            shared: false,
            comes: false,
        };
        let empty = needed(&disk, false).unwrap();
        assert!(empty < 2 << 20, "{empty}");
        std::os::unix::fs::FileExt::write_all_at(&file, &[1u8; 1 << 20], 1 << 30).unwrap();
        file.sync_all().unwrap();
        let some = needed(&disk, false).unwrap();
        assert!((1 << 20..3 << 20).contains(&(some - empty)), "{empty} {some}");
        let above = WritableDisk { base: Some(path.clone()), ..disk };
        assert_eq!(needed(&above, true).unwrap(), some);
        assert!(needed(&above, false).unwrap() > some, "what lies below has to come along");
        let room = look(&path, None).unwrap();
        assert!(room.free_bytes > 0 && room.free_bytes < 1 << 60, "{room:?}");
    }

    #[test]
    fn a_digest_is_that_of_the_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        std::fs::write(&path, b"abc").unwrap();
        // FIPS 180-2, appendix B.1.
        assert_eq!(digest(&path).unwrap(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
