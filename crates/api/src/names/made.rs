//! Names that are made, of what everybody has to find again.

use sha2::{Digest, Sha256};

use super::LAUNCHER_POD_PREFIX;

/// Letters of generated names: Kubernetes' own choice, which spells no words.
const LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

/// So many letters (at most 32) that look random and are always the same for the same `seed`.
pub fn letters(seed: &str, count: usize) -> String {
    let digest = Sha256::digest(seed.as_bytes());
    digest
        .iter()
        .take(count)
        .filter_map(|byte| LETTERS.get(usize::from(*byte) % LETTERS.len()))
        .map(|b| *b as char)
        .collect()
}

/// Five letters that look random and are always the same for the same `seed` (a UID). Making something twice then makes
/// the same thing, and the second attempt is refused by the server: the last guard against two of it.
pub fn suffix(seed: &str) -> String {
    letters(seed, 5)
}

/// The name of a launcher pod of `vmi`; `seed` is the VMI's UID for its first pod, the migration's UID for a target.
pub fn launcher_pod(vmi: &str, seed: &str) -> String {
    // A pod's name is its host name as well: at most 63 characters.
    let room = 63 - LAUNCHER_POD_PREFIX.len() - 6;
    let end = (0..=vmi.len().min(room)).rev().find(|end| vmi.is_char_boundary(*end)).unwrap_or(0);
    let vmi = vmi.get(..end).unwrap_or_default().trim_end_matches(['-', '.']);
    format!("{LAUNCHER_POD_PREFIX}{vmi}-{}", suffix(seed))
}
