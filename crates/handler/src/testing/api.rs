//! As much of an API server as a handler sees, in memory: get, list, watch with one selector, create, merge patch with a
//! precondition on resourceVersion.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// The server; clones are the same one.
#[derive(Clone, Default)]
pub struct Api(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    revision: u64,
    /// By collection path without namespace and version prefix, then name.
    objects: BTreeMap<(String, String), Value>,
    watches: Vec<(String, Selector, UnboundedSender<Value>)>,
    /// Every change: collection, before, after.
    history: Vec<(String, Option<Value>, Value)>,
    /// So many writes are answered with an error, the last of them after it was done.
    refused: usize,
}

/// `labelSelector` and `fieldSelector`, equality only.
type Selector = Vec<(String, String)>;

impl Api {
    pub fn client(&self) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.serve(request).await) }
        });
        kube::Client::new(service, "default")
    }

    /// Creates or replaces an object.
    pub fn put(&self, collection: &str, object: Value) {
        self.0.lock().unwrap().store(collection, object);
    }

    /// Merges into an object, as its controller would.
    pub fn merge(&self, collection: &str, name: &str, patch: &Value) {
        self.0.lock().unwrap().patch(collection, name, patch).expect("object exists and nobody asked for a revision");
    }

    pub fn get(&self, collection: &str, name: &str) -> Option<Value> {
        self.0.lock().unwrap().get(collection, name)
    }

    pub fn list(&self, collection: &str) -> Vec<Value> {
        self.0.lock().unwrap().list(collection)
    }

    /// Answers the next so many writes with an error: it does not do them, except the last one, whose answer is only lost.
    pub fn refuse_writes(&self, number: usize) {
        self.0.lock().unwrap().refused = number;
    }

    async fn serve(&self, request: Request<Body>) -> Response<axum::body::Body> {
        let refused = if request.method() == Method::GET {
            0
        } else {
            let mut inner = self.0.lock().unwrap();
            let left = inner.refused;
            inner.refused = left.saturating_sub(1);
            left
        };
        let answered = if refused > 1 { None } else { Some(self.answer(request).await) };
        answered.filter(|_| refused == 0).unwrap_or_else(|| status(500, "InternalError"))
    }

    async fn answer(&self, request: Request<Body>) -> Response<axum::body::Body> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let mut path: Vec<&str> = parts.uri.path().split('/').filter(|p| !p.is_empty()).collect();
        path.drain(..if path[0] == "api" { 2 } else { 3 });
        if path[0] == "namespaces" {
            path.drain(..2);
        }
        let (collection, name) = (path[0].to_owned(), path.get(1).map(|n| (*n).to_owned()));
        let query: BTreeMap<String, String> = parts
            .uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(k, v)| (k.to_owned(), v.replace("%3D", "=").replace("%2F", "/").replace("%2C", ",")))
            .collect();
        let mut selector = Vec::new();
        for key in ["labelSelector", "fieldSelector"] {
            for term in query.get(key).map(String::as_str).unwrap_or_default().split(',').filter(|t| !t.is_empty()) {
                let (k, v) = term.split_once('=').unwrap();
                let path = if key == "fieldSelector" { k.to_owned() } else { format!("label:{k}") };
                selector.push((path, v.to_owned()));
            }
        }
        match (parts.method, name) {
            (Method::GET, None) if query.contains_key("watch") => {
                self.watch(collection, selector, query["resourceVersion"].parse().unwrap())
            }
            (Method::GET, None) => {
                // What the list shows and where a watch goes on from are of one moment.
                let (items, revision) = {
                    let inner = self.0.lock().unwrap();
                    (inner.list(&collection), inner.revision.to_string())
                };
                let items: Vec<Value> = items.into_iter().filter(|o| matches(o, &selector)).collect();
                answer(
                    200,
                    &json!({ "kind": "List", "apiVersion": "v1", "metadata": { "resourceVersion": revision },
                                     "items": items }),
                )
            }
            (Method::GET, Some(name)) => match self.get(&collection, &name) {
                Some(object) => answer(200, &object),
                None => status(404, "NotFound"),
            },
            (Method::POST, None) => {
                let mut inner = self.0.lock().unwrap();
                let name = body["metadata"]["name"].as_str().unwrap();
                if inner.get(&collection, name).is_some() {
                    return status(409, "AlreadyExists");
                }
                inner.store(&collection, body.clone());
                answer(201, &inner.get(&collection, name).unwrap())
            }
            (Method::PUT, Some(name)) => {
                let replaced = self.0.lock().unwrap().replace(&collection, &name, body);
                match replaced {
                    Ok(object) => answer(200, &object),
                    Err((code, reason)) => status(code, reason),
                }
            }
            (Method::PATCH, Some(name)) => {
                let patched = self.0.lock().unwrap().patch(&collection, &name, &body);
                match patched {
                    Ok(object) => answer(200, &object),
                    Err((code, reason)) => status(code, reason),
                }
            }
            (method, name) => panic!("unexpected request {method} {collection} {name:?}"),
        }
    }

    fn watch(&self, collection: String, selector: Selector, since: usize) -> Response<axum::body::Body> {
        let (sender, receiver): (_, UnboundedReceiver<Value>) = unbounded_channel();
        let mut inner = self.0.lock().unwrap();
        // Each change is one revision.
        for (changed, old, new) in inner.history.iter().skip(since) {
            if let Some(event) = event(old.as_ref(), new, &selector).filter(|_| *changed == collection) {
                sender.send(event).unwrap();
            }
        }
        inner.watches.push((collection, selector, sender));
        drop(inner);
        let lines = futures::stream::unfold(receiver, |mut receiver| async move {
            let event = receiver.recv().await?;
            let line = Bytes::from(format!("{event}\n"));
            Some((Ok::<_, Infallible>(Frame::data(line)), receiver))
        });
        Response::new(axum::body::Body::new(StreamBody::new(lines.boxed())))
    }
}

