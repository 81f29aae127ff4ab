//! Admission as a user meets it: mutated, then validated.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::testing::{World, vmi, vmim};
use super::*;
use crate::access::CONTROLLER;
use crate::names::{ANNOTATION_REQUESTED_BY, FINALIZER_MIGRATION, FINALIZER_VMI, LABEL_NODE_NAME, LABEL_VMI_NAME};

const SEED_003_MIGRATION: &str = "
apiVersion: kubevirt.io/v1alpha3
kind: VirtualMachineInstanceMigration
metadata:
  name: migration-job
spec:
  vmiName: rhel8-server-nfs
";

fn message(result: Result<(Value, Vec<String>), Box<Denial>>) -> String {
    result.map(|(object, _)| object).unwrap_err().message
}

fn causes(result: Result<(Value, Vec<String>), Box<Denial>>) -> Vec<String> {
    let denial = result.unwrap_err();
    assert_eq!((denial.code, denial.reason.as_str()), (422, "Invalid"));
    denial.causes.into_iter().map(|cause| cause.message).collect()
}

#[test]
fn seed_003_migration_is_taken() {
    let world = World::new(vec![vmi("rhel8-server-nfs")]);
    let object: Value = serde_saphyr::from_str(SEED_003_MIGRATION).unwrap();
    let (object, warnings) = world.create(&object).unwrap();
    assert_eq!(object["metadata"]["finalizers"], json!([FINALIZER_MIGRATION]));
    assert_eq!(object["metadata"]["labels"][LABEL_VMI_NAME], "rhel8-server-nfs");
    assert_eq!(warnings, Vec::<String>::new());
}

#[test]
fn who_asked_is_written_down_and_stays() {
    let mut world = World::new(vec![vmi("a")]);
    let by = |object: &Value| object["metadata"]["annotations"][ANNOTATION_REQUESTED_BY].as_str().map(str::to_owned);
    let mut forged = vmim("m", "a");
    forged["metadata"]["annotations"] = json!({ ANNOTATION_REQUESTED_BY: "somebody else", "kept": "yes" });
    let (old, _) = world.create(&forged).unwrap();
    assert_eq!(by(&old).as_deref(), Some("admin"));
    assert_eq!(old["metadata"]["annotations"]["kept"], "yes");
    world.user.name = "mallory".into();
    for annotations in [json!({ ANNOTATION_REQUESTED_BY: "mallory" }), json!({}), Value::Null] {
        let mut new = old.clone();
        new["metadata"]["annotations"] = annotations;
        let (new, _) = world.admit(Operation::Update, &new, Some(&old)).unwrap();
        assert_eq!(by(&new).as_deref(), Some("admin"));
    }
    // what came before there was such an annotation gets none
    let before = vmim("old", "a");
    let mut new = before.clone();
    new["metadata"]["annotations"] = json!({ ANNOTATION_REQUESTED_BY: "mallory" });
    let (new, _) = world.admit(Operation::Update, &new, Some(&before)).unwrap();
    assert_eq!(by(&new), None);
}

#[test]
fn migrations_that_cannot_be_are_refused_in_kubevirts_words() {
    let at = "admission webhook \"migration-create-validator.kubevirt.io\" denied the request: ";
    let world = World::new(vec![]);
    let denial = world.create(&vmim("m", "none")).unwrap_err();
    assert_eq!(denial.message, format!("{at}the VMI \"default/none\" does not exist"));
    assert_eq!((denial.code, denial.reason.as_str()), (400, "BadRequest"));
    let denial = world.create(&vmim("m", "")).unwrap_err();
    assert_eq!((denial.code, denial.message), (422, format!("{at}vmiName is missing")));

    let mut done = vmi("done");
    done["status"]["phase"] = json!("Failed");
    let mut stuck = vmi("stuck");
    stuck["status"]["conditions"] = json!([
        { "type": "LiveMigratable", "status": "False", "reason": "DisksNotLiveMigratable", "message": "why" }
    ]);
    let mut running = vmim("first", "busy");
    running["metadata"]["labels"] = json!({ LABEL_VMI_NAME: "busy" });
    running["status"] = json!({ "phase": "Running" });
    let mut world = World::new(vec![done, stuck, vmi("busy"), running]);
    assert_eq!(message(world.create(&vmim("m", "done"))), format!("{at}Cannot migrate VMI in finalized state."));
    assert_eq!(
        message(world.create(&vmim("m", "stuck"))),
        format!("{at}Cannot migrate VMI, Reason: DisksNotLiveMigratable, Message: why")
    );
    assert_eq!(
        message(world.create(&vmim("m", "busy"))),
        format!(
            "{at}in-flight migration detected. Active migration job (uid-first) is currently already in progress for VMI \
             busy."
        )
    );
    world.objects[3]["status"]["phase"] = json!("Succeeded");
    assert!(world.create(&vmim("m", "busy")).is_ok());
    let mut urgent = vmim("m", "busy");
    urgent["spec"]["priority"] = json!("system-critical");
    assert!(message(world.create(&urgent)).contains("only virt-controller is allowed"));
    world.user.name = world.installation.user(CONTROLLER);
    assert!(world.create(&urgent).is_ok());
}

