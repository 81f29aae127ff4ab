//! How the cluster is founded, and what users do in it.

use godwit_control::{Kind, Name, Object, Ref, names};
use serde_json::{Value, json};

use crate::Limits;
use crate::check::Rule;
use crate::event::{Event, Fault};
use crate::machine::Guest;
use crate::sim::{MS, SECOND, Sim};

const MEBI: u64 = 1 << 20;
/// So many VMs share a namespace.
const VMS_IN_NAMESPACE: u64 = 100;
/// What the names of VMs begin with.
pub const PREFIX: &str = "vm";
const USER: &str = "admin";

/// The name of a VM; few are together in one namespace, as in a cluster with many tenants.
pub fn vm_name(prefix: &str, number: u64, of: u32) -> Name {
    match u64::from(of) > VMS_IN_NAMESPACE {
        true => Name::new(format!("tenant{}", number / VMS_IN_NAMESPACE), format!("{prefix}{number}")),
        false => Name::new("default", format!("{prefix}{number}")),
    }
}

/// When the first migrations may be asked for.
fn begin(duration: u64) -> u64 {
    (duration / 3).min(15 * SECOND)
}

/// Limits as the KubeVirt object has them.
fn wording(limits: Limits) -> Value {
    json!({
        "parallelMigrationsPerCluster": limits.cluster,
        "parallelOutboundMigrationsPerNode": limits.outbound,
        "parallelInboundMigrationsPerNode": limits.inbound,
    })
}

impl Sim {
    fn create(&mut self, kind: Kind, value: Value) {
        let now = self.time();
        if let Err(refusal) = self.store.create(kind, value, USER, now, &mut self.random) {
            self.violate(
                Rule::Simulation,
                format!("a {} of the simulation's own is refused: {refusal:?}", kind.kind()),
            );
        }
        self.spread();
    }

    /// Nodes, classes, VMs; and when things will happen.
    pub fn found(&mut self) {
        let mut migrations = self.options.limits.map_or_else(|| json!({}), wording);
        if self.faulty(|faults| faults.post_copy_per_mille)
            && let Some(migrations) = migrations.as_object_mut()
        {
            migrations.insert("allowPostCopy".to_owned(), json!(true));
            migrations.insert("completionTimeoutPerGiB".to_owned(), json!(1));
        }
        let mut configuration = json!({"migrations": migrations});
        // Nodes on each of which all VMs have room, and VMs that leave one when they are asked to.
        let mut allocatable = json!({"cpu": "64", "memory": "512Gi", "pods": "500"});
        if self.options.empty.is_some() {
            configuration["evictionStrategy"] = json!("LiveMigrate");
            allocatable = json!({"cpu": "2048", "memory": "64Ti", "pods": "20000"});
        }
        self.create(
            Kind::KubeVirt,
            json!({"metadata": {"namespace": names::KUBEVIRT_NAMESPACE, "name": names::KUBEVIRT_NAME},
                "spec": {"configuration": configuration}}),
        );
        self.create(
            Kind::StorageClass,
            json!({"metadata": {"name": "shared"}, "provisioner": godwit_api::initial::SHARED_PROVISIONER, "volumeBindingMode": "Immediate"}),
        );
        for index in 0..self.nodes.len() {
            let name = self.name_of(index).to_owned();
            self.create(
                Kind::Node,
                json!({
                    "metadata": {
                        "name": name,
                        "labels": {"kubernetes.io/hostname": name, names::LABEL_SCHEDULABLE: "true"},
                    },
                    "status": {
                        "allocatable": allocatable,
                        "conditions": [{"type": "Ready", "status": "True"}],
                    },
                }),
            );
            self.boot_node(index);
        }
        self.skew_clocks();
        for who in 0..self.controllers.len() {
            if let Some(one) = self.controllers.get_mut(who) {
                one.mutation = self.options.mutation;
            }
            self.restart_controllers(who, MS);
        }
        let duration = u64::try_from(self.options.duration.as_micros()).unwrap_or(u64::MAX / 4);
        if self.options.standing {
            self.stand();
        } else {
            for number in 0..self.options.vms {
                self.found_vm(number, duration);
            }
        }
        for _ in 0..self.options.moves.unwrap_or(0) {
            let number = self.random.between(0, u64::from(self.options.vms.max(1)) - 1);
            let begin = begin(duration);
            let after = if self.options.at_once { begin } else { self.random.between(begin, duration) };
            self.at(after, Event::AskMigration { vmi: vm_name(self.prefix, number, self.options.vms) });
        }
        self.plan_to_empty();
        self.plan_maintenances(duration);
        for fault in Fault::ALL {
            if let Some(after) = self.interval(fault) {
                self.at(5 * SECOND + after, Event::Fault(fault));
            }
        }
    }

