"""A code problem's reference is read in every public form, or refused in one line."""

from __future__ import annotations

import json

import pytest

from megatron_ring.config.rl import RewardConfig
from megatron_ring.rl.reward.code.verifier import CODE_KEYS, CodeJob, CodeVerifier, check_reference
from megatron_ring.rl.reward.sandbox.sandbox import Sandbox
from tests.helpers.reward.judging import problem

ADD = "def add(a, b):\n    return a + b\n"
SUM = "print(sum(map(int, open(0).read().split())))"
FORMS = {
    "own": ({"tests": [{"input": "1 2", "output": "3"}]}, SUM),
    "own, JSON text": ({"tests": '[{"input": "1 2", "output": "3"}]'}, SUM),
    "own, function": ({"mode": "function", "function": "add", "tests": [{"input": [1, 2], "output": 3}]}, ADD),
    "own, unit test": ({"mode": "unit_test", "tests": ["assert add(1, 2) == 3"]}, ADD),
    "own, one unit test": ({"mode": "unit_test", "tests": "assert add(1, 2) == 3"}, ADD),
    "own, in upper case": ({"language": "Python3", "tests": [{"input": "1 2", "output": "3"}]}, SUM),
    "TACO": ({"tests": {"inputs": ["1\n2\n"], "outputs": ["3\n"], "fn_name": None}}, SUM),
    "TACO, lines": ({"input_output": {"inputs": [["1", "2"]], "outputs": [["3"]]}}, SUM),
    "TACO, text": ({"input_output": '{"inputs": ["1 2"], "outputs": ["3"]}'}, SUM),
    "TACO, function": ({"tests": {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}}, ADD),
    "APPS, function": ({"tests": json.dumps({"fn_name": "add", "inputs": [[1, 2], [2, 2]], "outputs": [[3], [4]]})}, ADD),
    "APPS, a list of one": ({"tests": {"fn_name": "add", "inputs": [[[1], []]], "outputs": [[1]]}}, ADD),
    "verl, function": ({"tests": {"fn_name": "add", "inputs": ["1\n2"], "outputs": ["3"]}}, ADD),
    "LiveCodeBench": ({"tests": [{"input": "1 2", "output": "3", "testtype": "stdin"}]}, SUM),
    "LiveCodeBench, function": ({"tests": [{"input": "[1]\n[2]", "output": "[1, 2]", "testtype": "functional"}],
                                 "metadata": '{"func_name": "add"}'}, ADD),
    "DeepCoder": ({"tests": [{"input": "1\n2", "output": "3", "testtype": "functional",
                              "metadata": {"func_name": "add"}}]}, ADD),
    "HumanEval": ({"prompt": "def twice(x): return 2 * x\n\ndef add(a, b):\n    ''' sum '''\n", "entry_point": "add",
                   "test": "def check(candidate):\n    assert candidate(1, 2) == 3 and twice(2) == 4",
                   "task_id": "x/1"}, ADD),
    "LeetCode": ({"test": "def check(candidate):\n    assert candidate(a=1, b=2) == 3",
                  "entry_point": "Solution().add"},
                 "class Solution:\n    def add(self, a: int, b: int) -> int: return a + b"),
    "MBPP": ({"test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == N"], "test_setup_code": "N = 0",
              "test_imports": ["import math"]}, ADD),
    "MBPP, sanitized": ({"source_file": "x.ipynb", "task_id": 2, "prompt": "Write add.", "code": "x", "test_imports": [],
                         "test_list": ["assert add(1, 2) == 3"]}, ADD),
    "MBPP, a built-in name": ({"test_list": ["assert sum(1, 2) == 3"]}, ADD.replace("add", "sum")),
}  # fmt: skip


@pytest.fixture(scope="module")
def verifier(sandbox: Sandbox) -> CodeVerifier:
    return CodeVerifier(RewardConfig(sandbox_timeout=60.0))


