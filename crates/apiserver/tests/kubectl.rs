//! Unmodified kubectls of several versions against a server on a socket.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::{Cluster, Kubectl};
use std::io::{BufRead, BufReader};
use std::process::Stdio;

const VERSIONS: [&str; 3] = ["1.27", "1.30", "1.33"];

const DEFINITION: &str = r"
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: widgets.example.com}
spec:
  group: example.com
  scope: Namespaced
  names: {plural: widgets, singular: widget, kind: Widget, shortNames: [wd], categories: [all]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}}
    additionalPrinterColumns:
    - {name: Size, type: integer, jsonPath: .spec.size}
    - {name: Phase, type: string, jsonPath: .status.phase}
    - {name: Note, type: string, jsonPath: .spec.note, priority: 1}
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            required: [size]
            properties:
              size: {type: integer, minimum: 1, description: How big it is.}
              note: {type: string, default: none}
          status:
            type: object
            properties: {phase: {type: string}}
  - name: v1beta1
    served: true
    storage: false
    deprecated: true
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
";

const WIDGET: &str = r"
apiVersion: example.com/v1
kind: Widget
metadata: {name: w1, labels: {app: x}}
spec: {size: 3}
";

const NODE: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: n1}
status:
  capacity: {cpu: "2", memory: 1Gi, pods: "100"}
  conditions: [{type: Ready, status: "True", reason: KubeletReady, message: ok}]
  addresses: [{type: InternalIP, address: 127.0.0.1}]
"#;

const POD: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: p1, labels: {app: x}}
spec: {nodeName: n1, containers: [{name: c, image: busybox, resources: {limits: {cpu: "1", memory: 64Mi}}}]}
"#;

/// Runs a story with every kubectl that is there, each on a server of its own.
fn with_each(story: impl Fn(&Cluster, &Kubectl)) {
    for version in VERSIONS {
        let cluster = Cluster::start();
        if let Some(kubectl) = cluster.kubectl(version) {
            story(&cluster, &kubectl);
        }
    }
}

#[track_caller]
fn has(text: &str, wanted: &str) {
    assert!(text.contains(wanted), "expected {wanted:?} in:\n{text}");
}

