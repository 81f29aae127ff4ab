use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::serve::Listener as _;
use bytes::Bytes;
use godwit_launcher::console::{Console, Hello};
use http::Method;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::*;
use crate::testing::Ca;

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const ONE: &str = "0b6f4d0a-93a0-4d0a-9d0a-93a04d0a9d01";
const TWO: &str = "0b6f4d0a-93a0-4d0a-9d0a-93a04d0a9d02";

/// A node's door, and the API server's way to it.
async fn door(folder: &Path, ca: &Ca, client: &str) -> (FrontClient, tokio::task::JoinHandle<()>) {
    let files = |name: &str, cn: &str| {
        let folder = folder.join(name);
        std::fs::create_dir_all(&folder).unwrap();
        ca.issue(&folder, cn, &[])
    };
    let listener = listener::Listener::bind((LOCAL, 0).into(), files("node", "system:node:node1")).await;
    let port = listener.local_addr().unwrap().port();
    let door = tokio::spawn(serve(listener, folder.to_owned()));
    let dial: Dial = Arc::new(|address| Box::pin(TcpStream::connect(address)));
    (FrontClient::new(files("client", client), dial).at_port(port), door)
}

/// A launcher's console, and QEMU's end of it.
async fn console(folder: &Path, pod: &str) -> (Console, UnixStream) {
    let dir = SocketDir::path_of(folder, pod);
    std::fs::create_dir_all(&dir).unwrap();
    // The path is longer than a socket's address may be.
    let dir = SocketDir::open(dir).unwrap();
    let qemu = folder.join(format!("q{pod}"));
    let listener = UnixListener::bind(&qemu).unwrap();
    let clients = dir.short("");
    let (console, guest) = tokio::join!(Console::open(&qemu, &clients, |_| ()), listener.accept());
    (console.unwrap(), guest.unwrap().0)
}

struct Told(Mutex<Sight>);

impl Whereabouts for Told {
    fn look<'a>(&'a self, _: &'a str) -> futures::future::BoxFuture<'a, Sight> {
        Box::pin(std::future::ready(self.0.lock().unwrap().clone()))
    }
}

fn spot(pod: &str) -> Spot {
    Spot { node: "node1".to_owned(), address: LOCAL, pod_uid: pod.to_owned() }
}

/// Whatever does not come at all shall fail the test with words.
const NEVER: Duration = Duration::from_secs(60);

async fn hear(said: &mut mpsc::Receiver<Bytes>, until: usize) -> String {
    let mut heard = Vec::new();
    while heard.len() < until {
        let so_far = String::from_utf8_lossy(&heard).into_owned();
        let more = tokio::time::timeout(NEVER, said.recv()).await;
        let more = more.unwrap_or_else(|_| panic!("after {so_far:?} the console is silent; {until} bytes were said"));
        heard.extend_from_slice(&more.unwrap_or_else(|| panic!("after {so_far:?} the console has been closed")));
    }
    String::from_utf8(heard).unwrap()
}

/// The next key that the guest gets.
async fn key(guest: &mut UnixStream) -> u8 {
    let mut key = [0];
    let read = tokio::time::timeout(NEVER, tokio::io::AsyncReadExt::read_exact(guest, &mut key)).await;
    read.expect("the key does not come to the guest").unwrap();
    key[0]
}