#[test]
fn migrations_do_not_change() {
    let world = World::new(vec![vmi("a")]);
    let (old, _) = world.create(&vmim("m", "a")).unwrap();
    let mut new = old.clone();
    new["spec"]["vmiName"] = json!("b");
    assert!(message(world.admit(Operation::Update, &new, Some(&old))).contains("spec is restricted"));
    let mut new = old.clone();
    new["metadata"]["labels"] = json!({});
    assert!(message(world.admit(Operation::Update, &new, Some(&old))).contains("selector label can't be removed"));
    new["metadata"]["labels"] = json!({ LABEL_VMI_NAME: "b" });
    assert!(message(world.admit(Operation::Update, &new, Some(&old))).contains("selector label can't be modified"));
    new["metadata"]["labels"] = old["metadata"]["labels"].clone();
    new["metadata"]["annotations"] = json!({ "a": "b" });
    assert!(world.admit(Operation::Update, &new, Some(&old)).is_ok());
}

#[test]
fn a_vmi_gets_its_defaults() {
    let mut object = vmi("a");
    object["spec"]["domain"]["devices"]["disks"] = json!([{ "name": "root" }]);
    let (object, warnings) = World::new(vec![]).create(&object).unwrap();
    assert_eq!(warnings, Vec::<String>::new());
    assert_eq!(object["metadata"]["finalizers"], json!([FINALIZER_VMI]));
    assert_eq!(object["status"]["phase"], "Pending");
    let spec = &object["spec"];
    assert_eq!(spec["terminationGracePeriodSeconds"], 30);
    assert_eq!(spec["networks"], json!([{ "name": "default", "pod": {} }]));
    let domain = &spec["domain"];
    assert_eq!(domain["devices"]["interfaces"], json!([{ "name": "default", "masquerade": {}, "model": "virtio" }]));
    assert_eq!(domain["devices"]["disks"], json!([{ "name": "root", "disk": { "bus": "sata" } }]));
    assert_eq!(domain["cpu"], json!({ "cores": 1, "sockets": 1, "threads": 1 }));
    assert_eq!(domain["machine"]["type"], "q35");
    assert_eq!(domain["resources"]["requests"]["memory"], "128Mi");
    assert_eq!(domain["firmware"]["uuid"].as_str().unwrap(), crate::derived_firmware_uuid("default", "a"));
    let mut wide = vmi("b");
    wide["spec"]["domain"]["resources"] = json!({ "requests": { "cpu": "1500m" } });
    let (wide, _) = World::new(vec![]).create(&wide).unwrap();
    assert_eq!(wide["spec"]["domain"]["cpu"], json!({ "cores": 1, "sockets": 2, "threads": 1 }));
    // once more changes nothing
    let again = mutate(&World::new(vec![]).request(Operation::Create, Some(&object), None)).unwrap();
    assert_eq!(again.object, object);
}

#[test]
fn a_cpu_model_comes_from_the_vmi_the_configuration_or_the_baseline_in_this_order() {
    let given = |configuration: Value, asked: Value| {
        let baseline = json!({ "model": "Westmere", "nodes": 3 });
        let kubevirt = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "KubeVirt",
            "metadata": { "name": "kubevirt", "namespace": "kubevirt" },
            "spec": { "configuration": configuration }, "status": { "cpuBaseline": baseline },
        });
        let mut vmi = vmi("a");
        vmi["spec"]["domain"]["cpu"] = json!({ "model": asked });
        let (vmi, _) = World::new(vec![kubevirt]).create(&vmi).unwrap();
        vmi["spec"]["domain"]["cpu"]["model"].clone()
    };
    assert_eq!(given(json!({}), Value::Null), Value::Null);
    assert_eq!(given(json!({ "cpuBaseline": "Auto" }), Value::Null), "Westmere");
    assert_eq!(given(json!({ "cpuBaseline": "Auto", "cpuModel": "Penryn" }), Value::Null), "Penryn");
    assert_eq!(given(json!({ "cpuBaseline": "Auto" }), json!("host-model")), "host-model");
}

