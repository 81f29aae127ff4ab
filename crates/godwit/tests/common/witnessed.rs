//! Guests that are heard by their frames.

use super::Cluster;
use godwit_bench::witness::Witness;
use godwit_standalone::Layout;
use serde_json::json;

impl Cluster {
    /// Makes the network `witness`, and hears the guests that are on it.
    pub async fn witness(&self) -> Witness {
        let config = json!({"cniVersion": "0.3.1", "name": "witness", "type": "bridge", "bridge": "br-witness"});
        let network = json!({
            "apiVersion": "k8s.cni.cncf.io/v1", "kind": "NetworkAttachmentDefinition",
            "metadata": {"name": "witness"}, "spec": {"config": config.to_string()},
        });
        self.apply(network).await.expect("apply the network");
        let layout = Layout::open(self.data_dir()).expect("layout").load().expect("cluster.json").expect("a cluster");
        Witness::start(&layout).expect("a witness")
    }
}
