//! When the lease has passed: seeing to it that nothing runs, and saying so when the API is there again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use godwit_api::VirtualMachineInstance;
use godwit_api::names::ANNOTATION_FENCED;
use godwit_api::names::events::reason;
use godwit_api::names::fence::DURATION;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use tokio::task::JoinHandle;

use super::Surroundings;
use super::enforce::{self, NotDead, Whom};

/// The launchers' own time to kill; this is for those that do not.
const GRACE: Duration = Duration::from_secs(1);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long the API may take to show a VMI, and the disks what was fenced.
const LIMIT: Duration = Duration::from_secs(2);
/// At most so many guests are named.
const NAMED: usize = 10;

/// Looks for ever.
pub(super) async fn enforce_and_tell(around: Arc<Surroundings>) {
    let began = around.fence.now();
    let root = &around.kubelet_root;
    let mut looking = Looking::default();
    let mut found: BTreeMap<String, String> = looking.untold(root).await.unwrap_or_default();
    let mut alive = None;
    // A predecessor may have ended before it could tell.
    let mut left = (!found.is_empty()).then_some(began);
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        // Whatever a predecessor was allowed had been sent before this one began.
        let until = around.fence.until().unwrap_or(began + DURATION);
        if around.fence.now() >= until + GRACE {
            // What does not die is killed again at the next look, and named when the API is there.
            alive = enforce::strike(root, around.fence.met(), Whom::Guests).await.err();
            found.extend(looking.untold(root).await.into_iter().flatten());
        } else if let Some(since) = around.fence.lapsed().or(left) {
            // At once: the pod of a guest that its launcher has killed may be removed before the time for telling comes.
            let more = looking.untold(root).await;
            let is_known = more.is_some();
            found.extend(more.into_iter().flatten());
            if !around.fence.is_held() || around.fence.now() < since + GRACE {
                continue;
            }
            if let Some(alive) = alive.take().and_then(NotDead::by_now) {
                let around = around.clone();
                let why = format!("This node's lease was not renewed in time, and {alive}");
                tokio::spawn(async move { not_dead(&around, &why, &alive.guests()).await });
            }
            // Nobody says that none was fenced while that is not known.
            if is_known && tell(&around, &found).await {
                let (root, told) = (root.clone(), std::mem::take(&mut found));
                tokio::task::spawn_blocking(move || told.keys().for_each(|uid| enforce::note_told(&root, uid)));
                around.fence.told();
                left = None;
            }
        }
    }
}

/// Looks for what was fenced. A disk may hang: then there is one look that does, and nobody waits for it.
#[derive(Default)]
struct Looking(Option<JoinHandle<BTreeMap<String, String>>>);

impl Looking {
    /// The pods whose guest was fenced and that were not told; none where that is not known yet.
    async fn untold(&mut self, root: &Path) -> Option<BTreeMap<String, String>> {
        let root = root.to_owned();
        let mut look = self.0.take().unwrap_or_else(|| tokio::task::spawn_blocking(move || enforce::untold(&root)));
        match tokio::time::timeout(LIMIT, &mut look).await {
            Ok(found) => Some(found.unwrap_or_default()),
            Err(_) => {
                tracing::warn!("whether guests were fenced cannot be told yet: a disk hangs");
                self.0 = Some(look);
                None
            }
        }
    }
}

/// Says on the node, and on their VMIs, that these guests do not die.
pub(super) async fn not_dead(around: &Surroundings, why: &str, guests: &[String]) {
    let message =
        format!("{why}. Look for what the processes wait for (a dead storage server, say), or restart the node");
    around.events.record_node(reason::GUEST_NOT_DEAD, message.clone());
    for (namespace, name) in guests.iter().filter_map(|guest| guest.split_once('/')) {
        let api: Api<VirtualMachineInstance> = Api::namespaced(around.client.clone(), namespace);
        let found = tokio::time::timeout(LIMIT, api.get_opt(name)).await;
        if let Ok(Ok(Some(vmi))) = found {
            around.events.record(&vmi, true, reason::GUEST_NOT_DEAD, format!("On node {}: {message}", around.node));
        }
    }
}

/// Says that these guests were fenced. Whether that is done.
async fn tell(around: &Surroundings, found: &BTreeMap<String, String>) -> bool {
    if found.is_empty() {
        tracing::info!("the node's lease had passed; no guest ran");
        return true;
    }
    let api: Api<Node> = Api::all(around.client.clone());
    let patch = json!({"metadata": {"annotations": {ANNOTATION_FENCED: Timestamp::now().to_string()}}});
    let (parameters, patch) = (PatchParams::default(), Patch::Merge(patch));
    // Who looks for what has to be killed does not wait for a connection that has died.
    match tokio::time::timeout(LIMIT, api.patch(&around.node, &parameters, &patch)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => {
            tracing::warn!(%error, "that guests were fenced is not written yet");
            return false;
        }
        Err(_) => {
            tracing::warn!("that guests were fenced is not written yet: the API does not answer");
            return false;
        }
    }
    let mut names: Vec<&str> = found.values().map(String::as_str).take(NAMED).collect();
    if found.len() > NAMED {
        names.push("…");
    }
    let message = format!(
        "virt-handler could not renew this node's lease in time and stopped {} before they may be started elsewhere: {}",
        if found.len() == 1 { "1 guest".to_owned() } else { format!("{} guests", found.len()) },
        names.join(", ")
    );
    around.events.record_node(reason::NODE_FENCED, message);
    true
}

