//! KubeVirt's subresources as actions of the embedded API server.

use crate::admission::ByKind;
use futures::future::BoxFuture;
use godwit_api::Installation;
use godwit_api::admission as rules;
use godwit_api::subresources;
use godwit_apiserver::{ActionRequest, Actions, Lookup};
use godwit_handler::front::FrontClient;
use godwit_machinery::discovery;
use godwit_machinery::resource::Resource;
use godwit_machinery::status::Status;
use godwit_serving::actions::Outcome;
use godwit_subresources::{Asked, Objects, outcome, plan, resources, root, unknown};
use serde_json::Value;
use std::sync::Arc;

/// The plugin.
pub struct KubeVirtActions {
    front: FrontClient,
}

impl KubeVirtActions {
    /// With the way to the handlers.
    pub fn new(front: FrontClient) -> Self {
        Self { front }
    }
}

/// The objects of the embedded store.
struct Stored(Arc<dyn Lookup>);

impl Objects for Stored {
    fn installation(&self) -> &Installation {
        &Installation::USUAL
    }

    fn show<'a>(&'a self, rule: &'a mut (dyn FnMut(&dyn rules::Lookup) + Send)) -> BoxFuture<'a, Result<(), Status>> {
        rule(&ByKind(self.0.as_ref()));
        Box::pin(std::future::ready(Ok(())))
    }
}

impl Actions for KubeVirtActions {
    fn resources(&self) -> Vec<Resource> {
        resources()
    }

    fn act(&self, request: &ActionRequest<'_>) -> Result<Outcome, Status> {
        let plan = plan(&subresources::Request {
            resource: request.resource,
            action: request.action,
            namespace: request.namespace,
            name: request.name,
            body: request.body,
            user: &request.user.name,
            lookup: &ByKind(request.lookup.as_ref()),
        })?;
        let asked = Asked {
            resource: request.resource,
            namespace: request.namespace,
            name: request.name,
            query: request.query,
        };
        Ok(outcome(&self.front, plan, asked, Arc::new(Stored(request.lookup.clone()))))
    }

    fn root(&self, path: &str, lookup: &dyn Lookup) -> Option<Result<Value, Status>> {
        root(path, &discovery::version(), &ByKind(lookup))
    }

    fn unknown(&self, resource: &str, action: &str) -> Option<Status> {
        unknown(resource, action)
    }
}
