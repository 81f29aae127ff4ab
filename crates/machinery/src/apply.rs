//! Server-side apply, and the bookkeeping of field owners on every other write.
//!
//! An applier owns what it applied. What it applied once and does not any more is taken away, unless somebody else owns
//! it. What somebody else owns cannot be changed without force. All others (create, update, patch) own what they change.

mod fields;
mod managers;
mod walk;

pub use fields::FieldSet;

use crate::body::{MAX_DEPTH, depth};
use crate::schema::Schema;
use crate::status::{Cause, Details, Status};
use jiff::Timestamp;
use managers::{Entry, Operation};
use serde_json::{Value, json};

/// Who writes, through which door and when.
#[derive(Debug, Clone, Copy)]
pub struct Writer<'a> {
    /// `fieldManager` of the query; for other writes than apply, else [`default_manager`] of the user agent.
    pub manager: &'a str,
    /// Such as `kubevirt.io/v1`.
    pub api_version: &'a str,
    /// `status`, … or empty.
    pub subresource: &'a str,
    /// The time of the write.
    pub now: Timestamp,
}

/// The manager of a request without `fieldManager`: the user agent up to its first slash.
pub fn default_manager(user_agent: &str) -> String {
    const LONGEST: usize = 128;
    user_agent.split('/').next().unwrap_or_default().chars().filter(|c| !c.is_control()).take(LONGEST).collect()
}

/// Checks `fieldManager` of a query; `required` for apply.
///
/// # Errors
/// 422 with the rule that is broken; `options` is the kind of the options, such as `PatchOptions`.
pub fn check_manager(manager: &str, required: bool, options: &str) -> Result<(), Status> {
    const LONGEST: u64 = 128;
    let cause = if manager.is_empty() && required {
        Cause::required("fieldManager", "is required for apply patch")
    } else if manager.chars().count() as u64 > LONGEST {
        Cause::too_long("fieldManager", LONGEST)
    } else if manager.chars().any(char::is_control) {
        Cause::invalid("fieldManager", &manager.into(), "should only contain printable characters")
    } else {
        return Ok(());
    };
    Err(Status::invalid("meta.k8s.io", options, "", vec![cause]))
}

/// Fields that nobody owns: they name the object or belong to the server.
fn strip(mut set: FieldSet) -> FieldSet {
    for name in ["f:apiVersion", "f:kind"] {
        set.remove_tree(name);
    }
    set.edit_below("f:metadata", |metadata| {
        for name in [
            "name",
            "namespace",
            "creationTimestamp",
            "selfLink",
            "uid",
            "generation",
            "managedFields",
            "resourceVersion",
        ] {
            metadata.remove_tree(&format!("f:{name}"));
        }
    });
    set.remove_member("f:metadata");
    set
}

fn others<'e>(entries: &'e [Entry], me: &Entry) -> impl Iterator<Item = &'e Entry> {
    let me = me.clone();
    entries.iter().filter(move |entry| !entry.is_same(&me))
}

