//! A VMI's spec: what can be and what cannot.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;

use super::Cause;
use crate::Quantity;
use crate::unimplemented::{Effect, VMI_FIELDS, uses};
use crate::vmi::{CloudInitNoCloudSource, Devices, Disk, DomainSpec, Efi, Firmware, Interface, Network, Volume};
use crate::vmi::{EvictionStrategy, START_PAUSED, VirtualMachineInstanceSpec};

const DISK_BUSES: [&str; 3] = ["virtio", "sata", "scsi"];
const CDROM_BUSES: [&str; 2] = ["sata", "scsi"];
const CACHES: [&str; 3] = ["none", "writethrough", "writeback"];
const IO_MODES: [&str; 2] = ["native", "threads"];
const INTERFACE_MODELS: [&str; 6] = ["virtio", "e1000", "e1000e", "ne2k_pci", "pcnet", "rtl8139"];
const PULL_POLICIES: [&str; 3] = ["Always", "IfNotPresent", "Never"];
/// QEMU's pc and q35 machines allow more with effort; KubeVirt's own limit is of this order.
const MAX_CPUS: u32 = 255;
/// KubeVirt's limit for data given in line.
const MAX_CLOUD_INIT: usize = 2048;
const MAX_SERIAL: usize = 256;
const MAX_NAME: usize = 63;

/// Fields that godwit knows and does not implement: warned of or refused.
pub(crate) fn unimplemented(spec: &Value, at: &str, causes: &mut Vec<Cause>, warnings: &mut Vec<String>) {
    for found in uses(spec, at, VMI_FIELDS) {
        match found.effect {
            Effect::Harmless => warnings.push(found.message()),
            Effect::GuestDiffers => causes.push(Cause::unsupported(&found.path, found.message())),
        }
    }
}

/// A name becomes a label's value, which has at most 63 characters.
pub(super) fn object_name(name: Option<&str>, causes: &mut Vec<Cause>) {
    if name.is_some_and(|name| name.len() > MAX_NAME) {
        let text = format!("metadata.name must be no more than {MAX_NAME} characters");
        causes.push(Cause::invalid("metadata.name", text));
    }
}

/// Everything that cannot be in a spec that has its defaults; `at` is the spec's own path.
pub(crate) fn check(spec: &VirtualMachineInstanceSpec, at: &str, causes: &mut Vec<Cause>) {
    top(spec, at, causes);
    domain(&spec.domain, &format!("{at}.domain"), causes);
    volumes(&spec.volumes, &spec.domain.devices, at, causes);
    networks(&spec.networks, &spec.domain.devices.interfaces, at, causes);
    boot_order(&spec.domain.devices, at, causes);
}

fn top(spec: &VirtualMachineInstanceSpec, at: &str, causes: &mut Vec<Cause>) {
    if let Some(strategy) = spec.eviction_strategy.as_ref().filter(|strategy| !EvictionStrategy::is_known(strategy)) {
        let field = format!("{at}.evictionStrategy");
        causes.push(Cause::unsupported(&field, format!("{field} is set with an unrecognized option: {strategy}")));
    }
    if let Some(architecture) = spec.architecture.as_deref().filter(|architecture| *architecture != "amd64") {
        let field = format!("{at}.architecture");
        let text = format!("{field} {architecture} is not implemented by godwit: use amd64");
        causes.push(Cause::unsupported(&field, text));
    }
    one_of(spec.start_strategy.as_deref().unwrap_or_default(), &[START_PAUSED], &format!("{at}.startStrategy"), causes);
    if spec.termination_grace_period_seconds.is_some_and(|seconds| seconds < 0) {
        let field = format!("{at}.terminationGracePeriodSeconds");
        causes.push(Cause::invalid(&field, format!("{field} must be greater than or equal to 0")));
    }
    for (name, value) in [("hostname", &spec.hostname), ("subdomain", &spec.subdomain)] {
        if value.as_deref().is_some_and(|value| !value.is_empty() && !is_dns_label(value)) {
            let field = format!("{at}.{name}");
            let text = format!(
                "{field} does not conform to the kubernetes DNS_LABEL rules : a lowercase RFC 1123 label must consist of \
                 lower case alphanumeric characters or '-', and must start and end with an alphanumeric character"
            );
            causes.push(Cause::invalid(&field, text));
        }
    }
}

