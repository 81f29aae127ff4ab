use super::*;
use std::io;
use std::sync::Mutex;

fn text(text: &str) -> Encode {
    let text = text.to_owned();
    Box::new(move |revision| Bytes::from(format!("{text}@{revision}")))
}

fn values(list: &List) -> Vec<String> {
    list.entries.iter().map(|e| format!("{}={}", e.key, String::from_utf8_lossy(&e.value))).collect()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
}

#[tokio::test]
async fn writes_check_what_they_expect() {
    let store = Store::memory().unwrap();
    let a = store.create("/r/a", text("1")).await.unwrap();
    assert_eq!((a.revision, &a.value[..]), (2, &b"1@2"[..]));
    assert!(matches!(store.create("/r/a", text("x")).await, Err(Error::Exists { revision: 2, .. })));
    assert!(matches!(store.update("/r/b", None, text("x")).await, Err(Error::NotFound { .. })));
    let stale = store.update("/r/a", Some(1), text("x")).await;
    assert!(matches!(stale, Err(Error::Conflict { expected: 1, actual: 2, .. })), "{stale:?}");
    let b = store.update("/r/a", Some(2), text("2")).await.unwrap();
    assert_eq!(b.revision, 3);
    assert!(matches!(store.delete("/r/a", Some(2)).await, Err(Error::Conflict { .. })));
    let (revision, last) = store.delete("/r/a", Some(3)).await.unwrap();
    assert_eq!((revision, last.revision), (4, 3));
    assert!(store.get("/r/a").is_none());
    assert_eq!(store.revision(), 4);
}

#[tokio::test]
async fn of_writers_with_the_same_expectation_one_wins() {
    let store = Store::memory().unwrap();
    let first = store.create("/r/a", text("0")).await.unwrap().revision;
    let writers: Vec<_> = (0..50)
        .map(|i| {
            let store = store.clone();
            tokio::spawn(async move { store.update("/r/a", Some(first), text(&i.to_string())).await.is_ok() })
        })
        .collect();
    let mut won = 0;
    for writer in writers {
        won += usize::from(writer.await.unwrap());
    }
    assert_eq!(won, 1);
}

#[tokio::test]
async fn lists_page_and_go_back_in_time() {
    let store = Store::memory().unwrap();
    for name in ["a", "b", "c", "d"] {
        store.create(&format!("/r/{name}"), text("1")).await.unwrap();
    }
    store.create("/rest", text("1")).await.unwrap();
    let page = store.list("/r/", None, 2);
    assert_eq!((values(&page), page.remaining), (vec!["/r/a=1@2".into(), "/r/b=1@3".into()], 2));
    store.update("/r/c", None, text("2")).await.unwrap();
    store.delete("/r/d", None).await.unwrap();
    store.create("/r/e", text("1")).await.unwrap();
    let rest = store.list_at("/r/", Some("/r/b"), 0, page.revision).unwrap();
    assert_eq!((values(&rest), rest.remaining), (vec!["/r/c=1@4".into(), "/r/d=1@5".into()], 0));
    let now = store.list("/r/", Some("/r/b"), 0);
    assert_eq!(values(&now), ["/r/c=2@7", "/r/e=1@9"]);
    assert!(matches!(store.list_at("/r/", None, 0, 99), Err(Error::Future { current: 9, .. })));
    assert_eq!(store.count("/r/"), 4);
}

#[tokio::test]
async fn a_watch_sees_everything_once_in_order() {
    let store = Store::memory().unwrap();
    store.create("/r/a", text("1")).await.unwrap();
    let (list, mut watch) = store.list_and_watch("/r/").unwrap();
    assert_eq!(list.entries.len(), 1);
    let writer = tokio::spawn({
        let store = store.clone();
        async move {
            for i in 0..600 {
                store.create(&format!("/r/n{i}"), text("1")).await.unwrap();
                store.create(&format!("/other/n{i}"), text("1")).await.unwrap();
            }
            store.delete("/r/a", None).await.unwrap();
        }
    });
    let mut seen = Vec::new();
    while seen.len() < 601 {
        seen.extend(watch.next().await.unwrap().events);
    }
    writer.await.unwrap();
    assert!(seen.is_sorted_by_key(|event| event.revision));
    assert!(seen[..600].iter().enumerate().all(|(i, e)| e.key() == format!("/r/n{i}") && e.old.is_none()));
    assert!(seen[600].new.is_none() && seen[600].old.is_some());
    assert_eq!(watch.poll().unwrap().events.len(), 0);
    assert_eq!(watch.revision(), store.revision());
}

