//! The guest's serial console: to clients, and line by line to the container's output, so that `kubectl logs` shows it.
//!
//! Clients come by two sockets. [`SOCKET`] carries bytes as they are, to any number of clients, from when they connect.
//! [`STREAM`] tells how far the console is ([`Hello`]) and can begin with what was said before: whoever follows a guest from one
//! launcher to the next misses nothing. It has one client at a time; a newer one takes the older one's place.

use bytes::{BufMut, Bytes, BytesMut};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// What every line in the container's output begins with.
pub const PREFIX: &str = "console: ";
/// Name of the socket for clients that want bytes as they are.
pub const SOCKET: &str = "console-serial0";
/// Name of the socket for the client that follows the guest. An older launcher does not have it.
pub const STREAM: &str = "console-stream";
/// A line longer than this is broken in the log.
const LONGEST_LINE: usize = 4096;
/// How long a broken connection to QEMU's socket is tried again at the start.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How much of what the guest has said is kept, in bytes.
const KEPT: usize = 256 << 10;
/// The most that one frame carries, in bytes.
const LARGEST_FRAME: usize = 64 << 10;
/// After QEMU's end, how long what it said last may take to be read and handed on. It is over as soon as that has been done;
/// only clients that do not read make it last.
const DRAIN: Duration = Duration::from_secs(5);

/// What a client of [`STREAM`] sends first, as one line of JSON; then come the bytes that are typed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Begin with this byte of what the guest has said to this launcher, counted from 0; none: with what it says from now on.
    /// Where that is not kept any more, what is kept is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<u64>,
}

/// What a client of [`STREAM`] is sent. On the wire: the length of what follows in four bytes (big endian), a letter, and the
/// letter's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// First: which byte the next one is. Eight bytes, big endian.
    At(u64),
    /// What the guest said.
    Said(Bytes),
    /// The guest says nothing more here, and all of it has been sent.
    End,
    /// A newer client has come.
    Replaced,
}

impl Frame {
    /// The frame's bytes.
    pub fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::new();
        let (letter, body): (u8, &[u8]) = match self {
            Frame::At(at) => (b'a', &at.to_be_bytes()),
            Frame::Said(said) => (b's', said),
            Frame::End => (b'e', &[]),
            Frame::Replaced => (b'r', &[]),
        };
        bytes.put_u32(u32::try_from(body.len() + 1).unwrap_or(u32::MAX));
        bytes.put_u8(letter);
        bytes.put_slice(body);
        bytes.freeze()
    }

    /// Reads the next frame; none at the stream's end. Frames of a kind that this build does not know are passed over.
    ///
    /// # Errors
    /// A broken stream, or one that is none of these.
    pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Option<Frame>> {
        loop {
            let length = match stream.read_u32().await {
                Ok(length) => usize::try_from(length).unwrap_or(usize::MAX),
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(error) => return Err(error),
            };
            if length == 0 || length > LARGEST_FRAME + 1 {
                return Err(std::io::Error::other(format!("a frame of {length} bytes on the console's stream")));
            }
            let letter = stream.read_u8().await?;
            let mut body = vec![0; length - 1];
            stream.read_exact(&mut body).await?;
            match letter {
                b'a' => {
                    let at = body.try_into().map_err(|_| std::io::Error::other("a frame without a place"))?;
                    return Ok(Some(Frame::At(u64::from_be_bytes(at))));
                }
                b's' => return Ok(Some(Frame::Said(body.into()))),
                b'e' => return Ok(Some(Frame::End)),
                b'r' => return Ok(Some(Frame::Replaced)),
                _ => {}
            }
        }
    }
}

/// Carries the console while it exists.
#[derive(Debug)]
pub struct Console {
    /// Reads what the guest says, on a thread of its own: QEMU's socket holds not even three hundred bytes, for QEMU sends a serial
    /// port byte by byte, and a guest that has waited for the port long enough goes on without it. The launcher's own thread
    /// may be busy, with a disk for example, for longer than that.
    reader: Option<JoinHandle<()>>,
    /// What ends the reader.
    qemu: std::os::unix::net::UnixStream,
    tasks: Vec<JoinHandle<()>>,
    /// Gone once every client of the streams has been served.
    served: watch::Receiver<()>,
}

