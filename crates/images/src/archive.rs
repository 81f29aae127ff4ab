//! Image archives: an OCI image layout in a tar file, or what `docker save` writes.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::manifest::{CONFIG, Descriptor, ImageManifest, Index, LAYER, MANIFEST, REF_NAME};
use crate::store::{MAX_DOCUMENT, Store, hex, keep_annotations};
use crate::tree::clean;
use crate::{Error, ImageInfo, Result, layer, normalize};

/// containerd's and nerdctl's annotation with the full name.
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// An entry of docker's `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// The archive's files, unpacked into a folder that is deleted at the end.
struct Content {
    archive: PathBuf,
    folder: tempfile::TempDir,
}

impl Content {
    fn bad(&self, reason: impl Into<String>) -> Error {
        Error::Archive { path: self.archive.clone(), reason: reason.into() }
    }

    /// An ordinary file in the archive; what leads out of it is not there.
    fn open(&self, name: &str) -> Result<File> {
        let path = clean(Path::new(name)).ok_or_else(|| self.bad(format!("{name:?} leads out of the archive")))?;
        let path = self.folder.path().join(path);
        // The unpacked layers of an archive may be links to each other (docker does that), but only inside.
        let path = path.canonicalize().map_err(|_| self.bad(format!("it has no {name}")))?;
        let inside = self.folder.path().canonicalize().map_err(Error::io("open", self.folder.path()))?;
        if !path.starts_with(&inside) || !path.is_file() {
            return Err(self.bad(format!("{name} is no ordinary file of the archive")));
        }
        File::open(&path).map_err(Error::io("open", path))
    }

    fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T> {
        let reader = io::Read::take(self.open(name)?, MAX_DOCUMENT);
        serde_json::from_reader(io::BufReader::new(reader)).map_err(|e| self.bad(format!("{name}: {e}")))
    }
}

pub(crate) fn import(store: &Store, path: &Path, name: Option<&str>) -> Result<Vec<ImageInfo>> {
    let name = name.map(normalize).transpose()?;
    let file = File::open(path).map_err(Error::io("open", path))?;
    let content = Content {
        archive: path.into(),
        folder: tempfile::Builder::new()
            .prefix(".import-")
            .tempdir_in(store.root())
            .map_err(Error::io("make a folder in", store.root()))?,
    };
    let reader = layer::decompress(file).map_err(|e| content.bad(e.to_string()))?;
    layer::unpack(reader, content.folder.path()).map_err(|e| content.bad(e.to_string()))?;

    let has = |name: &str| fs::exists(content.folder.path().join(name)).unwrap_or(false);
    let mut images = if has("index.json") {
        layout(store, &content)?
    } else if has("manifest.json") {
        saved(store, &content)?
    } else {
        return Err(content.bad("it has neither index.json nor manifest.json"));
    };
    if let Some(name) = name {
        match images.as_mut_slice() {
            [(names, _)] => *names = vec![name],
            other => return Err(content.bad(format!("it has {} images, so none can be renamed", other.len()))),
        }
    }
    let mut infos = Vec::new();
    for (names, descriptor) in images {
        if names.is_empty() {
            return Err(content.bad("an image in it has no name; give one"));
        }
        for name in names {
            infos.push(store.name(&normalize(&name)?, descriptor.clone(), true)?);
        }
    }
    Ok(infos)
}

fn layout(store: &Store, content: &Content) -> Result<Vec<(Vec<String>, Descriptor)>> {
    let blob = |digest: &str| -> Result<()> {
        let mut file = content.open(&format!("blobs/sha256/{}", hex(digest)?))?;
        store.put(&mut file, Some(digest)).map(|_| ())
    };
    let index: Index = content.json("index.json")?;
    let mut images: Vec<(Vec<String>, Descriptor)> = Vec::new();
    for descriptor in index.manifests {
        let names = [CONTAINERD_NAME, REF_NAME].iter().filter_map(|key| descriptor.annotations.get(*key));
        // A bare tag ("latest") is what some tools write: no name that could be used.
        let names: Vec<String> = names.filter(|name| name.contains(['/', ':'])).take(1).cloned().collect();
        blob(&descriptor.digest)?;
        let mut chosen = store.choose(&descriptor.digest, &descriptor)?;
        if chosen.digest != descriptor.digest {
            blob(&chosen.digest)?;
        }
        let manifest = store.manifest(&chosen.digest)?;
        for part in manifest.layers.iter().chain([&manifest.config]) {
            blob(&part.digest)?;
        }
        keep_annotations(&mut chosen);
        match images.iter_mut().find(|(_, other)| other.digest == chosen.digest) {
            Some((known, _)) => known.extend(names),
            None => images.push((names, chosen)),
        }
    }
    Ok(images)
}

