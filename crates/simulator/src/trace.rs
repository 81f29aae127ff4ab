//! What happened: the last lines in full, everything as a hash.

use std::collections::VecDeque;

/// How many lines a report shows.
const KEPT: usize = 40;

/// The trace of one run.
#[derive(Debug)]
pub struct Trace {
    lines: VecDeque<String>,
    hash: u64,
    full: bool,
}

impl Trace {
    /// An empty trace; `full` keeps every line.
    pub fn new(full: bool) -> Self {
        Self { lines: VecDeque::new(), hash: 0xcbf2_9ce4_8422_2325, full }
    }

    /// Adds a line about the moment `at` (microseconds).
    pub fn add(&mut self, at: u64, what: &str) {
        let line = format!("{:>12.6}  {what}", at as f64 / 1e6);
        for byte in line.bytes() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if !self.full && self.lines.len() == KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// The same for the same run, and for no other.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// The lines that were kept.
    pub fn into_lines(self) -> Vec<String> {
        self.lines.into()
    }
}

/// The fields of a patch, the short ones with their values.
pub fn keys(patch: &serde_json::Value) -> String {
    let fields = patch.as_object().into_iter().flatten();
    let fields: Vec<String> = fields
        .map(|(key, value)| match value {
            serde_json::Value::Object(_) | serde_json::Value::Array(_) => format!("{key}=…"),
            value => format!("{key}={value}"),
        })
        .collect();
    format!("{{{}}}", fields.join(" "))
}
