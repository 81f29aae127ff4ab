//! `godwit demo`: a guest is booted, pinged from outside, moved between two nodes as KubeVirt's documentation asks for
//! it, and questioned before and after. Succeeds only if the guest ran on without a restart.

mod guest;
mod journey;
mod report;

use crate::layout::Layout;
use crate::{Error, Options, admin_client, down, offers, up};
pub use guest::{Facts, Guest, build_image};
use journey::Journey;
pub use journey::apply;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Address of the demo's guest, as its manifest gives it.
const GUEST_ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(192, 168, 123, 62);
/// Address of the outside client on the guest's segment.
const CLIENT_SEGMENT_ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(192, 168, 123, 1);
/// 100 pings a second.
const PING_EVERY: Duration = Duration::from_millis(10);
const NETWORK: &str = include_str!("../../../../docs/examples/lab-network.yaml");
const VMI: &str = include_str!("../../../../docs/examples/vmi.yaml");
const MIGRATION: &str = include_str!("../../../../docs/examples/migration-job.yaml");

/// What the demo works with.
#[derive(Debug, Clone)]
pub struct DemoOptions {
    /// Folder with `vmlinuz` and `initrd` (made by `make guest`).
    pub guest: PathBuf,
    /// Leave the cluster up.
    pub keep: bool,
    /// Where to keep the cluster; `None`: a scratch folder that goes away with it.
    pub data_dir: Option<PathBuf>,
}

/// Runs the demo and leaves nothing behind, unless told to.
///
/// # Errors
/// Whatever kept the guest from moving, and [`Error::Demo`] when it did not run on as it should.
pub async fn demo(options: &DemoOptions) -> Result<(), Error> {
    let scratch = match &options.data_dir {
        Some(_) => None,
        None => Some(
            tempfile::Builder::new()
                .prefix("godwit-demo-")
                .tempdir_in("/var/tmp")
                .map_err(|source| Error::io("make a scratch folder in", Path::new("/var/tmp"), source))?,
        ),
    };
    let data_dir = match (&options.data_dir, &scratch) {
        (Some(folder), _) => folder.clone(),
        (None, Some(scratch)) => scratch.path().to_owned(),
        (None, None) => return Err(Error::Usage("no data directory".to_owned())),
    };
    let outcome = tokio::select! {
        outcome = run(options, &data_dir) => outcome,
        _ = tokio::signal::ctrl_c() => Err(Error::Demo("interrupted".to_owned())),
    };
    if options.keep {
        let layout = Layout::open(&data_dir)?;
        if let Some(scratch) = scratch {
            let _ = scratch.keep();
        }
        println!("\nThe cluster stays up. To use it:\n  export KUBECONFIG={}", layout.kubeconfig().display());
        println!("To end it:\n  godwit down --data-dir {}", data_dir.display());
    } else {
        let ended = down(&data_dir);
        outcome.and(ended.map(drop))?;
        return Ok(());
    }
    outcome
}

async fn run(options: &DemoOptions, data_dir: &Path) -> Result<(), Error> {
    let cluster =
        up(&Options { data_dir: data_dir.to_owned(), nodes: 3, api_port: Some(0), ..Options::default() }).await?;
    println!("cluster    three nodes ready after {:.2} s", cluster.took.as_secs_f64());
    for offer in offers(&cluster).await? {
        println!("runs with  {offer}");
    }
    guest::build_image(&cluster.layout, &options.guest)?;
    let client = admin_client(&cluster.layout).await?;
    journey::apply(&client, NETWORK).await?;
    let guest = Guest::at(&cluster.cluster, GUEST_ADDRESS, CLIENT_SEGMENT_ADDRESS).await?;
    journey::apply(&client, VMI).await?;
    let started = std::time::Instant::now();
    let before = guest.wait_for_facts(&client, "rhel8-server-nfs", Duration::from_secs(120)).await?;
    println!(
        "guest      {} answers after {:.1} s, boot token {}",
        before.hostname,
        started.elapsed().as_secs_f64(),
        before.token
    );
    let pinger = guest.start_pinging(PING_EVERY)?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = guest.facts().await?;
    let journey = Journey::watch(client.clone(), "rhel8-server-nfs", "migration-job").await?;
    println!("migration  applying the manifest of the lab (100 pings a second are on their way)");
    journey::apply(&client, MIGRATION).await?;
    let travelled = journey.follow(Duration::from_secs(180)).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let after = guest.facts().await;
    let pings = pinger.stop();
    report::print_and_judge(&travelled, &before, after.as_ref().ok(), &pings)
}
