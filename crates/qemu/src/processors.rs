//! Which processors a QEMU on this machine can give its guests, as it says itself.
//!
//! A guest that is to move needs the same processor at both ends. `host` is another one on each kind of machine, so what stands for it
//! ([`Processors::host_model`]) is spelled out once, where the guest starts: a named model and the features that this machine has
//! beyond it. Every QEMU that has these builds the same.

use crate::accelerator::Accelerator;
use crate::process::Process;
use crate::qmp::commands::{self, CpuModel};
use crate::qmp::{self, Qmp};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long QEMU may take from its start to its monitor's answer.
const START_LIMIT: Duration = Duration::from_secs(20);

/// Why QEMU could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It did not start.
    #[error("{program} cannot be started: {error}")]
    Program {
        /// The program.
        program: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// It did not answer.
    #[error("QEMU does not say which processors it can give: {0}")]
    Qmp(#[from] qmp::Error),
}

/// What a QEMU on this machine can give its guests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Processors {
    /// The vendor that guests see: `GenuineIntel`, `AuthenticAMD`.
    pub vendor: String,
    /// All features that can be had and that can be sent to another machine.
    pub features: BTreeSet<String>,
    /// The models that can be had whole, with the features of each.
    pub models: BTreeMap<String, BTreeSet<String>>,
    /// The machine types, with their versions.
    pub machine_types: BTreeSet<String>,
}

/// A processor that is the same wherever QEMU builds it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostModel {
    /// A named model.
    pub model: String,
    /// What is added to it.
    pub features: BTreeSet<String>,
}

/// Asks a QEMU with this accelerator; it runs no guest.
///
/// # Errors
/// When it cannot be started or does not answer.
pub async fn ask(program: &Path, accelerator: Accelerator) -> Result<Processors, Error> {
    let failed = |error| Error::Program { program: program.to_owned(), error };
    let monitor = Monitor::new();
    let text = monitor.path.to_string_lossy().into_owned();
    let arguments: Vec<String> = ["-machine", "none", "-accel", accelerator.as_str(), "-nodefaults", "-no-user-config"]
        .into_iter()
        .chain(["-display", "none", "-S", "-chardev"])
        .map(str::to_owned)
        .chain([format!("socket,id=monitor,path={text},server=on,wait=off")])
        .chain(["-mon", "chardev=monitor,mode=control"].map(str::to_owned))
        .collect();
    let process = Process::spawn(program, &arguments, None).map_err(failed)?;
    let connected = tokio::select! {
        connected = Qmp::connect(&monitor.path, START_LIMIT) => connected,
        ended = process.wait() => return Err(failed(std::io::Error::other(ended.to_string()))),
    };
    let connected = connected?;
    // It has served; whoever is killed meanwhile leaves nothing behind.
    drop(monitor);
    let answer = read(&connected, accelerator).await;
    process.kill().await;
    Ok(answer?)
}

async fn read(qmp: &Qmp, accelerator: Accelerator) -> Result<Processors, qmp::Error> {
    let own = if accelerator == Accelerator::Kvm { "host" } else { "max" };
    let whole = expand(qmp, own, "full").await?;
    let vendor = whole.props.get("vendor").and_then(|vendor| vendor.as_str()).unwrap_or_default().to_owned();
    let mut found =
        Processors { vendor, features: features(&expand(qmp, own, "static").await?), ..Processors::default() };
    if accelerator == Accelerator::Tcg {
        // 57-bit addresses only make every page walk of the translator longer.
        found.features.remove("la57");
    }
    for definition in qmp.execute(&commands::QueryCpuDefinitions {}).await? {
        let whole = definition.unavailable_features.is_some_and(|missing| missing.is_empty());
        if whole && !["host", "max", "base"].contains(&definition.name.as_str()) {
            let model = expand(qmp, &definition.name, "static").await?;
            found.models.insert(definition.name, features(&model));
        }
    }
    let is_pc = |name: &String| name.starts_with("pc-") || ["pc", "q35"].contains(&name.as_str());
    for machine in qmp.execute(&commands::QueryMachines {}).await? {
        found.machine_types.extend([Some(machine.name), machine.alias].into_iter().flatten().filter(is_pc));
    }
    Ok(found)
}

