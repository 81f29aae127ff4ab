//! docs/coming-from-kubevirt.md: what is supported and what is not, field by field, from the types themselves.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fmt::Write;

use godwit_api::crds;
use godwit_api::unimplemented::{Effect, Field, VM_FIELDS, VMI_FIELDS};
use serde_json::Value;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/coming-from-kubevirt.md");

/// Kubernetes' own types, whose members are not told.
const WHOLE: [&str; 4] = ["affinity", "tolerations", "topologySpreadConstraints", "metadata"];

/// KubeVirt's kinds that are not served, by plural and group.
const NOT_SERVED: &[(&str, &str, &str)] = &[
    ("virtualmachineinstancereplicasets", "kubevirt.io", "several VMIs of one template; use VirtualMachines"),
    ("virtualmachineinstancepresets", "kubevirt.io", "removed from KubeVirt as well"),
    ("virtualmachinepools", "pool.kubevirt.io", "several VMs of one template"),
    ("virtualmachineinstancetypes", "instancetype.kubevirt.io", "a VM that names one is refused"),
    ("virtualmachineclusterinstancetypes", "instancetype.kubevirt.io", "a VM that names one is refused"),
    ("virtualmachinepreferences", "instancetype.kubevirt.io", "a VM that names one is refused"),
    ("virtualmachineclusterpreferences", "instancetype.kubevirt.io", "a VM that names one is refused"),
    ("virtualmachinesnapshots", "snapshot.kubevirt.io", "use snapshots of the claims (CSI)"),
    ("virtualmachinerestores", "snapshot.kubevirt.io", "use snapshots of the claims (CSI)"),
    ("virtualmachineclones", "clone.kubevirt.io", "copy the manifest and its claims"),
    ("virtualmachineexports", "export.kubevirt.io", "read the claims by a pod"),
    ("virtualmachinebackups", "backup.kubevirt.io", "back up the claims"),
];

fn schema_of(kind: &str, group: &str) -> Value {
    let is = |crd: &Value| crd["spec"]["names"]["kind"] == kind && crd["spec"]["group"] == group;
    let crd = crds().into_iter().find(is).unwrap_or_else(|| panic!("no {kind}"));
    crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone()
}

/// Path and meaning of each field below a node. What is not implemented is not told in its parts.
fn fields(schema: &Value, at: &str, missing: &[Field], found: &mut BTreeMap<String, String>) {
    let (schema, at) = match schema.get("items") {
        Some(items) => (items, format!("{at}[]")),
        None => (schema, at.to_owned()),
    };
    for (name, inner) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let path = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
        let below = inner.get("items").unwrap_or(inner);
        let is_whole = WHOLE.contains(&name.as_str()) || missing.iter().any(|field| field.path == path);
        if below.get("properties").is_none() || is_whole {
            let meaning = inner.get("description").and_then(Value::as_str).unwrap_or_default();
            found.insert(path, meaning.replace('|', "\\|"));
        } else {
            fields(inner, &path, missing, found);
        }
    }
}

/// A table of what is below `at`, but for `without`.
fn table(page: &mut String, schema: &Value, at: &str, without: &[&str], missing: &[Field]) {
    let mut node = schema;
    for step in at.split('.') {
        node = &node["properties"][step];
    }
    let mut found = BTreeMap::new();
    fields(node, "", missing, &mut found);
    found.retain(|path, _| without.iter().all(|prefix| path != prefix && !path.starts_with(&format!("{prefix}."))));
    let _ = writeln!(page, "| field of `{at}` | | |\n|---|---|---|");
    for (path, meaning) in found {
        let (mark, text) = match missing.iter().find(|field| field.path == path) {
            None => ("yes", meaning),
            Some(Field { effect: Effect::Harmless, why, .. }) => ("warned of", (*why).to_owned()),
            Some(Field { effect: Effect::GuestDiffers, why, .. }) => ("**refused**", (*why).to_owned()),
        };
        let _ = writeln!(page, "| `{path}` | {mark} | {text} |");
    }
}

