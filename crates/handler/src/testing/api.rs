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
    pub fn put(&self, collection: &str, mut object: Value) {
        let mut inner = self.0.lock().unwrap();
        inner.revision += 1;
        object["metadata"]["resourceVersion"] = json!(inner.revision.to_string());
        inner.store(collection, object);
    }

    /// Merges into an object, as its controller would.
    pub fn merge(&self, collection: &str, name: &str, patch: &Value) {
        let mut object = self.get(collection, name).expect("object exists");
        merge(&mut object, patch);
        self.put(collection, object);
    }

    pub fn get(&self, collection: &str, name: &str) -> Option<Value> {
        self.0.lock().unwrap().objects.get(&(collection.to_owned(), name.to_owned())).cloned()
    }

    pub fn list(&self, collection: &str) -> Vec<Value> {
        let inner = self.0.lock().unwrap();
        inner.objects.iter().filter(|((c, _), _)| c == collection).map(|(_, o)| o.clone()).collect()
    }

    async fn serve(&self, request: Request<Body>) -> Response<axum::body::Body> {
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
                let items: Vec<Value> = self.list(&collection).into_iter().filter(|o| matches(o, &selector)).collect();
                let revision = self.0.lock().unwrap().revision.to_string();
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
                self.put(&collection, body.clone());
                answer(201, &body)
            }
            (Method::PATCH, Some(name)) => {
                let Some(mut object) = self.get(&collection, &name) else { return status(404, "NotFound") };
                let wanted = body["metadata"]["resourceVersion"].as_str();
                if wanted.is_some_and(|w| object["metadata"]["resourceVersion"] != w) {
                    return status(409, "Conflict");
                }
                merge(&mut object, &body);
                self.put(&collection, object);
                answer(200, &self.get(&collection, &name).unwrap())
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
    fn store(&mut self, collection: &str, object: Value) {
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
