//! The volumes of a pod, laid out as Kubernetes' kubelet does: `<pod>/volumes/kubernetes.io~<kind>/<volume>`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};

use godwit_images::PullPolicy;
use k8s_openapi::api::core::v1::{
    DownwardAPIVolumeFile, HostPathVolumeSource, KeyToPath, PersistentVolume, PersistentVolumeClaim, Pod, Volume,
};
use kube::{Api, ResourceExt};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::env::{self, Facts};
use crate::loops::{self, Device};
use crate::ownership::FsGroup;
use crate::{Context, quantity};

/// Where the volumes of a pod are, by name; `true` if they can only be read.
#[derive(Default)]
pub(crate) struct Volumes {
    /// Folders and files.
    pub(crate) places: BTreeMap<String, (PathBuf, bool)>,
    /// Block devices.
    pub(crate) devices: BTreeMap<String, (Device, bool)>,
}

/// What is behind a volume.
enum Place {
    Path(PathBuf, bool),
    Device(Device, bool),
}

/// Why a volume is not there.
pub(crate) enum Failure {
    /// An image volume's image.
    Image { reference: String, error: godwit_images::Error },
    /// Everything else: a `FailedMount` event.
    Mount(String),
}

type Files = BTreeMap<PathBuf, (Vec<u8>, u32)>;

/// Makes all volumes of a pod; those that are there already (after a restart of the kubelet) are left as they are.
pub(crate) async fn prepare(context: &Context, pod: &Pod, folder: &Path, facts: &Facts) -> Result<Volumes, Failure> {
    let mut volumes = Volumes::default();
    let spec = pod.spec.as_ref();
    for volume in spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
        let place = one(context, pod, folder, volume, facts).await.map_err(|failure| match failure {
            Failure::Mount(text) => {
                Failure::Mount(format!("MountVolume.SetUp failed for volume {:?} : {text}", volume.name))
            }
            image => image,
        })?;
        let name = volume.name.clone();
        match place {
            Place::Path(path, read_only) => drop(volumes.places.insert(name, (path, read_only))),
            Place::Device(device, read_only) => drop(volumes.devices.insert(name, (device, read_only))),
        }
    }
    Ok(volumes)
}

