//! The CA through its whole life, kept by two replicas, on a real API server's terms: conflicts are refused.

#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use godwit_apiserver::{Parts, Server, User};
use godwit_certificates::authority::Subject;
use godwit_certificates::keeper::{BUNDLE, BUNDLE_KEY, Keeper, Trusting};
use godwit_certificates::schedule::{Lifetimes, Validity};
use godwit_certificates::serving::{self, Shown, Subjects};
use godwit_serving::listen;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;

const NAMESPACE: &str = "kubevirt";

async fn api_server(folder: &std::path::Path) -> Client {
    let store = godwit_store::Store::open(folder.join("store.redb")).unwrap();
    let server = Server::start(Parts::new(store)).await.unwrap();
    Client::new(server.service(User::new("admin", &["system:masters"])), "default")
}

async fn bundle(client: &Client) -> String {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), NAMESPACE);
    maps.get(BUNDLE).await.unwrap().data.unwrap().remove(BUNDLE_KEY).unwrap()
}

fn roots(bundle: &str) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for one in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
        roots.add(one.unwrap()).unwrap();
    }
    Arc::new(roots)
}

#[tokio::test]
async fn two_replicas_keep_one_ca_through_its_whole_life() {
    let folder = tempfile::tempdir().unwrap();
    let client = api_server(folder.path()).await;
    let lifetimes = Lifetimes { authority: Duration::from_secs(1200), certificate: Duration::from_secs(100) };
    let keeper = || Keeper::new(client.clone(), NAMESPACE, lifetimes, Trusting::default());
    let (mut one, mut two) = (keeper(), keeper());
    let begin = 1_800_000_000;
    let mut authorities = BTreeSet::new();
    let mut signed: Vec<(String, Validity)> = Vec::new();
    for now in (begin..begin + 4000).step_by(20) {
        let (first, second) = tokio::join!(one.tend(now), two.tend(now));
        let both = [first.unwrap(), second.unwrap()];
        if now == begin {
            assert_eq!(both[0].0, both[1].0, "two CAs were made");
        }
        let bundle = bundle(&client).await;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots(&bundle), provider).build().unwrap();
        for (known, told) in both {
            told.unwrap();
            let authority = known.current.unwrap();
            let subject = Subject { common_name: "x".to_owned(), calls: true, ..Subject::default() };
            let pair = authority.issue(&subject, now, lifetimes.certificate).unwrap();
            signed.push((pair.certificate, pair.validity));
            authorities.insert(authority.certificate);
        }
        signed.retain(|(_, validity)| !validity.is_over(now));
        let at = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(now).unwrap()));
        for (certificate, _) in &signed {
            let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
            verifier.verify_client_cert(&certificate, &[], at).unwrap();
        }
        assert!(bundle.matches("BEGIN").count() <= 3, "CAs that are over stay published");
    }
    assert!(authorities.len() >= 4, "the CA was replaced {} times only", authorities.len() - 1);
}

/// A server that answers everything with the certificates kept for it.
async fn serve(client: &Client, lifetimes: Lifetimes) -> (u16, watch::Sender<bool>) {
    let shown = Arc::new(Shown::default());
    let subject = |name: &str, serves| Subject {
        common_name: name.to_owned(),
        names: vec![name.to_owned()],
        serves,
        calls: true,
    };
    let subjects = Subjects { serving: subject("virt-api.kubevirt.svc", true), calling: subject("caller", false) };
    let keeper = Keeper::new(client.clone(), NAMESPACE, lifetimes, Trusting::default());
    let (ready, mut is_ready) = watch::channel(false);
    tokio::spawn(serving::run(keeper, lifetimes, subjects, shown.clone(), ready));
    is_ready.wait_for(|ready| *ready).await.unwrap();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(shown);
    let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = socket.local_addr().unwrap().port();
    let (stop, stopping) = watch::channel(false);
    let handler = |_| |_| async { Response::new(Full::new(Bytes::from("ok"))) };
    tokio::spawn(listen::serve(listen::listener(socket).unwrap(), Arc::new(config), handler, stopping));
    (port, stop)
}

/// A new connection, and the certificate that was shown on it.
async fn connect(port: u16, bundle: &str) -> (SendRequest<Full<Bytes>>, Vec<u8>) {
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots(bundle))
        .with_no_client_auth();
    let tcp = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    let name = "virt-api.kubevirt.svc".try_into().unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.expect("the certificate is known");
    let shown = stream.get_ref().1.peer_certificates().unwrap()[0].to_vec();
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    (sender, shown)
}

async fn ask(sender: &mut SendRequest<Full<Bytes>>) -> StatusCode {
    let request = Request::get("/").header("host", "x").body(Full::new(Bytes::new())).unwrap();
    sender.send_request(request).await.expect("an answer").status()
}

/// In real time: certificates of seconds, a CA of half a minute.
#[tokio::test]
async fn nothing_is_refused_while_certificates_and_ca_are_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let client = api_server(folder.path()).await;
    let lifetimes = Lifetimes { authority: Duration::from_secs(25), certificate: Duration::from_secs(5) };
    let lifetimes = lifetimes.checked().unwrap();
    let (port, _stop) = serve(&client, lifetimes).await;
    let first = bundle(&client).await;
    let (mut lasting, _) = connect(port, &first).await;
    let (mut seen, mut requests) = (BTreeSet::new(), 0);
    let deadline = Instant::now() + Duration::from_secs(120);
    // Until the CA of the beginning signs no more: what it does not know alone is signed by the next.
    loop {
        assert!(Instant::now() < deadline, "after {requests} requests the CA was not replaced");
        let known = bundle(&client).await;
        let (mut sender, shown) = connect(port, &known).await;
        assert_eq!(ask(&mut sender).await, StatusCode::OK);
        assert_eq!(ask(&mut lasting).await, StatusCode::OK, "what was open when they were replaced goes on");
        requests += 2;
        let verifier = WebPkiClientVerifier::builder_with_provider(
            roots(&first),
            Arc::new(rustls::crypto::ring::default_provider()),
        );
        let certificate = CertificateDer::from(shown.clone());
        seen.insert(shown);
        let by_first = verifier.build().unwrap().verify_client_cert(&certificate, &[], UnixTime::now());
        let unknown = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        if by_first.is_err_and(|error| error == unknown) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(seen.len() >= 3, "only {} certificates were seen", seen.len());
}
