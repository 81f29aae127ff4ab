//! Images of disks, seen from outside.

use super::Told;
use crate::migrate::Error;
use crate::migrate::lab::Attached;
use godwit_guest_init::blocks::{BLOCK, last_writes, written};
use godwit_standalone::{Layout, admin_client};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::api::{Api, PostParams};
use serde_json::json;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

fn claim_name(disk: &Attached) -> Option<&str> {
    disk.volume.pointer("/persistentVolumeClaim/claimName")?.as_str()
}

/// Makes the shared claims that the disks want.
pub async fn claim(layout: &Layout, disks: impl Iterator<Item = &Attached>, size: &str) -> Result<(), Error> {
    let claims: Api<PersistentVolumeClaim> = Api::default_namespaced(admin_client(layout).await?);
    for name in disks.filter_map(claim_name) {
        let claim = json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
            "spec": {
                "storageClassName": "shared", "accessModes": ["ReadWriteMany"],
                "resources": {"requests": {"storage": size}},
            },
        });
        let claim = serde_json::from_value(claim)
            .map_err(|e| Error::Usage(format!("the benchmark's claim cannot be made: {e}")))?;
        claims.create(&PostParams::default(), &claim).await?;
    }
    Ok(())
}

/// The open image of a disk.
pub struct Image(File);

impl Image {
    /// Opens it where the cluster keeps it; `own`: where the guest's pod has the files that it made.
    pub async fn open(layout: &Layout, client: &kube::Client, disk: &Attached, own: &Path) -> Result<Self, Error> {
        let path = match claim_name(disk) {
            None => own.join(format!("{}.img", disk.name)),
            Some(name) => {
                let claim = Api::<PersistentVolumeClaim>::default_namespaced(client.clone()).get(name).await?;
                let volume = claim.spec.and_then(|spec| spec.volume_name).unwrap_or_default();
                layout.shared().join(volume).join("disk.img")
            }
        };
        let file = File::open(&path).map_err(|e| Error::io(format!("open {}", path.display()), e))?;
        Ok(Self(file))
    }

    /// How many blocks there are to look at, and how many of them hold something older than what the guest was told is kept.
    pub fn look(&self, told: &Told) -> Result<(usize, usize), Error> {
        let token = u64::from_str_radix(&told.token, 16)
            .map_err(|e| Error::Guest(format!("names its blocks {:?}: {e}", told.token)))?;
        let (mut looked_at, mut lost) = (0, 0);
        let mut block = [0; BLOCK];
        for (place, wanted) in (0u64..).zip(last_writes(told.acknowledged)) {
            let Some(wanted) = wanted else { continue };
            looked_at += 1;
            // Later writes may be there too: the guest has gone on after it was asked.
            let read = self.0.read_exact_at(&mut block, place * BLOCK as u64);
            if read.is_err() || written(token, &block).is_none_or(|found| found < wanted) {
                lost += 1;
            }
        }
        Ok((looked_at, lost))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_guest_init::blocks::{content, place};

    #[test]
    fn an_image_that_lacks_an_acknowledged_write_is_told_from_one_that_has_more() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        let file = File::create_new(&path).unwrap();
        let write = |n: u64, to: u64| {
            let mut block = [0; BLOCK];
            content(7, n, &mut block);
            file.write_all_at(&block, to * BLOCK as u64).unwrap();
        };
        (1..=20).for_each(|n| write(n, place(n)));
        let image = Image(File::open(&path).unwrap());
        let told = |acknowledged| Told { token: "7".into(), acknowledged, ..Told::default() };
        assert_eq!(image.look(&told(20)).unwrap(), (20, 0));
        assert_eq!(image.look(&told(16)).unwrap(), (16, 0), "what was not acknowledged may be there");
        assert_eq!(image.look(&told(24)).unwrap(), (24, 4));
        // An old block in the place of a newer one.
        (21..=1030).for_each(|n| write(n, place(n)));
        assert_eq!(image.look(&told(1030)).unwrap(), (1024, 0));
        write(3, place(1027));
        assert_eq!(image.look(&told(1030)).unwrap(), (1024, 1));
    }
}
