"""The sandbox's isolation as data: bubblewrap's command line, resource limits, a seccomp filter, an unprivileged uid.

bubblewrap isolates the zygote once (``zygote.py``); inside of that the zygote isolates every run again. Each
part closes a hole that the others leave:

- bwrap never starts as root: root's /proc/sys is writable inside, and RLIMIT_NPROC does not bind root.
- ``/`` and ``/dev`` are remounted read-only, so that code cannot fill their memory-backed file systems.
- There is no /dev/zero: a shared mapping of it is memory that no process's RSS shows.
- Other memory that RSS does not show is denied, or bounded by a count: see ``seccomp_program``.
- clone3 hides its flags from a filter, so it is missing inside, and libc falls back to clone.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from megatron_ring.errors import RewardError

SETUP = "run tools/setup_sandbox.sh"
FIRST_UID = 64000
"""First of 1000 numeric uids that root starts sandboxes under; which one depends on the process id."""

CODE = "/code"
"""Folder of a run's files; made for each run."""
WALL_FACTOR = 5.0
"""Limit of wall clock as a multiple of the limit of CPU seconds: a busy machine is not the program's fault."""
RESERVED_MB = 8192
"""Address space that a JVM reserves beyond the memory it uses: classes, code cache, archive, stacks, arenas."""

