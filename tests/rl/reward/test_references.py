"""Problems that no verifier can check are refused before the first response, by file and line."""

import json
from pathlib import Path

import pytest

from megatron_ring.data.prompts.sources import GymSource, JsonlSource
from megatron_ring.errors import DataError
from megatron_ring.rl.reward.code.job import CodeJob
from megatron_ring.rl.reward.references import check_sources, unverifiable

GOOD = {"prompt": "1+1", "domain": "math", "answer": "2"}


def source(path: Path, *lines: dict) -> JsonlSource:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return JsonlSource(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"domain": "math", "answer": ""},
        {"domain": "math", "answer": "  "},
        {"domain": "math", "answer": ["2"]},
        {"domain": "math", "answer": True},
        {"domain": "math", "answer": "1+2=<<1+2=3>>3\n#### 3"},
        {"domain": "math", "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 24"},
        {"domain": "math", "answer": "#### 3"},
        {"domain": "science", "answer": "The answer is: 3"},
        {"domain": "math", "answer": "so the answer is $3$."},
        {"domain": "math", "answer": "['3']"},
        {"domain": "math", "answer": "nan"},
        {"domain": "science", "answer": "N/A"},
        {"domain": "math", "answer": float("nan")},
        {"domain": "math", "answer": float("inf")},
        {"domain": "science", "answer": {"a": 1}},
        {"domain": "math", "reference": {"solution": "2"}},
        {"domain": "code", "answer": "x"},
        {"domain": "code", "tests": []},
        {"domain": "code", "tests": {"a": 1}},
        {"domain": "code", "tests": [{"input": "1"}]},
        {"domain": "code", "tests": ["1"]},
        {"domain": "code", "language": "cobol", "tests": [{"input": "1", "output": "2"}]},
        {"domain": "code", "mode": "stdout", "tests": [{"input": "1", "output": "2"}]},
        {"domain": "code", "mode": "function", "tests": [{"input": [1], "output": 2}]},
        {"domain": "reasoning_gym", "answer": "x"},
        {"domain": "reasoning_gym", "reference": {"dataset": "chain_sum", "entry": 5}},
    ],
)
def test_a_problem_that_no_verifier_can_check_is_named(tmp_path: Path, fields: dict):
    problems = source(tmp_path / "p.jsonl", GOOD, {"prompt": "f", **fields})
    assert unverifiable(problems[0]) is None and unverifiable(problems[1])
    with pytest.raises(DataError, match=r"p.jsonl:2: .*: 1 problem that no verifier can check") as caught:
        check_sources([problems])
    assert "\n" not in str(caught.value)
    check_sources([problems], own_domains=[fields["domain"]])


@pytest.mark.parametrize(
    "fields",
    [
        {"domain": "math", "answer": 2},
        {"domain": "math", "answer": r"\frac{1}{2}"},
        {"domain": "science", "answer": "B"},
        {"domain": "poem", "answer": []},
        {"domain": "code", "mode": "function", "function": "f", "tests": [{"input": [1], "output": 2}]},
        {"domain": "code", "tests": {"inputs": ["1\n"], "outputs": ["2\n"], "fn_name": None}},
        {"domain": "code", "tests": {"inputs": [[1]], "outputs": [2], "fn_name": "f"}},
        {"domain": "code", "tests": json.dumps([{"input": "1", "output": "2"}])},
        {"domain": "code", "language": "cpp", "tests": [{"input": "1", "output": "2"}]},
        {
            "domain": "code",
            "memory_limit_mb": 256,
            "time_limit": 2.0,
            "tests": [{"input": "1", "output": "2"}],
        },
        {"domain": "code", "fn_name": "f", "tests": [{"input": [1], "output": 2}]},
        {"domain": "code", "fn_name": "f", "tests": {"inputs": [[1]], "outputs": [2]}},
        {"domain": "code", "tests": {"inputs": [["1", "2"]], "outputs": [["3"]]}},
    ],
)
def test_a_problem_that_a_verifier_can_check_passes(tmp_path: Path, fields: dict):
    check_sources([source(tmp_path / "p.jsonl", {"prompt": "f", **fields})])


def test_columns_of_a_line_mean_what_they_mean_in_a_reference(tmp_path: Path):
    """Every right answer to such a line was wrong: its value was compared with the list around it."""
    columns = {"inputs": [[1, 2], [2, 2]], "outputs": [[3], [4]]}
    lines = [
        {"tests": {**columns, "fn_name": "add"}},
        {"tests": json.dumps({**columns, "fn_name": "add"})},
        {"tests": columns, "fn_name": "add"},
        {"reference": {"tests": {**columns, "fn_name": "add"}}},
        {"tests": columns, "mode": "function", "function": "add"},
    ]
    whole = CodeJob.of({"input_output": {**columns, "fn_name": "add"}}, "")
    assert [test["or"] for test in whole.tests] == [3, 4]
    for number, fields in enumerate(lines):
        (problem,) = source(tmp_path / f"{number}.jsonl", {"prompt": "f", "domain": "code", **fields})
        assert CodeJob.of(problem.reference, "") == whole
    texts = {"inputs": [["1", "2"]], "outputs": [["3", ""]]}
    (problem,) = source(tmp_path / "texts.jsonl", {"prompt": "f", "domain": "code", "tests": texts})
    assert problem.reference["tests"] == [{"input": "1\n2", "output": "3\n"}]