#[test]
fn a_manifest_applied_again_is_the_same_spec() {
    let world = World::new(vec![]);
    let mut manifest = vmi("a");
    let interfaces = json!([{ "name": "default", "masquerade": {} }]);
    manifest["spec"]["domain"]["devices"]["interfaces"] = interfaces.clone();
    manifest["spec"]["networks"] = json!([{ "name": "default", "pod": {} }]);
    let (old, _) = world.create(&manifest).unwrap();
    // What kubectl's merge patch makes of it: the list as the manifest has it, without the defaults of its items.
    let mut new = old.clone();
    new["spec"]["domain"]["devices"]["interfaces"] = interfaces;
    let (kept, _) = world.admit(Operation::Update, &new, Some(&old)).unwrap();
    assert_eq!(kept["spec"], old["spec"]);
}

#[test]
fn a_vmi_belongs_to_its_owners() {
    let mut world = World::new(vec![]);
    let (old, _) = world.create(&vmi("a")).unwrap();
    let mut new = old.clone();
    new["status"]["phase"] = json!("Running");
    let (kept, _) = world.admit(Operation::Update, &new, Some(&old)).unwrap();
    assert_eq!(kept["status"]["phase"], "Pending");
    let mut other = old.clone();
    other["spec"]["domain"]["memory"]["guest"] = json!("1Gi");
    assert_eq!(causes(world.admit(Operation::Update, &other, Some(&old))), ["update of VMI object is restricted"]);
    let mut labelled = old.clone();
    labelled["metadata"]["labels"] = json!({ LABEL_NODE_NAME: "node01" });
    assert!(message(world.admit(Operation::Update, &labelled, Some(&old))).contains("modification of the following"));
    assert!(message(world.create(&labelled)).contains("creation of the following reserved"));
    world.user.name = world.installation.user(CONTROLLER);
    let (written, _) = world.admit(Operation::Update, &new, Some(&old)).unwrap();
    assert_eq!(written["status"]["phase"], "Running");
    assert!(world.admit(Operation::Update, &labelled, Some(&old)).is_ok());
}

#[test]
fn unimplemented_fields_are_named() {
    let world = World::new(vec![]);
    let mut object = vmi("a");
    object["spec"]["domain"]["devices"]["inputs"] = json!([{ "type": "tablet" }]);
    let (_, warnings) = world.create(&object).unwrap();
    assert!(warnings[0].starts_with("spec.domain.devices.inputs: not implemented by godwit, ignored"), "{warnings:?}");
    object["spec"]["domain"]["devices"]["sound"] = json!({});
    assert!(causes(world.create(&object))[0].starts_with("spec.domain.devices.sound: not implemented by godwit, and"));
}

