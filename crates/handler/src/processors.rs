//! Which processors guests can have on this node, as labels of the Node. Their names are KubeVirt's, so that what selects nodes by them
//! works here too.

use std::collections::BTreeMap;

use godwit_api::names;
use godwit_launcher::Processors;
use godwit_launcher::rpc::GuestCpu;

/// Prefixes of labels that say what the node's QEMU can give; what it cannot give any more goes.
const PREFIXES: [&str; 7] = [
    names::LABEL_PREFIX_CPU_MODEL,
    names::LABEL_PREFIX_CPU_MODEL_MIGRATION,
    names::LABEL_PREFIX_CPU_FEATURE,
    names::LABEL_PREFIX_CPU_VENDOR,
    names::LABEL_PREFIX_HOST_MODEL_CPU,
    names::LABEL_PREFIX_HOST_MODEL_REQUIRED_FEATURES,
    names::LABEL_PREFIX_MACHINE_TYPE,
];

/// What stands for the node's own processor, as guests are given it.
pub(crate) fn host_cpu(processors: &Processors) -> Option<GuestCpu> {
    let host = processors.host_model()?;
    Some(GuestCpu { model: host.model, features: host.features.into_iter().collect() })
}

/// The labels for what QEMU can give.
pub(crate) fn labels(processors: &Processors) -> impl Iterator<Item = String> {
    let label = |prefix: &str, name: &str| format!("{prefix}{name}");
    let models = processors.models.keys().flat_map(move |model| {
        [names::LABEL_PREFIX_CPU_MODEL, names::LABEL_PREFIX_CPU_MODEL_MIGRATION].map(|prefix| label(prefix, model))
    });
    let features = processors.features.iter().map(move |name| label(names::LABEL_PREFIX_CPU_FEATURE, name));
    let machines = processors.machine_types.iter().map(move |name| label(names::LABEL_PREFIX_MACHINE_TYPE, name));
    let host = processors.host_model().into_iter().flat_map(move |host| {
        let required = host.features.into_iter();
        let required = required.map(move |name| label(names::LABEL_PREFIX_HOST_MODEL_REQUIRED_FEATURES, &name));
        required.chain([label(names::LABEL_PREFIX_HOST_MODEL_CPU, &host.model)])
    });
    let vendor = match processors.vendor.as_str() {
        "GenuineIntel" => Some("Intel"),
        "AuthenticAMD" => Some("AMD"),
        _ => None,
    };
    let vendor = vendor.map(|vendor| label(names::LABEL_PREFIX_CPU_VENDOR, vendor));
    models.chain(features).chain(machines).chain(host).chain(vendor).filter(|label| is_label(label))
}

/// Whether a name can be a label's: QEMU may call a feature as it likes.
fn is_label(label: &str) -> bool {
    let name = label.rsplit('/').next().unwrap_or_default();
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    name.len() <= 63
        && edge(name.chars().next())
        && edge(name.chars().next_back())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

/// How many features each model has: which of the models that all nodes have is the greatest.
pub(crate) fn ranks(processors: &Processors) -> BTreeMap<&str, usize> {
    processors.models.iter().map(|(name, features)| (name.as_str(), features.len())).collect()
}

/// The labels of the node that speak of what its QEMU can give, and are not to be there.
pub(crate) fn stale<'a>(has: &'a BTreeMap<String, String>, wanted: &[String]) -> impl Iterator<Item = &'a String> {
    let ours = |label: &&String| PREFIXES.iter().any(|prefix| label.starts_with(prefix));
    has.keys().filter(ours).filter(move |label| !wanted.contains(label))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn what_qemu_can_give_is_said_with_kubevirts_labels() {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let processors = Processors {
            vendor: "GenuineIntel".into(),
            features: set(&["sse4.1", "avx2", "-bad"]),
            models: BTreeMap::from([("Nehalem".into(), set(&["sse4.1"]))]),
            machine_types: set(&["pc-q35-7.2", "q35"]),
        };
        let labels: Vec<String> = labels(&processors).collect();
        let wanted = [
            "cpu-model.node.kubevirt.io/Nehalem",
            "cpu-model-migration.node.kubevirt.io/Nehalem",
            "cpu-feature.node.kubevirt.io/avx2",
            "cpu-feature.node.kubevirt.io/sse4.1",
            "machine-type.node.kubevirt.io/pc-q35-7.2",
            "machine-type.node.kubevirt.io/q35",
            "host-model-required-features.node.kubevirt.io/avx2",
            "host-model-cpu.node.kubevirt.io/Nehalem",
            "cpu-vendor.node.kubevirt.io/Intel",
        ];
        assert_eq!(labels, wanted);
        let has =
            ["cpu-model.node.kubevirt.io/Nehalem", "cpu-model.node.kubevirt.io/Haswell", "kubernetes.io/hostname"];
        let has = BTreeMap::from(has.map(|label| (label.to_owned(), "true".to_owned())));
        assert_eq!(stale(&has, &labels).collect::<Vec<_>>(), ["cpu-model.node.kubevirt.io/Haswell"]);
        assert_eq!(ranks(&processors), BTreeMap::from([("Nehalem", 1)]));
    }
}
