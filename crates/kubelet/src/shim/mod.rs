//! The supervisor of one container: a process of its own, so that the container outlives the kubelet and its end is known.
//!
//! It starts the program in fresh namespaces, writes its output to the log, waits for its end and writes that down. The
//! program is the first process of a process namespace: when it ends, the kernel ends whatever it has left behind.

mod log;
mod mounts;
mod rootfs;
mod seccomp;

use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigHandler, Signal};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Gid, Pid, Uid};

use crate::loops;
use crate::spec::{self, ContainerSpec, EXIT, Exit, Process, Running, SPEC, STATE, Started};

/// What went wrong while a container was being started, for its status.
type Failure = String;

/// `godwit shim <container folder>`. Must be called before the process has a second thread.
pub fn main(args: &[OsString]) -> ExitCode {
    let Some(folder) = args.first() else {
        eprintln!("godwit shim is started by a kubelet, with the folder of a container");
        return ExitCode::from(2);
    };
    let Some(spec) = spec::read::<ContainerSpec>(Path::new(folder), SPEC) else {
        say(&Started::Failed(format!("no readable {SPEC} in {}", folder.display())));
        return ExitCode::from(2);
    };
    // It ends when its container does, and not when somebody asks.
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGPIPE] {
        // SAFETY: ignoring a signal installs no handler.
        let _ = unsafe { nix::sys::signal::signal(signal, SigHandler::SigIgn) };
    }
    let exit = supervise(&spec).unwrap_or_else(|message| {
        say(&Started::Failed(message.clone()));
        Exit {
            attempt: spec.attempt,
            exit_code: 128,
            signal: None,
            reason: "StartError".into(),
            message: Some(message),
            started_at: Some(spec::now()),
            finished_at: spec::now(),
        }
    });
    match spec::write(&spec.folder, EXIT, &exit) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Tells the kubelet how the start went and leaves the pipe to it.
fn say(started: &Started) {
    if let Ok(mut line) = serde_json::to_vec(started) {
        line.push(b'\n');
        let _ = std::io::stdout().write_all(&line);
    }
    let _ = std::io::stdout().flush();
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(&null);
    }
}

fn failed<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> Failure {
    move |error| format!("{what}: {error}")
}

fn supervise(spec: &ContainerSpec) -> Result<Exit, Failure> {
    let mut log = log::Log::open(&spec.folder).map_err(failed("open the log"))?;
    // For as long as this process lives.
    let held = |wanted: &spec::Loop| loops::hold(&wanted.device, &wanted.file);
    let _loops: Vec<_> = spec.loops.iter().map(held).collect::<Result<_, _>>().map_err(failed("hold a loop device"))?;
    if let Some(network) = &spec.network {
        let file = File::open(network).map_err(failed(format!("open network namespace {}", network.display())))?;
        setns(file, CloneFlags::CLONE_NEWNET).map_err(failed("enter the pod's network namespace"))?;
    }
    if !spec.host_pid {
        // For the child that follows.
        unshare(CloneFlags::CLONE_NEWPID).map_err(failed("make a process namespace"))?;
    }
    let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(failed::<nix::Error>("make a pipe"));
    let (output, error, report) = (pipe()?, pipe()?, pipe()?);
    let killed_before = out_of_memory_kills(spec);

    // SAFETY: the process has one thread, so the child may do what it likes before it executes the program.
    let child = match unsafe { nix::unistd::fork() }.map_err(failed("start a process"))? {
        ForkResult::Child => {
            drop((output.0, error.0, report.0));
            let message = match become_container(spec, &output.1, &error.1) {
                Ok(never) => match never {},
                Err(message) => message,
            };
            let _ = File::from(report.1).write_all(message.as_bytes());
            // SAFETY: ends the process at once, without running what the parent has registered.
            unsafe { nix::libc::_exit(128) }
        }
        ForkResult::Parent { child } => child,
    };
    drop((output.1, error.1, report.1));
    let mut message = String::new();
    let _ = File::from(report.0).read_to_string(&mut message);
    if !message.is_empty() {
        let _ = waitpid(child, None);
        return Err(message);
    }

    let started_at = spec::now();
    let own = Process::of(nix::unistd::getpid().as_raw()).ok_or("/proc is not readable")?;
    // It may be gone by now; then its number alone must do.
    let main = Process::of(child.as_raw()).unwrap_or(Process { pid: child.as_raw(), start: 0 });
    let running = Running { attempt: spec.attempt, shim: own, main, started_at: started_at.clone() };
    spec::write(&spec.folder, STATE, &running).map_err(failed("write the state"))?;
    let _ = fs::write(spec.folder.join("pid"), format!("{}\n", child.as_raw()));
    say(&Started::Running(running));

    log.follow(output.0, error.0);
    let status = wait(child);
    let (exit_code, signal) = match status {
        Some(WaitStatus::Exited(_, code)) => (code, None),
        Some(WaitStatus::Signaled(_, signal, _)) => (128 + signal as i32, Some(signal as i32)),
        _ => (255, None),
    };
    let reason = match exit_code {
        0 => "Completed",
        _ if out_of_memory_kills(spec) > killed_before => "OOMKilled",
        _ => "Error",
    };
    Ok(Exit {
        attempt: spec.attempt,
        exit_code,
        signal,
        reason: reason.into(),
        message: None,
        started_at: Some(started_at),
        finished_at: spec::now(),
    })
}

