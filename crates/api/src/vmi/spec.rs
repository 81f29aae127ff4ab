//! What a virtual machine shall be: the part of KubeVirt's VMI spec that QEMU is really given.
//!
//! Fields of KubeVirt that are known but not implemented are listed in [`crate::unimplemented`].

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Affinity, LocalObjectReference, Toleration, TopologySpreadConstraint};
use serde_json::Value;

use crate::Quantity;

/// Resources by name (`cpu`, `memory`, …).
pub type ResourceList = BTreeMap<String, Quantity>;

api_struct! {
    /// The spec of a VMI.
    VirtualMachineInstanceSpec {
        /// The virtual hardware.
        domain: DomainSpec,
        /// Labels that a node must carry.
        node_selector: BTreeMap<String, String>,
        /// Scheduling constraints of the launcher pod.
        affinity: Option<Affinity>,
        /// Taints that the launcher pod tolerates.
        tolerations: Vec<Toleration>,
        /// How launcher pods spread over the nodes.
        topology_spread_constraints: Vec<TopologySpreadConstraint>,
        /// The scheduler of the launcher pod.
        scheduler_name: Option<String>,
        /// The priority class of the launcher pod.
        priority_class_name: Option<String>,
        /// What to do when the node is drained; unset is the cluster's default.
        eviction_strategy: Option<EvictionStrategy>,
        /// `Paused`: the guest waits at its start until somebody unpauses it.
        start_strategy: Option<String>,
        /// Seconds between the power button and the kill; 30 when unset.
        termination_grace_period_seconds: Option<i64>,
        /// The sources of the disks.
        volumes: Vec<Volume>,
        /// The networks of the interfaces.
        networks: Vec<Network>,
        /// The host name in the guest; the VMI's name when unset.
        hostname: Option<String>,
        /// The DNS subdomain in the guest.
        subdomain: Option<String>,
        /// The CPU architecture: `amd64`.
        architecture: Option<String>,
    }
}

string_enum! {
    /// What happens to a VMI when its node is drained.
    EvictionStrategy default None {
        /// The pod may be evicted, which shuts the guest down.
        None = "None",
        /// The guest is migrated; a drain waits for it.
        LiveMigrate = "LiveMigrate",
        /// The guest is migrated if it can be, shut down otherwise.
        LiveMigrateIfPossible = "LiveMigrateIfPossible",
        /// Somebody else moves the guest.
        External = "External",
    }
}

api_struct! {
    /// The virtual hardware.
    DomainSpec {
        /// What the launcher pod asks for and is limited to.
        resources: ResourceRequirements,
        /// Virtual CPUs.
        cpu: Option<Cpu>,
        /// Guest memory.
        memory: Option<Memory>,
        /// The machine type.
        machine: Option<Machine>,
        /// Firmware, UUID and direct kernel boot.
        firmware: Option<Firmware>,
        /// The guest's clock.
        clock: Option<Clock>,
        /// Features of the machine.
        features: Option<Features>,
        /// Disks, interfaces and the rest.
        devices: Devices,
        /// Confidential computing. Refused on its way in ([`crate::unimplemented`]); read where KubeVirt's VMIs are looked at.
        #[schemars(skip)]
        launch_security: Option<Value>,
    }
}

api_struct! {
    /// Requests and limits.
    ResourceRequirements {
        /// At least this much.
        requests: ResourceList,
        /// At most this much.
        limits: ResourceList,
        /// Do not add the launcher's own overhead to the memory request.
        overcommit_guest_overhead: Option<bool>,
    }
}

api_struct! {
    /// Virtual CPUs: sockets × cores × threads.
    Cpu {
        /// Cores a socket.
        cores: Option<u32>,
        /// Sockets.
        sockets: Option<u32>,
        /// Threads a core.
        threads: Option<u32>,
        /// A QEMU CPU model, `host-model` or `host-passthrough`.
        model: Option<String>,
    }
}

impl Cpu {
    /// How many virtual CPUs this makes; a part that is not given counts as one.
    pub fn count(&self) -> u32 {
        let part = |value: Option<u32>| value.unwrap_or(1).max(1);
        part(self.cores).saturating_mul(part(self.sockets)).saturating_mul(part(self.threads))
    }
}

api_struct! {
    /// Guest memory.
    Memory {
        /// What the guest sees.
        guest: Option<Quantity>,
    }
}

api_struct! {
    /// The machine type.
    Machine {
        /// As QEMU names it: `q35`, `pc-q35-7.2`.
        #[serde(rename = "type")]
        type_: Option<String>,
    }
}

