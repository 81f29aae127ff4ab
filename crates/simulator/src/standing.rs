//! A cluster that stands already: its VMs are stamped from a few that the controllers have started in a small cluster of
//! their own, so that they are what the controllers would have made of them.

use std::collections::BTreeMap;

use godwit_api::{VirtualMachine, VirtualMachineInstance};
use godwit_control::launcher_pod::{self, Role};
use godwit_control::{Kind, Name, Object, Ref};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use serde::de::DeserializeOwned;

use crate::check::Rule;
use crate::machine::{Domain, Guest, Launcher};
use crate::sim::Sim;
use crate::users::vm_name;
use crate::{Faults, Options};

/// So many VMs are started to stamp the others from.
const SHAPES: u32 = 16;
/// What their names begin with.
const PREFIX: &str = "shape";

/// What is another for each VM.
const NAME: usize = 0;
const NAMESPACE: usize = 1;
const NODE: usize = 2;
const POD: usize = 3;
const FIRST_UID: usize = 4;

/// A text with gaps.
struct Form {
    kind: Kind,
    pieces: Vec<(String, Option<usize>)>,
}

impl Form {
    /// Cuts the tokens out of an object.
    fn of(object: &Object, tokens: &[(String, usize)]) -> Option<Self> {
        let text = serde_json::to_string(&object.to_value().ok()?).ok()?;
        let mut pieces = Vec::new();
        let mut rest = text.as_str();
        loop {
            let found = tokens.iter().filter_map(|(token, gap)| Some((rest.find(token.as_str())?, token, *gap)));
            // Of two at one place the longer one.
            let Some((at, token, gap)) = found.min_by_key(|(at, token, _)| (*at, usize::MAX - token.len())) else {
                break;
            };
            pieces.push((rest.get(..at)?.to_owned(), Some(gap)));
            rest = rest.get(at + token.len()..)?;
        }
        pieces.push((rest.to_owned(), None));
        Some(Self { kind: object.kind(), pieces })
    }

    fn fill(&self, values: &[String]) -> Option<Object> {
        fn read<T: DeserializeOwned + Into<Object>>(text: &str) -> Option<Object> {
            serde_json::from_str::<T>(text).ok().map(Into::into)
        }
        let mut text = String::new();
        for (piece, gap) in &self.pieces {
            text.push_str(piece);
            if let Some(gap) = gap {
                text.push_str(values.get(*gap)?);
            }
        }
        match self.kind {
            Kind::VirtualMachine => read::<VirtualMachine>(&text),
            Kind::VirtualMachineInstance => read::<VirtualMachineInstance>(&text),
            Kind::Pod => read::<Pod>(&text),
            Kind::PersistentVolumeClaim => read::<PersistentVolumeClaim>(&text),
            Kind::PersistentVolume => read::<PersistentVolume>(&text),
            _ => None,
        }
    }
}

/// The objects of one VM, and its guest.
struct Shape {
    forms: Vec<Form>,
    uids: usize,
    guest: Guest,
}

impl Sim {
    /// All VMs run, spread over the nodes, or on the one that will be emptied.
    pub fn stand(&mut self) {
        let shapes = self.shapes();
        if shapes.is_empty() {
            return self.violate(Rule::Simulation, "no VM could be started to stamp others from".to_owned());
        }
        for number in 0..self.options.vms {
            let index = usize::try_from(number).unwrap_or(0);
            let Some(shape) = shapes.get(index % shapes.len()) else { continue };
            let node = self.to_be_emptied().unwrap_or(index % self.nodes.len().max(1));
            if self.stamp(number, node, shape).is_none() {
                return self.violate(Rule::Simulation, format!("VM {number} could not be stamped"));
            }
        }
        self.spread();
    }

    /// Starts a few VMs in a cluster of one node.
    fn shapes(&mut self) -> Vec<Shape> {
        let options = Options {
            nodes: 1,
            vms: SHAPES,
            seed: self.options.seed,
            faults: Faults::NONE,
            migrations: 0,
            duration: std::time::Duration::from_secs(30),
            ..Options::default()
        };
        let mut small = Sim::new(options);
        small.prefix = PREFIX;
        small.drive();
        (0..SHAPES).filter_map(|number| small.shape(&vm_name(PREFIX, u64::from(number), SHAPES))).collect()
    }

    /// What the controllers have made of a VM.
    fn shape(&self, name: &Name) -> Option<Shape> {
        let get = |kind| self.store.get(&Ref::new(kind, name.clone()));
        let Some(Object::VirtualMachineInstance(vmi)) = get(Kind::VirtualMachineInstance) else { return None };
        let pod_name = launcher_pod::name(vmi, Role::Start);
        let pod = self.store.get(&Ref::new(Kind::Pod, Name::new(name.namespace.as_str(), pod_name.as_str())))?;
        let mut objects = vec![get(Kind::VirtualMachine)?, get(Kind::VirtualMachineInstance)?, pod];
        if let Some(Object::PersistentVolumeClaim(claim)) = get(Kind::PersistentVolumeClaim) {
            let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone())?;
            objects.push(get(Kind::PersistentVolumeClaim)?);
            objects.push(self.store.get(&Ref::new(Kind::PersistentVolume, Name::cluster(volume)))?);
        }
        let mut tokens = vec![
            (name.name.to_string(), NAME),
            (format!("\"{}\"", name.namespace), NAMESPACE),
            ("\"node1\"".to_owned(), NODE),
            (pod_name, POD),
        ];
        for object in &objects {
            tokens.push((object.metadata().uid.clone()?, tokens.len()));
        }
        let uids = tokens.len() - FIRST_UID;
        let forms: Option<Vec<Form>> = objects.iter().map(|object| Form::of(object, &tokens)).collect();
        Some(Shape { forms: forms?, uids, guest: *self.guests.get(name)? })
    }

    fn stamp(&mut self, number: u32, node: usize, shape: &Shape) -> Option<()> {
        let name = vm_name(self.prefix, u64::from(number), self.options.vms);
        let mut values = vec![
            name.name.to_string(),
            format!("\"{}\"", name.namespace),
            format!("\"{}\"", self.name_of(node)),
            String::new(),
        ];
        values.extend((0..shape.uids).map(|_| self.random.uid()));
        let mut made = BTreeMap::new();
        for form in &shape.forms {
            let object = form.fill(&values)?;
            if let Object::VirtualMachineInstance(vmi) = &object {
                values[POD] = launcher_pod::name(vmi, Role::Start);
            }
            made.insert(object.kind(), object);
        }
        let uid = |kind| made.get(&kind).and_then(|object| object.metadata().uid.clone());
        let launcher = Launcher {
            node,
            pod: made.get(&Kind::Pod)?.name(),
            pod_uid: uid(Kind::Pod)?,
            vmi: name.clone(),
            vmi_uid: uid(Kind::VirtualMachineInstance)?,
            receives: None,
            domain: Domain::Running,
            loaded: false,
            resumed: None,
            sends: None,
            ended: None,
            stopping: false,
            ordered: true,
            forgotten: false,
            orphaned: false,
            fills: false,
            stalled_until: 0,
            frozen_until: 0,
            seen: None,
        };
        self.launchers.insert(launcher);
        self.guests.insert(name, shape.guest);
        for object in made.into_values() {
            self.store.adopt(object);
        }
        Some(())
    }
}
