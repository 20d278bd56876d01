"""Programs: what is given to them, where their main is, which numbers are equal and whose time counts."""

from __future__ import annotations

import shutil
import unittest
from collections.abc import Iterator

from megatron_ring.config.rl import RewardConfig
from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.code.compare import same_output
from megatron_ring.rl.reward.code.verifier import CodeJob, CodeVerifier
from tests.cases import FOLDER, Row, lines


def rows() -> Iterator[Row]:
    for line in lines("code_numbers_as_text"):
        got = same_output(line["printed"], line["wanted"])
        given = f"{line['printed']} for {line['wanted']}"
        yield Row(case="code_numbers_as_text", given=given, expected=line["expected"], got=got)
    verifier = CodeVerifier(RewardConfig(sandbox_timeout=60.0))
    try:
        verifier.load()
    except RewardError as error:
        raise unittest.SkipTest(f"no sandbox on this machine: {error}") from error
    for line in lines("code_leetcode_prelude"):
        reference = {key: line[key] for key in ("mode", "function", "tests") if key in line}
        got = verifier.verify(CodeJob.of(reference, line["source"])).score
        yield Row(case="code_leetcode_prelude", given=line["source"], expected=line["expected"], got=got)
    yield from _wall_clock()
    if shutil.which("javac") is None:
        raise unittest.SkipTest("no javac on this machine")
    tests = tuple(lines("code_java_main_class", "tests.jsonl"))
    for path in sorted((FOLDER / "code_java_main_class").glob("*.java")):
        job = CodeJob(source=path.read_text(encoding="utf-8"), tests=tests, language="java")
        yield Row(
            case="code_java_main_class", given=path.name, expected="correct", got=verifier.verify(job).status
        )


def _wall_clock() -> Iterator[Row]:
    """1 s of CPU under a limit of 3 s, whatever else the machine does."""
    verifier = CodeVerifier(RewardConfig(sandbox_timeout=3.0))
    source = (FOLDER / "code_wall_clock" / "solution.py").read_text(encoding="utf-8")
    got = verifier.verify(CodeJob(source=source, tests=({"input": "", "output": "2"},)))
    yield Row(case="code_wall_clock", given="solution.py", expected="correct", got=got.status)
