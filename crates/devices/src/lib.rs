//! Device plugin: offers devices of a node to its pods through kubelet, so that launcher pods need no privilege
//!
//! One plugin a resource (`devices.kubevirt.io/kvm`, `…/tun`, `…/vhost-net`: KubeVirt's names), each with a socket of its own in
//! kubelet's folder. It announces itself to kubelet and is asked by it from then on: which devices there are (again on each change), and
//! how a container gets one. A kubelet that starts anew has forgotten its plugins and removed their sockets; this is noticed, and the
//! plugin begins again.

mod plugin;
pub mod wire;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Endpoint, Server};
use tonic_prost::ProstCodec;

use plugin::Plugin;
use wire::{Empty, Options, REGISTER, RegisterRequest, VERSION};

/// Where kubelet keeps the sockets of plugins.
pub const FOLDER: &str = "/var/lib/kubelet/device-plugins";
/// Kubelet's own socket in it.
const KUBELET: &str = "kubelet.sock";
/// Between two looks at the device, at kubelet's socket and at our own.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long kubelet may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// A device of the node that pods can ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// What pods ask for.
    pub name: &'static str,
    /// The device's file, on the node and in containers.
    pub device: PathBuf,
    /// What containers may do with it: `r`, `w`, `m`.
    pub permissions: &'static str,
    /// How many pods can have it at once.
    pub units: u32,
}

impl Resource {
    /// What launcher pods need of a node.
    #[must_use]
    pub fn all() -> [Resource; 3] {
        let resource = |name, device: &str| Resource { name, device: device.into(), permissions: "rw", units: 1000 };
        [
            resource("devices.kubevirt.io/kvm", "/dev/kvm"),
            resource("devices.kubevirt.io/tun", "/dev/net/tun"),
            resource("devices.kubevirt.io/vhost-net", "/dev/vhost-net"),
        ]
    }

    fn short_name(&self) -> &str {
        self.name.rsplit('/').next().unwrap_or(self.name)
    }

    fn has(&self, id: &str) -> bool {
        let number = id.strip_prefix(self.short_name()).and_then(|number| number.parse::<u32>().ok());
        number.is_some_and(|number| number < self.units)
    }

    /// The name of its plugin's socket.
    fn socket(&self) -> String {
        format!("kubevirt-{}.sock", self.short_name())
    }
}

/// Why a plugin begins again.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{what} {path}: {error}")]
    Io { what: &'static str, path: PathBuf, error: std::io::Error },
    #[error("kubelet does not take it: {0}")]
    Refused(#[from] tonic::Status),
    #[error("kubelet cannot be reached: {0}")]
    Unreachable(#[from] tonic::transport::Error),
    #[error("kubelet does not answer")]
    Silent,
}

/// Offers a resource for ever: as long as its device is there and `of_use` says so. `folder` is [`FOLDER`] on a real node.
pub async fn run(resource: Resource, folder: PathBuf, of_use: watch::Receiver<bool>) {
    let resource = Arc::new(resource);
    let mut said = None;
    loop {
        if let Err(error) = offer(&resource, &folder, &of_use).await {
            let text = error.to_string();
            // Every second is too often to say the same.
            if said.as_ref() != Some(&text) {
                tracing::warn!(resource = resource.name, error = text, "device plugin not registered; trying again");
                said = Some(text);
            }
        } else {
            said = None;
            tracing::info!(resource = resource.name, "kubelet has started anew");
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Offers it to the kubelet that runs now; returns when there is another.
async fn offer(resource: &Arc<Resource>, folder: &Path, of_use: &watch::Receiver<bool>) -> Result<(), Error> {
    let kubelet = folder.join(KUBELET);
    let io = |what, path: &Path| {
        let path = path.to_owned();
        move |error| Error::Io { what, path, error }
    };
    // The one that it will be announced to. If it goes meanwhile, that is seen as well.
    let known = identity(&kubelet).map_err(io("looking for kubelet at", &kubelet))?;
    let socket = folder.join(resource.socket());
    match std::fs::remove_file(&socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io("removing", &socket)(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&socket).map_err(io("listening on", &socket))?;
    let own = identity(&socket).map_err(io("looking at", &socket))?;

    let look = || resource.device.exists() && *of_use.borrow();
    let (tell, available) = watch::channel(look());
    let plugin = Plugin::new(resource.clone(), available);
    let served = Server::builder().add_service(plugin).serve_with_incoming(UnixListenerStream::new(listener));
    let watched = async {
        announce(resource, &kubelet).await?;
        tracing::info!(resource = resource.name, available = *tell.borrow(), "offered to kubelet");
        while identity(&kubelet).ok() == Some(known) && identity(&socket).ok() == Some(own) {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = look();
            tell.send_if_modified(|told| std::mem::replace(told, now) != now);
        }
        Ok(())
    };
    // It is served while it is announced: kubelet may ask before it has answered.
    tokio::select! {
        ended = served => ended.map_err(Error::Unreachable),
        ended = watched => ended,
    }
}

/// Which file this is: a socket that was made anew is another.
fn identity(path: &Path) -> std::io::Result<(u64, u64, i64, i64)> {
    let about = std::fs::symlink_metadata(path)?;
    Ok((about.dev(), about.ino(), about.ctime(), about.ctime_nsec()))
}

async fn announce(resource: &Resource, kubelet: &Path) -> Result<(), Error> {
    let request = RegisterRequest {
        version: VERSION.to_owned(),
        endpoint: resource.socket(),
        resource_name: resource.name.to_owned(),
        options: Some(Options::default()),
    };
    let announced = async {
        let channel = Endpoint::from_shared(format!("unix://{}", kubelet.display()))?.connect().await?;
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await?;
        let path = http::uri::PathAndQuery::from_static(REGISTER);
        let codec = ProstCodec::<RegisterRequest, Empty>::default();
        client.unary(tonic::Request::new(request), path, codec).await?;
        Ok(())
    };
    tokio::time::timeout(ANSWER_LIMIT, announced).await.unwrap_or(Err(Error::Silent))
}
