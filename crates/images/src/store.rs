//! The local store: an OCI image layout, and the unpacked trees beside it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::manifest::{
    CONFIG, CREATED, ConfigFile, DOCKER_INDEX, Descriptor, INDEX, ImageConfig, ImageManifest, Index, LAYER, LOCAL,
    MANIFEST, Platform, REF_NAME, RootFs,
};
use crate::{Error, Result, archive, layer, normalize};

/// The largest JSON document that is read into memory. OCI allows registries to refuse manifests above 4 MiB.
pub(crate) const MAX_DOCUMENT: u64 = 4 << 20;

/// A local store of images. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// What `godwit image list` shows of an image.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ImageInfo {
    /// Full reference, such as `docker.io/library/demo-guest:1`.
    pub reference: String,
    /// Digest of its manifest.
    pub digest: String,
    /// Size of the layers in bytes, as stored.
    pub size: u64,
}

/// A file to be put into an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileEntry {
    /// Where it is here.
    pub source: PathBuf,
    /// Its absolute path in the image.
    pub destination: String,
    /// Its permissions there.
    pub mode: u32,
}

/// An image that lies unpacked on disk.
#[derive(Clone, Debug)]
pub struct Unpacked {
    /// The tree. Shared by all who use the image: bind it read-only.
    pub path: PathBuf,
    /// Digest of the manifest.
    pub digest: String,
    /// How to run it.
    pub config: ImageConfig,
}

