//! From a container of a pod to what its shim must know.

use std::fs;
use std::path::{Component, Path, PathBuf};

use godwit_images::{ImageConfig, Unpacked};
use k8s_openapi::api::core::v1::{Container, Pod, PodSecurityContext, SecurityContext};
use kube::ResourceExt;

use crate::cgroup::Limits;
use crate::env;
use crate::loops::Device;
use crate::network::PodNetwork;
use crate::quantity;
use crate::spec::{ContainerSpec, Loop, Mount, Root};
use crate::volumes::Volumes;

/// The image that is the node's own system.
const HOST_IMAGE: &str = "godwit.local/host";
/// The number of processes and threads that a container may have.
const PIDS: u64 = 16_384;

/// Linux capabilities in the order of their numbers (linux/capability.h).
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];
/// What a container has if nothing else is said (as with containerd and Docker).
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// Whether an image is the node's own system.
pub(crate) fn is_host(image: &str) -> bool {
    let name = image.split('@').next().unwrap_or_default();
    name == HOST_IMAGE || name.strip_prefix(HOST_IMAGE).is_some_and(|tag| tag.starts_with(':'))
}

/// What a container may use.
pub(crate) fn limits(container: &Container) -> Limits {
    let resources = container.resources.as_ref();
    let of = |list: Option<&std::collections::BTreeMap<String, _>>, name: &str| -> Option<String> {
        list.and_then(|list| list.get(name))
            .map(|q: &k8s_openapi::apimachinery::pkg::api::resource::Quantity| q.0.clone())
    };
    let limits = resources.and_then(|r| r.limits.as_ref());
    let requests = resources.and_then(|r| r.requests.as_ref());
    Limits {
        memory_bytes: of(limits, "memory").and_then(|q| quantity::bytes(&q)).filter(|bytes| *bytes > 0),
        cpu_millis: of(limits, "cpu").and_then(|q| quantity::millis(&q)).filter(|millis| *millis > 0),
        cpu_request_millis: of(requests, "cpu").and_then(|q| quantity::millis(&q)).unwrap_or(0),
        pids: Some(PIDS),
    }
}

/// Everything that a plan is made of.
pub(crate) struct Parts<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) container: &'a Container,
    pub(crate) attempt: u32,
    pub(crate) pod_folder: &'a Path,
    pub(crate) folder: PathBuf,
    /// None for the node's own system.
    pub(crate) image: Option<Unpacked>,
    pub(crate) godwit: &'a Path,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) volumes: &'a Volumes,
    pub(crate) network: Option<&'a PodNetwork>,
    pub(crate) cgroups: Vec<PathBuf>,
}

/// Makes the plan. `Err` is the message of a `CreateContainerConfigError`.
pub(crate) fn make(parts: Parts<'_>) -> Result<ContainerSpec, String> {
    let Parts { pod, container, .. } = parts;
    let spec = pod.spec.clone().unwrap_or_default();
    let none = SecurityContext::default();
    let security = container.security_context.as_ref().unwrap_or(&none);
    let pod_security = spec.security_context.clone().unwrap_or_default();
    let config = parts.image.as_ref().map(|image| image.config.clone()).unwrap_or_default();

    let number = |value: Option<i64>, what: &str| -> Result<Option<u32>, String> {
        value.map(|id| u32::try_from(id).map_err(|_| format!("{what} {id} is out of range"))).transpose()
    };
    let run_as = number(security.run_as_user.or(pod_security.run_as_user), "runAsUser")?;
    let group = number(security.run_as_group.or(pod_security.run_as_group), "runAsGroup")?;
    let user = run_as.map_or_else(|| config.user.clone().unwrap_or_default(), |uid| uid.to_string());
    if security.run_as_non_root.or(pod_security.run_as_non_root) == Some(true) {
        check_non_root(run_as, &user)?;
    }
    let mut groups = Vec::new();
    for gid in pod_security.supplemental_groups.iter().flatten().chain(&pod_security.fs_group) {
        groups.extend(number(Some(*gid), "group")?);
    }

    let privileged = security.privileged == Some(true);
    let hostname = spec.hostname.clone().unwrap_or_else(|| pod.name_any());
    let cwd = container.working_dir.clone().or(config.working_dir.clone()).filter(|dir| !dir.is_empty());
    Ok(ContainerSpec {
        id: format!("{}/{}/{}", pod.uid().unwrap_or_default(), container.name, parts.attempt),
        attempt: parts.attempt,
        root: match &parts.image {
            None => Root::Host { binary: parts.godwit.to_owned() },
            Some(image) => Root::Image { lower: image.path.clone() },
        },
        read_only_root: security.read_only_root_filesystem == Some(true),
        // The longest that Linux takes.
        hostname: hostname.chars().take(63).collect::<String>().trim_end_matches('-').to_owned(),
        network: parts.network.map(PodNetwork::path),
        host_pid: spec.host_pid == Some(true),
        args: arguments(container, &config, &parts.env),
        cwd: cwd.unwrap_or_else(|| "/".into()),
        user,
        group,
        groups,
        mounts: mounts(&parts)?,
        devices: devices(&parts)?,
        loops: loops(&parts)?,
        cgroups: parts.cgroups,
        capabilities: (!privileged).then(|| capabilities(security)),
        runtime_seccomp: !privileged && wants_runtime_seccomp(security, &pod_security)?,
        no_new_privileges: security.allow_privilege_escalation == Some(false),
        termination_log: container.termination_message_path.clone().unwrap_or_else(|| "/dev/termination-log".into()),
        env: parts.env,
        folder: parts.folder,
    })
}