api_struct! {
    /// Firmware.
    Firmware {
        /// The UUID in SMBIOS.
        uuid: Option<String>,
        /// The system's serial number in SMBIOS.
        serial: Option<String>,
        /// What boots the guest.
        bootloader: Option<Bootloader>,
        /// A kernel from a container image, booted directly.
        kernel_boot: Option<KernelBoot>,
    }
}

api_struct! {
    /// What boots the guest.
    Bootloader {
        /// SeaBIOS, the default.
        bios: Option<Bios>,
        /// EFI firmware (OVMF).
        efi: Option<Efi>,
    }
}

api_struct! {
    /// SeaBIOS.
    Bios {}
}

api_struct! {
    /// EFI firmware.
    Efi {
        /// It boots only what is signed; true when unset. Needs system management mode.
        secure_boot: Option<bool>,
        /// Its variables are kept on a claim and outlive the VMI; no when unset.
        persistent: Option<bool>,
    }
}

impl Efi {
    /// Whether it boots only what is signed.
    pub fn is_secure(&self) -> bool {
        self.secure_boot.unwrap_or(true)
    }
}

api_struct! {
    /// A kernel that is booted directly.
    KernelBoot {
        /// The kernel's command line.
        kernel_args: Option<String>,
        /// Where kernel and initrd are.
        container: Option<KernelBootContainer>,
    }
}

api_struct! {
    /// A container image with a kernel.
    KernelBootContainer {
        /// The image.
        image: String,
        /// `Always`, `IfNotPresent` or `Never`.
        image_pull_policy: Option<String>,
        /// The kernel's absolute path in the image.
        kernel_path: Option<String>,
        /// The initial RAM disk's absolute path in the image.
        initrd_path: Option<String>,
    }
}

api_struct! {
    /// The guest's clock. What the hardware's clock begins with follows the host's; a move keeps it.
    Clock {
        /// The hardware's clock is in UTC, the default.
        utc: Option<ClockUtc>,
        /// The hardware's clock is in the local time of this zone (`Europe/Berlin`), as some systems want it.
        timezone: Option<String>,
        /// Timers of the machine.
        timer: Option<Timer>,
    }
}

api_struct! {
    /// A clock in UTC.
    ClockUtc {
        /// By how many seconds it differs from UTC on purpose.
        offset_seconds: Option<i64>,
    }
}

api_struct! {
    /// Timers of the machine.
    Timer {
        /// The high precision event timer.
        hpet: Option<TimerState>,
        /// KVM's clock.
        kvm: Option<TimerState>,
        /// The programmable interval timer.
        pit: Option<TimerState>,
        /// The real-time clock.
        rtc: Option<TimerState>,
    }
}

api_struct! {
    /// One timer.
    TimerState {
        /// `delay`, `catchup`, `merge` or `discard`: what becomes of ticks that the guest has missed.
        tick_policy: Option<String>,
        /// Whether there is one; true when unset.
        present: Option<bool>,
        /// `guest` or `wall` (real-time clock only): whether it stands still with the guest.
        track: Option<String>,
    }
}

api_struct! {
    /// Features of the machine.
    Features {
        /// ACPI, on by default.
        acpi: Option<FeatureState>,
        /// The local APIC, always on.
        apic: Option<FeatureState>,
        /// System management mode.
        smm: Option<FeatureState>,
        /// Hyper-V enlightenments. Refused on their way in; read where KubeVirt's VMIs are looked at.
        #[schemars(skip)]
        hyperv: Option<Value>,
        /// All Hyper-V enlightenments of the host. As above.
        #[schemars(skip)]
        hyperv_passthrough: Option<Value>,
    }
}

api_struct! {
    /// A feature that can be off.
    FeatureState {
        /// True when unset.
        enabled: Option<bool>,
    }
}

api_struct! {
    /// The guest's devices.
    Devices {
        /// Disks, CD-ROMs and LUNs.
        disks: Vec<Disk>,
        /// Network interfaces.
        interfaces: Vec<Interface>,
        /// A random number generator.
        rng: Option<Empty>,
        /// A trusted platform module.
        tpm: Option<Tpm>,
        /// GPUs of the host. Refused on their way in; read where KubeVirt's VMIs are looked at.
        #[schemars(skip)]
        gpus: Vec<Value>,
        /// Devices of the host. As above.
        #[schemars(skip)]
        host_devices: Vec<Value>,
        /// Whether the pod network is attached when no interface is given; true when unset.
        autoattach_pod_interface: Option<bool>,
        /// A serial console; true when unset.
        autoattach_serial_console: Option<bool>,
        /// A graphics device; true when unset.
        autoattach_graphics_device: Option<bool>,
        /// A memory balloon; true when unset.
        autoattach_mem_balloon: Option<bool>,
        /// No disk can be plugged in while the guest runs; false when unset.
        disable_hotplug: Option<bool>,
    }
}

