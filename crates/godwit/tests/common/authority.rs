//! The authority that signs the components' certificates on a real Kubernetes, and what it has signed.

use super::Cluster;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Api;

impl Cluster {
    /// The certificate of the CA that signs now.
    pub async fn signing_ca(&self) -> String {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), "kubevirt");
        let secret = secrets.get("godwit-ca").await.expect("the CA");
        String::from_utf8(secret.data.expect("data")["ca.crt"].0.clone()).expect("PEM")
    }

    /// The CAs whose certificates count, one after the other.
    pub async fn published_cas(&self) -> String {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), "kubevirt");
        maps.get("godwit-ca-bundle").await.expect("the bundle").data.expect("data")["ca-bundle.crt"].clone()
    }

    /// How many certificates nodes have asked for, and how many they have got.
    pub async fn node_certificates(&self) -> (usize, usize) {
        let requests: Api<CertificateSigningRequest> = Api::all(self.client.clone());
        let requests = requests.list(&Default::default()).await.expect("requests").items;
        let signed =
            |one: &&CertificateSigningRequest| one.status.as_ref().is_some_and(|status| status.certificate.is_some());
        (requests.len(), requests.iter().filter(signed).count())
    }
}
