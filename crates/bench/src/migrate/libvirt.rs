//! A libvirtd of our own for each host. What it has of the file system, of host names and of processes is its own; so it neither
//! sees nor changes a libvirt that the machine may run already, and nothing of it outlives the benchmark.

use super::Error;
use super::lab::command_in;
use godwit_network::Namespace;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::{Child, ChildStdin, Command};

/// How long a daemon may take until it answers: first it starts each QEMU that it knows and asks what that one can do.
const START: Duration = Duration::from_secs(60);
/// How long a command that is not measured may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the daemon and its QEMUs may take to end.
const END: Duration = Duration::from_secs(10);

/// The first process of a daemon's namespaces: with it everything in them ends, and it ends when its standard input does.
/// `$1`: libvirtd, `$2`: the host's folder, `$3`: the host's name.
const KEEPER: &str = r#"
set -e
mount -t tmpfs tmpfs /run
for folder in /var/lib /var/cache /var/log; do
    if [ -d "$folder/libvirt" ]; then folder=$folder/libvirt; fi
    mount -t tmpfs tmpfs "$folder"
done
mkdir /run/host
mount --bind "$2/run" /run/host
mount --bind "$2/etc" /etc/libvirt
mount --bind "$2/hosts" /etc/hosts
echo "$3" > /proc/sys/kernel/hostname
exec 3<&0
"$1" --config /etc/libvirt/libvirtd.conf --pid-file /run/libvirtd.pid < /dev/null &
daemon=$!
trap 'exit 0' TERM
(read -r _ <&3 || true; kill -TERM 1) &
wait "$daemon"
"#;

/// The programs of an installation.
#[derive(Clone, Debug)]
pub struct Programs {
    virsh: PathBuf,
    libvirtd: PathBuf,
    unshare: PathBuf,
}

impl Programs {
    /// Finds them, or says which are not there.
    pub fn find() -> Result<Self, String> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders: Vec<PathBuf> = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).collect();
        let find =
            |name: &'static str| folders.iter().map(|folder| folder.join(name)).find(|file| file.is_file()).ok_or(name);
        let found = [find("virsh"), find("libvirtd"), find("unshare")];
        let missing: Vec<&str> = found.iter().filter_map(|one| one.as_ref().err().copied()).collect();
        match found {
            [Ok(virsh), Ok(libvirtd), Ok(unshare)] => Ok(Self { virsh, libvirtd, unshare }),
            _ => Err(format!("libvirt is not installed here (no {})", missing.join(", no "))),
        }
    }

    /// libvirt's version.
    pub fn version(&self) -> Option<String> {
        let output = std::process::Command::new(&self.virsh).arg("--version").output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

/// A host with a libvirtd.
#[derive(Debug)]
pub struct Host {
    programs: Programs,
    namespace: Namespace,
    folder: PathBuf,
    keeper: Child,
    /// Its end is the keeper's.
    hold: Option<ChildStdin>,
}

impl Host {
    /// Starts the daemon in the network namespace of host `number` (from 0), with its files in `folder`.
    pub async fn start(
        programs: Programs,
        number: usize,
        namespace: Namespace,
        folder: PathBuf,
    ) -> Result<Self, Error> {
        let name = format!("bench-host{number}");
        configure(&folder, &name, number).map_err(|e| Error::io(format!("write {}", folder.display()), e))?;
        let log = std::fs::File::create(folder.join("log")).map_err(|e| Error::io("make libvirtd's log", e))?;
        let errors = log.try_clone().map_err(|e| Error::io("make libvirtd's log", e))?;
        let mut command = command_in(&namespace, &programs.unshare);
        command
            .args(["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", KEEPER, "sh"])
            .args([programs.libvirtd.as_os_str(), folder.as_os_str(), name.as_ref()])
            .stdin(Stdio::piped())
            .stdout(log)
            .stderr(errors);
        let mut keeper = command.spawn().map_err(|e| Error::io("start libvirtd", e))?;
        let hold = keeper.stdin.take();
        Ok(Self { programs, namespace, folder, keeper, hold })
    }

    /// Waits until the daemon knows what this QEMU can do, which it would otherwise find out during the first migration.
    pub async fn ready(&mut self, qemu: &Path, accelerator: &str) -> Result<(), Error> {
        let deadline = Instant::now() + START;
        let qemu = qemu.to_string_lossy();
        let ask = ["domcapabilities", "--virttype", accelerator, "--machine", "q35", "--emulatorbin", qemu.as_ref()];
        loop {
            let error = match self.virsh(&ask).await {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            if self.keeper.try_wait().ok().flatten().is_some() || Instant::now() > deadline {
                let log = std::fs::read(self.folder.join("log")).unwrap_or_default();
                let log = String::from_utf8_lossy(&log);
                let said = log.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
                return Err(Error::Libvirt(format!("libvirtd does not answer as expected ({error}); its log: {said}")));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Where clients find the daemon.
    pub fn uri(&self) -> String {
        format!("qemu:///system?socket={}", self.shared("libvirt-sock").display())
    }

    /// A file that the daemon and its QEMUs know as `/run/host/…`.
    pub fn shared(&self, name: &str) -> PathBuf {
        self.folder.join("run").join(name)
    }

    /// A client of the daemon, which runs on this host.
    pub fn client(&self) -> Command {
        let mut command = command_in(&self.namespace, &self.programs.virsh);
        command.args(["-q", "-c", &self.uri()]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// What virsh says to a command.
    pub async fn virsh(&self, arguments: &[&str]) -> Result<String, Error> {
        let what = arguments.first().copied().unwrap_or_default();
        let output = tokio::time::timeout(PATIENCE, self.client().args(arguments).output());
        let output = output.await.map_err(|_| Error::Libvirt(format!("no answer to `virsh {what}`")))?;
        let output = output.map_err(|e| Error::io("start virsh", e))?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(Error::Libvirt(format!("`virsh {what}`: {}", complaint(&output.stderr))))
        }
    }

    /// Ends the daemon and all of its QEMUs, and waits for that.
    pub async fn end(mut self) {
        drop(self.hold.take());
        let _ = tokio::time::timeout(END, self.keeper.wait()).await;
    }
}

/// What virsh complains about, in one line.
pub fn complaint(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> =
        text.lines().map(|line| line.trim().trim_start_matches("error: ")).filter(|line| !line.is_empty()).collect();
    lines.join("; ")
}

fn configure(folder: &Path, name: &str, number: usize) -> std::io::Result<()> {
    for inner in ["run", "etc"] {
        std::fs::create_dir_all(folder.join(inner))?;
    }
    // Two daemons of the same host would refuse to migrate to each other.
    let libvirtd = format!(
        "unix_sock_dir = \"/run/host\"\nauth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\n\
         host_uuid = \"9a1c7a06-5f0e-4c55-8a44-0000000000{number:02}\"\n"
    );
    // No confinement, as ours has none here: the guest's kernel is in a folder of the user's.
    let qemu = "user = \"root\"\ngroup = \"root\"\nsecurity_driver = \"none\"\nnamespaces = []\ncgroup_controllers = []\n\
                dynamic_ownership = 0\nremember_owner = 0\nstdio_handler = \"file\"\n";
    std::fs::write(folder.join("etc/libvirtd.conf"), libvirtd)?;
    std::fs::write(folder.join("etc/qemu.conf"), qemu)?;
    // It looks its own name up again and again.
    std::fs::write(folder.join("hosts"), format!("127.0.0.1 localhost {name}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_one_line() {
        let said = b"error: Failed to create domain\nerror: no such file\n\n";
        assert_eq!(complaint(said), "Failed to create domain; no such file");
    }
}
