"""Whatever a library does with a model's text in isolation, the machine and other results are untouched."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_ring.config.rl import RewardConfig
from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.workers import pool as pool_module
from megatron_ring.rl.reward.workers import worker_handle as verifier_module
from megatron_ring.rl.reward.workers.confine import seccomp_filter
from megatron_ring.rl.reward.workers.isolation import Isolation, _probe, find_isolation
from megatron_ring.rl.reward.workers.pool import RewardPool, _result
from tests.helpers.reward.judging import becomes, own_processes, problem

_ATTEMPTS = """
import ctypes, json, os, resource, signal, sys
from megatron_ring.rl.reward.workers.confine import confine
confine(bytes.fromhex(sys.argv[1]))
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *words):
    if libc[name](*words) == -1:
        raise OSError(ctypes.get_errno(), name)
attempts = {
    "write a file": lambda: open(sys.argv[2], "w"),
    "change a file": lambda: open(sys.argv[3], "r+"),
    "cut a file": lambda: os.open(sys.argv[3], os.O_RDONLY | os.O_TRUNC),
    "truncate": lambda: os.truncate(sys.argv[3], 0),
    "remove": lambda: os.unlink(sys.argv[3]),
    "make a folder": lambda: os.mkdir(sys.argv[2]),
    "rename": lambda: os.rename(sys.argv[3], sys.argv[2]),
    "chmod": lambda: os.chmod(sys.argv[3], 0),
    "fork": os.fork,
    "vfork": lambda: call("vfork"),
    "run a program": lambda: os.execv("/usr/bin/true", ["true"]),
    "posix_spawn": lambda: os.posix_spawn("/usr/bin/true", ["true"], {}),
    "socket": lambda: __import__("socket").socket(),
    "pair": lambda: __import__("socket").socketpair(),
    "kill the supervisor": lambda: os.kill(os.getppid(), 0),
    "kill all": lambda: os.kill(-1, 0),
    "signal a thread": lambda: call("tgkill", os.getpid(), os.getpid(), 0),
    "a pidfd": lambda: os.pidfd_open(os.getppid()),
    "ptrace": lambda: call("ptrace", 16, os.getppid(), 0, 0),
    "unshare": lambda: call("unshare", 0x10000000),
    "change a limit": lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    "hidden memory": lambda: os.memfd_create("x"),
    "a segment": lambda: call("shmget", 0, 4096, 0o1600),
    "a dump": lambda: os.mkfifo(sys.argv[2]),
}
done = []
for name, attempt in attempts.items():
    try:
        attempt()
        done.append(name)
    except (OSError, ValueError):
        pass
try:
    bytearray(5 << 30)
    done.append("five gigabytes")
except MemoryError:
    pass
print(json.dumps(done))
"""


@pytest.fixture
def no_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without bubblewrap."""
    none = Isolation(method="none", missing="bwrap is not installed", filter_bytes=seccomp_filter())
    for module in (pool_module, verifier_module):
        monkeypatch.setattr(module, "find_isolation", lambda: none)


@pytest.fixture
def isolation() -> Isolation:
    isolation = find_isolation()
    if isolation.missing:
        pytest.skip(f"no isolation on this machine: {isolation.missing}")
    return isolation