/// Kubernetes' rule and words: a name may be anybody's, root's too.
fn check_non_root(run_as: Option<u32>, user: &str) -> Result<(), String> {
    if run_as == Some(0) {
        return Err("container's runAsUser breaks non-root policy".into());
    }
    let name = user.split(':').next().unwrap_or_default();
    match name.parse::<u32>() {
        Ok(0) => Err("container has runAsNonRoot and image will run as root".into()),
        Ok(_) => Ok(()),
        Err(_) if name.is_empty() || name == "root" => {
            Err("container has runAsNonRoot and image will run as root".into())
        }
        Err(_) => Err(format!(
            "container has runAsNonRoot and image has non-numeric user ({name}), cannot verify user is non-root"
        )),
    }
}

/// Whether the container is to have the runtime's seccomp profile. One from a file of the node is refused rather than left out.
fn wants_runtime_seccomp(container: &SecurityContext, pod: &PodSecurityContext) -> Result<bool, String> {
    let profile = container.seccomp_profile.as_ref().or(pod.seccomp_profile.as_ref());
    match profile.map(|profile| profile.type_.as_str()) {
        None | Some("Unconfined") => Ok(false),
        Some("RuntimeDefault") => Ok(true),
        Some(other) => Err(format!("seccomp profiles of type {other} are not supported by this kubelet")),
    }
}

fn arguments(container: &Container, config: &ImageConfig, env: &[(String, String)]) -> Vec<String> {
    let given = |list: &Option<Vec<String>>| list.clone().filter(|list| !list.is_empty());
    let command = given(&container.command);
    // The image's arguments belong to the image's program.
    let args = given(&container.args)
        .or_else(|| if command.is_some() { None } else { config.cmd.clone() })
        .unwrap_or_default();
    let program = command.or_else(|| config.entrypoint.clone()).unwrap_or_default();
    program.into_iter().chain(args).map(|arg| env::expand(&arg, env)).collect()
}

fn capabilities(security: &SecurityContext) -> Vec<u8> {
    let list = security.capabilities.clone().unwrap_or_default();
    let clean = |name: &String| name.to_ascii_uppercase().trim_start_matches("CAP_").to_owned();
    let add: Vec<String> = list.add.iter().flatten().map(clean).collect();
    let drop: Vec<String> = list.drop.iter().flatten().map(clean).collect();
    let has = |list: &[String], name: &str| list.iter().any(|known| known == name);
    let kept = |name: &str| {
        let default = DEFAULT_CAPABILITIES.contains(&name) && !has(&drop, "ALL");
        has(&add, name) || ((default || has(&add, "ALL")) && !has(&drop, name))
    };
    let numbered = (0u8..).zip(CAPABILITIES);
    numbered.filter(|(_, name)| kept(name)).map(|(number, _)| number).collect()
}

fn mounts(parts: &Parts<'_>) -> Result<Vec<Mount>, String> {
    let mut mounts = Vec::new();
    if let Some(network) = parts.network {
        mounts.extend(hosts_file(parts, network)?);
    }
    if parts.image.is_some() && Path::new("/etc/resolv.conf").exists() {
        mounts.push(Mount { source: "/etc/resolv.conf".into(), target: "/etc/resolv.conf".into(), read_only: true });
    }
    for wanted in parts.container.volume_mounts.iter().flatten() {
        let (source, read_only) = parts
            .volumes
            .places
            .get(&wanted.name)
            .ok_or_else(|| format!("volume {:?} is not in the pod", wanted.name))?;
        let mut source = source.clone();
        let sub_path = match (&wanted.sub_path, &wanted.sub_path_expr) {
            (_, Some(expression)) if !expression.is_empty() => Some(env::expand(expression, &parts.env)),
            (path, _) => path.clone().filter(|path| !path.is_empty()),
        };
        if let Some(path) = sub_path {
            let path = Path::new(&path);
            if !path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
                return Err(format!("subPath {path:?} must be relative, without '..'"));
            }
            source = below(&source, path)?;
        }
        mounts.push(Mount {
            source,
            target: wanted.mount_path.clone(),
            read_only: *read_only || wanted.read_only == Some(true),
        });
    }
    // Outer ones first, so that none hides another.
    mounts.sort_by_key(|mount| Path::new(&mount.target).components().count());
    Ok(mounts)
}

