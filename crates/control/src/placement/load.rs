//! What nodes have and what their pods ask for, kept in sums as pods come and go.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Node, Pod};

use super::is_finished;
use crate::names;
use crate::object::{Object, Stored};
use crate::quantity;
use crate::world::Change;

/// An amount of what nodes have and pods ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// Thousandths of a CPU.
    pub cpu_milli: i128,
    /// Bytes.
    pub memory: i128,
}

/// What a pod asks for: the sum of its containers, at least the most of its init containers, and its overhead.
pub fn requests(pod: &Pod) -> Requests {
    let Some(spec) = &pod.spec else { return Requests::default() };
    let of = |container: &Container| {
        let requests = container.resources.as_ref().and_then(|resources| resources.requests.as_ref());
        Requests {
            cpu_milli: quantity::cpu_milli(requests.and_then(|all| all.get("cpu"))),
            memory: quantity::whole(requests.and_then(|all| all.get("memory"))),
        }
    };
    let mut sum = spec.containers.iter().map(of).fold(Requests::default(), |sum, one| Requests {
        cpu_milli: sum.cpu_milli + one.cpu_milli,
        memory: sum.memory + one.memory,
    });
    for one in spec.init_containers.iter().flatten().map(of) {
        sum.cpu_milli = sum.cpu_milli.max(one.cpu_milli);
        sum.memory = sum.memory.max(one.memory);
    }
    let overhead = spec.overhead.as_ref();
    sum.cpu_milli += quantity::cpu_milli(overhead.and_then(|all| all.get("cpu")));
    sum.memory += quantity::whole(overhead.and_then(|all| all.get("memory")));
    sum
}

/// What a node has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Capacity {
    /// CPU and memory.
    pub allocatable: Requests,
    /// The most pods, if there is a most.
    pub max_pods: Option<i128>,
}

impl Capacity {
    fn of(node: &Node) -> Self {
        let status = node.status.as_ref();
        let has = status.and_then(|status| status.allocatable.as_ref().or(status.capacity.as_ref()));
        Self {
            allocatable: Requests {
                cpu_milli: quantity::cpu_milli(has.and_then(|all| all.get("cpu"))),
                memory: quantity::whole(has.and_then(|all| all.get("memory"))),
            },
            max_pods: has.and_then(|all| all.get("pods")).and_then(|quantity| quantity::units(&quantity.0)),
        }
    }
}

/// What the unfinished pods of a node ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// CPU and memory.
    pub used: Requests,
    /// The number of pods.
    pub pods: i128,
    /// How many of them are launchers.
    pub launchers: i128,
}

impl Load {
    fn add(&mut self, pod: &Pod, sign: i128) {
        let one = requests(pod);
        self.used.cpu_milli += sign * one.cpu_milli;
        self.used.memory += sign * one.memory;
        self.pods += sign;
        self.launchers += sign * i128::from(pod.label(names::LABEL_APP) == Some(names::APP_VIRT_LAUNCHER));
    }
}

/// The loads and capacities of all nodes.
#[derive(Clone, Debug, Default)]
pub struct Loads {
    loads: BTreeMap<String, Load>,
    capacities: BTreeMap<String, Capacity>,
}

impl Loads {
    /// What the pods of a node ask for.
    pub fn of(&self, node: &str) -> Load {
        self.loads.get(node).copied().unwrap_or_default()
    }

    /// What a node has.
    pub fn capacity(&self, node: &str) -> Capacity {
        self.capacities.get(node).copied().unwrap_or_default()
    }

    /// Takes in a change.
    pub(crate) fn refresh(&mut self, change: &Change) {
        match change.latest() {
            Some(Object::Pod(_)) => {
                let held = |side: &Option<Object>| match side {
                    Some(Object::Pod(pod)) if !is_finished(pod) => {
                        let node = pod.spec.as_ref()?.node_name.clone().filter(|node| !node.is_empty())?;
                        Some((node, pod.clone()))
                    }
                    _ => None,
                };
                let (before, after) = (held(&change.before), held(&change.after));
                if let Some((node, pod)) = before {
                    let load = self.loads.entry(node.clone()).or_default();
                    load.add(&pod, -1);
                    if *load == Load::default() {
                        self.loads.remove(&node);
                    }
                }
                if let Some((node, pod)) = after {
                    self.loads.entry(node).or_default().add(&pod, 1);
                }
            }
            Some(Object::Node(node)) => {
                match &change.after {
                    Some(Object::Node(node)) => self.capacities.insert(node.name().to_owned(), Capacity::of(node)),
                    _ => self.capacities.remove(node.name()),
                };
            }
            _ => {}
        }
    }
}
