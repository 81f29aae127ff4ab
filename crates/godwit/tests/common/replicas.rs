//! Two `godwit api`s behind one Service, as a Deployment has them.

use super::Cluster;
use super::real::{APIS, port_of};
use godwit_network::Namespace;
use godwit_standalone::CONTROL_PLANE_ADDRESS;
use kube::api::DynamicObject;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;

impl Cluster {
    /// Does for ever what kubelets and Kubernetes' endpoint controllers would: asks each whether it is ready, and writes that down
    /// for the API server.
    pub async fn tells_endpoints(&self) {
        let real = self.real.as_ref().expect("a real API server");
        let mut told = BTreeMap::new();
        loop {
            for (name, _) in APIS {
                let ready = self.is_ready(name).await.unwrap_or(false);
                if told.insert(name, ready) != Some(ready) {
                    real.endpoint(&self.client, name, ready).await;
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits until requests are sent to it, or no more.
    pub async fn is_asked(&self, name: &str, wanted: bool) {
        let ready = |slice: &DynamicObject| slice.data["endpoints"][0]["conditions"]["ready"] == wanted;
        let resource = kube::api::GroupVersionKind::gvk("discovery.k8s.io", "v1", "EndpointSlice");
        let resource = kube::api::ApiResource::from_gvk(&resource);
        let slices = kube::Api::namespaced_with(self.client.clone(), "kubevirt", &resource);
        self.wait(&slices, &format!("virt-api-{name}"), "its readiness is told", ready).await;
    }

    /// What a `godwit api` says of itself; none where it is not reached. Its certificate has to be good.
    async fn is_ready(&self, name: &str) -> Option<bool> {
        let mut roots = rustls::RootCertStore::empty();
        let bundle = self.published_cas().await;
        for certificate in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
            roots.add(certificate.expect("PEM")).expect("a CA");
        }
        let tls = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let switch = Namespace::open(&self.namespace("fabric")).expect("the switch");
        let to = SocketAddr::from((CONTROL_PLANE_ADDRESS, port_of(name)));
        let stream =
            tokio::task::spawn_blocking(move || switch.connect(to, Duration::from_secs(5))).await.expect("dial");
        let stream = stream.ok()?;
        stream.set_nonblocking(true).expect("the socket");
        let stream = tokio::net::TcpStream::from_std(stream).expect("the socket");
        let server = ServerName::try_from("virt-api.kubevirt.svc").expect("a name");
        let mut stream = TlsConnector::from(Arc::new(tls)).connect(server, stream).await.ok()?;
        let request = "GET /readyz HTTP/1.1\r\nHost: virt-api.kubevirt.svc\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.ok()?;
        Some(answer.starts_with(b"HTTP/1.1 200 "))
    }
}
