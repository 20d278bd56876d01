"""Ways out of a run and ways to outlive it, tried from inside the forked interpreter and from programs of their own."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.code.job import CodeJob
from megatron_ring.rl.reward.sandbox import zygote_handle as sandbox_process
from megatron_ring.rl.reward.sandbox.command import Limits
from megatron_ring.rl.reward.sandbox.sandbox import Sandbox
from tests.helpers.reward.judging import sandbox_processes, zygotes

PATIENT = Limits(seconds=100.0, wall_seconds=200.0, memory_mb=256)
BRIEF = Limits(seconds=0.5, wall_seconds=1.0, memory_mb=256)

HEAD = """
import ctypes, errno, fcntl, json, mmap, os, resource, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
out = []
def tried(f):
    try:
        result = f()
        out.append("done" if result != -1 else errno.errorcode[ctypes.get_errno()])
    except OSError as error:
        out.append(errno.errorcode[error.errno])
"""
TAIL = "\nprint(json.dumps(out))\n"

# what is tried, and what each try must get
REFUSED = {
    "the first process's memory": (
        "for name in ('mem', 'maps', 'environ', 'fd', 'root', 'status', 'task'):\n"
        "    tried(lambda: os.listdir('/proc/1') if name == 'status' else open('/proc/1/' + name))\n"
        "tried(lambda: open('/proc/2/../1/mem'))\n"
        "tried(lambda: os.readlink('/proc/thread-self/../../1/exe'))\n",
        ["ENOENT"] * 5 + ["done"] + ["ENOENT"] * 3,
    ),
    "processes outside": (
        "for pid in (os.getppid(), -1, 0x7fff):\n    tried(lambda: os.kill(pid, 0) if pid != -1 else None)\n"
        "tried(lambda: libc.ptrace(16, 1, 0, 0))\n"
        "tried(lambda: libc.process_vm_readv(1, 0, 0, 0, 0, 0))\n"
        "tried(lambda: libc.syscall(438, os.pidfd_open(1), 0, 0))\n"
        "tried(lambda: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)))\n"
        "tried(lambda: os.setpriority(os.PRIO_PROCESS, 0, -5))\n",
        ["done", "done", "ESRCH", "EPERM", "EPERM", "EPERM", "EPERM", "EACCES"],
    ),
    "inherited capabilities": (
        "tried(lambda: libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None))\n"
        "tried(lambda: libc.mount(None, b'/usr', None, 32 | 4096, None))\n"
        "tried(lambda: libc.umount2(b'/proc/1', 2))\n"
        "for flag in (0x20000, 0x10000000, 0x20000000, 0x40000000):\n    tried(lambda: libc.unshare(flag))\n"
        "tried(lambda: libc.setns(os.open('/proc/self/ns/mnt', 0), 0))\n"
        "tried(lambda: libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0))\n"
        "tried(lambda: libc.syscall(435, 0, 0))\n"
        "tried(lambda: os.chroot('/tmp'))\ntried(lambda: os.setuid(0))\n"
        "tried(lambda: os.mknod('/tmp/disk', 0o60600, 0))\n"
        "tried(lambda: libc.sethostname(b'x', 1))\n"
        "tried(lambda: libc.prctl(22, 2, 0, 0, 0))\n",
        ["EPERM"] * 9 + ["ENOSYS", "EPERM", "EINVAL", "EPERM", "EPERM", "EPERM"],
    ),
    "descriptors": (
        "out.append(os.listdir('/proc/self/fd'))\n"
        "tried(lambda: os.write(os.open('/proc/self/fd/0', os.O_RDWR), b'x'))\n"
        "tried(lambda: os.ftruncate(os.open('/proc/self/fd/0', os.O_RDWR), 1 << 20))\n"
        "tried(lambda: open('/proc/self/exe', 'r+b'))\n"
        "tried(lambda: open('/dev/zero'))\ntried(lambda: open('/dev/ptmx'))\ntried(lambda: open('/dev/tty'))\n",
        [["0", "1", "2", "3"], "EPERM", "EPERM", "EACCES", "ENOENT", "ENOENT", "ENOENT"],
    ),
    "settings of the kernel": (
        "for name in ('sys/kernel/core_pattern', 'sys/kernel/hostname', 'sys/vm/overcommit_memory', 'sysrq-trigger',\n"
        "             'self/oom_score_adj', 'self/uid_map', 'self/comm', 'self/coredump_filter', 'self/timerslack_ns'):\n"
        "    tried(lambda: os.close(os.open('/proc/' + name, os.O_WRONLY)))\n"
        "out = sorted(set(out) - {'EACCES', 'ENOENT'})\n",
        ["EROFS"],
    ),
    "memory that no process shows": (
        "for flags in (0x21, 0x23, 0x40022):\n"
        "    tried(lambda: libc.syscall(9, 0, ctypes.c_size_t(1 << 21), 3, flags, -1, 0))\n"
        "tried(lambda: libc.syscall(9, 0, ctypes.c_size_t(4096), 3, ctypes.c_long(0x100000021), -1, 0))\n"
        "r, w = os.pipe()\n"
        "tried(lambda: libc.vmsplice(w, 0, 0, 0))\ntried(lambda: libc.splice(r, 0, w, 0, 1, 0))\n"
        "tried(lambda: libc.tee(r, w, 1, 0))\n"
        "tried(lambda: fcntl.fcntl(w, 1031, 1 << 20))\n"
        "tried(lambda: libc.syscall(72, w, ctypes.c_long((1 << 32) + 1031), 1 << 20))\n"
        "tried(lambda: os.memfd_create('x'))\ntried(lambda: libc.syscall(447, 0))\n"
        "tried(lambda: libc.shmget(0, 4096, 0o1600))\ntried(lambda: libc.semget(0, 1, 0o1600))\n"
        "tried(lambda: libc.msgget(0, 0o1600))\ntried(lambda: libc.syscall(240, b'q', 66, 384, 0))\n"
        "tried(lambda: libc.inotify_init1(0))\ntried(lambda: libc.syscall(206, 1000, ctypes.byref(ctypes.c_long())))\n"
        "f = open('/tmp/locked', 'w')\ntried(lambda: fcntl.lockf(f, fcntl.LOCK_EX, 1, 4))\n"
        "tried(lambda: os.setxattr('/tmp/locked', 'user.x', b'x' * 60000))\n"
        "tried(lambda: libc.mlock(ctypes.create_string_buffer(8192), 8192))\n"
        "tried(lambda: libc.syscall(250, 0, 0, 0, 0, 0))\ntried(lambda: libc.syscall(425, 8, 0))\n",
        ["EPERM"] * 4 + ["ENOSYS"] * 3 + ["EPERM"] * 2 + ["ENOSYS"] * 2 + ["EPERM"] * 3 + ["ENOSYS"] * 3
        + ["ENOLCK", "ENOTSUP", "EPERM", "EPERM", "EPERM"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_leads_out_is_refused(sandbox: Sandbox, name: str):
    body, answers = REFUSED[name]
    result = sandbox.run(sandbox.python(HEAD + body + TAIL), PATIENT)
    assert result.status == "ok", result
    assert json.loads(result.stdout) == answers


DETACHED = """
import os, time
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for fd in range(64):
                try: os.close(fd)
                except OSError: pass
            while True: time.sleep(1)
        os._exit(0)