fn domain(domain: &DomainSpec, at: &str, causes: &mut Vec<Cause>) {
    memory(domain, at, causes);
    if let Some(cpu) = &domain.cpu {
        let count = cpu.count();
        if count > MAX_CPUS {
            let text = format!("{at}.cpu: {count} virtual CPUs are more than the {MAX_CPUS} that a guest can have");
            causes.push(Cause::invalid(format!("{at}.cpu"), text));
        }
        if cpu.model.as_deref().is_some_and(|model| !is_word(model)) {
            let field = format!("{at}.cpu.model");
            causes.push(Cause::invalid(
                &field,
                format!("{field} is no CPU model: letters, digits, '-', '_' and '.' only"),
            ));
        }
    }
    if let Some(machine) = domain.machine.as_ref().and_then(|machine| machine.type_.as_deref()) {
        let known = ["q35", "pc-q35-", "pc", "pc-i440fx-"];
        let fits = is_word(machine)
            && known.iter().any(|one| machine == *one || (one.ends_with('-') && machine.starts_with(one)));
        if !fits && !machine.is_empty() {
            let field = format!("{at}.machine.type");
            let text = format!("{field} is not supported: {machine} (allowed values: [q35 pc-q35-* pc pc-i440fx-*])");
            causes.push(Cause::unsupported(&field, text));
        }
    }
    let apic = domain.features.as_ref().and_then(|features| features.apic.as_ref());
    if apic.and_then(|state| state.enabled) == Some(false) {
        let field = format!("{at}.features.apic.enabled");
        let text = format!("{field}: a guest without it is not implemented by godwit; remove it");
        causes.push(Cause::unsupported(&field, text));
    }
    if let Some(clock) = &domain.clock {
        super::clock::check(clock, &format!("{at}.clock"), causes);
    }
    if let Some(firmware) = &domain.firmware {
        check_firmware(firmware, &format!("{at}.firmware"), causes);
        let bootloader = firmware.bootloader.as_ref();
        let secure = bootloader.and_then(|bootloader| bootloader.efi.as_ref()).is_some_and(Efi::is_secure);
        let smm = domain.features.as_ref().and_then(|features| features.smm.as_ref());
        if secure && !smm.is_some_and(|smm| smm.enabled.unwrap_or(true)) {
            // KubeVirt's words, and its field
            let text =
                format!("{at} has EFI SecureBoot enabled. SecureBoot requires SMM, which is currently disabled.");
            causes.push(Cause::invalid(at, text));
        }
    }
}

fn memory(domain: &DomainSpec, at: &str, causes: &mut Vec<Cause>) {
    for (list, quantities) in [("requests", &domain.resources.requests), ("limits", &domain.resources.limits)] {
        for (name, quantity) in quantities {
            let field = format!("{at}.resources.{list}.{name}");
            match quantity.milli() {
                Err(error) => causes.push(Cause::invalid(&field, format!("{field}: {error}"))),
                Ok(milli) if milli < 0 => {
                    let text = format!("{field} '{quantity}' : must be greater than or equal to 0.");
                    causes.push(Cause::invalid(&field, text));
                }
                Ok(_) => {}
            }
        }
    }
    for (name, request) in &domain.resources.requests {
        let (request, limit) = (request.milli(), domain.resources.limits.get(name).map(Quantity::milli));
        if let (Ok(request), Some(Ok(limit))) = (request, limit)
            && request > limit
        {
            let field = format!("{at}.resources.requests.{name}");
            let text = format!("{field} is greater than {at}.resources.limits.{name}");
            causes.push(Cause::invalid(&field, text));
        }
    }
    match super::vmi::said_memory(domain) {
        None => {
            let text = format!(
                "no memory requested, at least one of '{at}.memory.guest', '{at}.memory.hugepages.size' or \
                 '{at}.resources.requests.memory' must be set"
            );
            causes.push(Cause::required("", text));
        }
        Some((place, quantity)) => {
            let field = format!("{at}.{place}");
            match quantity.bytes() {
                Err(error) if place == "memory.guest" => {
                    causes.push(Cause::invalid(&field, format!("{field}: {error}")));
                }
                Ok(bytes) if bytes < 1 << 20 => {
                    let text = format!("{field} '{quantity}': must be greater than or equal to 1Mi.");
                    causes.push(Cause::invalid(&field, text));
                }
                _ => {}
            }
            let limit = domain.resources.limits.get("memory").map(Quantity::bytes);
            if let (Ok(guest), Some(Ok(limit))) = (quantity.bytes(), limit)
                && guest > limit
            {
                let text = format!("{field} '{quantity}' must be equal to or less than the memory limit {limit}");
                causes.push(Cause::invalid(&field, text));
            }
        }
    }
}

