//! The kubelet's own HTTPS server, for the API server: logs of containers.

use std::collections::BTreeMap;
use std::io::SeekFrom;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path as UrlPath, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use jiff::{SignedDuration, Timestamp};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls;

use crate::spec::{LOG, PREVIOUS, Running, STATE};
use crate::{Error, PORT, TlsFiles, spec};

/// Which pod of which namespace and name is which folder.
#[derive(Clone, Default)]
pub(crate) struct Folders(Arc<Mutex<BTreeMap<(String, String), PathBuf>>>);

impl Folders {
    pub(crate) fn insert(&self, namespace: String, name: String, folder: PathBuf) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert((namespace, name), folder);
    }

    /// Only if it still is that folder: a new pod may have taken the name.
    pub(crate) fn remove(&self, namespace: String, name: String, folder: &Path) {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let std::collections::btree_map::Entry::Occupied(entry) = map.entry((namespace, name))
            && entry.get() == folder
        {
            entry.remove();
        }
    }

    fn get(&self, namespace: &str, name: &str) -> Option<PathBuf> {
        let map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        map.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }
}

/// The acceptor: asks every client for a certificate of the cluster's CA.
pub(crate) fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, Error> {
    let bad = |what: &Path, error: &dyn std::fmt::Display| Error::Tls(format!("{}: {error}", what.display()));
    let certificates = |path: &Path| -> Result<Vec<CertificateDer<'static>>, Error> {
        let list = CertificateDer::pem_file_iter(path).map_err(|e| bad(path, &e))?;
        list.collect::<Result<_, _>>().map_err(|e| bad(path, &e))
    };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in certificates(&files.ca)? {
        roots.add(certificate).map_err(|e| bad(&files.ca, &e))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|e| bad(&files.ca, &e))?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|e| bad(&files.key, &e))?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::Tls(e.to_string()))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates(&files.cert)?, key)
        .map_err(|e| bad(&files.cert, &e))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Whether the subject of a certificate may read logs: the API server, or a cluster administrator.
fn may_enter(certificate: &[u8]) -> bool {
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(certificate) else { return false };
    let subject = certificate.subject();
    let is = |wanted: &'static [&'static str]| {
        move |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| {
            attribute.as_str().is_ok_and(|value| wanted.contains(&value))
        }
    };
    subject.iter_common_name().any(is(&["kube-apiserver", "kube-apiserver-kubelet-client"]))
        || subject.iter_organization().any(is(&["system:masters"]))
}

/// Serves for ever.
pub(crate) async fn serve(address: IpAddr, acceptor: TlsAcceptor, folders: Folders) -> Result<(), Error> {
    let address = SocketAddr::new(address, PORT);
    let listener = TcpListener::bind(address).await;
    let listener = listener.map_err(Error::io("listen on", PathBuf::from(address.to_string())))?;
    let router = router(folders);
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, for example: it may get better.
                tracing::debug!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (acceptor, router) = (acceptor.clone(), router.clone());
        tokio::spawn(async move {
            let Ok(Ok(stream)) = tokio::time::timeout(Duration::from_secs(10), acceptor.accept(stream)).await else {
                return tracing::debug!(%peer, "TLS handshake failed");
            };
            let certificate = stream.get_ref().1.peer_certificates().and_then(|list| list.first());
            let router = if certificate.is_some_and(|certificate| may_enter(certificate)) {
                router
            } else {
                Router::new()
                    .fallback(|| async { (StatusCode::FORBIDDEN, "Forbidden: only the API server is served\n") })
            };
            let served = Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
                .await;
            if let Err(error) = served {
                tracing::debug!(%peer, error, "connection ended early");
            }
        });
    }
}

fn router(folders: Folders) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/containerLogs/{namespace}/{pod}/{container}", get(logs))
        .with_state(folders)
}

/// The query of `kubectl logs`, as the API server passes it on.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct LogQuery {
    follow: Option<String>,
    previous: Option<String>,
    timestamps: Option<String>,
    tail_lines: Option<u64>,
    limit_bytes: Option<u64>,
    since_seconds: Option<i64>,
    since_time: Option<String>,
}

fn is_set(flag: &Option<String>) -> bool {
    flag.as_deref().is_some_and(|value| matches!(value, "" | "true" | "1"))
}

