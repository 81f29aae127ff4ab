//! All objects of one type. Those that nobody has read for a while can be kept packed, as text that takes a fifth of the memory, and
//! where there are many of them as what that says otherwise than theirs, which takes a tenth of that.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use crate::object::{Name, Stored};
use crate::ordered::Ordered;
use crate::short::{Sample, Short};

/// Where there are fewer objects than this, none is like the others.
const FEW: usize = 16;
/// Of so many objects a sample is taken.
const SAMPLES: usize = 4;

/// All objects of one type, by name.
///
/// An object that was packed ([`World::pack`](crate::World::pack)) is there again as soon as it is asked for, and is equal to what it
/// was.
#[derive(Debug)]
pub struct Table<T> {
    slots: Ordered<Name, Slot<T>>,
    /// How many have been put in or unpacked since the table was last packed.
    unpacked: AtomicUsize,
    /// What those that are packed are held against.
    sample: Arc<Sample>,
    /// How many there were when it was taken.
    sampled: usize,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { slots: Ordered::default(), unpacked: AtomicUsize::default(), sample: Arc::default(), sampled: 0 }
    }
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        Self {
            slots: self.slots.clone(),
            unpacked: AtomicUsize::new(self.unpacked()),
            sample: self.sample.clone(),
            sampled: self.sampled,
        }
    }
}

impl<T> Table<T> {
    /// All names in order.
    pub fn names(&self) -> impl Iterator<Item = &Name> {
        self.slots.keys()
    }

    /// How many objects there are.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// How many have been put in or unpacked since the table was last packed.
    pub(crate) fn unpacked(&self) -> usize {
        self.unpacked.load(Ordering::Relaxed)
    }

    pub(crate) fn insert(&mut self, name: Name, object: Arc<T>) {
        *self.unpacked.get_mut() += 1;
        self.slots.insert(name, Slot { text: Text::Unmade, object: OnceLock::from(object) });
    }

    pub(crate) fn remove(&mut self, name: &Name) {
        self.slots.remove(name);
    }
}

impl<T: Stored> Table<T> {
    /// The object of this name.
    pub fn get(&self, name: &Name) -> Option<&Arc<T>> {
        self.read(self.slots.get(name)?)
    }

    /// All objects, in order of their names. It unpacks them all: what is decided often should ask for less.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<T>> {
        self.slots.values().filter_map(|slot| self.read(slot))
    }

    /// The objects of one namespace.
    pub fn within<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Arc<T>> {
        let from = self.slots.range(Name::new(namespace, "")..);
        let within = from.take_while(move |(name, _)| name.namespace == namespace);
        within.filter_map(|(_, slot)| self.read(slot))
    }

    /// The objects of these names that exist.
    pub fn pick<'a>(&'a self, names: Option<&'a Names>) -> impl Iterator<Item = &'a Arc<T>> {
        names.into_iter().flat_map(Names::iter).filter_map(|name| self.get(name))
    }

    fn read<'a>(&'a self, slot: &'a Slot<T>) -> Option<&'a Arc<T>> {
        if let Some(object) = slot.object.get() {
            return Some(object);
        }
        let Text::Made(text) = &slot.text else { return None };
        // It has been read back once before it was packed, so this does not fail.
        let object = Arc::new(serde_json::from_slice(&text.text()?).ok()?);
        self.unpacked.fetch_add(1, Ordering::Relaxed);
        Some(slot.object.get_or_init(|| object))
    }

    /// Keeps of each object nothing but its text.
    pub(crate) fn pack(&mut self) {
        if std::mem::take(self.unpacked.get_mut()) == 0 {
            return;
        }
        // Each object is held against a new sample so seldom that it costs next to nothing.
        if self.len() >= FEW.max(2 * self.sampled) {
            let some = self.slots.values().step_by(self.len() / SAMPLES).take(SAMPLES);
            self.sample = Arc::new(Sample::of(some.filter_map(Slot::text)));
            self.sampled = self.len();
        }
        let sample = &self.sample;
        self.slots.for_each(|slot| slot.pack(sample));
    }
}

/// Where an object lies: unpacked, packed, or both.
#[derive(Debug)]
struct Slot<T> {
    text: Text,
    object: OnceLock<Arc<T>>,
}

impl<T> Clone for Slot<T> {
    fn clone(&self) -> Self {
        Self { text: self.text.clone(), object: self.object.clone() }
    }
}

#[derive(Clone, Debug)]
enum Text {
    /// Nobody has packed it yet.
    Unmade,
    /// Read back, it is equal to the object.
    Made(Short),
    /// There is none that is.
    None,
}

impl<T: Stored> Slot<T> {
    fn text(&self) -> Option<Vec<u8>> {
        match &self.text {
            Text::Made(text) => text.text(),
            Text::Unmade | Text::None => serde_json::to_vec(self.object.get()?.as_ref()).ok(),
        }
    }

    fn pack(&mut self, sample: &Arc<Sample>) {
        match &self.text {
            Text::Unmade => {
                let text = self.object.get().and_then(|object| text_of(object.as_ref()));
                self.text = text.and_then(|text| Short::new(&text, sample)).map_or(Text::None, Text::Made);
            }
            Text::Made(text) if !text.is_against(sample) => {
                if let Some(text) = text.text().and_then(|text| Short::new(&text, sample)) {
                    self.text = Text::Made(text);
                }
            }
            Text::Made(_) | Text::None => {}
        }
        if matches!(self.text, Text::Made(_)) {
            self.object = OnceLock::new();
        }
    }
}

