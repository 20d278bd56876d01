"""The teacher of sums: right where it is to be right, off by one slip where it is not."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_ring.data.conversations import read_line
from megatron_ring.data.corpus.documents import read_records
from megatron_ring.data.prompts.sources import GymSource
from megatron_ring.errors import DataError
from tools.make_worked_examples import SLIPS, WorkedExamplesConfig, main, running_sum, worked_examples


def steps(answer: str) -> list[tuple[int, str, int, int]]:
    return [
        (int(a), sign, int(b), int(c))
        for a, sign, b, c in re.findall(r"(-?\d+)([+-])(-?\d+)=(-?\d+)", answer.partition("</think>")[0])
    ]


def slips(answer: str) -> list[int]:
    """What each step's result is off by; a step must start where the one before ended."""
    found = steps(answer)
    assert all(before[3] == after[0] for before, after in pairwise(found))
    assert answer.endswith(rf"</think>\boxed{{{found[-1][3]}}}")
    return [c - (a + b if sign == "+" else a - b) for a, sign, b, c in found]


def test_the_docstrings_example():
    assert running_sum("12 + 7 - 3 =") == r"<think>12+7=19;19-3=16</think>\boxed{16}"
    assert running_sum("what is 5 - -9 = ") == r"<think>5--9=14</think>\boxed{14}"


def test_the_share_with_exactly_one_slip_is_the_one_asked_for():
    config = WorkedExamplesConfig(count=400, slip_share=0.3, seed=5)
    problems = GymSource.parse(config.source)
    wrong = 0
    for index, example in enumerate(worked_examples(config)):
        question, answer = (message["content"] for message in example["messages"])
        assert question == problems[index].text
        off = [slip for slip in slips(answer) if slip]
        assert len(off) <= 1 and set(off) <= set(SLIPS)
        right = rf"\boxed{{{problems[index].reference['entry']['answer']}}}"
        assert answer.endswith(right) == (not off)
        wrong += bool(off)
    assert wrong == 120


def test_the_same_config_gives_the_same_lines_and_another_seed_others():
    def lines(seed: int) -> list:
        return list(worked_examples(WorkedExamplesConfig(count=20, seed=seed)))

    assert lines(1) == lines(1)
    assert lines(1) != lines(2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"count": 0}, "count=0 must be"),
        ({"slip_share": 1.5}, "slip_share=1.5"),
        ({"min_terms": 9}, "max_terms"),
    ],
)
def test_an_impossible_teacher_is_one_line(settings, said):
    with pytest.raises(DataError, match=said):
        next(worked_examples(WorkedExamplesConfig(**settings)))


def test_no_sum_no_answer():
    with pytest.raises(DataError, match="does not end in a sum"):
        running_sum("Who are you?")


def test_the_file_holds_conversations(tmp_path: Path, capsys):
    out = tmp_path / "sums.jsonl"
    main(["--count", "20", "--slip-share", "0.25", "--max-digits", "1", "--output", str(out)])
    assert capsys.readouterr().out == f"{out}: 20 worked examples, 25% of them with a slip\n"
    conversations = [read_line(record).messages for record in read_records([out])]
    assert len(conversations) == 20
    assert all([message["role"] for message in one] == ["user", "assistant"] for one in conversations)
    assert json.loads(out.read_text().splitlines()[0])["messages"][1]["content"].startswith("<think>")


@pytest.mark.parametrize(
    ("words", "said"), [(["--count", "0"], "count=0 must be at least 1"), (["--min-terms", "9"], "max_terms")]
)
def test_a_mistake_leaves_no_file(words: list[str], said: str, tmp_path: Path):
    with pytest.raises(DataError, match=said):
        main([*words, "--output", str(tmp_path / "out.jsonl")])
    assert list(tmp_path.iterdir()) == []