print('gone', flush=True)
"""
KILLS_ALL = (
    "import os, time\nprint('kept', flush=True)\nos.kill(1, 9)\n"
    "if os.fork() == 0: time.sleep(600)\nos.kill(-1, 9)\ntime.sleep(0.05)\nprint('alive')"
)
SIGNALS_FIRST = (
    "import os\nfor n in range(1, 65):\n    if n not in (32, 33): os.kill(1, n)\n"
    "if os.fork() == 0: os._exit(0)\nos.wait(); print('first lives')"
)
INODES = "import os\nfor n in range(10 ** 6): os.close(os.open(f'/tmp/{n}', os.O_CREAT))"
LINKS = "import os\nopen('/tmp/f', 'w')\nfor n in range(10 ** 6): os.link('/tmp/f', f'/tmp/{n}')"
SYMLINKS = "import os\nfor n in range(10 ** 6): os.symlink('x' * 4000, f'/tmp/{n}')"
DEEP = "import os\nfor n in range(10 ** 6):\n    os.mkdir('d')\n    os.chdir('d')"
SPARSE = (
    "import os\nfd = os.open('/tmp/f', os.O_CREAT | os.O_RDWR)\nos.posix_fallocate(fd, 0, 15 << 20)\n"
    "for n in range(20): os.posix_fallocate(os.open(f'/tmp/{n}', os.O_CREAT | os.O_RDWR), 0, 15 << 20)"
)
SHARED_FILES = """
import mmap, os
for n in range(64):
    fd = os.open(f'/tmp/{n}', os.O_CREAT | os.O_RDWR); os.ftruncate(fd, 15 << 20)
    with mmap.mmap(fd, 15 << 20) as room:
        for at in range(0, 15 << 20, 4096): room[at] = 1
        room.madvise(mmap.MADV_DONTNEED)