impl Devices {
    /// Whether there is a trusted platform module.
    pub fn has_tpm(&self) -> bool {
        self.tpm.as_ref().is_some_and(|tpm| tpm.enabled.unwrap_or(true))
    }
}

impl DomainSpec {
    /// Whether the guest has a trusted platform module whose state outlives the VMI.
    pub fn has_persistent_tpm(&self) -> bool {
        let tpm = self.devices.tpm.as_ref().filter(|_| self.devices.has_tpm());
        tpm.is_some_and(|tpm| tpm.persistent == Some(true))
    }

    /// Whether the guest has EFI variables that outlive the VMI.
    pub fn has_persistent_efi(&self) -> bool {
        let bootloader = self.firmware.as_ref().and_then(|firmware| firmware.bootloader.as_ref());
        bootloader.and_then(|loader| loader.efi.as_ref()).is_some_and(|efi| efi.persistent == Some(true))
    }

    /// Whether anything of the guest is kept on a claim of its own (KubeVirt's backend storage).
    pub fn has_persistent_state(&self) -> bool {
        self.has_persistent_tpm() || self.has_persistent_efi()
    }
}

api_struct! {
    /// A trusted platform module (TPM 2.0).
    Tpm {
        /// Whether there is one; true when unset.
        enabled: Option<bool>,
        /// Its state is kept on a claim and outlives the VMI; no when unset.
        persistent: Option<bool>,
    }
}

api_struct! {
    /// An object whose presence is all it says.
    Empty {}
}

api_struct! {
    /// A disk; exactly one of `disk`, `cdrom` and `lun` says as what the guest sees it (`disk` when none is given).
    Disk {
        /// The volume of the same name is its content.
        name: String,
        /// A disk.
        disk: Option<DiskTarget>,
        /// A CD-ROM.
        cdrom: Option<CdRomTarget>,
        /// A LUN.
        lun: Option<LunTarget>,
        /// Place in the boot order, from 1.
        boot_order: Option<u32>,
        /// The disk's serial number.
        serial: Option<String>,
        /// `none`, `writethrough` or `writeback`.
        cache: Option<String>,
        /// `native` or `threads`.
        io: Option<String>,
    }
}

impl Disk {
    /// The bus, as given; the defaults are set at admission.
    pub fn bus(&self) -> Option<&str> {
        let disk = self.disk.as_ref().and_then(|target| target.bus.as_deref());
        let cdrom = self.cdrom.as_ref().and_then(|target| target.bus.as_deref());
        let lun = self.lun.as_ref().and_then(|target| target.bus.as_deref());
        disk.or(cdrom).or(lun)
    }

    /// Whether the guest cannot write to it: CD-ROMs are read-only unless said otherwise, all others writable.
    pub fn is_read_only(&self) -> bool {
        match (&self.cdrom, &self.lun, &self.disk) {
            (Some(cdrom), _, _) => cdrom.readonly.unwrap_or(true),
            (_, Some(lun), _) => lun.readonly.unwrap_or(false),
            (_, _, Some(disk)) => disk.readonly.unwrap_or(false),
            _ => false,
        }
    }
}

api_struct! {
    /// A disk.
    DiskTarget {
        /// `virtio`, `sata` or `scsi`.
        bus: Option<String>,
        /// The guest cannot write.
        readonly: Option<bool>,
    }
}

api_struct! {
    /// A CD-ROM.
    CdRomTarget {
        /// `sata` or `scsi`.
        bus: Option<String>,
        /// The guest cannot write; true when unset.
        readonly: Option<bool>,
    }
}

api_struct! {
    /// A LUN.
    LunTarget {
        /// `virtio`, `sata` or `scsi`.
        bus: Option<String>,
        /// The guest cannot write.
        readonly: Option<bool>,
        /// SCSI persistent reservations. LUNs are refused on their way in; read where KubeVirt's VMIs are looked at.
        #[schemars(skip)]
        reservation: Option<bool>,
    }
}

api_struct! {
    /// A network interface; exactly one binding says how it reaches its network.
    Interface {
        /// The network of the same name is what it is on.
        name: String,
        /// `virtio` (default), `e1000`, `e1000e`, `rtl8139`, `ne2k_pci`, `pcnet`.
        model: Option<String>,
        /// The MAC address; derived from the VMI when unset.
        mac_address: Option<String>,
        /// NAT behind the pod's address.
        masquerade: Option<Empty>,
        /// One L2 segment with the network.
        bridge: Option<Empty>,
        /// KubeVirt's passt binding, which can be migrated. Refused on its way in; read where KubeVirt's VMIs are looked at.
        #[schemars(skip)]
        passt_binding: Option<Value>,
        /// Ports that are forwarded (masquerade); all when empty.
        ports: Vec<Port>,
        /// Place in the boot order, from 1.
        boot_order: Option<u32>,
    }
}