_FORBIDDEN = (
    "ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp unshare setns mount umount2 pivot_root chroot "
    "fsopen fsconfig fsmount fspick move_mount open_tree mount_setattr open_by_handle_at name_to_handle_at bpf "
    "perf_event_open userfaultfd add_key request_key keyctl io_uring_setup io_uring_enter io_uring_register "
    "socket bind connect listen accept accept4 setsockopt init_module finit_module delete_module kexec_load reboot "
    "swapon swapoff acct quotactl syslog shmget msgget semget"
)
# these hold kernel memory that no RSS shows; programs find them missing and do without
_MISSING = (
    "clone3 memfd_create memfd_secret vmsplice splice tee mq_open io_setup inotify_init inotify_init1 "
    "fanotify_init landlock_create_ruleset seccomp modify_ldt remap_file_pages"
)
_WITHOUT_ATTRIBUTES = "setxattr lsetxattr fsetxattr"
_NAMESPACE_FLAGS = (0x80, 0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
_SHARED_ANONYMOUS, _HUGE_PAGES = 0x21, 0x40000
_SET_PIPE_SIZE, _LEASE, _NOTIFY = 1031, 1024, 1026
_RECORD_LOCKS = (6, 7, 37, 38)
_PR_SET_SECCOMP = 22
_AF_UNIX = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one run in the sandbox may use.

    ``memory_mb`` bounds the memory of all its processes together (resident, swapped, page tables, and what their
    descriptors can buffer). It also bounds the address space of each process; if ``address_space`` is False (a JVM reserves
    more than it uses), that bound is ``RESERVED_MB`` higher. Files in /tmp are bounded by ``tmp_bytes`` instead.

    Example: ``Limits(seconds=5.0, memory_mb=512)``.
    """

    seconds: float = 5.0
    """CPU seconds of all its processes together."""
    wall_seconds: float | None = None
    """Wall clock; None for ``WALL_FACTOR`` times ``seconds``."""
    memory_mb: int = 512
    output_bytes: int = 1 << 20
    """Of standard output; the run is killed when it writes more. Standard error, which is full of debug output and does not
    decide the result, may be 16 times as long."""
    file_bytes: int = 16 << 20
    tmp_bytes: int = 64 << 20
    tmp_inodes: int = 8192
    """Files, folders and hard links in /tmp together: each holds about a kilobyte of the kernel's memory."""
    processes: int = 24
    """Processes and threads."""
    address_space: bool = True

    @property
    def wall(self) -> float:
        """Seconds of wall clock after which the run is killed."""
        return WALL_FACTOR * self.seconds if self.wall_seconds is None else self.wall_seconds

    def rlimits(self) -> dict[str, tuple[int, int]]:
        """Soft and hard limits of each process, by their names in the resource module without RLIMIT_."""
        cpu = math.ceil(self.seconds) + 1
        hard = {
            "FSIZE": self.file_bytes,
            # the zygote and the run's init process have the same uid
            "NPROC": self.processes + 2,
            "NOFILE": 64,
            "CORE": 0,
            "MEMLOCK": 0,
            "MSGQUEUE": 0,
            "SIGPENDING": 1024,
            "RTPRIO": 0,
            "AS": (self.memory_mb + (0 if self.address_space else RESERVED_MB)) << 20,
        }
        return {"CPU": (cpu, cpu + 1)} | {name: (value, value) for name, value in hard.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """What to run: a command with an absolute path, and files (path below /code -> content) that exist only inside.

    With ``ready_python`` the script in ``argv`` runs in a fork of the zygote's interpreter, which saves starting one.

    Example: ``Program(argv=("/usr/bin/python3", "/code/solution.py"), files={"/code/solution.py": b"print(1)"})``.
    """

    argv: tuple[str, ...]
    files: Mapping[str, bytes]
    ready_python: bool = False


def find_tool(name: str, why: str, remedy: str = SETUP) -> str:
    """Absolute, resolved path of a program below /usr, the only part of the system that is visible inside."""
    found = shutil.which(name, path="/usr/bin:/usr/local/bin:/bin")
    resolved = os.path.realpath(found) if found else ""
    if not resolved.startswith("/usr/"):
        where = f"resolves to {resolved}" if found else "is not installed"
        raise RewardError(f"{name} {where}, but {why} needs it below /usr; {remedy}")
    return resolved


def command(python: str, text_fd: int, words: Sequence[str]) -> list[str]:
    """bwrap's argv: ``python`` runs the zygote's source ``text_fd`` with ``words`` as the first process inside.

    The zygote keeps CAP_SYS_ADMIN (mounts) and CAP_SETPCAP in its own user namespace; no run has them. There is no
    --die-with-parent: it fires when the thread that started bwrap ends, and if bwrap is killed before its child
    runs, the child stays forever. The zygote watches its owner instead.
    """
    devices = ("null", "full", "random", "urandom")
    return [
        *(find_tool("bwrap", "the code sandbox"), "--unshare-all", "--unshare-user"),
        *("--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--new-session", "--as-pid-1"),
        *system_binds(),
        *("--proc", "/proc", "--tmpfs", "/dev", "--dir", "/dev/shm", "--symlink", "/proc/self/fd", "/dev/fd"),
        *(word for name in devices for word in ("--dev-bind-try", f"/dev/{name}", f"/dev/{name}")),
        *(
            word
            for fd, name in enumerate(("stdin", "stdout", "stderr"))
            for word in ("--symlink", f"/proc/self/fd/{fd}", f"/dev/{name}")
        ),
        *("--dir", "/tmp", "--perms", "0555", "--ro-bind-data", str(text_fd), f"{CODE}/zygote.py"),
        *("--chdir", "/tmp", "--clearenv", "--setenv", "PATH", "/usr/bin", "--setenv", "HOME", "/tmp"),
        *("--setenv", "LANG", "C.UTF-8", "--disable-userns"),
        *("--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP"),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--"),
        *(python, "-I", "-S", "-B", f"{CODE}/zygote.py", *words),
    ]


class Identity(TypedDict, total=False):
    """Arguments of Popen that set whom a process runs as."""

    user: int
    group: int
    extra_groups: list[int]


def identity() -> Identity:
    """Arguments of Popen that start a process as an unprivileged user if this one is root."""
    if os.geteuid() != 0:
        return {}
    uid = FIRST_UID + os.getpid() % 1000
    return {"user": uid, "group": uid, "extra_groups": []}


@contextlib.contextmanager
def above_streams() -> Iterator[None]:
    """Keep descriptors 0 to 2 occupied, also if this process has closed a standard stream: a descriptor made in this block
    with such a number would be replaced by a stream of the child it is passed to."""
    held: list[int] = []
    try:
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            held.append(fd)
        os.close(fd)
        yield
    finally:
        for fd in held:
            os.close(fd)


def open_data(content: bytes, name: str = "data") -> int:
    """A sealed descriptor from which ``content`` can be read; it is in memory, not on a disk."""
    import fcntl

    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@functools.cache
def seccomp_program(final: bool = True) -> bytes:
    """The seccomp filter as BPF instructions: denies escapes, and calls that hold memory which no RSS shows.

    Such memory: shared mappings without a file, huge pages, pages given to pipes, larger pipes, record locks, extended
    attributes, queues and rings. What remains is bounded by the number of descriptors. With ``final`` the filter denies
    installing further filters, too.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError) as error:
        raise RewardError(
            f"pyseccomp cannot be used ({error}), but the code sandbox needs it; {SETUP}"
        ) from error

    def has(index: int, bits: int) -> pyseccomp.Arg:
        return pyseccomp.Arg(index, pyseccomp.MASKED_EQ, bits, bits)

    def equals(index: int, value: int) -> pyseccomp.Arg:
        # the kernel reads only 32 bits of these arguments; without the mask the upper bits would defeat the comparison
        return pyseccomp.Arg(index, pyseccomp.MASKED_EQ, 0xFFFFFFFF, value)

    denied, missing = pyseccomp.ERRNO(errno.EPERM), pyseccomp.ERRNO(errno.ENOSYS)
    table = [(denied, name) for name in _FORBIDDEN.split()]
    table += [(missing, name) for name in _MISSING.split()]
    table += [(pyseccomp.ERRNO(errno.ENOTSUP), name) for name in _WITHOUT_ATTRIBUTES.split()]
    table += [(denied, "clone", has(0, flag)) for flag in _NAMESPACE_FLAGS]
    table += [(denied, "mmap", has(3, bits)) for bits in (_SHARED_ANONYMOUS, _HUGE_PAGES)]
    table += [(denied, "fcntl", equals(1, number)) for number in (_SET_PIPE_SIZE, _LEASE, _NOTIFY)]
    table += [(pyseccomp.ERRNO(errno.ENOLCK), "fcntl", equals(1, number)) for number in _RECORD_LOCKS]
    table += [
        *([(denied, "prctl", equals(0, _PR_SET_SECCOMP))] if final else []),
        # limits of other processes: the run's init process has the same uid
        (denied, "prlimit64", pyseccomp.Arg(0, pyseccomp.NE, 0)),
        (denied, "socketpair", pyseccomp.Arg(0, pyseccomp.NE, _AF_UNIX)),
    ]
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for action, name, *arguments in table:
        try:
            rules.add_rule(action, name, *arguments)
        except (OSError, ValueError, RuntimeError) as error:
            raise RewardError(
                f"libseccomp refuses {name}: {error}; install libseccomp 2.5.2 or newer"
            ) from error
    return exported(rules)


def exported(rules: Any) -> bytes:
    """A pyseccomp filter as BPF instructions; it is exported through memory, not a disk."""
    with open(os.memfd_create("filter"), "w+b") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


@functools.cache
def system_binds() -> Sequence[str]:
    """bwrap's arguments for the read-only system: /usr, /bin, the loader's paths and the JVM's settings."""
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
