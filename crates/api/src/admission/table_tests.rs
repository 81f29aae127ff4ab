//! The table of refusals, held against the rules; and the page that is made of it.

#![allow(clippy::expect_used, reason = "a test may fail")]

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Value, json};

use super::testing::World;
use super::{Operation, Request, User, mutate, validate};
use crate::Installation;
use crate::access::{CONTROLLER, HANDLER};
use crate::names::EXTRA_NODE_NAME;

#[path = "../../fixtures/refusals.rs"]
mod table;

use table::{Case, cases, merge};

fn user(name: &str) -> User {
    let (name, node) = name.split_once('@').map_or((name, None), |(name, node)| (name, Some(node)));
    let extra = node.map(|node| (EXTRA_NODE_NAME.to_owned(), vec![node.to_owned()])).into_iter().collect();
    let name = match name {
        "controller" => Installation::USUAL.user(CONTROLLER),
        "handler" => Installation::USUAL.user(HANDLER),
        other => other.to_owned(),
    };
    User { name, groups: Vec::new(), extra }
}

/// As it is stored: through the rules for its creation, with the status that the table gives it.
fn stored(world: &World, object: &Value) -> Value {
    let mut object = object.clone();
    object["metadata"]["uid"] = json!(format!("uid-{}", object["metadata"]["name"].as_str().unwrap_or_default()));
    if object["metadata"]["namespace"].is_null() && !table::is_cluster_scoped(&object) {
        object["metadata"]["namespace"] = json!("default");
    }
    let status = object["status"].take();
    let request = Request { user: &user("controller"), ..request(world, Operation::Create, &object, None) };
    let mut stored = mutate(&request).expect("nothing is refused by a mutation").object;
    merge(&mut stored, &json!({ "status": status }));
    stored
}

fn request<'a>(world: &'a World, operation: Operation, object: &'a Value, old: Option<&'a Value>) -> Request<'a> {
    let group =
        object["apiVersion"].as_str().and_then(|version| version.split_once('/')).map_or("", |(group, _)| group);
    let namespace = if table::is_cluster_scoped(object) { "" } else { "default" };
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or(namespace);
    Request { group, namespace, ..world.request(operation, Some(object), old) }
}

fn judge(case: &Case) -> Result<Vec<String>, Box<super::Denial>> {
    let mut world = World::new(Vec::new());
    let mut kubevirt = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "KubeVirt",
        "metadata": { "name": "kubevirt", "namespace": "kubevirt", "annotations": case.annotations },
        "spec": { "configuration": case.configuration.clone().unwrap_or(json!({})) },
    });
    let old = match (&case.old, case.kind.as_str()) {
        (Some(old), "KubeVirt") => {
            merge(&mut kubevirt, old);
            Some(kubevirt.clone())
        }
        (Some(old), _) => Some(stored(&world, old)),
        (None, _) => None,
    };
    world.objects.push(kubevirt);
    world.objects.push(json!({
        "kind": "ConfigMap", "metadata": { "name": "kubevirt-config", "namespace": "kubevirt" }, "data": case.config,
    }));
    for part in &case.world {
        let object = stored(&world, &part.object);
        world.objects.push(object);
    }
    let user = user(&case.user);
    let (operation, object) = match &old {
        Some(old) => {
            let mut object = old.clone();
            merge(&mut object, &case.object);
            (Operation::Update, object)
        }
        None => (Operation::Create, case.object.clone()),
    };
    let asked = Request { user: &user, ..request(&world, operation, &object, old.as_ref()) };
    let mutated = mutate(&asked)?.object;
    validate(&Request { object: Some(&mutated), ..asked })
}

#[test]
fn every_request_is_answered_as_the_table_says() {
    for case in cases() {
        let answer = judge(&case);
        match (&case.says, answer) {
            (None, Ok(_)) => {}
            (None, Err(denial)) => panic!("{}: refused: {}", case.name, denial.message),
            (Some(_), Ok(_)) => panic!("{}: taken", case.name),
            (Some(says), Err(denial)) => {
                let says = says.replace("<namespace>", "default").replace("<uid:first>", "uid-first");
                let expected = format!("admission webhook \"{}\" denied the request: {says}", case.webhook);
                assert_eq!(denial.message, expected, "{}", case.name);
                assert_eq!((denial.code, denial.reason.as_str()), case.refused_with(), "{}", case.name);
                let fields: Vec<&str> = denial.causes.iter().map(|cause| cause.field.as_str()).collect();
                assert_eq!(fields, case.field.as_deref().into_iter().collect::<Vec<_>>(), "{}", case.name);
            }
        }
    }
}

/// The page for people.
fn page() -> String {
    let mut page = String::from(
        "# What is refused, and in which words\n\n\
         Rendered from `crates/api/fixtures/refusals.yaml` by a test of the crate `godwit-api`; after a change of the table \
         run\n`GODWIT_BLESS=1 cargo test -p godwit-api refusals_page` to write it anew. The same table is held against the \
         embedded API server\nand against `godwit webhook`, so that both say the same.\n\n\
         A client reads `admission webhook \"<webhook>\" denied the request: <text>`. Texts, webhooks' names and fields are \
         KubeVirt's where\nKubeVirt has the rule. A refusal that names a field is HTTP 422 (`Invalid`, the field in \
         `details.causes`), one that does not is\n400 (`BadRequest`), or 403 (`Forbidden`) where the reference's webhook is one that only says no. Evictions are refused with 429 (docs/evacuation.md). \
         Fields of KubeVirt's API that godwit does not\nimplement are refused when the guest would differ without them, and \
         warned of otherwise; the answer names the field.\nDeleting a migration is never refused: it cancels it.\n",
    );
    let mut by_webhook: BTreeMap<String, Vec<Case>> = BTreeMap::new();
    for case in cases().into_iter().filter(|case| case.says.is_some()) {
        by_webhook.entry(case.webhook.clone()).or_default().push(case);
    }
    for (webhook, cases) in by_webhook {
        let _ = writeln!(page, "\n## {webhook}\n\n| request | code | field | text |\n|---|---|---|---|");
        for case in cases {
            let code = case.refused_with().0;
            let field =
                case.field.filter(|field| !field.is_empty()).map(|field| format!("`{field}`")).unwrap_or_default();
            let says = case.says.unwrap_or_default().replace('|', "\\|");
            let _ = writeln!(page, "| {} | {code} | {field} | {says} |", case.name);
        }
    }
    page.push_str("\n## Taken\n\nWhat might be thought to be refused and is not:\n\n");
    for case in cases().into_iter().filter(|case| case.says.is_none()) {
        let _ = writeln!(page, "- {}", case.name);
    }
    page
}

#[test]
fn refusals_page() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/refusals.md");
    let page = page();
    if std::env::var_os("GODWIT_BLESS").is_some() {
        std::fs::write(path, &page).expect("docs/refusals.md can be written");
    }
    let written = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        written == page,
        "docs/refusals.md is behind the table: GODWIT_BLESS=1 cargo test -p godwit-api refusals_page"
    );
}
