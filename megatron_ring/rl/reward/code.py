"""Code: 1 only if every test passes in the sandbox (PAPER.md, 3.3). Expected outputs never enter it.

``prompt.reference`` of a code problem:

- ``language``: python (default), cpp or java; ``mode``: stdin (default), function or unit_test, of which cpp and
  java know stdin;
- ``tests``: for stdin ``{"input": text, "output": text}``; for function ``{"input": [arguments], "output": value}``,
  or both as lines of JSON; for unit_test the source of a test, which sees the solution's names;
- ``function``: its name (mode function), of the module or of a class ``Solution``.

A unit test runs in the solution's own process, so code that goes looking for the token of its harness can forge a
pass. Leaving early, patched comparisons aside, cannot; use stdin or function where the policy is trained for long.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_ring.config.rl import RewardConfig
from megatron_ring.data.prompts import Prompt
from megatron_ring.rl.reward.answers import last_code_block
from megatron_ring.rl.reward.programs import Built, build
from megatron_ring.rl.reward.sandbox import Sandbox
from megatron_ring.rl.reward.sandbox_command import Limits
from megatron_ring.rl.reward.sandbox_run import RunResult
from megatron_ring.rl.types import RewardResult

Language = Literal["python", "cpp", "java"]
Mode = Literal["stdin", "function", "unit_test"]

_DOES_NOT_COMPILE = 90
_NOT_JSON = 91
_TEST_FAILED = 92
_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeJob:
    """A solution and what it has to pass.

    Example: ``CodeJob(language="python", mode="stdin", source="print(int(input()) + 1)",
    tests=({"input": "1\\n", "output": "2\\n"},))``.
    """

    source: str
    tests: tuple[Any, ...]
    language: Language = "python"
    mode: Mode = "stdin"
    function: str = ""

    @classmethod
    def of(cls, reference: Mapping[str, Any], source: str) -> CodeJob:
        """The job of a code problem's ``reference``. Raises ValueError if it has no tests."""
        if not reference.get("tests"):
            raise ValueError("a code problem without tests")
        return cls(
            source=source,
            tests=tuple(reference["tests"]),
            language=reference.get("language", "python"),
            mode=reference.get("mode", "stdin"),
            function=reference.get("function", ""),
        )


class CodeJudge:
    """The reward function of code problems, and its batch form.

    Example: ``CodeJudge(RewardConfig()).run_batch(jobs, workers=8)``.
    """

    def __init__(self, config: RewardConfig):
        self._limits = Limits(seconds=config.sandbox_timeout, memory_mb=config.sandbox_memory_mb)
        # just under the time after which the pool kills this process: an answer of ours says more
        self._budget = 0.9 * config.reward_timeout
        self._sandbox: Sandbox | None = None

    def load(self) -> None:
        """Try the sandbox once. Raises RewardError where it cannot be used."""
        self._sandbox = self._sandbox or Sandbox.open()

    def __call__(self, prompt: Prompt, text: str) -> RewardResult:
        """Judge the last fenced code block of ``text``."""
        block = last_code_block(text)
        if block is None:
            return RewardResult(score=0.0, status="parse_error", detail="no closed ``` code block")
        return self.judge(CodeJob.of(prompt.reference, block[1]))

    def judge(self, job: CodeJob) -> RewardResult:
        """Run the tests in order up to the first that fails."""
        self.load()
        assert self._sandbox is not None
        deadline = time.monotonic() + self._budget
        built = build(self._sandbox, job.language, job.mode, job.source, self._limits, self._budget)
        if isinstance(built, RewardResult):
            return built
        for number, test in enumerate(job.tests, 1):
            verdict = self._run_test(built, job, test, deadline - time.monotonic())
            if verdict is not None:
                detail = f"test {number} of {len(job.tests)}: {verdict.detail}"
                return RewardResult(score=0.0, status=verdict.status, detail=detail)
        return RewardResult(score=1.0, status="correct")

    def run_batch(self, jobs: Sequence[CodeJob], workers: int) -> list[RewardResult]:
        """The verdicts of ``jobs`` in their order, ``workers`` of them judged at the same time."""
        self.load()
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(self.judge, jobs))

    def _run_test(self, built: Built, job: CodeJob, test: Any, seconds_left: float) -> RewardResult | None:
        """None if the test is passed."""
        if seconds_left <= 0:
            return _failed("timeout", f"{self._budget:g} s for all tests together are over")
        token = secrets.token_hex(16)
        stdin, wanted_bytes = _stdin(job, test, token)
        limits = replace(
            built.limits,
            seconds=min(built.limits.seconds, seconds_left),
            output_bytes=max(built.limits.output_bytes, 2 * wanted_bytes),
        )
        assert self._sandbox is not None
        result = self._sandbox.run(built.program, limits, stdin)
        if result.status != "ok":
            return _explain(job, result)
        output = result.stdout.decode(errors="replace")
        if job.mode == "unit_test":
            return None if output == token else _failed("crashed", "ended before its tests did")
        if job.mode == "function":
            return None if _same_json(output, _output_value(test)) else _failed("wrong", output[:60])
        return None if same_output(output, test["output"]) else _failed("wrong", output[:60])


