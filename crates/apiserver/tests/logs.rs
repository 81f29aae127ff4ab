//! `kubectl logs` through the server from a kubelet, both ends with certificates.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::Cluster;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::process::Stdio;
use std::sync::{Arc, mpsc};

/// Answers one request after another, each as `answer` says, and reports the request lines.
fn kubelet(cluster: &Cluster, answer: impl Fn(&str, &mut dyn Write) + Send + 'static) -> (u16, mpsc::Receiver<String>) {
    let files = cluster.files("kubelet", "system:node:n1", &["system:nodes"]);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&files.ca).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().unwrap();
    let chain = vec![CertificateDer::from_pem_file(&files.cert).unwrap()];
    let key = PrivateKeyDer::from_pem_file(&files.key).unwrap();
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = Arc::new(config.with_client_cert_verifier(verifier).with_single_cert(chain, key).unwrap());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let (lines, seen) = mpsc::channel();
    std::thread::spawn(move || {
        for tcp in listener.incoming() {
            let connection = rustls::ServerConnection::new(config.clone()).unwrap();
            let mut stream = rustls::StreamOwned::new(connection, tcp.unwrap());
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
                request.push(byte[0]);
            }
            let line = String::from_utf8_lossy(&request).lines().next().unwrap_or_default().to_owned();
            if lines.send(line.clone()).is_err() {
                return;
            }
            answer(&line, &mut stream);
            stream.conn.send_close_notify();
            let _ = stream.flush();
        }
    });
    (port, seen)
}

fn objects(port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: n1}}\nstatus: {{addresses: [{{type: InternalIP, address: 127.0.0.1}}], \
         daemonEndpoints: {{kubeletEndpoint: {{Port: {port}}}}}}}\n---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\n\
         spec: {{nodeName: n1, containers: [{{name: one, image: i}}, {{name: two, image: i}}]}}\n"
    )
}

#[test]
fn logs_come_from_the_kubelet() {
    let cluster = Cluster::start();
    let Some(k) = cluster.kubectl("1.30") else { return };
    let (port, seen) = kubelet(&cluster, |line, out| {
        if line.contains("/two?") {
            write!(out, "HTTP/1.1 404 Not Found\r\nContent-Length: 11\r\n\r\nno such log").unwrap();
        } else {
            write!(out, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello\n").unwrap();
        }
    });
    k.good(&["create", "-f", "-"], &objects(port));
    assert_eq!(k.good(&["logs", "p", "-c", "one", "--tail=5", "--timestamps"], ""), "hello\n");
    let line = seen.recv().unwrap();
    assert!(line.starts_with("GET /containerLogs/default/p/one?"), "{line}");
    assert!(line.contains("tailLines=5") && line.contains("timestamps=true"), "{line}");
    let refused = k.bad(&["logs", "p", "-c", "two"], "");
    assert!(refused.contains("no such log"), "{refused}");
    let refused = k.bad(&["logs", "p", "-c", "three"], "");
    assert!(refused.contains("container three is not valid for pod p"), "{refused}");
}

#[test]
fn followed_logs_flow() {
    let cluster = Cluster::start();
    let Some(k) = cluster.kubectl("1.30") else { return };
    let (go_on, told) = mpsc::channel::<()>();
    let (port, _seen) = kubelet(&cluster, move |_, out| {
        write!(out, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nfirst\n\r\n").unwrap();
        out.flush().unwrap();
        told.recv().unwrap();
        write!(out, "7\r\nsecond\n\r\n0\r\n\r\n").unwrap();
    });
    k.good(&["create", "-f", "-"], &objects(port));
    let mut child = k.command(&["logs", "p", "-c", "one", "-f"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // The first line comes while the kubelet still holds the second one back.
    assert_eq!(lines.next().unwrap().unwrap(), "first");
    go_on.send(()).unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "second");
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_kubelet_that_is_not_there_is_named() {
    let cluster = Cluster::start();
    let Some(k) = cluster.kubectl("1.30") else { return };
    // Bound and closed again: nobody listens.
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    k.good(&["create", "-f", "-"], &objects(port));
    let refused = k.bad(&["logs", "p", "-c", "one"], "");
    assert!(refused.contains("node n1") && refused.contains("Connection refused"), "{refused}");
}