fn page() -> String {
    let mut page = String::from(
        "# Coming from KubeVirt\n\n\
         Written from the types by a test of the crate `godwit-api`; after a change of them run\n\
         `GODWIT_BLESS=1 cargo test -p godwit-api --test coming_page` to write it anew.\n\n\
         Manifests, `kubectl` and `virtctl` stay as they are: the groups, kinds, names, labels, conditions, events and refusals are \
         KubeVirt's.\nWhat differs is below. A field of KubeVirt's API that is not implemented is never passed over in silence: where the \
         guest is the\nsame without it the answer carries a warning that names it, where the guest would be another one the \
         object is refused.\nA field that KubeVirt does not have either is refused by `kubectl apply` (strict validation), as there.\n\n\
         How to get a cluster's VMs over is in [install.md](install.md#a-cluster-that-runs-kubevirt).\n\n\
         ## Kinds\n\n| kind | group | versions |\n|---|---|---|\n",
    );
    for crd in crds() {
        let spec = &crd["spec"];
        let versions: Vec<&str> =
            spec["versions"].as_array().unwrap().iter().map(|version| version["name"].as_str().unwrap()).collect();
        let (kind, group) = (spec["names"]["kind"].as_str().unwrap(), spec["group"].as_str().unwrap());
        let _ = writeln!(page, "| {kind} | {group} | {} |", versions.join(", "));
    }
    page.push_str("\nNot served:\n\n| resource | instead |\n|---|---|\n");
    for (plural, group, instead) in NOT_SERVED {
        let _ = writeln!(page, "| {plural}.{group} | {instead} |");
    }
    page.push_str(
        "\nMigrationRecord (`kubectl get mrec`) is godwit's own: the history of migrations. The three NodeMaintenances are those of the \
         node\nmaintenance operators ([maintenance.md](maintenance.md)). NetworkAttachmentDefinitions are Multus'; `godwit \
         manifests` leaves them to it.\nWhat of virtctl works is in [virtctl.md](virtctl.md).\n\n## VirtualMachineInstance\n\n",
    );
    table(&mut page, &schema_of("VirtualMachineInstance", "kubevirt.io"), "spec", &[], VMI_FIELDS);
    page.push_str("\n## VirtualMachine\n\nIn `spec.template.spec` is a VirtualMachineInstance's `spec`, as above.\n\n");
    table(&mut page, &schema_of("VirtualMachine", "kubevirt.io"), "spec", &["template.spec"], VM_FIELDS);
    page.push_str("\n## VirtualMachineInstanceMigration\n\n");
    table(&mut page, &schema_of("VirtualMachineInstanceMigration", "kubevirt.io"), "spec", &[], &[]);
    page.push_str("\n## MigrationPolicy\n\n");
    table(&mut page, &schema_of("MigrationPolicy", "migrations.kubevirt.io"), "spec", &[], &[]);
    page.push_str(
        "\n## KubeVirt\n\nThe installation's settings ([configuration.md](configuration.md) has their meaning and defaults). What of KubeVirt's is not in \
         the\ntable is kept and has no effect; where it is about migrations the object's condition `ConfigurationApplied` names it.\n\n",
    );
    table(&mut page, &schema_of("KubeVirt", "kubevirt.io"), "spec", &[], &[]);
    page
}

#[test]
fn coming_page() {
    let page = page();
    if std::env::var_os("GODWIT_BLESS").is_some() {
        std::fs::write(PAGE, &page).expect("docs/coming-from-kubevirt.md can be written");
    }
    let written = std::fs::read_to_string(PAGE).unwrap_or_default();
    assert!(
        written == page,
        "docs/coming-from-kubevirt.md is behind the types: GODWIT_BLESS=1 cargo test -p godwit-api --test coming_page"
    );
}

/// Each field that is known and not implemented has its line, and none is said to be supported.
#[test]
fn what_is_not_implemented_is_told() {
    let page = page();
    for field in VMI_FIELDS.iter().chain(VM_FIELDS) {
        let mark = if field.effect == Effect::Harmless { "warned of" } else { "**refused**" };
        let line = format!("| `{}` | {mark} | {} |", field.path, field.why);
        assert!(page.contains(&line), "{line}");
        assert!(!page.contains(&format!("| `{}` | yes", field.path)), "{}", field.path);
    }
}

#[test]
fn what_is_not_served_is_not() {
    for (plural, group, _) in NOT_SERVED {
        let is = |crd: &Value| crd["spec"]["names"]["plural"] == *plural && crd["spec"]["group"] == *group;
        assert!(!crds().iter().any(is), "{plural}.{group} is served");
    }
}
