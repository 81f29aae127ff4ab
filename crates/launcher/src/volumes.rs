//! The files behind the disks: found in the pod, or made in it.

use crate::blank::{self, Blank};
use crate::copy_mark;
use crate::iso;
use crate::rpc::{Paths, VolumeFacts};
use base64::Engine;
use godwit_api::vmi::{CloudInitNoCloudSource, MigrationMethod, StorageMigratedVolumeInfo, Volume};
use godwit_api::{Quantity, VirtualMachineInstance};
use godwit_qemu::machine::Format;
use godwit_qemu::process::find_qemu_img;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Why a volume cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VMI asks for something that is not there or not possible.
    #[error("volume {volume}: {message}")]
    Invalid {
        /// The volume.
        volume: String,
        /// What is wrong, and what to do.
        message: String,
    },
    /// The system refused.
    #[error("volume {volume}: {action} {path}: {source}{}", by_whom(source))]
    Io {
        /// The volume.
        volume: String,
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    /// What the system refused, as far as it did.
    pub fn kind(&self) -> std::io::ErrorKind {
        match self {
            Error::Invalid { .. } => std::io::ErrorKind::Other,
            Error::Io { source, .. } => source.kind(),
        }
    }

    /// Whether the fault is in the order rather than in this machine.
    pub fn is_invalid(&self) -> bool {
        matches!(self, Error::Invalid { .. })
    }
}

/// What is open to its maker alone is of no use here: who must be able to open it.
fn by_whom(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => {
            format!(
                "; this launcher is user {} and group {}, who must be able to",
                nix::unistd::geteuid(),
                nix::unistd::getegid()
            )
        }
        _ => String::new(),
    }
}

/// The file of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Where it is.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// It must not be written, whatever the disk says: it belongs to others too, or is made anew at each place.
    pub read_only: bool,
    /// Source and target of a migration see the same bytes without anybody copying them.
    pub same_everywhere: bool,
    /// The image that it lies above, which is never written and which every node can have.
    pub base: Option<PathBuf>,
    /// Its content is still on another claim, and is copied here.
    pub comes: bool,
    /// The guest's disk is as large as this, and the image larger.
    pub size: Option<u64>,
}

impl Image {
    fn new(path: PathBuf, format: Format, read_only: bool, same_everywhere: bool) -> Image {
        Image { path, format, read_only, same_everywhere, base: None, comes: false, size: None }
    }

    /// Whether it can be read and written without the host's page cache (`O_DIRECT`), what it lies above as well.
    pub fn allows_direct_io(&self) -> bool {
        use std::os::unix::fs::OpenOptionsExt;
        let opens =
            |path: &Path| std::fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECT).open(path).is_ok();
        opens(&self.path) && self.base.as_deref().is_none_or(opens)
    }
}

const NOT_WRITTEN: &str = "a disk that the guest cannot write to is not moved to another claim";

/// Prepares the file of one volume.
pub struct Preparer<'a> {
    /// Where things are.
    pub paths: &'a Paths,
    /// Whose volumes they are.
    pub vmi: &'a VirtualMachineInstance,
    /// Whether this is a target: what comes over from the source must not be taken for missing.
    pub arriving: bool,
}

