//! Fetching images from registries.

use std::str::FromStr;
use std::time::Duration;

use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;

use crate::manifest::{DOCKER_INDEX, DOCKER_MANIFEST, Descriptor, INDEX, ImageManifest, Index, MANIFEST};
use crate::store::{Store, choose_platform, digest_of};
use crate::{Error, Result, Unpacked, normalize};

/// When to ask the registry (Kubernetes' `imagePullPolicy`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullPolicy {
    /// Each time.
    Always,
    /// When the image is not in the store.
    IfNotPresent,
    /// Not at all.
    Never,
}

impl PullPolicy {
    /// Kubernetes' default: `Always` for the tag `latest` (or none), else `IfNotPresent`. A registry called `*.local` is
    /// nobody's on the network (RFC 6762), so what is in the store under such a name is not asked for elsewhere.
    pub fn of(policy: Option<&str>, reference: &str) -> Self {
        let full = normalize(reference).unwrap_or_default();
        let local = is_local_name(&full);
        match policy {
            Some("Never") => Self::Never,
            Some("IfNotPresent") => Self::IfNotPresent,
            _ if local => Self::IfNotPresent,
            Some("Always") => Self::Always,
            _ => {
                if full.ends_with(":latest") {
                    Self::Always
                } else {
                    Self::IfNotPresent
                }
            }
        }
    }
}

/// How to identify to a registry.
#[derive(Clone, Debug, Default)]
pub enum Auth {
    /// Not at all.
    #[default]
    Anonymous,
    /// User and password.
    Basic(String, String),
}

impl Store {
    /// The image as a tree on disk, fetched as `policy` says. Images that were built or imported here are never fetched:
    /// what a registry has under their name is something else. Unpacking runs on a blocking thread.
    ///
    /// # Errors
    /// [`Error::Absent`], [`Error::Pull`] with the registry's words, and those of [`Store::unpack`].
    pub async fn ensure(&self, reference: &str, policy: PullPolicy, auth: &Auth) -> Result<Unpacked> {
        let present = self.resolve(reference)?;
        let local = self.is_local(reference)?;
        let digest = match (present, policy) {
            (Some(digest), PullPolicy::IfNotPresent | PullPolicy::Never) => digest,
            (Some(digest), PullPolicy::Always) if local => digest,
            (None, PullPolicy::Never) => return Err(Error::Absent(reference.into())),
            (_, PullPolicy::Always) | (None, PullPolicy::IfNotPresent) => self.pull(reference, auth).await?,
        };
        let store = self.clone();
        tokio::task::spawn_blocking(move || store.unpack_digest(&digest))
            .await
            .map_err(|e| Error::Pull { reference: reference.into(), reason: e.to_string() })?
    }

    /// Fetches an image from its registry into the store and returns its digest. Blobs that are here are not fetched again.
    ///
    /// # Errors
    /// [`Error::Pull`] with the reason in a user's words; [`Error::Unsupported`] if there is none for this machine.
    pub async fn pull(&self, reference: &str, auth: &Auth) -> Result<String> {
        let full = normalize(reference)?;
        let failed = |reason: String| Error::Pull { reference: full.clone(), reason };
        let image = oci_client::Reference::from_str(&full).map_err(|e| failed(e.to_string()))?;
        // Fails only if there is one already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let config = ClientConfig {
            protocol: if is_here(image.registry()) { ClientProtocol::Http } else { ClientProtocol::Https },
            connect_timeout: Some(Duration::from_secs(10)),
            read_timeout: Some(Duration::from_secs(60)),
            user_agent: "godwit",
            ..ClientConfig::default()
        };
        // Such an image is meant to be made here, so its absence is explained by that and not only by name resolution.
        let failed = |reason: String| {
            let hint = "; nor is it in the local store: add it with `godwit image build` or `godwit image import`";
            failed(if is_local_name(&full) { reason + hint } else { reason })
        };
        let client = oci_client::Client::try_from(config).map_err(|e| failed(reason(&e)))?;
        let auth = match auth {
            Auth::Anonymous => RegistryAuth::Anonymous,
            Auth::Basic(user, password) => RegistryAuth::Basic(user.clone(), password.clone()),
        };
        let accepted = [MANIFEST, DOCKER_MANIFEST, INDEX, DOCKER_INDEX];