/// Every rule: a change to a good VMI and what is said of it.
#[test]
fn what_cannot_be_is_said_with_its_place() {
    let disks = "/spec/domain/devices/disks";
    let interfaces = "/spec/domain/devices/interfaces";
    let cases: Vec<(&str, Value, &str)> = vec![
        ("/metadata/name", json!("a".repeat(64)), "metadata.name must be no more than 63 characters"),
        ("/spec/domain/memory", json!({}), "no memory requested, at least one of 'spec.domain.memory.guest'"),
        ("/spec/domain/memory/guest", json!("lots"), "spec.domain.memory.guest: \"lots\" is no quantity"),
        ("/spec/domain/memory/guest", json!("1k"), "must be greater than or equal to 1Mi"),
        ("/spec/domain/memory/guest", json!("-1Gi"), "is negative"),
        ("/spec/domain/cpu/cores", json!(1000), "1000 virtual CPUs are more than"),
        ("/spec/domain/cpu/model", json!("max,+vmx"), "spec.domain.cpu.model is no CPU model"),
        ("/spec/domain/machine/type", json!("virt"), "spec.domain.machine.type is not supported: virt"),
        ("/spec/domain/features/apic/enabled", json!(false), "spec.domain.features.apic.enabled"),
        ("/spec/domain/firmware/uuid", json!("x"), "spec.domain.firmware.uuid is no UUID"),
        (
            "/spec/domain/firmware/bootloader",
            json!({ "efi": {} }),
            "spec.domain has EFI SecureBoot enabled. SecureBoot requires SMM, which is currently disabled.",
        ),
        (
            "/spec/domain/firmware/bootloader",
            json!({ "bios": {}, "efi": { "secureBoot": false } }),
            "one of bios and efi",
        ),
        ("/spec/domain/clock", json!({ "utc": {}, "timezone": "UTC" }), "can only have one of utc and timezone"),
        ("/spec/domain/clock/utc/offsetSeconds", json!(i64::MIN), "spec.domain.clock.utc.offsetSeconds -9223"),
        ("/spec/domain/clock/timezone", json!("../shadow"), "spec.domain.clock.timezone is no time zone's name"),
        (
            "/spec/domain/clock/timer/rtc/tickPolicy",
            json!("discard"),
            "timer.rtc.tickPolicy is set with an unrecognized",
        ),
        ("/spec/domain/clock/timer/rtc/track", json!("host"), "timer.rtc.track is set with an unrecognized option"),
        ("/spec/domain/clock/timer/rtc/present", json!(false), "a guest without it is not implemented"),
        ("/spec/domain/firmware/kernelBoot", json!({ "kernelArgs": "quiet" }), "without an external kernel"),
        (
            "/spec/domain/firmware/kernelBoot",
            json!({ "container": { "image": "i" } }),
            "must be defined with at least one of the following: kernelPath, initrdPath",
        ),
        (
            "/spec/domain/firmware/kernelBoot",
            json!({ "container": { "image": "i", "kernelPath": "/../x" } }),
            "must be an absolute path",
        ),
        ("/spec/domain/resources/limits", json!({ "memory": "1Mi" }), "must be equal to or less than the memory limit"),
        ("/spec/domain/resources/requests/cpu", json!("-1"), "must be greater than or equal to 0."),
        ("/spec/evictionStrategy", json!("Fly"), "spec.evictionStrategy is set with an unrecognized option: Fly"),
        ("/spec/hostname", json!("A.b"), "spec.hostname does not conform to the kubernetes DNS_LABEL rules"),
        ("/spec/architecture", json!("arm64"), "spec.architecture arm64 is not implemented"),
        ("/spec/volumes", json!([]), "spec.domain.devices.disks[0].Name 'root' not found."),
        ("/spec/volumes/0", json!({ "name": "root" }), "spec.volumes[0] must have exactly one source type set"),
        ("/spec/volumes/0/name", json!("../root"), "a lowercase RFC 1123 label"),
        ("/spec/volumes/0", json!({ "name": "root", "emptyDisk": { "capacity": "0" } }), "must be greater than 0"),
        (
            "/spec/volumes/0",
            json!({ "name": "root", "cloudInitNoCloud": { "userDataBase64": "%" } }),
            "userDataBase64 is not a valid base64 value.",
        ),
        (
            "/spec/volumes/0",
            json!({ "name": "root", "cloudInitNoCloud": {} }),
            "must have at least one userdatasource or one networkdatasource set.",
        ),
        (
            "/spec/volumes/1",
            json!({ "name": "more", "secret": { "secretName": "s" } }),
            "spec.volumes[1].name 'more' not found in spec.domain.devices.disks.",
        ),
        (
            "/spec/volumes/1",
            json!({ "name": "root", "secret": { "secretName": "s" } }),
            "spec.volumes[0] and spec.volumes[1] must not have the same Name.",
        ),
        (disks, json!([]), "spec.volumes[0].name 'root' not found in spec.domain.devices.disks."),
        (
            disks,
            json!([{ "name": "root", "disk": { "bus": "usb" } }]),
            "disk.bus is set with an unrecognized option: usb",
        ),
        (
            disks,
            json!([{ "name": "root", "cdrom": { "bus": "virtio" } }]),
            "cdrom.bus is set with an unrecognized option",
        ),
        (disks, json!([{ "name": "root", "disk": {}, "cdrom": {} }]), "can only have a single target type defined"),
        (disks, json!([{ "name": "root", "disk": { "readonly": true } }]), "a SATA disk cannot be read-only"),
        (disks, json!([{ "name": "root", "lun": {} }]), "disks[0].lun: not implemented by godwit, and the guest"),
        (disks, json!([{ "name": "root", "serial": "a b" }]), "must be made up of the following characters"),
        (disks, json!([{ "name": "root", "cache": "unsafe" }]), "cache is set with an unrecognized option: unsafe"),
        (disks, json!([{ "name": "root", "bootOrder": 0 }]), "must have a boot order > 0, if supplied"),
        (
            interfaces,
            json!([{ "name": "default", "masquerade": {} }]),
            "spec.domain.devices.interfaces[0].name 'default' not found.",
        ),
        ("/spec/networks", json!([{ "name": "n", "pod": {} }]), "spec.networks[0].name 'n' not found"),
        ("/spec/networks", json!([{ "name": "n" }]), "should have a network type"),
    ];
    let world = World::new(vec![]);
    for (path, value, expected) in cases {
        let mut object = vmi("a");
        set_at(&mut object, path, value.clone());
        let found = causes(world.create(&object));
        assert!(found.iter().any(|text| text.contains(expected)), "{path} = {value}: {expected:?} not in {found:?}");
    }
}

