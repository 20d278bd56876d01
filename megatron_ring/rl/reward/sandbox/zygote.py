"""The process that stands ready inside bubblewrap's walls and starts every run. Read as text, run there as

    python3 -I -S -B /code/zygote.py CONTROL OWNER FILTER MARK

Three descriptors: a socket to the owner, the owner's pidfd, the seccomp filter; MARK is what its owner finds it by.
It is the first process of its own process namespace, so whatever ends it ends all that is below it, and it ends when
its owner does, however that ends (bwrap, its parent, may be killed as well).

A request makes three processes of one. The *zygote* forks the *first process* of fresh process, mount and IPC
namespaces, which builds the run's walls (/tmp, /code, /proc), gives its capabilities up for good, closes a filter
behind it and forks the *program*; then it only buries the dead and ends with the program's exit code. The zygote
reads no byte of a run's files, so nothing of one run can be found in the memory of the next.

A Python program goes on in this interpreter instead of a new one. It finds what it would find after
``python -I -S -B main.py words``, but for these: modules below are imported already, one more frame lies below its
own, the seed of str hashes is drawn once for all runs of one zygote, and what it hangs on modules that were there
before it is not taken apart at the end.
"""

# the run's interpreter has these at no cost: what harnesses and solutions import most
import array
import atexit
import bisect  # noqa: F401
import builtins
import collections  # noqa: F401
import contextlib
import ctypes
import dataclasses  # noqa: F401
import functools  # noqa: F401
import gc
import heapq  # noqa: F401
import importlib.machinery
import io
import itertools  # noqa: F401
import json
import math  # noqa: F401
import operator  # noqa: F401
import os
import random  # noqa: F401
import re  # noqa: F401
import resource
import select
import signal
import socket
import string  # noqa: F401
import sys
import traceback  # noqa: F401
import types
import typing  # noqa: F401

CLONE3 = 435
NEW_MOUNTS, NEW_IPC, NEW_PROCESSES, WITH_PIDFD = 0x00020000, 0x08000000, 0x20000000, 0x1000
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC = 1, 2, 4, 8
REMOUNT, BIND, RECURSIVE, PRIVATE = 32, 4096, 16384, 1 << 18
SET_DEATH_SIGNAL, SET_DUMPABLE, SET_SECCOMP, DROP_BOUND, SET_NO_NEW_PRIVILEGES = 1, 4, 22, 24, 38
MAX_FDS = 64
SEMAPHORE_BYTES, SEMAPHORES = 1 << 20, 128
MAX_REQUEST = 1 << 18

# PyDLL: the interpreter's lock stays held, so that a copy of this process never waits for it
libc = ctypes.PyDLL(None, use_errno=True)


def call(function, *words):
    """A function of libc; OSError where it says -1."""
    result = function(*words)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{function.__name__}{words[:2]}: {os.strerror(code)}")
    return result


def mount(kind, target, flags, options=None):
    call(libc.mount, kind.encode(), target.encode(), kind.encode(), flags, options and options.encode())


