"""Every admitted data set of reasoning-gym against hostile answers: what must pay does, and nothing else does.

``pytest -s`` prints the table: the constant that wins most, its share of the problems, and the share whose answer it is.
"""

import sys
import time

import pytest

from megatron_ring.rl.reward.gym import verifier as gym
from tests.helpers.reward.gym_answers import (
    ADMITTED,
    CONSTANTS,
    KILLERS,
    MANY_ANSWERS,
    SMALL,
    around,
    code,
    common_answers,
    is_own,
    own_answer,
    problems,
    score,
)

CPU_SECONDS = 0.5
FORBIDDEN = (
    "compile",
    "exec",
    "import",
    "open",
    "os.",
    "subprocess.",
    "shutil.",
    "socket.",
    "ctypes.",
    "pickle.",
)

_seen: list[str] | None = None


def _watch(event: str, arguments: tuple) -> None:
    if _seen is not None and event.startswith(FORBIDDEN):
        _seen.append(f"{event} {arguments!r:.80}")


sys.addaudithook(_watch)  # it stays, and is idle outside of watched()


def watched(prompt, answer: str) -> float:
    """The score; fails if an answer raises, costs too much, or has anything compiled, run, imported or opened."""
    global _seen
    # a collection of all that earlier tests left may fall into one judgement, not into three
    for _ in range(3):
        begun = time.process_time()
        _seen = []
        try:
            found = score(prompt, answer)
        finally:
            seen, _seen = _seen, None
            assert seen == [], answer[:80]
        if time.process_time() - begun < CPU_SECONDS:
            return found
    raise AssertionError(f"takes more than {CPU_SECONDS} seconds: {answer[:80]}")


def scan(dataset: str, count: int, parameters: str, canary) -> None:
    gym.load()
    prompts = problems(dataset, count, parameters)
    for prompt in prompts:
        assert watched(prompt, own_answer(prompt)) == 1.0, own_answer(prompt)
    most = ("", 0, 0)
    constants = {*CONSTANTS, *common_answers(25)}
    if dataset in MANY_ANSWERS:
        constants -= set(map(own_answer, prompts))
    else:
        constants |= set(map(own_answer, prompts[:10]))
    for constant in sorted(constants):
        wins = sum(watched(prompt, constant) for prompt in prompts)
        owns = sum(is_own(constant, prompt) for prompt in prompts)
        assert wins <= owns, f"{constant!r} wins {wins:.0f} of {len(prompts)}, and is the answer of {owns}"
        most = max(most, (constant, wins, owns), key=lambda row: row[1])
    for prompt in prompts[:8]:
        for answer in (*code(str(canary)), *around(prompt, prompts)):
            assert watched(prompt, answer) == 0.0, f"{answer!r} pays for {own_answer(prompt)!r}"
    for prompt in prompts[:2]:
        for answer in KILLERS:
            assert watched(prompt, answer) == 0.0 or answer.strip() == own_answer(prompt), answer[:80]
    assert not canary.exists()
    name = dataset + (f"?{parameters}" if parameters else "")
    print(
        f"\n{name:40.40} {most[0]!r:24.24} wins {most[1] / len(prompts):4.0%}, is {most[2] / len(prompts):4.0%}"
    )


@pytest.mark.parametrize("dataset", ADMITTED)
def test_only_the_right_answer_pays(dataset: str, tmp_path):
    scan(dataset, 25, "", tmp_path / "canary")


@pytest.mark.parametrize("dataset", sorted(SMALL))
def test_only_the_right_answer_pays_where_answers_are_few(dataset: str, tmp_path):
    scan(dataset, 25, SMALL[dataset], tmp_path / "canary")


@pytest.mark.slow
@pytest.mark.all
@pytest.mark.parametrize("dataset", ADMITTED)
def test_only_the_right_answer_pays_of_many_problems(dataset: str, tmp_path):
    scan(dataset, 60, "", tmp_path / "canary")


def test_no_answer_changes_a_later_verdict():
    cases = [
        (prompt, answer)
        for dataset in ADMITTED
        for prompt in problems(dataset, 25)[:2]
        for answer in (
            own_answer(prompt),
            "nan",
            "0",
            own_answer(problems(dataset, 25)[2]),
            *code("/nowhere/x")[:4],
        )
    ]
    forwards = [score(prompt, answer) for prompt, answer in cases]
    backwards = [score(prompt, answer) for prompt, answer in reversed(cases)]
    assert forwards == backwards[::-1] and 0 < sum(forwards) < len(cases)
