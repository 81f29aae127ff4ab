//! Where objects are read.

use futures::future::BoxFuture;
use godwit_api::Installation;
use godwit_api::admission::Lookup;
use godwit_machinery::status::Status;
use godwit_webhook::Cluster;

/// The stored objects, wherever they are.
pub trait Objects: Send + Sync {
    /// Where godwit is installed.
    fn installation(&self) -> &Installation;

    /// Has a rule look things up until it has seen all that it looks for: it may be asked several times, and its last word
    /// counts.
    ///
    /// # Errors
    /// What it looks for cannot be read.
    fn show<'a>(&'a self, rule: &'a mut (dyn FnMut(&dyn Lookup) + Send)) -> BoxFuture<'a, Result<(), Status>>;
}

/// What a rule says of the objects.
///
/// # Errors
/// As of [`Objects::show`].
pub(crate) async fn ask<T: Send>(
    objects: &dyn Objects,
    rule: impl Fn(&dyn Lookup) -> T + Send + Sync,
) -> Result<T, Status> {
    let mut said = None;
    objects.show(&mut |lookup| said = Some(rule(lookup))).await?;
    said.ok_or_else(|| Status::internal_error("the objects were not shown"))
}

/// Those of an API server, read at the time of asking.
#[derive(Clone)]
pub struct ApiServer(pub Cluster);

impl Objects for ApiServer {
    fn installation(&self) -> &Installation {
        &self.0.installation
    }

    fn show<'a>(&'a self, rule: &'a mut (dyn FnMut(&dyn Lookup) + Send)) -> BoxFuture<'a, Result<(), Status>> {
        Box::pin(async move {
            godwit_webhook::facts::ask(&self.0, rule)
                .await
                .map_err(|error| Status::internal_error(format!("{error}; try again")))
        })
    }
}