#[tokio::test]
async fn a_console_follows_its_guest_without_a_gap() {
    let (folder, ca) = (tempfile::tempdir().unwrap(), Ca::new());
    let (front, door) = door(folder.path(), &ca, CLIENT_NAME).await;
    let (source, mut there) = console(folder.path(), ONE).await;
    let guest = Arc::new(Told(Mutex::new(Sight { now: Some(spot(ONE)), ..Sight::default() })));
    there.write_all(b"before").await.unwrap();
    let mut first = front.console(("node1", LOCAL), ONE, Hello { from: Some(0) }).await.unwrap();
    let Some(console::Frame::At(0)) = console::Frame::read(&mut first).await.unwrap() else { panic!() };
    let Some(console::Frame::Said(bytes)) = console::Frame::read(&mut first).await.unwrap() else { panic!() };
    assert_eq!(&bytes[..], b"before");

    let here = Here::open(&front, spot(ONE)).await.unwrap();
    let (typed, hears) = mpsc::channel(4);
    let (says, mut said) = mpsc::channel(4);
    let following = {
        let (front, guest) = (front.clone(), guest.clone());
        tokio::spawn(async move { follow(&front, guest.as_ref(), here, hears, says).await })
    };
    typed.send(Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(key(&mut there).await, b'x');
    there.write_all(b"one ").await.unwrap();
    assert_eq!(hear(&mut said, 4).await, "one ");

    // The guest goes to another launcher, and talks there before anybody listens.
    let (_target, mut anew) = console(folder.path(), TWO).await;
    there.write_all(b"two ").await.unwrap();
    anew.write_all(b"three ").await.unwrap();
    drop(there);
    source.drain().await;
    *guest.0.lock().unwrap() = Sight { now: Some(spot(ONE)), next: Some(spot(TWO)), ..Sight::default() };
    assert_eq!(hear(&mut said, 10).await, "two three ");
    *guest.0.lock().unwrap() = Sight { now: Some(spot(TWO)), ..Sight::default() };
    typed.send(Bytes::from_static(b"y")).await.unwrap();
    assert_eq!(key(&mut anew).await, b'y');

    // A newer client takes it over.
    let _newer = Here::open(&front, spot(TWO)).await.unwrap();
    tokio::time::timeout(NEVER, following).await.expect("the older client stays").unwrap();
    assert!(said.recv().await.is_none());
    door.abort();
}

#[tokio::test]
async fn only_the_api_server_comes_in_and_learns_what_is_not_there() {
    let (folder, ca) = (tempfile::tempdir().unwrap(), Ca::new());
    let (front, _door) = door(folder.path(), &ca, CLIENT_NAME).await;
    let refused = |error: CallError| match error {
        CallError::Refused { status, message } => (status, message),
        CallError::Unreachable { why, .. } => panic!("{why}"),
    };
    let (status, message) = refused(front.call(("node1", LOCAL), Method::PUT, ONE, "pause").await.unwrap_err());
    assert!(status == 404 && message.contains(ONE), "{status} {message}");
    let (status, _) = refused(front.call(("node1", LOCAL), Method::PUT, "..", "pause").await.unwrap_err());
    assert_eq!(status, 404);
    let other = front.call(("node2", LOCAL), Method::PUT, ONE, "pause").await;
    assert!(matches!(other, Err(CallError::Unreachable { .. })), "another node than was meant: {other:?}");

    let folder = tempfile::tempdir().unwrap();
    let (stranger, _door) = door_of(folder.path(), &ca).await;
    let answer = stranger.call(("node1", LOCAL), Method::PUT, ONE, "pause").await;
    assert!(matches!(answer, Err(CallError::Unreachable { .. })), "a node is not the API server: {answer:?}");
}

#[tokio::test]
async fn whoever_connects_and_says_nothing_keeps_nobody_out() {
    let (folder, ca) = (tempfile::tempdir().unwrap(), Ca::new());
    let (front, _door) = door(folder.path(), &ca, CLIENT_NAME).await;
    let mut idle = Vec::new();
    for _ in 0..2 * listener::HANDSHAKES {
        idle.push(TcpStream::connect((LOCAL, front.port())).await.unwrap());
    }
    let answer = front.call(("node1", LOCAL), Method::PUT, ONE, "pause").await;
    assert!(matches!(answer, Err(CallError::Refused { status: 404, .. })), "{answer:?}");
}

#[test]
fn a_console_that_is_not_found_is_looked_for_less_and_less_often() {
    let mut pauses = follow::Pauses::default();
    let mut waited = Duration::ZERO;
    let mut looks = 0;
    while waited < Duration::from_secs(60) {
        waited += pauses.next();
        looks += 1;
    }
    assert!((30..=40).contains(&looks), "{looks} looks in a minute");
}

async fn door_of(folder: &Path, ca: &Ca) -> (FrontClient, tokio::task::JoinHandle<()>) {
    door(folder, ca, "system:node:node2").await
}
