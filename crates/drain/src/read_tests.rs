//! Reading clusters that have or show little.

use serde_json::Value;

use crate::run_tests::{empty, failure, server};
use crate::{Error, Manner, read, show};

/// A server that has no kind of ours and shows little more than it must.
fn foreign(path: &str) -> (u16, Value) {
    let hidden = ["/kubevirts", "/resourcequotas", "/poddisruptionbudgets", "/configmaps"];
    match path {
        path if path.contains("godwit.io") || path.contains("nodemaintenance") => failure(404, "not found"),
        path if hidden.iter().any(|kind| path.ends_with(kind)) => failure(403, "you may not"),
        path => (200, empty(path)),
    }
}

#[tokio::test]
async fn a_cluster_that_has_and_shows_little_gets_a_plan_that_says_what_it_could_not_see() {
    let (client, asked) = server(|_, path| {
        let answer = foreign(path);
        async move { answer }
    });
    let plan = read::cluster(&client).await.unwrap().plan(&["node1".to_owned()], Manner::default()).unwrap();
    assert!(!plan.is_blocked());
    let said = |text: &str| plan.notes.iter().any(|note| note.contains(text));
    assert!(said("which limits and which strategy are configured, so the defaults are taken; kubevirts.kubevirt.io"));
    assert!(
        said("whether quotas let target pods in; resourcequotas could not be read: you may not"),
        "{:?}",
        plan.notes
    );
    assert!(said("which of them keep a pod where it is; poddisruptionbudgets.policy could not be read: you may not"));
    assert!(said(
        "this cluster does not serve migrationrecords.godwit.io, nodemaintenances.nodemaintenance.medik8s.io"
    ));
    assert!(!said("persistentvolumeclaims"), "what could be read is no matter: {:?}", plan.notes);
    let told = show::plan(&plan, None);
    assert!(plan.notes.iter().all(|note| told.contains(&format!("  note: {note}\n"))), "{told}");
    assert!(asked.lock().unwrap().iter().all(|request| request.starts_with("GET ")), "it only reads");
}

#[tokio::test]
async fn what_a_plan_cannot_do_without_is_named() {
    let refusing = |kind: &'static str, code: u16| {
        let (client, _) = server(move |_, path| {
            let answer = if path.ends_with(kind) { failure(code, "no") } else { (200, empty(path)) };
            async move { answer }
        });
        client
    };
    let read = |client| async move { read::cluster(&client).await.err().unwrap() };
    assert!(matches!(read(refusing("/virtualmachineinstances", 404)).await, Error::NoKubeVirt));
    for kind in ["/virtualmachineinstances", "/pods", "/nodes"] {
        let error = read(refusing(kind, 403)).await;
        assert_eq!(error.to_string(), format!("cannot list {}: no", &kind[1..]));
    }
}
