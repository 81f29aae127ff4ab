//! The beginning of a drain, and what becomes of evictions, against a server of the test's.

use std::convert::Infallible;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Method, Request, Response};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::course::Answer;
use crate::run::{Ending, Options, evict, run};
use crate::{Error, Manner};

/// Whatever does not come at all shall fail the test with words.
const NEVER: Duration = Duration::from_secs(60);

/// Requests as `GET /path`, in their order.
type Asked = Arc<Mutex<Vec<String>>>;

/// A client of a server that answers like this, and what it was asked to write.
pub(crate) fn server<F>(answer: impl Fn(&Method, &str) -> F + Send + Sync + 'static) -> (Client, Asked)
where
    F: Future<Output = (u16, Value)> + Send + 'static,
{
    let (answer, asked) = (Arc::new(answer), Asked::default());
    let heard = asked.clone();
    let service = tower::service_fn(move |request: Request<Body>| {
        let (answer, heard) = (answer.clone(), heard.clone());
        async move {
            let (method, path) = (request.method().clone(), request.uri().path().to_owned());
            heard.lock().unwrap().push(format!("{method} {path}"));
            let (code, body) = answer(&method, &path).await;
            let response = Response::builder().status(code).header("content-type", "application/json");
            Ok::<_, Infallible>(response.body(Body::from(body.to_string().into_bytes())).unwrap())
        }
    });
    (Client::new(service, "default"), asked)
}

fn node(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "uid": name}})
}

/// A cluster of two nodes without a pod.
pub(crate) fn empty(path: &str) -> Value {
    match path.strip_prefix("/api/v1/nodes") {
        Some("") => json!({"apiVersion": "v1", "kind": "NodeList", "metadata": {"resourceVersion": "1"},
            "items": [node("node1"), node("node2")]}),
        Some(name) => node(name.trim_start_matches('/')),
        None => json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "1"}, "items": []}),
    }
}

pub(crate) fn failure(code: u16, message: &str) -> (u16, Value) {
    (code, json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}))
}

fn options(nodes: &[&str]) -> Options {
    let nodes = nodes.iter().map(|node| (*node).to_owned()).collect();
    Options { nodes, namespace: None, manner: Manner::default(), timeout: None, yes: true, max_parallel: None }
}

async fn ends(client: &Client, nodes: &[&str], signals: &mut mpsc::Receiver<()>) -> Result<Ending, Error> {
    let options = options(nodes);
    let ended = tokio::time::timeout(NEVER, run(client, &options, signals)).await;
    ended.expect("it has been interrupted, and goes on")
}

#[tokio::test]
async fn somebody_can_end_it_while_the_cluster_is_read() {
    let (client, _) = server(|_, _| std::future::pending());
    let (tell, mut signals) = mpsc::channel(4);
    tell.send(()).await.unwrap();
    assert_eq!(ends(&client, &["node1"], &mut signals).await.unwrap(), Ending::TakenBack);
}

#[tokio::test]
async fn somebody_can_end_it_while_the_nodes_are_cordoned() {
    let (tell, mut signals) = mpsc::channel(4);
    let closed = Mutex::new(false);
    let (client, asked) = server(move |method, path| {
        let mut closed = closed.lock().unwrap();
        let mut answer = empty(path);
        if path.ends_with("/node1") {
            if method == Method::PATCH {
                *closed = !*closed;
                // It comes while this is under way.
                if *closed {
                    let _ = tell.try_send(());
                }
            }
            answer["spec"]["unschedulable"] = json!(*closed);
        }
        std::future::ready((200, answer))
    });
    assert_eq!(ends(&client, &["node1", "node2"], &mut signals).await.unwrap(), Ending::TakenBack);
    let asked = asked.lock().unwrap().clone();
    assert!(!asked.iter().any(|request| request.ends_with("/nodes/node2")), "{asked:?}");
    assert_eq!(asked.iter().filter(|request| *request == "PATCH /api/v1/nodes/node1").count(), 2, "{asked:?}");
}

#[tokio::test]
async fn what_stays_cordoned_is_said_when_a_node_cannot_be() {
    let closed = Mutex::new(false);
    let (client, _) = server(move |method, path| {
        let mut closed = closed.lock().unwrap();
        let answer = match (method, path) {
            (&Method::PATCH, path) if path.ends_with("/node1") && !*closed => {
                *closed = true;
                (200, node("node1"))
            }
            (&Method::PATCH, path) if path.ends_with("/node1") => failure(403, "you may not open it"),
            (_, path) if path.ends_with("/node1") && *closed => {
                let mut closed = node("node1");
                closed["spec"]["unschedulable"] = json!(true);
                (200, closed)
            }
            (_, path) if path.ends_with("/node2") => failure(403, "you may not see it"),
            (_, path) => (200, empty(path)),
        };
        std::future::ready(answer)
    });
    let (_tell, mut signals) = mpsc::channel(4);
    let error = ends(&client, &["node1", "node2"], &mut signals).await.unwrap_err().to_string();
    assert!(error.contains("cordon node node2: you may not see it"), "{error}");
    assert!(error.contains("node node1 is cordoned: you may not open it"), "{error}");
}

#[tokio::test]
async fn only_what_may_pass_is_a_refusal_for_now() {
    let pod = godwit_control::Name::new("default", "web");
    for (code, expected) in [
        (201, Answer::Granted),
        (404, Answer::Granted),
        (409, Answer::Granted),
        (429, Answer::Refused("no".to_owned())),
        (500, Answer::Refused("no".to_owned())),
        (503, Answer::Refused("no".to_owned())),
        (400, Answer::Denied("no".to_owned())),
        (403, Answer::Denied("no".to_owned())),
    ] {
        let (client, _) = server(move |_, _| std::future::ready(failure(code, "no")));
        let (_, answer) = evict(client, pod.clone(), "uid".to_owned()).await;
        assert_eq!(answer, expected, "{code}");
    }
    let (client, _) = server(|_, _| {
        let (code, mut answer) = failure(403, "no");
        answer["details"] = json!({"causes": [{"reason": "NamespaceTerminating", "message": ""}]});
        std::future::ready((code, answer))
    });
    assert_eq!(evict(client, pod, "uid".to_owned()).await.1, Answer::Refused("no".to_owned()));
}
