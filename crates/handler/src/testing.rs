//! What tests stand a handler on: certificates, an API in memory, launchers without a QEMU.

pub(crate) mod api;
mod disruption;
mod flow;
mod launcher;
mod real;

use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::sockets::SocketDir;
use crate::tls::{Identity, TlsPaths};

/// A launcher's socket whose queue is full: whoever listens stands still.
pub struct FullSocket {
    _listener: Socket,
    _queued: Vec<Socket>,
}

impl FullSocket {
    pub fn listen(folder: &Path) -> Self {
        let dir = SocketDir::open(folder.to_owned()).unwrap();
        let address = SockAddr::unix(dir.short("launcher.sock")).unwrap();
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        listener.bind(&address).unwrap();
        listener.listen(0).unwrap();
        let mut queued = Vec::new();
        loop {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            match socket.connect(&address) {
                Ok(()) => queued.push(socket),
                Err(error) => {
                    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                    return Self { _listener: listener, _queued: queued };
                }
            }
        }
    }
}

/// A certificate authority.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Ca {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    pub fn pem(&self) -> String {
        self.pem.clone()
    }

    /// Writes a certificate and its key into `dir`.
    pub fn issue(&self, dir: &Path, cn: &str, san: &[&str]) -> TlsPaths {
        let mut params = CertificateParams::new(san.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()).unwrap();
        params.distinguished_name.push(DnType::CommonName, cn);
        self.sign(dir, params)
    }

    /// The certificate of a node that was good for a day in 2001.
    pub fn expired(&self, dir: &Path, cn: &str) -> Identity {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, cn);
        params.not_before = rcgen::date_time_ymd(2001, 1, 1);
        params.not_after = rcgen::date_time_ymd(2001, 1, 2);
        Identity::load(&self.sign(dir, params)).unwrap()
    }

    fn sign(&self, dir: &Path, params: CertificateParams) -> TlsPaths {
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let paths = TlsPaths { ca: dir.join("ca.crt"), cert: dir.join("tls.crt"), key: dir.join("tls.key") };
        std::fs::write(&paths.ca, &self.pem).unwrap();
        std::fs::write(&paths.cert, cert.pem()).unwrap();
        std::fs::write(&paths.key, key.serialize_pem()).unwrap();
        paths
    }

    pub fn identity(&self, dir: &Path, cn: &str, san: &[&str]) -> Identity {
        Identity::load(&self.issue(dir, cn, san)).unwrap()
    }
}