def test_a_line_of_livecodebench_names_its_function_in_the_metadata(tmp_path: Path):
    tests = [{"input": "1\n2", "output": "3", "testtype": "functional"}]
    for metadata in ({"func_name": "add"}, '{"func_name": "add"}'):
        line = {"prompt": "f", "domain": "code", "tests": json.dumps(tests), "metadata": metadata}
        (problem,) = source(tmp_path / "p.jsonl", line)
        job = CodeJob.of(problem.reference, "")
        assert (job.mode, job.function) == ("function", "add")
    (problem,) = source(tmp_path / "p.jsonl", {**line, "tests": ["assert f()"], "metadata": {"level": 3}})
    assert "metadata" not in problem.reference


def test_five_are_named_and_all_are_counted(tmp_path: Path):
    bad = [{"prompt": str(i), "domain": "math", "answer": ""} for i in range(9)]
    with pytest.raises(DataError) as caught:
        check_sources([source(tmp_path / "p.jsonl", GOOD, *bad), source(tmp_path / "q.jsonl", GOOD)])
    line = str(caught.value)
    assert line.count("p.jsonl:") == 5 and "p.jsonl:6" in line and "p.jsonl:7" not in line
    assert "and 4 more: 9 problems that no verifier can check" in line


def test_generated_problems_need_no_look(tmp_path: Path):
    generated = GymSource.parse("reasoning_gym:chain_sum?size=5")
    check_sources([generated])
    frozen = source(tmp_path / "f.jsonl", *(generated[i].to_json() for i in range(5)))
    check_sources([frozen])


def test_what_stands_beside_the_tests_is_part_of_the_reference(tmp_path: Path):
    tests = {"inputs": [[1]], "outputs": [2], "fn_name": "f"}
    problems = source(
        tmp_path / "p.jsonl",
        {"prompt": "f", "domain": "code", "tests": tests, "time_limit": 3, "language": "python", "id": 7},
        {
            "prompt": "f",
            "domain": "code",
            "tests": ["assert f(1) == 2"],
            "mode": "unit_test",
            "entry_point": "f",
        },
    )
    assert problems[0].reference == {
        "tests": [{"input": [1], "output": 2}], "mode": "function", "function": "f", "time_limit": 3, "language": "python"
    }  # fmt: skip
    assert problems[1].reference == {"tests": ["assert f(1) == 2"], "mode": "unit_test", "entry_point": "f"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"answer": "2", "ground_truth": "3"}, "ground_truth is not read; put the reference under answer"),
        ({"answer": "2", "answr": "3"}, "answr is not read; did you mean answer?"),
        ({"tests": ["a"], "lang": "cpp"}, "lang is not read"),
        ({"tests": ["a"], "time_limits": 3}, "time_limits is not read; did you mean time_limit?"),
        ({"tests": ["a"], "input_output": "{}"}, "input_output is not read"),
        (
            {"tests": ["a"], "raw_tags": "x", "memory_limit": 256},
            "raw_tags, memory_limit are not read; did you mean memo",
        ),
        ({"answer": "2", "prompt": ""}, "the problem is empty"),
        ({"answer": "2", "prompt": " \n"}, "the problem is empty"),
        ({"answer": "2", "messages": [{"role": "user", "content": ""}]}, "the problem is empty"),
        ({"tests": {"inputs": [1], "outputs": []}}, "tests must have as many outputs as inputs"),
        ({"tests": {"inputs": [1], "outputs": [2], "checker": "x"}}, "tests have a key checker"),
        ({"tests": "[1"}, "tests is not JSON"),
        ({"answer": "2", "images": ["a.png"]}, "images is not read, only text is supported"),
    ],
)
def test_a_key_that_looks_like_a_reference_is_refused_by_name(tmp_path: Path, fields: dict, said: str):
    with pytest.raises(DataError, match=rf"p.jsonl:1: {said}") as caught:
        source(tmp_path / "p.jsonl", {"prompt": "f", "domain": "code", **fields})
    assert "\n" not in str(caught.value)


def test_beside_an_answer_other_columns_are_passed_over(tmp_path: Path):
    line = {**GOOD, "difficulty": 3, "my_column": "x", "solve_rate_8b": 0.5, "solution": "..."}
    assert source(tmp_path / "p.jsonl", line)[0].reference == {"answer": "2"}


def test_a_number_too_long_for_python_is_one_line_without_a_programmers_remedy(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "f", "domain": "math", "answer": ' + "9" * 5000 + "}")
    with pytest.raises(
        DataError, match=r"p.jsonl:1 is not JSON \(.*5000 digits\); write one object per line"
    ):
        JsonlSource(tmp_path / "p.jsonl")
