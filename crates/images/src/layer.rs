//! Unpacking layers: tar archives with whiteouts (OCI image-spec, layer.md).

use std::collections::BTreeSet;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use tar::EntryType;

use crate::tree::{Tree, clean};
use crate::{Error, Result};

/// Prefix of names that mean "what the lower layers had under the rest of the name is gone".
const WHITEOUT: &str = ".wh.";
/// Name that means "nothing of the lower layers is left in this folder".
const OPAQUE: &str = ".wh..wh..opq";

/// A reader of the plain archive, whatever the compression.
pub(crate) fn decompress(reader: impl Read + 'static) -> io::Result<Box<dyn Read>> {
    let mut reader = BufReader::with_capacity(1 << 16, reader);
    let start = reader.fill_buf()?;
    match start {
        [0x1f, 0x8b, ..] => Ok(Box::new(flate2::bufread::MultiGzDecoder::new(reader))),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            Err(io::Error::new(io::ErrorKind::Unsupported, "zstd-compressed layers are not supported, use gzip"))
        }
        _ => Ok(Box::new(reader)),
    }
}

/// Unpacks one layer over what is in `root`. Devices, pipes and sockets are left out: images are shared between pods, which
/// get their own /dev.
pub(crate) fn unpack(archive: impl Read, root: &Path) -> Result<()> {
    let tree = Tree::open(root).map_err(Error::io("open", root))?;
    let mut archive = tar::Archive::new(archive);
    let entries = archive.entries().map_err(Error::io("unpack a layer into", root))?;
    // What this layer has made itself is not touched by its own whiteouts.
    let mut made = BTreeSet::new();
    for entry in entries {
        let mut entry = entry.map_err(Error::io("unpack a layer into", root))?;
        let shown = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let refused = |reason: &str| Error::Layer { entry: shown.clone(), reason: reason.into() };
        let failed = |e: io::Error| Error::Layer { entry: shown.clone(), reason: e.to_string() };
        let path = entry.path().map_err(failed)?.into_owned();
        let path = clean(&path).ok_or_else(|| refused("the path leads out of the image"))?;
        let header = entry.header();
        let mode = header.mode().map_err(failed)?;
        // Some writers leave the owner empty: root.
        let empty = |field: &[u8]| field.iter().all(|b| matches!(b, 0 | b' '));
        let id = |field: &[u8], id: io::Result<u64>| match id {
            _ if empty(field) => Ok(0),
            id => u32::try_from(id.map_err(failed)?).map_err(|_| refused("owner out of range")),
        };
        let owner = (id(&header.as_old().uid, header.uid())?, id(&header.as_old().gid, header.gid())?);
        let kind = header.entry_type();

        if let Some(name) = path.file_name().and_then(|name| name.to_str())
            && name.starts_with(WHITEOUT)
        {
            white_out(&tree, &path, name, &made).map_err(failed)?;
            continue;
        }
        let target = |entry: &tar::Entry<'_, _>| -> Result<PathBuf> {
            let target = entry.link_name().map_err(failed)?.ok_or_else(|| refused("a link to nothing"))?;
            if target.as_os_str().as_bytes().contains(&0) { Err(refused("a link with NUL")) } else { Ok(target.into()) }
        };
        if path.as_os_str().is_empty() && kind != EntryType::Directory {
            return Err(refused("the root is no folder"));
        }
        match kind {
            EntryType::Directory => tree.make_folder(&path, mode, owner),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                tree.make_file(&path, mode, owner, &mut entry)
            }
            EntryType::Symlink => tree.make_link(&path, &target(&entry)?, owner),
            EntryType::Link => {
                let target = clean(&target(&entry)?).ok_or_else(|| refused("the link leads out of the image"))?;
                tree.make_hard_link(&path, &target)
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                tracing::debug!(entry = shown, "left out a device or pipe of an image");
                continue;
            }
            EntryType::XGlobalHeader => continue,
            _ => return Err(refused("an entry of unknown kind")),
        }
        .map_err(failed)?;
        made.insert(path);
    }
    Ok(())
}

fn white_out(tree: &Tree, path: &Path, name: &str, made: &BTreeSet<PathBuf>) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new(""));
    if name == OPAQUE {
        return clear(tree, folder, made);
    }
    let hidden = name.strip_prefix(WHITEOUT).unwrap_or_default();
    if hidden.is_empty() || hidden == "." || hidden == ".." {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a whiteout of nothing"));
    }
    let path = folder.join(hidden);
    if own(&path, made) { clear(tree, &path, made) } else { tree.remove(&path) }
}

/// Whether this layer has made `path` or something below it.
fn own(path: &Path, made: &BTreeSet<PathBuf>) -> bool {
    made.range(path.to_owned()..).next().is_some_and(|next| next.starts_with(path))
}

