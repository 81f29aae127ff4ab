//! `godwit shim` alone, for the tests.
fn main() -> std::process::ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    godwit_kubelet::shim::main(&args)
}
