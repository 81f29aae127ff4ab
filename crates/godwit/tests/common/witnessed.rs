//! Guests that are heard by their frames.

use super::{Cluster, rom_vmi};
use godwit_bench::witness::{Beat, Station, Witness};
use godwit_standalone::Layout;
use serde_json::{Value, json};
use std::time::{Duration, SystemTime};

/// The ROM guest on the network `witness`, under this address.
pub fn heard_vmi(name: &str, station: Station) -> Value {
    let mac = station.map(|byte| format!("{byte:02x}")).join(":");
    let mut vmi = rom_vmi(name);
    vmi["spec"]["domain"]["devices"] =
        json!({"interfaces": [{"name": "w", "bridge": {}, "model": "rtl8139", "macAddress": mac}]});
    vmi["spec"]["networks"] = json!([{"name": "w", "multus": {"networkName": "witness"}}]);
    vmi
}

/// The silence between a guest's last beat from one pod and its first from another, of the last time that it moved after `from`.
pub fn switch_gap(beats: &[Beat], from: SystemTime) -> Option<Duration> {
    let pairs = beats.iter().zip(beats.iter().skip(1)).rev();
    let mut moves = pairs.filter(|(last, next)| last.port != next.port && next.at > from);
    moves.next().map(|(last, next)| next.at.duration_since(last.at).unwrap_or_default())
}

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