/// Applies `applied` to the object that lives (or to nothing). `status` must have been taken out of `applied` by the
/// caller if this door does not lead to it. The result is the whole new object with its `managedFields`; if nothing
/// changes it equals `live`.
///
/// # Errors
/// 400 if `applied` carries `managedFields`, is nested too deep or breaks the rules of its lists; 409 with a cause for
/// each field if others own what would change and `force` is not set.
pub fn apply(
    schema: &Schema,
    live: Option<&Value>,
    applied: &Value,
    force: bool,
    writer: &Writer<'_>,
) -> Result<Value, Status> {
    if !applied.is_object() {
        return Err(Status::bad_request("the applied configuration must be an object"));
    }
    if depth(applied, MAX_DEPTH + 1) > MAX_DEPTH {
        return Err(Status::bad_request("the applied configuration exceeds the max depth"));
    }
    if applied.pointer("/metadata/managedFields").is_some_and(|m| m.as_array().is_none_or(|list| !list.is_empty())) {
        return Err(Status::bad_request("metadata.managedFields must be nil"));
    }
    let mut applied = walk::without_nulls(schema, applied);
    crate::meta::set(&mut applied, "managedFields", None);
    let errors = walk::check_lists(schema, &applied);
    if !errors.is_empty() {
        let shown = errors.iter().take(20).cloned().collect::<Vec<_>>().join("\n");
        return Err(Status::bad_request(format!("failed to create typed patch object: {shown}")));
    }

    let nothing = json!({});
    let before = live.unwrap_or(&nothing);
    let mut entries = match (managers::read(before), live) {
        (Some(entries), _) => entries,
        (None, None) => Vec::new(),
        (None, Some(live)) => {
            let fields = strip(walk::fields_of(schema, live));
            let first = Writer { manager: "before-first-apply", subresource: "", ..*writer };
            vec![Entry::new(&first, Operation::Update, fields)]
        }
    };

    let mut me = Entry::new(writer, Operation::Apply, strip(walk::fields_of(schema, &applied)));
    let merged = walk::merge(schema, before, &applied);
    let changed = strip(walk::difference(schema, before, &merged).changed);
    if !force {
        refuse_conflicts(&entries, &me, &changed)?;
    }

    let mut kept = me.fields.clone();
    for entry in entries.iter_mut().filter(|entry| !entry.is_same(&me)) {
        entry.fields = entry.fields.difference(&changed);
        kept = kept.union(&entry.fields);
    }
    let last = entries.iter().find(|entry| entry.is_same(&me));
    let mut result = merged;
    if let Some(last) = last {
        let gone = last.fields.difference(&me.fields);
        result = walk::remove(schema, result, &gone, &kept);
        if last.fields == me.fields && last.api_version == me.api_version {
            me.time.clone_from(&last.time);
        }
    }
    // What went is nobody's any more, wherever it was written down.
    let removed = walk::difference(schema, before, &result).removed;
    for entry in entries.iter_mut().filter(|entry| !entry.is_same(&me)) {
        entry.fields = entry.fields.difference(&removed);
    }
    let mut next: Vec<Entry> = others(&entries, &me).cloned().collect();
    next.push(me);
    managers::write(&mut result, next);
    Ok(result)
}

fn refuse_conflicts(entries: &[Entry], me: &Entry, changed: &FieldSet) -> Result<(), Status> {
    let mut conflicts: Vec<(String, Vec<String>)> = Vec::new();
    for entry in others(entries, me) {
        let paths = entry.fields.intersection(changed).paths();
        if !paths.is_empty() {
            conflicts.push((entry.describe(), paths));
        }
    }
    conflicts.sort();
    let total: usize = conflicts.iter().map(|(_, paths)| paths.len()).sum();
    let message = match conflicts.as_slice() {
        [] => return Ok(()),
        [(owner, paths)] if total == 1 => {
            format!("Apply failed with 1 conflict: conflict with {owner}: {}", paths.concat())
        }
        _ => {
            let parts: Vec<String> = conflicts
                .iter()
                .map(|(owner, paths)| format!("conflicts with {owner}:\n- {}", paths.join("\n- ")))
                .collect();
            format!("Apply failed with {total} conflicts: {}", parts.join("\n"))
        }
    };
    let causes = conflicts
        .into_iter()
        .flat_map(|(owner, paths)| {
            paths.into_iter().map(move |field| Cause {
                reason: "FieldManagerConflict".to_owned(),
                message: format!("conflict with {owner}"),
                field,
            })
        })
        .collect();
    Err(Status::new(409, "Conflict", message).with_details(Details { causes, ..Details::default() }))
}

/// Keeps `managedFields` of `new` after a create, update or patch by `writer`: it owns what it changed, and nobody owns
/// what is gone. Call it last, when defaults and what the server fills in are in their places.
pub fn track_update(schema: &Schema, old: Option<&Value>, new: &mut Value, writer: &Writer<'_>) {
    if managers::is_reset(new) {
        crate::meta::set(new, "managedFields", None);
        return;
    }
    let nothing = json!({});
    let before = old.unwrap_or(&nothing);
    let mut entries = managers::read(new).or_else(|| managers::read(before)).unwrap_or_default();
    let difference = walk::difference(schema, before, new);
    let (changed, removed) = (strip(difference.changed), strip(difference.removed));
    if changed.is_empty() && removed.is_empty() {
        managers::write(new, entries);
        return;
    }
    let mut me = Entry::new(writer, Operation::Update, changed.clone());
    for entry in entries.iter_mut().filter(|entry| !entry.is_same(&me)) {
        entry.fields = entry.fields.difference(&changed).difference(&removed);
    }
    if let Some(last) = entries.iter().find(|entry| entry.is_same(&me)) {
        me.fields = last.fields.clone().union(&changed).difference(&removed);
        if me.fields == last.fields {
            // The same fields with other values: the time still says when.
            me.time = crate::meta::time(writer.now);
        }
    }
    let mut next: Vec<Entry> = others(&entries, &me).cloned().collect();
    next.push(me);
    managers::write(new, next);
}

#[cfg(test)]
mod tests;