impl Preparer<'_> {
    /// Finds or makes the file of `volume`; `disk_read_only` when the guest will not write to it.
    pub async fn prepare(&self, volume: &Volume, disk_read_only: bool, facts: &VolumeFacts) -> Result<Image, Error> {
        check_name(&volume.name)?;
        let name = volume.name.as_str();
        if let Some(source) = &volume.container_disk {
            let folder = self.paths.container_disks.join(name);
            let file = container_disk(name, &folder, source.path.as_deref())?;
            let format = trusted_format(name, &file)?;
            if disk_read_only {
                return Ok(Image::new(file, format, true, true));
            }
            let overlay = self.own_file(name, "qcow2")?;
            if !overlay.exists() {
                make_overlay(name, &file, format, &overlay).await?;
            }
            return Ok(Image { base: Some(file), ..Image::new(overlay, Format::Qcow2, false, false) });
        }
        if let Some(source) = &volume.persistent_volume_claim {
            let device = self.paths.block_disks.join(name);
            if device.exists() {
                return self.device(name, device, disk_read_only || source.read_only == Some(true)).await;
            }
            let path = self.paths.vmi_disks.join(name).join("disk.img");
            let shared = self.claim_is_shared(name);
            let read_only = source.read_only == Some(true);
            if self.arriving && self.comes_from_another_claim(name) {
                if read_only || disk_read_only {
                    return Err(invalid(name, NOT_WRITTEN));
                }
                self.make_room_on_claim(name, &path, facts).await?;
                return Ok(Image { comes: true, ..Image::new(path, Format::Raw, false, shared) });
            }
            if !self.arriving {
                // Its user starts it from here, whatever this is.
                copy_mark::remove(&path).map_err(|e| io(name, "removing the mark of", &path, e))?;
            }
            if !path.exists() {
                // What the guest only reads is not copied.
                if self.arriving && (shared || read_only || disk_read_only) {
                    return Err(invalid(
                        name,
                        "disk.img is not on the claim, although the running guest uses it: source and \
                                              target do not see the same storage",
                    ));
                }
                let Some(bytes) = facts.capacity_bytes.or_else(|| self.claim_capacity(name)) else {
                    return Err(invalid(name, "disk.img is not on the claim, and the claim's size is not known"));
                };
                make_sparse(name, &path, bytes)?;
            }
            return Ok(Image::new(path, Format::Raw, read_only, shared || read_only));
        }
        if let Some(source) = &volume.empty_disk {
            let bytes = source.capacity.bytes().map_err(|e| invalid(name, &format!("emptyDisk.capacity: {e}")))?;
            let path = self.own_file(name, "img")?;
            if !path.exists() {
                make_sparse(name, &path, bytes)?;
            }
            return Ok(Image::new(path, Format::Raw, false, false));
        }
        let (label, files) = if let Some(source) = &volume.cloud_init_no_cloud {
            ("cidata".to_string(), self.cloud_init(name, source)?)
        } else if let Some(source) = &volume.config_map {
            let files = self.folder_files(name, &self.paths.config_maps.join(name), source.optional == Some(true))?;
            (source.volume_label.clone().unwrap_or_else(|| "cfgdata".into()), files)
        } else if let Some(source) = &volume.secret {
            let files = self.folder_files(name, &self.paths.secrets.join(name), source.optional == Some(true))?;
            (source.volume_label.clone().unwrap_or_else(|| "cfgdata".into()), files)
        } else {
            return Err(invalid(name, "of no kind that can be a disk"));
        };
        let image = iso::image(&label, &files).map_err(|e| invalid(name, &e.to_string()))?;
        let path = self.own_file(name, "iso")?;
        write_private(name, &path, &image)?;
        Ok(Image::new(path, Format::Raw, true, true))
    }

    /// The image of a claim that was handed over as an open file, which is at `path`.
    pub fn handed_over(&self, volume: &Volume, path: &Path, disk_read_only: bool) -> Result<Image, Error> {
        check_name(&volume.name)?;
        let name = volume.name.as_str();
        let read_only = volume.persistent_volume_claim.as_ref().is_some_and(|claim| claim.read_only == Some(true));
        let about = std::fs::metadata(path).map_err(|e| io(name, "looking at", path, e))?;
        let mut image =
            Image::new(path.to_owned(), Format::Raw, read_only, self.claim_is_shared(name) || disk_read_only);
        if !about.is_file() {
            // The guest's disk stays as large as it is, also on a larger device.
            let capacity = blank::size(path).map_err(|e| io(name, "asking for the size of", path, e))?;
            image.size = self.disk_size(name).filter(|size| self.arriving && *size < capacity);
        }
        Ok(image)
    }

    fn own_file(&self, volume: &str, extension: &str) -> Result<PathBuf, Error> {
        let folder = &self.paths.ephemeral_disks;
        std::fs::create_dir_all(folder).map_err(|e| io(volume, "making", folder, e))?;
        Ok(folder.join(format!("{volume}.{extension}")))
    }

    fn claim(&self, volume: &str) -> Option<&godwit_api::vmi::PersistentVolumeClaimInfo> {
        let status = self.vmi.status.volume_status.iter().find(|s| s.name == volume)?;
        status.persistent_volume_claim_info.as_ref()
    }

    /// Whether both ends of a migration see the same files. Where the VMI's status does not tell the access modes, the
    /// migration method decides: a `BlockMigration` has claims that are not shared.
    fn claim_is_shared(&self, volume: &str) -> bool {
        match self.claim(volume) {
            Some(claim) if !claim.access_modes.is_empty() => claim.access_modes.iter().any(|m| m == "ReadWriteMany"),
            _ => self.vmi.status.migration_method != Some(MigrationMethod::BlockMigration),
        }
    }

    /// Whether the migration that this is the target of moves the volume to another claim.
    fn comes_from_another_claim(&self, volume: &str) -> bool {
        self.moved(volume).is_some()
    }

    fn moved(&self, volume: &str) -> Option<&StorageMigratedVolumeInfo> {
        self.vmi.status.migrated_volumes.iter().find(|moved| moved.volume_name == volume)
    }

    /// The block device of a claim.
    async fn device(&self, volume: &str, path: PathBuf, read_only: bool) -> Result<Image, Error> {
        let shared = self.claim_is_shared(volume);
        let mut image = Image::new(path, Format::Raw, read_only, shared || read_only);
        if !self.arriving {
            return Ok(image);
        }
        let capacity = blank::size(&image.path).map_err(|e| io(volume, "asking for the size of", &image.path, e))?;
        let moved = self.moved(volume);
        if let Some(moved) = moved {
            if read_only {
                return Err(invalid(volume, NOT_WRITTEN));
            }
            self.check_size(volume, capacity)?;
            if moved.receiving != Some(true) {
                check_blank(volume, &image.path, "the block device that it moves to").await?;
            }
            image.comes = true;
        }
        // The guest's disk stays as large as it is, also on a larger device.
        image.size = self.disk_size(volume).filter(|size| *size < capacity);
        Ok(image)
    }

    /// How large the guest's disk is, where that is known.
    fn disk_size(&self, volume: &str) -> Option<u64> {
        let status = self.vmi.status.volume_status.iter().find(|status| status.name == volume)?;
        u64::try_from(status.size?).ok()
    }

    /// Whether a claim of this many bytes is large enough for the guest's disk, and how large that is.
    fn check_size(&self, volume: &str, capacity: u64) -> Result<u64, Error> {
        let Some(size) = self.disk_size(volume) else {
            return Err(invalid(volume, "the size of the guest's disk is not known yet"));
        };
        if capacity < size {
            // KubeVirt's words, up to the numbers.
            let message = format!(
                "Volume migration cannot be performed because the destination volume is smaller than the source volume: \
                 {capacity} bytes and {size} bytes"
            );
            return Err(invalid(volume, &message));
        }
        Ok(size)
    }

    /// An empty image of the size of the guest's disk. What an earlier try has left goes; anybody else's data stays.
    async fn make_room_on_claim(&self, volume: &str, path: &Path, facts: &VolumeFacts) -> Result<(), Error> {
        let Some(capacity) = facts.capacity_bytes else {
            return Err(invalid(volume, "the size of the claim that it moves to is not known"));
        };
        let size = self.check_size(volume, capacity)?;
        if path.exists() && !copy_mark::is_set(path) {
            check_blank(volume, path, "disk.img on the claim that it moves to").await?;
        }
        copy_mark::set(path).map_err(|e| io(volume, "marking", path, e))?;
        make_sparse(volume, path, size)
    }

    fn claim_capacity(&self, volume: &str) -> Option<u64> {
        let claim = self.claim(volume)?;
        let quantity: &Quantity = claim.capacity.get("storage").or_else(|| claim.requests.get("storage"))?;
        quantity.bytes().ok()
    }

    /// The files of a NoCloud disk (cloud-init's documentation, data source NoCloud).
    fn cloud_init(&self, volume: &str, source: &CloudInitNoCloudSource) -> Result<Vec<(String, Vec<u8>)>, Error> {
        let given = |text: &Option<String>, base64: &Option<String>, secret: bool, keys: [&str; 2]| {
            if secret {
                let folder = self.paths.cloud_init.join(volume);
                for key in keys {
                    let path = folder.join(key);
                    match std::fs::read(&path) {
                        Ok(bytes) => return Ok(Some(bytes)),
                        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                        Err(e) => return Err(io(volume, "reading", &path, e)),
                    }
                }
                return Err(invalid(volume, &format!("the secret has no key {}", keys[0])));
            }
            match (text, base64) {
                (Some(text), _) => Ok(Some(text.clone().into_bytes())),
                (None, Some(base64)) => base64::engine::general_purpose::STANDARD
                    .decode(base64.split_whitespace().collect::<String>())
                    .map(Some)
                    .map_err(|e| invalid(volume, &format!("{}Base64: {e}", keys[1]))),
                (None, None) => Ok(None),
            }
        };
        let user =
            given(&source.user_data, &source.user_data_base64, source.secret_ref.is_some(), ["userdata", "userData"])?;
        let network = given(
            &source.network_data,
            &source.network_data_base64,
            source.network_data_secret_ref.is_some(),
            ["networkdata", "networkData"],
        )?;
        let (namespace, name) = self.vmi.namespaced_name();
        let hostname = self.vmi.spec.hostname.as_deref().filter(|h| !h.is_empty()).unwrap_or(name);
        let meta = serde_json::json!({"instance-id": format!("{name}.{namespace}"), "local-hostname": hostname});
        let mut files = vec![
            ("meta-data".to_string(), format!("{meta}\n").into_bytes()),
            ("user-data".to_string(), user.unwrap_or_default()),
        ];
        if let Some(network) = network {
            files.push(("network-config".into(), network));
        }
        Ok(files)
    }

    /// The keys of a mounted ConfigMap or Secret; what begins with a dot is kubelet's own.
    fn folder_files(&self, volume: &str, folder: &Path, optional: bool) -> Result<Vec<(String, Vec<u8>)>, Error> {
        let entries = match std::fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && optional => return Ok(Vec::new()),
            Err(e) => return Err(io(volume, "reading", folder, e)),
        };
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| io(volume, "reading", folder, e))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = entry.path();
            if name.starts_with('.') || !path.is_file() {
                continue;
            }
            files.push((name, std::fs::read(&path).map_err(|e| io(volume, "reading", &path, e))?));
        }
        files.sort();
        Ok(files)
    }
}