#[tokio::test]
async fn a_slow_watch_is_told_and_a_quiet_one_is_not() {
    let backend = redb::backends::InMemoryBackend::new();
    let store = Store::open_backend(backend, Retention { events: 10, bytes: usize::MAX }).unwrap();
    let mut slow = store.watch("/r/", store.revision()).unwrap();
    let mut quiet = store.watch("/q/", store.revision()).unwrap();
    for i in 0..30 {
        store.create(&format!("/r/{i}"), text("1")).await.unwrap();
    }
    assert!(matches!(slow.next().await, Err(Error::Compacted { requested: 1, oldest: 21 })));
    assert!(matches!(store.watch("/r/", 5), Err(Error::Compacted { .. })));
    assert!(matches!(store.list_at("/r/", None, 0, 5), Err(Error::Compacted { .. })));
    assert_eq!(quiet.poll().unwrap().events.len(), 0);
    store.create("/q/1", text("1")).await.unwrap();
    assert_eq!(quiet.next().await.unwrap().events.len(), 1);
}

#[tokio::test]
async fn large_values_push_the_past_out() {
    let backend = redb::backends::InMemoryBackend::new();
    let store = Store::open_backend(backend, Retention { events: 1000, bytes: 10_000 }).unwrap();
    store.create("/r/a", text("0")).await.unwrap();
    for _ in 0..20 {
        store.update("/r/a", None, text(&"x".repeat(2_000))).await.unwrap();
    }
    assert!(matches!(store.watch("/r/", 2), Err(Error::Compacted { .. })));
    assert!(store.watch("/r/", store.revision() - 2).is_ok());
}

#[test]
fn reopening_keeps_objects_revision_and_log() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    runtime().block_on(async {
        let store = Store::open(&path).unwrap();
        store.create("/r/a", text("1")).await.unwrap();
        store.create("/r/b", text("1")).await.unwrap();
        store.update("/r/a", None, text("2")).await.unwrap();
        store.delete("/r/b", None).await.unwrap();
        store.create("/r/b", text("3")).await.unwrap();
        store.update("/r/a", None, text("4")).await.unwrap();
    });
    runtime().block_on(async {
        let store = Store::open(&path).unwrap();
        assert_eq!(store.revision(), 7);
        assert_eq!(values(&store.list("/r/", None, 0)), ["/r/a=4@7", "/r/b=3@6"]);
        assert_eq!(values(&store.list_at("/r/", None, 0, 4).unwrap()), ["/r/a=2@4", "/r/b=1@3"]);
        let batch = store.watch("/r/", 3).unwrap().next().await.unwrap();
        let show = |e: &Option<Arc<Entry>>| e.as_ref().map(|e| String::from_utf8_lossy(&e.value).into_owned());
        let story: Vec<_> = batch.events.iter().map(|e| (e.revision, show(&e.old), show(&e.new))).collect();
        let s = |text: &str| Some(text.to_owned());
        assert_eq!(story, [(4, s("1@2"), s("2@4")), (5, s("1@3"), None), (6, None, s("3@6")), (7, s("2@4"), s("4@7"))]);
        assert!(matches!(Store::open(&path), Err(Error::Storage(_))), "a second opening must fail");
    });
}

#[test]
fn the_log_on_disk_is_cut_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    let retention = Retention { events: 5, bytes: usize::MAX };
    runtime().block_on(async {
        let store = Store::open_with_retention(&path, retention).unwrap();
        for i in 0..40 {
            store.create(&format!("/r/{i}"), text("1")).await.unwrap();
        }
    });
    runtime().block_on(async {
        let store = Store::open(&path).unwrap();
        assert_eq!(store.count("/r/"), 40);
        assert!(matches!(store.watch("/r/", 20), Err(Error::Compacted { .. })));
        assert_eq!(store.watch("/r/", 36).unwrap().next().await.unwrap().events.len(), 5);
    });
}

/// A disk that, when the power goes, keeps only what was synced plus some of the rest.
#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<Blocks>>);

#[derive(Debug, Default)]
struct Blocks {
    live: Vec<u8>,
    synced: Vec<u8>,
    /// Unsynced writes in order.
    loose: Vec<(usize, Vec<u8>)>,
    fail_syncs: bool,
}

