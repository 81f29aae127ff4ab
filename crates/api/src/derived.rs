//! Values that are derived instead of drawn, so that they are the same wherever and whenever they are asked for.

use sha2::{Digest as _, Sha256};

fn digest(parts: &[&str]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        // lengths keep ("ab", "c") and ("a", "bc") apart
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize().into()
}

/// The MAC address of an interface that has none in its spec: unicast, locally administered, the same for one VMI name on
/// every node and in every run. `vmi` is the VMI's name.
pub fn derived_mac(namespace: &str, vmi: &str, interface: &str) -> String {
    let hash = digest(&["mac", namespace, vmi, interface]);
    format!("02:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}", hash[0], hash[1], hash[2], hash[3], hash[4])
}

/// The firmware UUID of a VMI that has none in its spec: the same in every run of one VM.
pub fn derived_firmware_uuid(namespace: &str, vmi: &str) -> String {
    let mut hash = digest(&["firmware", namespace, vmi]);
    // RFC 9562: version 8 (custom), variant 10
    hash[6] = hash[6] & 0x0f | 0x80;
    hash[8] = hash[8] & 0x3f | 0x80;
    let hex: String = hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let groups = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    groups.join("-")
}

/// The name of a secondary network's interface in the pod, as KubeVirt derives it: `pod` and the first 11 hex digits of the
/// SHA-256 of the network's name.
pub fn pod_interface_name(network: &str) -> String {
    let hash: [u8; 32] = Sha256::digest(network.as_bytes()).into();
    let hex: String = hash.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("pod{}", hex.get(..11).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_stable_and_apart() {
        let mac = derived_mac("default", "vmi", "default");
        assert_eq!(mac, derived_mac("default", "vmi", "default"));
        assert_ne!(mac, derived_mac("default", "vm", "idefault"));
        assert!(mac.starts_with("02:") && mac.len() == 17);
    }

    #[test]
    fn uuids_are_well_formed() {
        let uuid = derived_firmware_uuid("default", "vmi");
        let lengths: Vec<usize> = uuid.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12]);
        assert_eq!(uuid.as_bytes()[14], b'8');
    }

    #[test]
    fn pod_interfaces_are_named_as_kubevirt_does() {
        // printf %s secondary | sha256sum
        assert_eq!(pod_interface_name("secondary").len(), 14);
        assert_eq!(pod_interface_name(""), "pode3b0c44298f");
    }
}