fn saved(store: &Store, content: &Content) -> Result<Vec<(Vec<String>, Descriptor)>> {
    let list: Vec<Saved> = content.json("manifest.json")?;
    let mut images = Vec::new();
    for image in list {
        let part = |name: &str, media_type: &str| -> Result<Descriptor> {
            let (digest, size) = store.put(&mut content.open(name)?, None)?;
            let media_type = media_type.into();
            Ok(Descriptor { media_type, digest, size, annotations: Default::default(), platform: None })
        };
        let manifest = ImageManifest {
            schema_version: 2,
            media_type: Some(MANIFEST.into()),
            config: part(&image.config, CONFIG)?,
            layers: image.layers.iter().map(|name| part(name, LAYER)).collect::<Result<_>>()?,
            annotations: Default::default(),
        };
        images.push((image.repo_tags.unwrap_or_default(), store.put_json(MANIFEST, &manifest)?));
    }
    Ok(images)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(place: &Path, files: &[(&str, &[u8])]) -> PathBuf {
        let path = place.join("archive.tar");
        let mut tar = tar::Builder::new(File::create(&path).unwrap());
        for (name, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, *content).unwrap();
        }
        tar.finish().unwrap();
        path
    }

    fn layer(name: &str, content: &str) -> Vec<u8> {
        let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, content.as_bytes()).unwrap();
        tar.into_inner().unwrap().finish().unwrap()
    }

    #[test]
    fn docker_archives_are_taken_in() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(place.path().join("images")).unwrap();
        let manifest = br#"[{"Config":"c.json","RepoTags":["demo:1","other/demo:2"],"Layers":["l/layer.tar"]}]"#;
        let config = br#"{"architecture":"amd64","os":"linux","config":{"Cmd":["/x"]},"rootfs":{"type":"layers"}}"#;
        let layer = layer("disk/x", "content");
        let files: [(&str, &[u8]); 3] = [("manifest.json", manifest), ("c.json", config), ("l/layer.tar", &layer)];
        let path = archive(place.path(), &files);
        assert_eq!(store.import(&path, None).unwrap().len(), 2);
        let unpacked = store.unpack("other/demo:2").unwrap();
        assert_eq!(fs::read_to_string(unpacked.path.join("disk/x")).unwrap(), "content");
        assert_eq!(unpacked.config.cmd, Some(vec!["/x".to_owned()]));
        store.import(&path, Some("mine:3")).unwrap();
        assert!(store.resolve("mine:3").unwrap().is_some());
    }

    #[test]
    fn layouts_are_taken_in() {
        let place = tempfile::tempdir().unwrap();
        let (from, to) = (place.path().join("from"), place.path().join("to"));
        let from = Store::open(from).unwrap();
        fs::write(place.path().join("f"), "content").unwrap();
        let entry = crate::FileEntry { source: place.path().join("f"), destination: "/disk/f".into(), mode: 0o644 };
        from.build("demo:1", &[entry]).unwrap();
        let path = place.path().join("layout.tar");
        let mut tar = tar::Builder::new(File::create(&path).unwrap());
        tar.append_dir_all(".", from.root()).unwrap();
        tar.finish().unwrap();
        let to = Store::open(to).unwrap();
        assert_eq!(to.import(&path, None).unwrap(), from.list().unwrap());
        assert!(to.unpack("demo:1").unwrap().path.join("disk/f").exists());
    }

    #[test]
    fn other_files_are_refused() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(place.path().join("images")).unwrap();
        let bad = |files: &[(&str, &[u8])]| store.import(&archive(place.path(), files), None).unwrap_err();
        assert!(matches!(bad(&[("a", b"b")]), Error::Archive { .. }));
        assert!(matches!(bad(&[("manifest.json", b"[{}]")]), Error::Archive { .. }));
        let out = br#"[{"Config":"../../../etc/hostname","RepoTags":["x"],"Layers":[]}]"#;
        assert!(matches!(bad(&[("manifest.json", out)]), Error::Archive { .. }));
        let path = place.path().join("text");
        fs::write(&path, "hello").unwrap();
        assert!(matches!(store.import(&path, None), Err(Error::Archive { .. })));
        assert!(matches!(store.import(Path::new("/nonexistent"), None), Err(Error::Io { .. })));
        assert!(store.list().unwrap().is_empty());
    }
}
