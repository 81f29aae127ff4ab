//! The writes of an action, made through the API server, as the account of this process.

use godwit_machinery::status::Status;
use godwit_serving::actions::{ActionWrite, Deed};
use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams, PostParams};

/// The version of what is written.
const VERSION: &str = "v1";
/// In `managedFields`.
const MANAGER: &str = "virt-api";

/// Makes the writes in a namespace.
///
/// # Errors
/// What the API server says: 409 when the first of them finds its object changed.
pub async fn carry_out(client: &kube::Client, namespace: &str, deed: Deed, dry_run: bool) -> Result<(), Status> {
    let dry_run = dry_run || deed.dry_run;
    for (index, write) in deed.writes.into_iter().enumerate() {
        match write {
            ActionWrite::Patch { group, plural, name, status, patch } => {
                let api = api(client, namespace, &group, plural);
                let params = PatchParams { dry_run, field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
                let patch = Patch::Merge(&patch);
                let written = if status {
                    api.patch_status(&name, &params, &patch).await
                } else {
                    api.patch(&name, &params, &patch).await
                };
                match written.map_err(said) {
                    // Gone, or another one of its name: the first write was enough.
                    Err(why) if index > 0 && (matches!(why.code, 404 | 409) || is_another(&why)) => {}
                    written => drop(written?),
                }
            }
            ActionWrite::Create { group, plural, object } => {
                let params = PostParams { dry_run, field_manager: Some(MANAGER.to_owned()) };
                let api = api(client, namespace, &group, plural);
                let made = match serde_json::from_value::<DynamicObject>(object) {
                    Ok(object) => api.create(&params, &object).await.map(drop).map_err(said),
                    Err(error) => Err(Status::internal_error(error)),
                };
                made.map_err(|why| Status::internal_error(why.message))?;
            }
        }
    }
    Ok(())
}

/// Whether a patch for one object was refused because another one has its name by now.
fn is_another(why: &Status) -> bool {
    let causes = why.details.iter().flat_map(|details| &details.causes);
    why.code == 422 && causes.into_iter().any(|cause| cause.field == "metadata.uid")
}

fn api(client: &kube::Client, namespace: &str, group: &str, plural: String) -> Api<DynamicObject> {
    let (group, version) = (group.to_owned(), VERSION.to_owned());
    let resource =
        ApiResource { api_version: format!("{group}/{version}"), kind: String::new(), group, version, plural };
    Api::namespaced_with(client.clone(), namespace, &resource)
}

/// The API server's own words.
fn said(error: kube::Error) -> Status {
    match error {
        kube::Error::Api(status) => {
            let details = status.details.as_ref().and_then(|details| serde_json::to_value(details).ok());
            let details = details.and_then(|details| serde_json::from_value(details).ok());
            Status { details, ..Status::new(status.code, &status.reason, status.message.clone()) }
        }
        other => Status::internal_error(other),
    }
}
