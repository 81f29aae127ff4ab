//! What the two ends of one migration know each other's streams by.
//!
//! For every migration each handler makes a key pair and a certificate for it, which lie in its memory and, where the launchers carry
//! the memory stream, in that of its own launcher. Over the control
//! channel, on which both have shown the certificates of their nodes, they tell each other those certificates' fingerprints.
//! From then on the streams of memory and blocks are open to the two that were told, and to nothing else that any CA has
//! signed. An identity is never written down; with its migration it is over, whatever the clocks say.
//!
//! Where the migration's configuration asks for it (`disableTLS`), streams go in the clear. Then each connection proves that it
//! knows a secret that was told over the control channel, by an answer to a question that is asked once.

pub use godwit_launcher::carry::identity::{Fingerprint, MigrationIdentity};
use godwit_launcher::carry::identity::{fast_provider, hex};
use ring::hmac;

use crate::channel::Place;
use crate::tls::TlsError;

/// Something nobody can guess, in hexadecimal digits: a secret, or a question that was never asked before.
///
/// # Errors
/// When there is no randomness.
pub fn unguessable() -> Result<String, TlsError> {
    let mut bytes = [0; 32];
    let random = fast_provider().secure_random;
    random.fill(&mut bytes).map_err(|_| TlsError::Setup("there is no randomness".into()))?;
    Ok(hex(&bytes))
}

/// What a connection in the clear says of itself; whoever knows the secret can prove it.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    /// Who says it: "source" or "target".
    pub end: &'a str,
    /// UID of the migration.
    pub uid: &'a str,
    /// Which stream, by its inner port.
    pub inner: i32,
    /// Which connection of it.
    pub place: Place,
    /// What the target asked when the connection came.
    pub question: &'a str,
}

impl Claim<'_> {
    fn words(&self) -> String {
        let Self { end, uid, inner, place: Place { stream, recovery }, question } = self;
        format!("godwit stream {end} {uid} {inner} {stream} {recovery:?} {question}")
    }

    /// The proof: HMAC-SHA256 of the claim.
    #[must_use]
    pub fn proof(&self, secret: &str) -> String {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
        hex(hmac::sign(&key, self.words().as_bytes()).as_ref())
    }

    /// Whether `proof` is that of somebody who knows the secret.
    #[must_use]
    pub fn is_proven(&self, secret: &str, proof: &str) -> bool {
        // Compared by what nobody can see into: the tag of either.
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
        let expected = self.proof(secret);
        hmac::verify(&key, expected.as_bytes(), hmac::sign(&key, proof.as_bytes()).as_ref()).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_is_good_for_one_claim_and_one_secret() {
        let claim = Claim { end: "source", uid: "uid-1", inner: 49152, place: 0.into(), question: "q1" };
        let proof = claim.proof("secret");
        assert!(claim.is_proven("secret", &proof));
        assert!(!claim.is_proven("another", &proof));
        assert!(!claim.is_proven("secret", ""));
        for other in [
            Claim { end: "target", ..claim },
            Claim { uid: "uid-2", ..claim },
            Claim { inner: 49153, ..claim },
            Claim { place: 1.into(), ..claim },
            Claim { place: Place { stream: 0, recovery: Some(1) }, ..claim },
            Claim { question: "q2", ..claim },
        ] {
            assert!(!other.is_proven("secret", &proof), "{other:?}");
        }
    }

    #[test]
    fn secrets_are_all_different() {
        assert_ne!(unguessable().unwrap(), unguessable().unwrap());
    }
}
