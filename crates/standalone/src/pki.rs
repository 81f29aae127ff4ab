//! The cluster's own certificate authority, one key pair an identity, and kubeconfigs that use them.

use crate::Error;
use crate::layout::{CONTROL_PLANE_ADDRESS, Cluster, Layout, write_atomically};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

/// File name (without ending) of the API server's serving pair.
pub const API_SERVER: &str = "apiserver";
/// The API server as a client of kubelets.
pub const KUBELET_CLIENT: &str = "apiserver-kubelet-client";
/// The API server as a client of handlers.
pub const HANDLER_CLIENT: &str = "apiserver-handler-client";
/// Cluster administrator.
pub const ADMIN: &str = "admin";
/// The controllers and the scheduler.
pub const CONTROLLER: &str = "controller";

/// Who a certificate speaks for.
struct Identity {
    file: String,
    common_name: String,
    organization: Option<&'static str>,
    /// The node that a service account is bound to: the API server lets a handler write the VMIs of its node only.
    node: Option<String>,
    names: Vec<SanType>,
    serves: bool,
}

/// Paths of one pair.
#[derive(Debug, Clone)]
pub struct Pair {
    /// PEM certificate.
    pub cert: PathBuf,
    /// PEM private key.
    pub key: PathBuf,
}

/// Path of the CA's certificate.
pub fn ca(layout: &Layout) -> PathBuf {
    layout.pki().join("ca.crt")
}

/// Paths of the pair kept under `file`.
pub fn pair(layout: &Layout, file: &str) -> Pair {
    Pair { cert: layout.pki().join(format!("{file}.crt")), key: layout.pki().join(format!("{file}.key")) }
}

/// File name of a node's kubelet pair, which also speaks for the node between handlers.
pub fn node_file(node: &str) -> String {
    format!("node-{node}")
}

/// File name of a node's handler pair.
pub fn handler_file(node: &str) -> String {
    format!("handler-{node}")
}

/// Makes what is missing: the CA, every identity of the cluster, and their kubeconfigs.
pub fn ensure(layout: &Layout, cluster: &Cluster) -> Result<(), Error> {
    let authority = authority(layout)?;
    for identity in identities(cluster)? {
        let files = pair(layout, &identity.file);
        if !files.cert.exists() || !files.key.exists() || !names_node(&files.cert, identity.node.as_deref()) {
            issue(&authority, &identity, &files)?;
        }
    }
    let local = format!("https://127.0.0.1:{}", cluster.api_port);
    let fabric = format!("https://{CONTROL_PLANE_ADDRESS}:{}", crate::layout::FABRIC_API_PORT);
    write_kubeconfig(layout, &layout.kubeconfig(), ADMIN, &local)?;
    write_kubeconfig(layout, &kubeconfig(layout, CONTROLLER), CONTROLLER, &local)?;
    for node in &cluster.nodes {
        for file in [node_file(node), handler_file(node)] {
            write_kubeconfig(layout, &kubeconfig(layout, &file), &file, &fabric)?;
        }
    }
    Ok(())
}

/// Whether a certificate names the node that it should: those of older data directories name none.
fn names_node(certificate: &Path, node: Option<&str>) -> bool {
    let Some(node) = node else { return true };
    let Ok(pem) = std::fs::read(certificate) else { return false };
    let Ok((_, pem)) = x509_parser::pem::parse_x509_pem(&pem) else { return false };
    pem.parse_x509()
        .is_ok_and(|certificate| certificate.subject().iter_organizational_unit().any(|unit| unit.as_str() == Ok(node)))
}

/// Path of the kubeconfig that uses the pair `file`.
pub fn kubeconfig(layout: &Layout, file: &str) -> PathBuf {
    layout.pki().join(format!("{file}.kubeconfig"))
}

fn identities(cluster: &Cluster) -> Result<Vec<Identity>, Error> {
    let dns = |name: &str| {
        rcgen::string::Ia5String::try_from(name)
            .map(SanType::DnsName)
            .map_err(|source| Error::Certificate { identity: name.to_owned(), source })
    };
    let client = |file: &str, common_name: &str, organization| Identity {
        file: file.to_owned(),
        common_name: common_name.to_owned(),
        organization: Some(organization),
        node: None,
        names: Vec::new(),
        serves: false,
    };
    let mut all = vec![
        Identity {
            file: API_SERVER.to_owned(),
            common_name: "kube-apiserver".to_owned(),
            organization: None,
            node: None,
            names: vec![
                SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)),
                SanType::IpAddress(IpAddr::V4(CONTROL_PLANE_ADDRESS)),
                dns("localhost")?,
                dns("kubernetes")?,
                dns("kubernetes.default.svc")?,
            ],
            serves: true,
        },
        client(KUBELET_CLIENT, "kube-apiserver", "system:masters"),
        // KubeVirt's name; it has no rights in the API.
        client(HANDLER_CLIENT, "kubevirt.io:system:client:virt-handler", "kubevirt.io:system"),
        client(ADMIN, "kubernetes-admin", "system:masters"),
        client(CONTROLLER, "system:serviceaccount:kubevirt:kubevirt-controller", "system:serviceaccounts"),
    ];
    for (index, node) in cluster.nodes.iter().enumerate() {
        let number = u8::try_from(index + 1).map_err(|_| Error::Usage(format!("too many nodes: {}", index + 1)))?;
        all.push(Identity {
            file: node_file(node),
            common_name: format!("system:node:{node}"),
            organization: Some("system:nodes"),
            node: None,
            names: vec![SanType::IpAddress(IpAddr::V4(Cluster::node_address(number))), dns(node)?],
            serves: true,
        });
        let handler = "system:serviceaccount:kubevirt:kubevirt-handler";
        all.push(Identity {
            node: Some(node.clone()),
            ..client(&handler_file(node), handler, "system:serviceaccounts")
        });
    }
    Ok(all)
}