impl Drop for Console {
    fn drop(&mut self) {
        // It may be closed already.
        let _ = self.qemu.shutdown(Shutdown::Both);
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Console {
    /// Connects to QEMU's side (`qemu`) and offers clients [`SOCKET`] and [`STREAM`] in the folder `clients`. To be called before
    /// the guest runs: what QEMU has to say while nobody is connected is lost. Lines go to `log`.
    pub async fn open(
        qemu: &Path,
        clients: &Path,
        log: impl FnMut(&[u8]) + Send + 'static,
    ) -> std::io::Result<Console> {
        let stream = tokio::time::timeout(CONNECT_LIMIT, connect(qemu)).await.unwrap_or_else(|_| {
            Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "QEMU does not offer its console"))
        })?;
        let listen = |name: &str| {
            let path = clients.join(name);
            let _ = std::fs::remove_file(&path);
            UnixListener::bind(path)
        };
        let (raw, follow) = (listen(SOCKET)?, listen(STREAM)?);
        let said = Arc::new(Said::default());
        let (input, typed) = mpsc::channel(64);
        let (serving, served) = watch::channel(());
        let qemu = stream.into_std()?;
        let read = qemu.try_clone()?;
        let write = UnixStream::from_std(qemu.try_clone()?)?;
        let heard = said.clone();
        let reader = tokio::task::spawn_blocking(move || from_guest(read, &heard, log));
        let tasks = vec![
            tokio::spawn(to_guest(write, typed)),
            tokio::spawn(accept(raw, said.clone(), input.clone())),
            tokio::spawn(accept_followers(follow, said, input, serving)),
        ];
        Ok(Console { reader: Some(reader), qemu, tasks, served })
    }

    /// After QEMU's end: what it said last is read and handed on, in some time.
    pub async fn drain(mut self) {
        let Some(reader) = self.reader.take() else { return };
        let deadline = tokio::time::Instant::now() + DRAIN;
        let _ = tokio::time::timeout_at(deadline, reader).await;
        let served = async { while self.served.changed().await.is_ok() {} };
        let _ = tokio::time::timeout_at(deadline, served).await;
    }
}

/// Writes a line to the container's output.
pub fn to_stdout(line: &[u8]) {
    let mut out = std::io::stdout().lock();
    // Nobody may be reading; the guest must not suffer from that.
    let _ = out.write_all(PREFIX.as_bytes()).and_then(|()| out.write_all(line)).and_then(|()| out.write_all(b"\n"));
    let _ = out.flush();
}

/// What the guest has said lately.
#[derive(Debug)]
struct Said {
    kept: Mutex<Kept>,
    /// How many bytes the guest has said; grows with each, and changes once more at the end.
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Which byte of all that was said the first one of `bytes` is.
    start: u64,
    bytes: VecDeque<u8>,
    ended: bool,
}

impl Kept {
    fn clamp(&self, at: u64) -> u64 {
        at.clamp(self.start, self.start + self.bytes.len() as u64)
    }
}

impl Default for Said {
    fn default() -> Self {
        Self { kept: Mutex::default(), changed: watch::Sender::new(0) }
    }
}

impl Said {
    fn add(&self, bytes: &[u8]) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.bytes.extend(bytes);
        let surplus = kept.bytes.len().saturating_sub(KEPT);
        kept.bytes.drain(..surplus);
        kept.start += surplus as u64;
        self.changed.send_replace(kept.start + kept.bytes.len() as u64);
    }

    fn end(&self) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.ended = true;
        self.changed.send_modify(|_| ());
    }

    /// The place of the byte that is said next.
    fn now(&self) -> u64 {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.start + kept.bytes.len() as u64
    }

    /// The place from which on a client that asks for `at` is told.
    fn kept_from(&self, at: u64) -> u64 {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).clamp(at)
    }

    /// What was said from `at` on, as far as it is kept, and the place after it; and whether that was all.
    fn after(&self, at: u64) -> (Bytes, u64, bool) {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let from = kept.clamp(at);
        let skip = usize::try_from(from - kept.start).unwrap_or(usize::MAX);
        let bytes: Vec<u8> = kept.bytes.iter().skip(skip).take(LARGEST_FRAME).copied().collect();
        let next = from + bytes.len() as u64;
        let all = next >= kept.start + kept.bytes.len() as u64;
        (bytes.into(), next, kept.ended && all)
    }
}

