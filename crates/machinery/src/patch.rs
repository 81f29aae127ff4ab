//! The patches of `PATCH`: JSON patch (RFC 6902), merge patch (RFC 7386) and Kubernetes' strategic merge patch.
//! Server-side apply is in [`crate::apply`].

mod strategic;

pub use strategic::strategic_merge;

use crate::body::{MAX_BYTES, MAX_DEPTH, depth, media_type};
use crate::status::Status;
use json_patch::PatchOperation;
use json_patch::jsonptr::Pointer;
use serde_json::Value;

/// Most operations in one JSON patch.
pub const MAX_OPERATIONS: usize = 10_000;

/// What a `PATCH` body is, by its media type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatchKind {
    /// `application/json-patch+json`
    Json,
    /// `application/merge-patch+json`
    Merge,
    /// `application/strategic-merge-patch+json`
    Strategic,
    /// `application/apply-patch+yaml`
    Apply,
}

impl PatchKind {
    /// Reads a `Content-Type`. Custom resources (`builtin` false) take no strategic merge patches.
    ///
    /// # Errors
    /// 415 naming the media types that are taken.
    pub fn of(content_type: &str, builtin: bool) -> Result<PatchKind, Status> {
        match media_type(content_type).as_str() {
            "application/json-patch+json" => Ok(PatchKind::Json),
            "application/merge-patch+json" => Ok(PatchKind::Merge),
            "application/strategic-merge-patch+json" if builtin => Ok(PatchKind::Strategic),
            "application/apply-patch+yaml" => Ok(PatchKind::Apply),
            _ => {
                let mut accepted = vec!["application/json-patch+json", "application/merge-patch+json"];
                if builtin {
                    accepted.push("application/strategic-merge-patch+json");
                }
                accepted.push("application/apply-patch+yaml");
                Err(Status::unsupported_media_type(&accepted))
            }
        }
    }
}

/// Applies a JSON patch; all operations or none.
///
/// # Errors
/// 400 if the patch is malformed, 413 if it has too many operations, 422 if one cannot be carried out.
pub fn json_patch(document: &Value, patch: &Value) -> Result<Value, Status> {
    let Some(list) = patch.as_array() else {
        return Err(Status::bad_request("error decoding patch: a JSON patch is a list of operations"));
    };
    if list.len() > MAX_OPERATIONS {
        return Err(Status::new(
            413,
            "RequestEntityTooLarge",
            format!("The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {}", list.len()),
        ));
    }
    let mut result = document.clone();
    let mut copied = 0usize;
    for (i, operation) in list.iter().enumerate() {
        let operation: PatchOperation = serde::Deserialize::deserialize(operation)
            .map_err(|e| Status::bad_request(format!("error decoding patch: operation {i}: {e}")))?;
        bound(&result, &operation, &mut copied)?;
        if let PatchOperation::Test(test) = &operation
            && test.value.is_null()
            && result.pointer(test.path.as_str()).is_none()
        {
            // As the library of Kubernetes has it: what is absent is null.
            continue;
        }
        json_patch::patch_unsafe(&mut result, std::slice::from_ref(&operation)).map_err(|error| {
            let why = match error.kind {
                json_patch::PatchErrorKind::TestFailed => format!("testing value {} failed", error.path),
                kind => format!("operation {i} at path {:?}: {kind}", error.path.as_str()),
            };
            Status::unprocessable(why)
        })?;
    }
    Ok(result)
}

/// Refuses operations that would nest too deep or copy too much.
fn bound(document: &Value, operation: &PatchOperation, copied: &mut usize) -> Result<(), Status> {
    let steps = |path: &Pointer| path.tokens().count();
    let at = |path: &Pointer| document.pointer(path.as_str());
    let below = |value: &Value, path: &Pointer| steps(path) + depth(value, MAX_DEPTH + 1);
    let deepest = match operation {
        PatchOperation::Add(o) => below(&o.value, &o.path),
        PatchOperation::Replace(o) => below(&o.value, &o.path),
        PatchOperation::Move(o) => at(&o.from).map_or(0, |value| below(value, &o.path)),
        PatchOperation::Copy(o) => {
            let source = at(&o.from);
            *copied = copied.saturating_add(source.map_or(0, size));
            source.map_or(0, |value| below(value, &o.path))
        }
        PatchOperation::Remove(_) | PatchOperation::Test(_) => 0,
    };
    if deepest > MAX_DEPTH {
        return Err(Status::unprocessable(format!("the result would be nested deeper than {MAX_DEPTH} levels")));
    }
    if *copied > MAX_BYTES {
        return Err(Status::request_entity_too_large(MAX_BYTES));
    }
    Ok(())
}