/// What has data on it is not written over.
async fn check_blank(volume: &str, path: &Path, what: &str) -> Result<(), Error> {
    let image = path.to_owned();
    let looked = tokio::task::spawn_blocking(move || blank::look(&image)).await;
    match looked.map_err(std::io::Error::other).flatten().map_err(|e| io(volume, "reading", path, e))? {
        Blank::Yes => Ok(()),
        no => Err(invalid(volume, &no.refusal(what))),
    }
}

/// A volume's name becomes a file's; admission has checked it, a launcher does not rely on that.
fn check_name(name: &str) -> Result<(), Error> {
    let fine = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_';
    if name.is_empty() || name.starts_with('.') || name.len() > 63 || !name.chars().all(fine) {
        return Err(invalid(name, "the name of a volume is a DNS label"));
    }
    Ok(())
}

/// A path within `root`, links followed, never outside of it.
pub fn within(root: &Path, path: &str) -> std::io::Result<PathBuf> {
    let root = root.canonicalize()?;
    let inside = root.join(path.trim_start_matches('/')).canonicalize()?;
    if !inside.starts_with(&root) {
        return Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, "it leads out of the image"));
    }
    Ok(inside)
}

fn container_disk(volume: &str, folder: &Path, path: Option<&str>) -> Result<PathBuf, Error> {
    if let Some(path) = path.filter(|p| !p.is_empty()) {
        return within(folder, path).map_err(|e| io(volume, "finding in its image", Path::new(path), e));
    }
    let disks = within(folder, "disk").map_err(|e| io(volume, "finding in its image", Path::new("/disk"), e))?;
    let entries = std::fs::read_dir(&disks).map_err(|e| io(volume, "reading", &disks, e))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|e| e.ok().map(|e| e.path())).collect();
    files.retain(|f| f.is_file() && !f.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.')));
    match files.as_slice() {
        [file] => {
            let name = format!("disk/{}", file.file_name().unwrap_or_default().to_string_lossy());
            within(folder, &name).map_err(|e| io(volume, "finding in its image", file, e))
        }
        [] => Err(invalid(volume, "its image has no file in /disk; set containerDisk.path")),
        _ => Err(invalid(volume, "its image has several files in /disk; set containerDisk.path")),
    }
}

