//! What the guest finds itself to be made of: processors, disks, network cards, clocks, TPM and EFI variables. A test compares
//! it before and after a move.

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

/// The register that this life of the guest is measured into: 16 is for debugging, no firmware uses it.
const REGISTER: u8 = 16;
/// An EFI variable of ours; the UUID is its vendor's, made up once.
const VARIABLE: &str = "/sys/firmware/efi/efivars/GodwitLife-5f9b6a0e-1c0e-4d5e-9d53-67c6d1f0b7aa";
/// The files of EFI variables.
const VARIABLES: &str = "/sys/firmware/efi/efivars";
/// How the names of further ones begin, which are written only when the guest is told to: each time a new one, since Linux does not let
/// a variable that it does not know be written again.
const KEPT_VARIABLE: &str = "GodwitKept";
/// The index of the TPM's memory that is written then, of those that are anybody's to define.
const KEPT_INDEX: [u8; 4] = [0x01, 0x80, 0x00, 0x01];
/// Bytes in it.
const KEPT_BYTES: u8 = 48;
/// As much of each disk is read for its sum.
const SUMMED: u64 = 64 << 10;

/// Leaves this life's token where only the machine keeps it: in the TPM and in an EFI variable, where there are such.
pub fn mark(token: &str) {
    if let Err(error) = extend(token) {
        println!("tpm: {error}");
    }
    if let Err(error) = set_variable(token) {
        println!("efi: {error}");
    }
}

/// Everything, as it is at this moment.
pub fn json() -> Value {
    json!({
        "cpus": list("/sys/devices/system/cpu").iter().filter(|name| is_cpu(name)).count(),
        "disks": list("/sys/block").iter().filter_map(|name| disk(name)).collect::<Vec<_>>(),
        "cards": list("/sys/class/net").iter().filter(|name| *name != "lo").map(|name| card(name)).collect::<Vec<_>>(),
        "wallSeconds": seconds(ClockId::CLOCK_REALTIME),
        "rtcSeconds": line("/sys/class/rtc/rtc0/since_epoch").and_then(|text| text.parse::<i64>().ok()),
        "clockSource": line("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "tpmRegister": line(&format!("/sys/class/tpm/tpm0/pcr-sha256/{REGISTER}")),
        "efiVariable": variable(VARIABLE),
        "tpmKept": read_index(),
        "efiKept": kept_variables().last().and_then(|name| variable(&format!("{VARIABLES}/{name}"))),
    })
}

/// Writes this into the TPM's memory and into an EFI variable, where there are such: what a guest expects to find after its machine
/// was off.
pub fn keep(what: &str) {
    if let Err(error) = write_index(what) {
        println!("tpm: {error}");
    }
    let file = format!("{VARIABLES}/{KEPT_VARIABLE}{:04}-5f9b6a0e-1c0e-4d5e-9d53-67c6d1f0b7aa", kept_variables().len());
    if !list(VARIABLES).is_empty()
        && let Err(error) = write_variable(&file, what)
    {
        println!("efi: {error}");
    }
}

fn kept_variables() -> Vec<String> {
    let mut names = list(VARIABLES);
    names.retain(|name| name.starts_with(KEPT_VARIABLE));
    names
}

fn variable(file: &str) -> Option<String> {
    fs::read(file).ok().map(|bytes| text(bytes.get(4..).unwrap_or_default()))
}

/// Puts the wall clock back, as if the guest had stood still so long.
pub fn lag(seconds: i64) -> Result<(), nix::Error> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(now.tv_sec() - seconds, now.tv_nsec()))
}

fn seconds(clock: ClockId) -> Option<i64> {
    clock_gettime(clock).ok().map(|time| time.tv_sec())
}

fn list(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    names
}

fn line(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn is_cpu(name: &str) -> bool {
    let online = || line(&format!("/sys/devices/system/cpu/{name}/online")).is_none_or(|on| on == "1");
    name.strip_prefix("cpu").is_some_and(|number| number.parse::<u32>().is_ok()) && online()
}

/// A disk with its place on the bus, which must be the same after a move.
fn disk(name: &str) -> Option<Value> {
    let folder = format!("/sys/block/{name}");
    let device = fs::canonicalize(format!("{folder}/device")).ok()?;
    let bytes = line(&format!("{folder}/size"))?.parse::<u64>().ok()? * 512;
    let serial = line(&format!("{folder}/serial")).or_else(|| page_80(&device));
    Some(json!({
        "name": name,
        "place": device.to_string_lossy(),
        "bytes": bytes,
        "serial": serial,
        "readOnly": line(&format!("{folder}/ro")).as_deref() == Some("1"),
        "sum": sum(name),
    }))
}

/// A SCSI disk's serial number: page 0x80 of its inquiry data, after four bytes of header.
fn page_80(device: &Path) -> Option<String> {
    let page = fs::read(device.join("vpd_pg80")).ok()?;
    Some(text(page.get(4..)?).trim().to_owned())
}

/// FNV-1a over the beginning of the disk.
fn sum(name: &str) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(format!("/dev/{name}")).ok()?.take(SUMMED).read_to_end(&mut bytes).ok()?;
    let hash = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3);
    Some(format!("{:016x}", bytes.iter().fold(0xCBF2_9CE4_8422_2325, hash)))
}