impl Store {
    /// Opens a store, making it if it is not there.
    ///
    /// # Errors
    /// The folder cannot be made or is no image layout of version 1.0.0.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self> {
        let store = Self { root: root.into() };
        for folder in ["blobs/sha256", "unpacked"] {
            let path = store.root.join(folder);
            fs::create_dir_all(&path).map_err(Error::io("make folder", path))?;
        }
        let layout = store.root.join("oci-layout");
        if !layout.exists() {
            store.write(&layout, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        }
        Ok(store)
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Holds the store for itself until the file is dropped. Other processes wait.
    fn lock(&self, name: &str) -> Result<File> {
        let path = self.root.join(name);
        let file = File::options().create(true).append(true).open(&path).map_err(Error::io("open", &path))?;
        file.lock().map_err(Error::io("lock", &path))?;
        Ok(file)
    }

    /// Writes a file so that others see all of it or nothing.
    fn write(&self, path: &Path, content: &[u8]) -> Result<()> {
        let failed = |e: io::Error| Error::io("write", path)(e);
        let mut file = tempfile::NamedTempFile::new_in(&self.root).map_err(failed)?;
        file.write_all(content).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
        file.persist(path).map_err(|e| failed(e.error))?;
        Ok(())
    }

    pub(crate) fn index(&self) -> Result<Index> {
        let path = self.root.join("index.json");
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| Error::io("read", path)(e.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Index::default()),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    fn change_index(&self, change: impl FnOnce(&mut Index)) -> Result<()> {
        let _lock = self.lock(".lock")?;
        let mut index = self.index()?;
        change(&mut index);
        let bytes = serde_json::to_vec_pretty(&index).map_err(|e| Error::io("write", "index.json")(e.into()))?;
        self.write(&self.root.join("index.json"), &bytes)
    }

    /// Gives a manifest in the store a name, taking the name from whatever had it. `local`: it was made here.
    pub(crate) fn name(&self, reference: &str, mut manifest: Descriptor, local: bool) -> Result<ImageInfo> {
        manifest.annotations.insert(REF_NAME.into(), reference.into());
        if local {
            manifest.annotations.insert(LOCAL.into(), "true".into());
        }
        manifest.platform = None;
        let digest = manifest.digest.clone();
        self.change_index(|index| {
            index.manifests.retain(|other| other.annotations.get(REF_NAME).is_none_or(|name| name != reference));
            index.manifests.push(manifest);
        })?;
        let size = self.manifest(&digest)?.layers.iter().map(|layer| layer.size).sum();
        Ok(ImageInfo { reference: reference.into(), digest, size })
    }

    /// Path of a blob. The digest is checked, as it becomes part of a path.
    pub(crate) fn blob(&self, digest: &str) -> Result<PathBuf> {
        Ok(self.root.join("blobs/sha256").join(hex(digest)?))
    }

    /// Reads a small blob and checks it against its digest.
    pub(crate) fn document(&self, digest: &str) -> Result<Vec<u8>> {
        let path = self.blob(digest)?;
        let damaged = |reason: String| Error::Damaged { digest: digest.into(), reason };
        let file = File::open(&path).map_err(|e| damaged(e.to_string()))?;
        let mut bytes = Vec::new();
        file.take(MAX_DOCUMENT).read_to_end(&mut bytes).map_err(Error::io("read", &path))?;
        if digest_of(&bytes) != digest { Err(damaged("its content has another digest".into())) } else { Ok(bytes) }
    }

    pub(crate) fn manifest(&self, digest: &str) -> Result<ImageManifest> {
        serde_json::from_slice(&self.document(digest)?)
            .map_err(|e| Error::Damaged { digest: digest.into(), reason: e.to_string() })
    }

    /// Stores what a reader gives as a blob; with `expected`, only if it has that digest.
    pub(crate) fn put(&self, content: &mut dyn Read, expected: Option<&str>) -> Result<(String, u64)> {
        let failed = |e: io::Error| Error::io("write a blob into", &self.root)(e);
        let mut file = tempfile::NamedTempFile::new_in(&self.root).map_err(failed)?;
        let mut hasher = Sha256::new();
        let mut size = 0u64;
        let mut buffer = vec![0; 1 << 18];
        loop {
            let read = match content.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed(error)),
            };
            let bytes = buffer.get(..read).unwrap_or_default();
            hasher.update(bytes);
            file.write_all(bytes).map_err(failed)?;
            size += read as u64;
        }
        let digest = format!("sha256:{:x}", hasher.finalize());
        if let Some(expected) = expected.filter(|expected| **expected != digest) {
            return Err(Error::Damaged { digest: expected.into(), reason: format!("its content has {digest}") });
        }
        let path = self.blob(&digest)?;
        if !path.exists() {
            file.as_file().sync_data().map_err(failed)?;
            fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644)).map_err(failed)?;
            file.persist(&path).map_err(|e| failed(e.error))?;
        }
        Ok((digest, size))
    }

    pub(crate) fn put_json(&self, media_type: &str, value: &impl serde::Serialize) -> Result<Descriptor> {
        let bytes = serde_json::to_vec(value).map_err(|e| Error::io("write", "blob")(e.into()))?;
        self.put_document(media_type, &bytes)
    }

    pub(crate) fn put_document(&self, media_type: &str, bytes: &[u8]) -> Result<Descriptor> {
        let (digest, size) = self.put(&mut &*bytes, None)?;
        Ok(Descriptor { media_type: media_type.into(), digest, size, annotations: Default::default(), platform: None })
    }

    /// Makes an image out of files: one layer, no program to run. The files belong to root in the image, and equal files
    /// give an equal image.
    ///
    /// # Errors
    /// A file that cannot be read, a path that leads out of the image, a name that is no reference.
    pub fn build(&self, name: &str, files: &[FileEntry]) -> Result<ImageInfo> {
        let reference = normalize(name)?;
        let mut archive = tempfile::tempfile_in(&self.root).map_err(Error::io("write into", &self.root))?;
        {
            let mut tar = tar::Builder::new(io::BufWriter::new(&mut archive));
            for FileEntry { source, destination, mode } in files {
                let path = crate::tree::clean(Path::new(destination)).filter(|path| !path.as_os_str().is_empty());
                let path = path.ok_or_else(|| Error::Layer {
                    entry: destination.clone(),
                    reason: "the path names no file in the image".into(),
                })?;
                let failed = |e: io::Error| Error::io("add to an image", source)(e);
                let file = File::open(source).map_err(failed)?;
                let metadata = file.metadata().map_err(failed)?;
                if !metadata.is_file() {
                    return Err(failed(io::Error::other("only ordinary files can be added")));
                }
                let mut header = tar::Header::new_gnu();
                header.set_size(metadata.len());
                header.set_mode(*mode);
                header.set_uid(0);
                header.set_gid(0);
                header.set_mtime(0);
                header.set_entry_type(tar::EntryType::Regular);
                tar.append_data(&mut header, path, file).map_err(failed)?;
            }
            let mut writer = tar.into_inner().map_err(Error::io("write into", &self.root))?;
            writer.flush().map_err(Error::io("write into", &self.root))?;
        }
        io::Seek::rewind(&mut archive).map_err(Error::io("read", &self.root))?;
        let (digest, size) = self.put(&mut archive, None)?;
        let here = Platform::here();
        let config = ConfigFile {
            architecture: here.architecture,
            os: here.os,
            config: None,
            rootfs: RootFs { kind: "layers".into(), diff_ids: vec![digest.clone()] },
        };
        let layers = vec![Descriptor {
            media_type: LAYER.into(),
            digest,
            size,
            annotations: Default::default(),
            platform: None,
        }];
        let manifest = ImageManifest {
            schema_version: 2,
            media_type: Some(MANIFEST.into()),
            config: self.put_json(CONFIG, &config)?,
            layers,
            annotations: Default::default(),
        };
        let descriptor = self.put_json(MANIFEST, &manifest)?;
        self.name(&reference, descriptor, true)
    }

    /// Takes the images of an archive (`docker save`, `skopeo copy … oci-archive:`, `buildah push … oci-archive:`) into the
    /// store, under the names in it or under `name` if it holds just one.
    ///
    /// # Errors
    /// [`Error::Archive`] when it is none, has no name, or has several images and `name` is given.
    pub fn import(&self, path: &Path, name: Option<&str>) -> Result<Vec<ImageInfo>> {
        archive::import(self, path, name)
    }

    /// All named images, by name.
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn list(&self) -> Result<Vec<ImageInfo>> {
        let mut images: Vec<ImageInfo> = Vec::new();
        for descriptor in self.index()?.manifests {
            let Some(reference) = descriptor.annotations.get(REF_NAME) else { continue };
            // A damaged image is listed too, so that it can be seen and removed.
            let size = self.manifest(&descriptor.digest).map_or(0, |m| m.layers.iter().map(|layer| layer.size).sum());
            images.push(ImageInfo { reference: reference.clone(), digest: descriptor.digest, size });
        }
        images.sort_by(|a, b| a.reference.cmp(&b.reference));
        Ok(images)
    }

    /// The digest of the manifest that has this name or digest, or `None` if the image is not here.
    ///
    /// # Errors
    /// Not a reference; the index cannot be read.
    pub fn resolve(&self, reference: &str) -> Result<Option<String>> {
        let full = normalize(reference)?;
        let index = self.index()?;
        let pinned = full.split_once('@').map(|(_, digest)| digest);
        let found = index.manifests.into_iter().find(|manifest| match pinned {
            Some(digest) => manifest.digest == digest,
            None => manifest.annotations.get(REF_NAME) == Some(&full),
        });
        if let Some(found) = found {
            return Ok(Some(found.digest));
        }
        // An image that was pulled by digest has its blob, and maybe the name only of another.
        Ok(pinned.filter(|digest| self.manifest(digest).is_ok()).map(str::to_owned))
    }

    /// Whether the image was built or imported here, so that no registry need know it.
    ///
    /// # Errors
    /// As [`Self::resolve`].
    pub fn is_local(&self, reference: &str) -> Result<bool> {
        let full = normalize(reference)?;
        let named = |manifest: &Descriptor| manifest.annotations.get(REF_NAME) == Some(&full);
        Ok(self.index()?.manifests.iter().any(|manifest| named(manifest) && manifest.annotations.contains_key(LOCAL)))
    }

    /// How the image is to be run.
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn config(&self, digest: &str) -> Result<ImageConfig> {
        let config = self.manifest(digest)?.config;
        let file: ConfigFile = serde_json::from_slice(&self.document(&config.digest)?)
            .map_err(|e| Error::Damaged { digest: config.digest, reason: e.to_string() })?;
        Ok(file.config.unwrap_or_default())
    }

    /// Takes a name away, and with it all that no other image needs; `false` if there was none. Trees that are mounted
    /// somewhere stay until the next [`Self::remove`] or [`Self::prune`].
    ///
    /// # Errors
    /// Not a reference; the store cannot be written.
    pub fn remove(&self, reference: &str) -> Result<bool> {
        let full = normalize(reference)?;
        let mut found = false;
        self.change_index(|index| {
            index.manifests.retain(|manifest| {
                let this = manifest.annotations.get(REF_NAME) == Some(&full);
                found |= this;
                !this
            });
        })?;
        if found {
            self.prune()?;
        }
        Ok(found)
    }

    /// Deletes blobs and trees that no named image needs and nobody has mounted.
    ///
    /// # Errors
    /// The store cannot be read or written.
    pub fn prune(&self) -> Result<()> {
        let _lock = self.lock(".lock")?;
        let mut needed = std::collections::BTreeSet::new();
        for descriptor in self.index()?.manifests {
            needed.insert(hex(&descriptor.digest)?.to_owned());
            if let Ok(manifest) = self.manifest(&descriptor.digest) {
                for blob in manifest.layers.iter().chain([&manifest.config]) {
                    needed.insert(hex(&blob.digest)?.to_owned());
                }
            }
        }
        let mounted = mounted();
        for folder in ["blobs/sha256", "unpacked"] {
            let folder = self.root.join(folder);
            for entry in fs::read_dir(&folder).map_err(Error::io("read", &folder))? {
                let entry = entry.map_err(Error::io("read", &folder))?;
                let name = entry.file_name().to_string_lossy().into_owned();
                if needed.contains(&name) || mounted.contains(&format!("unpacked/{name}")) {
                    continue;
                }
                let path = entry.path();
                let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                removed.map_err(Error::io("remove", path))?;
            }
        }
        Ok(())
    }

    /// The image as a tree on disk; unpacked on first use, then shared.
    ///
    /// # Errors
    /// [`Error::Absent`]; whatever is wrong with a layer.
    pub fn unpack(&self, reference: &str) -> Result<Unpacked> {
        let digest = self.resolve(reference)?.ok_or_else(|| Error::Absent(reference.into()))?;
        self.unpack_digest(&digest)
    }

    /// As [`Self::unpack`], for a manifest's digest.
    ///
    /// # Errors
    /// As [`Self::unpack`].
    pub fn unpack_digest(&self, digest: &str) -> Result<Unpacked> {
        let config = self.config(digest)?;
        let path = self.root.join("unpacked").join(hex(digest)?);
        let unpacked = Unpacked { path: path.clone(), digest: digest.into(), config };
        if path.is_dir() {
            return Ok(unpacked);
        }
        let _lock = self.lock(".unpack.lock")?;
        if path.is_dir() {
            return Ok(unpacked); // another process was faster
        }
        let work = tempfile::Builder::new().prefix(".unpack-").tempdir_in(&self.root);
        let work = work.map_err(Error::io("make a folder in", &self.root))?;
        let root = work.path().join("root");
        fs::create_dir(&root).map_err(Error::io("make folder", &root))?;
        for layer in self.manifest(digest)?.layers {
            self.unpack_layer(&layer, &root)?;
        }
        fs::set_permissions(&root, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .map_err(Error::io("set the mode of", &root))?;
        fs::rename(&root, &path).map_err(Error::io("move an image to", &path))?;
        Ok(unpacked)
    }

    fn unpack_layer(&self, layer: &Descriptor, root: &Path) -> Result<()> {
        let path = self.blob(&layer.digest)?;
        let damaged = |reason: String| Error::Damaged { digest: layer.digest.clone(), reason };
        let open = || File::open(&path).map_err(|e| damaged(e.to_string()));
        // Checked as a whole before anything of it is unpacked.
        let mut hasher = Sha256::new();
        io::copy(&mut open()?, &mut hasher).map_err(Error::io("read", &path))?;
        if format!("sha256:{:x}", hasher.finalize()) != layer.digest {
            return Err(damaged("its content has another digest".into()));
        }
        let reader = layer::decompress(open()?)
            .map_err(|e| Error::Unsupported { reference: layer.digest.clone(), reason: e.to_string() })?;
        layer::unpack(reader, root)
    }

    /// The one manifest for this machine in a document that is a manifest or an index.
    pub(crate) fn choose(&self, reference: &str, descriptor: &Descriptor) -> Result<Descriptor> {
        if ![INDEX, DOCKER_INDEX].contains(&descriptor.media_type.as_str()) {
            return Ok(descriptor.clone());
        }
        let index: Index = serde_json::from_slice(&self.document(&descriptor.digest)?)
            .map_err(|e| Error::Damaged { digest: descriptor.digest.clone(), reason: e.to_string() })?;
        choose_platform(reference, index)
    }
}

