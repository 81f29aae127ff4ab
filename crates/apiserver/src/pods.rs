//! Subresources of pods: binding, eviction, log.

use crate::admission::{EvictionVerdict, Operation, OwnWrite};
use crate::create::{Write, encode, judge, question};
use crate::delete::{DeleteOptions, remove};
use crate::kinds::Kind;
use crate::read::not_found;
use crate::respond::{self, Reply};
use crate::server::Context;
use crate::update::{ATTEMPTS, Change};
use crate::{intake, managed};
use bytes::Bytes;
use godwit_machinery::meta;
use godwit_machinery::patch::merge_patch;
use godwit_machinery::selector::LabelSelector;
use godwit_machinery::status::{Cause, Status};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// Where kubelets listen.
const KUBELET_PORT: u16 = 10250;
/// How long a kubelet may take until it begins to answer.
const KUBELET_PATIENCE: Duration = Duration::from_secs(10);

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn created() -> Reply {
    let mut body = godwit_machinery::status::success(None);
    body["code"] = json!(201);
    Ok(respond::json(StatusCode::CREATED, &body))
}

/// `POST pods/x/binding`: the scheduler's decision.
pub(crate) async fn bind(cx: &Context, kind: &Arc<Kind>, bytes: &Bytes) -> Reply {
    let body = intake::other(cx, bytes, &[("v1", "Binding")])?;
    let (name, namespace) = (cx.info.name.as_str(), cx.info.namespace.as_str());
    let invalid = |cause| Status::invalid("", "Binding", name, vec![cause]);
    let node = text(&body, "/target/name").to_owned();
    if node.is_empty() {
        return Err(invalid(Cause::required("target.name", "")));
    }
    let target = text(&body, "/target/kind");
    if !target.is_empty() && target != "Node" {
        return Err(invalid(Cause::not_supported(
            "target.kind",
            &Value::String(target.to_owned()),
            &["Node", "<empty>"],
        )));
    }
    let given = meta::name(&body);
    if !given.is_empty() && given != name {
        return Err(Status::bad_request(format!("name in URL does not match name in Binding object: {given}")));
    }
    let uid = meta::uid(&body).to_owned();
    let dry_run = cx.dry_run()?;
    let write = Write { operation: Operation::Create, namespace, name, old: None, dry_run };
    judge(cx, kind, write, Some(&body))?;
    let change = Change { namespace, name, dry_run, manager: managed::Manager::of(cx)? };
    change_whole(cx, kind, &change, |old| {
        let conflict = |why: &str| Err(Status::conflict_because("", "pods/binding", name, why));
        if !uid.is_empty() && uid != meta::uid(old) {
            return Err(Status::precondition_uid("", "pods", name, &uid, meta::uid(old)));
        }
        if meta::is_deleting(old) {
            return conflict(&format!("pod {name} is being deleted, cannot be assigned to a host"));
        }
        let bound = text(old, "/spec/nodeName");
        if !bound.is_empty() {
            return conflict(&format!("pod {name} is already assigned to node {bound:?}"));
        }
        let mut new = old.clone();
        new["spec"]["nodeName"] = json!(node);
        if let Some(annotations) = body.pointer("/metadata/annotations").and_then(Value::as_object) {
            let mut all = new.pointer("/metadata/annotations").and_then(Value::as_object).cloned().unwrap_or_default();
            all.extend(annotations.clone());
            meta::set(&mut new, "annotations", Some(Value::Object(all)));
        }
        set_condition(&mut new, "PodScheduled", "True");
        Ok(new)
    })
    .await?;
    created()
}