@pytest.mark.parametrize("form", FORMS)
def test_public_forms_are_read_and_judged(verifier: CodeVerifier, form: str):
    reference, source = FORMS[form]
    assert check_reference(reference) is None
    good = verifier(problem("code", **reference), f"```python\n{source}\n```")
    bad = verifier(
        problem("code", **reference),
        f"```python\n{source.replace('+', '-').replace('sum(map', 'max(map')}\n```",
    )
    assert (good.status, bad.score) == ("correct", 0.0), good


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ({}, "without tests"),
        ({"tests": []}, "without tests"),
        ({"tests": None}, "without tests"),
        ({"answer": "x"}, "without tests"),
        ({"tests": {"inputs": [], "outputs": []}}, "without tests"),
        ({"tests": 3}, "tests are int, not a list"),
        ({"tests": "print"}, "tests are text that is no JSON"),
        ({"tests": [3]}, "test 1 is int; an object with input and output is needed"),
        ({"tests": [{"input": "1"}]}, "test 1 has no output"),
        ({"tests": [{"output": "1"}]}, "test 1 has no input"),
        ({"tests": [{"input": "1", "output": 1}]}, "test 1: output is int; standard input and output are text"),
        ({"tests": [{"input": "1", "output": "1", "time": 3}]}, "test 1 has unknown keys time"),
        ({"tests": [{"input": "1", "output": "1"}], "lang": "cpp"}, "unknown keys lang; a code problem has entry_point"),
        ({"tests": [{"input": "1", "output": " \n"}]}, "no test expects any output"),
        ({"mode": "function", "function": "f", "tests": [{"input": [], "output": None}]}, "every expected value is null"),
        ({"mode": "function", "tests": [{"input": [1], "output": 1}]}, "mode=function without the function's name"),
        ({"mode": "function", "function": "f()", "tests": [{"input": [1], "output": 1}]}, "is not a name"),
        ({"mode": "function", "function": "f", "tests": [{"input": 1, "output": 1}]}, "a list of arguments is needed"),
        ({"mode": "function", "function": "f", "tests": [{"input": "x", "output": "1"}]}, "test 1: Expecting value"),
        ({"mode": "function", "function": 3, "tests": [{"input": [1], "output": 1}]}, "function is int, not text"),
        ({"function": "f", "tests": [{"input": "1", "output": "1"}]}, "give mode function or unit_test"),
        ({"mode": "essay", "tests": [{"input": "1", "output": "1"}]}, "mode=essay cannot be verified"),
        ({"mode": "stdin", "tests": {"fn_name": "f", "inputs": [[1]], "outputs": [1]}}, "its tests are of mode function"),
        ({"language": "rust", "tests": [{"input": "1", "output": "1"}]}, "language=rust cannot be verified"),
        ({"language": "cpp", "mode": "function", "function": "f", "tests": [{"input": [1], "output": 1}]},
         "mode=function is for python; cpp takes stdin"),
        ({"language": "java", "mode": "unit_test", "tests": ["assert f()"]}, "mode=unit_test is for python"),
        ({"tests": {"inputs": ["1"], "outputs": []}}, "1 inputs, but 0 outputs"),
        ({"tests": {"inputs": ["1"]}}, "a list of inputs and a list of outputs"),
        ({"tests": {"inputs": ["1"], "outputs": ["1"], "x": 1}}, "unknown keys x in tests"),
        ({"tests": [{"input": "1", "output": "1"}], "test_list": ["assert f()"]}, "tests and test_list both hold tests"),
        ({"tests": [{"input": "1", "output": "1", "testtype": "essay"}]}, "testtype is essay"),
        ({"tests": [{"input": "1", "output": "1"}], "time_limit": 0}, "time_limit=0 is not a positive number of seconds"),
        ({"tests": [{"input": "1", "output": "1"}], "memory_limit_mb": "256"}, "memory_limit_mb='256' is not"),
        ({"mode": "unit_test", "tests": [""]}, "test 1 has no assertion"),
        ({"mode": "unit_test", "tests": ["# assert f()"]}, "test 1 has no assertion"),
        ({"mode": "unit_test", "tests": ["f(1)"]}, "test 1 has no assertion"),
        ({"mode": "unit_test", "tests": ["assert f("]}, "test 1 is not Python"),
        ({"mode": "unit_test", "tests": ["def help(): assert f()"]}, "runs no assertion: they stand in help"),
        ({"mode": "unit_test", "tests": ["def test_it(tmp_path): assert f()"]}, "no fixtures exist here"),
        ({"mode": "unit_test", "tests": ["def check(candidate): assert candidate()"]}, "name the function in entry_point"),
        ({"mode": "unit_test", "tests": ["import numpy\nassert f()"]}, "imports numpy, which the sandbox does not have"),
        ({"mode": "unit_test", "tests": ["import pickle\nassert f()"]}, "could run what a solution returns"),
        ({"mode": "unit_test", "tests": ["class D(Animal): pass\nassert D()"]}, "a class from the solution's Animal"),
        ({"test": "assert f()", "entry_point": "a b"}, "which is neither a function's name"),
        ({"test": "assert f()", "entry_point": "f", "prompt": "Write f."}, "prompt beside entry_point is no Python"),
        ({"test_list": [1]}, "lists of Python lines"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_said_in_one_line(reference: dict, why: str):
    said = check_reference(reference)
    assert said is not None and why in said and "\n" not in said
    with pytest.raises(ValueError):
        CodeJob.of(reference, "")


def test_a_judgement_may_take_its_limits_and_no_more():
    verifier = CodeVerifier(RewardConfig(sandbox_timeout=4.0))
    tests = [{"input": "1", "output": "1"}] * 50
    one = verifier.timeout({"tests": tests[:1]})
    assert one > 5 * 4.0
    assert verifier.timeout({"tests": tests}) == pytest.approx(50 * one)
    assert verifier.timeout({"tests": tests, "time_limit": 8.0}) > 50 * 5 * 8.0
    assert verifier.timeout({"tests": tests, "language": "cpp"}) > verifier.timeout({"tests": tests}) + 5 * 30
    assert 0 < verifier.timeout({"tests": []}) < one


@pytest.mark.parametrize(
    ("limits", "seconds", "memory_mb"),
    [
        ({}, 5.0, 512),
        ({"time_limit": 2, "memory_limit_mb": 256}, 2.0, 256),
        ({"time_limit": 12.0, "memory_limit_mb": 1024}, 12.0, 1024),
        ({"time_limit": 0.1, "memory_limit_mb": 16}, 1.0, 128),
        ({"time_limit": 600, "memory_limit_mb": 65536}, 20.0, 2048),
    ],
)
def test_a_problems_own_limits_are_kept_within_bounds(limits: dict, seconds: float, memory_mb: int):
    verifier = CodeVerifier(RewardConfig(sandbox_timeout=5.0, sandbox_memory_mb=512))
    job = CodeJob.of({"tests": [{"input": "1", "output": "1"}], **limits}, "")
    found = verifier.limits_of(job)
    assert (found.seconds, found.memory_mb) == (seconds, memory_mb)


def test_every_key_that_is_read_is_named():
    assert {key for reference, _ in FORMS.values() for key in reference} - {
        "task_id",
        "prompt",
        "source_file",
        "code",
    } <= CODE_KEYS


FORGOTTEN = [
    "try:\n    assert f(1) == 2\nexcept Exception as e:\n    print(e)",
    "try:\n    assert f(1) == 2\n    print('ok')\nexcept AssertionError:\n    print('failed')",
    "try:\n    f(-1)\n    assert False\nexcept:\n    pass",
    "def test_it():\n    try:\n        assert f(1) == 2\n    except (ValueError, Exception):\n        return",
    "import contextlib\nwith contextlib.suppress(Exception):\n    assert f(1) == 2",
    "from contextlib import suppress as s\nwith s(AssertionError):\n    assert f(1) == 2",
    "import logging\ntry:\n    assert f(1) == 2\nexcept AssertionError as e:\n    logging.error(e)",
    "import builtins\ntry:\n    assert f(1) == 2\nexcept builtins.Exception:\n    pass",
    "try:\n    assert f(1) == 2\nexcept* AssertionError:\n    pass",
    "while True:\n    try:\n        assert f(1) == 2\n        break\n    except AssertionError:\n        break",
    "def test_it():\n    try:\n        assert f(1) == 2\n    finally:\n        return",
    "if False:\n    assert f(1) == 2",
]
EMPTY = ["f(1)\nassert True", "assert (f(1) == 2, 'two')", "assert 'f(1) == 2'"]
HEARD = [
    "try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass",
    "try:\n    assert f(1) == 2\nexcept Exception:\n    raise",
    "try:\n    assert f(1) == 2\nexcept AssertionError:\n    raise\nexcept Exception:\n    pass",
    f"assert f({'+'.join(['1'] * 900)}) == 900",
    "good = True\ntry:\n    assert f(1) == 2\nexcept Exception:\n    good = False\nassert good",
    "try:\n    r = f(1)\nexcept Exception:\n    pass\nelse:\n    assert r == 2",
    "try:\n    assert f(1) == 2\nexcept Exception:\n    print('no')\nassert f(2) == 3",
    "try:\n    assert f(1) == 2\nfinally:\n    print('done')",
    "try:\n    f(-1)\nexcept ValueError:\n    pass\nelse:\n    assert False, 'no error'",
    "import pytest\nwith pytest.raises(Exception):\n    f(-1)",
    "if f(1) != 2:\n    raise AssertionError",
]


@pytest.mark.parametrize("test", FORGOTTEN)
def test_a_test_that_catches_all_of_its_own_assertions_is_refused(test: str):
    assert "catches what its own assertions raise" in (check_reference({"tests": [test]}) or "")


@pytest.mark.parametrize("test", EMPTY)
def test_an_assertion_of_what_is_always_true_is_none(test: str):
    assert "has no assertion" in (check_reference({"tests": [test]}) or "")


@pytest.mark.parametrize("test", HEARD)
def test_a_test_that_fails_for_some_value_is_not_refused(test: str):
    assert check_reference({"tests": [test]}) is None
