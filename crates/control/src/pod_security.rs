//! What the pods of guests may do: as little as Kubernetes' profile "restricted" has it (kubernetes.io, "Pod Security Standards"),
//! with exceptions that docs/launcher-pod.md names.

use godwit_api::VirtualMachineInstance;
use k8s_openapi::api::core::v1::{Capabilities, Node, PodSecurityContext, SeccompProfile, SecurityContext};

use crate::names;
use crate::object::{Name, Stored, labels};
use crate::world::World;

/// The user and the group of guests' pods, as in KubeVirt: images that were made for its pods can be read by these.
pub const USER: i64 = 107;
/// Kubernetes' label on namespaces: the profile that pods there must fit.
const ENFORCE: &str = "pod-security.kubernetes.io/enforce";

/// Whom a pod runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunAs {
    /// A user without any power.
    Nobody,
    /// Root that can do nothing but open what belongs to others: not all handlers give pods what they must open yet.
    Root,
    /// The same, and userfaultfd(2) for faults in the kernel too, which Linux allows only with `SYS_PTRACE`, and which the runtime's
    /// seccomp profile does not have: for a guest that arrives in post-copy. A capability that is added is no use to who is not root.
    PostCopyTarget,
}

impl RunAs {
    /// For a guest's pod that needs nothing special. The pods of a cluster whose handlers are being replaced stay root until the last
    /// one is new, except where no such pod is let in.
    pub fn usual(vmi: &VirtualMachineInstance, world: &World) -> Self {
        let ready = world.all_handlers_give_files() || profile(vmi, world) == Some("restricted");
        if ready { Self::Nobody } else { Self::Root }
    }

    /// Of the pod. `fsGroup` makes its volumes the group's; of what is the group's already nothing is looked through.
    pub fn pod(self) -> PodSecurityContext {
        let plain = self == Self::Nobody;
        PodSecurityContext {
            run_as_non_root: plain.then_some(true),
            run_as_user: Some(if plain { USER } else { 0 }),
            run_as_group: plain.then_some(USER),
            fs_group: Some(USER),
            fs_group_change_policy: Some("OnRootMismatch".to_owned()),
            seccomp_profile: Some(self.seccomp_profile()),
            ..PodSecurityContext::default()
        }
    }

    /// Of its container.
    pub fn container(self) -> SecurityContext {
        let add: &[&str] = match self {
            Self::Nobody => &[],
            Self::Root => &["DAC_OVERRIDE"],
            Self::PostCopyTarget => &["DAC_OVERRIDE", "SYS_PTRACE"],
        };
        SecurityContext {
            allow_privilege_escalation: Some(false),
            privileged: Some(false),
            capabilities: Some(Capabilities {
                add: (!add.is_empty()).then(|| add.iter().map(|name| (*name).to_owned()).collect()),
                drop: Some(vec!["ALL".to_owned()]),
            }),
            ..SecurityContext::default()
        }
    }

    fn seccomp_profile(self) -> SeccompProfile {
        let type_ = if self == Self::PostCopyTarget { "Unconfined" } else { "RuntimeDefault" };
        SeccompProfile { type_: type_.to_owned(), localhost_profile: None }
    }
}

/// Whether a node takes guests although its handler gives their pods nothing, or is not known to.
pub fn keeps_files(node: &Node) -> bool {
    let gives = node.annotation(names::ANNOTATION_GIVES_FILES);
    let now = gives.is_some() && gives == node.annotation(names::ANNOTATION_HEARTBEAT);
    node.label(names::LABEL_SCHEDULABLE) == Some("true") && !now
}

/// What the namespace of a VMI enforces.
fn profile<'a>(vmi: &VirtualMachineInstance, world: &'a World) -> Option<&'a str> {
    let namespace = world.namespaces.get(&Name::new("", vmi.namespace()))?;
    labels(&namespace.metadata).get(ENFORCE).map(String::as_str)
}