/// Unmounts and deletes what [`prepare`] has made. Claims, host paths and images are not touched.
pub(crate) fn remove(folder: &Path) -> std::io::Result<()> {
    let volumes = folder.join("volumes");
    for kind in fs::read_dir(&volumes).into_iter().flatten().flatten() {
        for volume in fs::read_dir(kind.path()).into_iter().flatten().flatten() {
            unmount(&volume.path());
        }
    }
    match fs::remove_dir_all(&volumes) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn unmount(path: &Path) {
    while umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
}

fn text(what: &str, path: &Path) -> impl Fn(std::io::Error) -> Failure {
    let what = format!("{what} {}", path.display());
    move |error| Failure::Mount(format!("{what}: {error}"))
}

async fn one(context: &Context, pod: &Pod, folder: &Path, volume: &Volume, facts: &Facts) -> Result<Place, Failure> {
    let namespace = pod.namespace().unwrap_or_default();
    let place = |kind: &str| folder.join("volumes").join(format!("kubernetes.io~{kind}")).join(&volume.name);
    let fs_group = FsGroup::of(pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref()));
    let group = fs_group.map(|owner| owner.group);
    let client = &context.client;

    if let Some(source) = &volume.empty_dir {
        let path = place("empty-dir");
        // What was in memory went with a restart of the machine.
        let in_memory = source.medium.as_deref() == Some("Memory");
        if path.is_dir() && (!in_memory || is_tmpfs(&path)) {
            return Ok(Place::Path(path, false));
        }
        fs::create_dir_all(&path).map_err(text("make", &path))?;
        match source.medium.as_deref().unwrap_or_default() {
            "" => {}
            "Memory" => {
                let size = source.size_limit.as_ref().and_then(|limit| quantity::bytes(&limit.0));
                tmpfs(&path, size)?;
            }
            other => return Err(Failure::Mount(format!("medium {other:?} of emptyDir is not supported"))),
        }
        let mode = if group.is_some() { 0o2777 } else { 0o777 };
        chown(&path, None, group).map_err(text("change the group of", &path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(text("set the mode of", &path))?;
        return Ok(Place::Path(path, false));
    }
    if let Some(source) = &volume.host_path {
        return host_path(source).map(|path| Place::Path(path, false));
    }
    if let Some(source) = &volume.persistent_volume_claim {
        let only_read = source.read_only.unwrap_or(false);
        return Ok(match claim(context, &namespace, &source.claim_name).await? {
            Claimed::Local(path, read_only) => {
                // Kubernetes' kubelet mounts it there. Here it says that the volume was made the pod's.
                let made = place("local-volume");
                if let Some(owner) = fs_group.filter(|_| !read_only && !only_read && !made.is_dir()) {
                    // There may be any number of files, and others than this pod wait for the threads here.
                    let root = path.clone();
                    let owned = tokio::task::spawn_blocking(move || owner.own(&root)).await;
                    owned.map_err(io::Error::other).flatten().map_err(text("change the group of", &path))?;
                    fs::create_dir_all(&made).map_err(text("make", &made))?;
                }
                Place::Path(path, read_only || only_read)
            }
            // What is the node's own belongs to whom it belongs: fsGroup is not for it, in Kubernetes neither.
            Claimed::HostPath(path, read_only) => Place::Path(path, read_only || only_read),
            Claimed::Device(device, read_only) => Place::Device(device, read_only || only_read),
        });
    }
    if let Some(source) = &volume.image {
        let reference = source.reference.clone().unwrap_or_default();
        let policy = PullPolicy::of(source.pull_policy.as_deref(), &reference);
        let unpacked = context.image(&reference, policy).await;
        return unpacked
            .map(|unpacked| Place::Path(unpacked.path, true))
            .map_err(|error| Failure::Image { reference: reference.clone(), error });
    }

    let mut files = Files::new();
    let default_mode;
    let kind;
    if let Some(source) = &volume.config_map {
        (kind, default_mode) = ("configmap", source.default_mode);
        let optional = source.optional.unwrap_or(false);
        let values = env::config_map(client, &namespace, &source.name, optional).await.map_err(Failure::Mount)?;
        pick(&mut files, values, source.items.as_deref(), optional)?;
    } else if let Some(source) = &volume.secret {
        (kind, default_mode) = ("secret", source.default_mode);
        let optional = source.optional.unwrap_or(false);
        let name = source.secret_name.as_deref().unwrap_or_default();
        let values = env::secret(client, &namespace, name, optional).await.map_err(Failure::Mount)?;
        pick(&mut files, values, source.items.as_deref(), optional)?;
    } else if let Some(source) = &volume.downward_api {
        (kind, default_mode) = ("downward-api", source.default_mode);
        downward(&mut files, pod, source.items.as_deref().unwrap_or_default(), facts)?;
    } else if let Some(source) = &volume.projected {
        (kind, default_mode) = ("projected", source.default_mode);
        for part in source.sources.iter().flatten() {
            if let Some(map) = &part.config_map {
                let optional = map.optional.unwrap_or(false);
                let values = env::config_map(client, &namespace, &map.name, optional).await.map_err(Failure::Mount)?;
                pick(&mut files, values, map.items.as_deref(), optional)?;
            } else if let Some(secret) = &part.secret {
                let optional = secret.optional.unwrap_or(false);
                let values = env::secret(client, &namespace, &secret.name, optional).await.map_err(Failure::Mount)?;
                pick(&mut files, values, secret.items.as_deref(), optional)?;
            } else if let Some(items) = &part.downward_api {
                downward(&mut files, pod, items.items.as_deref().unwrap_or_default(), facts)?;
            } else {
                let text = "this kubelet projects config maps, secrets and the downward API only";
                return Err(Failure::Mount(text.into()));
            }
        }
    } else {
        let text = "this kubelet knows emptyDir, hostPath, persistentVolumeClaim, image, configMap, secret, downwardAPI \
                    and projected volumes only";
        return Err(Failure::Mount(text.into()));
    }
    let path = place(kind);
    write_files(&path, &files, default_mode, kind == "secret" || kind == "projected", group)?;
    Ok(Place::Path(path, true))
}

fn is_tmpfs(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|stat| stat.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC)
}

fn tmpfs(path: &Path, size: Option<u64>) -> Result<(), Failure> {
    let options = size.map_or_else(|| "mode=777".to_owned(), |size| format!("mode=777,size={size}"));
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some(options.as_str()))
        .map_err(|e| Failure::Mount(format!("mount a tmpfs at {}: {e}", path.display())))
}

/// A relative path that stays below where it is put.
fn relative(path: &str) -> Result<PathBuf, Failure> {
    let path = Path::new(path);
    let fine = path.components().all(|part| matches!(part, Component::Normal(_))) && path.components().count() > 0;
    if fine {
        Ok(path.to_owned())
    } else {
        Err(Failure::Mount(format!("path {path:?} must be relative, without '..'")))
    }
}

