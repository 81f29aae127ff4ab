//! Assembles `guests/rom/rom.S` with GNU binutils, which any machine that links Rust has.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    let source =
        PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../../guests/rom/rom.S");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    println!("cargo:rerun-if-changed={}", source.display());
    let (object, image) = (out.join("rom.o"), out.join("rom.bin"));
    run(Command::new("as").arg("--32").arg("-o").arg(&object).arg(&source));
    run(Command::new("ld")
        .args(["-m", "elf_i386", "--oformat", "binary", "-Ttext", "0xffff0000", "-e", "start", "-o"])
        .arg(&image)
        .arg(&object));
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|e| panic!("{command:?} cannot be started (package binutils): {e}"));
    assert!(status.success(), "{command:?} failed");
}