/// The manifest for this machine.
pub(crate) fn choose_platform(reference: &str, index: Index) -> Result<Descriptor> {
    let here = Platform::here();
    index.manifests.into_iter().find(|m| m.platform.as_ref().is_none_or(|p| *p == here)).ok_or_else(|| {
        Error::Unsupported {
            reference: reference.into(),
            reason: format!("no match for platform {}/{} in manifest", here.os, here.architecture),
        }
    })
}

/// The hexadecimal part of a SHA-256 digest.
pub(crate) fn hex(digest: &str) -> Result<&str> {
    digest
        .strip_prefix("sha256:")
        .filter(|hex| hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
        .ok_or_else(|| Error::Damaged { digest: digest.into(), reason: "only sha256 digests are supported".into() })
}

pub(crate) fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{:x}", Sha256::digest(bytes))
}

/// The trees (`unpacked/<hex>`) that some process on this machine has mounted.
fn mounted() -> std::collections::BTreeSet<String> {
    let mut trees = std::collections::BTreeSet::new();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in processes.filter(|p| p.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit)) {
        let Ok(text) = fs::read_to_string(process.path().join("mountinfo")) else { continue };
        for line in text.lines() {
            let Some((_, rest)) = line.split_once("/unpacked/") else { continue };
            let name: String = rest.chars().take_while(char::is_ascii_hexdigit).collect();
            trees.insert(format!("unpacked/{name}"));
        }
    }
    trees
}

