//! Names that objects carry: KubeVirt's (from `godwit_api`), a few of Kubernetes', and names that are made here.

pub use godwit_api::names::*;
use sha2::{Digest, Sha256};

/// Label of nodes with their host name; the domain of "not on the same node".
pub const HOSTNAME: &str = "kubernetes.io/hostname";
/// Label of nodes that run Kubernetes' own parts; such often run nothing else.
pub const LABEL_CONTROL_PLANE: &str = "node-role.kubernetes.io/control-plane";
/// The node that a claim of `WaitForFirstConsumer` shall be bound for.
pub const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
/// Taint of cordoned nodes.
pub const TAINT_UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Taint of nodes that are not ready, as kube-apiserver gives it to every new one.
pub const TAINT_NOT_READY: &str = "node.kubernetes.io/not-ready";
/// Taint of nodes that have gone quiet.
pub const TAINT_UNREACHABLE: &str = "node.kubernetes.io/unreachable";

/// A name as the value of a label: itself, or its digest where it is too long for one (63 characters).
pub fn label_value(name: &str) -> String {
    if name.len() <= 63 {
        return name.to_owned();
    }
    Sha256::digest(name.as_bytes()).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// The name of a migration that an evacuation makes. Ten letters: two VMIs never meet under one name, not even where
/// thousands are evacuated out of one namespace.
pub fn evacuation(seed: &str) -> String {
    format!("{EVACUATION_GENERATE_NAME}{}", letters(seed, 10))
}

/// The name of a migration that a workload update makes.
pub fn workload_update(seed: &str) -> String {
    format!("{WORKLOAD_UPDATE_GENERATE_NAME}{}", letters(seed, 10))
}

/// The name of a migration that brings a VM back after a maintenance.
pub fn homecoming(seed: &str) -> String {
    format!("{HOMECOMING_GENERATE_NAME}{}", letters(seed, 10))
}

/// The name of the record of a migration: its own with the start of its UID, so that a later one of the same name has
/// another.
pub fn record(migration: &str, uid: &str) -> String {
    let start = |text: &str, most: usize| {
        let end = (0..=text.len().min(most)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.get(..end).unwrap_or_default().trim_end_matches(['-', '.']).to_owned()
    };
    format!("{}-{}", start(migration, 253 - 9), start(uid, 8))
}

/// The name of the claim with the persistent state of `vmi`; `seed` is the VMI's UID for the first one, the migration's UID for
/// one that the state comes to.
pub fn persistent_state(vmi: &str, seed: &str) -> String {
    let room = 253 - LABEL_PERSISTENT_STATE.len() - 2 - 10;
    let end = (0..=vmi.len().min(room)).rev().find(|end| vmi.is_char_boundary(*end)).unwrap_or(0);
    let vmi = vmi.get(..end).unwrap_or_default().trim_end_matches(['-', '.']);
    format!("{LABEL_PERSISTENT_STATE}-{vmi}-{}", letters(seed, 10))
}

/// The name of an attachment pod. Ten letters: it belongs to one launcher pod and one set of volumes.
pub fn attachment_pod(seed: &str) -> String {
    format!("{ATTACHMENT_POD_PREFIX}{}", letters(seed, 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_stable_and_short_enough() {
        assert_eq!(suffix("a"), suffix("a"));
        assert_ne!(suffix("a"), suffix("b"));
        assert_eq!(suffix("a").len(), 5);
        assert_eq!(label_value("demo"), "demo");
        assert_eq!(label_value(&"x".repeat(64)).len(), 32);
        let long = "x".repeat(60);
        assert!(launcher_pod(&long, "uid").len() <= 63);
        assert!(launcher_pod("demo", "uid").starts_with("virt-launcher-demo-"));
        assert_eq!(evacuation("a").len(), EVACUATION_GENERATE_NAME.len() + 10);
        assert_eq!(record("move", "01234567-89ab"), "move-01234567");
        assert!(record(&"x".repeat(253), "01234567-89ab").len() <= 253);
    }
}
