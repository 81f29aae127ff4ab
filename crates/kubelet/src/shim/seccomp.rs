//! The system calls that a container with the profile `RuntimeDefault` does not get.
//!
//! Container runtimes refuse what reaches beyond a container, and give part of it back with the capability that it belongs to
//! (Docker's documentation lists them, "Seccomp security profiles for Docker"). Theirs are lists of what is allowed, this is one of what
//! is refused: a call that the kernel gets one day is refused there and allowed here.

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

use super::{Failure, failed};

/// Numbers of capabilities (linux/capability.h).
const DAC_READ_SEARCH: u8 = 2;
const SYS_MODULE: u8 = 16;
const SYS_RAWIO: u8 = 17;
const SYS_PTRACE: u8 = 19;
const SYS_PACCT: u8 = 20;
const SYS_ADMIN: u8 = 21;
const SYS_BOOT: u8 = 22;
const SYS_NICE: u8 = 23;
const SYS_TIME: u8 = 25;
const SYSLOG: u8 = 34;
const PERFMON: u8 = 38;
const BPF: u8 = 39;

/// Refused whatever the container has.
const NEVER: &[libc::c_long] = &[
    libc::SYS_add_key,
    libc::SYS_keyctl,
    libc::SYS_request_key,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_userfaultfd,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    libc::SYS_nfsservctl,
    libc::SYS_pivot_root,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_sysfs,
    libc::SYS__sysctl,
    libc::SYS_uselib,
    libc::SYS_ustat,
    libc::SYS_vserver,
];

/// Refused unless the container has one of these capabilities.
const BY_CAPABILITY: &[(&[u8], &[libc::c_long])] = &[
    (&[DAC_READ_SEARCH], &[libc::SYS_open_by_handle_at]),
    (&[SYS_MODULE], &[libc::SYS_init_module, libc::SYS_finit_module, libc::SYS_delete_module]),
    (&[SYS_RAWIO], &[libc::SYS_iopl, libc::SYS_ioperm]),
    (&[SYS_PTRACE], &[libc::SYS_kcmp, libc::SYS_pidfd_getfd]),
    (&[SYS_PACCT], &[libc::SYS_acct]),
    (&[SYS_BOOT], &[libc::SYS_reboot, libc::SYS_kexec_load, libc::SYS_kexec_file_load]),
    (&[SYS_NICE], &[libc::SYS_mbind, libc::SYS_set_mempolicy, libc::SYS_get_mempolicy]),
    (&[SYS_TIME], &[libc::SYS_settimeofday, libc::SYS_clock_settime]),
    (&[SYSLOG, SYS_ADMIN], &[libc::SYS_syslog]),
    (&[PERFMON, SYS_ADMIN], &[libc::SYS_perf_event_open]),
    (&[BPF, SYS_ADMIN], &[libc::SYS_bpf]),
    (
        &[SYS_ADMIN],
        &[
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_open_tree,
            libc::SYS_move_mount,
            libc::SYS_fsopen,
            libc::SYS_fsconfig,
            libc::SYS_fsmount,
            libc::SYS_fspick,
            libc::SYS_mount_setattr,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_quotactl,
            libc::SYS_quotactl_fd,
            libc::SYS_lookup_dcookie,
            libc::SYS_fanotify_init,
            libc::SYS_sethostname,
            libc::SYS_setdomainname,
        ],
    ),
];

/// The bit of a system call's number by which a program of the x32 ABI makes the same calls under other numbers (asm/unistd.h).
const X32: u32 = 0x4000_0000;

/// Flags of clone(2) that make namespaces.
const NAMESPACES: libc::c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWCGROUP;

/// The filter of a container with these capabilities.
fn program(capabilities: &[u8]) -> Result<BpfProgram, seccompiler::BackendError> {
    let has = |any: &[u8]| any.iter().any(|capability| capabilities.contains(capability));
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = NEVER.iter().map(|call| (*call, Vec::new())).collect();
    for (any, calls) in BY_CAPABILITY.iter().filter(|(any, _)| !has(any)) {
        debug_assert!(!any.is_empty());
        rules.extend(calls.iter().map(|call| (*call, Vec::new())));
    }
    if !has(&[SYS_ADMIN]) {
        // The flags are the first argument on x86-64; one bit of them is enough.
        let bits = (0..31).map(|bit| 1 << bit).filter(|bit| NAMESPACES & bit != 0);
        let with = |bit: libc::c_int| {
            let bit = u64::from(bit.unsigned_abs());
            let set = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(bit), bit)?;
            SeccompRule::new(vec![set])
        };
        rules.insert(libc::SYS_clone, bits.map(with).collect::<Result<_, _>>()?);
    }
    let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let listed: BpfProgram = SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::x86_64)?.try_into()?;
    Ok(no_x32().into_iter().chain(listed).collect())
}

/// Refuses the calls of the x32 ABI, which has the architecture of x86-64 and numbers that no rule knows.
fn no_x32() -> [sock_filter; 3] {
    let step = |code: u32, jf, k| sock_filter { code: u16::try_from(code).unwrap_or_default(), jt: 0, jf, k };
    [
        // The number comes first in `struct seccomp_data`.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 1, X32),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs()),
    ]
}

/// The arguments of clone3(2) are in memory, where no filter sees them. To whoever asks it is a call that this kernel has not, so that the
/// older one is used.
fn without_clone3(capabilities: &[u8]) -> Result<Option<BpfProgram>, seccompiler::BackendError> {
    if capabilities.contains(&SYS_ADMIN) {
        return Ok(None);
    }
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let unknown = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, unknown, TargetArch::x86_64)?.try_into().map(Some)
}

/// Puts the calling process, and all that it becomes, under the filter. Without `no_new_privs` it needs CAP_SYS_ADMIN.
pub(super) fn confine(capabilities: &[u8]) -> Result<(), Failure> {
    let make = failed::<seccompiler::BackendError>("make the seccomp filter");
    let main = program(capabilities).map_err(make)?;
    let clone3 = without_clone3(capabilities).map_err(failed("make the seccomp filter"))?;
    for filter in clone3.iter().chain([&main]) {
        install(filter).map_err(failed("set the seccomp filter (profile RuntimeDefault)"))?;
    }
    Ok(())
}

/// The crate's own way of doing this sets `no_new_privs` as well, which a container has to ask for.
fn install(filter: &BpfProgram) -> std::io::Result<()> {
    let len = u16::try_from(filter.len()).map_err(std::io::Error::other)?;
    let program = libc::sock_fprog { len, filter: filter.as_ptr().cast::<libc::sock_filter>().cast_mut() };
    // SAFETY: the program is `len` instructions long and lives through the call, which only reads it; both types of an instruction are
    // C's `struct sock_filter`.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if set == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

const _: () = assert!(size_of::<seccompiler::sock_filter>() == size_of::<libc::sock_filter>());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_under_its_x32_number_is_refused() {
        // The filter is the thread's own.
        let refused = std::thread::spawn(|| {
            confine(&[]).unwrap();
            let number = libc::c_long::from(X32) | libc::SYS_getpid;
            // SAFETY: a call without arguments that changes nothing.
            let answer = unsafe { libc::syscall(number) };
            (answer, nix::errno::Errno::last(), std::process::id())
        });
        let (answer, errno, pid) = refused.join().unwrap();
        assert_eq!((answer, errno), (-1, nix::errno::Errno::EPERM));
        assert_eq!(pid, std::process::id(), "under its own number it is allowed");
    }
}
