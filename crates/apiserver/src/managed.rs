//! Who owns which field: `metadata.managedFields`.

use crate::kinds::Kind;
use crate::server::Context;
use godwit_machinery::apply::{self, Writer};
use godwit_machinery::status::Status;
use jiff::Timestamp;
use serde_json::Value;

/// Who writes, through which door.
#[derive(Debug, Clone)]
pub(crate) struct Manager {
    name: String,
    subresource: String,
    /// The fields are already accounted for.
    accounted: bool,
}

impl Manager {
    /// The manager that the request names, or the one that its user agent stands for.
    pub(crate) fn of(cx: &Context) -> Result<Self, Status> {
        let named = cx.params.get("fieldManager");
        let options = match cx.info.verb {
            "create" => "CreateOptions",
            "update" => "UpdateOptions",
            _ => "PatchOptions",
        };
        apply::check_manager(named, false, options)?;
        let name = match named {
            "" => apply::default_manager(cx.header("user-agent")),
            named => named.to_owned(),
        };
        let name = if name.is_empty() { "unknown".to_owned() } else { name };
        Ok(Self { name, subresource: cx.info.subresource.clone(), accounted: false })
    }

    /// The server itself.
    pub(crate) fn server() -> Self {
        Self { name: "godwit-apiserver".to_owned(), subresource: String::new(), accounted: false }
    }

    /// For objects that apply has already written the owners into.
    pub(crate) fn accounted() -> Self {
        Self { accounted: true, ..Self::server() }
    }

    fn track(&self, kind: &Kind, old: Option<&Value>, mut new: Value) -> Value {
        if !self.accounted {
            let api_version = kind.api_version();
            apply::track_update(&kind.resource.schema, old, &mut new, &self.writer(&api_version));
        }
        new
    }

    fn writer<'a>(&'a self, api_version: &'a str) -> Writer<'a> {
        Writer { manager: &self.name, api_version, subresource: &self.subresource, now: Timestamp::now() }
    }
}

/// A new object with its first owner.
pub(crate) fn created(kind: &Kind, object: Value, manager: &Manager) -> Value {
    manager.track(kind, None, object)
}

/// A changed object with its owners.
pub(crate) fn updated(kind: &Kind, old: &Value, new: Value, manager: &Manager) -> Value {
    manager.track(kind, Some(old), new)
}

/// What applying leaves of the object that lives.
pub(crate) fn applied(
    kind: &Kind,
    live: Option<&Value>,
    configuration: &Value,
    manager: &Manager,
    force: bool,
) -> Result<Value, Status> {
    let mut configuration = configuration.clone();
    if let Some(map) = configuration.as_object_mut() {
        match manager.subresource.as_str() {
            "status" => map.retain(|key, _| matches!(key.as_str(), "apiVersion" | "kind" | "metadata" | "status")),
            _ if kind.resource.status_subresource => {
                map.remove("status");
            }
            _ => {}
        }
    }
    let api_version = kind.api_version();
    apply::apply(&kind.resource.schema, live, &configuration, force, &manager.writer(&api_version))
}
