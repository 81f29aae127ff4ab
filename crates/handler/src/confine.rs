//! A connection of the handler's that a launcher gets, and with it whoever breaks out of that launcher's guest.
//!
//! A socket belongs to the network namespace that it was made in, whoever holds it, and it can be taken for more than the connection
//! that it carries: connect(2) with `AF_UNSPEC` dissolves that, and then it would reach, or listen, where the handler does. No
//! TCP connection comes about without a segment that says SYN, in either direction, and one that is there gets none any more. So such
//! segments are kept from it, by a filter that nobody can take off again.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::libc;
use socket2::{SockFilter, SockRef};

/// The header's octet that has its flags (RFC 9293, 3.1).
const FLAGS: u32 = 13;
const SYN: u32 = 0x02;

/// Loads the octet; drops the segment if it says SYN, or takes all of it.
const FILTER: [SockFilter; 4] = [
    SockFilter::new((libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16, 0, 0, FLAGS),
    SockFilter::new((libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16, 0, 1, SYN),
    SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0),
    SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, u32::MAX),
];

/// Lets an established TCP connection be nothing else, for as long as there is a descriptor of it.
///
/// # Errors
/// As `setsockopt(2)`.
pub fn to_its_connection(connection: &impl AsFd) -> io::Result<()> {
    SockRef::from(connection).attach_filter(&FILTER)?;
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is open as long as `connection` is borrowed, and the kernel reads `size_of_val(&on)` bytes of `on`.
    let done = unsafe {
        libc::setsockopt(
            connection.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LOCK_FILTER,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    Errno::result(done)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{setsockopt, sockopt};
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener, TcpStream};

    const LOOPBACKS: [&str; 2] = ["127.0.0.1:0", "[::1]:0"];

    fn listener(address: &str) -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    /// Both ends of a connection.
    fn pair(address: &str) -> (TcpStream, TcpStream) {
        let (listener, address) = listener(address);
        (TcpStream::connect(address).unwrap(), listener.accept().unwrap().0)
    }

    /// Dissolves a connection, and leaves it with no patience for the next one.
    fn dissolve(stream: &TcpStream) {
        let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
        // SAFETY: the descriptor is open as long as `stream` is, and the kernel reads the address that is there.
        let done =
            unsafe { libc::connect(stream.as_raw_fd(), &raw const nowhere, size_of_val(&nowhere) as libc::socklen_t) };
        Errno::result(done).unwrap();
        hasten(stream);
    }

    fn hasten(socket: &impl AsFd) {
        // It goes before the number of attempts, and ends this one at once.
        setsockopt(socket, sockopt::TcpUserTimeout, &200).unwrap();
    }

    #[test]
    fn it_goes_on_and_nothing_else_can_be_made_of_it() {
        for loopback in LOOPBACKS {
            for confined in [false, true] {
                let (mut ours, mut theirs) = pair(loopback);
                if confined {
                    to_its_connection(&ours).unwrap();
                    to_its_connection(&theirs).unwrap();
                }
                let all = vec![7; 3 << 20];
                let sent = all.clone();
                let sending = std::thread::spawn(move || {
                    ours.write_all(&sent).unwrap();
                    ours
                });
                let mut got = vec![0; all.len()];
                theirs.read_exact(&mut got).unwrap();
                assert!(got == all);
                theirs.write_all(b"back").unwrap();
                let mut ours = sending.join().unwrap();
                ours.read_exact(&mut [0; 4]).unwrap();

                let (_elsewhere, address) = listener(loopback);
                dissolve(&ours);
                let dialled = SockRef::from(&ours).connect(&address.into());
                assert_eq!(dialled.is_ok(), !confined, "{loopback}: {dialled:?}");

                dissolve(&theirs);
                let own: SocketAddr = loopback.parse().unwrap();
                SockRef::from(&theirs).bind(&own.into()).unwrap();
                SockRef::from(&theirs).listen(8).unwrap();
                let stranger =
                    socket2::Socket::new(socket2::Domain::for_address(own), socket2::Type::STREAM, None).unwrap();
                hasten(&stranger);
                let called = stranger.connect(&theirs.local_addr().unwrap().into());
                assert_eq!(called.is_ok(), !confined, "{loopback}: {called:?}");
            }
        }
    }

    #[test]
    fn nobody_takes_the_filter_off_again() {
        let (stream, _other) = pair(LOOPBACKS[0]);
        to_its_connection(&stream).unwrap();
        let denied = |done: io::Result<()>| done.unwrap_err().kind() == io::ErrorKind::PermissionDenied;
        assert!(denied(SockRef::from(&stream).detach_filter()));
        assert!(denied(SockRef::from(&stream).attach_filter(&FILTER[3..])));
    }
}
