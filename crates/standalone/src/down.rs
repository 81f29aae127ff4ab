//! Taking a cluster down: every process ended, everything that the machine lent given back, the data kept.

use crate::layout::{Cluster, Layout};
use crate::up::CONTROL_PLANE;
use crate::{Error, process};
use godwit_network::Namespace;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long processes get to end by themselves.
const GRACE: Duration = Duration::from_secs(3);

/// Ends the cluster of `data_dir`, whatever state it is in. Guests are cut off, not shut down: their VMs start again with
/// the next `up`, as their run strategies say. `Ok(false)`: nothing was up.
///
/// # Errors
/// Namespaces or mounts that cannot be removed.
pub fn down(data_dir: &Path) -> Result<bool, Error> {
    let layout = Layout::open(data_dir)?;
    let cluster = layout.load()?.unwrap_or(Cluster { id: layout.id(), ..Cluster::default() });
    let prefix = cluster.namespace_prefix();
    // Nodes first, so that none of them sees the control plane go and complains.
    let names = cluster.nodes.iter().map(String::as_str).chain([CONTROL_PLANE]);
    let main: Vec<_> = names.filter_map(|name| process::find(&layout, name)).collect();
    process::end(&main, GRACE);
    // Twice: a process may have started another one while we looked.
    for _ in 0..2 {
        process::end(&process::inside_namespaces(&prefix), Duration::from_millis(200));
    }
    let removed = Namespace::delete_prefix(&prefix)?;
    unmount_below(layout.root())?;
    remove_cgroups(&cluster.id);
    let _ = std::fs::remove_dir_all(layout.root().join("run"));
    let _ = std::fs::remove_dir_all(cluster.state());
    Ok(!main.is_empty() || removed > 0)
}

fn unmount_below(root: &Path) -> Result<(), Error> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")
        .map_err(|source| Error::io("read", Path::new("/proc/self/mountinfo"), source))?;
    let mut targets: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| PathBuf::from(field.replace("\\040", " ")))
        .filter(|target| target.starts_with(root))
        .collect();
    // Innermost first.
    targets.sort_by_key(|target| std::cmp::Reverse(target.as_os_str().len()));
    for target in targets {
        nix::mount::umount2(&target, nix::mount::MntFlags::MNT_DETACH)
            .map_err(|errno| Error::io("unmount", &target, errno.into()))?;
    }
    Ok(())
}

/// Removes the cluster's control groups, in v1's hierarchies and in v2's. What is still in use stays; it is empty of
/// processes and harmless.
fn remove_cgroups(id: &str) {
    let marker = format!("gw-{id}");
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    for hierarchy in hierarchies.chain([root.to_owned()]) {
        for entry in std::fs::read_dir(&hierarchy).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&marker) {
                remove_tree(&entry.path());
            }
        }
    }
}

fn remove_tree(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(folder);
}
