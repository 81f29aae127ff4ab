//! What the controllers know after their watches were refused, cut off or told that what they would begin with is no longer kept.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use godwit_api::Installation;
use godwit_control::{Object, Settings};
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::StreamBody;
use kube::client::Body;
use serde_json::{Value, json};

use super::*;

/// How the server answers a request.
enum Answer {
    /// A page of a list at a revision, and whether there are more.
    Page(u64, Vec<Value>, bool),
    /// A Status with this code.
    Refused(u16),
    /// A watch: what comes over the line, and how it ends.
    Watch(String, End),
    /// Nobody answers.
    Unreachable,
}

#[derive(Clone, Copy)]
enum End {
    /// The server closes the stream.
    Closed,
    /// The connection breaks.
    Broken,
    /// Nothing more comes.
    Quiet,
}

/// The queries of all requests.
type Asked = Arc<Mutex<Vec<String>>>;

fn server(answers: Vec<Answer>) -> (Client, Asked) {
    let asked = Asked::default();
    let answers = Arc::new(Mutex::new(VecDeque::from(answers)));
    let log = asked.clone();
    let service = tower::service_fn(move |request: Request<Body>| {
        assert_eq!(request.uri().path(), "/api/v1/pods");
        log.lock().unwrap().push(request.uri().query().unwrap_or_default().to_owned());
        let answer = answers.lock().unwrap().pop_front().expect("more is asked than was foreseen");
        let response = match answer {
            Answer::Page(revision, items, more) => {
                let next = if more { "more" } else { "" };
                let metadata = json!({"resourceVersion": revision.to_string(), "continue": next});
                let list = json!({"apiVersion": "v1", "kind": "PodList", "metadata": metadata, "items": items});
                Ok((200, body(list.to_string(), End::Closed)))
            }
            Answer::Refused(code) => Ok((code, body(status(code).to_string(), End::Closed))),
            Answer::Watch(text, end) => Ok((200, body(text, end))),
            Answer::Unreachable => Err(std::io::Error::from(std::io::ErrorKind::ConnectionRefused)),
        };
        let response = response
            .map(|(code, body)| Response::builder().status(StatusCode::from_u16(code).unwrap()).body(body).unwrap());
        async move { response }
    });
    (Client::new(service, "default"), asked)
}

type Sent = Result<Frame<Bytes>, std::io::Error>;

fn body(text: String, end: End) -> StreamBody<BoxStream<'static, Sent>> {
    let said = stream::iter([Sent::Ok(Frame::data(Bytes::from(text)))]);
    StreamBody::new(match end {
        End::Closed => said.boxed(),
        End::Broken => said.chain(stream::iter([Err(std::io::ErrorKind::ConnectionReset.into())])).boxed(),
        End::Quiet => said.chain(stream::pending()).boxed(),
    })
}

fn status(code: u16) -> Value {
    let reason = if code == 410 { "Expired" } else { "InternalError" };
    json!({"apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure", "code": code, "reason": reason,
        "message": "The resourceVersion for the provided watch is too old."})
}

fn pod(name: &str, revision: u64) -> Value {
    let metadata = json!({"name": name, "namespace": "ns", "uid": name, "resourceVersion": revision.to_string()});
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": []}})
}

/// What a watch says.
fn said(type_: &str, object: Value) -> String {
    format!("{}\n", json!({"type": type_, "object": object}))
}

fn quiet() -> Answer {
    Answer::Watch(String::new(), End::Quiet)
}

fn page(revision: u64, pods: &[(&str, u64)]) -> Answer {
    Answer::Page(revision, pods.iter().map(|(name, revision)| pod(name, *revision)).collect(), false)
}

fn first_of_two_pages(revision: u64, pods: &[(&str, u64)]) -> Answer {
    Answer::Page(revision, pods.iter().map(|(name, revision)| pod(name, *revision)).collect(), true)
}

/// The controllers' side of a watch of pods.
struct Watched {
    shell: Shell,
    news: mpsc::Receiver<News>,
    asked: Asked,
    _watch: JoinSet<()>,
}