fn check_firmware(firmware: &Firmware, at: &str, causes: &mut Vec<Cause>) {
    if firmware.uuid.as_deref().is_some_and(|uuid| !is_uuid(uuid)) {
        let field = format!("{at}.uuid");
        causes.push(Cause::invalid(&field, format!("{field} is no UUID: 8-4-4-4-12 hexadecimal digits")));
    }
    if let Some(serial) = &firmware.serial {
        check_serial(serial, &format!("{at}.serial"), causes);
    }
    if firmware.bootloader.as_ref().is_some_and(|bootloader| bootloader.bios.is_some() && bootloader.efi.is_some()) {
        let field = format!("{at}.bootloader");
        causes.push(Cause::invalid(&field, format!("{field} can only have one of bios and efi")));
    }
    let Some(boot) = &firmware.kernel_boot else { return };
    let at = format!("{at}.kernelBoot");
    let Some(container) = &boot.container else {
        if boot.kernel_args.as_deref().is_some_and(|args| !args.is_empty()) {
            let text = format!("{at}.kernelArgs: kernel arguments cannot be provided without an external kernel");
            causes.push(Cause::invalid(format!("{at}.kernelArgs"), text));
        }
        return;
    };
    if container.image.is_empty() {
        let text = format!("{at}.container must be defined with an image");
        causes.push(Cause::required(format!("{at}.container.image"), text));
    }
    if container.kernel_path.is_none() {
        let text = if container.initrd_path.is_none() {
            format!("{at}.container must be defined with at least one of the following: kernelPath, initrdPath")
        } else {
            format!("{at}.container must be defined with a kernelPath: an initrd alone cannot be booted")
        };
        causes.push(Cause::required(format!("{at}.container.kernelPath"), text));
    }
    for (name, path) in [("kernelPath", &container.kernel_path), ("initrdPath", &container.initrd_path)] {
        if let Some(path) = path {
            check_path(path, &format!("{at}.container.{name}"), causes);
        }
    }
    pull_policy(container.image_pull_policy.as_deref(), &format!("{at}.container.imagePullPolicy"), causes);
    if boot.kernel_args.as_deref().is_some_and(|args| args.contains(['\0', '\n'])) {
        let field = format!("{at}.kernelArgs");
        causes.push(Cause::invalid(&field, format!("{field} must be one line")));
    }
}

fn check_path(path: &str, field: &str, causes: &mut Vec<Cause>) {
    if !path.starts_with('/') || path.split('/').any(|part| part == "..") || path.contains('\0') {
        causes.push(Cause::invalid(
            field,
            format!("{field} must be an absolute path to a file without relative elements"),
        ));
    }
}

fn pull_policy(policy: Option<&str>, field: &str, causes: &mut Vec<Cause>) {
    one_of(policy.unwrap_or_default(), &PULL_POLICIES, field, causes);
}

/// A word out of a few; an empty one says nothing.
pub(super) fn one_of(word: &str, words: &[&str], field: &str, causes: &mut Vec<Cause>) {
    if !word.is_empty() && !words.contains(&word) {
        let text = format!("{field} is set with an unrecognized option: {word} (supported: {})", words.join(", "));
        causes.push(Cause::unsupported(field, text));
    }
}

