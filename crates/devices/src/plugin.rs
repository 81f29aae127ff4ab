//! The plugin's side of one resource: what kubelet asks on its socket.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use futures::{Stream, StreamExt};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;
use tower::service_fn;

use crate::Resource;
use crate::wire::{
    ALLOCATE, AllocateRequest, AllocateResponse, ContainerAllocateRequest, ContainerAllocateResponse, Device,
    DeviceSpec, Empty, HEALTHY, LIST_AND_WATCH, ListAndWatchResponse, OPTIONS, Options,
};

/// Answers kubelet for one resource.
#[derive(Clone)]
pub(crate) struct Plugin {
    resource: Arc<Resource>,
    /// Whether the device is there and of use.
    available: watch::Receiver<bool>,
}

impl Plugin {
    pub(crate) fn new(resource: Arc<Resource>, available: watch::Receiver<bool>) -> Self {
        Self { resource, available }
    }

    /// What the node has: any number of guests shares one device, so that the units only say how many. None of a device that is not
    /// there, rather than sick ones: pods then find no node instead of one that cannot take them.
    fn list(resource: &Resource, available: bool) -> ListAndWatchResponse {
        let units = if available { resource.units } else { 0 };
        let device = |number| Device { id: format!("{}{number}", resource.short_name()), health: HEALTHY.to_owned() };
        ListAndWatchResponse { devices: (0..units).map(device).collect() }
    }

    fn lists(&self) -> impl Stream<Item = Result<ListAndWatchResponse, Status>> + Send + use<> {
        let resource = self.resource.clone();
        WatchStream::new(self.available.clone()).map(move |available| Ok(Self::list(&resource, available)))
    }

    fn allocate(&self, request: &AllocateRequest) -> Result<AllocateResponse, Status> {
        let device = &self.resource.device;
        if !*self.available.borrow() {
            return Err(Status::unavailable(format!("{} is not there, or of no use to guests", device.display())));
        }
        let one = |request: &ContainerAllocateRequest| {
            if let Some(unknown) = request.devices_ids.iter().find(|id| !self.resource.has(id)) {
                return Err(Status::invalid_argument(format!("{} has no device {unknown:?}", self.resource.name)));
            }
            let path = |path: &Path| path.to_string_lossy().into_owned();
            let spec = DeviceSpec {
                container_path: path(device),
                host_path: path(device),
                permissions: self.resource.permissions.to_owned(),
            };
            Ok(ContainerAllocateResponse { devices: vec![spec] })
        };
        let container_responses = request.container_requests.iter().map(one).collect::<Result<_, _>>()?;
        tracing::debug!(resource = self.resource.name, "given to a container");
        Ok(AllocateResponse { container_responses })
    }
}

impl tonic::server::NamedService for Plugin {
    const NAME: &'static str = "v1beta1.DevicePlugin";
}

impl tower::Service<http::Request<tonic::body::Body>> for Plugin {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let plugin = self.clone();
        Box::pin(async move {
            Ok(match request.uri().path() {
                OPTIONS => {
                    let answer = service_fn(|_: Request<Empty>| async { Ok(Response::new(Options::default())) });
                    tonic::server::Grpc::new(ProstCodec::default()).unary(answer, request).await
                }
                LIST_AND_WATCH => {
                    let lists = move |_: Request<Empty>| {
                        let lists = plugin.lists();
                        async move { Ok(Response::new(lists)) }
                    };
                    tonic::server::Grpc::new(ProstCodec::default()).server_streaming(service_fn(lists), request).await
                }
                ALLOCATE => {
                    let allocate = move |request: Request<AllocateRequest>| {
                        let answer = plugin.allocate(request.get_ref()).map(Response::new);
                        async move { answer }
                    };
                    tonic::server::Grpc::new(ProstCodec::default()).unary(service_fn(allocate), request).await
                }
                // Kubelet asks no more than the options name.
                other => Status::unimplemented(format!("{other} is not served")).into_http(),
            })
        })
    }
}
