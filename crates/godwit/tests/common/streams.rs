//! Streams over a websocket, opened as virtctl does, and what is heard on them.

use super::Cluster;
use futures::{SinkExt, StreamExt};
use godwit_guest_rom::Line;
use kube::client::ConfigExt;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};

/// How long a guest on a busy machine may be silent.
const PATIENCE: Duration = Duration::from_secs(120);

pub type Socket = WebSocketStream<TlsStream<TcpStream>>;

/// Opens a stream of a VMI: `console`, `vnc`, with a query if it has one. The code of a refusal.
pub async fn open(cluster: &Cluster, vmi: &str, what: &str) -> Result<Socket, u16> {
    let kubeconfig = Kubeconfig::read_from(cluster.kubeconfig()).expect("kubeconfig");
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.expect("config");
    let host = config.cluster_url.authority().expect("host and port").to_string();
    let tls = config.rustls_client_config().expect("certificates");
    let tcp = TcpStream::connect(&host).await.expect("connect");
    let name = rustls::pki_types::ServerName::try_from("127.0.0.1").expect("a name");
    let stream = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, tcp).await.expect("TLS");
    let path = format!("apis/subresources.kubevirt.io/v1/namespaces/default/virtualmachineinstances/{vmi}/{what}");
    let mut request = format!("wss://{host}/{path}").into_client_request().expect("request");
    request.headers_mut().insert("sec-websocket-protocol", "plain.kubevirt.io".parse().expect("a value"));
    match tokio_tungstenite::client_async(request, stream).await {
        Ok((socket, answer)) => {
            assert_eq!(answer.headers()["sec-websocket-protocol"], "plain.kubevirt.io");
            Ok(socket)
        }
        Err(Error::Http(refused)) => Err(refused.status().as_u16()),
        Err(error) => panic!("{what} of {vmi}: {error}\n{}", cluster.words()),
    }
}

/// An open console: what was heard on it, until it was closed.
pub struct Console {
    heard: Arc<Mutex<String>>,
    /// Ends with the reason that was given, if any was.
    task: tokio::task::JoinHandle<Option<String>>,
}