impl Watched {
    fn new(answers: Vec<Answer>) -> Self {
        let (client, asked) = server(answers);
        let (tell, news) = mpsc::channel(BATCH);
        let mut watch = JoinSet::new();
        watch.spawn(watch_kind(kind_api(&client, Kind::Pod, &Installation::USUAL), Kind::Pod, tell));
        let executor = Executor { client, controller: None, events: mpsc::channel(1).0, leads: None };
        let options = Options { settings: Settings::cluster(), ..Options::cluster("me") };
        let shell = Shell::new(options, vec![Kind::Pod], executor.clone(), executor, Leads::Always);
        Self { shell, news, asked, _watch: watch }
    }

    /// The next piece of news; `None` when nothing happens for long.
    async fn next(&mut self) -> Option<News> {
        // Time passes by itself as soon as nobody has anything else to do. Pauses are shorter than this, and watches last longer.
        tokio::time::timeout(Duration::from_secs(120), self.news.recv()).await.ok().flatten()
    }

    async fn rest(&mut self) {
        while let Some(piece) = self.next().await {
            self.shell.take_in(piece).unwrap();
        }
    }

    /// What is known: names and revisions.
    fn known(&self) -> Vec<(String, u64)> {
        let pods = self.shell.world.pods.iter().map(|pod| Object::from(pod.as_ref().clone()));
        pods.map(|pod| (pod.name().name.to_string(), pod.revision())).collect()
    }