fn card(name: &str) -> Value {
    let folder = format!("/sys/class/net/{name}");
    let place = fs::canonicalize(format!("{folder}/device")).unwrap_or_default();
    json!({"name": name, "mac": line(&format!("{folder}/address")), "place": place.to_string_lossy()})
}

/// `TPM2_PCR_Extend` of the register with the first 32 bytes of the token (TPM 2.0 library, part 3, 22.2).
fn extend(token: &str) -> Result<(), String> {
    let mut digest = [0_u8; 32];
    digest.iter_mut().zip(token.bytes()).for_each(|(into, byte)| *into = byte);
    // One digest, SHA-256.
    let parameters = [&[0, 0, 0, 1, 0, 0x0b][..], &digest].concat();
    tpm(0x0182, &[0, 0, 0, REGISTER], &parameters).map(drop)
}

/// `TPM2_NV_DefineSpace` (31.3), unless the index is there, and `TPM2_NV_Write` (31.7): the text, and zeros behind it.
fn write_index(what: &str) -> Result<(), String> {
    if read_index().is_none() {
        // Its owner's to define; SHA-256 for its name; anybody reads and writes it, without a lock against guessing.
        let public = [&KEPT_INDEX[..], &[0, 0x0b], &[0x02, 0x04, 0, 0x04], &[0, 0], &[0, KEPT_BYTES]].concat();
        let parameters = [&[0, 0, 0, 14][..], &public].concat();
        tpm(0x012a, &[0x40, 0, 0, 1], &parameters)?;
    }
    let mut bytes = [0_u8; KEPT_BYTES as usize];
    bytes.iter_mut().zip(what.bytes()).for_each(|(into, byte)| *into = byte);
    let parameters = [&[0, KEPT_BYTES][..], &bytes, &[0, 0]].concat();
    tpm(0x0137, &[KEPT_INDEX, KEPT_INDEX].concat(), &parameters).map(drop)
}

/// `TPM2_NV_Read` (31.13): the text before the zeros.
fn read_index() -> Option<String> {
    let answer = tpm(0x014e, &[KEPT_INDEX, KEPT_INDEX].concat(), &[0, KEPT_BYTES, 0, 0]).ok()??;
    // The length of the answer's parameters, and that of the bytes.
    let bytes = answer.get(6..6 + usize::from(KEPT_BYTES))?;
    Some(text(bytes).trim_end_matches('\0').to_owned())
}

/// Has the TPM carry out a command whose first handle needs an empty password: what follows the head of its answer, `None` where there
/// is no TPM.
fn tpm(code: u32, handles: &[u8], parameters: &[u8]) -> Result<Option<Vec<u8>>, String> {
    let Ok(mut tpm) = fs::OpenOptions::new().read(true).write(true).open("/dev/tpm0") else { return Ok(None) };
    // One password session: its length, handle, nonce, attributes and password.
    let session = [0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0];
    let body = [handles, &session, parameters].concat();
    let length = u32::try_from(body.len() + 10).map_err(|error| error.to_string())?;
    let command = [&[0x80, 0x02][..], &length.to_be_bytes(), &code.to_be_bytes(), &body].concat();
    tpm.write_all(&command).map_err(|error| error.to_string())?;
    let mut answer = [0_u8; 256];
    let length = tpm.read(&mut answer).map_err(|error| error.to_string())?;
    match answer.get(6..10) {
        Some([0, 0, 0, 0]) if length >= 10 => Ok(answer.get(10..length).map(<[u8]>::to_vec)),
        refusal => Err(format!("it refuses command {code:04x}: {refusal:02x?}")),
    }
}

fn set_variable(token: &str) -> Result<(), String> {
    if !Path::new("/sys/firmware/efi").exists() {
        return Ok(());
    }
    let none: Option<&str> = None;
    nix::mount::mount(Some("efivarfs"), VARIABLES, Some("efivarfs"), nix::mount::MsFlags::empty(), none)
        .map_err(|error| format!("mounting {VARIABLES}: {error}"))?;
    write_variable(VARIABLE, token)
}

fn write_variable(file: &str, what: &str) -> Result<(), String> {
    // Non-volatile, and seen by boot and run time; it has to be written in one go.
    let bytes = [&[7, 0, 0, 0], what.as_bytes()].concat();
    fs::write(file, bytes).map_err(|error| format!("writing a variable: {error}"))
}