api_struct! {
    /// A forwarded port.
    Port {
        /// A name.
        name: Option<String>,
        /// `TCP` (default) or `UDP`.
        protocol: Option<String>,
        /// The number, 1 to 65535.
        port: i32,
    }
}

impl crate::macros::Absent for i32 {
    fn absent(&self) -> bool {
        false
    }
}

api_struct! {
    /// A network; exactly one of `pod` and `multus`.
    Network {
        /// The name that an interface refers to.
        name: String,
        /// The pod's own network.
        pod: Option<Empty>,
        /// A network described by a NetworkAttachmentDefinition.
        multus: Option<MultusNetwork>,
    }
}

api_struct! {
    /// A secondary network.
    MultusNetwork {
        /// `name` or `namespace/name` of the NetworkAttachmentDefinition.
        network_name: String,
        /// It replaces the pod network.
        default: Option<bool>,
    }
}

api_struct! {
    /// The source of a disk; exactly one of the kinds.
    Volume {
        /// The name that a disk refers to.
        name: String,
        /// A disk in a container image; each start begins with the image's content.
        container_disk: Option<ContainerDiskSource>,
        /// A disk on a PersistentVolumeClaim.
        persistent_volume_claim: Option<PersistentVolumeClaimSource>,
        /// A cloud-init NoCloud disk.
        cloud_init_no_cloud: Option<CloudInitNoCloudSource>,
        /// An empty disk for the life of the VMI.
        empty_disk: Option<EmptyDiskSource>,
        /// A disk with the files of a ConfigMap.
        config_map: Option<ConfigMapSource>,
        /// A disk with the files of a Secret.
        secret: Option<SecretSource>,
        /// A file of the host. Refused on its way in; read where KubeVirt's VMIs are looked at.
        #[schemars(skip)]
        host_disk: Option<Value>,
    }
}

impl Volume {
    /// Whether its disk is plugged in while the guest runs, and not there from the start.
    pub fn is_hotpluggable(&self) -> bool {
        self.persistent_volume_claim.as_ref().is_some_and(|claim| claim.hotpluggable == Some(true))
    }
}

api_struct! {
    /// A disk in a container image.
    ContainerDiskSource {
        /// The image.
        image: String,
        /// The disk's path in the image; the one file under `/disk` when unset.
        path: Option<String>,
        /// `Always`, `IfNotPresent` or `Never`.
        image_pull_policy: Option<String>,
    }
}

api_struct! {
    /// A disk on a PersistentVolumeClaim.
    PersistentVolumeClaimSource {
        /// The claim in the VMI's namespace.
        claim_name: String,
        /// The claim is only read.
        read_only: Option<bool>,
        /// The disk is plugged in while the guest runs, and can be taken out again.
        hotpluggable: Option<bool>,
    }
}

api_struct! {
    /// A cloud-init NoCloud disk.
    CloudInitNoCloudSource {
        /// A secret with the key `userdata`.
        secret_ref: Option<LocalObjectReference>,
        /// User data in base64.
        user_data_base64: Option<String>,
        /// User data.
        user_data: Option<String>,
        /// A secret with the key `networkdata`.
        network_data_secret_ref: Option<LocalObjectReference>,
        /// Network data in base64.
        network_data_base64: Option<String>,
        /// Network data.
        network_data: Option<String>,
    }
}

api_struct! {
    /// An empty disk.
    EmptyDiskSource {
        /// Its size.
        capacity: Quantity,
    }
}

impl crate::macros::Absent for Quantity {
    fn absent(&self) -> bool {
        false
    }
}

api_struct! {
    /// A disk with the files of a ConfigMap.
    ConfigMapSource {
        /// The ConfigMap.
        name: String,
        /// It may be missing.
        optional: Option<bool>,
        /// The label of the file system.
        volume_label: Option<String>,
    }
}

api_struct! {
    /// A disk with the files of a Secret.
    SecretSource {
        /// The Secret.
        secret_name: String,
        /// It may be missing.
        optional: Option<bool>,
        /// The label of the file system.
        volume_label: Option<String>,
    }
}

macro_rules! always_written {
    ($($ty:ty),*) => {$(impl crate::macros::Absent for $ty {
        fn absent(&self) -> bool {
            false
        }
    })*};
}

always_written!(DomainSpec, Devices);

impl crate::macros::Absent for ResourceRequirements {
    fn absent(&self) -> bool {
        *self == Self::default()
    }
}