impl Console {
    pub async fn open(cluster: &Cluster, vmi: &str) -> Self {
        let mut socket = open(cluster, vmi, "console").await.expect("a console");
        socket.send(Message::Binary("\n".into())).await.expect("a key is pressed");
        let heard = Arc::new(Mutex::new(String::new()));
        let task = {
            let heard = heard.clone();
            tokio::spawn(async move {
                while let Some(Ok(message)) = socket.next().await {
                    match message {
                        Message::Binary(bytes) => heard.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes)),
                        Message::Close(frame) => return frame.map(|frame| frame.reason.to_string()),
                        _ => {}
                    }
                }
                None
            })
        };
        Self { heard, task }
    }

    /// All that was heard.
    pub fn heard(&self) -> String {
        self.heard.lock().unwrap().clone()
    }

    /// The whole lines that were heard. It was opened in the middle of one.
    pub fn lines(&self) -> Vec<Line> {
        let heard = self.heard();
        let whole = heard.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let whole = whole.split_once('\n').map_or("", |(_, whole)| whole);
        whole
            .lines()
            .filter(|line| !line.trim().is_empty())
            .map(|line| Line::parse(line).unwrap_or_else(|| panic!("not a line of the guest's: {line:?}")))
            .collect()
    }

    /// The counter of each beat that was heard.
    pub fn counts(&self) -> Vec<u32> {
        let count = |line: Line| match line {
            Line::Beat { count, .. } => Some(count),
            _ => None,
        };
        self.lines().into_iter().filter_map(count).collect()
    }

    /// Each beat was heard, once and in order.
    pub fn is_complete(&self) {
        let counts = self.counts();
        let complete: Vec<u32> = (counts[0]..).take(counts.len()).collect();
        assert_eq!(counts, complete, "something is missing, twice, or out of order");
        assert!(self.lines().iter().all(|line| matches!(line, Line::Beat { .. })), "{:?}", self.lines());
    }

    /// Waits for so many further beats.
    pub async fn hears(&self, more: usize, cluster: &Cluster) {
        let before = self.counts().len();
        let deadline = Instant::now() + PATIENCE;
        while self.counts().len() < before + more {
            assert!(!self.task.is_finished(), "the console has been closed\n{}", cluster.words());
            assert!(Instant::now() < deadline, "the guest is silent: {:?}\n{}", self.counts().last(), cluster.words());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until the server has closed it; the reason that it gave.
    pub async fn closes(self, cluster: &Cluster) -> Option<String> {
        let closed = tokio::time::timeout(PATIENCE, self.task).await;
        closed.unwrap_or_else(|_| panic!("the console stays open\n{}", cluster.words())).expect("the reader ends")
    }
}

/// An open screen, at the end of VNC's greetings (RFC 6143, 7.1 to 7.3).
pub struct Screen {
    socket: Socket,
    received: Vec<u8>,
    /// Width and height.
    pub size: (u16, u16),
    bytes_per_pixel: usize,
}

impl Screen {
    pub async fn open(cluster: &Cluster, vmi: &str) -> Self {
        let socket = open(cluster, vmi, "vnc").await.unwrap_or_else(|code| panic!("{code}\n{}", cluster.words()));
        let mut screen = Self { socket, received: Vec::new(), size: (0, 0), bytes_per_pixel: 0 };
        assert_eq!(screen.next(12).await, b"RFB 003.008\n");
        screen.say(b"RFB 003.008\n").await;
        // One kind of security: none. The API server has looked at who this is.
        assert_eq!(screen.next(2).await, [1, 1]);
        screen.say(&[1]).await;
        assert_eq!(screen.next(4).await, [0; 4]);
        // Shared with others.
        screen.say(&[1]).await;
        let start = screen.next(24).await;
        screen.size = (short(&start, 0), short(&start, 2));
        screen.bytes_per_pixel = usize::from(start[4] / 8);
        let name = screen.next(usize::from(short(&start, 22))).await;
        assert!(String::from_utf8_lossy(&name).contains(vmi), "{name:?}");
        // Pixels as they are.
        screen.say(&[2, 0, 0, 1, 0, 0, 0, 0]).await;
        screen
    }

    /// Asks for the whole picture; how many pixels came.
    pub async fn picture(&mut self) -> usize {
        let [width, height] = [self.size.0, self.size.1].map(u16::to_be_bytes);
        self.say(&[3, 0, 0, 0, 0, 0, width[0], width[1], height[0], height[1]]).await;
        let head = self.next(4).await;
        assert_eq!(head[0], 0, "an update: {head:?}");
        let mut pixels = 0;
        for _ in 0..short(&head, 2) {
            let rectangle = self.next(12).await;
            assert_eq!(rectangle[8..], [0; 4], "raw");
            let area = usize::from(short(&rectangle, 4)) * usize::from(short(&rectangle, 6));
            self.next(area * self.bytes_per_pixel).await;
            pixels += area;
        }
        pixels
    }

    /// Waits until the server closes it; the reason that it gives.
    pub async fn closes(mut self) -> String {
        let work = async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Close(Some(frame)))) => return frame.reason.to_string(),
                    Some(Ok(_)) => {}
                    other => panic!("closed without a word: {other:?}"),
                }
            }
        };
        tokio::time::timeout(PATIENCE, work).await.expect("the screen stays open")
    }

    async fn say(&mut self, bytes: &[u8]) {
        self.socket.send(Message::Binary(bytes.to_vec().into())).await.expect("send");
    }

    async fn next(&mut self, count: usize) -> Vec<u8> {
        while self.received.len() < count {
            let message = tokio::time::timeout(PATIENCE, self.socket.next()).await.expect("the screen is silent");
            match message.expect("the screen is open").expect("a message") {
                Message::Binary(bytes) => self.received.extend(bytes),
                other => panic!("{other:?}"),
            }
        }
        self.received.drain(..count).collect()
    }
}

fn short(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}
