"""The zygote: a process inside bubblewrap that is forked for every run. Read as text, run there as

    python3 -I -S -B /code/zygote.py CONTROL OWNER FILTER MARK

Three descriptors: a socket to the owner, the owner's pidfd, the seccomp filter. MARK is a random argument by which the
owner can find it. It is the first process of its process namespace, so everything below it ends with it; and it ends with
its owner, however that ends (bwrap, its parent, may be killed as well).

A run has three processes. The *zygote* forks the *init process* of new process, mount and IPC namespaces. The init process
mounts the run's /tmp, /code and /proc, drops its capabilities, installs the seccomp filter and forks the *program*; then it
only reaps ended processes, and exits with the program's exit code. The zygote never reads a run's files, so no run can find
data of another one in its memory.

A Python program runs in this interpreter instead of a new one. The differences to ``python -I -S -B main.py words``: the
modules below are imported already, there is one more frame below its own, all runs of one zygote share the seed of str
hashes, and objects that it attaches to those modules are not finalised at exit.
"""

# imported here, once: what harnesses and solutions import most
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

# PyDLL keeps the GIL during the call, so that a fork never waits for it
libc = ctypes.PyDLL(None, use_errno=True)


def call(function, *words):
    """Call a function of libc; OSError if it returns -1."""
    result = function(*words)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{function.__name__}{words[:2]}: {os.strerror(code)}")
    return result


def mount(kind, target, flags, options=None):
    call(libc.mount, kind.encode(), target.encode(), kind.encode(), flags, options and options.encode())


class Sealed:
    """The seccomp filter and the empty set of capabilities as the kernel's structures; made once."""

    def __init__(self, program):
        self._program = ctypes.create_string_buffer(program, len(program))
        # struct sock_fprog: the number of instructions (8 bytes each) and their address
        self._filter = (ctypes.c_size_t * 2)(len(program) // 8, ctypes.addressof(self._program))
        self._header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        self._nothing = (ctypes.c_uint32 * 6)()

    def drop_capabilities(self):
        call(libc.capset, self._header, self._nothing)

    def filter(self):
        call(libc.prctl, SET_SECCOMP, 2, self._filter, 0, 0)


class Title:
    """This process's command line as ps shows it; overwritten in place."""

    def __init__(self):
        with open("/proc/self/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()
        self._start, end = int(words[45]), int(words[46])
        self._room = end - self._start

    def write(self, *words):
        text = b"\0".join(word.encode(errors="surrogateescape") for word in words)[: self._room - 1]
        ctypes.memmove(self._start, text.ljust(self._room, b"\0"), self._room)


def fork_into_namespaces():
    """(process id, pidfd) of a child that is the first process of new namespaces; (0, -1) in the child."""
    pidfd = ctypes.c_int(-1)
    flags = NEW_MOUNTS | NEW_IPC | NEW_PROCESSES | WITH_PIDFD
    words = (ctypes.c_uint64 * 8)(flags, ctypes.addressof(pidfd), 0, 0, signal.SIGCHLD, 0, 0, 0)
    process = call(libc.syscall, ctypes.c_long(CLONE3), words, ctypes.c_size_t(64))
    return process, pidfd.value


def mount_folders(request, data_fds):
    """Mount an empty /tmp, /code with the run's files, and /proc with the run's processes only."""
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
    # an empty read-only folder over /proc/1: the program must not see the init process
    call(libc.mount, b"/dev/shm", b"/proc/1", None, BIND, None)
    # libc keeps named semaphores here, which multiprocessing needs
    options = f"size={min(size, SEMAPHORE_BYTES)},nr_inodes={min(inodes, SEMAPHORES)},mode=0755"
    mount("tmpfs", "/dev/shm", NO_SUID | NO_DEVICES, options)


def serve_first(request, fds, control, sealed, title):
    """Run as the init process. Returns in the program's process only."""
    try:
        title.write("sandbox-init")
        mount_folders(request, fds[3:])
        sealed.drop_capabilities()
        sealed.filter()
        program = os.fork()
        if program == 0:
            become_program(request, fds)
            return
    except BaseException as error:
        control.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        os._exit(1)
    # a descriptor that stays open here would keep the run's output from ending
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
    """In the zygote: start the run and tell the owner how it ends. True only in the program's process."""
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
    """Wait until ``fd`` can be read. Exits if the owner ends or its socket becomes readable: it sends nothing meanwhile."""
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
    """``fd`` moved to the lowest free number: an owner with many open files passes numbers of any size, and a run closes
    only numbers up to a limit."""
    moved = os.dup(fd)
    os.close(fd)
    return moved


def reset_signals():
    """Undo what the owner ignores or blocks, so that runs start with the defaults and children can be waited for."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGKILL, signal.SIGSTOP}:
        # the first process of a namespace gets from inside only signals that it has a handler for
        if number == signal.SIGINT or signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def serve(control_fd, owner, filter_fd):
    """Serve requests forever; returns the request in the process that runs it."""
    with open(filter_fd, "rb") as file:
        sealed = Sealed(file.read())
    title = Title()
    control, owner = socket.socket(fileno=move_down(control_fd)), move_down(owner)
    os.umask(0o022)
    reset_signals()
    call(libc.prctl, SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    call(libc.prctl, SET_DUMPABLE, 0, 0, 0, 0)
    call(libc.prctl, SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for capability in range(last + 1):
        call(libc.prctl, DROP_BOUND, capability, 0, 0, 0)
    namespaces = {name: os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "mnt", "ipc", "net", "user")}
    gc.collect()
    gc.freeze()
    itself = os.pidfd_open(os.getpid())
    socket.send_fds(control, [json.dumps({"ready": namespaces}).encode()], [itself])
    os.close(itself)
    while True:
        request, fds = next_request(control, owner)
        if run_request(request, fds, control, owner, sealed, title):
            title.write(*request["argv"])
            return request


def prepare_python(request):
    """Prepare this interpreter for the script in argv; (source, path, globals)."""
    # from here on this is the program's own memory, which it may inspect
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
    """``error`` with a traceback of the program's own frames only."""
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next
    return error


def exit_code_of(error):
    """The interpreter's exit code after the uncaught ``error``, which is printed as the interpreter prints it."""
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
    """Flush; False if standard output could not be flushed, which is printed."""
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
    """Exit as the interpreter does, but without finalising modules from before the program, which takes most of a run.

    Waits for threads, calls exit functions, and drops the program's own objects, so that they flush and finalise.
    """
    # the program may have replaced any of these objects
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
    # files that are not finalised are flushed; gc does not list objects from before the program (gc.freeze)
    for stream in (sys.__stdout__, sys.__stderr__, *gc.get_objects()):
        if stream is not None and issubclass(
            type(stream), io.BufferedWriter | io.BufferedRandom | io.TextIOWrapper
        ):
            with contextlib.suppress(BaseException):
                stream.flush()
    libc.exit(code if good else 120)


def drop_objects(modules):
    """Clear modules in the interpreter's order: last imported first, names with an underscore before others."""
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
    # at module level, so that only one frame is below the program's
    try:
        exec(compile(source, path, "exec", dont_inherit=True), names)
    except BaseException as error:
        failure = error
    code = 0 if failure is None else exit_code_of(failure)
    del failure
    leave(code, ready_modules)
