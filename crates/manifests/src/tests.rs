use std::collections::BTreeSet;
use std::path::Path;

use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
    ValidatingWebhookConfiguration,
};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{Namespace, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::api::scheduling::v1::PriorityClass;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::*;

fn all() -> Vec<Value> {
    parts(&Options::default()).unwrap().into_iter().flat_map(|part| part.objects).collect()
}

fn of<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = objects.iter().find(|one| one["kind"] == kind && one["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name}"))
}

/// Reads an object as its type and writes it again: what the type does not know would be lost.
fn again<T: Serialize + DeserializeOwned>(object: &Value) -> Value {
    serde_json::to_value(serde_json::from_value::<T>(object.clone()).unwrap_or_else(|e| panic!("{e}: {object}")))
        .unwrap()
}

#[test]
fn objects_are_what_kubernetes_reads() {
    for object in all() {
        let read = match object["kind"].as_str().unwrap() {
            "Namespace" => again::<Namespace>(&object),
            "ServiceAccount" => again::<ServiceAccount>(&object),
            "Service" => again::<Service>(&object),
            "Deployment" => again::<Deployment>(&object),
            "DaemonSet" => again::<DaemonSet>(&object),
            "PodDisruptionBudget" => again::<PodDisruptionBudget>(&object),
            "PriorityClass" => again::<PriorityClass>(&object),
            "ClusterRole" => again::<ClusterRole>(&object),
            "ClusterRoleBinding" => again::<ClusterRoleBinding>(&object),
            "Role" => again::<Role>(&object),
            "RoleBinding" => again::<RoleBinding>(&object),
            "APIService" => again::<APIService>(&object),
            "MutatingWebhookConfiguration" => again::<MutatingWebhookConfiguration>(&object),
            "ValidatingAdmissionPolicy" => again::<ValidatingAdmissionPolicy>(&object),
            "ValidatingAdmissionPolicyBinding" => again::<ValidatingAdmissionPolicyBinding>(&object),
            "ValidatingWebhookConfiguration" => again::<ValidatingWebhookConfiguration>(&object),
            // its schema is one of the type's own members, which the test of `crds` reads
            "CustomResourceDefinition" => {
                drop(again::<CustomResourceDefinition>(&object));
                continue;
            }
            other => panic!("{other}"),
        };
        assert_eq!(read, object);
    }
}

#[test]
fn no_object_is_there_twice_and_each_is_where_its_namespace_is() {
    let mut seen = BTreeSet::new();
    for object in all() {
        let text = |pointer| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        let id = [text("/kind"), text("/metadata/namespace"), text("/metadata/name")];
        let known = ["", "kubevirt", "kube-system", "medik8s-leases", "node-maintenance"];
        assert!(known.contains(&id[1].as_str()), "{id:?}");
        assert!(!id[2].is_empty() && seen.insert(id.clone()), "{id:?}");
    }
}

/// Every object that another one names is there.
#[test]
fn what_is_named_is_there() {
    let objects = all();
    let service = of(&objects, "Service", "virt-api");
    for workload in objects.iter().filter(|one| one["kind"] == "Deployment" || one["kind"] == "DaemonSet") {
        let pod = &workload["spec"]["template"];
        of(&objects, "ServiceAccount", pod["spec"]["serviceAccountName"].as_str().unwrap());
        of(&objects, "PriorityClass", pod["spec"]["priorityClassName"].as_str().unwrap());
        let selector = workload["spec"]["selector"]["matchLabels"].as_object().unwrap();
        assert!(selector.iter().all(|(key, value)| pod["metadata"]["labels"][key] == *value), "{workload}");
        let container = &pod["spec"]["containers"][0];
        let ports: Vec<&Value> =
            container["ports"].as_array().into_iter().flatten().map(|port| &port["name"]).collect();
        for probe in ["livenessProbe", "readinessProbe"] {
            match container[probe].get("exec") {
                Some(exec) => {
                    let path = exec["command"][2].as_str().unwrap().strip_prefix("--socket=").unwrap();
                    let served = json!(format!("--health-socket={path}"));
                    assert!(container["command"].as_array().unwrap().contains(&served), "{container}");
                    let folder = Path::new(path).parent().unwrap().to_str();
                    let mounted = container["volumeMounts"].as_array().unwrap();
                    assert!(mounted.iter().any(|mount| mount["mountPath"].as_str() == folder), "{container}");
                }
                None => assert!(ports.contains(&&container[probe]["httpGet"]["port"]), "{container}"),
            }
        }
        for mount in container["volumeMounts"].as_array().into_iter().flatten() {
            let volumes = pod["spec"]["volumes"].as_array().unwrap();
            assert!(volumes.iter().any(|volume| volume["name"] == mount["name"]), "{mount}");
        }
    }
    let served = of(&objects, "Deployment", "virt-api");
    let selector = service["spec"]["selector"].as_object().unwrap();
    assert!(selector.iter().all(|(key, value)| served["spec"]["template"]["metadata"]["labels"][key] == *value));
    let webhooks = objects.iter().flat_map(|one| one["webhooks"].as_array().into_iter().flatten());
    let services = webhooks.map(|webhook| &webhook["clientConfig"]["service"]);
    let aggregated = objects.iter().filter(|one| one["kind"] == "APIService").map(|one| &one["spec"]["service"]);
    for named in services.chain(aggregated) {
        assert_eq!(named["name"], service["metadata"]["name"]);
        assert_eq!(named["namespace"], service["metadata"]["namespace"]);
        assert_eq!(named["port"], service["spec"]["ports"][0]["port"]);
    }
}

