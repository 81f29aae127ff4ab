//! One guest after another, for one lane of runs: where one is lost, the next takes its place.

use super::error::Error;
use super::plan::Manner;
use super::stage::{IMAGE, Kind, MANNER, NETWORK, PATIENCE, Stage, text};
use crate::witness::Station;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// Between two looks at the API.
pub const LOOK_EVERY: Duration = Duration::from_millis(25);
/// So many beats in a row are a sign of life.
pub const ALIVE: usize = 5;

/// A guest.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Name of its VMI.
    pub name: String,
    /// Its frames' source.
    pub station: Station,
    /// It has a disk of its own, which goes where it goes.
    pub disk: bool,
}

/// Blocks of its disk that a guest with one writes and checks in turn.
pub const DISK_BLOCKS: u32 = 64;
/// From one of them to the next. QEMU copies 64 KiB for whatever was written in them, so that those four are copied together:
/// were it each alone, a few such guests on one link would write more than it carries, and their copies would never be done.
pub const DISK_STRIDE: u32 = 4;

/// A launcher's pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its node.
    pub node: String,
    /// The pod's uid.
    pub uid: String,
}

impl Place {
    /// The pod's folder at its kubelet.
    pub fn folder(&self, stage: &Stage) -> PathBuf {
        stage.layout.node(&self.node).join("pods").join(&self.uid)
    }

    /// One of the pod's emptyDir volumes.
    pub fn volume(&self, stage: &Stage, name: &str) -> PathBuf {
        self.folder(stage).join("volumes/kubernetes.io~empty-dir").join(name)
    }
}

impl Guest {
    /// The guest with this number, with a disk or without.
    #[must_use]
    pub fn new(number: u32, disk: bool) -> Self {
        let [a, b, c, d] = number.to_be_bytes();
        Self { name: format!("guest-{number}"), station: [2, 0x67, a, b, c, d], disk }
    }

    fn vmi(&self) -> Value {
        let mac: Vec<String> = self.station.iter().map(|byte| format!("{byte:02x}")).collect();
        let interface = json!({"name": "w", "bridge": {}, "model": "rtl8139", "macAddress": mac.join(":")});
        let (disks, volumes) = match self.disk {
            true => (
                json!([{"name": "own", "disk": {"bus": "virtio"}}]),
                json!([{"name": "own", "emptyDisk": {"capacity": "8Mi"}}]),
            ),
            false => (json!([]), json!([])),
        };
        json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": {"name": self.name},
            "spec": {
                "terminationGracePeriodSeconds": 0,
                "domain": {
                    "memory": {"guest": "16Mi"},
                    "devices": {"interfaces": [interface], "disks": disks},
                    "firmware": {"kernelBoot": {"container": {"image": IMAGE, "kernelPath": "/boot/rom.bin"}}},
                },
                "networks": [{"name": "w", "multus": {"networkName": NETWORK}}],
                "volumes": volumes,
            },
        })
    }

    /// Starts it and waits until it beats.
    pub async fn start(&self, stage: &Stage) -> Result<(), Error> {
        stage.apply(stage.api(Kind::Vmi), &self.name, &self.vmi()).await?;
        let (began, deadline) = (SystemTime::now(), Instant::now() + PATIENCE);
        loop {
            let vmi = self.look(stage).await;
            let phase = vmi.as_ref().map(|vmi| text(vmi, "/status/phase")).unwrap_or_default();
            if phase == "Running" && stage.witness.since(self.station, began).beats >= ALIVE {
                return Ok(());
            }
            if Instant::now() > deadline {
                let last = vmi.map_or_else(|| "not in the API".to_owned(), |vmi| vmi.data.to_string());
                let what = format!("{} starts and beats", self.name);
                return Err(Error::Late { what, seconds: PATIENCE.as_secs(), last });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Sees to it that it is moved in this manner: a label by which a MigrationPolicy finds it, or not.
    pub async fn dress(&self, stage: &Stage, manner: Manner) -> Result<(), Error> {
        let value = (manner == Manner::PostCopy).then(|| manner.name());
        let patch = Patch::Merge(json!({"metadata": {"labels": {MANNER: value}}}));
        let deadline = Instant::now() + PATIENCE;
        loop {
            match stage.api(Kind::Vmi).patch(&self.name, &PatchParams::default(), &patch).await {
                Ok(_) => return Ok(()),
                Err(source) if Instant::now() > deadline => {
                    return Err(Error::Api { what: format!("label {}", self.name), source });
                }
                Err(_) => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    /// Its VMI, if the API answers and has it.
    pub async fn look(&self, stage: &Stage) -> Option<DynamicObject> {
        stage.api(Kind::Vmi).get_opt(&self.name).await.ok().flatten()
    }

    /// Where it lives as the API says it.
    pub async fn place(&self, stage: &Stage) -> Option<Place> {
        let vmi = self.look(stage).await?;
        let node = text(&vmi, "/status/nodeName");
        let pods = vmi.data.pointer("/status/activePods").and_then(Value::as_object)?;
        // What is left of an earlier place has gone from the list, or is on another node.
        let uid = pods.iter().find(|(_, on)| on.as_str() == Some(&node)).map(|(uid, _)| uid.clone())?;
        Some(Place { node, uid })
    }

    /// Takes away what is left of it.
    pub async fn remove(&self, stage: &Stage) {
        let _ = stage.api(Kind::Vmi).delete(&self.name, &DeleteParams::default()).await;
        stage.witness.forget(self.station);
    }
}