fn pick(
    files: &mut Files,
    mut values: BTreeMap<String, Vec<u8>>,
    items: Option<&[KeyToPath]>,
    optional: bool,
) -> Result<(), Failure> {
    match items.filter(|items| !items.is_empty()) {
        None => {
            for (key, value) in values {
                files.insert(relative(&key)?, (value, u32::MAX));
            }
        }
        Some(items) => {
            for item in items {
                match values.remove(&item.key) {
                    Some(value) => {
                        files.insert(relative(&item.path)?, (value, mode_of(item.mode, u32::MAX)));
                    }
                    None if optional => {}
                    None => return Err(Failure::Mount(format!("references non-existent key: {}", item.key))),
                }
            }
        }
    }
    Ok(())
}

fn mode_of(mode: Option<i32>, default: u32) -> u32 {
    mode.and_then(|mode| u32::try_from(mode).ok()).map_or(default, |mode| mode & 0o777)
}

fn downward(files: &mut Files, pod: &Pod, items: &[DownwardAPIVolumeFile], facts: &Facts) -> Result<(), Failure> {
    for item in items {
        let value = if let Some(selector) = &item.field_ref {
            env::field(pod, selector, facts)
        } else if let Some(selector) = &item.resource_field_ref {
            let name = selector.container_name.as_deref().unwrap_or_default();
            let container = pod.spec.iter().flat_map(|spec| &spec.containers).find(|c| c.name == name);
            let container = container.ok_or_else(|| Failure::Mount(format!("no container {name:?}")))?;
            env::resource(container, &selector.resource, selector.divisor.as_ref().map(|q| q.0.as_str()))
        } else {
            Err("an item without a reference".into())
        };
        files
            .insert(relative(&item.path)?, (value.map_err(Failure::Mount)?.into_bytes(), mode_of(item.mode, u32::MAX)));
    }
    Ok(())
}

fn write_files(
    path: &Path,
    files: &Files,
    default_mode: Option<i32>,
    in_memory: bool,
    group: Option<u32>,
) -> Result<(), Failure> {
    if path.is_dir() {
        unmount(path);
    }
    fs::create_dir_all(path).map_err(text("make", path))?;
    if in_memory {
        // Secrets never reach the disk.
        tmpfs(path, None)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(text("set the mode of", path))?;
    }
    let default_mode = mode_of(default_mode, 0o644);
    for (name, (content, mode)) in files {
        let file = path.join(name);
        if let Some(parent) = file.parent() {
            fs::create_dir_all(parent).map_err(text("make", parent))?;
        }
        let mode = if *mode == u32::MAX { default_mode } else { *mode };
        let mode = if group.is_some() { mode | 0o040 } else { mode };
        fs::write(&file, content).map_err(text("write", &file))?;
        chown(&file, None, group).map_err(text("change the group of", &file))?;
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).map_err(text("set the mode of", &file))?;
    }
    Ok(())
}

fn host_path(source: &HostPathVolumeSource) -> Result<PathBuf, Failure> {
    let path = PathBuf::from(&source.path);
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return Err(Failure::Mount(format!("hostPath {path:?} must be absolute, without '..'")));
    }
    let kind = source.type_.as_deref().unwrap_or_default();
    let metadata = fs::metadata(&path).ok();
    let is = |check: fn(&fs::Metadata) -> bool| metadata.as_ref().is_some_and(check);
    let fine = match kind {
        // Kubernetes' kubelet lets the container runtime make a folder where nothing is.
        "" | "DirectoryOrCreate" => {
            if metadata.is_none() {
                fs::create_dir_all(&path).map_err(text("make", &path))?;
            }
            kind.is_empty() || fs::metadata(&path).is_ok_and(|metadata| metadata.is_dir())
        }
        "FileOrCreate" => {
            if metadata.is_none() {
                fs::write(&path, "").map_err(text("make", &path))?;
            }
            fs::metadata(&path).is_ok_and(|metadata| metadata.is_file())
        }
        "Directory" => is(fs::Metadata::is_dir),
        "File" => is(fs::Metadata::is_file),
        "Socket" => is(|metadata| metadata.file_type().is_socket()),
        "CharDevice" => is(|metadata| metadata.file_type().is_char_device()),
        "BlockDevice" => is(|metadata| metadata.file_type().is_block_device()),
        other => return Err(Failure::Mount(format!("hostPath type {other:?} is not known"))),
    };
    if fine {
        Ok(path)
    } else {
        Err(Failure::Mount(format!("hostPath type check failed: {} is not a {kind}", path.display())))
    }
}

