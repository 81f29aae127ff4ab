use super::*;

fn full() -> Machine {
    let disk = |name: &str, bus| Disk::new(name, format!("/disks/{name},1.img"), bus);
    let mut machine = Machine::new("/run/m", 512, Boot::Firmware);
    machine.disks = vec![disk("a", Bus::Virtio), disk("b", Bus::Sata), disk("c", Bus::Virtio), disk("d", Bus::Scsi)];
    machine.disks[1].kind = DiskKind::CdRom;
    let nic = Nic {
        tap: "tapeth0".into(),
        mac: "02:00:00:00:00:01".into(),
        model: "virtio".into(),
        mtu: Some(1450),
        boot_index: None,
    };
    machine.nics = vec![nic];
    machine
}

fn joined(machine: &Machine) -> String {
    machine.arguments(0).unwrap().join(" ")
}

#[test]
fn devices_have_ids_and_places_of_their_own() {
    let line = joined(&full());
    for part in [
        "virtio-blk-pci,bus=pcie.0,addr=0x10,drive=drive0,id=disk0",
        "ide-cd,bus=sata0.0,drive=drive1,id=disk1",
        "virtio-blk-pci,bus=pcie.0,addr=0x11,drive=drive2,id=disk2",
        "scsi-hd,bus=scsi0.0,channel=0,scsi-id=0,lun=0,drive=drive3,id=disk3",
        "virtio-net-pci,id=nic0,netdev=net0,mac=02:00:00:00:00:01,bus=pcie.0,addr=0x8,host_mtu=1450",
        "file.filename=/disks/a,,1.img",
    ] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
}

#[test]
fn a_target_differs_only_in_where_things_are() {
    let source = full();
    let mut target = full();
    target.monitor = "/run/other".into();
    target.incoming = true;
    let strip = |m: &Machine| {
        let line: Vec<String> = m.arguments(0).unwrap();
        line.into_iter().filter(|a| !a.contains("id=monitor") && a != "-incoming" && a != "defer").collect::<Vec<_>>()
    };
    assert_eq!(strip(&source), strip(&target));
}

#[test]
fn nothing_runs_before_it_is_told_to() {
    let mut machine = full();
    assert!(machine.arguments(0).unwrap().contains(&"-S".to_string()));
    machine.incoming = true;
    assert!(machine.arguments(0).unwrap().contains(&"-S".to_string()));
}

#[test]
fn a_disk_that_came_later_is_built_at_its_place_and_moves_no_other() {
    let mut machine = full();
    let before = joined(&machine);
    let late = Disk { place: Some(2), serial: Some("a,b".into()), bus: Bus::Scsi, ..machine.disks[3].clone() };
    machine.disks.push(late.clone());
    let after = joined(&machine);
    let device = "scsi-hd,bus=scsi0.0,channel=0,scsi-id=0,lun=66,drive=drive102,id=disk102,write-cache=on,serial=a,,b";
    assert!(after.contains(device), "{after}");
    let without = machine.disks.pop().map(|_| joined(&machine));
    assert_eq!(without, Some(before));
    let (node, device) = late.plugging(2).unwrap();
    assert_eq!((&node["node-name"], &node["file"]["filename"]), (&"drive102".into(), &"/disks/d,1.img".into()));
    assert_eq!((&node["read-only"], &node["cache"]["direct"]), (&false.into(), &false.into()));
    assert_eq!((&device["driver"], &device["lun"], &device["serial"]), (&"scsi-hd".into(), &66.into(), &"a,b".into()));
    assert!(late.plugging(PLACES).is_err());
    // Without a SCSI disk from the start there is a controller only where one was asked for.
    machine.disks.clear();
    assert!(!joined(&machine).contains("virtio-scsi"));
    machine.hotplug = true;
    assert!(joined(&machine).contains("virtio-scsi-pci,id=scsi0,bus=pcie.0,addr=0x6"));
}

#[test]
fn what_would_smuggle_in_options_is_refused() {
    let mut machine = full();
    machine.nics[0].mac = "02:00:00:00:00:01,romfile=/etc/shadow".into();
    assert!(matches!(machine.arguments(0), Err(Error::Bad { what: "MAC address", .. })));
    let mut machine = full();
    machine.cpu.model = Some("max,x=y".into());
    assert!(matches!(machine.arguments(0), Err(Error::Bad { what: "CPU model", .. })));
    let mut machine = full();
    machine.disks[0].serial = Some("a,b".into());
    assert!(joined(&machine).contains("serial=a,,b"));
}