    fn found_vm(&mut self, number: u32, duration: u64) {
        let key = vm_name(self.prefix, u64::from(number), self.options.vms);
        let (name, namespace) = (key.name.clone(), key.namespace.clone());
        let memory = self.random.between(1, 16) * 128 * MEBI;
        let bandwidth = self.random.between(32, 512) * MEBI;
        let busy = self.faulty(|faults| faults.busy_guests_per_mille);
        let dirty = if busy { bandwidth * 2 } else { self.random.between(0, bandwidth * 7 / 10) };
        self.guests.insert(key.clone(), Guest { memory, dirty, bandwidth });
        let claim = number.is_multiple_of(2);
        if claim {
            self.create(
                Kind::PersistentVolumeClaim,
                json!({"metadata": {"namespace": namespace, "name": name}, "spec": {
                    "storageClassName": "shared", "accessModes": ["ReadWriteMany"],
                    "resources": {"requests": {"storage": "1Gi"}},
                }}),
            );
        }
        let (disks, volumes) = match claim {
            true => (
                json!([{"name": "disk", "disk": {"bus": "virtio"}}]),
                json!([{"name": "disk", "persistentVolumeClaim": {"claimName": name}}]),
            ),
            false => (json!([]), json!([])),
        };
        // One of four is shut down by whoever empties its node.
        let strategy = (self.options.maintenances > 0 && number % 4 != 3).then_some("LiveMigrate");
        self.create(
            Kind::VirtualMachine,
            json!({"metadata": {"namespace": namespace, "name": name}, "spec": {
                "runStrategy": "Always",
                "template": {"spec": {
                    "evictionStrategy": strategy,
                    "terminationGracePeriodSeconds": 5,
                    "domain": {"memory": {"guest": format!("{}Mi", memory / MEBI)}, "devices": {"disks": disks}},
                    "volumes": volumes,
                }},
            }}),
        );
        if self.options.moves.is_some() {
            return;
        }
        let begin = begin(duration);
        for _ in 0..self.options.migrations {
            let after = if self.options.at_once { begin } else { self.random.between(begin, duration) };
            self.at(after, Event::AskMigration { vmi: key.clone() });
        }
    }

    /// A user asks for a migration, and may change their mind.
    pub fn ask_migration(&mut self, vmi: &Name) {
        if self.store_down {
            return self.note(format!("a user finds no API server to move {vmi}"));
        }
        let now = self.time();
        self.asked_migrations += 1;
        let number = self.asked_migrations;
        let body =
            |name: &str| json!({"metadata": {"namespace": vmi.namespace, "name": name}, "spec": {"vmiName": vmi.name}});
        let name = format!("move{number}");
        // Two requests at the same moment are admitted side by side: neither sees the other.
        let twin = if self.faulty(|faults| faults.twins_per_mille) {
            self.store.admit(Kind::Migration, body(&format!("{name}b")), USER).ok()
        } else {
            None
        };
        match self.store.create(Kind::Migration, body(&name), USER, now, &mut self.random) {
            Ok(_) => self.note(format!("a user asks to move {vmi}: {name}")),
            Err(refusal) => self.note(format!("moving {vmi} is refused: {refusal:?}")),
        }
        if let Some(twin) = twin {
            self.note(format!("a user asks to move {vmi} at the same moment: {name}b"));
            let _ = self.store.insert(Kind::Migration, twin, now, &mut self.random);
        }
        self.spread();
        if self.faulty(|faults| faults.cancels_per_mille) {
            let longest = if self.random.chance(500) { 3 * SECOND } else { 60 * SECOND };
            let after = self.random.between(MS, longest);
            self.at(after, Event::CancelMigration { name: Name::new(vmi.namespace.as_str(), name) });
        }
    }