fn volumes(volumes: &[Volume], devices: &Devices, at: &str, causes: &mut Vec<Cause>) {
    let list = format!("{at}.volumes");
    let mut first: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, volume) in volumes.iter().enumerate() {
        let field = format!("{list}[{index}]");
        check_name(&volume.name, &format!("{field}.name"), causes);
        if let Some(before) = first.insert(&volume.name, index) {
            let text = format!("{list}[{before}] and {field} must not have the same Name.");
            causes.push(Cause::duplicate(format!("{field}.name"), text));
        }
        source(volume, &field, causes);
        if !devices.disks.iter().any(|disk| disk.name == volume.name) {
            let text = format!("{field}.name '{}' not found in {at}.domain.devices.disks.", volume.name);
            causes.push(Cause::invalid(format!("{field}.name"), text));
        }
    }
    let list = format!("{at}.domain.devices.disks");
    let mut first: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, one) in devices.disks.iter().enumerate() {
        let field = format!("{list}[{index}]");
        if let Some(before) = first.insert(&one.name, index) {
            let text = format!("{list}[{before}] and {field} must not have the same Name.");
            causes.push(Cause::duplicate(format!("{field}.name"), text));
        }
        if !volumes.iter().any(|volume| volume.name == one.name) {
            // KubeVirt's message has the capital letter
            let text = format!("{field}.Name '{}' not found.", one.name);
            causes.push(Cause::invalid(format!("{field}.name"), text));
        }
        disk(one, &field, causes);
        let claim = volumes.iter().find(|volume| volume.name == one.name);
        let claim = claim.and_then(|volume| volume.persistent_volume_claim.as_ref());
        let read_only = one.is_read_only() || claim.is_some_and(|claim| claim.read_only == Some(true));
        if read_only && one.cdrom.is_none() && one.bus() == Some("sata") {
            let text = format!("{field}.disk.bus: a SATA disk cannot be read-only, use virtio or scsi, or a cdrom");
            causes.push(Cause::invalid(format!("{field}.disk.bus"), text));
        }
        // There are places for such disks on one bus only.
        if claim.is_some_and(|claim| claim.hotpluggable == Some(true)) {
            let name = &one.name;
            if one.cdrom.is_some() || one.lun.is_some() || one.bus() != Some("scsi") {
                let text = format!("{field}: hotpluggable volume {name} needs a disk on the bus scsi");
                causes.push(Cause::invalid(&field, text));
            }
            if one.boot_order.is_some() {
                let text =
                    format!("{field}.bootOrder: volume {name} is hotpluggable and not there when the guest boots");
                causes.push(Cause::invalid(format!("{field}.bootOrder"), text));
            }
        }
    }
}

fn disk(disk: &Disk, field: &str, causes: &mut Vec<Cause>) {
    if disk.name.is_empty() {
        causes.push(Cause::required(format!("{field}.name"), format!("{field}.name is missing")));
    }
    let kinds = [disk.disk.is_some(), disk.cdrom.is_some(), disk.lun.is_some()];
    if kinds.iter().filter(|given| **given).count() > 1 {
        causes.push(Cause::invalid(field, format!("{field} can only have a single target type defined")));
    }
    let bus = disk.bus().unwrap_or_default();
    if disk.cdrom.is_some() {
        one_of(bus, &CDROM_BUSES, &format!("{field}.cdrom.bus"), causes);
        if disk.cdrom.as_ref().and_then(|cdrom| cdrom.readonly) == Some(false) {
            let text = format!("{field}.cdrom.readonly must be true: a CD-ROM cannot be written");
            causes.push(Cause::invalid(format!("{field}.cdrom.readonly"), text));
        }
    } else {
        let kind = if disk.lun.is_some() { "lun" } else { "disk" };
        one_of(bus, &DISK_BUSES, &format!("{field}.{kind}.bus"), causes);
    }
    one_of(disk.cache.as_deref().unwrap_or_default(), &CACHES, &format!("{field}.cache"), causes);
    one_of(disk.io.as_deref().unwrap_or_default(), &IO_MODES, &format!("{field}.io"), causes);
    if disk.io.as_deref() == Some("native") && matches!(disk.cache.as_deref(), Some("writethrough" | "writeback")) {
        let text = format!("{field}.io native needs {field}.cache none");
        causes.push(Cause::invalid(format!("{field}.io"), text));
    }
    if let Some(serial) = &disk.serial {
        check_serial(serial, &format!("{field}.serial"), causes);
    }
}