#[test]
fn every_webhook_is_asked() {
    let objects = all();
    let webhooks: Vec<&Value> =
        objects.iter().flat_map(|one| one["webhooks"].as_array().into_iter().flatten()).collect();
    assert_eq!(webhooks.len(), godwit_api::admission::routes::ROUTES.len());
    let of = |name: &str| *webhooks.iter().find(|webhook| webhook["name"] == name).unwrap();
    let eviction = of("virt-launcher-eviction-interceptor.kubevirt.io");
    assert_eq!(eviction["rules"][0]["resources"], json!(["pods/eviction"]));
    assert_eq!(eviction["failurePolicy"], "Fail", "an eviction that nobody has looked at ends a guest");
    assert_eq!(
        eviction["matchConditions"][0]["expression"],
        "request.name.startsWith('virt-launcher-') || request.name.startsWith('hp-volume-')"
    );
    let names: BTreeSet<&str> =
        webhooks.iter().map(|webhook| webhook["rules"][0]["apiVersions"][0].as_str().unwrap()).collect();
    assert_eq!(names, ["v1", "v1alpha1", "v1beta1"].into());
}

/// Kubernetes' profile "restricted", but for the handler.
#[test]
fn pods_have_no_privileges_but_the_handlers() {
    for workload in all().iter().filter(|one| one["kind"] == "Deployment") {
        let spec = &workload["spec"]["template"]["spec"];
        assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
        assert_eq!(spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        let container = &spec["containers"][0]["securityContext"];
        assert_eq!(
            (&container["allowPrivilegeEscalation"], &container["capabilities"]["drop"][0]),
            (&json!(false), &json!("ALL"))
        );
        assert!(spec.get("volumes").is_none() && spec.get("hostNetwork").is_none() && spec.get("hostPID").is_none());
    }
    let objects = all();
    let handler = &of(&objects, "DaemonSet", "virt-handler")["spec"]["template"]["spec"];
    assert_eq!(handler["hostNetwork"], true);
    assert!(handler.get("hostIPC").is_none());
}

/// A pod in its node's network has the ports that it declares of the node: the next one, which is started before it goes, would find no
/// place. And at the node's address one pod would be probed for the other.
#[test]
fn two_handlers_have_room_on_one_node() {
    let attached = HandlerNetwork::Attached("fast".into());
    for handler_network in [HandlerNetwork::Node { migrations: None }, HandlerNetwork::Pod, attached] {
        let in_node = matches!(handler_network, HandlerNetwork::Node { .. });
        let options = Options { handler_network, handler_port: 9186, handler_metrics_port: 9188, ..Options::default() };
        let objects: Vec<Value> = parts(&options).unwrap().into_iter().flat_map(|part| part.objects).collect();
        let daemon_set = &of(&objects, "DaemonSet", "virt-handler")["spec"];
        assert_eq!(daemon_set["updateStrategy"]["rollingUpdate"], json!({"maxSurge": 1, "maxUnavailable": 0}));
        let pod = &daemon_set["template"]["spec"];
        let container = &pod["containers"][0];
        assert_eq!(container.get("ports"), None);
        let command = container["command"].as_array().unwrap();
        assert!(command.contains(&json!("--port=9186")) && command.contains(&json!("--health=9188")), "{command:?}");
        let asks = &of(&objects, "Deployment", "virt-api")["spec"]["template"]["spec"]["containers"][0]["command"];
        assert!(asks.as_array().unwrap().contains(&json!("--handler-port=9186")), "{asks}");
        for probe in ["livenessProbe", "readinessProbe"] {
            assert!(container[probe].get("exec").is_some() && container[probe].get("httpGet").is_none(), "{container}");
        }
        // By its name it finds the API server's Service in either.
        let network = (pod.get("hostNetwork").cloned(), pod.get("dnsPolicy").cloned());
        match in_node {
            true => assert_eq!(network, (Some(json!(true)), Some(json!("ClusterFirstWithHostNet")))),
            false => assert_eq!(network, (None, None)),
        }
    }
}

#[test]
fn handlers_are_told_what_migrations_go_over_and_their_pods_are_attached_to_it() {
    let handler = |handler_network| {
        let options = Options { handler_network, namespace: "virt".into(), ..Options::default() };
        let objects: Vec<Value> = parts(&options).unwrap().into_iter().flat_map(|part| part.objects).collect();
        let pod = &of(&objects, "DaemonSet", "virt-handler")["spec"]["template"];
        let command = pod["spec"]["containers"][0]["command"].as_array().unwrap().clone();
        let migrations = command.into_iter().filter(|word| word.as_str().unwrap().starts_with("--migration"));
        (migrations.collect::<Vec<_>>(), pod["metadata"].get("annotations").cloned())
    };
    assert_eq!(handler(HandlerNetwork::Node { migrations: None }), (vec![], None));
    assert_eq!(
        handler(HandlerNetwork::Node { migrations: Some("eth1".into()) }),
        (vec![json!("--migration-interface=eth1")], None)
    );
    for (name, full) in [("fast", "virt/fast"), ("networks/fast", "networks/fast")] {
        let told = vec![json!("--migration-interface=migration0"), json!(format!("--migration-network={full}"))];
        let asked = json!({"k8s.v1.cni.cncf.io/networks": format!("{full}@migration0")});
        assert_eq!(handler(HandlerNetwork::Attached(name.into())), (told, Some(asked)));
    }
    let wrong = Options { handler_network: HandlerNetwork::Attached("a,b".into()), ..Options::default() };
    assert_eq!(parts(&wrong).unwrap_err(), Error::Network("a,b".into()));
}

/// The image is of one architecture: a pod of it anywhere else never starts.
#[test]
fn pods_are_where_the_image_runs() {
    let objects = all();
    let pods: Vec<&Value> = objects.iter().filter_map(|one| one.pointer("/spec/template/spec")).collect();
    assert_eq!(pods.len(), 3);
    for pod in pods {
        assert_eq!(pod["nodeSelector"], json!({"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}));
    }
}

#[test]
fn a_handler_sees_the_devices_of_its_node_as_they_come() {
    let objects = all();
    let pod = &of(&objects, "DaemonSet", "virt-handler")["spec"]["template"]["spec"];
    let volume = pod["volumes"].as_array().unwrap().iter().find(|one| one["hostPath"]["path"] == "/dev").unwrap();
    let mounts = pod["containers"][0]["volumeMounts"].as_array().unwrap();
    assert!(mounts.contains(&json!({"name": volume["name"], "mountPath": "/dev"})), "{mounts:?}");
}

#[test]
fn image_and_namespace_are_as_asked() {
    let options = Options { image: "registry.example.com/godwit:1".to_owned(), ..Options::default() };
    let objects: Vec<Value> = parts(&options).unwrap().into_iter().flat_map(|part| part.objects).collect();
    let images: Vec<&Value> =
        objects.iter().filter_map(|one| one.pointer("/spec/template/spec/containers/0/image")).collect();
    assert_eq!(images, [&json!(options.image); 3]);
}

/// All values of an object, with the ways to them.
fn walk<'a>(value: &'a Value, path: &str, told: &mut impl FnMut(&str, &'a str)) {
    match value {
        Value::Object(members) => members.iter().for_each(|(key, value)| {
            told(&format!("{path}/{key} (its name)"), key);
            walk(value, &format!("{path}/{key}"), told);
        }),
        Value::Array(items) => items.iter().for_each(|item| walk(item, path, told)),
        Value::String(text) => told(path, text),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The places where a text may speak of a namespace of this name, and not of something whose name only begins or ends so.
fn mentions(text: &str, name: &str) -> bool {
    let part_of_name = |next: Option<char>| next.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    text.match_indices(name).any(|(at, _)| {
        let (before, after) = (&text[..at], &text[at + name.len()..]);
        // KubeVirt's groups.
        let group = after.starts_with(".io");
        !group && !part_of_name(before.chars().next_back()) && !part_of_name(after.chars().next())
    })
}

#[test]
fn of_a_namespace_other_names_are_told_apart() {
    for text in
        ["kubevirt", "virt-api.kubevirt.svc", "-n kubevirt get", "system:serviceaccount:kubevirt:a", "--x=kubevirt"]
    {
        assert!(mentions(text, "kubevirt"), "{text}");
    }
    for text in ["kubevirt.io", "subresources.kubevirt.io", "kubevirt-api", "x-kubevirt", "kubevirts", "kubevirt_x"] {
        assert!(!mentions(text, "kubevirt"), "{text}");
    }
}

#[test]
fn in_another_namespace_nothing_speaks_of_the_usual_one() {
    let objects_in = |namespace: &str| -> Vec<Value> {
        let options =
            Options { namespace: namespace.to_owned(), monitoring: Some(Prometheus::default()), ..Options::default() };
        parts(&options).unwrap().into_iter().flat_map(|part| part.objects).collect()
    };
    let found = |objects: &[Value]| {
        let mut found = BTreeSet::new();
        for object in objects {
            let (kind, name) = (object["kind"].as_str().unwrap(), object["metadata"]["name"].as_str().unwrap());
            walk(object, "", &mut |path, text| {
                // The kind's name in kubectl's words, and what a person reads of fields.
                let own_name = kind == "CustomResourceDefinition" && path == "/spec/names/singular";
                if mentions(text, KUBEVIRT_NAMESPACE) && !own_name {
                    found.insert(format!("{kind} {name} {path}: {text}"));
                }
            });
        }
        found
    };
    assert_eq!(found(&objects_in("vms-9")), BTreeSet::new());
    let usual = found(&objects_in(KUBEVIRT_NAMESPACE));
    for place in [
        "Namespace kubevirt /metadata/name",
        "Deployment virt-api /metadata/namespace",
        "ClusterRoleBinding kubevirt-controller /subjects/namespace",
        "RoleBinding kubevirt-apiserver /subjects/namespace",
        "APIService v1.subresources.kubevirt.io /spec/service/namespace",
        "ValidatingWebhookConfiguration virt-api-validator /webhooks/clientConfig/service/namespace",
        "ValidatingWebhookConfiguration virt-api-validator /webhooks/namespaceSelector/matchLabels/kubernetes.io/metadata.name",
        "ServiceMonitor virt-api /spec/endpoints/tlsConfig/serverName",
        "PrometheusRule godwit-monitoring /spec/groups/rules/annotations/description",
        "Role godwit:plan /metadata/namespace",
    ] {
        assert!(usual.iter().any(|one| one.starts_with(place)), "{place} is looked at: {usual:#?}");
    }
    // What differs is the name alone.
    let renamed = |object: &Value| {
        let text = object.to_string().replace("vms-9", KUBEVIRT_NAMESPACE);
        serde_json::from_str::<Value>(&text).unwrap()
    };
    let elsewhere: Vec<Value> = objects_in("vms-9").iter().map(renamed).collect();
    assert_eq!(elsewhere, objects_in(KUBEVIRT_NAMESPACE));
}

#[test]
fn a_namespace_is_one_that_can_be_godwits_own() {
    let into = |namespace: &str, kubevirt: &str| {
        let names = (namespace.to_owned(), kubevirt.to_owned());
        parts(&Options { namespace: names.0, kubevirt: names.1, ..Options::default() }).map(drop)
    };
    assert_eq!(into("a", "b-2"), Ok(()));
    for name in ["", "Kubevirt", "-a", "a-", "a.b", "a b", &"a".repeat(64)] {
        assert_eq!(into(name, "kubevirt"), Err(Error::Name(name.to_owned())));
        assert_eq!(into("kubevirt", name), Err(Error::Name(name.to_owned())));
    }
    for name in ["kube-system", "medik8s-leases", "node-maintenance"] {
        assert_eq!(into(name, "kubevirt"), Err(Error::Shared(name.to_owned())));
    }
    // Elsewhere no two of what is printed are the same object.
    let objects: Vec<Value> = parts(&Options { namespace: "a".to_owned(), ..Options::default() })
        .unwrap()
        .into_iter()
        .flat_map(|part| part.objects)
        .collect();
    let id =
        |one: &Value| [&one["kind"], &one["metadata"]["namespace"], &one["metadata"]["name"]].map(Value::to_string);
    assert_eq!(objects.iter().map(id).collect::<BTreeSet<_>>().len(), objects.len());
}

#[test]
fn beside_kubevirt_nothing_of_its_own_is_printed() {
    let beside = |components: &[Component]| parts(&Options { components: components.to_vec(), ..Options::default() });
    let cnv = Options { kubevirt: "cnv".to_owned(), components: vec![Component::Plan], ..Options::default() };
    let role = &parts(&cnv).unwrap()[0].objects[1];
    assert_eq!((&role["kind"], &role["metadata"]["namespace"]), (&json!("Role"), &json!("cnv")));
    let plan = beside(&[Component::Plan, Component::Plan]).unwrap();
    let objects: Vec<&Value> = plan.iter().flat_map(|part| &part.objects).collect();
    let kinds: Vec<&Value> = objects.iter().map(|one| &one["kind"]).collect();
    assert_eq!(kinds, ["ClusterRole", "Role"]);
    let verbs = objects.iter().flat_map(|one| one["rules"].as_array().unwrap()).map(|rule| &rule["verbs"]);
    assert!(verbs.into_iter().all(|verbs| *verbs == json!(["list"])));
    assert!(beside(&[Component::NodePool]).unwrap_err().to_string().contains("not built yet"));
}

/// One controller with a lease and rights of its own, and no kind, webhook or name that KubeVirt has.
#[test]
fn maintenance_beside_kubevirt_takes_nothing_of_it() {
    const SHARED: [&str; 2] = ["medik8s-leases", "node-maintenance"];
    let options = Options {
        namespace: "maintenance".to_owned(),
        kubevirt: "cnv".to_owned(),
        components: vec![Component::Maintenance],
        ..Options::default()
    };
    let objects: Vec<Value> = parts(&options).unwrap().into_iter().flat_map(|part| part.objects).collect();
    let full = all();
    for object in &objects {
        let kind = object["kind"].as_str().unwrap();
        let same = |one: &&Value| one["kind"] == kind && one["metadata"]["name"] == object["metadata"]["name"];
        match kind {
            "CustomResourceDefinition" => assert_eq!(object["spec"]["names"]["kind"], "NodeMaintenance"),
            // All maintenance operators share them.
            "Namespace" if SHARED.iter().any(|name| object["metadata"]["name"] == *name) => {}
            _ => assert_eq!(full.iter().find(same), None, "{kind} {}", object["metadata"]["name"]),
        }
        if let Some(namespace) = object["metadata"]["namespace"].as_str() {
            assert!(namespace == "maintenance" || SHARED.contains(&namespace), "{namespace}");
        }
    }
    let spec = &of(&objects, "Deployment", "godwit-maintenance")["spec"]["template"]["spec"];
    let command: Vec<&str> =
        spec["containers"][0]["command"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert!(command.contains(&"--nouns=maintenance") && command.contains(&"--lease=godwit-maintenance"), "{command:?}");
    // Its own namespace, which the pod says, is where it holds its lease; the configuration is that of the KubeVirt beside it.
    assert!(command.contains(&"--namespace=cnv"), "{command:?}");
    of(&objects, "ServiceAccount", spec["serviceAccountName"].as_str().unwrap());
    of(&objects, "Namespace", "maintenance");
    // Whoever may write VMs or pods could take guests away from those whose they are.
    for role in objects.iter().filter(|one| one["kind"] == "ClusterRole") {
        for rule in role["rules"].as_array().unwrap() {
            let (resources, verbs) = (rule["resources"].to_string(), rule["verbs"].to_string());
            let writes = ["create", "update", "patch", "delete"].iter().any(|verb| verbs.contains(verb));
            assert!(!writes || !["\"virtualmachines\"", "\"pods\"", "\"*\""].iter().any(|one| resources.contains(one)));
        }
    }
}

fn read_documents(text: &str) -> Vec<Value> {
    let documents = text.split("\n---\n").map(|document| document.trim_start_matches("---\n"));
    let documents = documents
        .map(|document| serde_saphyr::from_str::<Value>(document).unwrap_or_else(|e| panic!("{e}: {document}")));
    documents.filter(|document| !document.is_null()).collect()
}

/// What is printed is what is meant, also for parsers of YAML 1.1, to which `no` and `on` are false and true.
#[test]
fn documents_read_back() {
    let objects = all();
    let text = documents(&objects);
    assert_eq!(read_documents(&text), objects);
    for line in text.lines() {
        let value = line.rsplit(": ").next().unwrap_or_default().trim_start_matches("- ").trim();
        assert!(!["y", "n", "yes", "no", "on", "off"].contains(&value.to_lowercase().as_str()), "{line}");
    }
}
