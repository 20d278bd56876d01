"""Verifiers that hang or die cost one response its score, and nothing else. Real processes throughout."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from megatron_ring.config.rl import RewardConfig
from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.workers.pool import RewardPool
from tests.helpers.reward.judging import becomes, config, own_processes, problem, sandbox_processes, zygotes

ROOT = Path(__file__).parents[3]


def is_alive(pid: int) -> bool:
    return pid in [process.pid for process in own_processes()]


def pid_in(file: Path) -> int:
    """What a verifier that hangs writes there first."""
    assert becomes(lambda: file.exists() and file.read_text() != "")
    return int(file.read_text())


def test_every_response_gets_its_own_result_whatever_order_they_end_in(plugin: str, tmp_path: Path):
    gate = tmp_path / "gate"
    with RewardPool.open(config(plugin, reward_workers=2), domains={"math"}) as pool:
        slow = pool.submit(problem("wait"), str(gate))
        fast = [pool.submit(problem("math", answer=str(n % 3)), rf"\boxed{{{n}}}") for n in range(30)]
        assert [f.result().score for f in fast] == [1.0, 1.0, 1.0] + [0.0] * 27
        assert not slow.done()
        gate.touch()
        assert slow.result().detail.endswith(f" {gate}")
        assert pool.submit(problem("math", answer="1/2"), r"\boxed{0.5}").result().status == "correct"
        assert pool.num_replaced == 0


def test_scoring_goes_on_beside_the_callers_work_in_as_many_processes_as_asked(plugin: str, tmp_path: Path):
    gate = tmp_path / "gate"
    with RewardPool.open(config(plugin, reward_workers=2)) as pool:
        futures = [pool.submit(problem("wait"), str(gate)) for _ in range(2)]
        assert becomes(lambda: len(list(tmp_path.glob("gate.*"))) == 2)
        assert not any(future.done() for future in futures)
        gate.touch()
        assert len({future.result().detail.split()[0] for future in futures}) == 2


def test_a_verifier_that_hangs_is_killed_whatever_else_the_process_has_open(plugin: str, tmp_path: Path):
    """select() knows no file number above 1023, and a trainer on many ranks has more sockets than that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2048)), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with RewardPool.open(config(plugin, reward_timeout=5.0)) as pool:
            assert pool.submit(problem("hang"), str(tmp_path / "pid")).result().status == "timeout"
            assert pool.submit(problem("right"), "x").result().score == 1.0
    finally:
        for number in opened:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_verifier_that_hangs_is_killed_and_replaced(plugin: str, tmp_path: Path):
    with RewardPool.open(config(plugin, reward_timeout=5.0)) as pool:
        hung = pool.submit(problem("hang"), str(tmp_path / "pid"))
        after = pool.submit(problem("right"), "x")
        result = hung.result()
        assert (result.score, result.status, result.detail) == (0.0, "timeout", "verifier killed after 5 s")
        pid = pid_in(tmp_path / "pid")
        assert not is_alive(pid)
        assert after.result().score == 1.0
        assert after.result().detail.split()[0] != str(pid)
        assert pool.num_replaced == 1


def test_a_verifier_that_dies_is_replaced_and_its_last_words_are_kept(plugin: str):
    with RewardPool.open(config(plugin)) as pool:
        died, left = pool.submit(problem("die"), ""), pool.submit(problem("leave"), "")
        after = pool.submit(problem("right"), "x")
        assert died.result().status == left.result().status == "verifier_error"
        assert died.result().detail == "verifier died: signal SIGSEGV: the last words of a verifier"
        assert left.result().detail == "verifier died: exit code 0"
        assert after.result().score == 1.0
        assert pool.num_replaced == 2


def test_a_worker_that_dies_idle_costs_no_response_its_score(plugin: str):
    with RewardPool.open(config(plugin)) as pool:
        idle = int(pool.submit(problem("right"), "x").result().detail.split()[0])
        os.kill(idle, signal.SIGKILL)
        assert pool.submit(problem("right"), "x").result().score == 1.0
        assert pool.num_replaced == 0


def test_many_deaths_over_responses_do_not_break_the_pool(plugin: str):
    with RewardPool.open(config(plugin)) as pool:
        futures = [pool.submit(problem("leave"), "") for _ in range(4)]
        assert {f.result().status for f in futures} == {"verifier_error"}
        assert pool.submit(problem("right"), "x").result().score == 1.0