/// Sets a condition of a pod, with the time if it changed.
fn set_condition(pod: &mut Value, ty: &str, status: &str) {
    let Some(map) = pod.as_object_mut() else { return };
    let slot = map.entry("status").or_insert_with(|| json!({}));
    if !slot.is_object() {
        *slot = json!({});
    }
    let Some(slot) = slot.as_object_mut() else { return };
    let list = slot.entry("conditions").or_insert_with(|| json!([]));
    if !list.is_array() {
        *list = json!([]);
    }
    let Some(list) = list.as_array_mut() else { return };
    if list.iter().any(|c| c["type"] == ty && c["status"] == status) {
        return;
    }
    list.retain(|c| c["type"] != ty);
    let now = meta::time(jiff::Timestamp::now());
    list.push(json!({"type": ty, "status": status, "lastProbeTime": null, "lastTransitionTime": now}));
}

/// Changes specification and status together, past the rules for clients.
async fn change_whole(
    cx: &Context,
    kind: &Arc<Kind>,
    change: &Change<'_>,
    make: impl Fn(&Value) -> Result<Value, Status>,
) -> Result<(), Status> {
    let key = kind.key(change.namespace, change.name);
    loop {
        let entry = cx.store().get(&key).ok_or_else(|| not_found(kind, change.name))?;
        let new = make(entry.json())?;
        if change.dry_run {
            return Ok(());
        }
        match cx.store().update(&key, Some(entry.revision), encode(new)).await {
            Ok(_) => return Ok(()),
            Err(godwit_store::Error::Conflict { .. } | godwit_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(crate::read::store_error(kind, change.name, error)),
        }
    }
}

/// `POST pods/x/eviction`: delete, unless a budget or admission forbids it.
pub(crate) async fn evict(cx: &Context, kind: &Arc<Kind>, bytes: &Bytes) -> Reply {
    let body = intake::other(cx, bytes, &[("policy/v1", "Eviction"), ("policy/v1beta1", "Eviction")])?;
    let (name, namespace) = (cx.info.name.as_str(), cx.info.namespace.as_str());
    let given = meta::name(&body);
    if !given.is_empty() && given != name {
        return Err(Status::bad_request(format!("name in URL does not match name in Eviction object: {given}")));
    }
    let key = kind.key(namespace, name);
    cx.store().get(&key).ok_or_else(|| not_found(kind, name))?;
    let mut dry_run = cx.dry_run()?;
    let chosen = body.get("deleteOptions").cloned().unwrap_or_default();
    dry_run |= chosen.get("dryRun").and_then(Value::as_array).is_some_and(|list| list.contains(&json!("All")));
    let write = Write { operation: Operation::Create, namespace, name, old: None, dry_run };
    ask_to_evict(cx, kind, write, &body).await?;
    // Two at once would each count the other's pod; one that is marked for deletion counts no more.
    let _alone = cx.inner.evictions.lock().await;
    let pod = cx.store().get(&key).ok_or_else(|| not_found(kind, name))?.json().clone();
    let finished = matches!(text(&pod, "/status/phase"), "Succeeded" | "Failed" | "Pending");
    if !finished && !meta::is_deleting(&pod) {
        budget_allows(cx, namespace, &pod)?;
    }
    if !dry_run && !finished {
        let manager = managed::Manager::of(cx)?;
        let change = Change { namespace, name, dry_run, manager };
        change_whole(cx, kind, &change, |old| {
            let mut new = old.clone();
            set_condition(&mut new, "DisruptionTarget", "True");
            let list = new.pointer_mut("/status/conditions").and_then(Value::as_array_mut);
            for condition in list.into_iter().flatten().filter(|c| c["type"] == "DisruptionTarget") {
                condition["reason"] = json!("EvictionByEvictionAPI");
                condition["message"] = json!("Eviction API: evicting");
            }
            Ok(new)
        })
        .await?;
    }
    let options = DeleteOptions {
        grace: chosen.get("gracePeriodSeconds").and_then(Value::as_i64),
        uid: text(&chosen, "/preconditions/uid").to_owned(),
        dry_run,
        ..DeleteOptions::default()
    };
    remove(cx, kind, namespace, name, &options).await?;
    created()
}

/// Asks every plugin whether the pod may be evicted, and writes what they want written with their answer.
async fn ask_to_evict(cx: &Context, kind: &Kind, write: Write<'_>, body: &Value) -> Result<(), Status> {
    for plugin in &cx.inner.admission {
        for attempt in 1.. {
            let EvictionVerdict { verdict, write: own } = plugin.evict(&question(cx, kind, write, Some(body)));
            match own.filter(|_| !write.dry_run) {
                None => {}
                Some(own) => match carry_out(cx, &own).await {
                    Ok(()) => {}
                    // What was decided on has changed: the plugin decides anew.
                    Err(why) if why.code == 409 && attempt < ATTEMPTS => continue,
                    Err(why) => {
                        let message = format!("{}{}", own.failure.message, why.message);
                        return Err(Status { message, ..own.failure });
                    }
                },
            }
            cx.warn(verdict?);
            break;
        }
    }
    Ok(())
}

/// Carries out a plugin's own write.
async fn carry_out(cx: &Context, own: &OwnWrite) -> Result<(), Status> {
    let kinds = cx.inner.registry.kinds();
    let missing = || Status::not_found(&own.group, &own.plural, &own.name);
    let key = kinds.any_version(&own.group, &own.plural).ok_or_else(missing)?.key(&own.namespace, &own.name);
    let conflict = || Status::conflict(&own.group, &own.plural, &own.name);
    let entry = cx.store().get(&key).ok_or_else(missing)?;
    let decided_on = meta::resource_version(&own.patch);
    if !decided_on.is_empty() && decided_on != meta::resource_version(entry.json()) {
        return Err(conflict());
    }
    let new = merge_patch(entry.json(), &own.patch)?;
    match cx.store().update(&key, Some(entry.revision), encode(new)).await {
        Ok(_) => Ok(()),
        Err(godwit_store::Error::Conflict { .. }) => Err(conflict()),
        Err(godwit_store::Error::NotFound { .. }) => Err(missing()),
        Err(error) => Err(Status::internal_error(error.to_string())),
    }
}

/// How many pods a budget asks for: a number or a share of all.
fn wanted(value: &Value, of: usize) -> Option<usize> {
    match value {
        Value::Number(n) => usize::try_from(n.as_u64()?).ok(),
        Value::String(text) => {
            let percent: usize = text.strip_suffix('%')?.parse().ok()?;
            Some(percent.checked_mul(of)?.div_ceil(100))
        }
        _ => None,
    }
}

/// Pods that a budget counts, and those that are healthy.
pub(crate) struct Tally {
    pub(crate) expected: usize,
    pub(crate) healthy: usize,
    pub(crate) desired: usize,
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
    !meta::is_deleting(pod) && conditions.into_iter().flatten().any(|c| c["type"] == "Ready" && c["status"] == "True")
}

/// Counts what a budget says about the pods of its namespace.
pub(crate) fn tally(budget: &Value, pods: &[Arc<Value>]) -> Option<(LabelSelector, Tally)> {
    let selector = LabelSelector::from_object(budget.pointer("/spec/selector").unwrap_or(&Value::Null)).ok()?;
    let counted: Vec<_> = pods
        .iter()
        .filter(|pod| selector.matches(pod) && !matches!(text(pod, "/status/phase"), "Succeeded" | "Failed"))
        .collect();
    let expected = counted.len();
    let healthy = counted.iter().filter(|pod| is_ready(pod)).count();
    let least = budget.pointer("/spec/minAvailable").and_then(|value| wanted(value, expected));
    let most = budget.pointer("/spec/maxUnavailable").and_then(|value| wanted(value, expected));
    let desired = least.or_else(|| most.map(|most| expected.saturating_sub(most))).unwrap_or(0);
    Some((selector, Tally { expected, healthy, desired }))
}

fn budget_allows(cx: &Context, namespace: &str, pod: &Value) -> Result<(), Status> {
    use crate::admission::Lookup;
    let pods = cx.inner.list("", "pods", namespace);
    let budgets = cx.inner.list("policy", "poddisruptionbudgets", namespace);
    let mut matching = budgets.iter().filter_map(|budget| {
        let (selector, tally) = tally(budget, &pods)?;
        selector.matches(pod).then_some((budget, tally))
    });
    let Some((budget, tally)) = matching.next() else { return Ok(()) };
    if matching.next().is_some() {
        let why = "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.";
        return Err(Status::internal_error(why));
    }
    // A pod that is not ready does not count; it may go where the budget is met without it, or always if it says so.
    let always = text(budget, "/spec/unhealthyPodEvictionPolicy") == "AlwaysAllow";
    let unready = !is_ready(pod) && (always || (tally.desired > 0 && tally.healthy >= tally.desired));
    if tally.healthy > tally.desired || unready {
        return Ok(());
    }
    let why = format!(
        "The disruption budget {} needs {} healthy pods and has {} currently",
        meta::name(budget),
        tally.desired,
        tally.healthy
    );
    let message = "Cannot evict pod as it would violate the pod's disruption budget.";
    Err(Status::too_many_requests(message, 0, Some(("DisruptionBudget", &why))))
}

/// `GET pods/x/log`, from the kubelet of the pod's node.
pub(crate) async fn log(cx: &Context, kind: &Arc<Kind>) -> Reply {
    let (name, namespace) = (cx.info.name.as_str(), cx.info.namespace.as_str());
    let pod = cx.store().get(&kind.key(namespace, name)).ok_or_else(|| not_found(kind, name))?.json().clone();
    let container = container(&pod, cx.params.get("container"))?;
    let node = text(&pod, "/spec/nodeName");
    if node.is_empty() {
        // Kubernetes answers with an empty log, too.
        return Ok(respond::text(StatusCode::OK, ""));
    }
    let address = node_address(cx, node)?;
    let mut query = Vec::new();
    for key in ["follow", "previous", "sinceSeconds", "timestamps", "tailLines", "limitBytes", "sinceTime"] {
        let value = cx.params.get(key);
        if value.is_empty() {
            continue;
        }
        let good = match key {
            "follow" | "previous" | "timestamps" => matches!(value, "true" | "false"),
            "sinceTime" => value.parse::<jiff::Timestamp>().is_ok(),
            _ => value.parse::<u64>().is_ok(),
        };
        if !good {
            return Err(Status::bad_request(format!("unable to decode query as PodLogOptions: {key}={value:?}")));
        }
        query.push(format!("{key}={value}"));
    }
    let path = format!("/containerLogs/{namespace}/{name}/{container}?{}", query.join("&"));
    let proxied = fetch(cx, address, &path)
        .await
        .map_err(|why| Status::internal_error(format!("Get \"https://{address}{path}\": node {node}: {why}")))?;
    let (parts, body) = proxied.into_parts();
    if !parts.status.is_success() {
        let bytes = body.collect().await.map(|all| all.to_bytes()).unwrap_or_default();
        let said = String::from_utf8_lossy(&bytes).trim().to_owned();
        return Err(match parts.status.as_u16() {
            code @ (400 | 404) => {
                Status::bad_request(if said.is_empty() { format!("kubelet of {node} answered {code}") } else { said })
            }
            code => Status::internal_error(format!("kubelet of {node} answered {code}: {said}")),
        });
    }
    let mut response = Response::new(body.map_err(std::io::Error::other).boxed_unsync());
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("text/plain"));
    Ok(response)
}

