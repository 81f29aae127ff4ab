//! The certificates of `godwit api`: the one that it serves with and the one that it shows to handlers. Both are made here, of
//! the CA that signs, and live in this process only; each replica has its own.

use std::sync::{Arc, PoisonError, RwLock};

use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;

use crate::authority::{Authority, Pair, Subject};
use crate::keeper::{Authorities, Error, Keeper};
use crate::now;
use crate::schedule::Lifetimes;

/// What the process shows to others, as it is at the moment: it is replaced while connections go on.
#[derive(Debug)]
pub struct Shown {
    serving: RwLock<Option<Arc<CertifiedKey>>>,
    calling: RwLock<Option<Arc<Calling>>>,
    ends: RwLock<Option<Arc<Ends>>>,
    provider: Arc<CryptoProvider>,
}

/// Certificates, and until when each counts.
type Ends = [(&'static str, i64); 3];

/// What handlers are shown, and by what they are known.
#[derive(Clone, Debug)]
pub struct Calling {
    /// PEM certificates of all CAs that count.
    pub bundle: String,
    /// PEM certificate.
    pub certificate: String,
    /// PEM private key.
    pub key: String,
}

impl Default for Shown {
    fn default() -> Self {
        Self {
            serving: RwLock::default(),
            calling: RwLock::default(),
            ends: RwLock::default(),
            provider: Arc::new(rustls::crypto::ring::default_provider()),
        }
    }
}

impl Shown {
    /// What handlers are shown; none before there is a CA.
    pub fn calling(&self) -> Option<Arc<Calling>> {
        get(&self.calling)
    }

    /// Until when the certificates count that the process makes, in seconds since 1970, as (which, end): the CA's that signs (`ca`), its
    /// own (`serving`), and the one that handlers are shown (`calling`). Empty before there are some.
    pub fn ends(&self) -> Vec<(&'static str, i64)> {
        get(&self.ends).map(|ends| ends.to_vec()).unwrap_or_default()
    }

    fn serve_with(&self, pair: &Pair) -> Result<(), String> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pair.certificate.as_bytes()).collect();
        let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).map_err(|error| error.to_string())?;
        let certified = CertifiedKey::from_der(chain.map_err(|error| error.to_string())?, key, &self.provider);
        set(&self.serving, certified.map_err(|error| error.to_string())?);
        Ok(())
    }
}

fn get<T>(held: &RwLock<Option<Arc<T>>>) -> Option<Arc<T>> {
    held.read().unwrap_or_else(PoisonError::into_inner).clone()
}

fn set<T>(held: &RwLock<Option<Arc<T>>>, value: T) {
    *held.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(value));
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        get(&self.serving)
    }
}

/// Whom the two certificates speak for.
#[derive(Clone, Debug)]
pub struct Subjects {
    /// Towards kube-apiserver.
    pub serving: Subject,
    /// Towards handlers.
    pub calling: Subject,
}

/// What was made last, and by whom.
struct Made {
    issuer: String,
    renew_at: i64,
    bundle: String,
}

/// Keeps the CA and the process's own certificates, for ever. `ready` becomes true when there are some that count.
pub async fn run(
    mut keeper: Keeper,
    lifetimes: Lifetimes,
    subjects: Subjects,
    shown: Arc<Shown>,
    ready: watch::Sender<bool>,
) {
    let mut made: Option<Made> = None;
    let mut said = String::new();
    loop {
        let now = now();
        let outcome = match keeper.tend(now).await {
            Ok((authorities, told)) => {
                let renewed = renew(&authorities, &mut made, &subjects, &shown, now, &lifetimes);
                renewed.and(told)
            }
            Err(error) => Err(error),
        };
        ready.send_replace(made.is_some());
        match outcome {
            Ok(()) if said.is_empty() => {}
            Ok(()) => {
                tracing::info!("the certificates are kept again");
                said.clear();
            }
            Err(error) => {
                let what = error.to_string();
                if said != what {
                    tracing::warn!("{what}; trying again");
                    said = what;
                }
            }
        }
        tokio::time::sleep(lifetimes.look()).await;
    }
}

fn renew(
    authorities: &Authorities,
    made: &mut Option<Made>,
    subjects: &Subjects,
    shown: &Shown,
    now: i64,
    lifetimes: &Lifetimes,
) -> Result<(), Error> {
    let Some(authority) = &authorities.current else { return Ok(()) };
    let bundle = authorities.bundle();
    let is_good = made
        .as_ref()
        .is_some_and(|made| made.issuer == authority.certificate && now < made.renew_at && made.bundle == bundle);
    if is_good {
        return Ok(());
    }
    let failed =
        |why: String| Error::Make(crate::authority::Error::Read { what: "what was just made".to_owned(), why });
    let issue = |authority: &Authority, subject: &Subject| {
        authority.issue(subject, now, lifetimes.certificate).map_err(Error::Make)
    };
    let (serving, calling) = (issue(authority, &subjects.serving)?, issue(authority, &subjects.calling)?);
    let renew_at = serving.validity.renew_at().min(calling.validity.renew_at());
    shown.serve_with(&serving).map_err(failed)?;
    let ends = [("ca", authority.validity), ("serving", serving.validity), ("calling", calling.validity)];
    set(&shown.ends, ends.map(|(which, validity)| (which, validity.not_after)));
    let calling = Calling { bundle: bundle.clone(), certificate: calling.certificate, key: calling.key };
    set(&shown.calling, calling);
    tracing::info!(until = serving.validity.not_after, "new certificates are served with");
    *made = Some(Made { issuer: authority.certificate.clone(), renew_at, bundle });
    Ok(())
}
