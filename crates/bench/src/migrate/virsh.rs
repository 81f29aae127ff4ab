//! `virsh migrate --live`: why it is left out.

use std::path::PathBuf;

/// Why libvirt is not measured in this run.
pub fn why_not() -> String {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).collect();
    let missing: Vec<&str> =
        ["virsh", "libvirtd"].into_iter().filter(|name| !folders.iter().any(|f| f.join(name).is_file())).collect();
    if missing.is_empty() {
        "libvirt is installed, but this benchmark cannot drive it yet".into()
    } else {
        format!("libvirt is not installed here (no {})", missing.join(", no "))
    }
}
