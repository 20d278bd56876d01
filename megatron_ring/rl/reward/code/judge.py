"""Code: 1 only if every test passes in the sandbox (Ring-lite, arXiv 2506.14731).

What a problem's reference may hold is said in ``job``, what equal outputs are in ``compare``, which block of
a response counts in ``blocks``. Where the verdict comes from:

- stdin and function: an expected output never enters the sandbox; what the program wrote is compared out here.
- unit_test: the test runs inside, in a process that the solution's cannot reach (``harness_tester``). Calls pass
  between the two as plain data, so whatever a solution patches, prints, reads or ends is its own process's; it passes
  only with the values that the test expects. What it cannot withhold: an answer that the test itself tells the
  solution (by an argument), a comparison of two of the solution's own objects, which is the solution's ``__eq__``, and
  tests that are passed by any value. A test that needs both in one process (a class derived from the
  solution's, a patched module of it) is refused by name or is ``verifier_error``.

A test without an executed assertion is no pass, nor is a problem that a program which does nothing passes.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from megatron_ring.config.rl import RewardConfig
from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.rl.reward.code.blocks import solution_block
from megatron_ring.rl.reward.code.compare import read_json, same_output, same_value, write_json
from megatron_ring.rl.reward.code.job import CODE_KEYS, CodeJob, check_reference, checked
from megatron_ring.rl.reward.code.programs import COMPILE, Built, build, check_language
from megatron_ring.rl.reward.code.unit_tests import read_unit_test
from megatron_ring.rl.reward.sandbox.command import Limits
from megatron_ring.rl.reward.sandbox.run import RunResult
from megatron_ring.rl.reward.sandbox.sandbox import Sandbox
from megatron_ring.rl.types import RewardResult

__all__ = ["CODE_KEYS", "CodeJob", "CodeJudge", "check_reference", "same_output", "same_value"]

_START_SECONDS = 2.0
"""Wall clock to start and end one sandbox on a busy machine, beside the run."""
_LEAST_SECONDS, _LEAST_MB = 1.0, 128
_MOST_TIMES = 4
_DOES_NOT_COMPILE = 90
_NOT_JSON = 91


class CodeJudge:
    """The reward function of code problems, and its batch form.

    Example: ``CodeJudge(RewardConfig()).run_batch(jobs, workers=8)``.
    """

    def __init__(self, config: RewardConfig):
        self._limits = Limits(seconds=config.sandbox_timeout, memory_mb=config.sandbox_memory_mb)
        self._sandbox: Sandbox | None = None

    def load(self) -> None:
        """Try the sandbox once. Raises RewardError where it cannot be used."""
        self._sandbox = self._sandbox or Sandbox.open()

    def seconds(self, reference: Mapping[str, Any]) -> float:
        """The most wall clock that a judgement may take: the compiler's and every test's limit, and their starts.

        Example: 10 tests of Python at 5 s of CPU: ``10 * (5 * 5 + 2)`` is 270.
        """
        try:
            job = CodeJob.of(reference, "")
        except ValueError:
            return _START_SECONDS
        compiler = 0.0 if job.language == "python" else COMPILE.wall + _START_SECONDS
        return compiler + len(job.tests) * (self.limits_of(job).wall + _START_SECONDS)

    def __call__(self, prompt: Prompt, text: str) -> RewardResult:
        """Judge the block of ``text`` that is the solution."""
        try:
            job = CodeJob.of(prompt.reference, "")
        except ValueError as error:
            return _failed("verifier_error", str(error))
        if job.function and not job.prompt and _is_python(prompt.text, job.function):
            job = replace(job, prompt=prompt.text)
        names = {job.function.partition("(")[0]} if job.function else set()
        if job.mode == "unit_test" and not names:
            names = set(read_unit_test(job.tests[0]).names)
        block = solution_block(text, job.language, names)
        if block is None:
            return _failed("parse_error", f"no ``` block of {job.language} code")
        return self.judge(replace(job, source=block))

    def judge(self, job: CodeJob) -> RewardResult:
        """Run the tests in order up to the first that fails."""
        self.load()
        assert self._sandbox is not None
        check_language(job.language, job.mode)
        try:
            job = checked(job)
        except ValueError as error:
            return _failed("verifier_error", str(error))
        built = build(self._sandbox, job, self.limits_of(job))
        if isinstance(built, RewardResult):
            return built
        for number, test in enumerate(job.tests, 1):
            verdict = self._run_test(built, job, test)
            if verdict is not None:
                detail = f"test {number} of {len(job.tests)}: {verdict.detail}"
                return RewardResult(score=0.0, status=verdict.status, detail=detail)
        return RewardResult(score=1.0, status="correct")

    def run_batch(self, jobs: Sequence[CodeJob], workers: int) -> list[RewardResult]:
        """The verdicts of ``jobs`` in their order, ``workers`` of them judged at the same time."""
        self.load()
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(self.judge, jobs))

    def limits_of(self, job: CodeJob) -> Limits:
        """What one test of ``job`` may use: its own limits, from 1 s and 128 MB up to 4 times the settings."""
        seconds, memory_mb = self._limits.seconds, self._limits.memory_mb
        if job.time_limit is not None:
            seconds = min(max(job.time_limit, _LEAST_SECONDS), _MOST_TIMES * seconds)
        if job.memory_limit_mb is not None:
            memory_mb = min(max(job.memory_limit_mb, _LEAST_MB), _MOST_TIMES * memory_mb)
        return Limits(seconds=seconds, memory_mb=memory_mb)

    def _run_test(self, built: Built, job: CodeJob, test: Any) -> RewardResult | None:
        """None if the test is passed."""
        stdin, wanted_bytes = _stdin(job, test)
        limits = replace(built.limits, output_bytes=max(built.limits.output_bytes, 2 * wanted_bytes))
        assert self._sandbox is not None
        result = self._sandbox.run(built.program, limits, stdin)
        if result.status != "ok":
            return _explain(job, result)
        output = result.stdout.decode(errors="replace")
        if job.mode == "unit_test":
            return _unit_verdict(output, _last_line(result))
        if job.mode == "function":
            wanted = [test[key] for key in ("output", "or") if key in test]
            passed = any(_same_json(output, value) for value in wanted)
        else:
            passed = same_output(output, test["output"])
        return None if passed else _failed("wrong", output[:60])


def _stdin(job: CodeJob, test: Any) -> tuple[bytes, int]:
    """What the program reads, and the bytes that its output may rightly have."""
    if job.mode == "unit_test":
        read = read_unit_test(test, job.function)
        said = {"test": test, "prompt": job.prompt, "entry": job.function}
        return json.dumps({**said, "names": read.names, "calls_check": read.calls_check}).encode(), 0
    if job.mode == "function":
        task = {"function": job.function, "lines": test["lines"]}
        return json.dumps(task).encode(), len(write_json(test["output"]))
    return test["input"].encode(errors="surrogateescape"), len(
        test["output"].encode(errors="surrogateescape")
    )


def _same_json(output: str, expected: Any) -> bool:
    try:
        return same_value(read_json(output), expected)
    except (ValueError, RecursionError):
        return False


def _unit_verdict(output: str, last_line: str) -> RewardResult | None:
    """What the test's process wrote, and no other can write."""
    try:
        said = json.loads(output)
        status, detail = said["status"], said["detail"]
    except (ValueError, TypeError, KeyError):
        return _failed("crashed", "the test's process ended without a word")
    if status == "passed":
        return None
    return _failed("verifier_error" if status == "unsupported" else status, detail or last_line)


def _last_line(result: RunResult) -> str:
    lines = result.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else f"exit code {result.exit_code}"


def _explain(job: CodeJob, result: RunResult) -> RewardResult:
    said = _last_line(result)
    if result.status == "crashed" and job.language == "python":
        if result.exit_code == _DOES_NOT_COMPILE and job.mode != "unit_test":
            return _failed("compile_error", said)
        if job.mode == "function" and result.exit_code == _NOT_JSON:
            return _failed("wrong", said)
    if result.status in ("timeout", "memory", "output_limit"):
        return _failed(result.status, f"after {result.seconds:.1f} s")
    return _failed(result.status, said)


def _failed(status: Any, detail: str) -> RewardResult:
    return RewardResult(score=0.0, status=status, detail=" ".join(detail.split()))


def _is_python(text: str, function: str) -> bool:
    """Whether a problem's text is HumanEval's: Python that defines the function."""
    try:
        return any(getattr(node, "name", "") == function for node in ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
