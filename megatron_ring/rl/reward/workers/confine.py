"""What a process that judges gives up before it sees a model's text: rights, as rlimits and a seccomp filter.

It needs nothing but its socket and files to read (libraries load lazily): it may start no process or program,
change no file, open no connection and signal no other process. The filter is made where libseccomp is (by the
trainer) and put on here, so that this works without libseccomp and inside any walls.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from typing import Any

from megatron_ring.rl.reward.sandbox.command import exported

MEMORY_BYTES = 4 << 30
"""Address space of a process that judges."""
FILE_BYTES = 4 << 20
"""Longest file that it can write: its own log, which was opened before."""

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
"""CLONE_THREAD: a thread of this process, which is no new process."""


def judge_filter() -> bytes:
    """The seccomp filter of a process that judges, in the kernel's form.

    Raises:
        ImportError, RuntimeError: pyseccomp or the libseccomp that it wraps is not here.
    """
    import pyseccomp

    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in _DENIED.split():
        rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
    for name in _MISSING.split():
        rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), name)
    rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "clone", _masked(pyseccomp, 0, _THREAD, 0))
    for name, place in (("open", 1), ("openat", 2)):
        for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC):
            rules.add_rule(pyseccomp.ERRNO(errno.EROFS), name, _masked(pyseccomp, place, flag, flag))
    # prlimit64 with a new limit; without one it only asks
    rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "prlimit64", pyseccomp.Arg(2, pyseccomp.NE, 0))
    return exported(rules)


def confine(filter_bytes: bytes) -> None:
    """Limit this process for good; an empty filter leaves the rlimits alone. Raises OSError where the kernel refuses."""
    _lower(resource.RLIMIT_AS, MEMORY_BYTES)
    _lower(resource.RLIMIT_FSIZE, FILE_BYTES)
    _lower(resource.RLIMIT_CORE, 0)
    _prctl(_PR_SET_DUMPABLE, 0)
    if filter_bytes:
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _put_on(filter_bytes)


def _put_on(filter_bytes: bytes) -> None:
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))

    held = ctypes.create_string_buffer(filter_bytes, len(filter_bytes))
    program = Program(len(filter_bytes) // _INSTRUCTION_BYTES, ctypes.addressof(held))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))


def _masked(pyseccomp: Any, place: int, mask: int, value: int) -> Any:
    return pyseccomp.Arg(place, pyseccomp.MASKED_EQ, mask, value)


def _lower(limit: int, value: int) -> None:
    soft, hard = resource.getrlimit(limit)
    allowed = [each for each in (value, soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(limit, (min(allowed), min(allowed)))


def _prctl(option: int, value: int, pointer: Any = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), pointer, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
