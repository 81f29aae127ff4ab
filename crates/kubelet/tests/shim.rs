//! Containers under a real shim. Needs root and /bin/busybox (Debian package busybox-static).
#![allow(clippy::unwrap_used)] // a test fails by it

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use godwit_kubelet::spec::{self, ContainerSpec, Exit, Mount, Root, Running, Started};

/// A folder like a container's, with an image that has nothing but busybox.
struct Scratch {
    folder: tempfile::TempDir,
    child: Option<Child>,
}

impl Scratch {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        for name in ["bin", "etc"] {
            fs::create_dir_all(image.join(name)).unwrap();
        }
        fs::copy("/bin/busybox", image.join("bin/busybox")).unwrap();
        for name in ["sh", "cat", "id", "hostname", "pwd", "sleep", "ls", "touch", "echo", "ps", "env", "dd"] {
            std::os::unix::fs::symlink("/bin/busybox", image.join("bin").join(name)).unwrap();
        }
        fs::write(image.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nbob:x:77:78::/home/bob:/bin/sh\n").unwrap();
        std::os::unix::fs::symlink("/etc", image.join("trap")).unwrap();
        fs::create_dir(folder.path().join("c")).unwrap();
        Self { folder, child: None }
    }

    fn container(&self) -> PathBuf {
        self.folder.path().join("c")
    }

    fn spec(&self, args: &[&str]) -> ContainerSpec {
        ContainerSpec {
            id: "test".into(),
            attempt: 0,
            folder: self.container(),
            root: Root::Image { lower: self.folder.path().join("image") },
            read_only_root: false,
            hostname: "pod-1".into(),
            network: None,
            host_pid: false,
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            env: vec![("GREETING".into(), "hello".into())],
            cwd: "/".into(),
            user: String::new(),
            group: None,
            groups: Vec::new(),
            mounts: Vec::new(),
            devices: Vec::new(),
            loops: Vec::new(),
            cgroups: Vec::new(),
            capabilities: Some(vec![0, 1, 3, 5, 6, 7]),
            runtime_seccomp: false,
            no_new_privileges: true,
            termination_log: "/dev/termination-log".into(),
        }
    }

    fn start(&mut self, spec: &ContainerSpec) -> Started {
        spec::write(&self.container(), spec::SPEC, spec).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_shim-for-tests"))
            .arg(self.container())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        self.child = Some(child);
        serde_json::from_str(&line).unwrap()
    }

    fn end(&mut self) -> Exit {
        self.child.take().unwrap().wait().unwrap();
        spec::read(&self.container(), spec::EXIT).unwrap()
    }

