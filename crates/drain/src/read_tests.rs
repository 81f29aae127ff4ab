//! Reading clusters that have or show little.

use serde_json::{Value, json};

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
    let plan = read::cluster(&client, None).await.unwrap().plan(&["node1".to_owned()], Manner::default()).unwrap();
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
    let read = |client| async move { read::cluster(&client, None).await.err().unwrap() };
    assert!(matches!(read(refusing("/virtualmachineinstances", 404)).await, Error::NoKubeVirt));
    for kind in ["/virtualmachineinstances", "/pods", "/nodes"] {
        let error = read(refusing(kind, 403)).await;
        assert_eq!(error.to_string(), format!("cannot list {}: no", &kind[1..]));
    }
}

/// What is asked for and known where the KubeVirt objects are there, and may be listed in all namespaces or only within theirs.
async fn configured(
    there: &'static [&'static str],
    everywhere: bool,
    wanted: Option<&str>,
) -> (Option<u32>, Vec<String>, Vec<String>) {
    let (client, asked) = server(move |_, path| {
        let object = |namespace: &&str| {
            let migrations = json!({"parallelMigrationsPerCluster": namespace.len()});
            json!({
                "apiVersion": "kubevirt.io/v1", "kind": "KubeVirt", "metadata": {"name": "any", "namespace": namespace},
                "spec": {"configuration": {"migrations": migrations}},
            })
        };
        let within = |namespace: &&&str| path.contains(&format!("/namespaces/{namespace}/"));
        let found: Vec<Value> = match path.contains("/namespaces/") {
            true => there.iter().filter(within).map(object).collect(),
            false => there.iter().map(object).collect(),
        };
        let answer = match path.ends_with("/kubevirts") {
            true if !everywhere && !path.contains("/namespaces/") => failure(403, "you may not"),
            true => {
                let mut list = empty(path);
                list["items"] = json!(found);
                (200, list)
            }
            false => (200, empty(path)),
        };
        async move { answer }
    });
    let cluster = read::cluster(&client, wanted).await.unwrap();
    let asked = asked.lock().unwrap().iter().filter(|line| line.contains("/configmaps")).cloned().collect();
    (cluster.world.configuration().parallel_migrations_per_cluster, asked, cluster.notes)
}

#[tokio::test]
async fn the_configuration_is_that_of_the_one_kubevirt_wherever_it_is_or_of_the_one_that_is_meant() {
    let maps = |namespace: &str, asked: &[String]| {
        assert!(asked.iter().all(|line| line.contains(&format!("/namespaces/{namespace}/configmaps"))), "{asked:?}");
        assert_eq!(asked.len(), 1, "{asked:?}");
    };
    for wanted in [None, Some("openshift-cnv")] {
        let (parallel, asked, notes) = configured(&["openshift-cnv"], true, wanted).await;
        assert_eq!((parallel, notes), (Some(13), Vec::new()));
        maps("openshift-cnv", &asked);
    }
    // Of two the usual one counts, if none is named.
    let (parallel, asked, _) = configured(&["cnv", "kubevirt"], true, None).await;
    assert_eq!(parallel, Some(8));
    maps("kubevirt", &asked);
    assert_eq!(configured(&["cnv", "kubevirt"], true, Some("cnv")).await.0, Some(3));
    // Nobody shows where it is.
    let (parallel, asked, _) = configured(&["cnv", "kubevirt"], false, Some("cnv")).await;
    assert_eq!(parallel, Some(3));
    maps("cnv", &asked);
    assert_eq!(configured(&["kubevirt"], false, None).await.0, Some(8));
    // What is not there is said.
    let (parallel, _, notes) = configured(&["cnv"], true, Some("kubevirt")).await;
    assert_eq!(parallel, Some(5));
    assert!(
        notes
            .iter()
            .any(|note| note.contains("no KubeVirt object in the namespace kubevirt") && note.contains("in cnv")),
        "{notes:?}"
    );
}
