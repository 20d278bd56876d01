"""Resource limits and a seccomp filter that an isolated verifier process sets on itself before it reads a model's text.

It needs only its socket and files to read (libraries load lazily). So it may start no process, change no file, open no
connection and signal no other process. The trainer builds the filter, with libseccomp; it is installed here without.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from typing import Any

from megatron_ring.rl.reward.sandbox.command import exported

MEMORY_BYTES = 4 << 30
"""Address space of a verifier process."""
FILE_BYTES = 4 << 20
"""Longest file that it can write: its own log, which is open already."""

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_INSTRUCTION_BYTES = 8

_DENIED = (
    "execve execveat fork vfork kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_open pidfd_send_signal "
    "ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp process_madvise setpriority sched_setscheduler "
    "sched_setaffinity unshare setns mount umount2 pivot_root chroot fsopen fsmount move_mount open_tree mount_setattr "
    "open_by_handle_at bpf perf_event_open userfaultfd add_key request_key keyctl io_uring_setup socket socketpair "
    "connect bind listen accept accept4 creat unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat "
    "mkdir mkdirat rmdir mknod mknodat truncate chmod fchmod fchmodat chown fchown lchown fchownat setxattr "
    "lsetxattr fsetxattr removexattr utimensat utime utimes shmget msgget semget mq_open swapon swapoff reboot "
    "init_module finit_module delete_module kexec_load acct quotactl syslog setrlimit"
)
_MISSING = "clone3 openat2 memfd_create"
_THREAD = 0x00010000
"""CLONE_THREAD: a new thread of this process, which is allowed."""


def seccomp_filter() -> bytes:
    """The seccomp filter of a verifier process, as BPF instructions.

    Raises:
        ImportError, RuntimeError: pyseccomp or the libseccomp that it wraps is missing.
    """
    import pyseccomp

    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in _DENIED.split():
        rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
    for name in _MISSING.split():
        rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), name)
    rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "clone", _masked(pyseccomp, 0, _THREAD, 0))
    for name, index in (("open", 1), ("openat", 2)):
        for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC):
            rules.add_rule(pyseccomp.ERRNO(errno.EROFS), name, _masked(pyseccomp, index, flag, flag))
    # prlimit64 with a new limit; without one it only reads
    rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "prlimit64", pyseccomp.Arg(2, pyseccomp.NE, 0))
    return exported(rules)


def confine(filter_bytes: bytes) -> None:
    """Limit this process irrevocably; with an empty filter, by rlimits alone. Raises OSError if the kernel refuses."""
    _lower(resource.RLIMIT_AS, MEMORY_BYTES)
    _lower(resource.RLIMIT_FSIZE, FILE_BYTES)
    _lower(resource.RLIMIT_CORE, 0)
    _prctl(_PR_SET_DUMPABLE, 0)
    if filter_bytes:
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _install(filter_bytes)


def _install(filter_bytes: bytes) -> None:
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))

    held = ctypes.create_string_buffer(filter_bytes, len(filter_bytes))
    program = Program(len(filter_bytes) // _INSTRUCTION_BYTES, ctypes.addressof(held))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))


def _masked(pyseccomp: Any, index: int, mask: int, value: int) -> Any:
    return pyseccomp.Arg(index, pyseccomp.MASKED_EQ, mask, value)


def _lower(limit: int, value: int) -> None:
    soft, hard = resource.getrlimit(limit)
    allowed = [each for each in (value, soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(limit, (min(allowed), min(allowed)))


def _prctl(option: int, value: int, pointer: Any = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), pointer, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