async fn logs(
    State(folders): State<Folders>,
    UrlPath((namespace, pod, container)): UrlPath<(String, String, String)>,
    Query(query): Query<LogQuery>,
) -> Response {
    // The name becomes part of a path.
    if container.is_empty() || container.contains(['/', '\0']) || container.starts_with('.') {
        return (StatusCode::BAD_REQUEST, format!("{container:?} is no container name\n")).into_response();
    }
    let Some(folder) = folders.get(&namespace, &pod) else {
        return (StatusCode::NOT_FOUND, format!("pod {namespace}/{pod} is not on this node\n")).into_response();
    };
    let folder = folder.join("containers").join(&container);
    let previous = is_set(&query.previous);
    let path = folder.join(if previous { format!("{LOG}{PREVIOUS}") } else { LOG.to_owned() });
    let Ok(file) = tokio::fs::File::open(&path).await else {
        let what = if previous { "previous terminated container" } else { "container" };
        let text = format!("{what} {container:?} in pod {pod:?} not found, or it has not been started\n");
        return (StatusCode::BAD_REQUEST, text).into_response();
    };
    let reader = Reader::new(folder, path, file, &query, previous).await;
    let stream = futures::stream::unfold(reader, |mut reader| async move {
        let bytes = reader.next().await?;
        Some((Ok::<_, std::io::Error>(bytes), reader))
    });
    ([("content-type", "text/plain; charset=utf-8")], Body::from_stream(stream)).into_response()
}

/// Reads a log in the format of the CRI and gives the container's own lines.
struct Reader {
    folder: PathBuf,
    path: PathBuf,
    file: tokio::fs::File,
    pending: Vec<u8>,
    since: Option<Timestamp>,
    skip_lines: u64,
    left: u64,
    follow: bool,
    timestamps: bool,
    at_line_start: bool,
}

impl Reader {
    async fn new(folder: PathBuf, path: PathBuf, mut file: tokio::fs::File, query: &LogQuery, previous: bool) -> Self {
        let seconds = query.since_seconds.map(|s| Timestamp::now() - SignedDuration::from_secs(s.clamp(0, 1 << 33)));
        let since = seconds.or_else(|| query.since_time.as_ref()?.parse().ok());
        let mut skip_lines = 0;
        if let Some(tail) = query.tail_lines {
            skip_lines = count_lines(&mut file, since).await.saturating_sub(tail);
            let _ = file.seek(SeekFrom::Start(0)).await;
        }
        Self {
            folder,
            path,
            file,
            pending: Vec::new(),
            since,
            skip_lines,
            left: query.limit_bytes.unwrap_or(u64::MAX),
            follow: is_set(&query.follow) && !previous,
            timestamps: is_set(&query.timestamps),
            at_line_start: true,
        }
    }

    /// The next piece; `None` at the end.
    async fn next(&mut self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            if self.left == 0 {
                return None;
            }
            // Looked at before reading: what it wrote last is then surely read.
            let ended = !self.follow || !self.is_running();
            let read = self.file.read(&mut buffer).await.ok()?;
            if read == 0 {
                if self.reopen().await {
                    continue;
                }
                if ended {
                    return None;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
            self.pending.extend(buffer.get(..read).unwrap_or_default());
            let output = self.take_lines();
            if !output.is_empty() {
                return Some(output);
            }
        }
    }

    fn is_running(&self) -> bool {
        spec::read::<Running>(&self.folder, STATE).is_some_and(|running| running.shim.is_alive())
    }

    /// The log may have been started anew (too long, or a new attempt): then the new one is next.
    async fn reopen(&mut self) -> bool {
        use std::os::unix::fs::MetadataExt;
        if !self.follow {
            return false;
        }
        let (Ok(current), Ok(named)) = (self.file.metadata().await, tokio::fs::metadata(&self.path).await) else {
            return false;
        };
        if current.ino() == named.ino() {
            return false;
        }
        match tokio::fs::File::open(&self.path).await {
            Ok(file) => {
                self.file = file;
                true
            }
            Err(_) => false,
        }
    }

    fn take_lines(&mut self) -> Vec<u8> {
        let mut output = Vec::new();
        let pending = std::mem::take(&mut self.pending);
        let mut rest = pending.as_slice();
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (line, after) = rest.split_at(end);
            rest = after.get(1..).unwrap_or_default();
            self.line(line, &mut output);
        }
        self.pending = rest.to_vec();
        if output.len() as u64 > self.left {
            output.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
        }
        self.left -= output.len() as u64;
        output
    }

