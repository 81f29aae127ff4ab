//! The guest's serial console: to any number of clients of `console-serial0`, and line by line to the container's output,
//! so that `kubectl logs` shows it.

use std::io::Write;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinHandle;

/// What every line in the container's output begins with.
pub const PREFIX: &str = "console: ";
/// Name of the socket for clients.
pub const SOCKET: &str = "console-serial0";
/// A line longer than this is broken in the log.
const LONGEST_LINE: usize = 4096;
/// How long a broken connection to QEMU's socket is tried again at the start.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Carries the console while it exists.
#[derive(Debug)]
pub struct Console {
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Console {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Console {
    /// Connects to QEMU's side (`qemu`) and offers clients the socket `clients`. To be called before the guest runs: what QEMU
    /// has to say while nobody is connected is lost. Lines go to `log`.
    pub async fn open(
        qemu: &Path,
        clients: &Path,
        log: impl FnMut(&[u8]) + Send + 'static,
    ) -> std::io::Result<Console> {
        let stream = tokio::time::timeout(CONNECT_LIMIT, connect(qemu)).await.unwrap_or_else(|_| {
            Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "QEMU does not offer its console"))
        })?;
        let _ = std::fs::remove_file(clients);
        let listener = UnixListener::bind(clients)?;
        let (output, _) = broadcast::channel(256);
        let (input, typed) = mpsc::channel(64);
        let (read, write) = stream.into_split();
        let tasks = vec![
            tokio::spawn(from_guest(read, output.clone(), log)),
            tokio::spawn(to_guest(write, typed)),
            tokio::spawn(accept(listener, output, input)),
        ];
        Ok(Console { tasks })
    }

    /// Gives what QEMU said last some time to be read, after QEMU's end.
    pub async fn drain(mut self) {
        if !self.tasks.is_empty() {
            let reader = self.tasks.remove(0);
            let abort = reader.abort_handle();
            if tokio::time::timeout(Duration::from_millis(500), reader).await.is_err() {
                abort.abort();
            }
        }
    }
}

/// Writes a line to the container's output.
pub fn to_stdout(line: &[u8]) {
    let mut out = std::io::stdout().lock();
    // Nobody may be reading; the guest must not suffer from that.
    let _ = out.write_all(PREFIX.as_bytes()).and_then(|()| out.write_all(line)).and_then(|()| out.write_all(b"\n"));
    let _ = out.flush();
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

async fn from_guest(
    mut read: impl AsyncReadExt + Unpin,
    output: broadcast::Sender<Vec<u8>>,
    mut log: impl FnMut(&[u8]) + Send,
) {
    let mut line = Vec::new();
    let mut buffer = vec![0u8; 4096];
    while let Ok(count) = read.read(&mut buffer).await {
        let Some(bytes) = buffer.get(..count).filter(|b| !b.is_empty()) else { break };
        // An error only says that no client is there.
        let _ = output.send(bytes.to_vec());
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

async fn accept(listener: UnixListener, output: broadcast::Sender<Vec<u8>>, input: mpsc::Sender<Vec<u8>>) {
    // Clients end with this task.
    let mut clients = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        clients.spawn(client(stream, output.subscribe(), input.clone()));
        while clients.try_join_next().is_some() {}
    }
}

async fn client(stream: UnixStream, mut output: broadcast::Receiver<Vec<u8>>, input: mpsc::Sender<Vec<u8>>) {
    let (mut read, mut write) = stream.into_split();
    let mut buffer = vec![0u8; 1024];
    loop {
        tokio::select! {
            said = output.recv() => match said {
                Ok(bytes) => if write.write_all(&bytes).await.is_err() { return },
                // A client that reads too slowly misses something; the guest does not wait for it.
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            },
            count = read.read(&mut buffer) => match count {
                Ok(count) if count > 0 => {
                    let Some(bytes) = buffer.get(..count) else { return };
                    if input.send(bytes.to_vec()).await.is_err() { return }
                }
                _ => return,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[tokio::test]
    async fn lines_are_logged_and_clients_talk_to_the_guest() {
        let folder = tempfile::tempdir().unwrap();
        let (qemu, clients) = (folder.path().join("q"), folder.path().join("c"));
        let guest = UnixListener::bind(&qemu).unwrap();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let kept = lines.clone();
        let (console, guest) = tokio::join!(
            Console::open(&qemu, &clients, move |line| kept
                .lock()
                .unwrap()
                .push(String::from_utf8_lossy(line).into_owned())),
            guest.accept()
        );
        let (console, mut guest) = (console.unwrap(), guest.unwrap().0);
        let mut client = UnixStream::connect(&clients).await.unwrap();
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
}