/// About how many bytes a value takes as JSON.
fn size(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len() + 2,
        Value::Array(list) => list.iter().fold(2, |sum, item| sum + size(item) + 1),
        Value::Object(map) => map.iter().fold(2, |sum, (key, item)| sum + key.len() + size(item) + 4),
        _ => 8,
    }
}

/// Applies a merge patch: members are merged, null removes, everything else replaces.
///
/// # Errors
/// 400 if the patch is no object or nested too deep.
pub fn merge_patch(document: &Value, patch: &Value) -> Result<Value, Status> {
    object_patch(patch)?;
    let mut result = document.clone();
    json_patch::merge(&mut result, patch);
    Ok(result)
}

fn object_patch(patch: &Value) -> Result<(), Status> {
    if !patch.is_object() {
        return Err(Status::bad_request("error decoding patch: the patch must be an object"));
    }
    if depth(patch, MAX_DEPTH + 1) > MAX_DEPTH {
        return Err(Status::bad_request("error decoding patch: exceeded max depth"));
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn applies_json_patches() {
        let document = json!({"a": [1, 2], "m": {"x/y": 1}});
        let patch = json!([
            {"op": "test", "path": "/a/0", "value": 1},
            {"op": "test", "path": "/nothing", "value": null},
            {"op": "add", "path": "/a/-", "value": 3},
            {"op": "replace", "path": "/m/x~1y", "value": 2},
            {"op": "copy", "from": "/a", "path": "/b"},
            {"op": "move", "from": "/m", "path": "/n"},
            {"op": "remove", "path": "/a/0"},
        ]);
        assert_eq!(json_patch(&document, &patch).unwrap(), json!({"a": [2, 3], "b": [1, 2, 3], "n": {"x/y": 2}}));
    }

    #[test]
    fn refuses_json_patches() {
        let document = json!({"a": 1, "l": {}});
        let code = |patch: Value| json_patch(&document, &patch).unwrap_err().code;
        assert_eq!(code(json!({})), 400);
        assert_eq!(code(json!([{"op": "fly", "path": "/a"}])), 400);
        assert_eq!(code(json!([{"op": "add", "path": "a", "value": 1}])), 400);
        assert_eq!(code(json!([{"op": "remove", "path": "/b"}])), 422);
        assert_eq!(code(json!([{"op": "test", "path": "/a", "value": 2}])), 422);
        assert_eq!(code(Value::Array(vec![json!({"op": "test", "path": "/a", "value": 1}); MAX_OPERATIONS + 1])), 413);
        let nest: Vec<Value> =
            (1..200).map(|i| json!({"op": "add", "path": format!("/l{}", "/x".repeat(i)), "value": {}})).collect();
        assert_eq!(code(Value::Array(nest)), 422);
        let double: Vec<Value> =
            (0..60).map(|i| json!({"op": "copy", "from": "", "path": format!("/l/{i}")})).collect();
        assert!(matches!(code(Value::Array(double)), 413 | 422));
    }

    #[test]
    fn applies_merge_patches() {
        let document = json!({"a": {"b": 1, "c": 2}, "l": [1]});
        let patch = json!({"a": {"b": null, "d": {"e": null}}, "l": [2]});
        assert_eq!(merge_patch(&document, &patch).unwrap(), json!({"a": {"c": 2, "d": {}}, "l": [2]}));
        assert_eq!(merge_patch(&document, &json!([1])).unwrap_err().code, 400);
    }

    #[test]
    fn tells_patches_apart() {
        assert_eq!(PatchKind::of("application/merge-patch+json; charset=UTF-8", false), Ok(PatchKind::Merge));
        assert_eq!(PatchKind::of("application/strategic-merge-patch+json", true), Ok(PatchKind::Strategic));
        let status = PatchKind::of("application/strategic-merge-patch+json", false).unwrap_err();
        assert_eq!(
            (status.code, status.message.as_str()),
            (
                415,
                "the body of the request was in an unknown format - accepted media types include: \
                 application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml"
            )
        );
    }

    pub(crate) fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            (0..4i64).prop_map(Value::from),
            "[ab]{0,1}|\\$patch|delete|replace|merge".prop_map(Value::from),
        ];
        let key = prop_oneof![
            "a|b|l|s|name",
            Just("$patch".to_owned()),
            Just("$retainKeys".to_owned()),
            "\\$setElementOrder/[als]",
            "\\$deleteFromPrimitiveList/[als]",
        ];
        leaf.prop_recursive(4, 24, 4, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map(key.clone(), inner, 0..4)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn never_panics(document in any_json(), patch in any_json(), op in "add|remove|replace|move|copy|test",
            path in "(/[ab01\\-~]){0,3}|[/~a]{0,4}", from in "(/[ab01\\-]){0,3}")
        {
            let _ = merge_patch(&document, &patch);
            let operation = json!([{"op": op, "path": path, "from": from, "value": patch}]);
            let _ = json_patch(&document, &operation);
        }
    }
}