    /// Runs to the end; what was written to both streams, and the exit. The streams are two pipes: what order their lines
    /// have among each other is chance, so a script that cares joins them itself.
    fn run(&mut self, spec: &ContainerSpec) -> (String, Exit) {
        let started = self.start(spec);
        let exit = self.end();
        assert!(matches!(started, Started::Running(_)), "{started:?}");
        let log = fs::read_to_string(self.container().join(spec::LOG)).unwrap();
        let text = log.lines().map(|line| line.splitn(4, ' ').nth(3).unwrap()).collect::<Vec<_>>().join("\n");
        (text, exit)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            if let Some(running) = spec::read::<Running>(&self.folder.path().join("c"), spec::STATE) {
                let _ = Command::new("/bin/busybox").args(["kill", "-9", &running.main.pid.to_string()]).status();
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn programs_run_in_their_own_world() {
    let mut scratch = Scratch::new();
    let script = "echo $GREETING $HOME; hostname; pwd; id -u; ps | /bin/busybox wc -l; ls /dev/null /proc/self/exe; \
                  echo over >&2; echo done > /dev/termination-log; exit 3";
    let (text, exit) = scratch.run(&scratch.spec(&["sh", "-c", script]));
    assert_eq!((exit.exit_code, exit.reason.as_str(), exit.signal), (3, "Error", None), "{text}");
    let lines: Vec<&str> = text.lines().filter(|line| *line != "over").collect();
    assert_eq!(lines[..4], ["hello /root", "pod-1", "/", "0"], "{text}");
    assert!(lines[4].parse::<u32>().unwrap() <= 5, "sees the machine's processes: {text}");
    assert!(text.contains("over"));
    assert_eq!(fs::read_to_string(scratch.container().join(spec::TERMINATION_LOG)).unwrap(), "done\n");
}

#[test]
fn the_runtimes_profile_refuses_what_reaches_beyond_a_container() {
    let script = "exec 2>&1; /bin/busybox unshare -U true && echo a user namespace; \
                  /bin/busybox unshare -i true && echo an ipc namespace; /bin/busybox grep Seccomp: /proc/self/status";
    let told = |change: fn(&mut ContainerSpec)| {
        let mut scratch = Scratch::new();
        let mut spec = scratch.spec(&["sh", "-c", script]);
        change(&mut spec);
        let (text, exit) = scratch.run(&spec);
        assert_eq!(exit.exit_code, 0, "{text}");
        text
    };
    let free = told(|_| {});
    assert!(free.contains("a user namespace") && free.contains("Seccomp:\t0"), "{free}");
    let confined = told(|spec| spec.runtime_seccomp = true);
    assert!(!confined.contains("a user namespace") && confined.contains("Operation not permitted"), "{confined}");
    assert!(confined.contains("Seccomp:\t2"), "{confined}");
    // With the capability that they belong to they are given back.
    let trusted = told(|spec| (spec.runtime_seccomp, spec.capabilities) = (true, Some(vec![21])));
    assert!(trusted.contains("an ipc namespace") && trusted.contains("Seccomp:\t2"), "{trusted}");
    // It is in force for who is not root as well.
    let other = told(|spec| (spec.runtime_seccomp, spec.user) = (true, "77".into()));
    assert!(!other.contains("a user namespace") && other.contains("Seccomp:\t2"), "{other}");
}

#[test]
fn the_image_is_not_changed_and_mounts_are_where_they_belong() {
    let mut scratch = Scratch::new();
    let data = scratch.folder.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::set_permissions(&data, fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(data.join("file"), "content\n").unwrap();
    let mut spec = scratch.spec(&[
        "sh",
        "-c",
        "exec 2>&1; cat /var/data/file; touch /var/data/new || echo read-only; touch /rw/new /bin/mark; cat /trap/injected",
    ]);
    let mount =
        |source: &Path, target: &str, read_only| Mount { source: source.into(), target: target.into(), read_only };
    spec.mounts = vec![
        mount(&data, "/var/data", true),
        mount(&data, "/rw", false),
        // `trap` is a link to /etc: of the image, not of the machine.
        mount(&data.join("file"), "/trap/injected", true),
    ];
    let (text, exit) = scratch.run(&spec);
    assert_eq!(exit.exit_code, 0, "{text}");
    assert!(text.starts_with("content\n") && text.ends_with("content") && text.contains("read-only"), "{text}");
    assert!(data.join("new").exists());
    assert!(!scratch.folder.path().join("image/bin/mark").exists());
    assert!(!Path::new("/etc/injected").exists());
    spec.mounts = vec![mount(&data, "/x/../../y", false)];
    assert!(matches!(scratch.start(&spec), Started::Failed(text) if text.contains("..")));
    assert_eq!(scratch.end().reason, "StartError");
}

#[test]
fn users_are_those_of_the_image_and_lose_their_powers() {
    let mut scratch = Scratch::new();
    let mut spec = scratch.spec(&["sh", "-c", "exec 2>&1; id -u; id -g; echo $HOME; touch /bin/x || echo refused"]);
    spec.user = "bob".into();
    let (text, _) = scratch.run(&spec);
    assert!(text.starts_with("77\n78\n/home/bob\n") && text.ends_with("refused"), "{text}");
    spec.user = "nobody-knows".into();
    assert!(matches!(scratch.start(&spec), Started::Failed(text) if text.contains("nobody-knows")));
    scratch.end();
    let spec = scratch.spec(&["sh", "-c", "hostname other || echo refused"]);
    let (text, _) = scratch.run(&spec);
    assert_eq!(text.matches("refused").count(), 2, "root without CAP_SYS_ADMIN: {text}");
}

#[test]
fn devices_are_the_containers_own_and_its_output_is_its_users() {
    let mut scratch = Scratch::new();
    let script = "exec 2>&1; echo again > /dev/stdout; /bin/busybox stat -c '%F %a %u:%g' /dev/vmi-disks/data /extra; \
                  /bin/busybox chown 77 /dev/vmi-disks/data && /bin/busybox stat -c %u /dev/vmi-disks/data";
    let mut spec = scratch.spec(&["sh", "-c", script]);
    let node = scratch.folder.path().join("node");
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o660);
    nix::sys::stat::mknod(&node, nix::sys::stat::SFlag::S_IFBLK, mode, nix::sys::stat::makedev(7, 0)).unwrap();
    fs::set_permissions(&node, fs::Permissions::from_mode(0o660)).unwrap();
    std::os::unix::fs::chown(&node, Some(0), Some(6)).unwrap();
    let device = |target: &str, read_only| Mount { source: node.clone(), target: target.into(), read_only };
    spec.devices = vec![device("/dev/vmi-disks/data", false), device("/extra", true)];
    let (text, exit) = scratch.run(&spec);
    assert_eq!(exit.exit_code, 0, "{text}");
    assert_eq!(text, "again\nblock special file 660 0:6\nblock special file 440 0:6\n77");
    assert_eq!(fs::metadata(&node).unwrap().uid(), 0, "the node's own stays its");
    spec.user = "bob".into();
    let (text, _) = scratch.run(&spec);
    assert!(text.starts_with("again\n"), "{text}");
    spec.devices = vec![device("/x/../extra", false)];
    assert!(matches!(scratch.start(&spec), Started::Failed(text) if text.contains("..")));
    scratch.end();
}

#[test]
fn the_host_image_is_this_machine_with_the_binary() {
    let mut scratch = Scratch::new();
    let binary = scratch.folder.path().join("binary");
    fs::copy("/bin/dash", &binary).unwrap();
    let mut spec = scratch.spec(&[
        "/bin/sh",
        "-c",
        "exec 2>&1; /usr/bin/godwit -c 'echo it runs'; touch /usr/x || touch /etc/x || echo safe; touch /tmp/x /run/x && ls /var/run",
    ]);
    spec.root = Root::Host { binary };
    let sockets = scratch.folder.path().join("sockets");
    fs::create_dir(&sockets).unwrap();
    spec.mounts = vec![Mount { source: sockets, target: "/var/run/kubevirt/sockets".into(), read_only: false }];
    let (text, exit) = scratch.run(&spec);
    assert_eq!(exit.exit_code, 0, "{text}");
    assert!(text.contains("it runs") && text.contains("safe") && text.contains("kubevirt\nx"), "{text}");
    assert!(!Path::new("/run/kubevirt").exists());
}

#[test]
fn what_cannot_be_started_says_why() {
    let mut scratch = Scratch::new();
    for (args, word) in
        [(&["nothing-such"][..], "not found in $PATH"), (&["/etc/passwd"], "ermission"), (&[], "no command")]
    {
        let Started::Failed(text) = scratch.start(&scratch.spec(args)) else { panic!("{args:?} started") };
        assert!(text.contains(word), "{text}");
        let exit = scratch.end();
        assert_eq!((exit.exit_code, exit.reason.as_str()), (128, "StartError"));
    }
}

#[test]
fn all_of_a_container_ends_with_its_first_process() {
    let mut scratch = Scratch::new();
    let Started::Running(running) = scratch.start(&scratch.spec(&["sh", "-c", "sleep 1000 & sleep 1000"])) else {
        panic!("did not start")
    };
    assert!(running.main.is_alive() && running.shim.is_alive());
    assert_eq!(spec::read::<Running>(&scratch.container(), spec::STATE).unwrap(), running);
    // SAFETY-free way to send a signal to exactly this process.
    assert!(
        Command::new("/bin/busybox").args(["kill", "-9", &running.main.pid.to_string()]).status().unwrap().success()
    );
    let exit = scratch.end();
    assert_eq!((exit.exit_code, exit.signal), (137, Some(9)));
    assert!(!running.main.is_alive());
}

#[test]
fn limits_of_control_groups_hold() {
    let mut scratch = Scratch::new();
    let name = format!("gwt{}-limits", std::process::id());
    let groups = godwit_kubelet::cgroup::Group::new(&name);
    let limits = godwit_kubelet::cgroup::Limits { memory_bytes: Some(16 << 20), ..Default::default() };
    let mut spec = scratch.spec(&["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"]);
    spec.cgroups = groups.create(&limits).unwrap();
    assert!(!spec.cgroups.is_empty());
    let (_, exit) = scratch.run(&spec);
    groups.remove();
    assert_eq!((exit.exit_code, exit.reason.as_str()), (137, "OOMKilled"));
    assert!(spec.cgroups.iter().all(|folder| !folder.exists()));
}
