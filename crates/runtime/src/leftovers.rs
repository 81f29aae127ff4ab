//! Memory that is freed and still held.
//!
//! News are read as JSON, and of each little is kept. glibc gives memory back by itself only from the end of its heap, and what is kept lies
//! scattered in it: after the first list of a large cluster more than half of a controller's memory was free and nobody else's. So it
//! is told to, after so much work that there is something to give back.

use std::time::Duration;

use tokio::time::Instant;

/// So many objects leave something behind: some MiB.
const ENOUGH: usize = 1024;
/// The least time between two times. Each takes some 10 ms, in which nothing else gets memory.
const PAUSE: Duration = Duration::from_secs(10);

/// What work may have left behind.
#[derive(Debug, Default)]
pub struct Leftovers {
    /// Objects read since it was given back.
    objects: usize,
    /// When that was.
    given_back: Option<Instant>,
}

impl Leftovers {
    /// So many objects have been read.
    pub fn add(&mut self, objects: usize) {
        self.objects = self.objects.saturating_add(objects);
    }

    /// After how long they are to be given back, if there are enough.
    pub fn due_in(&self, now: Instant) -> Option<Duration> {
        let next = self.given_back.map_or(now, |before| before + PAUSE);
        (self.objects >= ENOUGH).then(|| next.saturating_duration_since(now))
    }

    /// Whether they are to be given back now; from then on they are none.
    pub fn take(&mut self, now: Instant) -> bool {
        let due = self.due_in(now).is_some_and(|wait| wait.is_zero());
        if due {
            *self = Self { objects: 0, given_back: Some(now) };
        }
        due
    }
}

/// Has the C library give back what is free in its heaps. Where it is another one than glibc nothing is done: none other is known to keep
/// so much.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        let begun = Instant::now();
        // SAFETY: it takes a number and nothing else, and locks each heap that it looks at: any thread may call it at any time.
        let gave = unsafe { nix::libc::malloc_trim(0) } == 1;
        tracing::debug!(gave, ms = begun.elapsed().as_millis(), "free memory given back");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_given_back_after_much_work_and_not_time_and_again() {
        let begun = Instant::now();
        let after = |seconds: u64| begun + Duration::from_secs(seconds);
        let mut leftovers = Leftovers::default();
        leftovers.add(ENOUGH - 1);
        assert_eq!((leftovers.due_in(begun), leftovers.take(begun)), (None, false));
        leftovers.add(1);
        assert_eq!(leftovers.due_in(begun), Some(Duration::ZERO));
        assert!(leftovers.take(begun) && !leftovers.take(begun));
        leftovers.add(10 * ENOUGH);
        assert_eq!(leftovers.due_in(after(4)), Some(PAUSE - Duration::from_secs(4)));
        assert!(!leftovers.take(after(4)) && leftovers.take(after(10)));
        assert_eq!(leftovers.due_in(after(100)), None);
    }

    /// Of this process, in bytes.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
    }

    /// What is resident is of the process: of these tests one at a time.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    const PIECE: usize = 8 << 10;

    /// Much memory that is free, and what lies scattered in it; how much it was.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn scattered() -> (Vec<Vec<u8>>, usize) {
        let mut pieces: Vec<Vec<u8>> = (0..16 << 10).map(|_| vec![1; PIECE]).collect();
        let whole = pieces.len() * PIECE;
        let mut number = 0;
        pieces.retain(|_| {
            number += 1;
            number % 64 == 0
        });
        (pieces, whole)
    }

    #[test]
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn what_is_free_between_what_is_kept_is_given_back() {
        let _alone = ALONE.lock();
        let (pieces, whole) = scattered();
        let free = resident();
        give_back();
        let left = resident();
        assert!(
            left + whole / 2 < free,
            "of {whole} bytes {} were kept; {free} resident, then {left}",
            pieces.len() * PIECE
        );
    }
    /// An API server with so many pods and nothing else, of which nothing changes.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn server_with_pods(count: usize) -> kube::Client {
        use bytes::Bytes;
        use futures::{FutureExt, StreamExt, stream};
        use http_body_util::StreamBody;
        use serde_json::{Value, json};
        let pod = |number: usize| {
            let name = format!("pod-{number}");
            let metadata = json!({"name": name, "namespace": "ns", "uid": name, "resourceVersion": "1"});
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": []}})
        };
        let pods: Vec<Value> = (0..count).map(pod).collect();
        let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            let watches = request.uri().query().is_some_and(|query| query.contains("watch=true"));
            let items = if request.uri().path() == "/api/v1/pods" { pods.as_slice() } else { &[] };
            let list =
                json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "1"}, "items": items});
            let said = async move { Ok::<_, std::io::Error>(http_body::Frame::data(Bytes::from(list.to_string()))) };
            let body = if watches { stream::pending().boxed() } else { said.into_stream().boxed() };
            std::future::ready(Ok::<_, std::io::Error>(http::Response::new(StreamBody::new(body))))
        });
        kube::Client::new(service, "default")
    }

    /// The controllers do it themselves when they have read much.
    #[tokio::test]
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    async fn controllers_give_back_what_is_free_after_their_first_lists() {
        let _alone = ALONE.lock();
        let client = server_with_pods(ENOUGH);
        let (kept, whole) = scattered();
        let free = resident();
        let given_back = async {
            while resident() + whole / 2 >= free {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let given_back = tokio::time::timeout(Duration::from_secs(60), given_back);
        let controllers = crate::run(client, crate::Options::cluster("me"), std::future::pending());
        tokio::select! {
            ended = controllers => panic!("the controllers end: {ended:?}"),
            within = given_back => assert!(within.is_ok(), "of {whole} bytes {} are kept, and all resident", kept.len() * PIECE),
        }
    }
}