fn check_serial(serial: &str, field: &str, causes: &mut Vec<Cause>) {
    if serial.len() > MAX_SERIAL {
        let text = format!("{field} must be less than or equal to {MAX_SERIAL} in length, if specified");
        causes.push(Cause::invalid(field, text));
    }
    if !serial.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'+' | b'-')) {
        let text = format!("{field} must be made up of the following characters [A-Za-z0-9_.+-], if specified");
        causes.push(Cause::invalid(field, text));
    }
}

fn source(volume: &Volume, field: &str, causes: &mut Vec<Cause>) {
    let given = [
        volume.container_disk.is_some(),
        volume.persistent_volume_claim.is_some(),
        volume.cloud_init_no_cloud.is_some(),
        volume.empty_disk.is_some(),
        volume.config_map.is_some(),
        volume.secret.is_some(),
    ];
    if given.iter().filter(|given| **given).count() != 1 {
        causes.push(Cause::invalid(field, format!("{field} must have exactly one source type set")));
    }
    let mut named = |name: &str, value: &str| {
        if value.is_empty() {
            let field = format!("{field}.{name}");
            causes.push(Cause::required(&field, format!("{field} is a required field")));
        }
    };
    if let Some(source) = &volume.container_disk {
        named("containerDisk.image", &source.image);
    }
    if let Some(source) = &volume.persistent_volume_claim {
        named("persistentVolumeClaim.claimName", &source.claim_name);
    }
    if let Some(source) = &volume.config_map {
        named("configMap.name", &source.name);
    }
    if let Some(source) = &volume.secret {
        named("secret.secretName", &source.secret_name);
    }
    if let Some(source) = &volume.container_disk {
        if let Some(path) = source.path.as_deref().filter(|path| !path.is_empty()) {
            check_path(path, &format!("{field}.containerDisk.path"), causes);
        }
        pull_policy(source.image_pull_policy.as_deref(), &format!("{field}.containerDisk.imagePullPolicy"), causes);
    }
    if let Some(source) = &volume.empty_disk {
        let field = format!("{field}.emptyDisk.capacity");
        match source.capacity.bytes() {
            Err(error) => causes.push(Cause::invalid(&field, format!("{field}: {error}"))),
            Ok(0) => causes.push(Cause::invalid(&field, format!("{field} must be greater than 0"))),
            Ok(_) => {}
        }
    }
    if let Some(source) = &volume.cloud_init_no_cloud {
        cloud_init(source, &format!("{field}.cloudInitNoCloud"), causes);
    }
    for (kind, label) in [
        ("configMap", volume.config_map.as_ref().and_then(|source| source.volume_label.as_deref())),
        ("secret", volume.secret.as_ref().and_then(|source| source.volume_label.as_deref())),
    ] {
        if label.is_some_and(|label| label.len() > 32 || !label.bytes().all(|b| b.is_ascii_graphic() || b == b' ')) {
            let field = format!("{field}.{kind}.volumeLabel");
            causes.push(Cause::invalid(&field, format!("{field} must be at most 32 printable ASCII characters")));
        }
    }
}

fn cloud_init(source: &CloudInitNoCloudSource, field: &str, causes: &mut Vec<Cause>) {
    let full = |text: &Option<String>| text.as_deref().filter(|text| !text.is_empty()).map(str::to_owned);
    let reference = |secret: &Option<k8s_openapi::api::core::v1::LocalObjectReference>| {
        secret.as_ref().map(|secret| secret.name.clone())
    };
    let user = [reference(&source.secret_ref), full(&source.user_data_base64), full(&source.user_data)];
    let network =
        [reference(&source.network_data_secret_ref), full(&source.network_data_base64), full(&source.network_data)];
    let count = |ways: &[Option<String>; 3]| ways.iter().filter(|way| way.is_some()).count();
    if count(&user) > 1 {
        causes.push(Cause::invalid(field, format!("{field} must have only one userdatasource set.")));
    }
    if count(&network) > 1 {
        causes.push(Cause::invalid(field, format!("{field} must have only one networkdata source set.")));
    }
    if count(&user) == 0 && count(&network) == 0 {
        let text = format!("{field} must have at least one userdatasource or one networkdatasource set.");
        causes.push(Cause::invalid(field, text));
    }
    for (name, text) in [("secretRef", &user[0]), ("networkDataSecretRef", &network[0])] {
        if text.as_deref() == Some("") {
            let field = format!("{field}.{name}.name");
            causes.push(Cause::required(&field, format!("{field} is a required field")));
        }
    }
    for (name, text) in [("userDataBase64", &user[1]), ("networkDataBase64", &network[1])] {
        let Some(text) = text else { continue };
        let field = format!("{field}.{name}");
        match BASE64_STANDARD.decode(text) {
            Err(_) => causes.push(Cause::invalid(&field, format!("{field} is not a valid base64 value."))),
            Ok(data) => too_long(data.len(), &field, causes),
        }
    }
    for (name, text) in [("userData", &user[2]), ("networkData", &network[2])] {
        if let Some(text) = text {
            too_long(text.len(), &format!("{field}.{name}"), causes);
        }
    }
}

