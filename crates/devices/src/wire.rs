//! What passes between kubelet and a device plugin: Kubernetes' device plugin API `v1beta1`, written down from its documentation
//! (kubernetes.io, "Device Plugins"; names and numbers of fields are the wire's).

use prost::Message;

/// The version of the API that this is.
pub const VERSION: &str = "v1beta1";
/// Kubelet's method by which a plugin announces itself.
pub const REGISTER: &str = "/v1beta1.Registration/Register";
/// The plugin's method that says what it wants to be asked.
pub const OPTIONS: &str = "/v1beta1.DevicePlugin/GetDevicePluginOptions";
/// The plugin's method that lists its devices, again on each change.
pub const LIST_AND_WATCH: &str = "/v1beta1.DevicePlugin/ListAndWatch";
/// The plugin's method that says how a container gets devices.
pub const ALLOCATE: &str = "/v1beta1.DevicePlugin/Allocate";
/// What a device is that can be given to a container.
pub const HEALTHY: &str = "Healthy";
/// What a device is that cannot.
pub const UNHEALTHY: &str = "Unhealthy";

/// Nothing.
#[derive(Clone, PartialEq, Message)]
pub struct Empty {}

/// What a plugin wants to be asked; this one wants neither.
#[derive(Clone, PartialEq, Message)]
pub struct Options {
    /// Before each start of a container.
    #[prost(bool, tag = "1")]
    pub pre_start_required: bool,
    /// Which of its devices are best together.
    #[prost(bool, tag = "2")]
    pub get_preferred_allocation_available: bool,
}

/// A plugin announces itself.
#[derive(Clone, PartialEq, Message)]
pub struct RegisterRequest {
    /// [`VERSION`].
    #[prost(string, tag = "1")]
    pub version: String,
    /// The name of its socket, in kubelet's folder of plugins.
    #[prost(string, tag = "2")]
    pub endpoint: String,
    /// What pods ask for: `devices.kubevirt.io/kvm`.
    #[prost(string, tag = "3")]
    pub resource_name: String,
    /// What it wants to be asked.
    #[prost(message, optional, tag = "4")]
    pub options: Option<Options>,
}

/// All devices of a plugin.
#[derive(Clone, PartialEq, Message)]
pub struct ListAndWatchResponse {
    /// The devices.
    #[prost(message, repeated, tag = "1")]
    pub devices: Vec<Device>,
}

/// A device: one unit of its resource. Where it is near (field 3) does not matter for these.
#[derive(Clone, PartialEq, Message)]
pub struct Device {
    /// Its name, unique in the plugin.
    #[prost(string, tag = "1")]
    pub id: String,
    /// [`HEALTHY`] or [`UNHEALTHY`].
    #[prost(string, tag = "2")]
    pub health: String,
}

/// Containers of a pod get devices.
#[derive(Clone, PartialEq, Message)]
pub struct AllocateRequest {
    /// One for each container.
    #[prost(message, repeated, tag = "1")]
    pub container_requests: Vec<ContainerAllocateRequest>,
}

/// A container gets devices.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerAllocateRequest {
    /// Which, by their names.
    #[prost(string, repeated, tag = "1")]
    pub devices_ids: Vec<String>,
}

/// How containers get them, in the order that they were asked for.
#[derive(Clone, PartialEq, Message)]
pub struct AllocateResponse {
    /// One for each container.
    #[prost(message, repeated, tag = "1")]
    pub container_responses: Vec<ContainerAllocateResponse>,
}

/// How a container gets its devices. Variables (1), mounts (2), annotations (4) and CDI devices (5) are not used here.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerAllocateResponse {
    /// Files of devices.
    #[prost(message, repeated, tag = "3")]
    pub devices: Vec<DeviceSpec>,
}

/// The file of a device.
#[derive(Clone, PartialEq, Message)]
pub struct DeviceSpec {
    /// Where the container has it.
    #[prost(string, tag = "1")]
    pub container_path: String,
    /// Where the node has it.
    #[prost(string, tag = "2")]
    pub host_path: String,
    /// What the container may do: `r`, `w`, `m` (make it).
    #[prost(string, tag = "3")]
    pub permissions: String,
}
