//! Which accelerator this machine can really offer.
//!
//! `/dev/kvm` alone says little: inside some clouds it opens and yet emulates each instruction, a thousand times too slow for
//! an operating system. So the question is put to the machine itself: run a loop of 16 million steps under KVM against a
//! deadline that any real KVM keeps by a factor of ten.

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

/// What executes the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The processor itself, through `/dev/kvm`.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Accelerator {
    /// QEMU's name of it.
    pub fn as_str(self) -> &'static str {
        match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        }
    }
}

impl std::fmt::Display for Accelerator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The result of a probe: the choice and why, in a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// What to use.
    pub accelerator: Accelerator,
    /// Why.
    pub reason: String,
}

/// How long QEMU may take until the guest's first instruction; generous, since a busy machine is not a broken one.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How long the loop may take: real KVM needs 5 to 30 ms.
const LOOP_LIMIT: Duration = Duration::from_millis(400);

/// Finds out what this machine can offer, by running a guest for some milliseconds. Takes half a second where KVM does not
/// serve, so ask once for a node and keep the answer.
pub async fn probe(qemu: &Path) -> Probe {
    match try_kvm(qemu).await {
        Ok(reason) => Probe { accelerator: Accelerator::Kvm, reason },
        Err(reason) => Probe { accelerator: Accelerator::Tcg, reason },
    }
}

async fn try_kvm(qemu: &Path) -> Result<String, String> {
    let device = Path::new("/dev/kvm");
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open(device) {
        return Err(format!("/dev/kvm cannot be opened ({error}): guests are translated (TCG)"));
    }
    let rom = RomFile::new().map_err(|e| format!("KVM could not be tried (no file in memory: {e}): TCG is used"))?;
    let mut command = Command::new(qemu);
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc", "-accel", "kvm", "-m", "1M"])
        .arg("-bios")
        .arg(rom.path())
        .args(["-chardev", "stdio,id=out", "-device", "isa-debugcon,iobase=0xe9,chardev=out"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    crate::process::die_with_parent(&mut command);
    let mut child = command.spawn().map_err(|e| format!("{} cannot be started: {e}", qemu.display()))?;
    let Some(mut out) = child.stdout.take() else { return Err("KVM could not be tried (no pipe): TCG is used".into()) };

    let mut first = [0u8; 1];
    let started = tokio::time::timeout(START_LIMIT, out.read_exact(&mut first)).await;
    if !matches!(started, Ok(Ok(_))) {
        let mut said = String::new();
        let _ = child.start_kill();
        if let Some(stderr) = child.stderr.take() {
            let _ = stderr.take(4096).read_to_string(&mut said).await;
        }
        let _ = child.wait().await;
        let said = said.lines().last().unwrap_or("the guest did not begin to run").to_string();
        return Err(format!("KVM does not work here ({said}): guests are translated (TCG)"));
    }
    let begin = std::time::Instant::now();
    match tokio::time::timeout(LOOP_LIMIT, child.wait()).await {
        // isa-debug-exit ends QEMU with (value << 1) | 1, and the loop writes 0.
        Ok(Ok(status)) if status.code() == Some(1) => {
            Ok(format!("KVM works: a loop of 16 million steps took {} ms", begin.elapsed().as_millis()))
        }
        Ok(_) => Err("KVM does not work here (the test guest ended wrongly): guests are translated (TCG)".into()),
        Err(_) => {
            let _ = child.start_kill();
            let _ = child.wait().await;
            Err(format!(
                "/dev/kvm opens but is too slow for ordinary guests (16 million steps did not finish in {} ms): guests are \
                 translated (TCG)",
                LOOP_LIMIT.as_millis()
            ))
        }
    }
}

/// The loop as a 64 KiB firmware image in a file without a name: nothing is left of it, however this process ends.
struct RomFile(File);

impl RomFile {
    fn new() -> std::io::Result<Self> {
        let mut file = File::from(memfd_create("kvm-probe", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(&loop_rom())?;
        Ok(Self(file))
    }

    /// Where others find it as long as this process has it. (It is not inherited, so QEMU opens it as this process's.)
    fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }
}

/// Machine code by hand, so that the product needs no assembler to be built. It goes to 32-bit mode first, because old
/// processors let KVM emulate real mode, and that would look like a KVM that is too slow.
fn loop_rom() -> Vec<u8> {
    const REAL_MODE: &[u8] = &[
        0xfa, // cli
        0x2e, 0x66, 0x0f, 0x01, 0x16, 0x60, 0x00, // lgdtl %cs:0x60
        0x0f, 0x20, 0xc0, // mov %cr0, %eax
        0x0c, 0x01, // or $1, %al
        0x0f, 0x22, 0xc0, // mov %eax, %cr0
        0x66, 0xea, 0x20, 0x00, 0xff, 0xff, 0x08, 0x00, // ljmpl $0x08, $0xffff0020
    ];
    const PROTECTED_MODE: &[u8] = &[
        0xb0, 0x41, // mov $'A', %al
        0xe6, 0xe9, // out %al, $0xe9
        0xb9, 0x00, 0x00, 0x00, 0x01, // mov $0x1000000, %ecx
        0x49, // 1: dec %ecx
        0x75, 0xfd, // jnz 1b
        0x30, 0xc0, // xor %al, %al
        0xe6, 0xf4, // out %al, $0xf4
        0xf4, // hlt
    ];
    const GDT: &[u8] = &[
        0, 0, 0, 0, 0, 0, 0, 0, // the null descriptor
        0xff, 0xff, 0, 0, 0, 0x9b, 0xcf, 0, // flat code, accessed bit set since the table is in ROM
    ];
    let gdt_pointer: &[u8] = &[0x0f, 0x00, 0x70, 0x00, 0xff, 0xff]; // limit 15, base 0xffff0070
    let mut rom = vec![0xf4u8; 0x10000];
    let mut put = |at: usize, bytes: &[u8]| rom[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, REAL_MODE);
    put(0x20, PROTECTED_MODE);
    put(0x60, gdt_pointer);
    put(0x70, GDT);
    put(0xfff0, &[0xe9, 0x0d, 0x00]); // the reset vector: jmp to offset 0 (0xfff3 + 0x000d wraps)
    rom
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_qemu_means_tcg_and_says_why() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let probe = runtime.block_on(probe(Path::new("/nonexistent/qemu")));
        assert_eq!(probe.accelerator, Accelerator::Tcg);
        assert!(probe.reason.contains("/nonexistent/qemu") || probe.reason.contains("/dev/kvm"), "{}", probe.reason);
    }

    #[test]
    fn the_loop_rom_ends_qemu_as_expected_under_tcg() {
        let rom = RomFile::new().unwrap();
        let status = std::process::Command::new(crate::process::find_qemu().expect("QEMU; `make deps` installs it"))
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc", "-accel", "tcg", "-m", "1M"])
            .arg("-bios")
            .arg(rom.path())
            .args(["-chardev", "null,id=out", "-device", "isa-debugcon,iobase=0xe9,chardev=out"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(1));
    }

    #[test]
    fn nothing_is_left_of_the_rom_whatever_ends_the_process() {
        let rom = RomFile::new().unwrap();
        let file = std::fs::read_link(rom.path()).unwrap();
        assert!(file.starts_with("/memfd:kvm-probe (deleted)"), "{}", file.display());
        assert_eq!(std::fs::read(rom.path()).unwrap(), loop_rom());
    }
}