fn container(pod: &Value, wanted: &str) -> Result<String, Status> {
    let names = |list: &str| -> Vec<String> {
        let list = pod.pointer(&format!("/spec/{list}")).and_then(Value::as_array);
        list.into_iter().flatten().filter_map(|c| c["name"].as_str().map(str::to_owned)).collect()
    };
    let (main, init) = (names("containers"), names("initContainers"));
    let name = meta::name(pod);
    match (wanted, main.as_slice()) {
        ("", [only]) => Ok(only.clone()),
        ("", _) => Err(Status::bad_request(format!(
            "a container name must be specified for pod {name}, choose one of: [{}]",
            main.join(" ")
        ))),
        (wanted, _) if main.iter().chain(&init).any(|known| known == wanted) => Ok(wanted.to_owned()),
        (wanted, _) => Err(Status::bad_request(format!("container {wanted} is not valid for pod {name}"))),
    }
}

fn node_address(cx: &Context, node: &str) -> Result<SocketAddr, Status> {
    use crate::admission::Lookup;
    let object = cx.inner.get("", "nodes", "", node).ok_or_else(|| Status::not_found("", "nodes", node))?;
    let list = object.pointer("/status/addresses").and_then(Value::as_array);
    let address = list.into_iter().flatten().find(|a| a["type"] == "InternalIP").map(|a| text(a, "/address"));
    let ip: IpAddr = address.and_then(|address| address.parse().ok()).ok_or_else(|| {
        Status::internal_error(format!("no preferred addresses found; node {node} has no InternalIP"))
    })?;
    let port = object.pointer("/status/daemonEndpoints/kubeletEndpoint/Port").and_then(Value::as_u64);
    let port = port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0).unwrap_or(KUBELET_PORT);
    Ok(SocketAddr::new(ip, port))
}