#[test]
fn interfaces_that_cannot_be_are_refused() {
    let cases = [
        (json!({ "masquerade": {}, "macAddress": "de:ad:00:00:be" }), "has too long or too short MAC address"),
        (json!({ "masquerade": {}, "macAddress": "zz:ad:00:00:be:af" }), "has malformed MAC address (zz:"),
        (json!({ "masquerade": {}, "macAddress": "01:ad:00:00:be:af" }), "has a multicast MAC address"),
        (json!({ "masquerade": {}, "bridge": {} }), "must have only one binding"),
        (json!({}), "must have a binding"),
        (json!({ "masquerade": {}, "model": "wifi" }), "model is set with an unrecognized option: wifi"),
        (json!({ "masquerade": {}, "ports": [{ "port": 0 }] }), "Port field must be in range"),
        (json!({ "masquerade": {}, "bootOrder": 1 }), "already set for a different device."),
    ];
    let world = World::new(vec![]);
    for (mut interface, expected) in cases {
        interface["name"] = json!("default");
        let mut object = vmi("a");
        object["spec"]["networks"] = json!([{ "name": "default", "pod": {} }]);
        object["spec"]["domain"]["devices"]["disks"][0]["bootOrder"] = json!(1);
        object["spec"]["domain"]["devices"]["interfaces"] = json!([interface]);
        let found = causes(world.create(&object));
        assert!(found.iter().any(|text| text.contains(expected)), "{expected:?} not in {found:?}");
    }
}

fn set_at(object: &mut Value, path: &str, value: Value) {
    let mut at = object;
    for step in path.trim_start_matches('/').split('/') {
        at = match step.parse::<usize>() {
            Ok(index) => {
                let list = at.as_array_mut().unwrap();
                if index == list.len() {
                    list.push(Value::Null);
                }
                &mut list[index]
            }
            Err(_) => &mut at[step],
        };
    }
    *at = value;
}

fn vm() -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachine",
        "metadata": { "name": "vm", "namespace": "default" },
        "spec": { "runStrategy": "Always", "template": { "metadata": {}, "spec": vmi("vm")["spec"] } },
    })
}

#[test]
fn vms_are_checked_with_their_template() {
    let world = World::new(vec![]);
    let (object, warnings) = world.create(&vm()).unwrap();
    assert_eq!(warnings, Vec::<String>::new());
    assert_eq!(object["spec"]["template"]["spec"]["domain"]["machine"]["type"], "q35");
    assert!(object["spec"]["template"]["spec"].get("networks").is_none());

    let mut bad = vm();
    bad["spec"]["running"] = json!(true);
    assert_eq!(
        causes(world.create(&bad)),
        [
            "Running and RunStrategy are mutually exclusive. Note that Running is deprecated, please use RunStrategy instead"
        ]
    );
    bad["spec"]["runStrategy"] = Value::Null;
    let (_, warnings) = world.create(&bad).unwrap();
    assert_eq!(warnings, ["spec.running is deprecated, please use spec.runStrategy instead."]);
    bad["spec"]["running"] = Value::Null;
    assert_eq!(causes(world.create(&bad)), ["RunStrategy must be specified"]);
    let mut bad = vm();
    bad["spec"]["runStrategy"] = json!("Sometimes");
    assert_eq!(causes(world.create(&bad)), ["Invalid RunStrategy (Sometimes)"]);
    let mut bad = vm();
    bad["spec"]["template"] = Value::Null;
    assert_eq!(causes(world.create(&bad)), ["missing virtual machine template."]);
    let mut bad = vm();
    bad["spec"]["template"]["spec"]["volumes"] = json!([]);
    assert_eq!(causes(world.create(&bad)), ["spec.template.spec.domain.devices.disks[0].Name 'root' not found."]);
    assert!(world.admit(Operation::Update, &object, Some(&object)).is_ok());
    assert!(world.admit(Operation::Update, &bad, Some(&object)).is_err());
    let mut bad = vm();
    bad["spec"]["instancetype"] = json!({ "name": "u1.small" });
    assert!(causes(world.create(&bad))[0].starts_with("spec.instancetype: not implemented"));
}