        let (mut bytes, _) =
            client.pull_manifest_raw(&image, &auth, &accepted).await.map_err(|e| failed(reason(&e)))?;
        if let Ok(index) = serde_json::from_slice::<Index>(&bytes)
            && !index.manifests.is_empty()
        {
            let chosen = choose_platform(&full, index)?;
            let chosen = image.clone_with_digest(chosen.digest);
            (bytes, _) = client.pull_manifest_raw(&chosen, &auth, &accepted).await.map_err(|e| failed(reason(&e)))?;
        }
        let manifest: ImageManifest = serde_json::from_slice(&bytes).map_err(|e| failed(format!("manifest: {e}")))?;
        for blob in manifest.layers.iter().chain([&manifest.config]) {
            self.fetch(&client, &image, blob).await.map_err(|e| match e {
                Error::Pull { reason, .. } => failed(reason),
                other => other,
            })?;
        }
        let media_type = manifest.media_type.clone().unwrap_or_else(|| MANIFEST.into());
        let descriptor = self.put_document(&media_type, &bytes)?;
        debug_assert_eq!(descriptor.digest, digest_of(&bytes));
        let digest = descriptor.digest.clone();
        self.name(&full, descriptor, false)?;
        Ok(digest)
    }

    async fn fetch(&self, client: &oci_client::Client, image: &oci_client::Reference, blob: &Descriptor) -> Result<()> {
        if self.blob(&blob.digest)?.exists() {
            return Ok(());
        }
        let file = tempfile::NamedTempFile::new_in(self.root()).map_err(Error::io("write into", self.root()))?;
        let write = tokio::fs::File::from_std(file.reopen().map_err(Error::io("open", file.path()))?);
        client
            .pull_blob(image, blob.digest.as_str(), write)
            .await
            .map_err(|e| Error::Pull { reference: image.whole(), reason: reason(&e) })?;
        let (store, digest) = (self.clone(), blob.digest.clone());
        let put = tokio::task::spawn_blocking(move || {
            let mut reader = file.reopen().map_err(Error::io("open", file.path()))?;
            store.put(&mut reader, Some(&digest)).map(|_| ())
        });
        put.await.map_err(|e| Error::Pull { reference: image.whole(), reason: e.to_string() })?
    }
}

/// Whether a full reference is of a registry called `*.local`.
fn is_local_name(full: &str) -> bool {
    full.split('/').next().is_some_and(|registry| registry.split(':').next().unwrap_or(registry).ends_with(".local"))
}