fn devices(parts: &Parts<'_>) -> Result<Vec<Mount>, String> {
    let wanted = parts.container.volume_devices.iter().flatten();
    wanted
        .map(|wanted| {
            let (device, read_only) = held(parts, &wanted.name)?;
            Ok(Mount { source: device.path.clone(), target: wanted.device_path.clone(), read_only: *read_only })
        })
        .collect()
}

/// The block device of a volume.
fn held<'a>(parts: &'a Parts<'_>, volume: &str) -> Result<&'a (Device, bool), String> {
    parts.volumes.devices.get(volume).ok_or_else(|| format!("volume {volume:?} of mode Block is not in the pod"))
}

/// What its shim has to hold so that the container's block devices stay what they are.
fn loops(parts: &Parts<'_>) -> Result<Vec<Loop>, String> {
    let mut loops = Vec::new();
    for wanted in parts.container.volume_devices.iter().flatten() {
        let (device, _) = held(parts, &wanted.name)?;
        if let Some(file) = device.file.clone() {
            loops.push(Loop { device: device.path.clone(), file });
        }
    }
    Ok(loops)
}

/// A path inside a volume, made if it is not there. A link in the volume must not lead out of it.
fn below(volume: &Path, path: &Path) -> Result<PathBuf, String> {
    let source = volume.join(path);
    let failed = |e: std::io::Error| format!("subPath {}: {e}", path.display());
    let root = volume.canonicalize().map_err(failed)?;
    // As far as it is there already.
    let known = source.ancestors().find(|part| fs::symlink_metadata(part).is_ok()).unwrap_or(volume);
    let inside = |path: &Path| path.canonicalize().is_ok_and(|path| path.starts_with(&root));
    if !inside(known) {
        return Err(format!("subPath {} leads out of the volume", path.display()));
    }
    if !source.exists() {
        fs::create_dir_all(&source).map_err(failed)?;
    }
    if inside(&source) {
        source.canonicalize().map_err(failed)
    } else {
        Err(format!("subPath {} leads out of the volume", path.display()))
    }
}

/// `/etc/hosts` with the pod's own name.
fn hosts_file(parts: &Parts<'_>, network: &PodNetwork) -> Result<Option<Mount>, String> {
    // The node's own /etc cannot get new files.
    if parts.image.is_none() && !Path::new("/etc/hosts").is_file() {
        return Ok(None);
    }
    let spec = parts.pod.spec.clone().unwrap_or_default();
    let name = spec.hostname.clone().unwrap_or_else(|| parts.pod.name_any());
    let mut text =
        format!("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost\n{}\t{name}\n", network.ip);
    for alias in spec.host_aliases.iter().flatten() {
        text += &format!("{}\t{}\n", alias.ip, alias.hostnames.as_deref().unwrap_or_default().join("\t"));
    }
    let source = parts.pod_folder.join("etc-hosts");
    fs::write(&source, text).map_err(|e| format!("write {}: {e}", source.display()))?;
    Ok(Some(Mount { source, target: "/etc/hosts".into(), read_only: false }))
}

