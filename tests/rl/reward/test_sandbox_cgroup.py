"""The memory cgroup around a sandbox's processes: what it holds when nothing else does, and that none is left."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_ring.config.rl import RewardConfig
from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.code.job import CodeJob
from megatron_ring.rl.reward.sandbox import cgroup as sandbox_cgroup
from megatron_ring.rl.reward.sandbox import command as sandbox_command
from megatron_ring.rl.reward.sandbox import run as sandbox_run
from megatron_ring.rl.reward.sandbox import zygote_handle as sandbox_process
from megatron_ring.rl.reward.sandbox.cgroup import Group, MemoryCgroup
from megatron_ring.rl.reward.sandbox.command import Limits, Program
from megatron_ring.rl.reward.sandbox.sandbox import Sandbox
from megatron_ring.rl.reward.workers.pool import RewardPool
from tests.helpers.reward.judging import becomes, own_processes, problem, zygotes

PATIENT = Limits(seconds=100.0, wall_seconds=200.0, memory_mb=128)
ROOMY = dataclasses.replace(PATIENT, address_space=False)
SMALL = dataclasses.replace(ROOMY, memory_mb=24, tmp_bytes=8 << 20, tmp_inodes=1 << 20)


@pytest.fixture(scope="module")
def _usable(sandbox: Sandbox) -> None:
    if sandbox.memory_bound != "cgroup":
        pytest.skip("no memory cgroup that may be used here: memory is denied and counted alone")


@pytest.fixture
def grouped(_usable: None) -> Iterator[Sandbox]:
    own = Sandbox.open()
    yield own
    own.close()
    assert groups() == []


@pytest.fixture
def unguarded(grouped: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """Its runs may hold memory in every way, and nobody looks: only the group is left."""
    impossible = 1 << 40
    monkeypatch.setattr(sandbox_command, "_MISSING", "clone3 seccomp")
    monkeypatch.setattr(sandbox_command, "_SHARED_ANONYMOUS", impossible)
    filter_bytes = sandbox_command.seccomp_program.__wrapped__()
    monkeypatch.setattr(sandbox_process, "seccomp_program", lambda: filter_bytes)
    monkeypatch.setattr(sandbox_run, "_poll_usage", lambda watched: 1)
    # those that stand ready have the whole filter
    grouped.close()
    return grouped


def groups() -> list[str]:
    """Groups of this process's sandboxes, but for that which all tests share."""
    (place, *_) = sandbox_cgroup._places_here()
    mine = f"-{os.getpid()}-{sandbox_cgroup._started(os.getpid())}-"
    return [name for name in os.listdir(place.parent) if mine in name and name not in _shared]


_shared: set[str] = set()


@pytest.fixture(autouse=True)
def _without_the_shared_one(sandbox: Sandbox) -> Iterator[None]:
    _shared.update(zygote.group.path.name for zygote in sandbox._idle if zygote.group)
    yield
    _shared.clear()


def group_of(sandbox: Sandbox) -> Group:
    (zygote,) = sandbox._idle
    assert zygote.group is not None
    return zygote.group


GIVEN_BACK = """
import mmap
kept = []
for _ in range(50):
    room = mmap.mmap(-1, 8 << 20); kept.append(room)
    for at in range(0, 8 << 20, 4096): room[at] = 1
    room.madvise(mmap.MADV_DONTNEED)
print('held')
"""
LINKS = "import os\nopen('/tmp/f', 'w')\nfor n in range(300000): os.link('/tmp/f', f'/tmp/{n:0100}')\nprint('held')"
FILES = "import os\nfor n in range(100000): os.mknod(f'/tmp/{n}')\nprint('held')"
NAMELESS = """
import os
for n in range(40):
    fd = os.memfd_create('x')
    for _ in range(8): os.write(fd, bytes(1 << 20))
print('held')
"""
A_CHILD = """
import os
if os.fork() == 0:
    kept = []
    for _ in range(400): kept.append(b'x' * (1 << 20))
    os._exit(0)
os.wait(); print('held')
"""
HELD = {
    "shared memory given back": (GIVEN_BACK, ROOMY),
    "hard links": (LINKS, SMALL),
    "empty files": (FILES, SMALL),
    "files without a name": (NAMELESS, ROOMY),
    "a child that nobody misses": (A_CHILD, ROOMY),
}