/// Its KubeVirt object, ConfigMap and accounts are there too; what is in the usual namespace is somebody else's.
#[test]
fn an_installation_elsewhere_heeds_what_is_its_own() {
    let closed = |namespace: &str| {
        json!({
            "apiVersion": "kubevirt.io/v1", "kind": "KubeVirt",
            "metadata": {
                "name": "kubevirt", "namespace": namespace,
                "annotations": { crate::names::ANNOTATION_FEATURE_GATES: "v1alpha3" },
            },
            "spec": { "configuration": { "developerConfiguration": { "disabledFeatureGates": ["LiveMigration"] } } },
        })
    };
    let map = |namespace: &str, gates: &str| {
        json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": { "name": CONFIG_MAP_NAME, "namespace": namespace }, "data": { "feature-gates": gates },
        })
    };
    let mut world = World { installation: Installation::new("elsewhere"), ..World::new(vec![vmi("a")]) };
    let migration = vmim("m", "a");
    world.objects.push(closed("kubevirt"));
    assert!(world.create(&migration).is_ok(), "another one's object");
    world.objects.push(closed("elsewhere"));
    assert!(message(world.create(&migration)).contains("LiveMigration"), "its own");
    world.objects.push(map("kubevirt", "LiveMigration"));
    assert!(world.create(&migration).is_err(), "another one's map");
    world.objects.push(map("elsewhere", "LiveMigration"));
    assert!(world.create(&migration).is_ok(), "its own");
    let mut urgent = migration.clone();
    urgent["spec"]["priority"] = json!("system-critical");
    world.user.name = Installation::USUAL.user(CONTROLLER);
    assert!(world.create(&urgent).is_err(), "an account of the same name elsewhere");
    let (own, _) = world.create(&vmim("m", "a")).unwrap();
    assert_eq!(own["metadata"]["annotations"][ANNOTATION_REQUESTED_BY], json!(world.user.name));
    world.user.name = world.installation.user(CONTROLLER);
    assert!(world.create(&urgent).is_ok());
    let warnings = |namespace: &str| {
        let map = json!({
            "metadata": { "name": CONFIG_MAP_NAME, "namespace": namespace }, "data": { "migrations": "maxAttempts: none" },
        });
        let request = world.request(Operation::Create, Some(&map), None);
        validate(&Request { group: "", kind: "ConfigMap", namespace, ..request }).unwrap().len()
    };
    assert_eq!((warnings("kubevirt"), warnings("elsewhere")), (0, 1));
}

#[test]
fn one_kubevirt_with_possible_settings() {
    let object = |configuration: Value| {
        json!({
            "apiVersion": "kubevirt.io/v1alpha3", "kind": "KubeVirt",
            "metadata": { "name": "kubevirt", "namespace": "kubevirt" }, "spec": { "configuration": configuration },
        })
    };
    // seed 002
    let seed = object(json!({
        "developerConfiguration": { "featureGates": ["LiveMigration"] },
        "migrationConfiguration": {
            "parallelMigrationsPerCluster": 5, "parallelOutboundMigrationsPerNode": 2, "bandwidthPerMigration": "64Mi",
            "completionTimeoutPerGiB": 800, "progressTimeout": 150,
        },
    }));
    let world = World::new(vec![]);
    assert!(world.create(&seed).is_ok());
    assert!(message(World::new(vec![seed.clone()]).create(&seed)).ends_with("Kubevirt is already created"));
    let both = object(json!({ "developerConfiguration": { "featureGates": ["A"], "disabledFeatureGates": ["A"] } }));
    assert_eq!(
        causes(world.admit(Operation::Update, &both, Some(&seed))),
        ["feature gate \"A\" exists on both \"FeatureGates\" and \"DisabledFeatureGates\""]
    );
    let bad = object(json!({ "migrations": { "bandwidthPerMigration": "-1", "progressTimeout": -5 } }));
    assert_eq!(causes(world.admit(Operation::Update, &bad, Some(&seed))).len(), 2);
}

