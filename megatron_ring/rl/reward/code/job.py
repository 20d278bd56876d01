"""Read a code problem's reference, in our own form or in that of a public data set, into one :class:`CodeJob`.

| form | keys | read as |
|---|---|---|
| own | ``tests`` [{input, output}], ``mode`` stdin or function, ``function``, ``language`` | as it says |
| own, unit tests | ``tests`` [source of a test], ``mode`` unit_test, or a text that is one test | unit_test |
| TACO, APPS, verl | ``tests`` or ``input_output`` {inputs, outputs, fn_name} | function with fn_name, else stdin |
| LiveCodeBench | ``tests`` [{input, output, testtype}], ``metadata`` {func_name} | stdin, functional: function |
| HumanEval | ``test``, ``entry_point``, and ``prompt`` for the helpers it defines | unit_test |
| MBPP | ``test_list``, ``test_setup_code``, ``test_imports`` | unit_test, one for each |

Each of these may be JSON text. A list of lines (APPS) is joined to one text. Function arguments are a list, or text with
one JSON value per line; then the expected value is JSON text as well. If every entry of ``outputs`` of a function is a
list of one item, as in APPS and TACO, the item alone is accepted too.

``time_limit`` (CPU seconds of one test) and ``memory_limit_mb`` replace sandbox_timeout and sandbox_memory_mb, clipped to
at least 1 s and 128 MB and at most 4 times the setting.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from megatron_ring.data.prompts.problem_lines import paired_columns
from megatron_ring.rl.reward.code.compare import read_json, write_json
from megatron_ring.rl.reward.code.unit_tests import read_unit_test

Language = Literal["python", "cpp", "java"]
Mode = Literal["stdin", "function", "unit_test"]

_CODE_KEYS_WORDS = (
    "tests language mode function time_limit memory_limit_mb input_output metadata test entry_point "
    "test_list test_setup_code test_imports"
)
CODE_KEYS = frozenset(_CODE_KEYS_WORDS.split())
"""Keys of a reference. ``prompt`` may be one too; in a line of problems it is the question."""
_SAID_WORDS = (
    "task_id question_id canonical_solution challenge_test_list code difficulty source starter_code text "
    "answer source_file"
)
_SAID = frozenset(_SAID_WORDS.split())
"""Keys of public data sets that a verifier does not need; any other key is a mistake."""
_LANGUAGES = {
    "python": "python",
    "python3": "python",
    "py": "python",
    "cpp": "cpp",
    "c++": "cpp",
    "java": "java",
}
_MODES = ("stdin", "function", "unit_test")
_TEST_KEYS = frozenset({"input", "output", "testtype", "metadata"})


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeJob:
    """A solution and the tests that it has to pass.

    Example: ``CodeJob(language="python", mode="stdin", source="print(int(input()) + 1)",
    tests=({"input": "1\\n", "output": "2\\n"},))``.
    """

    source: str
    tests: tuple[Any, ...]
    language: Language = "python"
    mode: Mode = "stdin"
    function: str = ""
    """Name of the function (mode function), or of the argument of ``check(candidate)`` (unit_test)."""
    prompt: str = ""
    """Python that runs before the solution, such as HumanEval's prompt; a unit test takes its helpers from it."""
    time_limit: float | None = None
    memory_limit_mb: int | None = None

    @classmethod
    def of(cls, reference: Mapping[str, Any], source: str) -> CodeJob:
        """The job of a code problem's ``reference``. Raises ValueError with the reason why it cannot be verified."""
        return checked(cls(source=source, **read_reference(reference)))


def checked(job: CodeJob) -> CodeJob:
    """``job`` with its tests in the form in which they run.

    Raises:
        ValueError: it cannot be verified, or a program that does nothing would pass.
    """
    if job.language != "python" and job.mode != "stdin":
        raise ValueError(f"mode={job.mode} is for python; {job.language} takes stdin")
    if not job.tests:
        raise ValueError("a code problem without tests")
    if job.prompt:
        try:
            ast.parse(job.prompt)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"prompt beside entry_point is no Python: {error}") from error
    check = {"stdin": _check_stdin, "function": _check_function, "unit_test": _check_units}[job.mode]
    tests = tuple(check(number, test, job.function) for number, test in enumerate(job.tests, 1))
    if job.mode == "stdin" and not any(test["output"].strip() for test in tests):
        raise ValueError("no test expects any output: a program that does nothing would pass")
    if job.mode == "function" and all(test["output"] is None for test in tests):
        raise ValueError("every expected value is null: a function that does nothing would pass")
    return replace(job, tests=tests)


