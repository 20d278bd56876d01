"""The verifier of code problems: score 1 only if every test passes in the sandbox (Ring-lite, arXiv 2506.14731).

``job`` defines what a reference may hold, ``compare`` when two outputs are equal, and ``blocks`` which block of a response
is the solution. What decides:

- stdin and function: the output is compared outside of the sandbox, which never sees the expected output.
- unit_test: the test runs in the sandbox, in a process that the solution's process cannot reach (``harness_test``). Calls
  between the two pass plain data. So exiting early, printing, or patching ``==`` or a library changes the solution's own
  process only: the test passes only with the values that it expects.

Three things can still pass a unit test wrongly: an expected value that the test itself passes to the solution as an
argument; a comparison of two objects of the solution, which calls the solution's ``__eq__``; and a test that any value
passes. A test that needs one process for both (it derives a class from one of the solution's, or patches the solution's
module) is refused, or gives ``verifier_error``.

A test that executes no assertion fails. A problem that an empty program solves is refused.
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

__all__ = ["CODE_KEYS", "CodeJob", "CodeVerifier", "check_reference", "same_output", "same_value"]

_START_SECONDS = 2.0
"""Wall clock to start and end one run in the sandbox on a busy machine, beside the run itself."""
_LEAST_SECONDS, _LEAST_MB = 1.0, 128
_MOST_TIMES = 4
_DOES_NOT_COMPILE = 90
_NOT_JSON = 91


class CodeVerifier:
    """The reward function of code problems; ``run_batch`` verifies many solutions at a time.

    Example: ``CodeVerifier(RewardConfig()).run_batch(jobs, workers=8)``.
    """

    def __init__(self, config: RewardConfig):
        self._limits = Limits(seconds=config.sandbox_timeout, memory_mb=config.sandbox_memory_mb)
        self._sandbox: Sandbox | None = None

    def load(self) -> None:
        """Open the sandbox, once. Raises RewardError if it cannot be used here."""
        self._sandbox = self._sandbox or Sandbox.open()

    def timeout(self, reference: Mapping[str, Any]) -> float:
        """Limit of one verification in seconds of wall clock: the sum of the compiler's and every test's limit.

        Example: 10 tests of Python at 5 s of CPU: ``10 * (5 * 5 + 2)`` is 270.
        """
        try:
            job = CodeJob.of(reference, "")
        except ValueError:
            return _START_SECONDS
        compiler = 0.0 if job.language == "python" else COMPILE.wall + _START_SECONDS
        return compiler + len(job.tests) * (self.limits_of(job).wall + _START_SECONDS)

    def __call__(self, prompt: Prompt, text: str) -> RewardResult:
        """Verify the block of ``text`` that is the solution."""
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
        return self.verify(replace(job, source=block))

    def verify(self, job: CodeJob) -> RewardResult:
        """Run the tests in order, up to the first that fails."""
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
            failure = self._run_test(built, job, test)
            if failure is not None:
                detail = f"test {number} of {len(job.tests)}: {failure.detail}"
                return RewardResult(score=0.0, status=failure.status, detail=detail)
        return RewardResult(score=1.0, status="correct")

    def run_batch(self, jobs: Sequence[CodeJob], workers: int) -> list[RewardResult]:
        """The results of ``jobs`` in their order; ``workers`` threads verify at the same time."""
        self.load()
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(self.verify, jobs))

    def limits_of(self, job: CodeJob) -> Limits:
        """Limits of one test of ``job``: those of the problem, clipped to at least 1 s and 128 MB and at most 4 times
        the settings; else the settings.
        """
        seconds, memory_mb = self._limits.seconds, self._limits.memory_mb
        if job.time_limit is not None:
            seconds = min(max(job.time_limit, _LEAST_SECONDS), _MOST_TIMES * seconds)
        if job.memory_limit_mb is not None:
            memory_mb = min(max(job.memory_limit_mb, _LEAST_MB), _MOST_TIMES * memory_mb)
        return Limits(seconds=seconds, memory_mb=memory_mb)

    def _run_test(self, built: Built, job: CodeJob, test: Any) -> RewardResult | None:
        """None if the test passes, else the result."""
        stdin, wanted_bytes = _stdin(job, test)
        limits = replace(built.limits, output_bytes=max(built.limits.output_bytes, 2 * wanted_bytes))
        assert self._sandbox is not None
        result = self._sandbox.run(built.program, limits, stdin)
        if result.status != "ok":
            return _explain(job, result)
        output = result.stdout.decode(errors="replace")
        if job.mode == "unit_test":
            return _unit_test_result(output, _last_line(result))
        if job.mode == "function":
            wanted = [test[key] for key in ("output", "or") if key in test]
            passed = any(_same_json(output, value) for value in wanted)
        else:
            passed = same_output(output, test["output"])
        return None if passed else _failed("wrong", output[:60])


def _stdin(job: CodeJob, test: Any) -> tuple[bytes, int]:
    """Standard input of the run, and the size of the expected output in bytes."""
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


def _unit_test_result(output: str, last_line: str) -> RewardResult | None:
    """The result that the test's process wrote; no other process can write to that descriptor."""
    try:
        said = json.loads(output)
        status, detail = said["status"], said["detail"]
    except (ValueError, TypeError, KeyError):
        return _failed("crashed", "the test's process ended without a result")
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
    """Is a problem's text Python that defines the function, as in HumanEval?"""
    try:
        return any(getattr(node, "name", "") == function for node in ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