class Sealed:
    """The filter and the empty set of capabilities, in the kernel's form; made once."""

    def __init__(self, program):
        self._program = ctypes.create_string_buffer(program, len(program))
        # struct sock_fprog: how many instructions of 8 bytes, and where
        self._filter = (ctypes.c_size_t * 2)(len(program) // 8, ctypes.addressof(self._program))
        self._header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        self._nothing = (ctypes.c_uint32 * 6)()

    def drop_capabilities(self):
        call(libc.capset, self._header, self._nothing)

    def filter(self):
        call(libc.prctl, SET_SECCOMP, 2, self._filter, 0, 0)


class Title:
    """This process's line in the list of processes; written in place."""

    def __init__(self):
        with open("/proc/self/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()
        self._start, end = int(words[45]), int(words[46])
        self._room = end - self._start

    def write(self, *words):
        text = b"\0".join(word.encode(errors="surrogateescape") for word in words)[: self._room - 1]
        ctypes.memmove(self._start, text.ljust(self._room, b"\0"), self._room)


def fork_into_namespaces():
    """(process id, pidfd) of a child that is first in new namespaces; (0, -1) in it."""
    pidfd = ctypes.c_int(-1)
    flags = NEW_MOUNTS | NEW_IPC | NEW_PROCESSES | WITH_PIDFD
    words = (ctypes.c_uint64 * 8)(flags, ctypes.addressof(pidfd), 0, 0, signal.SIGCHLD, 0, 0, 0)
    process = call(libc.syscall, ctypes.c_long(CLONE3), words, ctypes.c_size_t(64))
    return process, pidfd.value


def build_walls(request, data_fds):
    """Fresh /tmp, /code with the run's files, /proc with nothing but the run. Nothing else is writable."""
    call(libc.mount, None, b"/", None, RECURSIVE | PRIVATE, None)
    size, inodes = request["tmp_bytes"], request["tmp_inodes"]
    mount("tmpfs", "/tmp", NO_SUID | NO_DEVICES, f"size={size},nr_inodes={inodes},mode=0755")
    mount("tmpfs", "/code", NO_SUID | NO_DEVICES, "mode=0755")
    for path, source in zip(request["paths"], data_fds, strict=True):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o555)
        offset, end = 0, os.fstat(source).st_size
        while offset < end:
            offset += os.sendfile(target, source, offset, end - offset)
        os.close(target)
    call(libc.mount, None, b"/code", None, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEVICES, None)
    mount("proc", "/proc", READ_ONLY | NO_SUID | NO_DEVICES | NO_EXEC)
    # an empty folder that cannot be written: the first process is not for the program's eyes
    call(libc.mount, b"/dev/shm", b"/proc/1", None, BIND, None)
    # where libc keeps named semaphores, without which there is no multiprocessing
    options = f"size={min(size, SEMAPHORE_BYTES)},nr_inodes={min(inodes, SEMAPHORES)},mode=0755"
    mount("tmpfs", "/dev/shm", NO_SUID | NO_DEVICES, options)


def serve_first(request, fds, control, sealed, title):
    """The first process of a run. Returns in the program's process only."""
    try:
        title.write("sandbox-init")
        build_walls(request, fds[3:])
        sealed.drop_capabilities()
        sealed.filter()
        program = os.fork()
        if program == 0:
            become_program(request, fds)
            return
    except BaseException as error:
        control.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        os._exit(1)
    # what it held open would keep the run's output from ending
    os.closerange(0, MAX_FDS + 64)
    while True:
        process, status = os.waitpid(-1, 0)
        if process == program:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def become_program(request, fds):
    os.setsid()
    for target, source in enumerate(fds[:3]):
        os.dup2(source, target)
    os.closerange(3, MAX_FDS + 64)
    os.chdir("/tmp")
    for name, bounds in request["rlimits"].items():
        kind = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(kind)[1]
        soft, hard = (n if most == resource.RLIM_INFINITY else min(n, most) for n in bounds)
        resource.setrlimit(kind, (soft, hard))


def run_request(request, fds, control, owner, sealed, title):
    """In the zygote: start it, tell the owner how it ends. True only in the program's process."""
    process, pidfd = fork_into_namespaces()
    if process == 0:
        serve_first(request, fds, control, sealed, title)
        return True
    for fd in fds:
        os.close(fd)
    socket.send_fds(control, [b'{"started": true}'], [pidfd])
    wait_for(pidfd, control, owner)
    os.close(pidfd)
    _, status, used = os.wait4(process, 0)
    code = os.waitstatus_to_exitcode(status)
    report = {"exit_code": code, "cpu_seconds": used.ru_utime + used.ru_stime}
    control.send(json.dumps(report).encode())
    return False


def wait_for(fd, control, owner):
    """Until ``fd`` can be read. The owner says nothing meanwhile: a word of its socket is the end, as its own is."""
    poll = select.poll()
    for each in {fd, control.fileno(), owner}:
        poll.register(each, select.POLLIN)
    ready = {each for each, _ in poll.poll()}
    if owner in ready or ready - {fd}:
        os._exit(0)


def next_request(control, owner):
    wait_for(control.fileno(), control, owner)
    fds = array.array("i")
    room = socket.CMSG_SPACE(MAX_FDS * fds.itemsize)
    text, parts, _, _ = control.recvmsg(MAX_REQUEST, room, socket.MSG_CMSG_CLOEXEC)
    if not text:
        os._exit(0)
    for _, _, data in parts:
        fds.frombytes(data)
    return json.loads(text), list(fds)


def move_down(fd):
    """``fd`` as the lowest number that is free: an owner with many files open hands over numbers of any size, and
    those above what a run closes would stay open in it."""
    moved = os.dup(fd)
    os.close(fd)
    return moved


def forget_owners_signals():
    """What the owner ignores or holds back is not a run's; ended children are waited for."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGKILL, signal.SIGSTOP}:
        # a first process hears of its own namespace only the signals it has a handler for
        if number == signal.SIGINT or signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def serve(control_fd, owner, filter_fd):
    """Answer requests for ever; returns a request in the process that is to run it."""
    with open(filter_fd, "rb") as file:
        sealed = Sealed(file.read())
    title = Title()
    control, owner = socket.socket(fileno=move_down(control_fd)), move_down(owner)
    os.umask(0o022)
    forget_owners_signals()
    call(libc.prctl, SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    call(libc.prctl, SET_DUMPABLE, 0, 0, 0, 0)
    call(libc.prctl, SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for capability in range(last + 1):
        call(libc.prctl, DROP_BOUND, capability, 0, 0, 0)
    walls = {name: os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "mnt", "ipc", "net", "user")}
    gc.collect()
    gc.freeze()
    itself = os.pidfd_open(os.getpid())
    socket.send_fds(control, [json.dumps({"ready": walls}).encode()], [itself])
    os.close(itself)
    while True:
        request, fds = next_request(control, owner)
        if run_request(request, fds, control, owner, sealed, title):
            title.write(*request["argv"])
            return request


def prepare_python(request):
    """Make this the interpreter of the script that argv names; its code and its globals."""
    # this memory is the program's own now, and may be looked at by it
    call(libc.prctl, SET_DUMPABLE, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.orig_argv = request["argv"]
    sys.argv = request["argv"][4:]
    path = sys.argv[0]
    module = types.ModuleType("__main__")
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    module.__dict__.update(
        __loader__=loader, __annotations__={}, __builtins__=builtins, __file__=path, __cached__=None
    )
    sys.modules["__main__"] = module
    with open(path, "rb") as file:
        return file.read(), path, module.__dict__


def replace_process(request):
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(request["argv"][0], request["argv"], dict(os.environ))
    except OSError as error:
        os.write(2, f"{request['argv'][0]}: {error.strerror}\n".encode())
        os._exit(127)


def without_this_file(error):
    """``error`` with the trace that the program's own frames leave."""
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next
    return error


def exit_code_of(error):
    """What the interpreter ends with after ``error`` left the program; it is shown as the interpreter shows it."""
    if isinstance(error, SystemExit):
        code = error.code
        if code is None or isinstance(code, int):
            return (code or 0) & 0xFF if abs(code or 0) < 1 << 63 else 0xFF
        with contextlib.suppress(BaseException):
            print(code, file=sys.stderr)
        return 1
    shown = type(error), without_this_file(error), error.__traceback__
    sys.last_type, sys.last_value, sys.last_traceback = shown
    try:
        sys.excepthook(*shown)
    except SystemExit as leaving:
        return exit_code_of(leaving)
    except BaseException as worse:
        print("Error in sys.excepthook:", file=sys.stderr)
        sys.__excepthook__(type(worse), without_this_file(worse), worse.__traceback__)
        print("\nOriginal exception was:", file=sys.stderr)
        sys.__excepthook__(*shown)
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def flush_streams():
    """Whether standard output could be flushed; what stood in the way is said."""
    good = True
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException as error:
            if stream is sys.stdout:
                good = False
                with contextlib.suppress(BaseException):
                    print(
                        f"Exception ignored in: {stream!r}\n{type(error).__name__}: {error}", file=sys.stderr
                    )
    return good


def leave(code, ready_modules):
    """End as the interpreter would, without taking apart what was there before the program: that is most of a run.

    Threads are waited for, exit functions called, the program's own objects dropped with all they flush and say.
    """
    # the program may have put anything in the places looked at here
    with contextlib.suppress(BaseException):
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    good = flush_streams()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(BaseException):
        sys.last_type = sys.last_value = sys.last_traceback = None
        drop_objects(
            [m for name, m in sys.modules.items() if name not in ready_modules or name == "__main__"]
        )
    gc.collect()
    # what is not taken apart here still writes all that it has taken; gc does not list what was there before
    for stream in (sys.__stdout__, sys.__stderr__, *gc.get_objects()):
        if stream is not None and issubclass(
            type(stream), io.BufferedWriter | io.BufferedRandom | io.TextIOWrapper
        ):
            with contextlib.suppress(BaseException):
                stream.flush()
    libc.exit(code if good else 120)


def drop_objects(modules):
    """Empty modules in the interpreter's order: the last imported first, and names with an underscore before others."""
    for module in reversed(modules):
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict):
            continue
        for hidden in (True, False):
            for name in list(names):
                if name != "__builtins__" and (not hidden or (name.startswith("_") and name[1:2] != "_")):
                    names[name] = None


if __name__ == "__main__":
    request = serve(*map(int, sys.argv[1:4]))
    if not request["ready_python"]:
        replace_process(request)
    ready_modules = frozenset(sys.modules)
    source, path, names = prepare_python(request)
    failure = None
    # at the level of the module, so that nothing but its frame lies below the program's
    try:
        exec(compile(source, path, "exec", dont_inherit=True), names)
    except BaseException as error:
        failure = error
    code = 0 if failure is None else exit_code_of(failure)
    del failure
    leave(code, ready_modules)
