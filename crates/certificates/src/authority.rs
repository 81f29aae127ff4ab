//! CAs and what they sign.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use std::time::Duration;
use time::OffsetDateTime;

use crate::schedule::Validity;

/// Why a certificate was not made or cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be made.
    #[error("a certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
    /// What should be a certificate is none.
    #[error("{what} is no certificate: {why}")]
    Read {
        /// Where it was found.
        what: String,
        /// Why not.
        why: String,
    },
}

/// A CA with its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    /// PEM certificate.
    pub certificate: String,
    /// PEM private key.
    pub key: String,
    /// From when to when it counts.
    pub validity: Validity,
}

/// A certificate with its key.
#[derive(Clone, Debug)]
pub struct Pair {
    /// PEM certificate.
    pub certificate: String,
    /// PEM private key.
    pub key: String,
    /// From when to when it counts.
    pub validity: Validity,
}

/// Who a certificate speaks for.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    /// The common name.
    pub common_name: String,
    /// DNS names.
    pub names: Vec<String>,
    /// It is shown by a server.
    pub serves: bool,
    /// It is shown by a client.
    pub calls: bool,
}

impl Authority {
    /// Makes one.
    ///
    /// # Errors
    /// There is no randomness.
    pub fn make(now: i64, lifetime: Duration) -> Result<Self, Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        // Several are trusted at the same time: each has a name of its own.
        params.distinguished_name.push(DnType::CommonName, format!("godwit-ca@{now}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let validity = Validity::from(now, lifetime, None);
        set_dates(&mut params, validity);
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { certificate, key: key.serialize_pem(), validity })
    }

    /// Reads one. `what` is named in the error.
    ///
    /// # Errors
    /// It is no certificate, or the key is none.
    pub fn read(certificate: &str, key: &str, what: &str) -> Result<Self, Error> {
        let validity = validity(certificate, what)?;
        let one = Self { certificate: certificate.to_owned(), key: key.to_owned(), validity };
        one.issuer()?;
        Ok(one)
    }

    fn issuer(&self) -> Result<Issuer<'static, KeyPair>, Error> {
        Ok(Issuer::from_ca_cert_pem(&self.certificate, KeyPair::from_pem(&self.key)?)?)
    }

    /// Makes a key and a certificate for it.
    ///
    /// # Errors
    /// A name that cannot stand in a certificate.
    pub fn issue(&self, subject: &Subject, now: i64, lifetime: Duration) -> Result<Pair, Error> {
        let key = KeyPair::generate()?;
        let validity = Validity::from(now, lifetime, Some(self.validity));
        let certificate = params(subject, validity)?.signed_by(&key, &self.issuer()?)?.pem();
        Ok(Pair { certificate, key: key.serialize_pem(), validity })
    }

    /// Signs the key of a request, and nothing else that stands in it.
    ///
    /// # Errors
    /// The request is none.
    pub fn sign(&self, request: &str, subject: &Subject, now: i64, lifetime: Duration) -> Result<String, Error> {
        let mut asked = CertificateSigningRequestParams::from_pem(request)?;
        asked.params = params(subject, Validity::from(now, lifetime, Some(self.validity)))?;
        Ok(asked.signed_by(&self.issuer()?)?.pem())
    }
}

fn params(subject: &Subject, validity: Validity) -> Result<CertificateParams, Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, subject.common_name.clone());
    for name in &subject.names {
        params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    if subject.calls {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
    }
    if subject.serves {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    params.use_authority_key_identifier_extension = true;
    set_dates(&mut params, validity);
    Ok(params)
}

fn set_dates(params: &mut CertificateParams, validity: Validity) {
    let time = |seconds| OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    params.not_before = time(validity.not_before);
    params.not_after = time(validity.not_after);
}

/// From when to when the first certificate in a PEM text counts. `what` is named in the error.
///
/// # Errors
/// There is none.
pub fn validity(pem: &str, what: &str) -> Result<Validity, Error> {
    let failed = |why: String| Error::Read { what: what.to_owned(), why };
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|error| failed(error.to_string()))?;
    let certificate = pem.parse_x509().map_err(|error| failed(error.to_string()))?;
    let dates = certificate.validity();
    Ok(Validity { not_before: dates.not_before.timestamp(), not_after: dates.not_after.timestamp() })
}

/// The certificates in a PEM text, each as a PEM text of its own. What is none is left out.
pub fn split(pem: &str) -> Vec<String> {
    const END: &str = "-----END CERTIFICATE-----";
    pem.split_inclusive(END)
        .filter_map(|piece| {
            let begin = piece.find("-----BEGIN CERTIFICATE-----")?;
            piece.ends_with(END).then(|| format!("{}\n", piece.get(begin..).unwrap_or_default()))
        })
        .collect()
}

/// Whether one of these CAs has signed the first certificate of a PEM text. Dates are not looked at.
pub fn is_signed_by(pem: &str, bundle: &str) -> bool {
    let Ok((_, pem)) = x509_parser::pem::parse_x509_pem(pem.as_bytes()) else { return false };
    let Ok(certificate) = pem.parse_x509() else { return false };
    split(bundle).iter().any(|authority| {
        let Ok((_, authority)) = x509_parser::pem::parse_x509_pem(authority.as_bytes()) else { return false };
        authority.parse_x509().is_ok_and(|authority| {
            certificate.issuer() == authority.subject()
                && certificate.verify_signature(Some(authority.public_key())).is_ok()
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn what_is_signed_can_be_read_again() {
        let authority = Authority::make(1_800_000_000, HOUR * 24).unwrap();
        let read = Authority::read(&authority.certificate, &authority.key, "x").unwrap();
        assert_eq!(read, authority);
        let subject = Subject { common_name: "a".into(), names: vec!["b.c".into()], serves: true, calls: false };
        let pair = read.issue(&subject, 1_800_000_000, HOUR).unwrap();
        assert_eq!(validity(&pair.certificate, "x").unwrap(), pair.validity);
        assert_eq!(pair.validity.not_after, 1_800_003_600);
        assert!(
            Authority::read("rubbish", &authority.key, "Secret x").unwrap_err().to_string().starts_with("Secret x")
        );
        assert!(Authority::read(&authority.certificate, "rubbish", "x").is_err());
    }

    #[test]
    fn it_is_known_who_has_signed() {
        let make = || Authority::make(1_800_000_000, HOUR).unwrap();
        // Of one name: it is the key that counts.
        let (one, other) = (make(), make());
        let signed = one.issue(&Subject::default(), 1_800_000_000, HOUR).unwrap().certificate;
        assert!(is_signed_by(&signed, &format!("{}{}", other.certificate, one.certificate)));
        assert!(!is_signed_by(&signed, &other.certificate));
        assert!(!is_signed_by(&signed, "") && !is_signed_by("rubbish", &one.certificate));
    }

    #[test]
    fn a_bundle_is_taken_apart() {
        let of = |now| Authority::make(now, HOUR).unwrap().certificate;
        let (one, two) = (of(1_800_000_000), of(1_800_000_001));
        let parts = split(&format!("# first\n{one}junk\n{two}"));
        assert_eq!(parts.iter().map(|part| part.trim()).collect::<Vec<_>>(), [one.trim(), two.trim()]);
        assert!(split("-----BEGIN CERTIFICATE-----\nhalf").is_empty() && split("").is_empty());
    }
}