fn wait(child: Pid) -> Option<WaitStatus> {
    loop {
        match waitpid(child, None) {
            Ok(status @ (WaitStatus::Exited(..) | WaitStatus::Signaled(..))) => return Some(status),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(_) => return None,
        }
    }
}

/// How often the kernel has killed a process of the container for want of memory.
fn out_of_memory_kills(spec: &ContainerSpec) -> u64 {
    let files = spec.cgroups.iter().flat_map(|group| ["memory.events", "memory.oom_control"].map(|f| group.join(f)));
    let texts = files.filter_map(|file| fs::read_to_string(file).ok());
    let lines = texts.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>());
    lines.filter_map(|line| line.strip_prefix("oom_kill ")?.trim().parse::<u64>().ok()).sum()
}

/// What a function that only returns on failure returns otherwise.
enum Never {}

fn become_container(spec: &ContainerSpec, output: &OwnedFd, error: &OwnedFd) -> Result<Never, Failure> {
    // If the shim is killed nobody would know of the container any more: it goes too.
    // SAFETY: takes integers only.
    unsafe { nix::libc::prctl(nix::libc::PR_SET_PDEATHSIG, nix::libc::SIGKILL, 0, 0, 0) };
    nix::unistd::setsid().map_err(failed("start a session"))?;
    for group in &spec.cgroups {
        // "0" is the writer, whatever its number is here.
        fs::write(group.join("cgroup.procs"), "0").map_err(failed(format!("join {}", group.display())))?;
    }
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC)
        .map_err(failed("make namespaces"))?;
    nix::unistd::sethostname(&spec.hostname).map_err(failed(format!("set the host name {:?}", spec.hostname)))?;
    rootfs::enter(spec)?;

    let user = user(&spec.user, spec.group)?;
    let env = environment(spec, &user.home);
    let program = find_program(spec, &env)?;
    nix::unistd::chdir(spec.cwd.as_str()).map_err(failed(format!("working directory {:?}", spec.cwd)))?;

    if let Some(capabilities) = &spec.capabilities {
        for capability in (0..64).filter(|number| !capabilities.contains(number)) {
            // Ends with EINVAL at the first one that the kernel does not know.
            // SAFETY: takes integers only.
            if unsafe { nix::libc::prctl(nix::libc::PR_CAPBSET_DROP, u64::from(capability), 0, 0, 0) } != 0 {
                break;
            }
        }
    }
    if spec.runtime_seccomp
        && let Some(capabilities) = &spec.capabilities
    {
        seccomp::confine(capabilities)?;
    }
    // Whoever it is may open them again by their names in /dev.
    for stream in [output, error] {
        nix::unistd::fchown(stream, Some(user.uid), None).map_err(failed("give the output to its user"))?;
    }
    let groups: Vec<Gid> = spec.groups.iter().map(|group| Gid::from_raw(*group)).collect();
    nix::unistd::setgroups(&groups).map_err(failed("set groups"))?;
    nix::unistd::setresgid(user.gid, user.gid, user.gid).map_err(failed(format!("become group {}", user.gid)))?;
    nix::unistd::setresuid(user.uid, user.uid, user.uid).map_err(failed(format!("become user {}", user.uid)))?;
    // SAFETY: both take integers only. The first is set again because a change of user clears it.
    unsafe {
        nix::libc::prctl(nix::libc::PR_SET_PDEATHSIG, nix::libc::SIGKILL, 0, 0, 0);
        if spec.no_new_privileges {
            nix::libc::prctl(nix::libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        }
    }

    let null = File::open("/dev/null").map_err(failed("open /dev/null"))?;
    nix::unistd::dup2_stdin(&null).map_err(failed("set standard input"))?;
    nix::unistd::dup2_stdout(output).map_err(failed("set standard output"))?;
    nix::unistd::dup2_stderr(error).map_err(failed("set standard error"))?;
    for signal in Signal::iterator() {
        // SAFETY: the default action installs no handler; SIGKILL and SIGSTOP refuse, which does not matter.
        let _ = unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) };
    }
    let _ = nix::sys::signal::SigSet::empty().thread_set_mask();
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));

    let string = |text: &str| CString::new(text).map_err(failed(format!("{text:?}")));
    let args = spec.args.iter().map(|arg| string(arg)).collect::<Result<Vec<_>, _>>()?;
    let env = env.iter().map(|(name, value)| string(&format!("{name}={value}"))).collect::<Result<Vec<_>, _>>()?;
    match nix::unistd::execve(&program, &args, &env) {
        Ok(never) => match never {},
        Err(error) => Err(format!("exec: {program:?}: {}", error.desc())),
    }
}

