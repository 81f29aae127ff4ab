//! The product: a VMI in a cluster of two nodes, moved by making a VirtualMachineInstanceMigration.

use super::figures::{Foretold, Moved, Sample};
use super::lab::{Attached, Lab, Workload};
use super::{Bandwidth, Error, now_us};
use futures::StreamExt;
use godwit_launcher::client::Client as Launcher;
use godwit_launcher::rpc::{EventRecord, MigrationFacts};
use godwit_standalone::{CONTROL_PLANE, Layout, admin_client};
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PostParams};
use kube::runtime::watcher::{self, Event};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::mpsc;

/// Name of the VMI.
const NAME: &str = "bench";
/// How long something that is not measured may take.
const PATIENCE: Duration = Duration::from_secs(60);
const NETWORK: &str = include_str!("../../../../docs/examples/lab-network.yaml");

/// A running guest in a cluster.
pub struct Ours {
    client: kube::Client,
    moves: usize,
    layout: Layout,
}

impl Ours {
    /// Configures the cluster for the workload and makes the VMI.
    pub async fn boot(lab: &Lab, work: &Workload) -> Result<Self, Error> {
        let client = admin_client(&lab.layout).await?;
        let ours = Self { client, moves: 0, layout: lab.layout.clone() };
        let bandwidth = match work.bandwidth {
            Bandwidth::Unlimited => "0".to_owned(),
            Bandwidth::Mebibytes(mib) => format!("{}Mi", mib.0),
        };
        let settings = json!({"spec": {"configuration": {"migrations": {"bandwidthPerMigration": bandwidth}}}});
        let kubevirts: Api<DynamicObject> = Api::namespaced_with(ours.client.clone(), "kubevirt", &kind("KubeVirt"));
        kubevirts.patch("kubevirt", &Default::default(), &Patch::Merge(settings)).await?;
        godwit_standalone::demo::apply(&ours.client, NETWORK).await?;
        let vmi: DynamicObject = serde_json::from_value(vmi(work))
            .map_err(|e| Error::Usage(format!("the benchmark's VMI cannot be made: {e}")))?;
        ours.vmis().create(&PostParams::default(), &vmi).await?;
        Ok(ours)
    }

    /// Processes outside the nodes' namespaces whose work counts: the control plane.
    pub fn processes(lab: &Lab) -> Vec<u32> {
        let record = std::fs::read_to_string(lab.layout.pid(CONTROL_PLANE)).unwrap_or_default();
        record.split_whitespace().next().and_then(|pid| pid.parse().ok()).into_iter().collect()
    }

    fn vmis(&self) -> Api<DynamicObject> {
        Api::default_namespaced_with(self.client.clone(), &kind("VirtualMachineInstance"))
    }

    fn migrations(&self) -> Api<DynamicObject> {
        Api::default_namespaced_with(self.client.clone(), &kind("VirtualMachineInstanceMigration"))
    }

    /// Where the guest is: the number of the host, from 0.
    pub async fn at(&self) -> Result<usize, Error> {
        let node = text(&self.vmis().get(NAME).await?, "/status/nodeName");
        let number = node.strip_prefix("node").and_then(|n| n.parse::<usize>().ok());
        number
            .and_then(|n| n.checked_sub(1))
            .ok_or_else(|| Error::Guest(format!("is on no node of ours, but on {node:?}")))
    }

    /// A client of the cluster's API.
    pub fn client(&self) -> kube::Client {
        self.client.clone()
    }

    /// Where the files are that the guest's pod on its node has made for disks.
    pub async fn own_disks(&self) -> Result<PathBuf, Error> {
        let node = text(&self.vmis().get(NAME).await?, "/status/nodeName");
        Ok(self.volumes(&node).await?.join("ephemeral-disks"))
    }

    /// Ends the guest.
    pub async fn end(self) -> Result<(), Error> {
        self.vmis().delete(NAME, &DeleteParams::default()).await?;
        self.gone(&self.vmis(), NAME).await
    }

