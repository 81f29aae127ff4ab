//! The Linux guest of the demo.

use super::{Cluster, text};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

pub const DEMO_IMAGE: &str = "godwit.local/demo-guest:latest";

pub fn build_demo_image(cluster: &Cluster) {
    let folder = std::env::var_os("GODWIT_GUEST")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/demo-guest"), PathBuf::from);
    let pair = |file: &str| format!("{}:/boot/{file}", folder.join(file).display());
    let files = ["vmlinuz", "initrd", "initrd-agent"].map(pair);
    let arguments = ["image", "build", DEMO_IMAGE].into_iter().chain(files.iter().map(String::as_str));
    let built = cluster.godwit(&arguments.collect::<Vec<_>>());
    assert!(built.status.success(), "run `make guest` first: {}", text(&built.stderr));
}

/// A guest that boots the demo kernel, on the pod network in this binding.
pub fn linux_vmi(name: &str, binding: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": {"name": name},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "domain": {
                "memory": {"guest": "192Mi"},
                "devices": {"rng": {}, "interfaces": [{"name": "default", binding: {}}]},
                "firmware": {"kernelBoot": {
                    "kernelArgs": format!("console=ttyS0 quiet godwit.hostname={name} godwit.ports=80,49152,49153"),
                    "container": {"image": DEMO_IMAGE, "kernelPath": "/boot/vmlinuz", "initrdPath": "/boot/initrd"},
                }},
            },
            "networks": [{"name": "default", "pod": {}}],
        },
    })
}