def check_reference(reference: Mapping[str, Any]) -> str | None:
    """Why a code problem's ``reference`` cannot be verified, in one line; None if it can.

    Example: ``check_reference({"tests": []}) == "a code problem without tests"``.
    """
    try:
        CodeJob.of(reference, "")
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def read_reference(reference: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a :class:`CodeJob` but its source, from any of the forms. Raises ValueError."""
    unknown = sorted(set(reference) - CODE_KEYS - _SAID - {"prompt"})
    if unknown:
        raise ValueError(
            f"unknown keys {', '.join(unknown)}; a code problem has {', '.join(sorted(CODE_KEYS))}"
        )
    forms = [key for key in ("tests", "input_output", "test", "test_list") if reference.get(key) is not None]
    if len(forms) > 1:
        raise ValueError(f"{' and '.join(forms)} both hold tests; leave one")
    if not forms:
        raise ValueError("a code problem without tests")
    settings = _settings(reference)
    if forms[0] == "test":
        tests, mode, function = [reference["test"]], "unit_test", _text(reference, "entry_point")
    elif forms[0] == "test_list":
        tests, mode, function = _mbpp(reference), "unit_test", ""
    else:
        tests, mode, function = _tests(reference[forms[0]], reference)
    entry = _text(reference, "function") or _text(reference, "entry_point") or function
    mode = _one_mode(reference, mode, entry)
    return {**settings, "tests": tuple(tests), "mode": mode, "function": entry}


def _settings(reference: Mapping[str, Any]) -> dict[str, Any]:
    language = reference.get("language", "python")
    if not isinstance(language, str) or language.lower() not in _LANGUAGES:
        raise ValueError(f"language={language} cannot be verified; python, cpp and java can")
    found: dict[str, Any] = {"language": _LANGUAGES[language.lower()]}
    if _text(reference, "entry_point"):
        found["prompt"] = _text(reference, "prompt")
    for key, kind in (("time_limit", float), ("memory_limit_mb", int)):
        value = reference.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            unit = "seconds" if key == "time_limit" else "MB"
            raise ValueError(f"{key}={value!r:.40} is not a positive number of {unit} below 1,000,000")
        found[key] = kind(value)
    return found


def _text(reference: Mapping[str, Any], key: str) -> str:
    value = reference.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} is {type(value).__name__}, not text")
    return value or ""


def _one_mode(reference: Mapping[str, Any], found: str, entry: str) -> Mode:
    mode = reference.get("mode")
    if mode is not None and mode not in _MODES:
        raise ValueError(f"mode={mode} cannot be verified; {', '.join(_MODES)} can")
    if mode is not None and found and mode != found:
        raise ValueError(f"mode={mode}, but its tests are of mode {found}")
    mode = mode or found or "stdin"
    if mode == "function" and not entry:
        raise ValueError("mode=function without the function's name; give function")
    if mode == "function" and not entry.isidentifier():
        raise ValueError(f"function={entry!r} is not a name")
    if mode == "stdin" and entry:
        raise ValueError(f"function={entry} beside tests of standard input; give mode function or unit_test")
    return cast(Mode, mode)


def _mbpp(reference: Mapping[str, Any]) -> list[str]:
    tests = reference["test_list"]
    imports = reference.get("test_imports") or []
    if not isinstance(tests, list) or not all(isinstance(word, str) for word in [*tests, *imports]):
        raise ValueError("test_list and test_imports are lists of Python lines")
    before = "\n".join([*imports, _text(reference, "test_setup_code")]).strip()
    return [f"{before}\n{test}" if before else test for test in tests]


def _tests(tests: Any, reference: Mapping[str, Any]) -> tuple[list[Any], str, str]:
    """Tests, the mode that their form implies ("" if none), and the function that they name ("" if none)."""
    if isinstance(tests, str):
        if reference.get("mode") == "unit_test":
            return [tests], "unit_test", ""
        try:
            tests = read_json(tests)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tests are text that is no JSON: {error}") from error
    if isinstance(tests, Mapping):
        return _paired(tests)
    if not isinstance(tests, list | tuple):
        raise ValueError(f"tests are {type(tests).__name__}, not a list")
    tests = list(tests)
    if tests and all(isinstance(test, str) for test in tests):
        return tests, "unit_test", ""
    kinds = {test.get("testtype") for test in tests if isinstance(test, Mapping)} - {None}
    if not kinds <= {"stdin", "functional"} or len(kinds) > 1:
        raise ValueError(
            f"testtype is {', '.join(sorted(map(str, kinds)))}; stdin or functional, one for all, is known"
        )
    if kinds == {"functional"}:
        return tests, "function", _func_name(reference, tests)
    return tests, "stdin" if kinds else "", ""


def _func_name(reference: Mapping[str, Any], tests: list[Any]) -> str:
    for holder in (reference, *tests):
        metadata = holder.get("metadata")
        if isinstance(metadata, str):
            try:
                metadata = json.loads(metadata)
            except ValueError:
                metadata = None
        if isinstance(metadata, Mapping) and isinstance(metadata.get("func_name"), str):
            return metadata["func_name"]
    return ""


def _paired(tests: Mapping[str, Any]) -> tuple[list[Any], str, str]:
    unknown = sorted(set(tests) - {"inputs", "outputs", "fn_name"})
    if unknown:
        raise ValueError(f"unknown keys {', '.join(unknown)} in tests; inputs, outputs and fn_name are read")
    inputs, outputs, name = tests.get("inputs"), tests.get("outputs"), tests.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise ValueError("tests need a list of inputs and a list of outputs")
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs, but {len(outputs)} outputs")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"fn_name is {type(name).__name__}, not text")
    return (
        paired_columns(inputs, outputs, is_function=bool(name)),
        "function" if name else "stdin",
        name or "",
    )


def _fields(number: int, test: Any) -> Mapping[str, Any]:
    if not isinstance(test, Mapping):
        raise ValueError(f"test {number} is {type(test).__name__}; an object with input and output is needed")
    for key in ("input", "output"):
        if key not in test:
            raise ValueError(f"test {number} has no {key}")
    unknown = sorted(set(test) - _TEST_KEYS - {"or"})
    if unknown:
        raise ValueError(f"test {number} has unknown keys {', '.join(unknown)}; input and output are read")
    return test


def _check_stdin(number: int, test: Any, entry: str) -> Any:
    for key in ("input", "output"):
        if not isinstance(_fields(number, test)[key], str):
            raise ValueError(
                f"test {number}: {key} is {type(test[key]).__name__}; standard input and output are text"
            )
    return {"input": test["input"], "output": test["output"]}


def _check_function(number: int, test: Any, entry: str) -> Any:
    """The test with its arguments as JSON lines, which the sandbox reads, and the expected value parsed."""
    if isinstance(test, Mapping) and "lines" in test:
        return test
    given, wanted = _fields(number, test)["input"], test["output"]
    also = {"or": test["or"]} if "or" in test else {}
    try:
        if not isinstance(given, str):
            if not isinstance(given, list | tuple):
                raise ValueError(f"input is {type(given).__name__}; a list of arguments is needed")
            return {"lines": [write_json(value) for value in given], "output": wanted, **also}
        if not isinstance(wanted, str):
            raise ValueError(f"input is JSON text, and output is {type(wanted).__name__}, not JSON text")
        lines = [line for line in given.split("\n") if line.strip()]
        for line in lines:
            read_json(line)
        return {"lines": lines, "output": read_json(wanted), **also}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"test {number}: {error}") from error


def _check_units(number: int, test: Any, entry: str) -> Any:
    if not isinstance(test, str):
        raise ValueError(f"test {number} is {type(test).__name__}; the source of a unit test is text")
    try:
        read_unit_test(test, entry)
    except ValueError as error:
        raise ValueError(f"test {number} {error}") from error
    return test