def same_output(output: str, expected: str) -> bool:
    """Equal line by line and word by word; numbers written with a point may differ by 1e-6.

    Blank lines at the end do not count. Example: ``same_output("0.3333333\\n", "0.33333333")``.
    """
    lines, wanted_lines = output.rstrip().splitlines(), expected.rstrip().splitlines()
    return len(lines) == len(wanted_lines) and all(
        _same_words(line.split(), wanted.split()) for line, wanted in zip(lines, wanted_lines, strict=True)
    )


def same_value(value: Any, expected: Any) -> bool:
    """Equality of JSON values, with the same tolerance where the expected number is not whole."""
    if isinstance(expected, Mapping):
        return (
            isinstance(value, Mapping)
            and value.keys() == expected.keys()
            and all(same_value(value[key], wanted) for key, wanted in expected.items())
        )
    if isinstance(expected, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(expected)
            and all(map(same_value, value, expected))
        )
    if isinstance(expected, float) and isinstance(value, int | float):
        return value == expected or math.isclose(value, expected, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return value == expected


def _same_words(words: list[str], wanted: list[str]) -> bool:
    return len(words) == len(wanted) and all(map(_same_word, words, wanted))


def _same_word(word: str, wanted: str) -> bool:
    if word == wanted or "." not in wanted:
        return word == wanted
    try:
        return math.isclose(float(word), float(wanted), rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    except ValueError:
        return False


def _stdin(job: CodeJob, test: Any, token: str) -> tuple[bytes, int]:
    """What the program reads, and the bytes that its output may rightly have."""
    if job.mode == "unit_test":
        return json.dumps({"test": test, "token": token}).encode(), len(token)
    if job.mode == "function":
        arguments = test["input"]
        if isinstance(arguments, str):
            arguments = [json.loads(line) for line in arguments.splitlines() if line.strip()]
        task = {"function": job.function, "args": list(arguments)}
        return json.dumps(task).encode(), len(json.dumps(test["output"]))
    return test["input"].encode(errors="surrogateescape"), len(
        test["output"].encode(errors="surrogateescape")
    )


def _output_value(test: Mapping[str, Any]) -> Any:
    # beside arguments written as lines of JSON the expected value is JSON as well
    return json.loads(test["output"]) if isinstance(test["input"], str) else test["output"]


def _same_json(output: str, expected: Any) -> bool:
    try:
        return same_value(json.loads(output), expected)
    except (ValueError, RecursionError):
        return False


def _explain(job: CodeJob, result: RunResult) -> RewardResult:
    lines = result.stderr.decode(errors="replace").strip().splitlines()
    said = lines[-1][:200] if lines else f"exit code {result.exit_code}"
    if result.status == "crashed" and job.language == "python":
        if result.exit_code == _DOES_NOT_COMPILE:
            return _failed("compile_error", said)
        if (job.mode, result.exit_code) in (("function", _NOT_JSON), ("unit_test", _TEST_FAILED)):
            return _failed("wrong", said)
    if result.status in ("timeout", "memory", "output_limit"):
        return _failed(result.status, f"after {result.seconds:.1f} s")
    return _failed(result.status, said)


def _failed(status: Any, detail: str) -> RewardResult:
    return RewardResult(score=0.0, status=status, detail=" ".join(detail.split()))


def check_reference(reference: Mapping[str, Any]) -> str | None:
    return None