/// What is behind a claim: a folder of a volume of kind `hostPath` or `local`, or a block device; `true` if it can only be read.
enum Claimed {
    HostPath(PathBuf, bool),
    Local(PathBuf, bool),
    Device(Device, bool),
}

async fn claim(context: &Context, namespace: &str, name: &str) -> Result<Claimed, Failure> {
    let failed = |error: kube::Error| Failure::Mount(format!("persistentvolumeclaim {name:?}: {error}"));
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(context.client.clone(), namespace);
    let claim = claims.get_opt(name).await.map_err(failed)?;
    let claim = claim.ok_or_else(|| Failure::Mount(format!("persistentvolumeclaim {name:?} not found")))?;
    let bound = claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound");
    let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).filter(|_| bound);
    let volume = volume.ok_or_else(|| Failure::Mount(format!("persistentvolumeclaim {name:?} is not bound yet")))?;
    let volumes: Api<PersistentVolume> = Api::all(context.client.clone());
    let volume = volumes.get(&volume).await.map_err(failed)?;
    let name = volume.name_any();
    let spec = volume.spec.unwrap_or_default();
    let modes = spec.access_modes.as_deref().unwrap_or_default();
    let read_only = !modes.is_empty() && modes.iter().all(|mode| mode == "ReadOnlyMany");
    let path = match (&spec.host_path, &spec.local) {
        (Some(source), _) => &source.path,
        (None, Some(local)) => &local.path,
        (None, None) => {
            let text = "this kubelet knows persistent volumes of kind hostPath and local only";
            return Err(Failure::Mount(format!("persistentvolume {name:?}: {text}")));
        }
    };
    if spec.volume_mode.as_deref() == Some("Block") {
        let size = spec.capacity.as_ref().and_then(|all| all.get("storage")).and_then(|size| quantity::bytes(&size.0));
        return device(path, size.unwrap_or(0)).map(|device| Claimed::Device(device, read_only));
    }
    let source = HostPathVolumeSource { type_: Some("DirectoryOrCreate".into()), path: path.clone() };
    let path = host_path(&source)?;
    Ok(if spec.host_path.is_some() { Claimed::HostPath(path, read_only) } else { Claimed::Local(path, read_only) })
}

/// The block device at `path`, or one of this size for a file that is made there.
fn device(path: &str, size: u64) -> Result<Device, Failure> {
    let path = Path::new(path);
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return Err(Failure::Mount(format!("path {path:?} of a block volume must be absolute, without '..'")));
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(text("make", folder))?;
    }
    loops::attach(path, size).map_err(text("make a block device of", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_become_files_and_missing_ones_are_named() {
        let values = || BTreeMap::from([("a".to_owned(), b"1".to_vec()), ("b".to_owned(), b"2".to_vec())]);
        let mut files = Files::new();
        pick(&mut files, values(), None, false).ok().unwrap();
        assert_eq!(files.len(), 2);
        let item = |key: &str, path: &str| KeyToPath { key: key.into(), path: path.into(), mode: Some(0o600) };
        let mut files = Files::new();
        pick(&mut files, values(), Some(&[item("a", "x/y")]), false).ok().unwrap();
        assert_eq!(files, Files::from([("x/y".into(), (b"1".to_vec(), 0o600))]));
        assert!(pick(&mut files, values(), Some(&[item("c", "x")]), false).is_err());
        assert!(pick(&mut files, values(), Some(&[item("c", "x")]), true).is_ok());
        assert!(pick(&mut files, values(), Some(&[item("a", "../x")]), true).is_err());
    }

    #[test]
    fn files_have_their_modes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("volume");
        let files = Files::from([("a/b".into(), (b"1".to_vec(), u32::MAX)), ("c".into(), (b"2".to_vec(), 0o600))]);
        write_files(&path, &files, Some(0o440), false, None).ok().unwrap();
        let mode = |name: &str| fs::metadata(path.join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("a/b"), mode("c")), (0o440, 0o600));
    }

    #[test]
    fn host_paths_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let source = |name: &str, kind: &str| HostPathVolumeSource {
            path: folder.path().join(name).display().to_string(),
            type_: Some(kind.into()),
        };
        assert!(host_path(&source("a", "Directory")).is_err());
        assert!(host_path(&source("a", "DirectoryOrCreate")).is_ok());
        assert!(host_path(&source("a", "Directory")).is_ok());
        assert!(host_path(&source("a", "File")).is_err());
        assert!(host_path(&source("b", "FileOrCreate")).is_ok());
        assert!(host_path(&source("c", "Nonsense")).is_err());
        assert!(host_path(&HostPathVolumeSource { path: "/a/../b".into(), type_: None }).is_err());
    }
}