def test_a_confined_process_can_do_nothing_but_compute_and_answer(tmp_path: Path):
    mine = tmp_path / "mine"
    mine.write_text("kept")
    words = [sys.executable, "-c", _ATTEMPTS, seccomp_filter().hex(), str(tmp_path / "new"), str(mine)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
    assert mine.read_text() == "kept" and list(tmp_path.iterdir()) == [mine]


def test_without_the_filter_the_attempts_succeed(tmp_path: Path):
    """So the test above can fail."""
    mine = tmp_path / "mine"
    mine.write_text("kept")
    harmless = _ATTEMPTS.replace("attempts = {", "attempts = {} and {")
    harmless = harmless.replace("done = []", "open(sys.argv[2], 'w'); open(sys.argv[3], 'r+'); done = []")
    words = [sys.executable, "-c", harmless, "", str(tmp_path / "new"), str(mine)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new").exists()


def test_an_isolated_process_sees_nothing_of_the_machine(isolation: Isolation, tmp_path: Path):
    (tmp_path / "secret").write_text("token")
    hidden = (str(tmp_path), "/etc/passwd", "/proc/1", str(Path.home() / ".ssh"))
    code = f"""
import json, os, socket
seen = [path for path in {hidden} if os.path.exists(path)]
try:
    socket.create_connection(("127.0.0.1", 9), 1)
except OSError as error:
    seen.append(error.errno)
print(json.dumps([seen, os.getuid() == 0, dict(os.environ).get("SECRET")]))
"""
    os.environ["SECRET"] = "token"
    try:
        with open(tmp_path / "log", "w+b") as log:
            process = isolation.start(("-c", code), pass_fds=(), log=log.fileno())
            assert process.wait(60) == 0
            log.seek(0)
            assert json.loads(log.read()) == [[1], False, None]  # EPERM: no socket can even be made
    finally:
        del os.environ["SECRET"]


@pytest.mark.parametrize("hole", ["os.getuid() == 0", "os.path.exists(sys.argv[1])"])
def test_isolation_with_a_hole_counts_as_none(
    isolation: Isolation, hole: str, monkeypatch: pytest.MonkeyPatch
):
    from megatron_ring.rl.reward.workers import isolation as module

    assert hole in module._PROBE
    monkeypatch.setattr(module, "_PROBE", module._PROBE.replace(hole, "True"))
    assert "the isolation has holes" in (_probe(isolation.method) or "")


def verifier_modes() -> list[str]:
    """What the kernel says of each verifier process."""
    modes = []
    for process in own_processes():
        with contextlib.suppress(psutil.Error, OSError):
            if "reward.worker" in " ".join(process.cmdline()) and not process.children():
                modes.append(Path(f"/proc/{process.pid}/status").read_text())
    return modes


def test_without_bubblewrap_verifiers_are_confined_and_this_is_said_once(no_isolation, caplog):
    with RewardPool.open(RewardConfig(reward_workers=2), domains={"math", "reasoning_gym"}) as pool:
        assert pool.submit(problem("math", answer="1/2"), r"\boxed{0.5}").result().status == "correct"
        entry = {"question": "1 + 2 =", "answer": "3", "metadata": {}}
        asked = problem("reasoning_gym", dataset="chain_sum", entry=entry)
        assert pool.submit(asked, r"\boxed{3}").result().status == "correct"
        # the one that has not been asked yet may still be starting
        deadline = time.monotonic() + 60
        while not (modes := verifier_modes()) or not all("Seccomp:\t2" in mode for mode in modes):
            assert time.monotonic() < deadline, modes
            time.sleep(0.05)
    with RewardPool.open(RewardConfig(reward_workers=2), domains={"math"}, warns=False):
        pass
    said = [record.message for record in caplog.records if "no isolation for verifiers" in record.message]
    assert len(said) == 1 and "bwrap is not installed" in said[0]


def test_without_bubblewrap_scorers_that_evaluate_are_refused(no_isolation):
    with RewardPool.open(RewardConfig(), domains={"reasoning_gym"}) as pool:
        asked = problem("reasoning_gym", dataset="of_a_later_version", entry={"metadata": {}})
        with pytest.raises(RewardError, match=r"of_a_later_version evaluates .* bwrap is not installed"):
            pool.submit(asked, r"\boxed{1}")


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"result": None},
        {"result": [1.0, "correct"]},
        {"result": ["1.0", "correct", ""]},
        {"result": [float("inf"), "correct", ""]},
        {"result": [float("nan"), "correct", ""]},
        {"result": [1.0, "splendid", ""]},
        {"result": [1.0, "correct", ["x"]]},
        {"result": {"score": 1.0}},
    ],
)
def test_an_isolated_workers_message_without_a_result_is_a_verifier_error(message: dict):
    result = _result(message, 1.0)
    assert (result.score, result.status) == (0.0, "verifier_error")