    async fn gone(&self, api: &Api<DynamicObject>, name: &str) -> Result<(), Error> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while api.get_opt(name).await?.is_some() {
            if tokio::time::Instant::now() > deadline {
                return Err(Error::Guest(format!(
                    "does not end: {name} is still there after {} s",
                    PATIENCE.as_secs()
                )));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// The launcher of the guest's pod on a node.
    async fn launcher(&self, node: &str) -> Result<Launcher, Error> {
        Ok(Launcher::new(self.volumes(node).await?.join("sockets/launcher.sock")))
    }

    async fn volumes(&self, node: &str) -> Result<PathBuf, Error> {
        let vmi = self.vmis().get(NAME).await?;
        let pods = vmi.data.pointer("/status/activePods").and_then(Value::as_object);
        let here = pods.into_iter().flatten().filter(|(_, on)| on.as_str() == Some(node)).map(|(uid, _)| uid.clone());
        let mut here: Vec<String> = here.collect();
        // After a move within the node the old pod is there for a moment.
        let uid = if here.len() > 1 {
            let pods: Api<DynamicObject> = Api::default_namespaced_with(self.client.clone(), &pod());
            pods.get(&text(&vmi, "/status/migrationState/targetPod")).await?.metadata.uid
        } else {
            here.pop()
        };
        let uid = uid.ok_or_else(|| Error::Guest(format!("has no pod on {node}")))?;
        Ok(self.layout.node(node).join("pods").join(uid).join("volumes/kubernetes.io~empty-dir"))
    }

    /// Moves the guest. An error is one of the instrument; a guest that does not move is a [`Moved::failure`].
    pub async fn migrate(&mut self, limit: Duration) -> Result<Moved, Error> {
        self.go(limit, false).await
    }

    /// Gives the guest a new launcher on its node.
    pub async fn renew(&mut self, limit: Duration) -> Result<Moved, Error> {
        self.go(limit, true).await
    }

    async fn go(&mut self, limit: Duration, stays: bool) -> Result<Moved, Error> {
        self.moves += 1;
        let name = format!("move-{}", self.moves);
        let from = text(&self.vmis().get(NAME).await?, "/status/nodeName");
        let (tell, mut told) = mpsc::unbounded_channel();
        let mut states = self.launcher(&from).await?.watch().await.map_err(|e| Error::Guest(e.to_string()))?;
        let following = tokio::spawn(async move {
            while let Ok(Some(state)) = states.next().await {
                let Some(facts) = state.migration else { continue };
                if tell.send((now_us(), facts)).is_err() {
                    break;
                }
            }
        });
        let mut watch = Box::pin(kube::runtime::watcher(
            self.migrations(),
            watcher::Config::default().fields(&format!("metadata.name={name}")),
        ));
        // The watch has to stand before there is anything to see.
        while let Some(event) = watch.next().await {
            if matches!(event, Ok(Event::InitDone)) {
                break;
            }
        }
        let mut moved = Moved { asked_us: now_us(), ..Moved::default() };
        let mut migration = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
            "metadata": {"name": name}, "spec": {"vmiName": NAME},
        });
        if stays {
            migration["spec"]["addedNodeSelector"] = json!({"kubernetes.io/hostname": from});
        }
        let migration: DynamicObject = serde_json::from_value(migration)
            .map_err(|e| Error::Usage(format!("the benchmark's migration cannot be made: {e}")))?;
        let made = self.migrations().create(&PostParams::default(), &migration).await?;
        let uid = made.metadata.uid.unwrap_or_default();
        let deadline = tokio::time::Instant::now() + limit;
        let mut phase = String::new();
        let ended = loop {
            let event = tokio::select! {
                event = watch.next() => event,
                () = tokio::time::sleep_until(deadline) => break Err(format!("it did not end within {} s and was cancelled", limit.as_secs())),
            };
            let object = match event {
                Some(Ok(Event::Apply(object) | Event::InitApply(object))) => object,
                Some(_) => continue,
                None => {
                    return Err(Error::Guest("cannot be watched any more: the watch of its migration ended".into()));
                }
            };
            let now = text(&object, "/status/phase");
            if now != phase {
                phase = now;
                moved.steps.push((phase.clone(), (now_us() - moved.asked_us) as f64 / 1e3));
            }
            match phase.as_str() {
                "Succeeded" => break Ok(()),
                "Failed" => break Err(text(&object, "/status/migrationState/failureReason")),
                _ => {}
            }
        };
        moved.over_us = now_us();
        let step = |wanted: &str| moved.steps.iter().find(|(name, _)| name == wanted).map(|(_, at)| *at);
        moved.target_ready_ms = step("TargetReady").zip(step("Scheduled")).map(|(ready, scheduled)| ready - scheduled);
        match ended {
            Ok(()) => self.times(&mut moved, &uid).await?,
            Err(failure) => {
                moved.failure = Some(failure);
                // A migration that is over is only an object; one that is not is cancelled so.
                self.migrations().delete(&name, &DeleteParams::default()).await?;
                self.gone(&self.migrations(), &name).await?;
            }
        }
        // The source's launcher ends the stream when it has told all, after a departure; one that stays is left.
        let _ = tokio::time::timeout(Duration::from_millis(500), following).await;
        while let Ok((at_us, facts)) = told.try_recv() {
            if facts.uid == uid {
                take(&mut moved, at_us, &facts);
            }
        }
        Ok(moved)
    }

    /// When the guest ran at the target: from the events of the target's QEMU.
    async fn times(&self, moved: &mut Moved, uid: &str) -> Result<(), Error> {
        let vmi = self.vmis().get(NAME).await?;
        let state = vmi.data.pointer("/status/migrationState").cloned().unwrap_or_default();
        if state.get("migrationUid").and_then(Value::as_str) != Some(uid) {
            return Err(Error::Guest("has the state of another migration".into()));
        }
        moved.foretold = foretold(&state);
        let node = text(&vmi, "/status/nodeName");
        let events = self.launcher(&node).await?.events().await.map_err(|e| Error::Guest(e.to_string()))?;
        let resumed = |event: &&EventRecord| event.event == "RESUME" && event.at_us >= moved.asked_us;
        moved.resume_us = events.iter().find(resumed).map(|event| event.at_us);
        Ok(())
    }
}