/// Whether a registry is on this machine; such ones are spoken to without TLS, as Docker does.
fn is_here(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// What went wrong, down to the last cause: `reqwest` hides the interesting part (no such host, connection refused).
fn reason(error: &OciDistributionError) -> String {
    match error {
        OciDistributionError::ImageManifestNotFoundError(_) => "not found".into(),
        OciDistributionError::RegistryError { envelope, .. } if !envelope.errors.is_empty() => {
            use oci_client::errors::OciErrorCode::{ManifestUnknown, NameUnknown, NotFound};
            if envelope.errors.iter().all(|e| matches!(e.code, ManifestUnknown | NameUnknown | NotFound)) {
                return "not found".into();
            }
            let texts: Vec<String> = envelope.errors.iter().map(|e| format!("{:?}: {}", e.code, e.message)).collect();
            texts.join("; ")
        }
        other => {
            let mut text = other.to_string();
            let mut cause = std::error::Error::source(other);
            while let Some(next) = cause {
                let more = next.to_string();
                if !text.ends_with(&more) {
                    text = format!("{text}: {more}");
                }
                cause = next.source();
            }
            text
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_kubernetes_ones() {
        assert_eq!(PullPolicy::of(None, "demo"), PullPolicy::Always);
        assert_eq!(PullPolicy::of(None, "demo:latest"), PullPolicy::Always);
        assert_eq!(PullPolicy::of(None, "demo:1"), PullPolicy::IfNotPresent);
        assert_eq!(PullPolicy::of(Some("Never"), "demo"), PullPolicy::Never);
        assert_eq!(PullPolicy::of(Some("Always"), "godwit.local/demo"), PullPolicy::IfNotPresent);
    }

    #[test]
    fn only_own_registries_go_without_tls() {
        assert!(is_here("localhost:5000") && is_here("127.0.0.1"));
        assert!(!is_here("localhost.example.com") && !is_here("quay.io:443"));
    }

    const UNKNOWN: &[u8] = br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#;

    /// A registry that answers each path with a document, and everything else with 404.
    async fn registry(documents: std::collections::BTreeMap<String, (String, Vec<u8>)>) -> u16 {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    if stream.read_exact(&mut byte).await.is_err() {
                        break;
                    }
                    request.extend(byte);
                }
                let line = String::from_utf8_lossy(&request).lines().next().unwrap_or_default().to_owned();
                let path = line.split(' ').nth(1).unwrap_or_default();
                let (status, kind, body) = match documents.get(path) {
                    Some((kind, body)) => ("200 OK", kind.as_str(), body.clone()),
                    None => ("404 Not Found", "application/json", UNKNOWN.to_vec()),
                };
                let length = body.len();
                let head = format!(
                    "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
                );
                let _ = stream.write_all(&[head.as_bytes(), &body].concat()).await;
            }
        });
        port
    }

    #[tokio::test]
    async fn images_come_from_a_registry_and_are_checked() {
        let place = tempfile::tempdir().unwrap();
        // What the registry has is built in another store first.
        let origin = Store::open(place.path().join("origin")).unwrap();
        let file = place.path().join("file");
        std::fs::write(&file, "content").unwrap();
        let entry = crate::FileEntry { source: file, destination: "/disk/x".into(), mode: 0o644 };
        let built = origin.build("demo:1", &[entry]).unwrap();
        let manifest = origin.manifest(&built.digest).unwrap();
        let mut documents = std::collections::BTreeMap::new();
        documents.insert("/v2/".into(), ("application/json".into(), b"{}".to_vec()));
        let bytes = origin.document(&built.digest).unwrap();
        documents.insert("/v2/demo/manifests/1".into(), (MANIFEST.to_owned(), bytes.clone()));
        documents.insert("/v2/bad/manifests/1".into(), (MANIFEST.to_owned(), bytes));
        for blob in manifest.layers.iter().chain([&manifest.config]) {
            let bytes = std::fs::read(origin.blob(&blob.digest).unwrap()).unwrap();
            let kind = "application/octet-stream".to_owned();
            documents.insert(format!("/v2/demo/blobs/{}", blob.digest), (kind.clone(), bytes));
            documents.insert(format!("/v2/bad/blobs/{}", blob.digest), (kind, b"something else".to_vec()));
        }
        let port = registry(documents).await;
        let store = Store::open(place.path().join("store")).unwrap();
        let bad = store.ensure(&format!("127.0.0.1:{port}/bad:1"), PullPolicy::Always, &Auth::Anonymous).await;
        assert!(matches!(bad, Err(Error::Pull { .. } | Error::Damaged { .. })), "{bad:?}");
        assert!(store.list().unwrap().is_empty());
        let name = format!("127.0.0.1:{port}/demo:1");
        let unpacked = store.ensure(&name, PullPolicy::IfNotPresent, &Auth::Anonymous).await.unwrap();
        assert_eq!(unpacked.digest, built.digest);
        assert_eq!(std::fs::read_to_string(unpacked.path.join("disk/x")).unwrap(), "content");
        assert!(!store.is_local(&name).unwrap());
        let none = store.ensure(&format!("127.0.0.1:{port}/none:1"), PullPolicy::IfNotPresent, &Auth::Anonymous).await;
        assert!(none.unwrap_err().to_string().ends_with("not found"));
    }

    #[tokio::test]
    async fn an_image_that_is_to_be_made_here_is_missing_in_words_that_help() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(place.path()).unwrap();
        // Nothing listens on port 1, and no resolver knows the name.
        let name = "godwit.local:1/demo:1";
        let text = store.pull(name, &Auth::Anonymous).await.unwrap_err().to_string();
        assert!(text.contains(name) && text.contains("`godwit image build`"), "{text}");
        assert!(!is_local_name("quay.io/a.local/b:1") && is_local_name("x.local:5000/a:1"));
    }

    #[tokio::test]
    async fn a_registry_that_does_not_answer_is_named_with_the_reason() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(place.path()).unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let name = format!("127.0.0.1:{port}/demo:1");
        let error = store.ensure(&name, PullPolicy::IfNotPresent, &Auth::Anonymous).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&name) && text.contains("refused"), "{text}");
        assert_eq!(error.waiting_reason(), "ErrImagePull");
        let file = place.path().join("file");
        std::fs::write(&file, "x").unwrap();
        store.build(&name, &[crate::FileEntry { source: file, destination: "/x".into(), mode: 0o644 }]).unwrap();
        store.ensure(&name, PullPolicy::Always, &Auth::Anonymous).await.unwrap();
        store.remove(&name).unwrap();
        let never = store.ensure(&name, PullPolicy::Never, &Auth::Anonymous).await.unwrap_err();
        assert_eq!(never.waiting_reason(), "ErrImageNeverPull");
    }
}