    /// A user deletes a migration, or now and then its VMI.
    pub fn cancel_migration(&mut self, name: &Name) {
        if self.store_down {
            return;
        }
        let now = self.time();
        let target = Ref::new(Kind::Migration, name.clone());
        let Some(Object::Migration(migration)) = self.store.get(&target).cloned() else { return };
        let cancel = self.options.blow.is_some() || self.random.chance(800);
        let target = if cancel {
            target
        } else {
            let vmi = Ref::new(Kind::VirtualMachineInstance, Name::new(name.namespace.as_str(), migration.vmi_name()));
            if let Some(uid) = self.store.get(&vmi).and_then(|vmi| vmi.metadata().uid.clone()) {
                self.asked.insert(uid);
            }
            vmi
        };
        self.note(format!("a user deletes {target}"));
        let _ = self.store.delete(&target, "", None, now);
        self.spread();
    }

    /// An administrator changes the limits.
    pub fn change_limits(&mut self) {
        let mut draw = |most| u32::try_from(self.random.between(1, most)).unwrap_or(1);
        let limits = Limits { cluster: draw(6), outbound: draw(3), inbound: draw(3) };
        let target = Ref::new(Kind::KubeVirt, Name::new(names::KUBEVIRT_NAMESPACE, names::KUBEVIRT_NAME));
        self.note(format!("an administrator sets {limits:?}"));
        let body = json!({"spec": {"configuration": {"migrations": wording(limits)}}});
        if self.store_down || self.store.merge(&target, false, &body).is_err() {
            self.note("  which does not work".to_owned());
        }
        self.spread();
    }

    /// An administrator cordons a node, or takes that back.
    pub fn cordon(&mut self, index: usize, cordoned: bool) {
        if self.is_kept(index) {
            return;
        }
        if self.store_down {
            if !cordoned {
                self.at(SECOND, Event::Uncordon { node: index });
            }
            return;
        }
        let target = Ref::new(Kind::Node, Name::cluster(self.name_of(index)));
        let spec = json!([{"op": "add", "path": "/spec", "value": {}}]);
        let flag = json!([{"op": "add", "path": "/spec/unschedulable", "value": cordoned}]);
        if self.store.json(&target, &flag).is_err() {
            let _ = self.store.json(&target, &spec);
            let _ = self.store.json(&target, &flag);
        }
        self.note(format!("{target} is {}", if cordoned { "cordoned" } else { "uncordoned" }));
        self.spread();
        if cordoned {
            let after = self.random.between(SECOND, 400 * SECOND);
            self.at(after, Event::Uncordon { node: index });
        }
    }

    /// The garbage collector: what belonged to nothing but the owner goes.
    pub fn collect(&mut self, owner: &str) {
        if self.store_down {
            return self.at(SECOND, Event::Collect { owner: owner.to_owned() });
        }
        let now = self.time();
        let orphans: Vec<(Ref, String)> = self
            .store
            .owned_by(owner)
            .filter(|object| {
                let owners = object.metadata().owner_references.as_deref().unwrap_or_default();
                !owners.iter().any(|one| self.store.get_by_uid(&one.uid).is_some())
            })
            .map(|object| (object.reference(), object.metadata().uid.clone().unwrap_or_default()))
            .collect();
        for (target, uid) in orphans {
            let _ = self.store.delete(&target, &uid, None, now);
        }
        self.spread();
    }
}