/// What a pod asks for and does not get here: for a warning, so that nothing is ignored silently.
pub(crate) fn unsupported(pod: &Pod) -> Vec<String> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    let mut list = Vec::new();
    let mut note = |found: bool, text: String| {
        if found {
            list.push(text);
        }
    };
    note(spec.share_process_namespace == Some(true), "shareProcessNamespace".into());
    note(spec.host_ipc == Some(true), "hostIPC".into());
    note(spec.active_deadline_seconds.is_some(), "activeDeadlineSeconds".into());
    note(spec.ephemeral_containers.as_ref().is_some_and(|list| !list.is_empty()), "ephemeralContainers".into());
    note(spec.resource_claims.as_ref().is_some_and(|list| !list.is_empty()), "resourceClaims".into());
    note(spec.dns_config.is_some(), "dnsConfig".into());
    let pod_security = spec.security_context.as_ref();
    note(
        pod_security.is_some_and(|security| security.sysctls.as_ref().is_some_and(|list| !list.is_empty())),
        "sysctls".into(),
    );
    note(pod_security.is_some_and(|security| security.se_linux_options.is_some()), "seLinuxOptions".into());
    note(pod_security.is_some_and(|security| security.app_armor_profile.is_some()), "appArmorProfile".into());
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        let name = &container.name;
        let security = container.security_context.as_ref();
        note(
            security.is_some_and(|security| security.se_linux_options.is_some()),
            format!("seLinuxOptions of container {name}"),
        );
        note(
            security.is_some_and(|security| security.app_armor_profile.is_some()),
            format!("appArmorProfile of container {name}"),
        );
        note(container.lifecycle.is_some(), format!("lifecycle hooks of container {name}"));
        note(
            container.tty == Some(true) || container.stdin == Some(true),
            format!("stdin and tty of container {name}"),
        );
        let propagated = |mount: &k8s_openapi::api::core::v1::VolumeMount| {
            mount.mount_propagation.as_deref().is_some_and(|kind| kind != "None")
        };
        note(container.volume_mounts.iter().flatten().any(propagated), format!("mountPropagation of container {name}"));
    }
    for init in spec.init_containers.iter().flatten() {
        note(init.restart_policy.is_some(), format!("restartPolicy of init container {}", init.name));
    }
    list
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{Capabilities, SeccompProfile};

    use super::*;

    #[test]
    fn the_host_image_is_known_by_its_name() {
        assert!(is_host("godwit.local/host") && is_host("godwit.local/host:latest"));
        assert!(!is_host("godwit.local/hostile") && !is_host("docker.io/godwit.local/host"));
    }

    #[test]
    fn commands_replace_the_images_arguments_too() {
        let config =
            ImageConfig { entrypoint: Some(vec!["/e".into()]), cmd: Some(vec!["a".into()]), ..ImageConfig::default() };
        let with = |command: Option<&str>, args: Option<&str>| {
            let list = |text: Option<&str>| text.map(|text| vec![text.to_owned()]);
            let container = Container { command: list(command), args: list(args), ..Container::default() };
            arguments(&container, &config, &[("X".into(), "y".into())]).join(" ")
        };
        assert_eq!(with(None, None), "/e a");
        assert_eq!(with(None, Some("$(X)")), "/e y");
        assert_eq!(with(Some("/c"), None), "/c");
        assert_eq!(with(Some("/c"), Some("b")), "/c b");
    }

    #[test]
    fn capabilities_are_added_and_dropped() {
        let with = |add: &[&str], drop: &[&str]| {
            let list = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
            let capabilities = Some(Capabilities { add: list(add), drop: list(drop) });
            super::capabilities(&SecurityContext { capabilities, ..SecurityContext::default() })
        };
        assert_eq!(with(&[], &[]).len(), DEFAULT_CAPABILITIES.len());
        assert_eq!(with(&["NET_ADMIN"], &["ALL"]), [12]);
        assert!(!with(&[], &["CAP_CHOWN"]).contains(&0));
        assert_eq!(with(&["ALL"], &[]).len(), CAPABILITIES.len());
    }

    #[test]
    fn who_must_not_be_root_is_shown_not_to_be() {
        assert_eq!(check_non_root(Some(107), "107"), Ok(()));
        assert_eq!(check_non_root(None, "107:107"), Ok(()));
        for (run_as, user, why) in
            [(Some(0), "0", "breaks"), (None, "", "as root"), (None, "root", "as root"), (None, "qemu", "non-numeric")]
        {
            assert!(check_non_root(run_as, user).unwrap_err().contains(why), "{user}");
        }
    }

    #[test]
    fn a_containers_seccomp_profile_wins_over_its_pods() {
        let profile = |type_: &str| Some(SeccompProfile { type_: type_.to_owned(), localhost_profile: None });
        let pod = PodSecurityContext { seccomp_profile: profile("RuntimeDefault"), ..PodSecurityContext::default() };
        let container = |type_: &str| SecurityContext { seccomp_profile: profile(type_), ..SecurityContext::default() };
        assert_eq!(wants_runtime_seccomp(&SecurityContext::default(), &pod), Ok(true));
        assert_eq!(wants_runtime_seccomp(&container("Unconfined"), &pod), Ok(false));
        assert_eq!(wants_runtime_seccomp(&SecurityContext::default(), &PodSecurityContext::default()), Ok(false));
        assert!(wants_runtime_seccomp(&container("Localhost"), &pod).is_err());
    }

    #[test]
    fn sub_paths_stay_in_their_volume() {
        let folder = tempfile::tempdir().unwrap();
        let volume = folder.path().join("volume");
        fs::create_dir(&volume).unwrap();
        assert!(below(&volume, Path::new("a/b")).unwrap().is_dir());
        std::os::unix::fs::symlink("/etc", volume.join("out")).unwrap();
        assert!(below(&volume, Path::new("out")).is_err());
        assert!(below(&volume, Path::new("out/new-folder")).is_err());
        assert!(!Path::new("/etc/new-folder").exists());
    }
}
