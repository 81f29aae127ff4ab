//! A copy of the world on which the plan is played: pods go and come there, so that each place is found as it will be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use godwit_api::{VirtualMachineInstance, VirtualMachineInstanceMigration};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::quotas::{Counted, Quotas, Traffic};
use super::schedule::{Job, Place, Spot, Work};
use crate::launcher_pod::{self, Role};
use crate::object::{Kind, Name, Object, Stored};
use crate::placement::{self, Room};
use crate::plan::View;
use crate::world::{Source, World};
use crate::{names, processor};

/// The copy.
pub struct Stage<'a> {
    view: View<'a>,
    world: World,
    /// The same without the pods that have come at this very moment: slots are given all at once, and their nodes chosen
    /// before the first of their pods is there.
    before: World,
    /// Those pods.
    fresh: Vec<Pod>,
    empty: &'a BTreeSet<&'a str>,
    /// Why no node took a job.
    nowhere: BTreeMap<usize, Arc<str>>,
    quotas: Quotas,
    /// The pods that these count.
    pods: Traffic,
}

impl<'a> Stage<'a> {
    /// A copy in which the nodes to be emptied take nothing new.
    pub fn new(view: &View<'a>, empty: &'a BTreeSet<&'a str>, quotas: Quotas) -> Self {
        let mut world = view.world.clone();
        for node in empty {
            let Some(node) = view.world.nodes.get(&Name::cluster(*node)) else { continue };
            let mut closed = node.as_ref().clone();
            closed.spec.get_or_insert_default().unschedulable = Some(true);
            put(&mut world, closed);
        }
        let before = world.clone();
        let (fresh, nowhere, pods) = Default::default();
        Self { view: *view, world, before, fresh, empty, nowhere, quotas, pods }
    }

    /// The pods that quotas count, as they came and went.
    pub fn traffic(&self) -> &Traffic {
        &self.pods
    }

    /// Why no node took a job, in the scheduler's words or those of a quota.
    pub fn nowhere(&self, index: usize) -> Option<String> {
        self.nowhere.get(&index).map(|why| why.to_string())
    }

    /// A launcher pod as it would be made: ours, with what the one of now asks of its node, whoever has made that.
    fn pod(&self, vmi: &VirtualMachineInstance, role: Role<'_>, now: Option<&Pod>) -> Pod {
        let view = View { world: &self.world, ..self.view };
        let mut pod = launcher_pod::build(vmi, role, &view);
        pod.metadata.uid = Some(format!("plan-{}", pod.metadata.name.as_deref().unwrap_or_default()));
        let Some(spec) = &mut pod.spec else { return pod };
        if let Some(now) = now.and_then(|now| now.spec.as_ref()) {
            spec.containers.clone_from(&now.containers);
            spec.init_containers.clone_from(&now.init_containers);
            spec.overhead.clone_from(&now.overhead);
            spec.tolerations.clone_from(&now.tolerations);
        }
        // What a migration may have asked for that brought the guest here is not asked for again.
        if let Some(now) = now.filter(|now| now.label(names::LABEL_MIGRATION_JOB_UID).is_none())
            && let Some(mut selector) = now.spec.as_ref().and_then(|spec| spec.node_selector.clone())
        {
            let wanted = processor::wanted(vmi, role, &self.world);
            selector.extend(wanted.into_iter().map(|label| (label, "true".to_owned())));
            selector.insert(names::LABEL_SCHEDULABLE.to_owned(), "true".to_owned());
            spec.node_selector = Some(selector);
        }
        // Claims that are made together with the pod, for its node, keep it from none.
        if let Some(volumes) = &mut spec.volumes {
            let namespace = vmi.namespace();
            let of_vmi = |claim: &str| {
                let volumes = vmi.spec.volumes.iter().filter_map(|volume| volume.persistent_volume_claim.as_ref());
                volumes.into_iter().any(|source| source.claim_name == claim)
            };
            volumes.retain(|volume| {
                volume.persistent_volume_claim.as_ref().is_none_or(|source| {
                    of_vmi(&source.claim_name)
                        || self.world.claims.get(&Name::new(namespace, source.claim_name.as_str())).is_some()
                })
            });
        }
        pod
    }