@pytest.mark.parametrize("name", HELD)
def test_a_group_holds_what_is_neither_denied_nor_counted(unguarded: Sandbox, name: str):
    source, limits = HELD[name]
    result = unguarded.run(unguarded.python(source), limits)
    assert result.status == "memory", result
    # the same run without the group: what is measured here is the group
    unguarded.close()
    unguarded._memory = None
    result = unguarded.run(unguarded.python(source), limits)
    assert (unguarded.memory_bound, result.status, result.stdout) == ("counted", "ok", b"held\n"), result


@pytest.mark.skipif(shutil.which("javac") is None, reason="no JDK on this machine")
def test_a_group_holds_a_jvm(unguarded: Sandbox):
    from megatron_ring.rl.reward.code.programs import Built, build

    source = (
        "public class Main { public static void main(String[] w) { var kept = new java.util.ArrayList<byte[]>();"
        " for (int n = 0; n < 500; n++) { byte[] a = new byte[1 << 20]; java.util.Arrays.fill(a, (byte) 1);"
        " kept.add(a); } System.out.println(kept.size()); } }"
    )
    built = build(unguarded, CodeJob(source=source, tests=(), language="java"), PATIENT)
    assert isinstance(built, Built), built
    words = [word for word in built.program.argv if not word.startswith("-Xmx")]
    program = dataclasses.replace(built.program, argv=(words[0], "-Xmx1g", *words[1:]))
    assert unguarded.run(program, built.limits).status == "memory"
    unguarded.close()
    unguarded._memory = None
    assert unguarded.run(program, built.limits).stdout == b"500\n"


def test_memory_and_tmp_count_together_and_both_may_be_full(grouped: Sandbox):
    source = (
        "for n in range(4):\n    with open(f'/tmp/{n}', 'wb') as file: file.write(bytes(15 << 20))\n"
        "kept = b'x' * (100 << 20)\nprint('held')"
    )
    before = group_of(grouped)
    for _ in range(3):
        result = grouped.run(grouped.python(source), PATIENT)
        assert (result.status, result.stdout) == ("ok", b"held\n"), result
    group = group_of(grouped)
    assert group is before
    if group.version == 1:
        most = int((group.path / "memory.max_usage_in_bytes").read_text())
        assert 160 << 20 < most <= (128 + 64 + 1 << 20) + sandbox_cgroup.ALLOWANCE_BYTES
        assert int((group.path / "memory.usage_in_bytes").read_text()) < 16 << 20


def test_the_limit_follows_each_run(grouped: Sandbox):
    kept = "kept = b'x' * (%d << 20); print(len(kept))"
    for memory_mb in (300, 64, 200, 64):
        limits = dataclasses.replace(PATIENT, memory_mb=memory_mb)
        assert grouped.run(grouped.python(kept % (memory_mb - 44)), limits).status == "ok"
        wanted = (memory_mb + 64 + 1 << 20) + sandbox_cgroup.ALLOWANCE_BYTES
        name = "memory.limit_in_bytes" if group_of(grouped).version == 1 else "memory.max"
        assert int((group_of(grouped).path / name).read_text()) == wanted


def test_the_files_of_a_program_are_not_taken_from_its_memory(grouped: Sandbox):
    files = {f"/code/{n}": bytes(40 << 20) for n in range(4)}
    source = "kept = b'x' * (100 << 20); print('held')"
    result = grouped.run(grouped.python(source, files=files), PATIENT)
    assert (result.status, result.stdout) == ("ok", b"held\n"), result


def test_a_kill_of_the_process_that_stands_ready_is_the_runs_and_it_is_replaced(
    unguarded: Sandbox, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sandbox_run, "bytes_for", lambda program, limits: 40 << 20)
    # the interpreter that stands ready is the largest process of all
    flood = Program(argv=("/usr/bin/dd", "if=/dev/urandom", "of=/tmp/f", "bs=64k", "count=960"), files={})
    limits = dataclasses.replace(PATIENT, file_bytes=64 << 20)
    assert unguarded.run(flood, limits).status == "memory"
    assert unguarded.run(unguarded.python("print(3)"), PATIENT).stdout == b"3\n"