def test_a_bug_in_the_pools_own_thread_ends_every_wait(plugin: str, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(RewardPool, "_settle", broken)
    with RewardPool.open(config(plugin, reward_workers=1)) as pool:
        futures = [pool.submit(problem("right"), "x") for _ in range(3)]
        for future in futures:
            with pytest.raises(KeyError, match="a bug"):
                future.result(timeout=60)
        with pytest.raises(KeyError, match="a bug"):
            pool.submit(problem("right"), "x")


def test_exceptions_and_other_results_are_values(plugin: str):
    with RewardPool.open(config(plugin)) as pool:
        failed, number = pool.submit(problem("fail"), ""), pool.submit(problem("number"), "")
        assert (failed.result().status, failed.result().detail) == (
            "verifier_error",
            "KeyError: 'no such thing'",
        )
        assert number.result().detail == "returned float, not RewardResult"
        broken = pool.submit(problem("math"), r"\boxed{1}").result()
        assert (broken.status, broken.detail) == ("verifier_error", "KeyError: 'answer'")


def test_a_process_that_ignores_its_childrens_ends_is_told_so(plugin: str):
    """It waited for a minute for each method of isolation, and went on without."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with (
            pytest.raises(RewardError, match=r"SIGCHLD is ignored.*SIG_DFL"),
            RewardPool.open(config(plugin)),
        ):
            pass
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("text", ["returns", "raises"])
def test_a_copy_that_comes_back_from_a_function_answers_for_no_response(plugin: str, text: str):
    """Its word would be a second result, and that of the next response."""
    with RewardPool.open(config(plugin)) as pool:
        first, second = pool.submit(problem("comes_back"), text), pool.submit(problem("right"), "second")
        assert (first.result().status, first.result().detail.split()[1]) == ("correct", text)
        assert second.result().detail.split()[1] == "second"


def test_an_alarm_that_a_function_leaves_does_not_go_off_in_the_next(plugin: str, tmp_path: Path):
    with RewardPool.open(config(plugin)) as pool:
        assert pool.submit(problem("leaves_an_alarm"), "x").result().score == 1.0
        late = pool.submit(problem("wait"), str(tmp_path / "gate"))
        assert becomes(lambda: list(tmp_path.glob("gate.*")) != [])
        assert not becomes(late.done, 0.2)
        (tmp_path / "gate").touch()
        assert late.result().score == 1.0


def test_a_function_that_kills_its_group_ends_itself_alone(plugin: str):
    with RewardPool.open(config(plugin)) as pool:
        ended = [pool.submit(problem("ends_its_group"), "").result() for _ in range(4)]
        assert {each.detail for each in ended} == {"verifier died: signal SIGKILL"}
        assert pool.submit(problem("right"), "x").result().score == 1.0


def test_a_result_counts_however_long_its_detail_is(plugin: str):
    with RewardPool.open(config(plugin)) as pool:
        result = pool.submit(problem("says_much"), "").result()
        assert (result.status, set(result.detail)) == ("correct", {"x"})


def test_a_log_of_any_size_is_never_read_whole(plugin: str):
    with RewardPool.open(config(plugin)) as pool:
        assert "SIGKILL" in pool.submit(problem("prints_much_and_dies"), "").result().detail
        for worker in list(pool._workers):
            assert os.fstat(worker._log.fileno()).st_size == 64 << 30
            os.kill(worker._process.pid, signal.SIGKILL)
        assert pool.submit(problem("right"), "x").result().score == 1.0


def test_what_verifiers_print_does_not_pile_up(plugin: str):
    with RewardPool.open(config(plugin)) as pool:
        sizes = [int(pool.submit(problem("chatter"), "").result().detail) for _ in range(3)]
        assert max(sizes) < 4 << 20


def test_neither_process_holds_what_the_other_needs():
    code = f"""
import sys, time
import torch
from megatron_ring.rl.reward.workers.pool import RewardPool
sys.path[:0] = [{str(ROOT)!r}]
from tests.helpers.reward.judging import PLUGIN, problem
import tempfile, pathlib
folder = tempfile.TemporaryDirectory()
pathlib.Path(folder.name, "mine.py").write_text(PLUGIN)
sys.path[:0] = [folder.name]
from megatron_ring.config.rl import RewardConfig
# no guard: a verifier never imports the entry script
with RewardPool.open(RewardConfig(reward_functions=("modules=mine:modules",)), domains=["math"]) as pool:
    assert pool.submit(problem("math", answer="1/2"), r"\\boxed{{0.5}}").result().score == 1.0
    print(pool.submit(problem("modules"), "").result().detail)
assert not {{"math_verify", "sympy.core", "reasoning_gym", "mine"}} & (set(sys.modules) - before)
""".replace("import torch\n", "import torch\nbefore = set(sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "worker.py, torch: False\n"), done.stderr


def test_workers_die_with_the_trainer(plugin: str, tmp_path: Path):
    code = f"""
import sys, time
sys.path[:] = {sys.path!r}
from tests.helpers.reward.judging import config, problem
from megatron_ring.rl.reward.workers.pool import RewardPool
with RewardPool.open(config({plugin!r}, reward_workers=2, reward_timeout=600.0)) as pool:
    pool.submit(problem("hang"), {str(tmp_path / "busy")!r})
    print(pool.submit(problem("right"), "x").result().detail.split()[0], flush=True)
    time.sleep(600)
"""
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as trainer:
        assert trainer.stdout is not None
        idle = int(trainer.stdout.readline())
        busy = pid_in(tmp_path / "busy")
        assert idle != busy and is_alive(idle) and is_alive(busy)
        trainer.kill()
    assert becomes(lambda: not is_alive(idle) and not is_alive(busy))


def test_closing_kills_what_runs_and_cancels_what_waits(plugin: str, tmp_path: Path):
    with RewardPool.open(config(plugin, reward_timeout=600.0)) as pool:
        running = pool.submit(problem("hang"), str(tmp_path / "pid"))
        waiting = [pool.submit(problem("right"), "x") for _ in range(3)]
        pid = pid_in(tmp_path / "pid")
        assert is_alive(pid)
    assert not is_alive(pid)
    for future in [running, *waiting]:
        with pytest.raises(CancelledError):
            future.result(0)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(problem("right"), "x")


def test_a_killed_verifier_takes_its_sandbox_along(plugin: str, sandbox):
    ready = len(zygotes())
    with RewardPool.open(config(plugin, reward_timeout=5.0)) as pool:
        assert pool.submit(problem("sandboxed"), "").result().status == "timeout"
        assert becomes(lambda: sandbox_processes() == [])
    with RewardPool.open(config(plugin, reward_timeout=600.0)) as pool:
        pool.submit(problem("sandboxed"), "")
        # the run's first and the four that the program makes of itself; Sandbox.open's check has fewer
        assert becomes(lambda: len(sandbox_processes()) == 5)
    assert becomes(lambda: sandbox_processes() == [] and len(zygotes()) == ready)


def test_code_is_verified_in_the_sandbox(plugin: str, sandbox):
    with RewardPool.open(config(plugin, reward_workers=2), domains={"code"}) as pool:
        prompt = problem("code", tests=[{"input": "2", "output": "4"}])
        futures = [pool.submit(prompt, f"```python\nprint(int(input()) * {n})\n```") for n in (2, 3)]
        assert [f.result().status for f in futures] == ["correct", "wrong"]


def test_a_domain_without_a_function_is_refused_at_once(plugin: str):
    line = (
        "domain=song has no reward function, only .*right.* have; add --reward-functions song=module:function"
    )
    with pytest.raises(RewardError, match=line), RewardPool.open(config(plugin), domains={"math", "song"}):
        pass
    with RewardPool.open(config(plugin)) as pool, pytest.raises(RewardError, match=line):
        pool.submit(problem("song"), "x")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"reward_workers": 0}, "reward_workers=0 must be at least 1; try 2"),
        ({"reward_functions": ("p=no_such:f",)}, "no module no_such; install it or set PYTHONPATH"),
        ({"reward_functions": ("p=ring_test_rewards:nothing",)}, "module ring_test_rewards has no nothing"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_verified(plugin: str, words: dict, line: str):
    with pytest.raises(RewardError, match=line), RewardPool.open(RewardConfig(**words)):
        pass


def test_workers_that_cannot_start_are_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "ring_test_deadly.py").write_text(
        "import os, sys\nprint('no luck', file=sys.stderr)\nos._exit(9)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    deadly = RewardConfig(reward_functions=("p=ring_test_deadly:f",))
    with pytest.raises(RewardError) as caught, RewardPool.open(deadly):
        pass
    line = str(caught.value)
    assert "reward workers died 3 times in a row" in line and "exit code 9: no luck" in line
    assert "\n" not in line


def test_a_missing_sandbox_is_refused_at_the_start_or_by_the_future(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    # workers inherit the path on which a package hides the sandbox's filter
    (tmp_path / "pyseccomp.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(tmp_path)
    line = (
        r"pyseccomp cannot be used \(not here\), but the code sandbox needs it; run tools/setup_sandbox\.sh"
    )
    with pytest.raises(RewardError, match=line), RewardPool.open(RewardConfig(), domains={"code"}):
        pass
    with RewardPool.open(RewardConfig(reward_workers=1)) as pool:
        prompt = problem("code", tests=[{"input": "", "output": "1"}])
        future = pool.submit(prompt, "```\nprint(1)\n```")
        with pytest.raises(RewardError, match=line):
            future.result()
        assert pool.submit(problem("math", answer="1"), r"\boxed{1}").result().score == 1.0


def test_no_descriptor_is_left_open(plugin: str, tmp_path: Path):
    def use() -> int:
        with RewardPool.open(config(plugin, reward_timeout=0.3)) as pool:
            pool.submit(problem("hang"), str(tmp_path / "pid")).result()
            pool.submit(problem("die"), "").result()
        return len(os.listdir("/proc/self/fd"))

    assert use() == use()


def test_code_has_the_time_of_its_tests_and_not_a_verifiers(plugin: str, sandbox):
    with RewardPool.open(config(plugin, reward_timeout=0.2), domains={"code"}) as pool:
        prompt = problem("code", tests=[{"input": "", "output": "2"}] * 3)
        slow = "import time\nt = time.process_time()\nwhile time.process_time() - t < 0.3: pass\nprint(2)"
        assert pool.submit(prompt, f"```python\n{slow}\n```").result().status == "correct"
        assert pool.num_replaced == 0