    /// From which revisions was watched.
    fn watched_from(&self) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        let watches = asked.iter().filter(|query| query.contains("watch=true"));
        let from = |query: &String| {
            let mut parameters = query.split('&').filter_map(|one| one.split_once('='));
            parameters.find(|(name, _)| *name == "resourceVersion").map(|(_, from)| from.to_owned()).unwrap_or_default()
        };
        watches.map(from).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_lost_or_left_over_when_history_has_expired() {
    let first = || page(10, &[("a", 5), ("b", 6)]);
    let expired = || said("ERROR", status(410));
    let cases: Vec<(&str, Vec<Answer>, &[&str])> = vec![
        (
            "a watch is refused",
            vec![first(), Answer::Refused(410), page(20, &[("b", 6), ("c", 15)]), quiet()],
            &["10", "20"],
        ),
        (
            "a watch is refused time and again",
            [first(), Answer::Refused(410)]
                .into_iter()
                .chain((12..17).flat_map(|at| [page(at, &[("a", 5)]), Answer::Refused(410)]))
                .chain([page(20, &[("b", 6), ("c", 15)]), quiet()])
                .collect(),
            &["10", "12", "13", "14", "15", "16", "20"],
        ),
        (
            "within a watch",
            vec![
                first(),
                Answer::Watch(said("ADDED", pod("d", 12)) + &expired(), End::Quiet),
                page(20, &[("b", 6), ("c", 15)]),
                quiet(),
            ],
            &["10", "20"],
        ),
        (
            "between two pages of the first list",
            vec![first_of_two_pages(10, &[("a", 5)]), Answer::Refused(410), page(20, &[("b", 6), ("c", 15)]), quiet()],
            &["20"],
        ),
        (
            "between two pages of a list after a watch",
            vec![
                first(),
                Answer::Watch(expired(), End::Quiet),
                first_of_two_pages(14, &[("d", 13)]),
                Answer::Refused(410),
                page(20, &[("b", 6), ("c", 15)]),
                quiet(),
            ],
            &["10", "20"],
        ),
    ];
    for (what, answers, watched_from) in cases {
        let mut watched = Watched::new(answers);
        watched.rest().await;
        assert_eq!(watched.known(), [("b".to_owned(), 6), ("c".to_owned(), 15)], "{what}");
        assert_eq!(watched.watched_from(), watched_from, "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_watch_goes_on_where_it_was_cut_off() {
    let changed = said("MODIFIED", pod("a", 11));
    let half = || changed[..changed.len() / 2].to_owned();
    let rest = || changed.clone() + &said("DELETED", pod("b", 12)) + &said("ADDED", pod("c", 13));
    for end in [End::Closed, End::Broken] {
        let mut watched = Watched::new(vec![
            page(10, &[("a", 5), ("b", 6)]),
            Answer::Watch(half(), end),
            // The API server is away for a while, and comes back before it is ready.
            Answer::Unreachable,
            Answer::Unreachable,
            Answer::Refused(503),
            Answer::Watch(rest(), end),
            quiet(),
        ]);
        watched.rest().await;
        assert_eq!(watched.known(), [("a".to_owned(), 11), ("c".to_owned(), 13)]);
        assert_eq!(watched.watched_from(), ["10", "10", "10", "10", "10", "13"]);
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_made_while_a_list_is_on_its_way_is_not_taken_for_gone() {
    let expired = Answer::Watch(said("ERROR", status(410)), End::Quiet);
    let mut watched = Watched::new(vec![page(10, &[("a", 5), ("b", 6)]), expired, page(20, &[("b", 6)]), quiet()]);
    let object = |name, revision| Object::from_value(Kind::Pod, pod(name, revision)).unwrap();
    let mut lists = 0;
    while let Some(piece) = watched.next().await {
        if matches!(piece, News::ListBegins(..)) {
            lists += 1;
            // However long that takes: what is known is looked at before the list is asked for.
            tokio::time::sleep(Duration::from_secs(60)).await;
            let asked = watched.asked.lock().unwrap().iter().filter(|query| !query.contains("watch=true")).count();
            assert_eq!(asked, lists - 1);
        }
        let begins = matches!(piece, News::ListBegins(..));
        watched.shell.take_in(piece).unwrap();
        if begins && lists == 2 {
            watched.shell.world.apply(object("mine", 25), Source::Answer);
        }
    }
    assert_eq!(lists, 2);
    assert_eq!(watched.known(), [("b".to_owned(), 6), ("mine".to_owned(), 25)]);
}

#[tokio::test(start_paused = true)]
async fn however_much_there_is_to_decide_others_have_their_turn() {
    let mut watched = Watched::new(vec![page(10, &[]), quiet()]);
    watched.rest().await;
    let shell = &mut watched.shell;
    shell.queue = Queue::default();
    for number in 0..DECISIONS {
        shell.queue.push(Key::Vm(Name::new("ns", format!("vm{number}"))));
    }
    assert!(shell.pump(), "there may be more");
    assert!(!shell.pump(), "that was all");
}

/// A controller that waits for the lease has nothing else to do, and its list left behind as much as any.
#[tokio::test(start_paused = true)]
async fn after_a_long_list_there_is_memory_to_give_back() {
    let names: Vec<String> = (0..2000).map(|number| format!("pod{number}")).collect();
    let pods: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 5)).collect();
    let mut watched = Watched::new(vec![page(10, &pods), quiet()]);
    watched.shell.leads = Leads::Not;
    assert_eq!(watched.shell.until_next_wake(), LONGEST_WAIT);
    watched.rest().await;
    let shell = &mut watched.shell;
    assert_eq!(shell.until_next_wake(), Duration::ZERO);
    assert!(shell.leftovers.take(Instant::now()));
    assert_eq!(shell.until_next_wake(), LONGEST_WAIT);
}

#[tokio::test(start_paused = true)]
async fn of_a_list_only_what_is_news_waits_for_its_end() {
    let expired = Answer::Watch(said("ERROR", status(410)), End::Quiet);
    let second = page(20, &[("a", 5), ("b", 16), ("c", 17)]);
    let mut watched = Watched::new(vec![page(10, &[("a", 5), ("b", 6)]), expired, second, quiet()]);
    let mut lists = 0;
    while let Some(piece) = watched.next().await {
        if matches!(piece, News::ListBegins(..)) {
            lists += 1;
        }
        if matches!(piece, News::ListEnds(_)) {
            let list = &watched.shell.lists[&Kind::Pod];
            let expected = [("a".to_owned(), 5), ("b".to_owned(), 6)];
            assert_eq!((list.newer.len(), watched.known()), (if lists == 1 { 0 } else { 2 }, expected.to_vec()));
        }
        watched.shell.take_in(piece).unwrap();
    }
    assert_eq!(lists, 2);
    assert_eq!(watched.known(), [("a".to_owned(), 5), ("b".to_owned(), 16), ("c".to_owned(), 17)]);
}