@pytest.mark.parametrize("above_mb, status", [(100, "crashed"), (1000, "memory")])
def test_a_kill_for_the_limit_of_a_group_above_is_not_the_runs(
    unguarded: Sandbox, above_mb: int, status: str
):
    place = unguarded._memory
    assert place is not None
    if place.version != 1:
        pytest.skip("version 2: a group with processes has none below it")
    above = place.make()
    try:
        above.begin(above_mb << 20)
        # what is below has it off, too, as far as nobody turns it on
        (above.path / "memory.oom_control").write_text("1" if status == "memory" else "0")
        unguarded._memory = MemoryCgroup(version=1, parent=above.path)
        source = "kept = b'x' * (400 << 20)"
        result = unguarded.run(unguarded.python(source), ROOMY)
        assert (result.status, result.exit_code) == (status, 137)
    finally:
        unguarded.close()
        above.remove()


def test_a_signal_that_looks_like_the_kernels_is_not_taken_for_it(grouped: Sandbox):
    source = "import os; os.kill(os.getpid(), 9)"
    assert grouped.run(grouped.python(source), PATIENT).status == "crashed"


def test_parallel_runs_have_limits_of_their_own(unguarded: Sandbox):
    greedy = "import time\nkept = []\nfor _ in range(400): kept.append(b'x' * (1 << 20))"
    modest = "import time\nkept = b'x' * (150 << 20); time.sleep(0.3); print('held')"

    def one(n: int) -> str:
        return unguarded.run(unguarded.python(greedy if n % 2 else modest), ROOMY).status

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(8))) == ["ok", "memory"] * 4
    assert len(groups()) == len(unguarded._idle) <= 4


def test_many_runs_leave_nothing(grouped: Sandbox):
    other = Sandbox.open()
    for n in range(200):
        own = (grouped, other)[n % 2]
        assert own.run(own.python(f"print({n})"), PATIENT).stdout == b"%d\n" % n
    assert sorted(groups()) == sorted(group_of(own).path.name for own in (grouped, other))
    other.close()
    assert groups() == [group_of(grouped).path.name]


def test_a_start_that_fails_leaves_nothing(grouped: Sandbox, monkeypatch: pytest.MonkeyPatch):
    grouped.close()
    assert groups() == []
    take = Group.take

    def refused(group: Group, pid: int) -> None:
        take(group, pid)
        raise PermissionError(1, "not now")

    monkeypatch.setattr(Group, "take", refused)
    ready = len(zygotes())
    with pytest.raises(RewardError, match=r"worked at the start and no longer does: .*not now"):
        grouped.run(grouped.python("print(3)"), PATIENT)
    assert groups() == [] and len(zygotes()) == ready


def test_what_a_killed_owner_leaves_is_removed_by_the_next(grouped: Sandbox):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            own = Sandbox.open()
            os.write(write, group_of(own).path.name.encode())
            own.run(own.python("import time; time.sleep(600)"), PATIENT)
        finally:
            os._exit(1)
    name = os.read(read, 1000).decode()
    os.close(read)
    os.close(write)
    place = grouped._memory
    assert place is not None and f"-{child}-" in name
    # that of an owner who lives stays
    assert Sandbox.open().memory_bound == "cgroup" and (place.parent / name).exists()
    ready = len(zygotes())
    os.kill(child, signal.SIGKILL)
    # until somebody opens the next: here, or another run on this machine
    assert becomes(lambda: len(zygotes()) == ready - 1)
    # its last process may still be on its way out; its owner is not buried yet
    assert becomes(lambda: Sandbox.open().memory_bound == "cgroup" and not (place.parent / name).exists())
    os.waitpid(child, 0)


def test_a_pool_of_verifiers_leaves_nothing_at_its_end(_usable: None, sandbox: Sandbox):
    place = sandbox._memory
    assert place is not None

    def groups_of_workers() -> set[str]:
        # ring-sandbox-NAMESPACE-PID-...: other runs on this machine have groups of theirs
        workers = {str(process.pid) for process in own_processes()}
        names = [name for name in os.listdir(place.parent) if name.startswith("ring-sandbox-")]
        return {name for name in names if name.split("-")[3] in workers}

    prompt = problem("code", tests=[{"input": "2", "output": "4"}])
    with RewardPool.open(RewardConfig(reward_workers=1), domains={"code"}) as pool:
        text = "```python\nprint(int(input()) * 2)\n```"
        assert pool.submit(prompt, text).result().status == "correct"
        made = groups_of_workers()
        assert made
    assert not made & set(os.listdir(place.parent))