fn too_long(length: usize, field: &str, causes: &mut Vec<Cause>) {
    if length > MAX_CLOUD_INIT {
        let text =
            format!("{field} exceeds {MAX_CLOUD_INIT} byte limit. Should use UserDataSecretRef for larger data.");
        causes.push(Cause::invalid(field, text));
    }
}

fn networks(networks: &[Network], interfaces: &[Interface], at: &str, causes: &mut Vec<Cause>) {
    let list = format!("{at}.networks");
    let mut names = BTreeSet::new();
    for (index, network) in networks.iter().enumerate() {
        let field = format!("{list}[{index}]");
        check_name(&network.name, &format!("{field}.name"), causes);
        if !names.insert(&network.name) {
            let text =
                format!("Network with name \"{}\" already exists, every network must have a unique name", network.name);
            causes.push(Cause::duplicate(format!("{field}.name"), text));
        }
        match (&network.pod, &network.multus) {
            (None, None) => causes.push(Cause::required(&field, "should have a network type")),
            (Some(_), Some(_)) => causes.push(Cause::invalid(&field, "should have only one network type")),
            (None, Some(multus)) if multus.network_name.is_empty() => {
                let text = "CNI delegating plugin must have a networkName";
                causes.push(Cause::required(format!("{field}.multus.networkName"), text));
            }
            (None, Some(multus)) if multus.default == Some(true) => {
                let field = format!("{field}.multus.default");
                let text = format!("{field}: replacing the pod network is not implemented by godwit; remove it");
                causes.push(Cause::unsupported(&field, text));
            }
            _ => {}
        }
        if !interfaces.iter().any(|interface| interface.name == network.name) {
            let text = format!("{field}.name '{}' not found in {at}.domain.devices.interfaces.", network.name);
            causes.push(Cause::required(format!("{field}.name"), text));
        }
    }
    if networks.iter().filter(|network| network.pod.is_some()).count() > 1 {
        causes.push(Cause::duplicate(&list, "more than one interface is connected to a pod network in networks"));
    }
    let list = format!("{at}.domain.devices.interfaces");
    let (mut names, mut addresses) = (BTreeSet::new(), BTreeSet::new());
    for (index, interface) in interfaces.iter().enumerate() {
        let field = format!("{list}[{index}]");
        if !names.insert(&interface.name) {
            let text = "Only one interface can be connected to one specific network";
            causes.push(Cause::duplicate(format!("{field}.name"), text));
        }
        let network = networks.iter().find(|network| network.name == interface.name);
        if network.is_none() {
            let text = format!("{field}.name '{}' not found.", interface.name);
            causes.push(Cause::invalid(format!("{field}.name"), text));
        }
        check_interface(interface, network, &field, causes);
        let address = interface.mac_address.as_deref().map(|mac| mac.to_ascii_lowercase().replace('-', ":"));
        if let Some(address) = address.filter(|address| !address.is_empty())
            && !addresses.insert(address)
        {
            let field = format!("{field}.macAddress");
            causes.push(Cause::duplicate(&field, format!("{field} is used by another interface of this VMI")));
        }
    }
}

