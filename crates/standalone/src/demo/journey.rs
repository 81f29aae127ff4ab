//! One migration as a client sees it: manifests applied, phases seen in passing, the progress bar.

use crate::Error;
use crate::status::{kubevirt, text};
use futures::{Stream, StreamExt};
use indicatif::{ProgressBar, ProgressStyle};
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, core::TypeMeta};
use std::pin::Pin;
use std::time::{Duration, Instant};

/// Applies one manifest as `kubectl apply --server-side` would.
pub async fn apply(client: &Client, manifest: &str) -> Result<(), Error> {
    let object: DynamicObject =
        serde_saphyr::from_str(manifest).map_err(|e| Error::Usage(format!("bad manifest: {e}")))?;
    let types = object.types.clone().unwrap_or(TypeMeta { api_version: String::new(), kind: String::new() });
    let gvk = GroupVersionKind::try_from(&types).map_err(|e| Error::Usage(format!("bad manifest: {e}")))?;
    let mut resource = ApiResource::from_gvk(&gvk);
    // The one plural of ours that English would not give.
    if gvk.kind == "NetworkAttachmentDefinition" {
        resource.plural = "network-attachment-definitions".to_owned();
    }
    let api: Api<DynamicObject> = Api::default_namespaced_with(client.clone(), &resource);
    let name = object.metadata.name.clone().unwrap_or_default();
    // A CRD that was made a moment ago may not be served yet.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match api.patch(&name, &PatchParams::apply("godwit-demo").force(), &Patch::Apply(&object)).await {
            Ok(_) => return Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// A migration that is over.
#[derive(Debug, Clone)]
pub struct Travelled {
    /// Node before.
    pub from: String,
    /// Node after.
    pub to: String,
    /// Phases in the order seen, with the time since the manifest was applied.
    pub phases: Vec<(String, Duration)>,
    /// The VMI's `status.migrationState` at the end.
    pub state: serde_json::Value,
    /// Addresses before and after.
    pub addresses: (String, String),
}

type Events = Pin<Box<dyn Stream<Item = Result<Event<DynamicObject>, watcher::Error>> + Send>>;

/// A migration that is being watched.
pub struct Journey {
    vmi: Events,
    migration: Events,
    from: String,
    address: String,
    started: Instant,
}

impl Journey {
    /// Begins to watch the VMI and the migration, before the latter exists.
    pub async fn watch(client: Client, vmi: &str, migration: &str) -> Result<Self, Error> {
        let vmis: Api<DynamicObject> =
            Api::default_namespaced_with(client.clone(), &kubevirt("VirtualMachineInstance"));
        let migrations: Api<DynamicObject> =
            Api::default_namespaced_with(client, &kubevirt("VirtualMachineInstanceMigration"));
        let before = vmis.get(vmi).await?;
        let named = |name: &str| watcher::Config::default().fields(&format!("metadata.name={name}"));
        Ok(Self {
            vmi: Box::pin(kube::runtime::watcher(vmis, named(vmi))),
            migration: Box::pin(kube::runtime::watcher(migrations, named(migration))),
            from: text(&before, "/status/nodeName"),
            address: text(&before, "/status/interfaces/0/ipAddress"),
            started: Instant::now(),
        })
    }

    /// Follows the migration to its end, with a progress bar.
    pub async fn follow(mut self, within: Duration) -> Result<Travelled, Error> {
        self.started = Instant::now();
        let bar = ProgressBar::new(100);
        bar.set_style(
            ProgressStyle::with_template("           {bar:40} {pos:>3}%  {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        let deadline = tokio::time::Instant::now() + within;
        let mut phases: Vec<(String, Duration)> = Vec::new();
        let mut last = None;
        loop {
            let (is_vmi, event) = tokio::select! {
                event = self.vmi.next() => (true, event),
                event = self.migration.next() => (false, event),
                () = tokio::time::sleep_until(deadline) => {
                    let seen: Vec<_> = phases.iter().map(|(phase, _)| phase.as_str()).collect();
                    return Err(Error::Demo(format!("the migration took longer than {} s; phases seen: {}", within.as_secs(), seen.join(" → "))));
                }
            };
            let object = match event {
                Some(Ok(Event::Apply(object) | Event::InitApply(object))) => object,
                Some(_) => continue,
                None => return Err(Error::Demo("a watch ended".to_owned())),
            };
            if is_vmi {
                show(&bar, &object);
                last = Some(object);
            } else {
                let phase = text(&object, "/status/phase");
                if !phase.is_empty() && phases.last().is_none_or(|(seen, _)| *seen != phase) {
                    bar.println(format!(
                        "           {:<16} {:>6.0} ms",
                        phase,
                        self.started.elapsed().as_secs_f64() * 1e3
                    ));
                    phases.push((phase.clone(), self.started.elapsed()));
                }
                if phase == "Failed" {
                    return Err(Error::Demo(format!(
                        "the migration failed: {}",
                        object.data.get("status").cloned().unwrap_or_default()
                    )));
                }
            }
            let over = phases.last().is_some_and(|(phase, _)| phase == "Succeeded");
            if let Some(vmi) = last
                .as_ref()
                .filter(|vmi| over && vmi.data.pointer("/status/migrationState/completed") == Some(&true.into()))
            {
                bar.finish_and_clear();
                return Ok(Travelled {
                    from: self.from,
                    to: text(vmi, "/status/nodeName"),
                    phases,
                    state: vmi.data.pointer("/status/migrationState").cloned().unwrap_or_default(),
                    addresses: (self.address, text(vmi, "/status/interfaces/0/ipAddress")),
                });
            }
        }
    }
}

fn show(bar: &ProgressBar, vmi: &DynamicObject) {
    let number = |name: &str| {
        vmi.data.pointer(&format!("/status/migrationState/progress/{name}")).and_then(serde_json::Value::as_u64)
    };
    if let Some(percent) = number("percent") {
        bar.set_position(percent);
    }
    if let (Some(done), Some(rate)) = (number("bytesProcessed"), number("bytesPerSecond")) {
        const MIB: f64 = 1024.0 * 1024.0;
        let iteration = number("iteration").unwrap_or_default();
        bar.set_message(format!("{:.0} MiB sent, {:.0} MiB/s, pass {iteration}", done as f64 / MIB, rate as f64 / MIB));
    }
}