def test_where_none_may_be_made_it_is_counted(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    def denied(place: MemoryCgroup) -> Group:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(MemoryCgroup, "make", denied)
    own = Sandbox.open()
    assert own.memory_bound == "counted" and [zygote.group for zygote in own._idle] == [None]
    source = "kept = b'x' * (600 << 20)"
    assert own.run(own.python("import time\n" + source + "\ntime.sleep(600)"), ROOMY).status == "memory"
    own.close()


def test_none_is_made_where_a_full_one_would_stop_the_machine(monkeypatch: pytest.MonkeyPatch):
    read = Path.read_text

    def setting(path: Path, value: str) -> str:
        return value if path == Path("/proc/sys/vm/panic_on_oom") else read(path)

    here = sandbox_cgroup._places_here()
    for value, found in ("0\n", here), ("1\n", here), ("2\n", []):
        monkeypatch.setattr(Path, "read_text", lambda path, value=value: setting(path, value))
        assert sandbox_cgroup._places_here() == found


GROUPS = "9:name=systemd:/s\n4:cpuset,memory:/job/7\n0::/user/app/run-3.scope\n"
V1 = "35 31 0:32 {root} {point} rw,relatime shared:9 - cgroup cgroup rw,memory\n"
V2 = "41 31 0:38 {root} {point} rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"


def test_version_1_is_used_below_its_own_group_within_its_limit(tmp_path: Path):
    point = tmp_path / "a folder"
    own = point / "7"
    own.mkdir(parents=True)
    mount = V1.format(root="/job", point=str(point).replace(" ", "\\040"))
    found = [MemoryCgroup(version=1, parent=own)]
    assert list(sandbox_cgroup._places(GROUPS, mount)) == found
    (own / "memory.use_hierarchy").write_text("1\n")
    assert list(sandbox_cgroup._places(GROUPS, mount)) == found
    # groups below would be free of the own group's limit
    (own / "memory.use_hierarchy").write_text("0\n")
    assert list(sandbox_cgroup._places(GROUPS, mount)) == []
    other = mount.replace("rw,memory", "rw,cpu,cpuacct")
    for words in (other, mount.replace(" /job ", " /jo "), mount.replace(" /job ", " /job/8 "), ""):
        assert list(sandbox_cgroup._places(GROUPS, words)) == []
    assert list(sandbox_cgroup._places("4:memory:/../other\n", V1.format(root="/", point=point))) == []


def test_version_2_is_used_below_a_delegated_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parent = tmp_path / "user" / "app"
    (parent / "run-3.scope").mkdir(parents=True)
    (parent / "cgroup.procs").touch()
    (parent / "cgroup.subtree_control").write_text("cpu memory pids\n")
    mount = V2.format(root="/", point=tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert list(sandbox_cgroup._places(GROUPS, mount)) == [MemoryCgroup(version=2, parent=parent)]
    # nobody's own group at the top of what is mounted has a parent here
    assert list(sandbox_cgroup._places("0::/\n", mount)) == []
    # for root, what systemd has not delegated is not to be touched
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert list(sandbox_cgroup._places(GROUPS, mount)) == []
    monkeypatch.setattr(os, "getxattr", lambda path, name: b"1" if Path(path) == tmp_path / "user" else b"0")
    assert list(sandbox_cgroup._places(GROUPS, mount)) == [MemoryCgroup(version=2, parent=parent)]
    (parent / "cgroup.subtree_control").write_text("cpu pids\n")
    assert list(sandbox_cgroup._places(GROUPS, mount)) == []


def test_version_2_says_what_was_killed_for_its_own_limit(tmp_path: Path):
    events = tmp_path / "memory.events"
    text = "low 0\nhigh 0\nmax {0}\noom {1}\noom_kill {2}\noom_group_kill 0\n"
    events.write_text(text.format(3, 1, 1))
    for name in ("memory.max", "memory.swap.max"):
        (tmp_path / name).write_text("max\n")
    group = Group(path=tmp_path, version=2)
    group.begin(1 << 30)
    assert (tmp_path / "memory.max").read_text() == f"{1 << 30}"
    assert (tmp_path / "memory.swap.max").read_text() == "0"
    assert not group.oom_killed()
    for counts, struck in ((9, 1, 1), False), ((9, 1, 2), False), ((9, 2, 1), False), ((9, 2, 2), True):
        events.write_text(text.format(*counts))
        assert group.oom_killed() == struck, counts
    group.begin(1 << 30)
    assert not group.oom_killed()