fn check_interface(interface: &Interface, network: Option<&Network>, field: &str, causes: &mut Vec<Cause>) {
    match (&interface.masquerade, &interface.bridge) {
        (None, None) => {
            let text = format!("{field} must have a binding: masquerade or bridge");
            causes.push(Cause::required(field, text));
        }
        (Some(_), Some(_)) => causes.push(Cause::invalid(field, format!("{field} must have only one binding"))),
        (Some(_), None) if network.is_some_and(|network| network.pod.is_none()) => {
            let text = "Masquerade interface only implemented with pod network";
            causes.push(Cause::invalid(format!("{field}.name"), text));
        }
        _ => {}
    }
    one_of(interface.model.as_deref().unwrap_or_default(), &INTERFACE_MODELS, &format!("{field}.model"), causes);
    if let Some(mac) = interface.mac_address.as_deref().filter(|mac| !mac.is_empty())
        && let Err(why) = check_mac(mac)
    {
        let text = format!("interface {field}.name has {why} MAC address ({mac}).");
        causes.push(Cause::invalid(format!("{field}.macAddress"), text));
    }
    let mut names = BTreeSet::new();
    for (index, port) in interface.ports.iter().enumerate() {
        let field = format!("{field}.ports[{index}]");
        if !(1..=65535).contains(&port.port) {
            let text = format!("Port field must be in range 0 < x < 65536 for {field}.port");
            causes.push(Cause::invalid(format!("{field}.port"), text));
        }
        if port.protocol.as_deref().is_some_and(|protocol| !matches!(protocol, "" | "TCP" | "UDP")) {
            causes.push(Cause::invalid(format!("{field}.protocol"), "Unknown protocol, only TCP or UDP allowed"));
        }
        if let Some(name) = port.name.as_deref().filter(|name| !name.is_empty())
            && !names.insert(name)
        {
            let text = format!("Duplicate name of the port: {name}");
            causes.push(Cause::duplicate(format!("{field}.name"), text));
        }
    }
}

/// Why a text is no address that an interface can have, in a word.
fn check_mac(mac: &str) -> Result<(), &'static str> {
    let separator = if mac.contains('-') { '-' } else { ':' };
    let bytes: Vec<&str> = mac.split(separator).collect();
    let hex = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
    if bytes.len() != 6 || !bytes.iter().all(hex) {
        return Err(if bytes.iter().all(hex) { "too long or too short" } else { "malformed" });
    }
    let first = bytes.first().and_then(|byte| u8::from_str_radix(byte, 16).ok()).unwrap_or(1);
    if first & 1 == 1 { Err("a multicast") } else { Ok(()) }
}

fn boot_order(devices: &Devices, at: &str, causes: &mut Vec<Cause>) {
    let mut taken = BTreeSet::new();
    let disks = devices.disks.iter().enumerate().map(|(index, disk)| ("disks", index, disk.boot_order));
    let interfaces = devices.interfaces.iter().enumerate().map(|(index, one)| ("interfaces", index, one.boot_order));
    for (list, index, order) in disks.chain(interfaces) {
        let Some(order) = order else { continue };
        let field = format!("{at}.domain.devices.{list}[{index}].bootOrder");
        if order == 0 {
            causes.push(Cause::invalid(&field, format!("{field} must have a boot order > 0, if supplied")));
        } else if !taken.insert(order) {
            let text = format!("Boot order for {field} already set for a different device.");
            causes.push(Cause::invalid(&field, text));
        }
    }
}

/// Names of volumes and networks become names of files, mounts and devices.
fn check_name(name: &str, field: &str, causes: &mut Vec<Cause>) {
    if !is_dns_label(name) {
        let text = format!(
            "{field} '{name}': a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and \
             must start and end with an alphanumeric character"
        );
        causes.push(Cause::invalid(field, text));
    }
}

fn is_dns_label(text: &str) -> bool {
    let ends = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    text.len() <= 63
        && ends(text.bytes().next())
        && ends(text.bytes().last())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// What may go to QEMU's command line as one value: no commas, no spaces.
fn is_word(text: &str) -> bool {
    text.len() <= 64 && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

fn is_uuid(text: &str) -> bool {
    let groups: Vec<&str> = text.split('-').collect();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    lengths == [8, 4, 4, 4, 12] && groups.iter().all(|group| group.bytes().all(|b| b.is_ascii_hexdigit()))
}
