//! Disks that come and go while the guest runs.

use super::memory::meet;
use super::migration::check_name;
use super::{Refused, Stage, Vm, refused};
use crate::plan::{self, Late};
use crate::rpc::{DisksOrder, Refusal};
use crate::volumes::Preparer;
use godwit_qemu::descriptor;
use godwit_qemu::machine::plugged_number;
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

/// Where every process of this pod finds an open file of the launcher's. QEMU opens it anew, with a lock of its own.
fn path_of(file: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()))
}

impl Vm {
    /// The images that were handed over, by volume.
    pub(super) fn handed_over(&self) -> BTreeMap<String, PathBuf> {
        self.images.iter().map(|(volume, file)| (volume.clone(), path_of(file))).collect()
    }

    /// Takes the images that the handler offers on these sockets, by volume.
    pub(super) async fn take_images(&mut self, sockets: &BTreeMap<String, String>) -> Result<(), Refused> {
        for (volume, socket) in sockets {
            check_name(socket)?;
            let came = meet(self.paths.sockets.join(socket), descriptor::receive).await;
            let file = came.map_err(|error| {
                refused(Refusal::Failed, format!("volume {volume}: its claim's image was not handed over: {error}"))
            })?;
            self.images.insert(volume.clone(), file);
        }
        Ok(())
    }

    /// Makes the disks that come and go those of this VMI.
    pub(super) async fn change_disks(&mut self, order: &DisksOrder) -> Result<(), Refused> {
        self.check_uid(&order.vmi)?;
        if !matches!(self.stage, Stage::Running(_)) || self.ending.is_some() {
            return Err(refused(Refusal::Conflict, "no guest runs here whose disks could be changed now"));
        }
        let spec = &order.vmi.spec;
        let stays = |name: &str| spec.volumes.iter().any(|one| one.name == name && one.is_hotpluggable());
        let there = self.now.volumes.iter().filter_map(|volume| Some((volume.name.clone(), volume.place?)));
        let goes: Vec<(String, u32)> = there.filter(|(name, _)| !stays(name)).collect();
        for (name, place) in goes {
            self.unplug(&name, place).await?;
        }
        for disk in &spec.domain.devices.disks {
            let volume = spec.volumes.iter().find(|volume| volume.name == disk.name && volume.is_hotpluggable());
            let Some(volume) = volume.filter(|volume| !self.now.volumes.iter().any(|one| one.name == volume.name))
            else {
                continue;
            };
            let Some(socket) = order.sockets.get(&volume.name) else { continue };
            if !self.takes_disks {
                let message = format!(
                    "volume {}: the guest was started without a place for disks that come while it runs, because of \
                     disableHotplug or by an older version; start it anew",
                    volume.name
                );
                return Err(refused(Refusal::Invalid, message));
            }
            self.take_images(&BTreeMap::from([(volume.name.clone(), socket.clone())])).await?;
            let used = self.now.volumes.iter().map(|one| one.target.as_str());
            let place = plan::free_place(used);
            let plugged = self.plug(order, Late { disk, volume, place }).await;
            if plugged.is_err() {
                self.images.remove(&volume.name);
            }
            plugged?;
        }
        self.learn_sizes().await;
        Ok(())
    }

    async fn plug(&mut self, order: &DisksOrder, late: Late<'_>) -> Result<(), Refused> {
        let paths = self.paths.clone();
        let preparer = Preparer { paths: &paths, vmi: &order.vmi, arriving: false };
        let (disk, state) = plan::late_disk(&preparer, &late, &self.handed_over())?;
        let Stage::Running(running) = &mut self.stage else {
            return Err(refused(Refusal::Conflict, "no guest runs here"));
        };
        running.plug(&disk).await?;
        tracing::info!(volume = state.name, target = state.target, "a disk was plugged in");
        self.disks.extend(plan::writable(&disk, plugged_number(late.place), &state));
        self.now.volumes.push(state);
        Ok(())
    }

    async fn unplug(&mut self, name: &str, place: u32) -> Result<(), Refused> {
        if let Stage::Running(running) = &mut self.stage {
            running.unplug(place).await?;
        }
        tracing::info!(volume = name, "a disk was taken out");
        self.disks.retain(|disk| disk.volume != name);
        self.now.volumes.retain(|volume| volume.name != name);
        self.images.remove(name);
        Ok(())
    }

    /// Asks QEMU how large the disks are.
    pub(super) async fn learn_sizes(&mut self) {
        let Some(qemu) = self.stage.qemu() else { return };
        match qemu.disk_sizes().await {
            Ok(sizes) => {
                for (number, volume) in self.now.volumes.iter_mut().enumerate() {
                    let number = volume.place.map_or(number, plugged_number);
                    volume.size_bytes = sizes.get(&number).copied();
                }
            }
            Err(error) => tracing::warn!(%error, "asking for the sizes of the disks"),
        }
    }
}