/// The format of an image somebody else made, by its first bytes. A qcow2 that refers to other files could make QEMU open what
/// the guest must not see, so it is refused.
fn trusted_format(volume: &str, path: &Path) -> Result<Format, Error> {
    let mut file = std::fs::File::open(path).map_err(|e| io(volume, "opening", path, e))?;
    let mut header = Vec::new();
    file.by_ref().take(80).read_to_end(&mut header).map_err(|e| io(volume, "reading", path, e))?;
    if !header.starts_with(b"QFI\xfb") {
        return Ok(Format::Raw);
    }
    // qcow2's header (QEMU docs/interop/qcow2): backing file at 8, incompatible features at 72 with bit 2 for a data file.
    let number = |at: usize| header.get(at..at + 8).map(|b| b.iter().fold(0u64, |n, b| n << 8 | u64::from(*b)));
    let version = header.get(4..8).map(|b| b.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)));
    let data_file = version >= Some(3) && number(72).unwrap_or(0) & 4 != 0;
    if number(8) != Some(0) || data_file {
        return Err(invalid(volume, "its qcow2 image refers to other files; flatten it with `qemu-img convert`"));
    }
    Ok(Format::Qcow2)
}

async fn make_overlay(volume: &str, backing: &Path, format: Format, overlay: &Path) -> Result<(), Error> {
    let Some(program) = find_qemu_img() else {
        return Err(invalid(volume, "qemu-img is not installed (package qemu-utils; `make deps` installs it)"));
    };
    let output = tokio::process::Command::new(&program)
        .args(["create", "-q", "-f", "qcow2", "-F", format.as_str(), "-b"])
        .arg(backing)
        .arg(overlay)
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|e| io(volume, "running", &program, e))?;
    if !output.status.success() {
        let _ = std::fs::remove_file(overlay);
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(invalid(volume, &format!("qemu-img cannot make an overlay: {}", said.trim())));
    }
    Ok(())
}