async fn connect(path: &Path) -> std::io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Ok(stream) => return Ok(stream),
            Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused) => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(e) => return Err(e),
        }
    }
}

fn from_guest(mut qemu: impl Read + AsFd, said: &Said, mut log: impl FnMut(&[u8])) {
    let mut line = Vec::new();
    let mut buffer = vec![0u8; 4096];
    loop {
        // The socket does not block: its other half is tokio's.
        let count = match qemu.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                match poll(&mut [PollFd::new(qemu.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
                    Ok(_) | Err(Errno::EINTR) => continue,
                    Err(_) => break,
                }
            }
            Err(_) => break,
        };
        let Some(bytes) = buffer.get(..count).filter(|b| !b.is_empty()) else { break };
        said.add(bytes);
        for byte in bytes {
            match byte {
                b'\n' => log(&std::mem::take(&mut line)),
                b'\r' => {}
                _ => {
                    line.push(*byte);
                    if line.len() >= LONGEST_LINE {
                        log(&std::mem::take(&mut line));
                    }
                }
            }
        }
    }
    said.end();
    if !line.is_empty() {
        log(&line);
    }
}

async fn to_guest(mut write: impl AsyncWriteExt + Unpin, mut typed: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = typed.recv().await {
        if write.write_all(&bytes).await.is_err() {
            break;
        }
    }
}

