//! Whether a user may: a SubjectAccessReview put to the API server.

use godwit_machinery::status::{Attributes, Status};
use godwit_serving::request::RequestInfo;
use godwit_serving::user::User;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::{Api, PostParams};
use std::time::Duration;

/// How long the API server may take to say it.
const LIMIT: Duration = Duration::from_secs(5);

/// Asks whether a user may do what a request is about.
///
/// # Errors
/// 403 when not, 500 when nobody can say.
pub async fn authorize(client: &kube::Client, user: &User, info: &RequestInfo) -> Result<(), Status> {
    // As everywhere in Kubernetes: they may do everything, also when nobody can be asked.
    if user.is_master() {
        return Ok(());
    }
    let api: Api<SubjectAccessReview> = Api::all(client.clone());
    let review = review(user, info);
    let params = PostParams::default();
    let unknown =
        |why: String| Status::internal_error(format!("whether {} may do this cannot be asked: {why}", user.name));
    let answer = match tokio::time::timeout(LIMIT, api.create(&params, &review)).await {
        Ok(answer) => answer.map_err(|error| unknown(error.to_string()))?,
        Err(_) => return Err(unknown(format!("the API server does not answer within {LIMIT:?}"))),
    };
    let status = answer.status.unwrap_or_default();
    if status.allowed && status.denied != Some(true) {
        return Ok(());
    }
    Err(Status::forbidden_user(&Attributes {
        user: &user.name,
        verb: info.verb,
        group: &info.group,
        resource: &info.resource,
        subresource: &info.subresource,
        namespace: &info.namespace,
        name: &info.name,
        path: "",
    }))
}

fn review(user: &User, info: &RequestInfo) -> SubjectAccessReview {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(user.name.clone()),
            uid: text(&user.uid),
            groups: Some(user.groups.clone()),
            extra: Some(user.extra.clone()),
            resource_attributes: Some(ResourceAttributes {
                verb: text(info.verb),
                group: text(&info.group),
                version: text(&info.version),
                namespace: text(&info.namespace),
                resource: text(&info.resource),
                subresource: text(&info.subresource),
                name: text(&info.name),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    }
}