async fn expand(qmp: &Qmp, name: &str, kind: &'static str) -> Result<CpuModel, qmp::Error> {
    let model = CpuModel { name: name.to_owned(), props: BTreeMap::new() };
    Ok(qmp.execute(&commands::QueryCpuModelExpansion { r#type: kind, model }).await?.model)
}

/// The features that are on in a static expansion, which has features only.
fn features(model: &CpuModel) -> BTreeSet<String> {
    let on = model.props.iter().filter(|(_, value)| **value == serde_json::Value::Bool(true));
    on.map(|(name, _)| name.clone()).collect()
}

impl Processors {
    /// What stands for this machine's own processor: the named model of its vendor that has most of its features, and the rest of
    /// them. None where QEMU has no such model.
    pub fn host_model(&self) -> Option<HostModel> {
        let fits =
            |name: &str| !is_version(name) && is_amd(name).is_none_or(|amd| amd == (self.vendor == "AuthenticAMD"));
        let models = self.models.iter().filter(|(name, has)| fits(name) && has.is_subset(&self.features));
        let (model, has) = models.max_by_key(|(name, has)| (has.len(), *name))?;
        Some(HostModel { model: model.clone(), features: self.features.difference(has).cloned().collect() })
    }
}

/// Whether a name is that of a model in one of its versions (`Nehalem-v2`).
fn is_version(name: &str) -> bool {
    name.rsplit_once("-v")
        .is_some_and(|(_, version)| !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether a model is one of AMD's, or of nobody's in particular (QEMU's own).
fn is_amd(name: &str) -> Option<bool> {
    let begins = |names: &[&str]| names.iter().any(|start| name.starts_with(start));
    if begins(&["qemu", "kvm", "486", "base"]) {
        return None;
    }
    Some(begins(&["EPYC", "Opteron", "Dhyana", "athlon", "phenom"]))
}

/// A monitor's socket, removed afterwards.
struct Monitor {
    path: PathBuf,
}

impl Monitor {
    fn new() -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("godwit-processors-{}-{}.sock", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Monitor { path: std::env::temp_dir().join(name) }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::Prelaunch;
    use crate::machine::{Boot, Machine};

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn the_host_model_is_of_its_vendor_and_never_promises_more_than_there_is() {
        let models = [
            ("EPYC", set(&["a", "b"])),
            ("Nehalem", set(&["a", "b", "c"])),
            ("Nehalem-v2", set(&["a", "b", "c", "d"])),
            ("Haswell", set(&["a", "x"])),
            ("qemu64", set(&["a"])),
        ];
        let models = BTreeMap::from(models.map(|(name, has)| (name.to_owned(), has)));
        let features = set(&["a", "b", "c", "d"]);
        let intel = Processors { vendor: "GenuineIntel".into(), features, models, ..Processors::default() };
        assert_eq!(intel.host_model(), Some(HostModel { model: "Nehalem".into(), features: set(&["d"]) }));
        let amd = Processors { vendor: "AuthenticAMD".into(), ..intel.clone() };
        assert_eq!(amd.host_model(), Some(HostModel { model: "EPYC".into(), features: set(&["c", "d"]) }));
        let bare = Processors { features: set(&["a"]), ..intel };
        assert_eq!(bare.host_model().map(|host| host.model).as_deref(), Some("qemu64"));
        assert_eq!(Processors::default().host_model(), None);
    }

    #[tokio::test]
    async fn what_qemu_says_it_can_give_it_gives() {
        let qemu = crate::process::find_qemu().expect("QEMU; `make deps` installs it");
        let found = ask(&qemu, Accelerator::Tcg).await.unwrap();
        assert!(found.models.contains_key("Westmere") && found.features.contains("avx2"), "{found:?}");
        assert!(!found.models.contains_key("max") && !found.models.contains_key("Skylake-Server"));
        assert!(found.machine_types.contains("q35") && found.machine_types.contains("pc-q35-7.2"), "{found:?}");
        let host = found.host_model().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut machine = Machine::new(folder.path().join("qmp"), 16, Boot::Firmware);
        machine.cpu.model = Some(host.model);
        machine.cpu.features = host.features.into_iter().map(|feature| (feature, true)).collect();
        machine.cpu.enforce = true;
        let built = Prelaunch::launch(&qemu, &machine).await.expect("all of it can be had");
        built.qemu().quit().await;
        // What cannot be had whole is refused rather than built without.
        machine.cpu.model = Some("Skylake-Server".into());
        machine.cpu.features.clear();
        let refused = Prelaunch::launch(&qemu, &machine).await.unwrap_err();
        assert_eq!(refused.cause(), crate::failure::Cause::RefusedCpu, "{refused}");
    }
}