impl Inner {
    fn get(&self, collection: &str, name: &str) -> Option<Value> {
        self.objects.get(&(collection.to_owned(), name.to_owned())).cloned()
    }

    fn list(&self, collection: &str) -> Vec<Value> {
        self.objects.iter().filter(|((c, _), _)| c == collection).map(|(_, o)| o.clone()).collect()
    }

    /// Merges into an object, unless it is at another revision than the patch asks for.
    fn patch(&mut self, collection: &str, name: &str, patch: &Value) -> Result<Value, (u16, &'static str)> {
        let mut object = self.get(collection, name).ok_or((404, "NotFound"))?;
        let wanted = patch["metadata"]["resourceVersion"].as_str();
        if wanted.is_some_and(|w| object["metadata"]["resourceVersion"] != w) {
            return Err((409, "Conflict"));
        }
        merge(&mut object, patch);
        self.store(collection, object);
        self.get(collection, name).ok_or((404, "NotFound"))
    }

    /// Replaces an object that is at this revision.
    fn replace(&mut self, collection: &str, name: &str, object: Value) -> Result<Value, (u16, &'static str)> {
        let known = self.get(collection, name).ok_or((404, "NotFound"))?;
        if known["metadata"]["resourceVersion"] != object["metadata"]["resourceVersion"] {
            return Err((409, "Conflict"));
        }
        self.store(collection, object);
        self.get(collection, name).ok_or((404, "NotFound"))
    }

    fn store(&mut self, collection: &str, mut object: Value) {
        self.revision += 1;
        object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let old = self.objects.insert((collection.to_owned(), name), object.clone());
        self.watches.retain(|(watched, selector, sender)| {
            if watched != collection {
                return !sender.is_closed();
            }
            match event(old.as_ref(), &object, selector) {
                Some(event) => sender.send(event).is_ok(),
                None => !sender.is_closed(),
            }
        });
        self.history.push((collection.to_owned(), old, object));
    }
}

/// The change as a watch with this selector shows it.
fn event(old: Option<&Value>, new: &Value, selector: &Selector) -> Option<Value> {
    let kind = match (old.is_some_and(|o| matches(o, selector)), matches(new, selector)) {
        (false, true) => "ADDED",
        (true, true) => "MODIFIED",
        (true, false) => "DELETED",
        (false, false) => return None,
    };
    Some(json!({ "type": kind, "object": new }))
}

fn matches(object: &Value, selector: &Selector) -> bool {
    selector.iter().all(|(key, value)| {
        let found = match key.strip_prefix("label:") {
            Some(label) => object["metadata"]["labels"][label].as_str(),
            None => key.split('.').fold(object, |o, part| &o[part]).as_str(),
        };
        found == Some(value)
    })
}

/// RFC 7386.
pub fn merge(to: &mut Value, from: &Value) {
    let Value::Object(from) = from else {
        *to = from.clone();
        return;
    };
    if !to.is_object() {
        *to = json!({});
    }
    let to = to.as_object_mut().unwrap();
    for (key, value) in from {
        if value.is_null() {
            to.remove(key);
        } else {
            merge(to.entry(key).or_insert(Value::Null), value);
        }
    }
}

fn answer(code: u16, body: &Value) -> Response<axum::body::Body> {
    Response::builder().status(code).body(axum::body::Body::from(body.to_string())).unwrap()
}

fn status(code: u16, reason: &str) -> Response<axum::body::Body> {
    let body = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
                       "message": reason });
    answer(code, &body)
}

#[cfg(test)]
mod tests {
    use kube::api::{DynamicObject, ListParams};

    use super::*;

    const WRITES: usize = 3_000;

    /// A list whose revision was of a later moment than its items once lost what was written in between to its watchers.
    #[test]
    fn a_list_and_its_revision_are_of_one_moment() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let resource = kube::core::ApiResource::erase::<k8s_openapi::api::core::v1::Node>(&());
            let server = Api::default();
            let nodes: kube::Api<DynamicObject> = kube::Api::all_with(server.client(), &resource);
            let writer = std::thread::spawn(move || {
                for number in 0..WRITES {
                    let name = format!("node{number}");
                    server.put("nodes", json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}));
                    // Lets the other in: the lock is not fair.
                    std::thread::sleep(std::time::Duration::from_micros(1));
                }
            });
            let mut seen = 0;
            while seen < WRITES {
                let list = nodes.list(&ListParams::default()).await.unwrap();
                seen = list.items.len();
                // Each of these writes makes an object, so there are as many as revisions.
                assert_eq!(list.metadata.resource_version, Some(seen.to_string()));
            }
            writer.join().unwrap();
        });
    }
}