fn authority(layout: &Layout) -> Result<Issuer<'static, KeyPair>, Error> {
    let files = Pair { cert: ca(layout), key: layout.pki().join("ca.key") };
    let failed = |source| Error::Certificate { identity: "the certificate authority".to_owned(), source };
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("godwit-ca-{}", layout.id()));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let key = match std::fs::read_to_string(&files.key) {
        Ok(pem) if files.cert.exists() => KeyPair::from_pem(&pem).map_err(failed)?,
        _ => {
            let key = KeyPair::generate().map_err(failed)?;
            let certificate = params.self_signed(&key).map_err(failed)?;
            write_atomically(&files.key, key.serialize_pem().as_bytes(), 0o600)?;
            write_atomically(&files.cert, certificate.pem().as_bytes(), 0o644)?;
            key
        }
    };
    Ok(Issuer::new(params, key))
}

fn issue(authority: &Issuer<'static, KeyPair>, identity: &Identity, files: &Pair) -> Result<(), Error> {
    let failed = |source| Error::Certificate { identity: identity.common_name.clone(), source };
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, identity.common_name.clone());
    if let Some(organization) = identity.organization {
        params.distinguished_name.push(DnType::OrganizationName, organization);
    }
    if let Some(node) = &identity.node {
        params.distinguished_name.push(DnType::OrganizationalUnitName, node.clone());
    }
    params.subject_alt_names = identity.names.clone();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if identity.serves {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, authority).map_err(failed)?;
    write_atomically(&files.key, key.serialize_pem().as_bytes(), 0o600)?;
    write_atomically(&files.cert, certificate.pem().as_bytes(), 0o644)
}

fn write_kubeconfig(layout: &Layout, path: &Path, file: &str, server: &str) -> Result<(), Error> {
    use base64::Engine;
    let read = |path: &Path| {
        std::fs::read(path)
            .map(|bytes| base64::engine::general_purpose::STANDARD.encode(bytes))
            .map_err(|source| Error::io("read", path, source))
    };
    let files = pair(layout, file);
    let config = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "godwit", "cluster": {
            "server": server, "certificate-authority-data": read(&ca(layout))?}}],
        "users": [{"name": file, "user": {
            "client-certificate-data": read(&files.cert)?, "client-key-data": read(&files.key)?}}],
        "contexts": [{"name": "godwit", "context": {"cluster": "godwit", "user": file, "namespace": "default"}}],
        "current-context": "godwit",
    });
    // JSON is YAML, and kubectl reads either.
    let text = serde_json::to_vec_pretty(&config).map_err(|e| Error::io("encode", path, e.into()))?;
    write_atomically(path, &text, 0o600)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_made_once_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::open(folder.path()).unwrap();
        let mut cluster =
            Cluster { id: layout.id(), nodes: vec!["node1".into()], api_port: 1234, ..Cluster::default() };
        ensure(&layout, &cluster).unwrap();
        let first = std::fs::read(pair(&layout, ADMIN).cert).unwrap();
        cluster.nodes.push("node2".into());
        ensure(&layout, &cluster).unwrap();
        assert_eq!(first, std::fs::read(pair(&layout, ADMIN).cert).unwrap());
        assert!(pair(&layout, &handler_file("node2")).cert.exists());
        // a handler's pair of an older data directory names no node and is made anew
        let handler = pair(&layout, &handler_file("node1")).cert;
        assert!(names_node(&handler, Some("node1")) && !names_node(&handler, Some("node2")));
        std::fs::copy(pair(&layout, ADMIN).cert, &handler).unwrap();
        ensure(&layout, &cluster).unwrap();
        assert!(names_node(&handler, Some("node1")));
        let config = kube::config::Kubeconfig::read_from(layout.kubeconfig()).unwrap();
        assert_eq!(config.clusters[0].cluster.as_ref().unwrap().server.as_deref(), Some("https://127.0.0.1:1234"));
    }
}