/// Whether the VMI's namespace lets a pod in that fits no profile but `privileged`. What the API server enforces where the label
/// says nothing cannot be known.
pub fn lets_privileged_in(vmi: &VirtualMachineInstance, world: &World) -> bool {
    !matches!(profile(vmi, world), Some("baseline" | "restricted"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launcher_pod::{self, Role};
    use crate::testing::{self, breaks_restricted};
    use crate::{Object, Source};
    use godwit_api::VirtualMachineInstanceMigration;
    use k8s_openapi::api::core::v1::{Namespace, Pod};
    use serde_json::json;
    use std::sync::Arc;

    #[test]
    fn pods_are_root_until_the_last_handler_gives_them_what_they_must_open() {
        let vmi: VirtualMachineInstance = serde_json::from_value(json!({
            "metadata": {"name": "demo", "namespace": "tenant", "uid": "u"}, "spec": {"domain": {}},
        }))
        .unwrap();
        let (early, late) = ("2026-11-22T20:00:00Z", "2026-11-22T20:01:00Z");
        let mut world = World::default();
        assert_eq!(RunAs::usual(&vmi, &world), RunAs::Nobody);
        let mut node = |name: &str, schedulable: &str, gives: Option<&str>, beat: &str| {
            let mut annotations = json!({names::ANNOTATION_HEARTBEAT: beat});
            if let Some(gives) = gives {
                annotations[names::ANNOTATION_GIVES_FILES] = json!(gives);
            }
            let node: Node = serde_json::from_value(json!({"metadata": {
                "name": name,
                "labels": {names::LABEL_SCHEDULABLE: schedulable},
                "annotations": annotations,
            }}))
            .unwrap();
            world.apply(Object::Node(Arc::new(node)), Source::Watch);
            RunAs::usual(&vmi, &world)
        };
        assert_eq!(node("new", "true", Some(early), early), RunAs::Nobody);
        assert_eq!(node("old", "true", None, early), RunAs::Root);
        assert_eq!(node("old", "false", None, early), RunAs::Nobody);
        assert_eq!(node("old", "true", Some(early), early), RunAs::Nobody);
        // Gone back to the older one, which leaves alone what it does not know.
        assert_eq!(node("old", "true", Some(early), late), RunAs::Root);
        // Where no such pod is let in it would be no use.
        let namespace: Namespace =
            serde_json::from_value(json!({"metadata": {"name": "tenant", "labels": {ENFORCE: "restricted"}}})).unwrap();
        world.apply(Object::Namespace(Arc::new(namespace)), Source::Watch);
        assert_eq!(RunAs::usual(&vmi, &world), RunAs::Nobody);
    }

    #[test]
    fn a_namespace_says_what_it_lets_in() {
        let vmi: VirtualMachineInstance = serde_json::from_value(json!({
            "metadata": {"name": "demo", "namespace": "tenant", "uid": "u"}, "spec": {"domain": {}},
        }))
        .unwrap();
        let mut world = World::default();
        assert!(lets_privileged_in(&vmi, &world));
        for (level, lets) in [("restricted", false), ("baseline", false), ("privileged", true)] {
            let namespace: Namespace =
                serde_json::from_value(json!({"metadata": {"name": "tenant", "labels": {ENFORCE: level}}})).unwrap();
            world.apply(Object::Namespace(Arc::new(namespace)), Source::Watch);
            assert_eq!(lets_privileged_in(&vmi, &world), lets, "{level}");
        }
    }

    #[test]
    fn pods_fit_the_profile_restricted_but_those_that_receive_in_post_copy() {
        let vmi: VirtualMachineInstance = serde_json::from_value(json!({
            "metadata": {"name": "demo", "namespace": "tenant", "uid": "u1"},
            "spec": {
                "domain": {
                    "devices": {"tpm": {"persistent": true}},
                    "firmware": {"kernelBoot": {"container": {"image": "boot:1", "kernelPath": "/k"}}},
                },
                "volumes": [
                    {"name": "root", "containerDisk": {"image": "disk:1"}},
                    {"name": "data", "persistentVolumeClaim": {"claimName": "claim"}},
                    {"name": "more", "configMap": {"name": "cm"}}, {"name": "keys", "secret": {"secretName": "s"}},
                    {"name": "seed", "cloudInitNoCloud": {"secretRef": {"name": "a"}, "networkDataSecretRef": {"name": "b"}}},
                    {"name": "scratch", "emptyDisk": {"capacity": "1Gi"}},
                ],
            },
        }))
        .unwrap();
        let migration: VirtualMachineInstanceMigration = serde_json::from_value(json!({
            "metadata": {"name": "job", "namespace": "tenant", "uid": "m1"}, "spec": {"vmiName": "demo"},
        }))
        .unwrap();
        let settings = testing::settings();
        let mut world = World::default();
        for role in [Role::Start, Role::Receive(&migration)] {
            let pod = launcher_pod::build(&vmi, role, &testing::view(&world, &settings));
            assert_eq!(breaks_restricted(&pod), [""; 0]);
            let whole = pod.spec.unwrap().security_context.unwrap();
            assert_eq!([whole.run_as_user, whole.run_as_group, whole.fs_group], [Some(USER); 3]);
        }
        let kubevirt = serde_json::from_value(json!({
            "metadata": {"name": "kubevirt", "namespace": "kubevirt", "uid": "kv"},
            "spec": {"configuration": {"migrations": {"allowPostCopy": true}}},
        }));
        world.apply(Object::KubeVirt(std::sync::Arc::new(kubevirt.unwrap())), Source::Watch);
        let security = |pod: Pod| {
            let spec = pod.spec.unwrap();
            let added = spec.containers[0].security_context.clone().unwrap().capabilities.unwrap().add;
            (added.unwrap_or_default(), spec.security_context.unwrap().seccomp_profile.unwrap().type_)
        };
        let starting = launcher_pod::build(&vmi, Role::Start, &testing::view(&world, &settings));
        assert_eq!(breaks_restricted(&starting), [""; 0]);
        let receiving = launcher_pod::build(&vmi, Role::Receive(&migration), &testing::view(&world, &settings));
        assert!(!breaks_restricted(&receiving).is_empty());
        let powers = vec!["DAC_OVERRIDE".to_owned(), "SYS_PTRACE".to_owned()];
        assert_eq!(security(receiving), (powers, "Unconfined".to_owned()));
        // Where such a pod would be refused, the guest comes in pre-copy.
        let namespace = serde_json::from_value(json!({
            "metadata": {"name": "tenant", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        }));
        world.apply(Object::Namespace(std::sync::Arc::new(namespace.unwrap())), Source::Watch);
        let receiving = launcher_pod::build(&vmi, Role::Receive(&migration), &testing::view(&world, &settings));
        assert_eq!(breaks_restricted(&receiving), [""; 0]);
    }
}