    fn take(&mut self, index: usize, mut pod: Pod, coming: &dyn Fn(&str) -> u32, limit: u32) -> Spot {
        // A pod that tolerates a cordon still does not stay where nothing is to be left.
        let coming = |node: &str| if self.empty.contains(node) { u32::MAX } else { coming(node) };
        let mut room = placement::room(&pod, &self.before, coming, limit);
        if matches!(&room, Room::On(node) if !placement::takes(&pod, &self.world, node)) {
            room = placement::room(&pod, &self.world, coming, limit);
        }
        match room {
            Room::On(node) => {
                pod.spec.get_or_insert_default().node_name = Some(node.clone());
                put(&mut self.world, pod.clone());
                self.fresh.push(pod);
                self.nowhere.remove(&index);
                Spot::On(node)
            }
            Room::Full(node) => Spot::Full(node),
            Room::Nowhere => {
                self.nowhere.insert(index, placement::explain(&pod, &self.world).into());
                Spot::Nowhere
            }
        }
    }

    fn forget(&mut self, pod: &Name) {
        self.world.forget(Kind::Pod, pod);
        self.before.forget(Kind::Pod, pod);
    }
}

/// Puts an object on the copy, over the one of its name.
fn put(world: &mut World, object: impl Into<Object>) {
    let mut object = object.into();
    // Without a revision it is newer than all that was read.
    object.metadata_mut().resource_version = None;
    world.apply(object, Source::Answer);
}

impl Place for Stage<'_> {
    fn tick(&mut self) {
        self.quotas.tick();
        for pod in self.fresh.drain(..) {
            put(&mut self.before, pod);
        }
    }

    fn find(&mut self, index: usize, job: &Job, coming: &dyn Fn(&str) -> u32, limit: u32) -> Spot {
        let Some(vmi) = self.world.vmis.get(&job.vmi).cloned() else { return Spot::Nowhere };
        // Before its pod is made, which takes a while: there may be many of them, at each moment.
        if let Some(refusal) = self.quotas.refused(&job.vmi.namespace) {
            self.nowhere.insert(index, refusal.says);
            return Spot::NoQuota(refusal.quota.to_string());
        }
        let migration = migration(&job.vmi, &format!("plan-{index}"));
        let now = job.pod.as_ref().and_then(|pod| self.world.pods.get(pod)).cloned();
        let pod = self.pod(&vmi, Role::Receive(&migration), now.as_deref());
        let counted = self.quotas.count(pod.namespace()).then(|| Counted::of(&pod));
        if let Some(refusal) = counted.as_ref().and_then(|pod| self.quotas.ask(&job.vmi, pod)) {
            self.nowhere.insert(index, refusal.says);
            return Spot::NoQuota(refusal.quota.to_string());
        }
        let spot = self.take(index, pod, coming, limit);
        if let (Spot::On(_), Some(pod)) = (&spot, counted) {
            self.quotas.take(&pod);
            self.pods.came.insert(index, pod);
        }
        spot
    }

    fn left(&mut self, index: usize, job: &Job) -> Option<String> {
        let before = job.pod.as_ref().and_then(|pod| self.world.pods.get(pod)).cloned();
        if let Some(pod) = before.as_ref().filter(|pod| self.quotas.count(pod.namespace())) {
            let counted = Counted::of(pod);
            self.quotas.give_back(&counted);
            self.pods.went.insert(index, counted);
        }
        if let Some(pod) = &job.pod {
            self.forget(pod);
        }
        if job.work != (Work::ShutDown { restarts: true }) {
            return None;
        }
        let mut vmi = self.world.vmis.get(&job.vmi)?.as_ref().clone();
        vmi.metadata.uid = Some(format!("again-{}", vmi.uid()));
        vmi.status = Default::default();
        let pod = self.pod(&vmi, Role::Start, before.as_deref());
        if self.quotas.count(pod.namespace()) {
            let counted = Counted::of(&pod);
            self.quotas.tick();
            if let Some(refusal) = self.quotas.ask(&job.vmi, &counted) {
                self.nowhere.insert(index, refusal.says);
                return None;
            }
            self.quotas.take(&counted);
            self.pods.came.insert(index, counted);
        }
        match self.take(index, pod, &|_| 0, u32::MAX) {
            Spot::On(node) => Some(node),
            Spot::Full(_) | Spot::NoQuota(_) | Spot::Nowhere => None,
        }
    }
}

/// A migration as it would be made for a VMI.
pub fn migration(vmi: &Name, uid: &str) -> VirtualMachineInstanceMigration {
    let mut migration = VirtualMachineInstanceMigration {
        metadata: ObjectMeta {
            namespace: Some(vmi.namespace.to_string()),
            name: Some(vmi.name.to_string()),
            uid: Some(uid.to_owned()),
            ..ObjectMeta::default()
        },
        ..VirtualMachineInstanceMigration::default()
    };
    migration.spec.vmi_name = Some(vmi.name.to_string());
    migration
}
