//! Container output in the format that `kubectl logs` and log collectors know (CRI): `<time> <stream> F|P <line>`.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::spec::LOG;

/// Longer lines are split into parts, as containerd does.
const LONGEST_LINE: usize = 16 << 10;
/// A log that grows beyond this is started anew, the old one kept as `log.1` (the kubelet's `containerLogMaxSize`).
const LARGEST_LOG: u64 = 10 << 20;

pub(super) struct Log {
    path: PathBuf,
    file: File,
    size: u64,
}

struct Stream {
    name: &'static str,
    file: Option<File>,
    line: Vec<u8>,
}

impl Log {
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        let path = folder.join(LOG);
        let file = File::options().create(true).append(true).open(&path)?;
        let size = file.metadata()?.len();
        Ok(Self { path, file, size })
    }

    fn write(&mut self, stream: &str, tag: char, line: &[u8]) {
        let time = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.9fZ");
        let mut record = format!("{time} {stream} {tag} ").into_bytes();
        record.extend(line);
        record.push(b'\n');
        if self.size + record.len() as u64 > LARGEST_LOG {
            let _ = fs::rename(&self.path, self.path.with_extension("1"));
            if let Ok(file) = File::options().create(true).append(true).open(&self.path) {
                (self.file, self.size) = (file, 0);
            }
        }
        // A full disk must not stop the container: the line is lost, as with any container engine.
        if self.file.write_all(&record).is_ok() {
            self.size += record.len() as u64;
        }
    }

    /// Writes what comes until both streams are closed.
    pub(super) fn follow(&mut self, output: OwnedFd, error: OwnedFd) {
        let mut streams = [
            Stream { name: "stdout", file: Some(output.into()), line: Vec::new() },
            Stream { name: "stderr", file: Some(error.into()), line: Vec::new() },
        ];
        let mut buffer = vec![0; 64 << 10];
        loop {
            let open: Vec<&File> = streams.iter().filter_map(|stream| stream.file.as_ref()).collect();
            if open.is_empty() {
                return;
            }
            let mut waiting: Vec<PollFd<'_>> =
                open.iter().map(|file| PollFd::new(file.as_fd(), PollFlags::POLLIN)).collect();
            let ready: Vec<bool> = match poll(&mut waiting, PollTimeout::NONE) {
                Ok(_) => waiting.iter().map(|one| one.any().unwrap_or(true)).collect(),
                Err(_) => continue,
            };
            let mut ready = ready.into_iter();
            for stream in &mut streams {
                let Some(file) = &mut stream.file else { continue };
                if !ready.next().unwrap_or(false) {
                    continue;
                }
                match file.read(&mut buffer) {
                    Ok(0) => {
                        stream.file = None;
                        if !stream.line.is_empty() {
                            self.write(stream.name, 'F', &std::mem::take(&mut stream.line));
                        }
                    }
                    Ok(read) => self.take(stream, buffer.get(..read).unwrap_or_default()),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => stream.file = None,
                }
            }
        }
    }

    fn take(&mut self, stream: &mut Stream, mut bytes: &[u8]) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (line, rest) = bytes.split_at(end);
            stream.line.extend(line);
            self.write_parts(stream);
            self.write(stream.name, 'F', &std::mem::take(&mut stream.line));
            bytes = rest.get(1..).unwrap_or_default();
        }
        stream.line.extend(bytes);
        self.write_parts(stream);
    }

    /// Writes what is too long for one line.
    fn write_parts(&mut self, stream: &mut Stream) {
        while stream.line.len() > LONGEST_LINE {
            let rest = stream.line.split_off(LONGEST_LINE);
            let part = std::mem::replace(&mut stream.line, rest);
            self.write(stream.name, 'P', &part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_get_time_stream_and_tag() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = Log::open(folder.path()).unwrap();
        let (out_read, out_write) = nix::unistd::pipe().unwrap();
        let (err_read, err_write) = nix::unistd::pipe().unwrap();
        let long = "x".repeat(LONGEST_LINE + 5);
        let writer = std::thread::spawn(move || {
            File::from(out_write).write_all(format!("one\n\n{long}\nlast").as_bytes()).unwrap();
            File::from(err_write).write_all(b"oops\n").unwrap();
        });
        log.follow(out_read, err_read);
        writer.join().unwrap();
        let text = fs::read_to_string(folder.path().join(LOG)).unwrap();
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.splitn(4, ' ').collect()).collect();
        let of = |stream: &str| -> Vec<(&str, usize)> {
            lines.iter().filter(|line| line[1] == stream).map(|line| (line[2], line[3].len())).collect()
        };
        assert_eq!(of("stdout"), [("F", 3), ("F", 0), ("P", LONGEST_LINE), ("F", 5), ("F", 4)]);
        assert_eq!(of("stderr"), [("F", 4)]);
        assert!(lines[0][0].parse::<jiff::Timestamp>().is_ok());
    }
}