/// An object as text. `None` when what is read from it is not the object to the last field: then it has to be kept as it is.
pub(crate) fn text_of<T: Stored>(object: &T) -> Option<Box<[u8]>> {
    let text = serde_json::to_vec(object).ok()?;
    let again: T = serde_json::from_slice(&text).ok()?;
    (again == *object).then(|| text.into())
}

/// Names in order. Nearly always it is one, and a tree for one takes half a KiB.
#[derive(Clone, Debug)]
pub enum Names {
    /// One.
    One(Name),
    /// None, or more than one.
    Many(BTreeSet<Name>),
}

impl Default for Names {
    fn default() -> Self {
        Self::Many(BTreeSet::new())
    }
}

impl Names {
    /// Each, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Name> {
        let (one, many) = match self {
            Self::One(name) => (Some(name), None),
            Self::Many(names) => (None, Some(names)),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }

    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::One(_) => 1,
            Self::Many(names) => names.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds one.
    pub fn insert(&mut self, name: Name) {
        match self {
            Self::One(one) if *one == name => {}
            Self::One(one) => *self = Self::Many(BTreeSet::from([std::mem::take(one), name])),
            Self::Many(names) if names.is_empty() => *self = Self::One(name),
            Self::Many(names) => {
                names.insert(name);
            }
        }
    }

    /// Takes one out.
    pub fn remove(&mut self, name: &Name) {
        match self {
            Self::One(one) if one == name => *self = Self::default(),
            Self::One(_) => {}
            Self::Many(names) => {
                names.remove(name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use godwit_api::VirtualMachineInstance;

    fn name(text: &str) -> Name {
        Name::new("ns", text)
    }

    #[test]
    fn what_was_packed_is_read_as_it_was() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "labels": {}, "creationTimestamp": "2026-11-22T10:00:00Z"},
            "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "1000m"}}}], "tolerations": []},
        }))
        .unwrap();
        let mut table = Table::default();
        table.insert(name("p"), Arc::new(pod.clone()));
        table.pack();
        assert!(table.slots.get(&name("p")).unwrap().object.get().is_none());
        assert_eq!(table.unpacked(), 0);
        assert_eq!(**table.get(&name("p")).unwrap(), pod);
        assert_eq!((table.unpacked(), table.iter().count(), table.within("ns").count()), (1, 1, 1));
        assert_eq!((table.unpacked(), table.within("other").count()), (1, 0));
        let newer = Pod { metadata: Default::default(), ..pod };
        table.insert(name("p"), Arc::new(newer.clone()));
        table.pack();
        assert_eq!(**table.clone().get(&name("p")).unwrap(), newer, "the text of what it was is gone");
    }

    #[test]
    fn many_that_are_alike_are_held_short_however_many_come() {
        let pod = |number: usize| -> Pod {
            let containers: Vec<_> =
                (0..8).map(|of| json!({"name": format!("c{of}"), "image": "registry.local/some/image:1"})).collect();
            let metadata =
                json!({"name": format!("p{number:03}"), "namespace": "ns", "uid": format!("{}", number * 7919)});
            serde_json::from_value(json!({"metadata": metadata, "spec": {"containers": containers}})).unwrap()
        };
        let mut table = Table::default();
        for number in 0..200 {
            table.insert(name(&format!("p{number:03}")), Arc::new(pod(number)));
            table.pack();
        }
        let plain = serde_json::to_vec(&pod(0)).unwrap().len();
        for (number, slot) in table.slots.values().enumerate() {
            assert!(slot.object.get().is_none());
            let Text::Made(text) = &slot.text else { panic!("{number} is not packed") };
            assert!(text.is_against(&table.sample) && text.len() < plain / 4, "{} of {plain}", text.len());
        }
        assert!(table.iter().enumerate().all(|(number, held)| **held == pod(number)));
        assert_eq!((table.sampled, table.unpacked()), (128, 200));
    }

    #[test]
    fn what_text_does_not_hold_is_not_packed() {
        // A part of a second is left out in writing.
        let mut vmi = VirtualMachineInstance::default();
        let time = jiff::Timestamp::from_millisecond(1_700_000_000_123).unwrap();
        vmi.metadata.creation_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(time));
        assert!(text_of(&vmi).is_none());
        let mut table = Table::default();
        table.insert(name("v"), Arc::new(vmi.clone()));
        table.pack();
        assert_eq!(**table.get(&name("v")).unwrap(), vmi);
        assert_eq!(table.unpacked(), 0, "it is not tried again and again");
    }

    proptest! {
        #[test]
        fn names_are_a_set(steps in proptest::collection::vec((0_u8..4, any::<bool>()), 0..30)) {
            let (mut names, mut expected) = (Names::default(), BTreeSet::new());
            for (number, remove) in steps {
                let one = name(&number.to_string());
                if remove {
                    names.remove(&one);
                    expected.remove(&one);
                } else {
                    names.insert(one.clone());
                    expected.insert(one);
                }
                prop_assert!(names.iter().eq(expected.iter()));
                prop_assert_eq!((names.len(), names.is_empty()), (expected.len(), expected.is_empty()));
            }
        }
    }
}