/// What was expected, where it was, and what came.
fn foretold(state: &Value) -> Option<Foretold> {
    let ms = |pointer: &str| state.pointer(pointer).and_then(Value::as_f64);
    Some(Foretold {
        converges: state.pointer("/forecast/converges")?.as_bool()?,
        total_ms: ms("/forecast/durationMilliseconds"),
        total_within_ms: [ms("/forecast/minDurationMilliseconds"), ms("/forecast/maxDurationMilliseconds")],
        standstill_ms: ms("/forecast/downtimeMilliseconds"),
        standstill_within_ms: [ms("/forecast/minDowntimeMilliseconds"), ms("/forecast/maxDowntimeMilliseconds")],
        really_total_ms: ms("/progress/totalMilliseconds")?,
        really_standstill_ms: ms("/progress/downtimeMilliseconds")?,
    })
}

/// What the source's launcher says. Its times are the stamps of its QEMU's events.
fn take(moved: &mut Moved, at_us: i64, facts: &MigrationFacts) {
    moved.sending_us = facts.start_us.or(moved.sending_us);
    moved.stop_us = facts.stop_us.or(moved.stop_us);
    moved.qemu_downtime_ms = facts.qemu_downtime_ms.or(moved.qemu_downtime_ms);
    moved.qemu_bytes = Some(facts.processed_bytes);
    moved.passes = facts.iteration;
    let Some(start) = facts.start_us else { return };
    moved.samples.push(Sample {
        // The last words are said again later: they are of the end.
        at_ms: (facts.end_us.unwrap_or(at_us).min(at_us) - start) as f64 / 1e3,
        sent_bytes: facts.processed_bytes,
        remaining_bytes: facts.remaining_bytes,
        dirty_bytes_per_second: facts.dirty_bytes_per_second,
    });
}

fn vmi(work: &Workload) -> Value {
    let disk = |attached: &Attached| {
        let mut disk = json!({"name": attached.name, "disk": {"bus": "virtio"}});
        if let Some(cache) = &attached.cache {
            disk["cache"] = json!(cache);
        }
        disk
    };
    let volume = |disk: &Attached| {
        let mut volume = disk.volume.clone();
        volume["name"] = json!(disk.name);
        volume
    };
    let disks: Vec<Value> = work.disks.iter().map(disk).collect();
    let volumes: Vec<Value> = work.disks.iter().map(volume).collect();
    let memory = if work.shareable { "shareable" } else { "private" };
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": {"name": NAME, "annotations": {"godwit.io/guest-memory": memory}},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "domain": {
                "cpu": {"cores": 1},
                "memory": {"guest": format!("{}Mi", work.memory.0)},
                "devices": {"rng": {}, "disks": disks, "interfaces": [{"name": "lab", "bridge": {}}]},
                "firmware": {"kernelBoot": {
                    "kernelArgs": work.arguments,
                    "container": {
                        "image": "godwit.local/demo-guest:latest",
                        "kernelPath": "/boot/vmlinuz", "initrdPath": "/boot/initrd",
                    },
                }},
            },
            "volumes": volumes,
            "networks": [{"name": "lab", "multus": {"networkName": "lab"}}],
        },
    })
}

fn pod() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Pod"))
}

fn kind(kind: &str) -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", kind))
}

fn text(object: &DynamicObject, pointer: &str) -> String {
    object.data.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forecast_is_read_from_the_status() {
        let state = json!({
            "forecast": {"converges": true, "durationMilliseconds": 600, "downtimeMilliseconds": 12, "minDurationMilliseconds": 400},
            "progress": {"totalMilliseconds": 500, "downtimeMilliseconds": 9},
        });
        let told = foretold(&state).unwrap();
        assert_eq!((told.total_ms, told.total_within_ms), (Some(600.0), [Some(400.0), None]));
        assert_eq!((told.standstill_error_ms(), told.converges), (Some(3.0), true));
        assert_eq!(foretold(&json!({"progress": {"totalMilliseconds": 500, "downtimeMilliseconds": 9}})), None);
    }

    #[test]
    fn the_last_words_of_a_launcher_are_of_the_end() {
        let facts = json!({"uid": "u", "role": "source", "status": "completed", "startUs": 1_000, "stopUs": 7_000,
            "endUs": 9_000, "processedBytes": 5, "remainingBytes": 0, "qemuDowntimeMs": 2, "iteration": 3});
        let facts: MigrationFacts = serde_json::from_value(facts).unwrap();
        let mut moved = Moved::default();
        take(&mut moved, 999_000, &facts);
        assert_eq!((moved.sending_us, moved.stop_us, moved.passes), (Some(1_000), Some(7_000), 3));
        assert_eq!(moved.samples[0].at_ms, 8.0);
    }
}