impl Disk {
    /// What is there after a power cut, with each loose write kept or lost by `keep`.
    fn after_power_cut(&self, mut keep: impl FnMut() -> bool) -> Disk {
        let blocks = self.0.lock().unwrap();
        let mut kept = blocks.synced.clone();
        for (offset, data) in &blocks.loose {
            if keep() {
                kept.resize(kept.len().max(offset + data.len()), 0);
                kept[*offset..offset + data.len()].copy_from_slice(data);
            }
        }
        Disk(Arc::new(Mutex::new(Blocks { live: kept.clone(), synced: kept, ..Blocks::default() })))
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().live.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let blocks = self.0.lock().unwrap();
        let end = offset as usize + out.len();
        let data = blocks.live.get(offset as usize..end).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(data);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut blocks = self.0.lock().unwrap();
        blocks.live.resize(len as usize, 0);
        // Lengths are journalled by the file system: they survive.
        blocks.synced.resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut blocks = self.0.lock().unwrap();
        if blocks.fail_syncs {
            return Err(io::Error::other("no sync today"));
        }
        blocks.synced = blocks.live.clone();
        blocks.loose.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut blocks = self.0.lock().unwrap();
        let end = offset as usize + data.len();
        blocks.live.get_mut(offset as usize..end).ok_or(io::ErrorKind::UnexpectedEof)?.copy_from_slice(data);
        blocks.loose.push((offset as usize, data.to_vec()));
        Ok(())
    }
}

#[test]
fn a_power_cut_loses_nothing_acknowledged() {
    // A small generator is enough to choose which loose writes are torn.
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut coin = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 63 == 1
    };
    let disk = Disk::default();
    runtime().block_on(async {
        let store = Store::open_backend(disk.clone(), Retention::default()).unwrap();
        for i in 0..40 {
            store.create(&format!("/r/{i:02}"), text("1")).await.unwrap();
            if i % 3 == 0 {
                store.update("/r/00", None, text(&format!("u{i}"))).await.unwrap();
            }
            let expected = values(&store.list("/", None, 0));
            let copy = disk.after_power_cut(&mut coin);
            let again = Store::open_backend(copy, Retention::default()).unwrap();
            assert_eq!(values(&again.list("/", None, 0)), expected, "after write {i}");
            assert_eq!(again.revision(), store.revision());
            assert!(again.watch("/", 1).unwrap().next().await.unwrap().events.len() > i);
        }
    });
}

#[test]
fn a_write_that_cannot_be_synced_is_refused_and_invisible() {
    let disk = Disk::default();
    runtime().block_on(async {
        let store = Store::open_backend(disk.clone(), Retention::default()).unwrap();
        store.create("/r/a", text("1")).await.unwrap();
        disk.0.lock().unwrap().fail_syncs = true;
        assert!(matches!(store.create("/r/b", text("1")).await, Err(Error::Storage(_))));
        assert!(store.get("/r/b").is_none());
        assert_eq!(store.revision(), 2);
        assert!(store.get("/r/a").is_some());
    });
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(32))]

    /// Against a plain map: any history, any restart, lists at every revision that is still known.
    #[test]
    fn any_history_can_be_listed_at_every_revision(ops in proptest::collection::vec((0..6u8, 0..3u8), 1..60)) {
        runtime().block_on(async {
            let disk = Disk::default();
            let store = Store::open_backend(disk.clone(), Retention::default()).unwrap();
            let mut history = vec![(store.revision(), Vec::new())];
            for (key, op) in ops {
                let key = format!("/r/{key}");
                let _ = match op {
                    0 => store.create(&key, text("c")).await.map(|_| ()),
                    1 => store.update(&key, None, text("u")).await.map(|_| ()),
                    _ => store.delete(&key, None).await.map(|_| ()),
                };
                history.push((store.revision(), values(&store.list("/r/", None, 0))));
            }
            let again = Store::open_backend(disk.after_power_cut(|| false), Retention::default()).unwrap();
            for (revision, expected) in history {
                assert_eq!(values(&store.list_at("/r/", None, 0, revision).unwrap()), expected);
                assert_eq!(values(&again.list_at("/r/", None, 0, revision).unwrap()), expected);
            }
        });
    }
}