/// Removes from a folder what this layer has not made.
fn clear(tree: &Tree, folder: &Path, made: &BTreeSet<PathBuf>) -> io::Result<()> {
    for name in tree.names(folder)? {
        let path = folder.join(name);
        if own(&path, made) { clear(tree, &path, made)? } else { tree.remove(&path)? }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    struct Layer(tar::Builder<Vec<u8>>);

    impl Layer {
        fn new() -> Self {
            Self(tar::Builder::new(Vec::new()))
        }

        /// An entry with any name, also those that the `tar` crate would not write.
        fn entry(mut self, kind: EntryType, path: &str, target: &str, content: &str) -> Self {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(0o755);
            header.set_uid(0);
            header.set_gid(0);
            header.set_size(content.len() as u64);
            let raw = header.as_mut_bytes();
            raw[..path.len()].copy_from_slice(path.as_bytes());
            raw[157..157 + target.len()].copy_from_slice(target.as_bytes());
            header.set_cksum();
            self.0.append(&header, content.as_bytes()).unwrap();
            self
        }

        fn file(self, path: &str, content: &str) -> Self {
            self.entry(EntryType::Regular, path, "", content)
        }

        fn link(self, path: &str, target: &str) -> Self {
            self.entry(EntryType::Symlink, path, target, "")
        }

        fn over(self, root: &Path) -> Result<()> {
            unpack(io::Cursor::new(self.0.into_inner().unwrap()), root)
        }
    }

    fn place() -> (tempfile::TempDir, PathBuf) {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().join("root");
        fs::create_dir(&root).unwrap();
        fs::write(place.path().join("secret"), "untouched").unwrap();
        (place, root)
    }

    #[test]
    fn layers_lie_over_each_other() {
        let (_place, root) = place();
        let lower = Layer::new()
            .file("./a/one", "1")
            .file("a/two", "2")
            .file("a/sub/four", "4")
            .file("b/three", "3")
            .link("lib", "b");
        lower.over(&root).unwrap();
        let upper = Layer::new()
            .file("a/new", "n")
            .file("a/sub/five", "5")
            .file("a/.wh..wh..opq", "")
            .file(".wh.b", "")
            .entry(EntryType::Link, "a/same", "a/new", "");
        upper.over(&root).unwrap();
        assert_eq!(fs::read_to_string(root.join("a/new")).unwrap(), "n");
        assert_eq!(fs::read_to_string(root.join("a/same")).unwrap(), "n");
        assert!(root.join("a/sub/five").exists() && !root.join("a/sub/four").exists());
        assert!(!root.join("a/one").exists() && !root.join("b").exists());
    }

    #[test]
    fn files_go_through_links_inside_the_image() {
        let (_place, root) = place();
        let layer = Layer::new().entry(EntryType::Directory, "usr/lib", "", "").link("lib", "/usr/lib");
        layer.file("lib/x.so", "x").entry(EntryType::Directory, "lib", "", "").over(&root).unwrap();
        assert_eq!(fs::read_to_string(root.join("usr/lib/x.so")).unwrap(), "x");
        assert!(root.join("lib").is_symlink());
    }

    #[test]
    fn nothing_leads_out() {
        let outside = |layer: Layer| {
            let (place, root) = place();
            let result = layer.over(&root);
            assert_eq!(fs::read_to_string(place.path().join("secret")).unwrap(), "untouched");
            let names: Vec<_> = fs::read_dir(place.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            assert_eq!(names.len(), 2, "{names:?}");
            result
        };
        assert!(outside(Layer::new().file("../secret", "x")).is_err());
        assert!(outside(Layer::new().file("a/../../secret", "x")).is_err());
        assert!(outside(Layer::new().entry(EntryType::Link, "x", "../secret", "")).is_err());
        assert!(outside(Layer::new().file("../.wh.secret", "")).is_err());
        assert!(outside(Layer::new().file(".wh...", "")).is_err());
        outside(Layer::new().file("/secret", "x")).unwrap();
        // Links are resolved as if the image were the root, so these stay inside.
        outside(Layer::new().link("up", "../..").file("up/secret", "x")).unwrap();
        outside(Layer::new().link("up", "..").file("up/.wh.secret", "")).unwrap();
        outside(Layer::new().link("secret", "../secret").file("secret", "x")).unwrap();
        let _ = outside(Layer::new().link("up", "..").entry(EntryType::Link, "x", "up/secret", ""));
        let _ = outside(Layer::new().link("etc", "/proc/self/cwd").file("etc/x", "x"));
    }

    #[test]
    fn cut_archives_are_errors_and_devices_are_left_out() {
        let (_place, root) = place();
        let whole = Layer::new().file("a", &"x".repeat(2000)).0.into_inner().unwrap();
        assert!(unpack(&whole[..900], &root).is_err());
        assert!(unpack(&b"not a tar archive, but long enough to look for a header".repeat(20)[..], &root).is_err());
        Layer::new().entry(EntryType::Char, "dev/null", "", "").file("b", "b").over(&root).unwrap();
        assert!(!root.join("dev/null").exists() && root.join("b").exists());
    }
}