/// A file of this size without content. Takes its name only when it is whole, so that a crash leaves nothing half-made.
pub(crate) fn make_sparse(volume: &str, path: &Path, bytes: u64) -> Result<(), Error> {
    if bytes == 0 {
        return Err(invalid(volume, "a disk of 0 bytes"));
    }
    // Whole sectors only: QEMU rounds a raw file down.
    let bytes = bytes.next_multiple_of(512);
    let draft = path.with_extension("new");
    let make = || {
        let file = std::fs::File::create(&draft)?;
        file.set_len(bytes)?;
        file.sync_all()?;
        std::fs::rename(&draft, path)
    };
    make().map_err(|e| io(volume, "making", path, e))
}

fn write_private(volume: &str, path: &Path, bytes: &[u8]) -> Result<(), Error> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let draft = path.with_extension("new");
    let write = || {
        // Secrets may be in it.
        let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
        file.write_all(bytes)?;
        std::fs::rename(&draft, path)
    };
    write().map_err(|e| io(volume, "writing", path, e))
}

fn invalid(volume: &str, message: &str) -> Error {
    Error::Invalid { volume: volume.into(), message: message.into() }
}

fn io(volume: &str, action: &'static str, path: &Path, source: std::io::Error) -> Error {
    Error::Io { volume: volume.into(), action, path: path.into(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    struct Place {
        folder: tempfile::TempDir,
        paths: Paths,
        vmi: VirtualMachineInstance,
    }

    impl Place {
        fn new() -> Place {
            let folder = tempfile::tempdir().unwrap();
            let paths = Paths::under(folder.path());
            let vmi = serde_json::from_value(json!({"metadata": {"name": "vm", "namespace": "default"}})).unwrap();
            Place { folder, paths, vmi }
        }

        fn put(&self, path: &Path, bytes: &[u8]) {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }

        async fn prepare(&self, volume: Value, arriving: bool, facts: VolumeFacts) -> Result<Image, Error> {
            let volume: Volume = serde_json::from_value(volume).unwrap();
            let preparer = Preparer { paths: &self.paths, vmi: &self.vmi, arriving };
            preparer.prepare(&volume, false, &facts).await
        }
    }

    #[tokio::test]
    async fn a_missing_claim_image_is_made_at_the_claims_size_but_never_at_a_target_of_a_shared_one() {
        let place = Place::new();
        std::fs::create_dir_all(place.paths.vmi_disks.join("d")).unwrap();
        let volume = json!({"name": "d", "persistentVolumeClaim": {"claimName": "c"}});
        let error = place.prepare(volume.clone(), false, VolumeFacts::default()).await.unwrap_err();
        assert!(error.to_string().contains("size is not known"), "{error}");
        let facts = VolumeFacts { capacity_bytes: Some(1 << 30) };
        let error = place.prepare(volume.clone(), true, facts.clone()).await.unwrap_err();
        assert!(error.to_string().contains("do not see the same storage"), "{error}");
        let image = place.prepare(volume, false, facts).await.unwrap();
        assert_eq!(std::fs::metadata(&image.path).unwrap().len(), 1 << 30);
        assert!(image.same_everywhere);
    }

    /// A place whose volume `d` has 1 MiB at the source and moves to a claim.
    fn moving() -> Place {
        let mut place = Place::new();
        place.vmi.status = serde_json::from_value(json!({
            "migratedVolumes": [{"volumeName": "d"}],
            "volumeStatus": [{"name": "d", "target": "vda", "size": 1 << 20}],
        }))
        .unwrap();
        place
    }

    #[tokio::test]
    async fn a_claim_with_data_on_it_is_not_written_over_but_what_an_earlier_try_has_left_is() {
        let place = moving();
        let volume = json!({"name": "d", "persistentVolumeClaim": {"claimName": "c"}});
        let facts = VolumeFacts { capacity_bytes: Some(2 << 20) };
        let path = place.paths.vmi_disks.join("d/disk.img");
        let mut data = vec![0; 1 << 20];
        data[700_000] = 1;
        place.put(&path, &data);
        let error = place.prepare(volume.clone(), true, facts.clone()).await.unwrap_err();
        assert!(error.is_invalid() && error.to_string().contains("not blank"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), data);
        // As CDI leaves a blank volume, and larger than the disk.
        place.put(&path, &vec![0; 2 << 20]);
        let image = place.prepare(volume.clone(), true, facts.clone()).await.unwrap();
        assert!(image.comes);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
        // A try that broke off.
        place.put(&path, &data);
        place.prepare(volume.clone(), true, facts.clone()).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), vec![0; 1 << 20]);
        // A user starts from it: it is nobody's leftover any more.
        place.put(&path, &data);
        place.prepare(volume.clone(), false, facts.clone()).await.unwrap();
        assert!(place.prepare(volume, true, facts).await.is_err());
        assert_eq!(std::fs::read(&path).unwrap(), data);
    }

    #[tokio::test]
    async fn a_container_disk_gets_an_overlay_once() {
        let place = Place::new();
        let image = place.paths.container_disks.join("d/disk/guest.img");
        place.put(&image, &[1u8; 65536]);
        let volume = json!({"name": "d", "containerDisk": {"image": "x"}});
        let first = place.prepare(volume.clone(), false, VolumeFacts::default()).await.unwrap();
        assert_eq!((first.format, first.same_everywhere, first.read_only), (Format::Qcow2, false, false));
        std::fs::write(&first.path, b"what the guest wrote").unwrap();
        let second = place.prepare(volume, false, VolumeFacts::default()).await.unwrap();
        assert_eq!(std::fs::read(second.path).unwrap(), b"what the guest wrote");
    }

    #[tokio::test]
    async fn images_that_reach_out_are_refused() {
        let place = Place::new();
        let image = place.paths.container_disks.join("d/disk/guest.qcow2");
        let mut header = b"QFI\xfb\x00\x00\x00\x03".to_vec();
        header.resize(104, 0);
        header[15] = 72; // a backing file
        place.put(&image, &header);
        let volume = json!({"name": "d", "containerDisk": {"image": "x"}});
        let error = place.prepare(volume, false, VolumeFacts::default()).await.unwrap_err();
        assert!(error.to_string().contains("other files"), "{error}");

        let outside = place.folder.path().join("secret");
        place.put(&outside, b"x");
        std::os::unix::fs::symlink(&outside, place.paths.container_disks.join("d/disk/link")).unwrap();
        for path in ["/disk/link", "../../../../../secret"] {
            let volume = json!({"name": "d", "containerDisk": {"image": "x", "path": path}});
            assert!(place.prepare(volume, false, VolumeFacts::default()).await.is_err(), "{path}");
        }
    }

    #[tokio::test]
    async fn cloud_init_takes_text_base64_or_a_secret_and_is_the_same_everywhere() {
        let (here, there) = (Place::new(), Place::new());
        let volume = json!({"name": "c", "cloudInitNoCloud": {"userDataBase64": "I2Nsb3VkLWNvbmZpZwo=", "networkData": "version: 2"}});
        let one = here.prepare(volume.clone(), false, VolumeFacts::default()).await.unwrap();
        let two = there.prepare(volume, true, VolumeFacts::default()).await.unwrap();
        let bytes = std::fs::read(one.path).unwrap();
        assert_eq!(bytes, std::fs::read(two.path).unwrap());
        let has = |text: &[u8]| bytes.windows(text.len()).any(|w| w == text);
        assert!(has(b"#cloud-config\n") && has(b"version: 2") && has(b"vm.default"));

        let volume = json!({"name": "c", "cloudInitNoCloud": {"secretRef": {"name": "s"}}});
        assert!(here.prepare(volume.clone(), false, VolumeFacts::default()).await.is_err());
        here.put(&here.paths.cloud_init.join("c/userdata"), b"from the secret");
        here.prepare(volume, false, VolumeFacts::default()).await.unwrap();

        let volume = json!({"name": "c", "cloudInitNoCloud": {"userDataBase64": "%%%"}});
        assert!(here.prepare(volume, false, VolumeFacts::default()).await.unwrap_err().is_invalid());
    }

    #[tokio::test]
    async fn names_that_are_paths_are_refused() {
        let place = Place::new();
        for name in ["../x", "", "a/b", ".."] {
            let volume = json!({"name": name, "emptyDisk": {"capacity": "1Mi"}});
            assert!(place.prepare(volume, false, VolumeFacts::default()).await.is_err(), "{name}");
        }
        let volume = json!({"name": "ok", "emptyDisk": {"capacity": "1Mi"}});
        let image = place.prepare(volume, false, VolumeFacts::default()).await.unwrap();
        assert_eq!(std::fs::metadata(image.path).unwrap().len(), 1 << 20);
    }
}
