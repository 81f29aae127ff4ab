//! The server in this process, without sockets.

#![allow(clippy::unwrap_used, dead_code, reason = "a test may fail, and each uses its part")]

use godwit_apiserver::{Admission, Parts, Server, Service, User};
use godwit_store::{Retention, Store};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;
use tower::ServiceExt;

pub struct Api {
    pub server: Server,
    pub store: Store,
    service: Service,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: http::HeaderMap,
    pub bytes: bytes::Bytes,
}

impl Answer {
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.bytes)))
    }

    #[track_caller]
    pub fn ok(self) -> Value {
        assert!(self.status.is_success(), "{}: {}", self.status, String::from_utf8_lossy(&self.bytes));
        self.json()
    }

    /// The message of a failure with this code.
    #[track_caller]
    pub fn fails(self, code: u16) -> String {
        let body = String::from_utf8_lossy(&self.bytes).into_owned();
        assert_eq!(self.status.as_u16(), code, "{body}");
        let status = self.json();
        assert_eq!((&status["kind"], &status["code"]), (&"Status".into(), &code.into()), "{body}");
        status["message"].as_str().unwrap().to_owned()
    }
}

impl Api {
    pub async fn start() -> Self {
        Self::with(Retention::default(), Vec::new()).await
    }

    pub async fn with(retention: Retention, admission: Vec<Arc<dyn Admission>>) -> Self {
        let store = Store::open_backend(redb_memory(), retention).unwrap();
        let server = Server::start(Parts { admission, ..Parts::new(store.clone()) }).await.unwrap();
        let service = server.service(User::new("admin", &["system:masters"]));
        Self { server, store, service }
    }

    /// Another server over what one has stored.
    pub async fn over(store: Store, roles: Vec<Value>) -> Self {
        let server = Server::start(Parts { roles, ..Parts::new(store.clone()) }).await.unwrap();
        let service = server.service(User::new("admin", &["system:masters"]));
        Self { server, store, service }
    }

    /// The same server for somebody else.
    pub fn user(&self, user: User) -> Self {
        Self { server: self.server.clone(), store: self.store.clone(), service: self.server.service(user) }
    }

    pub async fn send(&self, request: Request<Full<bytes::Bytes>>) -> http::Response<godwit_apiserver::Body> {
        self.service.clone().oneshot(request).await.unwrap()
    }

    pub async fn raw(
        &self,
        method: Method,
        uri: &str,
        headers: &[(&str, &str)],
        body: impl Into<bytes::Bytes>,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.send(request.body(Full::new(body.into())).unwrap()).await;
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        Answer { status: parts.status, headers: parts.headers, bytes }
    }

    pub async fn get(&self, uri: &str) -> Answer {
        self.raw(Method::GET, uri, &[], "").await
    }

    pub async fn post(&self, uri: &str, body: &Value) -> Answer {
        self.raw(Method::POST, uri, &[("content-type", "application/json")], body.to_string()).await
    }

    pub async fn put(&self, uri: &str, body: &Value) -> Answer {
        self.raw(Method::PUT, uri, &[("content-type", "application/json")], body.to_string()).await
    }

    pub async fn merge(&self, uri: &str, body: &Value) -> Answer {
        self.raw(Method::PATCH, uri, &[("content-type", "application/merge-patch+json")], body.to_string()).await
    }

    pub async fn delete(&self, uri: &str) -> Answer {
        self.raw(Method::DELETE, uri, &[], "").await
    }

    pub async fn watch(&self, uri: &str) -> Events {
        self.watch_with(uri, &[]).await
    }

    pub async fn watch_with(&self, uri: &str, headers: &[(&str, &str)]) -> Events {
        let mut request = Request::get(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.send(request.body(Full::default()).unwrap()).await;
        assert_eq!(response.status(), 200);
        Events { body: response.into_body(), buffer: Vec::new() }
    }

    /// Waits until an object is gone.
    pub async fn gone(&self, uri: &str) {
        for _ in 0..500 {
            if self.get(uri).await.status == 404 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{uri} is still there: {}", self.get(uri).await.json());
    }

    /// Waits until an object satisfies something.
    pub async fn until(&self, uri: &str, good: impl Fn(&Value) -> bool) -> Value {
        for _ in 0..500 {
            let object = self.get(uri).await.json();
            if good(&object) {
                return object;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{uri} stays {}", self.get(uri).await.json());
    }
}

fn redb_memory() -> impl godwit_store::StorageBackend {
    godwit_store::memory_backend()
}

/// A watch's events.
pub struct Events {
    body: godwit_apiserver::Body,
    buffer: Vec<u8>,
}

impl Events {
    /// The next event; none: the stream ended.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let frame =
                tokio::time::timeout(Duration::from_secs(20), self.body.frame()).await.expect("an event in time")?;
            self.buffer.extend_from_slice(&frame.unwrap().into_data().unwrap());
        }
    }

    /// Type and name of the next event.
    pub async fn brief(&mut self) -> String {
        match self.next().await {
            None => "end".to_owned(),
            Some(event) => {
                let name = event["object"]["metadata"]["name"].as_str().unwrap_or_default();
                format!("{} {name}", event["type"].as_str().unwrap())
            }
        }
    }
}
