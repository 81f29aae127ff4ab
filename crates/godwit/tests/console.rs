//! What only the guest's node can do, asked of the API server: the serial console, which stays with its guest, pause, reset.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{Cluster, status};
use futures::{SinkExt, StreamExt};
use godwit_guest_rom::{Line, Parameters};
use kube::api::DynamicObject;
use kube::client::ConfigExt;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use serde_json::Value;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

const VMIS: &str = "virtualmachineinstances";

/// An open console: what was heard on it, until it was closed.
struct Console {
    heard: Arc<Mutex<String>>,
    task: tokio::task::JoinHandle<()>,
}

/// Opens a console as virtctl does.
async fn open(cluster: &Cluster, vmi: &str) -> Console {
    let kubeconfig = Kubeconfig::read_from(cluster.kubeconfig()).expect("kubeconfig");
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.expect("config");
    let host = config.cluster_url.authority().expect("host and port").to_string();
    let tls = config.rustls_client_config().expect("certificates");
    let tcp = TcpStream::connect(&host).await.expect("connect");
    let name = rustls::pki_types::ServerName::try_from("127.0.0.1").expect("a name");
    let stream = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, tcp).await.expect("TLS");
    let url = format!("wss://{host}/apis/subresources.kubevirt.io/v1/namespaces/default/{VMIS}/{vmi}/console");
    let mut request = url.into_client_request().expect("request");
    request.headers_mut().insert("sec-websocket-protocol", "plain.kubevirt.io".parse().expect("a value"));
    let (mut socket, answer) = tokio_tungstenite::client_async(request, stream).await.expect("a websocket");
    assert_eq!(answer.headers()["sec-websocket-protocol"], "plain.kubevirt.io");
    socket.send(Message::Binary("\n".into())).await.expect("a key is pressed");
    let heard = Arc::new(Mutex::new(String::new()));
    let task = {
        let heard = heard.clone();
        tokio::spawn(async move {
            while let Some(Ok(message)) = socket.next().await {
                if let Message::Binary(bytes) = message {
                    heard.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes));
                }
            }
        })
    };
    Console { heard, task }
}

impl Console {
    /// The whole lines that were heard. It was opened in the middle of one.
    fn lines(&self) -> Vec<Line> {
        let heard = self.heard.lock().unwrap().clone();
        let whole = heard.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let whole = whole.split_once('\n').map_or("", |(_, whole)| whole);
        whole
            .lines()
            .filter(|line| !line.trim().is_empty())
            .map(|line| Line::parse(line).unwrap_or_else(|| panic!("not a line of the guest's: {line:?}")))
            .collect()
    }

    /// The counter of each beat that was heard.
    fn counts(&self) -> Vec<u32> {
        let count = |line: Line| match line {
            Line::Beat { count, .. } => Some(count),
            _ => None,
        };
        self.lines().into_iter().filter_map(count).collect()
    }

    /// Waits for so many further beats.
    async fn hears(&self, more: usize, cluster: &Cluster) {
        let before = self.counts().len();
        let deadline = Instant::now() + Duration::from_secs(120);
        while self.counts().len() < before + more {
            assert!(!self.task.is_finished(), "the console has been closed\n{}", cluster.words());
            assert!(Instant::now() < deadline, "the guest is silent: {:?}\n{}", self.counts().last(), cluster.words());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until the server has closed it.
    async fn closes(self, cluster: &Cluster) {
        let closed = tokio::time::timeout(Duration::from_secs(120), self.task).await;
        closed.unwrap_or_else(|_| panic!("the console stays open\n{}", cluster.words())).expect("the reader ends");
    }
}

async fn ask(cluster: &Cluster, action: &str) -> (u16, String) {
    cluster.put_action(None, (VMIS, "talker", action), &Value::Null).await
}

fn is(condition: &'static str) -> impl Fn(&DynamicObject) -> bool {
    move |vmi| {
        let all = vmi.data["status"]["conditions"].as_array();
        all.is_some_and(|all| all.iter().any(|one| one["type"] == condition && one["status"] == "True"))
    }
}

async fn migrates(cluster: &Cluster, name: &str) {
    cluster.migrate("talker", name).await;
    let over = |migration: &DynamicObject| ["Succeeded", "Failed"].contains(&status(migration, "phase").as_str());
    let migration = cluster.wait(&cluster.migrations(), name, "it is over", over).await;
    assert_eq!(status(&migration, "phase"), "Succeeded", "{}\n{}", migration.data, cluster.words());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_console_follows_its_guest_through_two_migrations() {
    let cluster = Cluster::start(2).await;
    // Fifty beats a second.
    cluster.build_rom_image(Parameters { beat_ticks: 2, ..Parameters::default() });
    cluster.start_rom_guest("talker").await;
    cluster.wait(&cluster.vmis(), "talker", "it can be moved", is("LiveMigratable")).await;

    let console = open(&cluster, "talker").await;
    console.hears(10, &cluster).await;
    for name in ["away", "home"] {
        migrates(&cluster, name).await;
        console.hears(50, &cluster).await;
    }
    let counts = console.counts();
    let first = counts[0];
    let complete: Vec<u32> = (first..).take(counts.len()).collect();
    assert_eq!(counts, complete, "something is missing, twice, or out of order");
    assert!(console.lines().iter().all(|line| matches!(line, Line::Beat { .. })), "{:?}", console.lines());

    // A newer console takes the older one's place.
    let newer = open(&cluster, "talker").await;
    console.closes(&cluster).await;
    newer.hears(10, &cluster).await;

    // A paused guest says nothing, and goes on where it was.
    assert_eq!(ask(&cluster, "unpause").await.0, 409);
    assert_eq!(ask(&cluster, "pause").await, (200, String::new()));
    cluster.wait(&cluster.vmis(), "talker", "it is paused", is("Paused")).await;
    let said = "Operation cannot be fulfilled on virtualmachineinstance.kubevirt.io \"talker\": VMI is already paused";
    assert_eq!(ask(&cluster, "pause").await, (409, said.to_owned()));
    assert_eq!(ask(&cluster, "unpause").await, (200, String::new()));
    cluster.wait(&cluster.vmis(), "talker", "it runs on", |vmi| !is("Paused")(vmi)).await;
    newer.hears(10, &cluster).await;
    let counts = newer.counts();
    assert_eq!(counts, (counts[0]..).take(counts.len()).collect::<Vec<u32>>());

    // Reset, it starts over.
    assert_eq!(ask(&cluster, "reset").await, (200, String::new()));
    let deadline = Instant::now() + Duration::from_secs(120);
    while !newer.heard.lock().unwrap().contains("start ") {
        assert!(Instant::now() < deadline, "it does not start over\n{}", cluster.words());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // There is no agent in it.
    let (code, said) = ask(&cluster, "softreboot").await;
    assert!(code == 409 && said.contains("VMI does not have guest agent connected"), "{code} {said}");
    let path = format!("/apis/subresources.kubevirt.io/v1/namespaces/default/{VMIS}/talker");
    for (action, wanted) in [("guestosinfo", 409), ("console", 400)] {
        let request =
            http::Request::get(format!("{path}/{action}")).body(kube::client::Body::empty()).expect("request");
        let code = cluster.client.send(request).await.expect("an answer").status().as_u16();
        assert_eq!(code, wanted, "{action}");
    }

    cluster.vmis().delete("talker", &Default::default()).await.expect("delete");
    newer.closes(&cluster).await;
}