/// The words of the line that begins with `first`.
#[track_caller]
fn row(table: &str, first: &str) -> Vec<String> {
    let line = table.lines().find(|line| line.split_whitespace().next() == Some(first));
    let line = line.unwrap_or_else(|| panic!("no row {first} in:\n{table}"));
    line.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn custom_resources() {
    with_each(|_, k| {
        has(&k.good(&["apply", "-f", "-"], DEFINITION), "created");
        has(&k.good(&["apply", "-f", "-"], DEFINITION), "unchanged");
        k.good(&["wait", "--for=condition=Established", "--timeout=10s", "crd/widgets.example.com"], "");
        has(&k.good(&["api-resources"], ""), "widgets");
        has(&k.good(&["explain", "widget.spec.size"], ""), "How big it is.");

        has(&k.good(&["apply", "-f", "-"], WIDGET), "widget.example.com/w1 created");
        has(&k.good(&["apply", "-f", "-"], WIDGET), "widget.example.com/w1 unchanged");
        assert_eq!(row(&k.good(&["get", "wd"], ""), "w1"), ["w1", "3"]);
        assert_eq!(row(&k.good(&["get", "wd", "-o", "wide"], ""), "w1"), ["w1", "3", "none"]);
        assert_eq!(k.good(&["get", "wd", "w1", "-o", "jsonpath={.spec.size} {.metadata.generation}"], ""), "3 1");
        has(&k.good(&["get", "widgets.v1beta1.example.com"], ""), "Warning: example.com/v1beta1 Widget is deprecated");
        has(&k.good(&["get", "wd", "w1", "-o", "yaml"], ""), "note: none");

        k.good(&["patch", "wd", "w1", "--type=merge", "-p", r#"{"spec":{"size":5}}"#], "");
        k.good(&["patch", "wd", "w1", "--type=json", "-p", r#"[{"op":"add","path":"/spec/note","value":"n"}]"#], "");
        has(&k.bad(&["patch", "wd", "w1", "-p", r#"{"spec":{"size":7}}"#], ""), "is not supported by example.com/v1");
        let status = r#"{"status":{"phase":"Up"},"spec":{"size":9}}"#;
        k.good(&["patch", "wd", "w1", "--type=merge", "--subresource=status", "-p", status], "");
        k.good(&["patch", "wd", "w1", "--type=merge", "-p", r#"{"status":{"phase":"Down"}}"#], "");
        assert_eq!(row(&k.good(&["get", "wd"], ""), "w1"), ["w1", "5", "Up"]);
        assert_eq!(k.good(&["get", "wd", "w1", "-o", "jsonpath={.metadata.generation}"], ""), "3");
        k.good(&["wait", "--for=jsonpath={.status.phase}=Up", "--timeout=10s", "wd/w1"], "");

        k.good(&["label", "wd", "w1", "tier=a"], "");
        k.good(&["annotate", "wd", "w1", "why=because"], "");
        has(&k.good(&["get", "wd", "-l", "tier in (a, b)"], ""), "w1");
        has(&k.good(&["get", "wd", "-l", "tier!=a"], ""), "No resources found");
        has(&k.good(&["describe", "wd", "w1"], ""), "why: because");

        let bad = WIDGET.replace("size: 3", "size: 0, odd: 1");
        has(&k.bad(&["apply", "-f", "-"], &bad), "odd");
        let bad = WIDGET.replace("size: 3", "size: 0");
        has(&k.bad(&["apply", "--validate=false", "-f", "-"], &bad), "spec.size: Invalid value: 0");
        let stale = WIDGET.replace("labels:", "resourceVersion: '1', labels:");
        has(&k.bad(&["replace", "-f", "-"], &stale), "the object has been modified");

        has(&k.good(&["delete", "wd", "w1"], ""), "deleted");
        has(&k.bad(&["get", "wd", "w1"], ""), "Error from server (NotFound): widgets.example.com \"w1\" not found");
        k.good(&["create", "-f", "-"], WIDGET);
        k.good(&["delete", "crd", "widgets.example.com", "--timeout=10s"], "");
        // From its cache or from the server, it knows that there is no such thing.
        k.bad(&["get", "wd"], "");
    });
}

#[test]
fn server_side_apply() {
    with_each(|_, k| {
        let map = |value: &str| {
            format!(
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: a}}\ndata: {{shared: {value}, own-{value}: x}}\n"
            )
        };
        let apply = |manager: &str, more: &[&str], value: &str, good: bool| {
            let field_manager = format!("--field-manager={manager}");
            let mut args = vec!["apply", "--server-side", "-f", "-", field_manager.as_str()];
            args.extend(more);
            if good { k.good(&args, &map(value)) } else { k.bad(&args, &map(value)) }
        };
        has(&apply("one", &[], "a", true), "serverside-applied");
        apply("one", &[], "a", true);
        let refused = apply("two", &[], "b", false);
        has(&refused, "conflict with \"one\"");
        has(&refused, ".data.shared");
        apply("two", &["--force-conflicts"], "b", true);
        let data = k.good(&["get", "cm", "a", "-o", "jsonpath={.data}"], "");
        assert_eq!(data, r#"{"own-a":"x","own-b":"x","shared":"b"}"#);
        has(&k.good(&["get", "cm", "a", "-o", "yaml", "--show-managed-fields"], ""), "manager: two");
        // What an applier no longer mentions goes.
        let less = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {shared: b}\n";
        k.good(&["apply", "--server-side", "-f", "-", "--field-manager=two"], less);
        let data = k.good(&["get", "cm", "a", "-o", "jsonpath={.data}"], "");
        assert_eq!(data, r#"{"own-a":"x","shared":"b"}"#);
    });
}

#[test]
fn nodes_and_pods() {
    with_each(|_, k| {
        k.good(&["create", "-f", "-"], NODE);
        assert_eq!(row(&k.good(&["get", "nodes"], ""), "n1")[1], "Ready");
        k.good(&["cordon", "n1"], "");
        assert_eq!(row(&k.good(&["get", "nodes"], ""), "n1")[1], "Ready,SchedulingDisabled");
        k.good(&["uncordon", "n1"], "");
        has(&k.good(&["describe", "node", "n1"], ""), "InternalIP:  127.0.0.1");

        has(&k.good(&["apply", "-f", "-"], POD), "pod/p1 created");
        has(&k.good(&["apply", "-f", "-"], POD), "pod/p1 unchanged");
        assert_eq!(row(&k.good(&["get", "pods", "-o", "wide"], ""), "p1")[..3], ["p1", "0/1", "Pending"]);
        has(&k.good(&["describe", "pod", "p1"], ""), "QoS Class:        Guaranteed");
        has(
            &k.good(&["get", "pods", "--field-selector=spec.nodeName=n1,status.phase!=Failed", "-o", "name"], ""),
            "p1",
        );
        k.good(&["patch", "pod", "p1", "-p", r#"{"spec":{"containers":[{"name":"c","image":"other"}]}}"#], "");
        assert_eq!(k.good(&["get", "pod", "p1", "-o", "jsonpath={.spec.containers[*].image}"], ""), "other");
        let refused = k.bad(&["patch", "pod", "p1", "-p", r#"{"spec":{"hostNetwork":true}}"#], "");
        has(&refused, "pod updates may not change fields other than");
        k.good(&["delete", "pod", "p1", "--wait=false"], "");
        assert_eq!(row(&k.good(&["get", "pods"], ""), "p1")[2], "Terminating");
        k.good(&["delete", "pod", "p1", "--force", "--grace-period=0"], "");
        k.good(&["wait", "--for=delete", "pod/p1", "--timeout=10s"], "");
        has(&k.bad(&["exec", "p1", "--", "true"], ""), "not found");
    });
}

#[test]
fn typed_creates_and_access() {
    with_each(|cluster, k| {
        // From 1.32 on these bodies are protobuf.
        k.good(&["create", "namespace", "team"], "");
        k.good(&["create", "configmap", "c", "--from-literal=a=b", "-n", "team"], "");
        k.good(&["create", "secret", "generic", "s", "--from-literal=a=b", "-n", "team"], "");
        assert_eq!(
            k.good(&["get", "secret", "s", "-n", "team", "-o", "jsonpath={.data.a} {.type}"], ""),
            "Yg== Opaque"
        );
        k.good(&["create", "serviceaccount", "robot", "-n", "team"], "");
        has(&k.good(&["create", "quota", "q", "--hard=pods=3,configmaps=9", "-n", "team"], ""), "created");
        k.good(&["wait", "quota/q", "--for=jsonpath={.status.hard.pods}=3", "-n", "team", "--timeout=10s"], "");
        let table = k.good(&["get", "quota", "q", "-n", "team"], "");
        has(&table, "configmaps: 2/9, pods: 0/3");
        let told = k.good(&["describe", "quota", "q", "-n", "team"], "");
        let lines: Vec<Vec<&str>> = told.lines().map(|line| line.split_whitespace().collect()).collect();
        for wanted in [["Resource", "Used", "Hard"], ["configmaps", "2", "9"], ["pods", "0", "3"]] {
            assert!(lines.contains(&wanted.to_vec()), "{told}");
        }
        k.good(&["create", "poddisruptionbudget", "b", "--selector=app=x", "--min-available=1", "-n", "team"], "");
        k.good(&["create", "role", "r", "--verb=get,list", "--resource=pods", "-n", "team"], "");
        k.good(&["create", "rolebinding", "rb", "--role=r", "--serviceaccount=team:robot", "-n", "team"], "");
        has(&k.good(&["get", "sa,cm,secret,quota,pdb,role,rolebinding", "-n", "team"], ""), "serviceaccount/default");

        let robot = "--as=system:serviceaccount:team:robot";
        assert_eq!(k.good(&["auth", "can-i", "list", "pods", "-n", "team", robot], "").trim(), "yes");
        assert_eq!(k.bad(&["auth", "can-i", "list", "secrets", "-n", "team", robot], "").trim(), "no");
        has(&k.good(&["get", "pods", "-n", "team", robot], ""), "No resources found");
        let refused = k.bad(&["get", "secrets", "-n", "team", robot], "");
        has(
            &refused,
            "User \"system:serviceaccount:team:robot\" cannot list resource \"secrets\" in API group \"\" in the namespace \"team\"",
        );

        // Somebody with a certificate but without rights.
        cluster.files("joe", "joe", &["people"]);
        let joe = Kubectl { config: cluster.kubeconfig("joe"), ..cluster.kubectl(&k.version).unwrap() };
        has(&joe.bad(&["get", "nodes"], ""), "nodes is forbidden: User \"joe\" cannot list resource \"nodes\"");
        has(&joe.bad(&["get", "pods", "--as=x"], ""), "cannot impersonate resource \"users\"");
        // 1.27 asks for alpha and beta versions of the question.
        if k.version != "1.27" {
            has(&joe.good(&["auth", "whoami"], ""), "people");
        }

        k.good(&["delete", "namespace", "team", "--timeout=20s"], "");
        has(&k.bad(&["get", "cm", "c", "-n", "team"], ""), "NotFound");
        has(&k.bad(&["delete", "namespace", "default"], ""), "this namespace may not be deleted");
        has(&k.bad(&["create", "configmap", "c", "-n", "nowhere"], ""), "namespaces \"nowhere\" not found");
    });
}

#[test]
fn watching() {
    with_each(|_, k| {
        k.good(&["create", "configmap", "before", "--from-literal=a=b"], "");
        let mut command = k.command(&["get", "configmaps", "-w", "--output-watch-events"]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut seen = |first: &str, name: &str| {
            for line in lines.by_ref() {
                let line = line.unwrap();
                let words: Vec<_> = line.split_whitespace().collect();
                if words.first() == Some(&first) && words.get(1) == Some(&name) {
                    return;
                }
            }
            panic!("the watch ended before {first} {name}");
        };
        seen("ADDED", "before");
        k.good(&["create", "configmap", "during", "--from-literal=a=b"], "");
        seen("ADDED", "during");
        k.good(&["label", "configmap", "during", "a=b"], "");
        seen("MODIFIED", "during");
        k.good(&["delete", "configmap", "during"], "");
        seen("DELETED", "during");
        child.kill().unwrap();
        child.wait().unwrap();
    });
}

#[test]
fn dry_runs_and_mistakes() {
    with_each(|_, k| {
        has(&k.good(&["apply", "--dry-run=server", "-f", "-"], POD), "created (server dry run)");
        has(&k.bad(&["get", "pod", "p1"], ""), "Error from server (NotFound): pods \"p1\" not found");
        has(&k.bad(&["get", "nonsense"], ""), "the server doesn't have a resource type \"nonsense\"");
        let odd = POD.replace("image: busybox", "image: busybox, imagge: x");
        has(&k.bad(&["apply", "-f", "-"], &odd), "imagge");
        let wrong = POD.replace("containers: [{", "containers: 3, volumes: [{");
        k.bad(&["create", "--validate=false", "-f", "-"], &wrong);
        let name = POD.replace("name: p1", "name: P_1");
        has(&k.bad(&["create", "-f", "-"], &name), "a lowercase RFC 1123 subdomain must consist of");
        has(&k.bad(&["get", "--raw", "/api/v1/pods?labelSelector=a+in"], ""), "BadRequest");
        has(&k.bad(&["get", "--raw", "/api/v1/nonsense"], ""), "could not find the requested resource");
        k.good(&["create", "-f", "-"], POD);
        has(&k.bad(&["create", "-f", "-"], POD), "Error from server (AlreadyExists)");
    });
}
