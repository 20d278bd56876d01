"""The walls of the sandbox as a command line: bubblewrap namespaces, prlimit, a seccomp filter, a uid of no one.

Each part closes a hole that the others leave:
- bwrap never starts as root: root's /proc/sys is writable inside, and RLIMIT_NPROC does not bind root;
- ``/`` and ``/dev`` are remounted read-only, or code fills their memory-backed file systems;
- the first process of the namespace, bwrap's own, is outside the limits: ``/proc/1/mem`` would hand it over;
- memory that no process's RSS shows (memfd, System V segments) cannot be made;
- clone3 hides its flags from a filter, so it does not exist inside, and libc falls back to clone.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ring.errors import RewardError

SETUP = "run tools/setup_sandbox.sh"
FIRST_UID = 64000
"""Root starts sandboxes as one of 1000 numeric uids from here on, chosen by process id."""

_FORBIDDEN = (
    "ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp unshare setns mount umount2 pivot_root chroot "
    "fsopen fsconfig fsmount fspick move_mount open_tree mount_setattr open_by_handle_at name_to_handle_at bpf "
    "perf_event_open userfaultfd add_key request_key keyctl io_uring_setup io_uring_enter io_uring_register "
    "socket init_module finit_module delete_module kexec_load reboot swapon swapoff acct quotactl syslog "
    "shmget msgget semget"
)
_MISSING = "clone3 memfd_create"
_NAMESPACE_FLAGS = (0x80, 0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one run in the sandbox may use.

    ``memory_mb`` bounds the resident memory of all its processes together, and unless ``address_space`` is
    False (a JVM reserves more than it uses) the address space of each.

    Example: ``Limits(seconds=5.0, memory_mb=512)``.
    """

    seconds: float = 5.0
    """Wall clock; CPU seconds of each process are limited to one more."""
    memory_mb: int = 512
    output_bytes: int = 1 << 20
    """Standard output and error, each; the run is killed when it writes more."""
    file_bytes: int = 16 << 20
    tmp_bytes: int = 64 << 20
    processes: int = 24
    address_space: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """What to start inside: absolute command, and files (absolute path -> content) that exist only there.

    Example: ``Program(argv=("/usr/bin/python3", "/code/solution.py"), files={"/code/solution.py": b"print(1)"})``.
    """

    argv: tuple[str, ...]
    files: Mapping[str, bytes]


def find_tool(name: str, why: str, remedy: str = SETUP) -> str:
    """Absolute, resolved path of a program under /usr, the only part of the system that exists inside."""
    found = shutil.which(name, path="/usr/bin:/usr/local/bin:/bin")
    resolved = os.path.realpath(found) if found else ""
    if not resolved.startswith("/usr/"):
        where = f"resolves to {resolved}" if found else "is not installed"
        raise RewardError(f"{name} {where}, but {why} needs it below /usr; {remedy}")
    return resolved


def command(program: Program, limits: Limits, data_fds: Mapping[str, int], seccomp_fd: int, status_fd: int):
    """argv of one run; ``data_fds`` are the files of the program as open descriptors."""
    argv = [
        *(find_tool("bwrap", "the code sandbox"), "--unshare-all", "--unshare-user"),
        *("--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--die-with-parent", "--new-session"),
        *system_binds(),
        *(
            "--proc",
            "/proc",
            "--tmpfs",
            "/proc/1",
            "--remount-ro",
            "/proc/1",
            "--dev",
            "/dev",
            "--size",
            str(limits.tmp_bytes),
            "--tmpfs",
            "/tmp",
        ),
        *("--chdir", "/tmp", "--clearenv", "--setenv", "PATH", "/usr/bin", "--setenv", "HOME", "/tmp"),
        *("--setenv", "LANG", "C.UTF-8", "--disable-userns", "--cap-drop", "ALL"),
        *("--seccomp", str(seccomp_fd), "--json-status-fd", str(status_fd)),
    ]
    for path, fd in data_fds.items():
        argv += ["--perms", "0555", "--ro-bind-data", str(fd), path]
    cpu = math.ceil(limits.seconds) + 1
    argv += [
        *("--remount-ro", "/dev", "--remount-ro", "/", "--", find_tool("prlimit", "the code sandbox")),
        *(f"--cpu={cpu}:{cpu + 1}", f"--fsize={limits.file_bytes}", f"--nproc={limits.processes}"),
        *("--nofile=64", "--core=0", "--memlock=0", "--msgqueue=0"),
    ]
    if limits.address_space:
        argv.append(f"--as={limits.memory_mb << 20}")
    return [*argv, "--", *program.argv]


def identity() -> dict:
    """Keywords of Popen that take root away."""
    if os.geteuid() != 0:
        return {}
    uid = FIRST_UID + os.getpid() % 1000
    return {"user": uid, "group": uid, "extra_groups": []}


def open_data(content: bytes, name: str = "data") -> int:
    """A sealed descriptor that reads ``content``: nothing is written to a disk."""
    import fcntl

    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@functools.cache
def seccomp_program() -> bytes:
    """The filter in the kernel's form, for bwrap's --seccomp."""
    try:
        import pyseccomp
    except (ImportError, RuntimeError) as error:
        raise RewardError(
            f"pyseccomp cannot be used ({error}), but the code sandbox needs it; {SETUP}"
        ) from error
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    try:
        for name in _FORBIDDEN.split():
            rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
        for name in _MISSING.split():
            rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), name)
        for flag in _NAMESPACE_FLAGS:
            argument = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, flag, flag)
            rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "clone", argument)
    except (OSError, ValueError, RuntimeError) as error:
        raise RewardError(f"libseccomp refuses {name}: {error}; install libseccomp 2.5 or newer") from error
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


@functools.cache
def system_binds() -> Sequence[str]:
    """The read-only system: /usr, and where the loader, /bin and the JVM's settings are looked for."""
    words = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            words += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            words += ["--ro-bind", str(path), str(path)]
    for path in [*sorted(Path("/etc").glob("java-*-openjdk")), Path("/etc/ld.so.cache")]:
        if path.exists():
            words += ["--ro-bind", str(path), str(path)]
    return words