#[cfg(test)]
mod tests {
    use godwit_launcher::fence::{self as launcher, Victim};
    use serde_json::Value;

    use super::*;
    use crate::events::Events;
    use crate::fence::Fence;
    use crate::follow;
    use crate::sockets::SocketDir;
    use crate::testing::api;
    use crate::tls::TlsPaths;

    fn around(api: &api::Api, root: &Path) -> Arc<Surroundings> {
        let pem = root.join("none.pem");
        Arc::new(Surroundings {
            client: api.client(),
            namespace: "kubevirt".to_owned(),
            node: "a".to_owned(),
            node_ip: std::net::Ipv4Addr::LOCALHOST.into(),
            kubelet_root: root.to_owned(),
            tls: TlsPaths { ca: pem.clone(), cert: pem.clone(), key: pem },
            events: Events::start(api.client(), "a".to_owned()),
            fence: Fence::begin(),
        })
    }

    /// A pod whose launcher has fenced its guest.
    fn fenced(root: &Path) {
        let sockets = SocketDir::path_of(root, "uid");
        let disks = follow::disks_of(&sockets).unwrap();
        for folder in [&sockets, &disks] {
            std::fs::create_dir_all(folder).unwrap();
        }
        enforce::mark(&enforce::Met::default(), &sockets, "default/vm").unwrap();
        launcher::write_down(&disks, launcher::REASON);
    }

    /// Waits until so many events are in the API: reason, kind and message of each.
    async fn events(api: &api::Api, count: usize) -> Vec<[String; 3]> {
        loop {
            let events = api.list("events");
            if events.len() >= count {
                let text = |value: &Value| value.as_str().unwrap().to_owned();
                let said = |event: &Value| {
                    [text(&event["reason"]), text(&event["involvedObject"]["kind"]), text(&event["message"])]
                };
                return events.iter().map(said).collect();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn what_a_handler_did_not_come_to_tell_its_successor_tells_once() {
        let (api, root) = (api::Api::default(), tempfile::tempdir().unwrap());
        api.put("nodes", json!({"metadata": {"name": "a"}}));
        fenced(root.path());

        let first = around(&api, root.path());
        let telling = tokio::spawn(enforce_and_tell(first.clone()));
        first.fence.answered(first.fence.now(), None, None);
        let [[reason, kind, message]] = &events(&api, 1).await[..] else { panic!("one event") };
        assert_eq!((reason.as_str(), kind.as_str()), ("NodeFenced", "Node"));
        assert!(message.ends_with("stopped 1 guest before they may be started elsewhere: default/vm"), "{message}");
        assert!(api.get("nodes", "a").unwrap()["metadata"]["annotations"][ANNOTATION_FENCED].is_string());
        while !enforce::untold(root.path()).is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        telling.abort();
    }

    #[tokio::test]
    async fn a_guest_whose_pod_is_removed_before_the_telling_is_told() {
        let (api, root) = (api::Api::default(), tempfile::tempdir().unwrap());
        api.put("nodes", json!({"metadata": {"name": "a"}}));
        let first = around(&api, root.path());
        // The controller has counted this node's guests as dead, and the lease is not held yet: it is told later.
        first.fence.found_lost();
        let telling = tokio::spawn(enforce_and_tell(first.clone()));
        tokio::time::sleep(LOOK_EVERY).await;
        fenced(root.path());
        // Some looks later.
        tokio::time::sleep(10 * LOOK_EVERY).await;
        std::fs::remove_dir_all(root.path().join("pods")).unwrap();
        first.fence.answered(first.fence.now(), None, None);
        let [[reason, _, message]] = &events(&api, 1).await[..] else { panic!("one event") };
        assert_eq!(reason, "NodeFenced");
        assert!(message.ends_with("default/vm"), "{message}");
        telling.abort();
    }

    #[tokio::test]
    async fn a_guest_that_does_not_die_is_named_on_its_node_and_on_its_vmi() {
        let (api, root) = (api::Api::default(), tempfile::tempdir().unwrap());
        api.put("virtualmachineinstances", json!({"metadata": {"name": "vm", "namespace": "default", "uid": "u"}}));
        let victim = Victim::open(std::process::id()).unwrap();
        let not_dead = NotDead { left: vec![enforce::Left { guest: "default/vm".to_owned(), victim }] };
        super::not_dead(&around(&api, root.path()), &not_dead.to_string(), &not_dead.guests()).await;
        let mut told = events(&api, 2).await;
        told.sort_by(|one, other| one[1].cmp(&other[1]));
        for ([reason, kind, message], on) in told.iter().zip(["Node", "VirtualMachineInstance"]) {
            assert_eq!((reason.as_str(), kind.as_str()), ("GuestNotDead", on));
            assert!(message.contains("does not let go of the killed processes of default/vm"), "{message}");
        }
    }
}
