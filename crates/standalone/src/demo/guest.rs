//! The guest as the outside client sees it: its image, its sign of life, its answers to pings.

use crate::layout::{Cluster, Layout};
use crate::{Error, fabric};
use godwit_network::Namespace;
use godwit_network::pinger::Pinger;
use kube::Api;
use kube::api::DynamicObject;
use serde::Deserialize;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

/// Reference of the demo guest's image.
const IMAGE: &str = "godwit.local/demo-guest:latest";

/// What the guest says of itself (`guests/init`, port 80).
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Facts {
    /// Host name.
    pub hostname: String,
    /// Made at boot: another token is another life.
    pub token: String,
    /// Beats since boot.
    pub beat: u64,
    /// Guest's own clock since boot.
    pub uptime_milliseconds: u64,
    /// Over memory that is never rewritten.
    pub checksum: String,
    /// Pages rewritten and verified so far.
    pub verified_pages: u64,
    /// Pages found damaged.
    pub corrupt_pages: u64,
}

/// The guest, reached from the outside client's namespace.
#[derive(Clone)]
pub struct Guest {
    client: Namespace,
    address: Ipv4Addr,
}

/// Puts the guest's kernel and initramfs into the cluster's image store.
pub fn build_image(layout: &Layout, folder: &Path) -> Result<(), Error> {
    let files = ["vmlinuz", "initrd"].map(|name| godwit_images::FileEntry {
        source: folder.join(name),
        destination: format!("/boot/{name}"),
        mode: 0o644,
    });
    for file in &files {
        if !file.source.exists() {
            return Err(Error::Usage(format!("{} is missing: run `make guest` first", file.source.display())));
        }
    }
    let failed = |error: godwit_images::Error| Error::Image(error.to_string());
    let store = godwit_images::Store::open(layout.images()).map_err(failed)?;
    store.build(IMAGE, &files).map_err(failed)?;
    Ok(())
}

impl Guest {
    /// Puts the outside client onto the guest's segment.
    pub async fn at(cluster: &Cluster, address: Ipv4Addr, own: Ipv4Addr) -> Result<Self, Error> {
        let client = Namespace::open(&fabric::client(cluster))?;
        let links = client.links()?;
        godwit_network::segment::ensure(&links, "br-lab", fabric::UPLINK).await?;
        let own = IpAddr::V4(own);
        if !links.addresses("br-lab").await?.iter().any(|(have, _)| *have == own) {
            links.add_address("br-lab", own, 24).await?;
        }
        Ok(Self { client, address })
    }

    /// Asks the guest, with a few tries: a TCP connection may meet the switchover.
    pub async fn facts(&self) -> Result<Facts, Error> {
        let mut last = String::new();
        for _ in 0..5 {
            match self.ask().await {
                Ok(facts) => return Ok(facts),
                Err(error) => last = error,
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Err(Error::Demo(format!("the guest at {} does not answer: {last}", self.address)))
    }

    async fn ask(&self) -> Result<Facts, String> {
        let (namespace, address) = (self.client.clone(), SocketAddr::from((self.address, 80)));
        let asked = tokio::task::spawn_blocking(move || {
            let mut stream = namespace.connect(address, Duration::from_secs(2)).map_err(|e| e.to_string())?;
            stream.set_read_timeout(Some(Duration::from_secs(3))).map_err(|e| e.to_string())?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n").map_err(|e| e.to_string())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).map_err(|e| e.to_string())?;
            let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
            serde_json::from_str(body).map_err(|e| format!("{e} in {answer:?}"))
        });
        asked.await.map_err(|e| e.to_string())?
    }

    /// Waits until the guest answers; fails at once when its VMI ends, and says what the VMI waits for when time is up.
    pub async fn wait_for_facts(&self, client: &kube::Client, vmi: &str, within: Duration) -> Result<Facts, Error> {
        let api: Api<DynamicObject> =
            Api::default_namespaced_with(client.clone(), &crate::status::kubevirt("VirtualMachineInstance"));
        let deadline = Instant::now() + within;
        loop {
            let object = api.get(vmi).await?;
            let phase = crate::status::text(&object, "/status/phase");
            if phase == "Running"
                && let Ok(facts) = self.ask().await
            {
                return Ok(facts);
            }
            if phase == "Failed" || phase == "Succeeded" || Instant::now() > deadline {
                let status = object.data.get("status").map(ToString::to_string).unwrap_or_default();
                return Err(Error::Demo(format!("the guest did not boot; its VMI is {phase:?}: {status}")));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Starts pinging.
    pub fn start_pinging(&self, every: Duration) -> Result<Pinger, Error> {
        Ok(Pinger::start(&self.client, self.address, every)?)
    }
}
