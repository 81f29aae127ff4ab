//! Holds the lease of the controllers, or waits for it.

use godwit_control::lease::{self, Candidate, Seen, Step, decide_lease};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, PostParams};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, info, warn};

/// Until when this controller decides; `None` when it does not.
pub type Until = Option<Instant>;

/// Looks after the lease for ever, and tells until when it is held.
pub async fn elect(client: kube::Client, me: Candidate, until: watch::Sender<Until>) {
    let api: Api<Lease> = Api::namespaced(client, &me.lease.namespace);
    let begin = Instant::now();
    let mut seen = Seen::default();
    loop {
        let look = match api.get_opt(&me.lease.name).await {
            Ok(lease) => {
                seen.look(begin.elapsed(), lease);
                attempt(&api, &mut seen, begin, &me, &until).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = look {
            match error {
                // Somebody else was faster; the next look tells who.
                kube::Error::Api(status) if status.code == 409 => debug!("the lease was written by somebody else"),
                error => warn!(%error, lease = %me.lease, "cannot read or write the controllers' lease, trying again"),
            }
        }
        tokio::time::sleep(lease::LOOK_EVERY).await;
    }
}

async fn attempt(
    api: &Api<Lease>,
    seen: &mut Seen,
    begin: Instant,
    me: &Candidate,
    until: &watch::Sender<Until>,
) -> Result<(), kube::Error> {
    let sent = begin.elapsed();
    let params = PostParams::default();
    let held = match decide_lease(sent, seen, me, Timestamp::now()) {
        Step::Create(lease) => api.create(&params, &lease).await?,
        Step::Replace(lease) => api.replace(&me.lease.name, &params, &lease).await?,
        Step::Wait => {
            until.send_replace(None);
            return Ok(());
        }
    };
    seen.look(begin.elapsed(), Some(held));
    if until.borrow().is_none() {
        info!(identity = me.holder, "this controller decides");
    }
    until.send_replace(Some(begin + lease::leads_until(sent)));
    Ok(())
}

/// Gives the lease back, if it is held.
pub async fn give_back(client: kube::Client, me: &Candidate) -> Result<(), kube::Error> {
    let api: Api<Lease> = Api::namespaced(client, &me.lease.namespace);
    let held = api.get_opt(&me.lease.name).await?;
    if let Some(lease) = held.and_then(|lease| lease::given_back(&lease, &me.holder)) {
        api.replace(&me.lease.name, &PostParams::default(), &lease).await?;
    }
    Ok(())
}