def _workers() -> list[psutil.Process]:
    return [p for p in own_processes() if "reward.worker" in " ".join(p.cmdline())]


@pytest.mark.parametrize("which", ["supervisor", "verifier"])
def test_a_stopped_idle_worker_costs_a_job_seconds_whatever_the_time_limit(
    which: str, plugin: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pool_module, "_SILENCE_SECONDS", 6.0)
    config = RewardConfig(reward_functions=(f"right={plugin}:right",), reward_workers=1, reward_timeout=600.0)
    with RewardPool.open(config) as pool:
        pool.submit(problem("right"), "x").result()
        verifier = int(pool.submit(problem("right"), "x").result().detail.split()[0])
        supervisor = psutil.Process(verifier).ppid()
        os.kill(verifier if which == "verifier" else supervisor, signal.SIGSTOP)
        # a worker may take two minutes to load, which is how long this took
        assert pool.submit(problem("right"), "x").result(90.0).score == 1.0
        assert pool.num_replaced == 0


def test_a_worker_is_replaced_after_its_share_and_no_result_is_lost(plugin: str):
    functions = (f"right={plugin}:right",)
    config = RewardConfig(reward_functions=functions, reward_workers=1, reward_worker_judgements=3)
    with RewardPool.open(config, domains={"math"}) as pool:
        results = [pool.submit(problem("right"), str(n)).result() for n in range(9)]
        pids = [result.detail.split()[0] for result in results]
        assert len(set(pids)) == 3 and pids == sorted(pids, key=pids.index)
        math = [pool.submit(problem("math", answer="4"), rf"\boxed{{{n}}}").result().score for n in range(9)]
        assert math == [float(n == 4) for n in range(9)]


DETACHED = """
import subprocess, sys, time
from megatron_ring.rl.types import RewardResult

def detach(prompt, text):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
    grandchild = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3601)'])"
    subprocess.run([sys.executable, "-c", grandchild], start_new_session=True)
    open(text, "w").write(str(child.pid))
    if prompt.reference.get("hang"):
        time.sleep(3600)
    return RewardResult(score=1.0, status="correct")
"""


@pytest.fixture
def detaching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RewardConfig:
    (tmp_path / "ring_test_detaching.py").write_text(DETACHED)
    monkeypatch.syspath_prepend(tmp_path)
    functions = ("detach=ring_test_detaching:detach",)
    return RewardConfig(reward_functions=functions, reward_workers=1, reward_timeout=5.0)


def _sleepers() -> list[str]:
    return [word for p in own_processes() for word in p.cmdline() if "time.sleep(360" in word]


@pytest.mark.parametrize("how", ["close", "timeout", "share"])
def test_what_a_reward_function_detaches_ends_with_its_process(
    how: str, detaching: RewardConfig, tmp_path: Path
):
    import dataclasses

    config = dataclasses.replace(detaching, reward_worker_judgements=1 if how == "share" else 1000)
    with RewardPool.open(config) as pool:
        asked = problem("detach", hang=True) if how == "timeout" else problem("detach")
        result = pool.submit(asked, str(tmp_path / "pid")).result()
        assert result.status == ("timeout" if how == "timeout" else "correct")
        if how == "close":
            assert len(_sleepers()) == 2
        else:
            assert becomes(lambda: _sleepers() == [])
    assert _sleepers() == []


def test_what_a_reward_function_detaches_dies_with_the_trainer(detaching: RewardConfig, tmp_path: Path):
    code = f"""
import sys, time
sys.path[:] = {sys.path!r}
from tests.helpers.reward.judging import problem
from megatron_ring.config.rl import RewardConfig
from megatron_ring.rl.reward.workers.pool import RewardPool
config = RewardConfig(reward_functions=("detach=ring_test_detaching:detach",), reward_workers=1)
with RewardPool.open(config) as pool:
    print(pool.submit(problem("detach"), {str(tmp_path / "pid")!r}).result().status, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == "correct\n"
        assert len(_sleepers()) == 2
        trainer.kill()
    assert becomes(lambda: _sleepers() == [])
