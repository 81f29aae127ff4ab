//! Certificates for QEMU's own encryption, where QEMU looks for them (`dir` of `tls-creds-x509`).

use super::Error;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use std::net::IpAddr;
use std::path::Path;

/// A certificate authority, made anew for each guest and forgotten with it.
pub struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes one.
    pub fn new() -> Result<Self, Error> {
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "godwit bench");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let certificate = params.self_signed(&key).map_err(failed)?.pem();
        Ok(Self { certificate, issuer: Issuer::new(params, key) })
    }

    /// Fills a folder with what a QEMU at `address` needs to be either end.
    pub fn equip(&self, folder: &Path, address: IpAddr) -> Result<(), Error> {
        let keep = |name: &str, pem: &str| {
            let path = folder.join(name);
            std::fs::write(&path, pem).map_err(|e| Error::io(format!("write {}", path.display()), e))
        };
        std::fs::create_dir_all(folder).map_err(|e| Error::io(format!("make {}", folder.display()), e))?;
        keep("ca-cert.pem", &self.certificate)?;
        for (end, usage) in
            [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)]
        {
            let key = KeyPair::generate().map_err(failed)?;
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, format!("{address} {end}"));
            params.subject_alt_names = vec![SanType::IpAddress(address)];
            // QEMU looks for both before it takes a certificate.
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
            params.extended_key_usages = vec![usage];
            let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
            keep(&format!("{end}-cert.pem"), &certificate.pem())?;
            keep(&format!("{end}-key.pem"), &key.serialize_pem())?;
        }
        Ok(())
    }
}

fn failed(error: rcgen::Error) -> Error {
    Error::io("make certificates", std::io::Error::other(error))
}
