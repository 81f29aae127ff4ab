//! The plugins before a kubelet that speaks the real protocol over real sockets.
#![allow(clippy::unwrap_used)] // a test fails by it

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use godwit_devices::wire::{
    ALLOCATE, AllocateRequest, AllocateResponse, ContainerAllocateRequest, Empty, HEALTHY, LIST_AND_WATCH,
    ListAndWatchResponse, OPTIONS, Options, REGISTER, RegisterRequest,
};
use godwit_devices::{Resource, run};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

/// Kubelet's registry: passes on who announces itself.
#[derive(Clone)]
struct Registry(mpsc::UnboundedSender<RegisterRequest>);

impl tonic::server::NamedService for Registry {
    const NAME: &'static str = "v1beta1.Registration";
}

impl tower::Service<http::Request<tonic::body::Body>> for Registry {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        assert_eq!(request.uri().path(), REGISTER);
        let announced = self.0.clone();
        Box::pin(async move {
            let take = move |request: Request<RegisterRequest>| {
                announced.send(request.into_inner()).unwrap();
                async { Ok(Response::new(Empty {})) }
            };
            Ok(tonic::server::Grpc::new(ProstCodec::default()).unary(tower::service_fn(take), request).await)
        })
    }
}

/// A kubelet, until it is dropped. Like a real one it removes every socket of its folder when it starts.
struct Kubelet {
    folder: PathBuf,
    announced: mpsc::UnboundedReceiver<RegisterRequest>,
    serving: tokio::task::JoinHandle<()>,
}

impl Kubelet {
    fn start(folder: &Path) -> Self {
        for entry in std::fs::read_dir(folder).unwrap() {
            std::fs::remove_file(entry.unwrap().path()).unwrap();
        }
        let listener = UnixListener::bind(folder.join("kubelet.sock")).unwrap();
        let (tell, announced) = mpsc::unbounded_channel();
        let serving = tokio::spawn(async move {
            let server = Server::builder().add_service(Registry(tell));
            server.serve_with_incoming(UnixListenerStream::new(listener)).await.unwrap();
        });
        Self { folder: folder.to_owned(), announced, serving }
    }

    /// Waits for a plugin to announce itself, and dials it.
    async fn plugin(&mut self) -> (RegisterRequest, tonic::client::Grpc<Channel>) {
        let request = self.announced.recv().await.unwrap();
        let socket = self.folder.join(&request.endpoint);
        let channel = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap().connect().await.unwrap();
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await.unwrap();
        (request, client)
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn lists(client: &mut tonic::client::Grpc<Channel>) -> Streaming<ListAndWatchResponse> {
    let codec = ProstCodec::<Empty, ListAndWatchResponse>::default();
    let path = http::uri::PathAndQuery::from_static(LIST_AND_WATCH);
    client.server_streaming(Request::new(Empty {}), path, codec).await.unwrap().into_inner()
}

async fn allocate(client: &mut tonic::client::Grpc<Channel>, ids: &[&str]) -> Result<AllocateResponse, Status> {
    client.ready().await.unwrap();
    let codec = ProstCodec::<AllocateRequest, AllocateResponse>::default();
    let devices_ids = ids.iter().map(|id| (*id).to_owned()).collect();
    let request = AllocateRequest { container_requests: vec![ContainerAllocateRequest { devices_ids }] };
    let path = http::uri::PathAndQuery::from_static(ALLOCATE);
    client.unary(Request::new(request), path, codec).await.map(Response::into_inner)
}

#[tokio::test]
async fn kubelet_hears_of_a_device_gives_it_to_containers_and_hears_of_it_again_after_its_restart() {
    let folder = tempfile::tempdir().unwrap();
    let plugins = folder.path().join("device-plugins");
    std::fs::create_dir(&plugins).unwrap();
    let device = folder.path().join("kvm");
    std::fs::write(&device, "").unwrap();
    let resource = Resource { name: "devices.kubevirt.io/kvm", device: device.clone(), permissions: "rw", units: 3 };
    let (use_it, of_use) = watch::channel(true);
    // It runs before there is a kubelet.
    let plugin = tokio::spawn(run(resource, plugins.clone(), of_use));

    let mut kubelet = Kubelet::start(&plugins);
    let (request, mut client) = kubelet.plugin().await;
    assert_eq!((request.version.as_str(), request.resource_name.as_str()), ("v1beta1", "devices.kubevirt.io/kvm"));
    let codec = ProstCodec::<Empty, Options>::default();
    let path = http::uri::PathAndQuery::from_static(OPTIONS);
    let options = client.unary(Request::new(Empty {}), path, codec).await.unwrap().into_inner();
    assert_eq!(options, Options::default());
    client.ready().await.unwrap();
    let mut list = lists(&mut client).await;
    let devices = list.message().await.unwrap().unwrap().devices;
    let told: Vec<_> = devices.iter().map(|device| (device.id.as_str(), device.health.as_str())).collect();
    assert_eq!(told, [("kvm0", HEALTHY), ("kvm1", HEALTHY), ("kvm2", HEALTHY)]);

    let given = allocate(&mut client, &["kvm1"]).await.unwrap();
    let spec = &given.container_responses[0].devices[0];
    let path = device.to_str().unwrap();
    assert_eq!((spec.host_path.as_str(), spec.container_path.as_str(), spec.permissions.as_str()), (path, path, "rw"));
    for unknown in ["kvm3", "tun0", "kvm"] {
        assert_eq!(allocate(&mut client, &[unknown]).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    }

    // A device that goes, or turns out to be of no use, is told, and is not given away any more.
    std::fs::remove_file(&device).unwrap();
    assert_eq!(list.message().await.unwrap().unwrap().devices, []);
    assert_eq!(allocate(&mut client, &["kvm1"]).await.unwrap_err().code(), tonic::Code::Unavailable);
    std::fs::write(&device, "").unwrap();
    assert_eq!(list.message().await.unwrap().unwrap().devices.len(), 3);
    use_it.send_replace(false);
    assert_eq!(list.message().await.unwrap().unwrap().devices, []);
    use_it.send_replace(true);
    assert_eq!(list.message().await.unwrap().unwrap().devices.len(), 3);

    // A new kubelet knows nothing of it.
    drop(kubelet);
    let mut kubelet = Kubelet::start(&plugins);
    let (request, mut client) = kubelet.plugin().await;
    assert_eq!(request.resource_name, "devices.kubevirt.io/kvm");
    assert_eq!(lists(&mut client).await.message().await.unwrap().unwrap().devices.len(), 3);
    assert!(allocate(&mut client, &["kvm0"]).await.is_ok());
    plugin.abort();
}

#[test]
fn launchers_can_ask_for_what_kubevirt_calls_so() {
    let names = Resource::all().map(|resource| resource.name);
    assert_eq!(names, ["devices.kubevirt.io/kvm", "devices.kubevirt.io/tun", "devices.kubevirt.io/vhost-net"]);
}
