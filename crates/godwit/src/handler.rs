//! `godwit handler`: a node's handler on a Kubernetes cluster.

use crate::args::{Handler, NodeTls};
use crate::{connect, health, shutdown};
use anyhow::Context;
use godwit_api::Installation;
use godwit_api::metrics::{self, Figures};
use godwit_certificates::authority;
use godwit_certificates::node::{self, Files};
use godwit_handler::TlsPaths;
use kube::Client;
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::watch;

/// Between two attempts to be the node's handler.
const AGAIN: Duration = Duration::from_millis(200);

/// Runs until SIGTERM or SIGINT. Guests run on.
pub async fn run(args: Handler) -> anyhow::Result<()> {
    let mut asked = std::pin::pin!(shutdown::asked()?);
    let certificate = Arc::new(OnceLock::new());
    let known = certificate.clone();
    let told: health::Told = Arc::new(move || Box::pin(std::future::ready(Some(figures(known.get())))));
    // A rollout starts the next handler beside the one that is to go, and ends that when the next one is ready.
    let ready = watch::channel(true).1;
    if let Some((address, port)) = args.health {
        let address = (address.unwrap_or(args.address), port).into();
        health::serve_when_free(address, ready.clone(), told.clone());
    }
    if let Some(socket) = &args.health_socket {
        health::serve_on_socket(socket, ready, told)?;
    }
    let _alone = tokio::select! {
        lock = alone(&args.state) => lock?,
        () = &mut asked => return Ok(()),
    };
    let client = connect::client(args.kubeconfig.as_deref()).await?;
    let installation = args.installed.installation();
    let tls = match args.tls.request_certificate || args.tls.tls_cert.is_none() {
        true => tokio::select! {
            tls = request(client.clone(), &installation, &args.node_name, &args.state) => tls,
            () = &mut asked => return Ok(()),
        },
        false => tls(&args.tls)?,
    };
    // Set once.
    let _ = certificate.set(tls.cert.clone());
    let options = godwit_handler::Options {
        client,
        installation,
        tls,
        node_name: args.node_name,
        node_ip: args.address,
        migration_interface: args.migrations.to_handler(),
        front_port: args.port,
        kubelet_root: args.kubelet_root.clone(),
        state: args.state,
        clock: godwit_handler::Clock::Boot,
        cluster_id: "kubernetes".to_owned(),
        device_plugins: Some(args.device_plugins.unwrap_or_else(|| args.kubelet_root.join("device-plugins"))),
        accelerator: None,
    };
    godwit_handler::run(options, asked).await?;
    Ok(())
}

/// What a handler tells Prometheus; `certificate` is its node's, from when on it looks after the node.
fn figures(certificate: Option<&PathBuf>) -> Figures {
    let mut figures = Figures::default();
    figures.tell(metrics::INFO, [crate::metrics::VERSION], 1.0);
    figures.tell(metrics::HANDLER_READY, [], f64::from(u8::from(certificate.is_some())));
    // Read anew each time: it is replaced while the handler runs.
    let pem = certificate.and_then(|path| std::fs::read_to_string(path).ok());
    if let Some(validity) = pem.and_then(|pem| authority::validity(&pem, "the node's certificate").ok()) {
        figures.tell(metrics::CERTIFICATE_END, ["node"], validity.not_after as f64);
    }
    figures
}

/// Waits until no other handler of this node runs. The lock is the kernel's: it ends with the process, however that ends.
async fn alone(state: &Path) -> anyhow::Result<Flock<File>> {
    let path = state.join("handler.lock");
    std::fs::create_dir_all(state).with_context(|| format!("make {}", state.display()))?;
    let mut file = File::create(&path).with_context(|| format!("make {}", path.display()))?;
    let mut said = false;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, nix::Error::EWOULDBLOCK)) => file = back,
            Err((_, error)) => return Err(error).with_context(|| format!("lock {}", path.display())),
        }
        if !std::mem::replace(&mut said, true) {
            tracing::info!(lock = %path.display(), "another handler of this node runs; waiting until it ends");
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// A certificate that the cluster's controllers sign (docs/certificates.md), kept new for as long as this process runs. Waits for
/// the first one.
pub async fn request(client: Client, installation: &Installation, node: &str, state: &Path) -> TlsPaths {
    let (namespace, folder) = (installation.namespace().to_owned(), state.join("certificates"));
    let Files { bundle, identity } =
        node::obtain(node::Node { client, namespace, name: node.to_owned(), folder }).await;
    TlsPaths { ca: bundle, cert: identity.clone(), key: identity }
}

/// The files of the node's certificate.
///
/// # Errors
/// One that is not named.
pub fn tls(files: &NodeTls) -> anyhow::Result<TlsPaths> {
    let given = |file: &Option<PathBuf>, flag: &str| {
        file.clone().with_context(|| format!("no {flag}: nodes know each other by certificates of one authority"))
    };
    Ok(TlsPaths {
        ca: given(&files.tls_ca, "--tls-ca")?,
        cert: given(&files.tls_cert, "--tls-cert")?,
        key: given(&files.tls_key, "--tls-key")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handler_tells_until_when_its_certificate_counts() {
        let waiting = figures(None);
        assert_eq!(waiting.value(metrics::HANDLER_READY, []), Some(0.0));
        assert_eq!(waiting.count(metrics::CERTIFICATE_END), 0);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("node.pem");
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::default();
        params.not_after = rcgen::date_time_ymd(2033, 5, 18);
        let certificate = params.self_signed(&key).expect("a certificate").pem();
        std::fs::write(&path, format!("{certificate}{}", key.serialize_pem())).expect("write");
        let told = figures(Some(&path));
        assert_eq!(told.value(metrics::HANDLER_READY, []), Some(1.0));
        assert_eq!(told.value(metrics::CERTIFICATE_END, ["node"]), Some(1_999_987_200.0));
        std::fs::write(&path, "nothing").expect("write");
        assert_eq!(figures(Some(&path)).count(metrics::CERTIFICATE_END), 0);
    }

    #[tokio::test]
    async fn the_next_handler_waits_until_the_one_before_has_ended() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = folder.path().join("state");
        let first = alone(&state).await.expect("the lock");
        let mut next = std::pin::pin!(alone(&state));
        assert!(futures::poll!(&mut next).is_pending());
        drop(first);
        drop(next.await.expect("the lock"));
    }
}