async fn accept(listener: UnixListener, said: Arc<Said>, input: mpsc::Sender<Vec<u8>>) {
    // Clients end with this task.
    let mut clients = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (read, mut write) = stream.into_split();
        let (said, input) = (said.clone(), input.clone());
        let at = said.now();
        clients.spawn(async move {
            let told = async {
                let mut at = at;
                let mut changed = said.changed.subscribe();
                loop {
                    changed.borrow_and_update();
                    let (bytes, next, over) = said.after(at);
                    at = next;
                    if write.write_all(&bytes).await.is_err() || over {
                        return;
                    }
                    if bytes.is_empty() && changed.changed().await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! {
                () = told => {}
                () = typing(read, input) => {}
            }
        });
        while clients.try_join_next().is_some() {}
    }
}

/// Hands on what is typed, until its end.
async fn typing(mut read: impl AsyncRead + Unpin, input: mpsc::Sender<Vec<u8>>) {
    let mut buffer = vec![0u8; 1024];
    while let Ok(count) = read.read(&mut buffer).await {
        let Some(bytes) = buffer.get(..count).filter(|bytes| !bytes.is_empty()) else { return };
        if input.send(bytes.to_vec()).await.is_err() {
            return;
        }
    }
}

async fn accept_followers(
    listener: UnixListener,
    said: Arc<Said>,
    input: mpsc::Sender<Vec<u8>>,
    serving: watch::Sender<()>,
) {
    let serving = Arc::new(serving);
    let newest = Arc::new(watch::Sender::new(0u64));
    let mut clients = tokio::task::JoinSet::new();
    let serve = |clients: &mut tokio::task::JoinSet<()>, stream: UnixStream| {
        let (said, input, newest, serving) = (said.clone(), input.clone(), newest.clone(), serving.clone());
        clients.spawn(async move {
            let _serving = serving;
            // Whoever goes away in the middle has nothing to be told.
            let _ = follow(stream, &said, input, &newest).await;
        });
    };
    let mut ended = said.changed.subscribe();
    loop {
        let over = async {
            // The last word is `End`, which is said once.
            while !said.after(u64::MAX).2 {
                if ended.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { break };
                serve(&mut clients, stream);
            }
            () = over => {
                // Whoever had connected by then is told all of it, too.
                for stream in waiting(listener) {
                    serve(&mut clients, stream);
                }
                break;
            }
        }
        while clients.try_join_next().is_some() {}
    }
    drop(serving);
    while clients.join_next().await.is_some() {}
}

/// Those who have connected and were not accepted yet. Asked of the kernel: tokio may not have heard of them.
fn waiting(listener: UnixListener) -> Vec<UnixStream> {
    let Ok(listener) = listener.into_std() else { return Vec::new() };
    // It does not block, as tokio's.
    std::iter::from_fn(|| listener.accept().ok())
        .filter_map(|(stream, _)| {
            stream.set_nonblocking(true).ok()?;
            UnixStream::from_std(stream).ok()
        })
        .collect()
}

/// One client of [`STREAM`], from its hello to its end.
async fn follow(
    stream: UnixStream,
    said: &Said,
    input: mpsc::Sender<Vec<u8>>,
    newest: &watch::Sender<u64>,
) -> std::io::Result<()> {
    let (mut read, mut write) = stream.into_split();
    let hello = hello(&mut read).await?;
    let mut at = hello.from.unwrap_or_else(|| said.now());
    let mine = {
        let mut mine = 0;
        newest.send_modify(|newest| {
            *newest += 1;
            mine = *newest;
        });
        mine
    };
    let mut newest = newest.subscribe();
    // Frames are written whole: only waiting is broken off.
    let told = async {
        let mut changed = said.changed.subscribe();
        write.write_all(&Frame::At(said.kept_from(at)).encode()).await?;
        let last = loop {
            changed.borrow_and_update();
            let (bytes, next, over) = said.after(at);
            at = next;
            let nothing = bytes.is_empty();
            if !nothing {
                write.write_all(&Frame::Said(bytes).encode()).await?;
            }
            if over {
                break Frame::End;
            }
            if *newest.borrow() != mine {
                break Frame::Replaced;
            }
            if nothing {
                tokio::select! {
                    _ = changed.changed() => {}
                    _ = newest.changed() => {}
                }
            }
        };
        write.write_all(&last.encode()).await?;
        write.shutdown().await
    };
    tokio::select! {
        told = told => told,
        () = typing(read, input) => Ok(()),
    }
}

/// Reads the first line.
async fn hello(read: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Hello> {
    let mut line = Vec::new();
    // Byte by byte, for what follows is already the guest's; it is a short line.
    loop {
        match read.read_u8().await? {
            b'\n' => return serde_json::from_slice(&line).map_err(std::io::Error::other),
            byte if line.len() < 1024 => line.push(byte),
            _ => return Err(std::io::Error::other("a hello without an end")),
        }
    }
}

/// Opens a launcher's [`STREAM`] for whoever follows the guest.
///
/// # Errors
/// A stream that cannot be written to.
pub async fn greet(stream: &mut (impl AsyncWrite + Unpin), hello: Hello) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(&hello).map_err(std::io::Error::other)?;
    line.push(b'\n');
    stream.write_all(&line).await
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn console(folder: &Path, lines: Arc<Mutex<Vec<String>>>) -> (Console, UnixStream) {
        let qemu = folder.join("q");
        let guest = UnixListener::bind(&qemu).unwrap();
        let log = move |line: &[u8]| lines.lock().unwrap().push(String::from_utf8_lossy(line).into_owned());
        let (console, guest) = tokio::join!(Console::open(&qemu, folder, log), guest.accept());
        (console.unwrap(), guest.unwrap().0)
    }

    async fn follower(folder: &Path, from: Option<u64>) -> UnixStream {
        let mut stream = UnixStream::connect(folder.join(STREAM)).await.unwrap();
        greet(&mut stream, Hello { from }).await.unwrap();
        stream
    }

    /// Reads until the guest has said so much, or to the stream's end.
    async fn hear(stream: &mut UnixStream, until: usize) -> (Option<u64>, String, Option<Frame>) {
        let (mut at, mut said, mut last) = (None, Vec::new(), None);
        while said.len() < until {
            match Frame::read(stream).await.unwrap() {
                Some(Frame::At(place)) => at = Some(place),
                Some(Frame::Said(bytes)) => said.extend_from_slice(&bytes),
                other => {
                    last = other;
                    break;
                }
            }
        }
        (at, String::from_utf8(said).unwrap(), last)
    }

    #[tokio::test]
    async fn lines_are_logged_and_clients_talk_to_the_guest() {
        let folder = tempfile::tempdir().unwrap();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (console, mut guest) = console(folder.path(), lines.clone()).await;
        let mut client = UnixStream::connect(folder.path().join(SOCKET)).await.unwrap();
        client.write_all(b"root\n").await.unwrap();
        let mut typed = [0u8; 5];
        guest.read_exact(&mut typed).await.unwrap();
        assert_eq!(&typed, b"root\n");
        guest.write_all(b"one\r\ntw").await.unwrap();
        let mut said = [0u8; 7];
        client.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"one\r\ntw");
        guest.write_all(b"o\nlast").await.unwrap();
        drop(guest);
        console.drain().await;
        assert_eq!(*lines.lock().unwrap(), ["one", "two", "last"]);
    }

    #[tokio::test]
    async fn a_follower_hears_all_from_where_it_was_until_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let (console, mut guest) = console(folder.path(), Arc::default()).await;
        let mut first = follower(folder.path(), Some(0)).await;
        guest.write_all(b"early ").await.unwrap();
        assert_eq!(hear(&mut first, 6).await, (Some(0), "early ".to_owned(), None));
        drop(first);
        guest.write_all(b"unheard ").await.unwrap();
        let mut again = follower(folder.path(), Some(6)).await;
        assert_eq!(hear(&mut again, 8).await, (Some(6), "unheard ".to_owned(), None));
        again.write_all(b"x").await.unwrap();
        assert_eq!(guest.read_u8().await.unwrap(), b'x');
        guest.write_all(b"last").await.unwrap();
        drop(guest);
        let (heard, ()) = tokio::join!(hear(&mut again, usize::MAX), console.drain());
        assert_eq!(heard, (None, "last".to_owned(), Some(Frame::End)));
    }

    /// As QEMU sends it: byte by byte, into a socket that holds few of them.
    #[tokio::test]
    async fn the_guest_is_heard_while_the_launchers_thread_is_busy() {
        let folder = tempfile::tempdir().unwrap();
        let (console, guest) = console(folder.path(), Arc::default()).await;
        let mut guest = guest.into_std().unwrap();
        guest.set_nonblocking(false).unwrap();
        guest.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        // This is the only thread of the runtime.
        for _ in 0..2000 {
            guest.write_all(b"x").unwrap();
        }
        let mut client = follower(folder.path(), Some(0)).await;
        drop(guest);
        let (heard, ()) = tokio::join!(hear(&mut client, usize::MAX), console.drain());
        assert_eq!((heard.0, heard.1.len(), heard.2), (Some(0), 2000, Some(Frame::End)));
    }

    /// Many times, for which of two things that are ready is seen first is a matter of chance.
    #[tokio::test]
    async fn whoever_connected_before_the_end_hears_it_all() {
        for _ in 0..32 {
            let folder = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(folder.path().join(STREAM)).unwrap();
            let said = Arc::new(Said::default());
            said.add(b"last");
            said.end();
            let mut client = follower(folder.path(), Some(0)).await;
            let (serving, _served) = watch::channel(());
            let (input, _typed) = mpsc::channel(1);
            let (heard, ()) =
                tokio::join!(hear(&mut client, usize::MAX), accept_followers(listener, said, input, serving));
            assert_eq!(heard, (Some(0), "last".to_owned(), Some(Frame::End)));
        }
    }

    #[tokio::test]
    async fn a_newer_follower_takes_the_place_of_the_older() {
        let folder = tempfile::tempdir().unwrap();
        let (_console, mut guest) = console(folder.path(), Arc::default()).await;
        let mut older = follower(folder.path(), None).await;
        assert_eq!(Frame::read(&mut older).await.unwrap(), Some(Frame::At(0)));
        let mut newer = follower(folder.path(), None).await;
        assert_eq!(hear(&mut older, usize::MAX).await.2, Some(Frame::Replaced));
        assert_eq!(Frame::read(&mut newer).await.unwrap(), Some(Frame::At(0)));
        guest.write_all(b"hello").await.unwrap();
        assert_eq!(hear(&mut newer, 5).await.1, "hello");
    }

    #[test]
    fn old_words_are_forgotten_and_places_stay() {
        let said = Said::default();
        said.add(&vec![b'y'; KEPT]);
        said.add(b"new");
        assert_eq!((said.kept_from(0), said.kept_from(u64::MAX)), (3, KEPT as u64 + 3));
        let (bytes, next, over) = said.after(KEPT as u64);
        assert_eq!((&bytes[..], next, over), (&b"new"[..], KEPT as u64 + 3, false));
        said.end();
        assert!(said.after(next).2 && !said.after(0).2);
    }
}