/// Asks a kubelet, with the server's own client certificate.
async fn fetch(
    cx: &Context,
    address: SocketAddr,
    path: &str,
) -> Result<Response<hyper::body::Incoming>, Box<dyn std::error::Error + Send + Sync>> {
    let tls = cx.inner.kubelet.clone().ok_or("this server has no client certificate for kubelets")?;
    let connect = async {
        let tcp = cx.inner.dialer.dial(address).await?;
        let name = rustls_pki_types::ServerName::IpAddress(address.ip().into());
        let stream = tokio_rustls::TlsConnector::from(tls).connect(name, tcp).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to a kubelet ended");
            }
        });
        let request = Request::get(path).header(http::header::HOST, address.to_string()).body(Empty::<Bytes>::new())?;
        Ok(sender.send_request(request).await?)
    };
    match tokio::time::timeout(KUBELET_PATIENCE, connect).await {
        Ok(outcome) => outcome,
        Err(_) => Err("the kubelet did not answer in time".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_count_healthy_pods() {
        let pod = |ready: &str| {
            Arc::new(
                json!({"metadata": {"labels": {"a": "b"}}, "status": {"conditions": [{"type": "Ready", "status": ready}]}}),
            )
        };
        let pods = [pod("True"), pod("True"), pod("False"), pod("True")];
        let count = |spec: Value| {
            let mut spec = spec;
            spec["selector"] = json!({"matchLabels": {"a": "b"}});
            let (_, t) = tally(&json!({"spec": spec}), &pods).unwrap();
            (t.expected, t.healthy, t.desired)
        };
        assert_eq!(count(json!({"minAvailable": 2})), (4, 3, 2));
        assert_eq!(count(json!({"minAvailable": "30%"})), (4, 3, 2));
        assert_eq!(count(json!({"maxUnavailable": 1})), (4, 3, 3));
        assert_eq!(count(json!({"maxUnavailable": 9})), (4, 3, 0));
        assert_eq!(count(json!({"minAvailable": "odd"})), (4, 3, 0));
    }

    #[test]
    fn the_container_must_be_clear() {
        let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}, {"name": "b"}], "initContainers": [{"name": "i"}]}});
        assert_eq!(container(&pod, "i").unwrap(), "i");
        assert_eq!(container(&pod, "").unwrap_err().code, 400);
        assert_eq!(container(&pod, "x").unwrap_err().message, "container x is not valid for pod p");
    }
}