struct User {
    uid: Uid,
    gid: Gid,
    home: String,
}

/// Resolves `uid|name[:gid|name]` with the container's own `/etc/passwd` and `/etc/group`.
fn user(text: &str, group: Option<u32>) -> Result<User, Failure> {
    let (name, group_name) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
    let name = if name.is_empty() { "0" } else { name };
    let table = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let passwd = table("/etc/passwd");
    let line = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.first() == Some(&name) || (name.parse::<u32>().is_ok() && fields.get(2) == Some(&name)));
    let field = |index: usize| line.as_ref().and_then(|fields| fields.get(index)).copied();
    let uid =
        name.parse().ok().or_else(|| field(2)?.parse().ok()).ok_or_else(|| format!("no user {name:?} in the image"))?;
    let gid = match (group, group_name) {
        (Some(gid), _) => gid,
        (None, Some(name)) => {
            let groups = table("/etc/group");
            let known = groups.lines().map(|line| line.split(':').collect::<Vec<_>>());
            let number = known.filter(|f| f.first() == Some(&name)).find_map(|f| f.get(2)?.parse().ok());
            name.parse().ok().or(number).ok_or_else(|| format!("no group {name:?} in the image"))?
        }
        (None, None) => field(3).and_then(|gid| gid.parse().ok()).unwrap_or(0),
    };
    let home = field(5).filter(|home| !home.is_empty()).unwrap_or("/").to_owned();
    Ok(User { uid: Uid::from_raw(uid), gid: Gid::from_raw(gid), home })
}

fn environment(spec: &ContainerSpec, home: &str) -> Vec<(String, String)> {
    let mut env = spec.env.clone();
    let defaults = [
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        ("HOSTNAME", spec.hostname.as_str()),
        ("HOME", home),
    ];
    for (name, value) in defaults {
        if !env.iter().any(|(known, _)| known == name) {
            env.push((name.into(), value.into()));
        }
    }
    env
}

fn find_program(spec: &ContainerSpec, env: &[(String, String)]) -> Result<CString, Failure> {
    let program = spec.args.first().map(String::as_str).unwrap_or_default();
    if program.is_empty() {
        return Err("no command specified".into());
    }
    let found = if program.contains('/') {
        Some(Path::new(program).to_owned())
    } else {
        let path = env.iter().find(|(name, _)| name == "PATH").map_or("", |(_, value)| value);
        let mut candidates = path.split(':').map(|folder| Path::new(folder).join(program));
        candidates.find(|path| nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok() && path.is_file())
    };
    let found = found.ok_or_else(|| format!("exec: {program:?}: executable file not found in $PATH"))?;
    CString::new(found.into_os_string().into_encoded_bytes()).map_err(failed(format!("{program:?}")))
}

/// Waits for a process that need not be a child of this one.
pub(crate) fn pidfd(process: Process) -> std::io::Result<Option<OwnedFd>> {
    // SAFETY: takes integers; the result is checked and owned right away.
    let fd = unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_open, process.pid, nix::libc::PIDFD_NONBLOCK) };
    if fd < 0 {
        let error = std::io::Error::last_os_error();
        return if error.raw_os_error() == Some(nix::libc::ESRCH) { Ok(None) } else { Err(error) };
    }
    let fd = i32::try_from(fd).map_err(std::io::Error::other)?;
    // SAFETY: a descriptor that was just made and that nobody else owns.
    let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    // The number may have been given to another process before it was opened.
    debug_assert!(fd.as_raw_fd() >= 0);
    Ok(process.is_alive().then_some(fd))
}