"""
SHARED_MEMORY = """
import mmap, os
os.fork(); os.fork()
room = mmap.mmap(-1, 128 << 20)
for start in range(0, 128 << 20, 4 << 20):
    for at in range(start, start + (4 << 20), 4096): room[at] = 1
    room.madvise(mmap.MADV_DONTNEED, start, 4 << 20)
while True:
    try: os.wait()
    except ChildProcessError: break
print('held')
"""
PAGES_IN_PIPES = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
at = libc.mmap(None, ctypes.c_size_t(64 << 20), 3, 0x22, -1, 0)
at = (at + (2 << 20) - 1) & ~((2 << 20) - 1)
libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(32 << 20), 14)
ctypes.memset(at, 1, 32 << 20)
for n in range(16):
    words = (ctypes.c_size_t * 2)(at + (n << 21), 4096)
    if libc.vmsplice(os.pipe()[1], words, ctypes.c_size_t(1), 0) < 0: sys.exit('refused')
print('pinned 32 MB')
"""
SOCKETS = """
import os, socket, time
for _ in range(12):
    if os.fork() == 0: break
kept = []
while True:
    try:
        a, b = socket.socketpair(); a.setblocking(False); kept.append((a, b))
        while True: a.send(b'x' * 65536)
    except BlockingIOError: pass
    except OSError: time.sleep(600)
"""
SET_UID = (
    "import os, shutil\nshutil.copy('/usr/bin/id', '/tmp/id'); os.chmod('/tmp/id', 0o6755)\n"
    "print(os.statvfs('/tmp').f_flag & os.ST_NOSUID); os.execv('/tmp/id', ['id', '-u'])"
)
ENDS = {
    "daemons without descriptors": (DETACHED, PATIENT, "ok", b"gone\n"),
    "kill everything": (KILLS_ALL, PATIENT, "ok", b"kept\nalive\n"),
    "every signal to the first process": (SIGNALS_FIRST, PATIENT, "ok", b"first lives\n"),
    "stops itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", BRIEF, "timeout", b""),
    "stops its group": ("import os, signal\nos.killpg(0, signal.SIGSTOP)", BRIEF, "timeout", b""),
    "kills itself": ("import os\nos.kill(os.getpid(), 9)", PATIENT, "crashed", b""),
    "aborts": ("import os\nos.abort()", PATIENT, "crashed", b""),
    "closes all and goes on": ("import os\nos.closerange(0, 64)\nwhile True: pass", BRIEF, "timeout", b""),
    "files without end": (INODES, PATIENT, "crashed", b""),
    "hard links without end": (LINKS, PATIENT, "crashed", b""),
    "symbolic links without end": (SYMLINKS, PATIENT, "crashed", b""),
    "folders without end": (DEEP, PATIENT, "crashed", b""),
    "reserved files": (SPARSE, PATIENT, "crashed", b""),
    "shared files given back": (SHARED_FILES, PATIENT, "crashed", b""),
    "shared memory given back": (SHARED_MEMORY, PATIENT, "crashed", b""),
    "huge pages in pipes": (PAGES_IN_PIPES, PATIENT, "crashed", b""),
    "buffers of sockets": (SOCKETS, Limits(seconds=100.0, wall_seconds=200.0, memory_mb=128), "memory", b""),
    "a set-uid program": (SET_UID, PATIENT, "ok", b"65534\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_an_attack_gets_its_verdict_and_leaves_nothing(sandbox: Sandbox, name: str):
    source, limits, status, output = ENDS[name]
    ready = len(zygotes())
    result = sandbox.run(sandbox.python(source), limits)
    assert (result.status, result.stdout) == (status, output), result
    assert sandbox_processes() == [] and len(zygotes()) == ready


def test_a_run_sees_nothing_of_the_one_before(sandbox: Sandbox):
    leave = (
        "import os, builtins, json, random\nopen('/tmp/left', 'w').write('x'); os.mkdir('/tmp/d')\n"
        "builtins.left = json.left = 'the mark'; os.environ['LEFT'] = '1'; os.umask(0); random.seed(3)\nos.chdir('/')"
    )
    look = (
        "import os, builtins, json\nold = os.umask(0)\n"
        "print(os.listdir('/tmp'), os.listdir('/code'), 'LEFT' in os.environ, hasattr(builtins, 'left'), "
        "hasattr(json, 'left'), oct(old), os.getcwd(), os.getpid() < 4)"
    )
    for _ in range(2):
        assert sandbox.run(sandbox.python(leave, files={"/code/own/data": b"x"}), PATIENT).status == "ok"
        result = sandbox.run(sandbox.python(look), PATIENT)
        assert result.stdout == b"[] ['main.py'] False False False 0o22 /tmp True\n", result


def test_the_data_of_a_run_is_not_in_the_memory_of_the_next(sandbox: Sandbox):
    search = (
        "import re\nmark = ''.join(['xyzzy-', 'plugh-', '7531'])\nfound = 0\n"
        "for line in open('/proc/self/maps'):\n"
        "    start, end, rights, name = re.match(r'(\\w+)-(\\w+) (\\S+) \\S+ \\S+ \\S+ *(.*)', line).groups()\n"
        "    if rights.startswith('rw') and name != '[stack]':\n"
        "        with open('/proc/self/mem', 'rb') as file:\n"
        "            file.seek(int(start, 16)); found += file.read(int(end, 16) - int(start, 16)).count(mark.encode())\n"
        "print(found <= 2)"
    )
    mark = b"xyzzy-plugh-7531"
    told = sandbox.run(
        sandbox.python("input() * 2", files={"/code/solution.py": mark * 9}), PATIENT, mark * 9
    )
    assert told.status == "ok"
    # what is found is the searching program's own word
    assert sandbox.run(sandbox.python(search), PATIENT).stdout == b"True\n"


FAULTS = {
    "capabilities": ("        sealed.drop_capabilities()\n", "", "capabilities are left"),
    "bounding set": ("call(libc.prctl, DROP_BOUND, capability, 0, 0, 0)", "pass", "capabilities are left"),
    "filter": ("        sealed.filter()\n", "", "sockets can be made"),
    "descriptors": ("    os.closerange(3, MAX_FDS + 64)\n    os.chdir", "    os.chdir", "descriptors leak in"),
    "fresh /tmp": ('    mount("tmpfs", "/tmp",', '    0 and mount("tmpfs", "/tmp",', "check ended with crashed"),
    "bounded /tmp": ("nr_inodes={inodes},", "nr_inodes=0,", "/tmp is not bounded"),
    "bounded /dev/shm": ("nr_inodes={min(inodes, SEMAPHORES)},", "nr_inodes=0,", "/dev/shm is not bounded"),
    "sealed /code": ("REMOUNT | BIND | READ_ONLY | NO_SUID", "REMOUNT | BIND | NO_SUID", "/code can be written"),
    "read-only /proc": ('"/proc", READ_ONLY | NO_SUID', '"/proc", NO_SUID', "/proc can be written"),
    "hidden first process": ('call(libc.mount, b"/dev/shm", b"/proc/1", None, BIND, None)', "pass", "can be read"),
    "own processes": ("NEW_IPC | NEW_PROCESSES |", "NEW_IPC |", "not start a run: .*/proc"),
    "own IPC": ("NEW_MOUNTS | NEW_IPC |", "NEW_MOUNTS |", "ipc namespace is that of all runs"),
    "limits": ("resource.setrlimit(kind, (soft, hard))", "pass", "no limit of CPU"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_without_a_wall_of_the_run_it_refuses(sandbox, monkeypatch: pytest.MonkeyPatch, name: str):
    wall, instead, hole = FAULTS[name]
    whole = sandbox_process._text().decode()
    assert whole.count(wall) == 1
    monkeypatch.setattr(sandbox_process, "_text", lambda: whole.replace(wall, instead).encode())
    ready = len(zygotes())
    with pytest.raises(RewardError, match=hole):
        Sandbox.open()
    assert len(zygotes()) == ready


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
def test_a_compiled_program_has_the_same_walls(sandbox: Sandbox):
    from megatron_ring.rl.reward.code.programs import Built, build

    source = """
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <dirent.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <unistd.h>
int main() {
    int held = 0;
    for (int fd = 3; fd < 64; fd++) held += fcntl_open(fd);
    std::printf("%d %d %d %d %d\\n", held, unshare(CLONE_NEWUSER), mount("x", "/tmp", "tmpfs", 0, 0),
                mmap(0, 4096, 3, MAP_SHARED | MAP_ANONYMOUS, -1, 0) == MAP_FAILED, getppid());
    std::fflush(stdout);
    std::signal(SIGPIPE, SIG_DFL) == SIG_DFL ? std::abort() : std::exit(3);
}
""".replace("fcntl_open(fd)", "(lseek(fd, 0, SEEK_CUR) != -1)")
    built = build(sandbox, CodeJob(source=source, tests=(), language="cpp"), PATIENT)
    assert isinstance(built, Built), built
    result = sandbox.run(built.program, built.limits)
    # abort() ends a program that is not the first process of its namespace
    assert (result.status, result.stdout, result.exit_code) == ("crashed", b"0 -1 -1 1 1\n", 134)