#[test]
fn deletion_and_other_kinds_pass() {
    let world = World::new(vec![]);
    let old = vmim("m", "a");
    assert_eq!(validate(&world.request(Operation::Delete, None, Some(&old))), Ok(Vec::new()));
    assert_eq!(mutate(&world.request(Operation::Delete, None, Some(&old))).unwrap().object, Value::Null);
}

/// Any JSON.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z0-9:/.-]{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z]{1,6}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// All places of an object, as JSON pointers.
fn places(value: &Value, at: String, out: &mut Vec<String>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(key, inner)| places(inner, format!("{at}/{key}"), out)),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(index, inner)| places(inner, format!("{at}/{index}"), out));
        }
        _ => {}
    }
    out.push(at);
}

proptest! {
    /// Whatever stands in whatever place of a good object, admission answers.
    #[test]
    fn nothing_panics(which in 0usize..3, place in any::<prop::sample::Index>(), junk in any_json(), update: bool) {
        let world = World::new(vec![vmi("a"), junk.clone()]);
        let mut object = [vmi("a"), vmim("m", "a"), vm()][which].clone();
        if update {
            object = world.create(&object).map_or(object, |(object, _)| object);
        }
        let old = object.clone();
        let mut all = Vec::new();
        places(&object, String::new(), &mut all);
        let at = place.get(&all).clone();
        if let Some(target) = object.pointer_mut(&at) {
            *target = junk;
        }
        let kind = old["kind"].as_str().unwrap().to_owned();
        let operation = if update { Operation::Update } else { Operation::Create };
        let request = Request { kind: &kind, ..world.request(operation, Some(&object), Some(&old)) };
        let object = mutate(&request).map(|mutation| mutation.object).unwrap_or_default();
        let _ = validate(&Request { object: Some(&object), ..request });
    }

    /// Junk altogether.
    #[test]
    fn junk_does_not_panic(junk in any_json(), which in 0usize..4) {
        let world = World::new(vec![]);
        let kinds = ["VirtualMachineInstance", "VirtualMachine", "VirtualMachineInstanceMigration", "KubeVirt"];
        let request = Request { kind: kinds[which], ..world.request(Operation::Create, Some(&junk), None) };
        let object = mutate(&request).map(|mutation| mutation.object).unwrap_or_default();
        let _ = validate(&Request { object: Some(&object), ..request });
    }
}

#[test]
fn a_network_for_migrations_is_warned_of_where_handlers_do_not_use_it() {
    let node = |name: &str, annotations: Value| json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name, "annotations": annotations } });
    let beat = "2026-11-23T03:00:00Z";
    let uses =
        json!({ "interface": "migration0", "network": "kubevirt/fast", "address": "10.99.0.1", "heartbeat": beat })
            .to_string();
    let uses = json!({ "kubevirt.io/heartbeat": beat, "godwit.io/migration-network": uses });
    let kubevirt = |network: &str| {
        json!({
            "apiVersion": "kubevirt.io/v1", "kind": "KubeVirt",
            "metadata": { "name": "kubevirt", "namespace": "kubevirt" },
            "spec": { "configuration": { "migrations": { "network": network } } },
        })
    };
    let ready = World::new(vec![node("node1", uses.clone())]);
    assert_eq!(ready.create(&kubevirt("fast")).unwrap().1, [""; 0]);
    let half = World::new(vec![node("node1", uses), node("node2", json!({ "kubevirt.io/heartbeat": beat }))]);
    let warnings = half.create(&kubevirt("fast")).unwrap().1;
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("do not use network kubevirt/fast: node2; they do when"), "{warnings:?}");
    // The condition on the object goes on saying it.
    let same = half.admit(Operation::Update, &kubevirt("fast"), Some(&kubevirt("fast")));
    assert_eq!(same.unwrap().1, [""; 0]);
    assert!(causes(ready.create(&kubevirt("Fast Lane")))[0].contains("is no name of a NetworkAttachmentDefinition"));
}
