//! `kill -9` in the middle of writing loses nothing that was acknowledged.

use godwit_store::Store;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

/// Set for the child that writes until it is killed.
const CHILD: &str = "GODWIT_STORE_KILL_TEST";

#[test]
fn kill_nine_keeps_everything_acknowledged() {
    if let Ok(path) = std::env::var(CHILD) {
        write_for_ever(&path);
    }
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().join("store.redb");
    let mut acknowledged = 0_u64;
    for round in 0..4 {
        let mut child = Command::new(std::env::current_exe().expect("own path"))
            .args(["kill_nine_keeps_everything_acknowledged", "--exact", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .spawn()
            .expect("child starts");
        let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        let goal = acknowledged + 30 + 17 * round;
        let mut read = |until: Option<u64>| {
            for line in lines.by_ref() {
                let line = line.unwrap_or_default();
                if let Some(number) = line.strip_prefix("ack ").and_then(|n| n.parse().ok()) {
                    acknowledged = number;
                }
                if until.is_some_and(|until| acknowledged >= until) {
                    return;
                }
            }
        };
        read(Some(goal));
        child.kill().expect("child can be killed");
        child.wait().expect("child ends");
        read(None);
        let store = Store::open(&path).expect("store opens after kill -9");
        for number in 1..=acknowledged {
            let entry = store.get(&format!("/n/{number:08}")).unwrap_or_else(|| panic!("{number} is lost"));
            assert_eq!(&entry.value[..], number.to_string().as_bytes());
        }
        assert!(acknowledged >= goal);
        let mut watch = store.watch("/n/", 1).expect("the log reaches back to the start");
        assert!(!watch.poll().expect("a batch").events.is_empty());
    }
}

fn write_for_ever(path: &str) -> ! {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
    runtime.block_on(async {
        let store = Store::open(path).expect("store opens");
        let mut number = store.count("/n/") as u64;
        loop {
            number += 1;
            let value = number.to_string();
            store.create(&format!("/n/{number:08}"), Box::new(move |_| value.into())).await.expect("write");
            let mut out = std::io::stdout().lock();
            writeln!(out, "ack {number}").and_then(|()| out.flush()).unwrap_or_else(|_| std::process::exit(1));
        }
    })
}