    fn line(&mut self, line: &[u8], output: &mut Vec<u8>) {
        let Some((time, full, text)) = parse(line) else { return };
        if self.since.is_some_and(|since| time.parse::<Timestamp>().is_ok_and(|time| time < since)) {
            return;
        }
        if self.skip_lines > 0 {
            self.skip_lines -= u64::from(full);
            return;
        }
        if self.timestamps && self.at_line_start {
            output.extend(time.as_bytes());
            output.push(b' ');
        }
        output.extend(text);
        if full {
            output.push(b'\n');
        }
        self.at_line_start = full;
    }
}

/// Time, whether the line ends here, text.
fn parse(line: &[u8]) -> Option<(&str, bool, &[u8])> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let time = std::str::from_utf8(parts.next()?).ok()?;
    let _stream = parts.next()?;
    let tag = parts.next()?;
    Some((time, tag != b"P", parts.next().unwrap_or_default()))
}

async fn count_lines(file: &mut tokio::fs::File, since: Option<Timestamp>) -> u64 {
    let mut text = Vec::new();
    // At most 10 MiB by the shim's rotation.
    if file.read_to_end(&mut text).await.is_err() {
        return 0;
    }
    let lines = text.split(|byte| *byte == b'\n').filter_map(parse);
    let young = |time: &str| since.is_none_or(|since| time.parse::<Timestamp>().is_ok_and(|time| time >= since));
    lines.filter(|(time, full, _)| *full && young(time)).count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = "2025-11-20T20:00:00.000000001Z stdout F one\n\
                         2025-11-20T20:00:01.000000001Z stdout P tw\n\
                         2025-11-20T20:00:01.000000002Z stdout F o\n\
                         2025-11-20T20:00:02.000000001Z stderr F three\n";

    async fn read(query: LogQuery) -> String {
        let folder = tempfile::tempdir().unwrap();
        let container = folder.path().join("containers/c");
        std::fs::create_dir_all(&container).unwrap();
        std::fs::write(container.join(LOG), LINES).unwrap();
        let folders = Folders::default();
        folders.insert("ns".into(), "p".into(), folder.path().into());
        let answer = logs(State(folders), UrlPath(("ns".into(), "p".into(), "c".into())), Query(query)).await;
        assert_eq!(answer.status(), StatusCode::OK);
        let bytes = axum::body::to_bytes(answer.into_body(), 1 << 20).await.unwrap();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn logs_are_the_containers_own_lines() {
        let yes = Some("true".to_owned());
        assert_eq!(read(LogQuery::default()).await, "one\ntwo\nthree\n");
        assert_eq!(read(LogQuery { tail_lines: Some(2), ..LogQuery::default() }).await, "two\nthree\n");
        assert_eq!(read(LogQuery { tail_lines: Some(0), ..LogQuery::default() }).await, "");
        assert_eq!(read(LogQuery { limit_bytes: Some(5), ..LogQuery::default() }).await, "one\nt");
        let since = Some("2025-11-20T20:00:01.5Z".to_owned());
        assert_eq!(read(LogQuery { since_time: since, ..LogQuery::default() }).await, "three\n");
        // Nobody writes any more, so following ends too.
        assert_eq!(read(LogQuery { follow: yes.clone(), ..LogQuery::default() }).await, "one\ntwo\nthree\n");
        let stamped = read(LogQuery { timestamps: yes, tail_lines: Some(2), ..LogQuery::default() }).await;
        assert!(stamped.starts_with("2025-11-20T20:00:01.000000001Z two\n2025"), "{stamped}");
    }

    #[tokio::test]
    async fn unknown_pods_and_paths_are_refused() {
        let ask = |pod: &str, container: &str| {
            let path = UrlPath(("ns".to_owned(), pod.to_owned(), container.to_owned()));
            logs(State(Folders::default()), path, Query(LogQuery::default()))
        };
        assert_eq!(ask("p", "c").await.status(), StatusCode::NOT_FOUND);
        assert_eq!(ask("p", "../x").await.status(), StatusCode::BAD_REQUEST);
    }

    #[test]
    fn only_the_api_server_may_enter() {
        let certificate = |name: &str, organization: &str| {
            let mut parameters = rcgen::CertificateParams::default();
            parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
            parameters.distinguished_name.push(rcgen::DnType::OrganizationName, organization);
            let key = rcgen::KeyPair::generate().unwrap();
            parameters.self_signed(&key).unwrap().der().to_vec()
        };
        assert!(may_enter(&certificate("kube-apiserver", "x")));
        assert!(may_enter(&certificate("me", "system:masters")));
        assert!(!may_enter(&certificate("system:node:node1", "system:nodes")));
        assert!(!may_enter(b"nonsense"));
    }
}