#[test]
fn too_many_devices_are_refused_by_kind() {
    let mut machine = full();
    let disk = machine.disks[0].clone();
    machine.disks = vec![disk; 16];
    assert_eq!(machine.arguments(0), Err(Error::TooMany { what: "virtio disks", count: 16, limit: 15 }));
}

#[test]
fn a_flat_image_takes_the_firmwares_place_and_a_kernel_does_not() {
    let folder = std::env::temp_dir().join(format!("godwit-boot-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let write = |name: &str, size: usize, magic: bool| {
        let mut bytes = vec![0u8; size];
        if magic {
            bytes[0x202..0x206].copy_from_slice(b"HdrS");
        }
        let path = folder.join(name);
        std::fs::write(&path, bytes).unwrap();
        boot_of_kernel(path, None, String::new()).unwrap()
    };
    assert!(matches!(write("rom", 64 << 10, false), Boot::Rom(_)));
    assert!(matches!(write("linux", 64 << 10, true), Boot::Kernel { .. }));
    assert!(matches!(write("odd", 1000, false), Boot::Kernel { .. }));
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn hints_of_free_pages_are_a_feature_of_the_balloon_alone() {
    let mut machine = full();
    machine.free_page_hint = true;
    assert!(!joined(&machine).contains("hint"), "no balloon");
    machine.balloon = true;
    let with = joined(&machine);
    assert!(with.contains("-object iothread,id=hints0 -device virtio-balloon-pci,id=balloon0,"), "{with}");
    assert!(with.contains("free-page-hint=on,iothread=hints0,bus=pcie.0,addr=0x4"), "{with}");
    machine.free_page_hint = false;
    let without = joined(&machine);
    assert!(without.contains("virtio-balloon-pci") && !without.contains("hint"), "{without}");
}

#[test]
fn efi_firmware_and_a_tpm_are_told() {
    let mut machine = full();
    let efi = Efi { code: "/ovmf/code".into(), variables: "/my/variables".into(), secure: false };
    machine.efi = Some(efi.clone());
    machine.tpm = Some("/run/tpm".into());
    let line = joined(&machine);
    for part in [
        ",pflash0=firmware-code,pflash1=firmware-variables",
        "node-name=firmware-code,read-only=on,file.driver=file,file.filename=/ovmf/code,file.locking=off",
        "node-name=firmware-variables,read-only=off,file.driver=file,file.filename=/my/variables",
        "socket,id=tpm-control,path=/run/tpm -tpmdev emulator,id=tpm-backend,chardev=tpm-control -device tpm-crb",
    ] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
    assert!(!line.contains("smm") && !line.contains("cfi.pflash01"), "{line}");
    machine.efi = Some(Efi { secure: true, ..efi });
    machine.system_management = Some(true);
    let line = joined(&machine);
    assert!(line.contains(",smm=on") && line.contains("driver=cfi.pflash01,property=secure,value=on"), "{line}");
}

#[test]
fn memory_that_others_can_map_bears_the_name_of_qemus_own() {
    let mut machine = full();
    assert!(!joined(&machine).contains("memory-backend"));
    let memory = GuestMemory::new(512).unwrap();
    machine.shared_memory = Some(memory.clone());
    let line = joined(&machine);
    assert!(line.contains(",memory-backend=pc.ram -accel"), "{line}");
    let object =
        "memory-backend-file,id=pc.ram,x-use-canonical-path-for-ramblock-id=off,size=512M,mem-path=/proc/self/fd/";
    assert!(line.contains(object) && line.contains(",share=on"), "{line}");
    machine.memory_mib = 256;
    assert!(matches!(machine.arguments(0), Err(Error::Bad { what: "memory", .. })));
}

#[test]
fn a_clock_with_an_offset_starts_there() {
    let mut machine = full();
    machine.clock_offset_seconds = 3600;
    assert!(machine.arguments(0).unwrap().join(" ").contains("base=1970-01-01T01:00:00"));
}

#[test]
fn a_screen_has_a_place_of_its_own_and_is_shown_on_a_socket() {
    let mut machine = full();
    let before = joined(&machine);
    assert!(!before.contains("VGA") && !before.contains("-vnc"), "{before}");
    machine.screen = Some("/run/a,b".into());
    let with = joined(&machine);
    assert!(with.contains("-vnc unix:/run/a,,b -device VGA,id=video0,vgamem_mb=8,bus=pcie.0,addr=0x2"), "{with}");
}
