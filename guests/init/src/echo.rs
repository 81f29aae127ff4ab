//! The echo service (RFC 862) on TCP port 7: whoever measures whether connections live through a move talks to it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

/// Port of the service.
const PORT: u16 = 7;
/// A thread for each connection, hundreds of them: none needs much.
const STACK: usize = 64 * 1024;

/// Sends back what comes, for ever.
pub fn serve() {
    let listener = loop {
        match TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)) {
            Ok(listener) => break listener,
            Err(_) => thread::sleep(Duration::from_millis(500)),
        }
    };
    for stream in listener.incoming().flatten() {
        let answered = thread::Builder::new().stack_size(STACK).spawn(move || echo(stream));
        if let Err(error) = answered {
            println!("echo: no thread for a connection: {error}");
        }
    }
}

fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(length) = stream.read(&mut buffer) {
        let Some(bytes) = buffer.get(..length).filter(|bytes| !bytes.is_empty()) else { return };
        if stream.write_all(bytes).is_err() {
            return;
        }
    }
}
