//! The answer's half of an `AdmissionReview`.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use godwit_api::admission::Denial;
use serde_json::{Value, json};

use crate::review::{API_VERSION, KIND, Review};

/// What becomes of a request.
#[derive(Debug)]
pub enum Answer {
    /// It may go on, with these warnings.
    Allowed(Vec<String>),
    /// It may go on with this object in place of its own.
    Changed(Value, Vec<String>),
    /// It may not.
    Denied(Box<Denial>),
    /// The rules could not be asked: why.
    Failed(String),
}

impl Answer {
    /// The review that is sent back.
    pub fn review(self, asked: &Review) -> Value {
        let mut response = match self {
            Self::Allowed(warnings) => allowed(warnings),
            Self::Changed(object, warnings) => {
                let mut response = allowed(warnings);
                let before = asked.object.as_ref().unwrap_or(&Value::Null);
                let patch = json_patch::diff(before, &object);
                if !patch.is_empty() {
                    response["patchType"] = json!("JSONPatch");
                    response["patch"] = json!(BASE64_STANDARD.encode(json!(patch).to_string()));
                }
                response
            }
            Self::Denied(denial) => denied(&denial, asked),
            Self::Failed(why) => json!({
                "allowed": false,
                "status": { "status": "Failure", "code": 500, "reason": "InternalError", "message": why },
            }),
        };
        response["uid"] = json!(asked.uid);
        json!({ "apiVersion": API_VERSION, "kind": KIND, "response": response })
    }
}

fn allowed(warnings: Vec<String>) -> Value {
    let mut response = json!({ "allowed": true });
    if !warnings.is_empty() {
        response["warnings"] = json!(warnings);
    }
    response
}

fn denied(denial: &Denial, asked: &Review) -> Value {
    let mut status = json!({
        "status": "Failure",
        "code": denial.code,
        "reason": denial.reason,
        // the API server puts the webhook's name before it
        "message": denial.text(),
    });
    if !denial.causes.is_empty() {
        let causes: Vec<Value> = denial
            .causes
            .iter()
            .map(|cause| json!({ "reason": cause.reason, "message": cause.message, "field": cause.field }))
            .collect();
        let (group, kind) = (&asked.kind.group, &asked.kind.kind);
        status["details"] = json!({ "name": asked.name, "group": group, "kind": kind, "causes": causes });
    }
    let mut response = json!({ "allowed": false, "status": status });
    if !denial.warnings.is_empty() {
        response["warnings"] = json!(denial.warnings);
    }
    response
}