/// Annotation of the time of building; kept by [`Store::import`] if the archive has it.
pub(crate) fn keep_annotations(descriptor: &mut Descriptor) {
    descriptor.annotations.retain(|key, _| key == CREATED);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(place.path().join("images")).unwrap();
        (place, store)
    }

    fn build(place: &Path, store: &Store, name: &str, content: &str) -> ImageInfo {
        let file = place.join("file");
        fs::write(&file, content).unwrap();
        let entry = FileEntry { source: file, destination: "/disk/disk.img".into(), mode: 0o644 };
        store.build(name, &[entry]).unwrap()
    }

    #[test]
    fn images_are_built_listed_unpacked_and_removed() {
        let (place, store) = store();
        let built = build(place.path(), &store, "demo:1", "content");
        assert_eq!(built.reference, "docker.io/library/demo:1");
        assert_eq!(store.list().unwrap(), std::slice::from_ref(&built));
        assert_eq!(store.resolve("demo:1").unwrap().as_deref(), Some(built.digest.as_str()));
        assert_eq!(store.resolve("docker.io/library/demo:1").unwrap(), store.resolve("demo:1").unwrap());
        assert_eq!(store.resolve(&format!("demo@{}", built.digest)).unwrap(), store.resolve("demo:1").unwrap());
        assert_eq!(store.resolve("demo").unwrap(), None);
        let tree = store.unpack("demo:1").unwrap().path;
        assert_eq!(fs::read_to_string(tree.join("disk/disk.img")).unwrap(), "content");
        assert_eq!(store.unpack("demo:1").unwrap().path, tree);
        assert_eq!(build(place.path(), &store, "demo:1", "content").digest, built.digest, "equal files, equal image");
        let other = build(place.path(), &store, "demo:1", "new content");
        assert_ne!(other.digest, built.digest);
        assert_eq!(store.list().unwrap(), [other]);
        assert!(store.remove("demo:1").unwrap());
        assert!(!store.remove("demo:1").unwrap());
        assert!(matches!(store.unpack("demo:1"), Err(Error::Absent(_))));
        assert_eq!(fs::read_dir(store.root().join("blobs/sha256")).unwrap().count(), 0);
        assert!(!tree.exists());
    }

    #[test]
    fn damage_is_found() {
        let (place, store) = store();
        let built = build(place.path(), &store, "demo", "content");
        let layer = store.manifest(&built.digest).unwrap().layers.remove(0);
        let path = store.blob(&layer.digest).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes[600] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(matches!(store.unpack("demo"), Err(Error::Damaged { .. })));
        fs::write(store.blob(&built.digest).unwrap(), "{}").unwrap();
        assert!(matches!(store.unpack("demo"), Err(Error::Damaged { .. })));
        assert!(store.blob("sha256:../../etc/passwd").is_err());
    }

    #[test]
    fn names_that_are_none_are_refused() {
        let (_place, store) = store();
        for bad in ["", "UPPER", "a b", "x:y:z", "../x"] {
            assert!(matches!(store.unpack(bad), Err(Error::Reference { .. })), "{bad}");
        }
        let entry = FileEntry { source: "/etc/hostname".into(), destination: "../x".into(), mode: 0 };
        assert!(matches!(store.build("x", &[entry]), Err(Error::Layer { .. })));
    }

    #[test]
    fn several_writers_lose_nothing() {
        let (place, store) = store();
        std::thread::scope(|scope| {
            for number in 0..8 {
                let (store, folder) = (store.clone(), place.path().join(number.to_string()));
                scope.spawn(move || {
                    fs::create_dir(&folder).unwrap();
                    build(&folder, &store, &format!("demo:{number}"), &number.to_string());
                    store.unpack(&format!("demo:{number}")).unwrap();
                });
            }
        });
        assert_eq!(store.list().unwrap().len(), 8);
    }
}
