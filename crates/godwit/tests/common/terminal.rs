//! A command at a terminal, and what its screen shows.

use std::io::{Read, Write};
use std::num::NonZero;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Its height.
const ROWS: NonZero<u16> = NonZero::new(24).unwrap();

/// A terminal of 24 lines in which a command runs. `script` of util-linux makes it.
pub struct Terminal {
    script: Child,
    keys: ChildStdin,
    screen: Arc<Mutex<vt100::Parser>>,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl Terminal {
    /// Runs a program with these arguments, none of which holds a quote.
    pub fn run(program: &Path, arguments: &[&str], columns: u16) -> Self {
        let words: Vec<String> = arguments.iter().map(|word| format!("'{word}'")).collect();
        let command = format!("stty rows {ROWS} cols {columns}; exec '{}' {}", program.display(), words.join(" "));
        let mut script = Command::new("script")
            .args(["--quiet", "--return", "--flush", "--command", &command, "/dev/null"])
            .env("TERM", "xterm")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("script (util-linux) starts");
        let keys = script.stdin.take().expect("stdin");
        let mut output = script.stdout.take().expect("stdout");
        let screen = Arc::new(Mutex::new(vt100::Parser::new(ROWS, NonZero::new(columns).expect("columns"), 0)));
        let drawn = screen.clone();
        let reader = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n) = output.read(&mut bytes) {
                if n == 0 {
                    return;
                }
                drawn.lock().expect("screen").process(&bytes[..n]);
            }
        });
        Self { script, keys, screen, reader: Some(reader) }
    }

    /// The lines that are seen, without the empty ones.
    pub fn lines(&self) -> Vec<String> {
        let parser = self.screen.lock().expect("screen");
        let rows = parser.screen().rows(0, u16::MAX);
        rows.map(|row| row.trim_end().to_owned()).filter(|row| !row.is_empty()).collect()
    }

    /// Waits until the screen is as wanted.
    pub fn shows(&self, what: &str, wanted: impl Fn(&[String]) -> bool) -> Vec<String> {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let lines = self.lines();
            if wanted(&lines) {
                return lines;
            }
            assert!(Instant::now() < deadline, "waited for {what}, and the screen shows {lines:#?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Presses keys; `\x03` is Ctrl-C.
    pub fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).and_then(|()| self.keys.flush()).expect("press keys");
    }

    /// Waits for the command's end: its exit code, and the last screen.
    pub fn end(mut self) -> (Option<i32>, Vec<String>) {
        let status = self.script.wait().expect("script ends");
        if let Some(reader) = self.reader.take() {
            reader.join().expect("all of it is read");
        }
        (status.code(), self.lines())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Hangs up, whereupon the command ends as well.
        let _ = self.script.kill();
        let _ = self.script.wait();
    }
}
