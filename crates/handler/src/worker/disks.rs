//! Disks that come and go while the guest runs: their images go from attachment pods to launchers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use godwit_api::names::events;
use godwit_api::vmi::{HotplugVolumeStatus, VirtualMachineInstance};
use godwit_launcher::rpc::DisksOrder;

use super::{Stop, Worker};
use crate::lend::{self, Offered};
use crate::sockets::SocketDir;

/// What is offered to a launcher, by volume.
pub(super) type Images = BTreeMap<String, Offered>;

/// The sockets' names, for an order.
pub(super) fn sockets_of(images: &Images) -> BTreeMap<String, String> {
    images.iter().map(|(volume, offered)| (volume.clone(), offered.socket.clone())).collect()
}

impl Worker {
    pub(super) async fn change_disks(
        &mut self,
        vmi: &VirtualMachineInstance,
        name: &str,
        missing: &[String],
    ) -> Result<(), Stop> {
        let began = Instant::now();
        let pod_of = |volume: &str| {
            let status = vmi.status.volume_status.iter().find(|one| one.name == volume)?;
            let held: &HotplugVolumeStatus = status.hotplug_volume.as_ref()?;
            Some((volume.to_owned(), held.attach_pod_uid.clone()?))
        };
        let wanted: Vec<(String, String)> = missing.iter().filter_map(|volume| pod_of(volume)).collect();
        let images = match self.offer_images(name, &wanted).await {
            Ok(images) => images,
            Err(error) => return Err(self.complain(format!("cannot change the guest's disks: {error}")).await),
        };
        let mut ordered = vmi.clone();
        self.volumes(&mut ordered).await?;
        let pod = self.pod(name)?;
        let order = DisksOrder { vmi: ordered, sockets: sockets_of(&images) };
        match pod.follower.client.change_disks(&order).await {
            Ok(state) => {
                pod.follower.learn(state);
                self.complaint = None;
                let ms = began.elapsed().as_millis() as u64;
                tracing::info!(vmi = self.name, pod = name, ?missing, ms, "the guest's disks are changed");
                for volume in missing {
                    self.context.events.record(vmi, false, events::reason::VOLUME_READY, events::volume_ready(volume));
                }
                self.wake.notify_one();
                Ok(())
            }
            Err(error) => Err(self.complain(format!("cannot change the guest's disks: {error}")).await),
        }
    }

    /// For a migration's target: the images of the disks that the guest was given while it ran, from the attachment pod that
    /// was made for the target.
    pub(super) async fn offer_late_disks(
        &mut self,
        vmi: &VirtualMachineInstance,
        name: &str,
    ) -> Result<Images, String> {
        let wanted: Vec<&str> = vmi.plugged_in().collect();
        if wanted.is_empty() {
            return Ok(Images::new());
        }
        let state = vmi.status.migration_state.as_ref();
        let Some(uid) = state.and_then(|state| state.target_attachment_pod_uid.clone()) else {
            return Err(format!("no pod holds the claims of {} on this node", wanted.join(", ")));
        };
        let wanted: Vec<(String, String)> = wanted.into_iter().map(|name| (name.to_owned(), uid.clone())).collect();
        self.offer_images(name, &wanted).await
    }

    /// Gets these volumes' images from the pods of these UIDs, and offers them to the launcher in the pod `name`.
    async fn offer_images(&mut self, name: &str, wanted: &[(String, String)]) -> Result<Images, String> {
        let mut images = Images::new();
        if wanted.is_empty() {
            return Ok(images);
        }
        let folder = self.pods.get(name).map(|pod| pod.follower.folder.clone()).ok_or("the launcher's pod is gone")?;
        let dir = Arc::new(SocketDir::open(folder).map_err(|error| error.to_string())?);
        for (number, (volume, uid)) in wanted.iter().enumerate() {
            let image = lend::image(&self.context.kubelet_root, uid, volume).await;
            let image =
                image.map_err(|error| format!("volume {volume}: its attachment pod does not give it: {error}"))?;
            let offered = lend::offer_image(image, dir.clone(), number).map_err(|error| error.to_string())?;
            images.insert(volume.clone(), offered);
        }
        Ok(images)
    }
}
