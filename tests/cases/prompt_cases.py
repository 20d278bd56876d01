"""Problems: which are held out, and which nobody can judge."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_ring.data.prompts.same_problem import asked, is_among
from megatron_ring.data.prompts.sources import JsonlSource
from megatron_ring.errors import DataError
from megatron_ring.rl.reward.references import check_sources
from tests.cases import FOLDER, Row, lines


def rows() -> Iterator[Row]:
    case = "rl_eval_contamination"
    held_out = JsonlSource(FOLDER / case / "eval.jsonl")
    problems = {asked(held_out[index].turns) for index in range(len(held_out))}
    train = JsonlSource(FOLDER / case / "train.jsonl")
    for index, expected in enumerate((True, True, True, False)):
        problem = train[index]
        left_out = is_among(asked(problem.turns), problems)
        yield Row(case=case, given=f"{problem.text!r} is left out", expected=expected, got=left_out)

    case = "rl_unusable_references"
    with tempfile.TemporaryDirectory() as folder:
        for fields, refused in zip(lines(case, "problems.jsonl"), _REFUSED, strict=True):
            path = Path(folder) / "problems.jsonl"
            path.write_text(json.dumps(fields) + "\n", encoding="utf-8")
            try:
                check_sources([JsonlSource(path)])
                got = False
            except DataError as error:
                got = f"{path}:1: " in str(error)
            yield Row(case=case, given=json.dumps(fields), expected=refused, got=got)


_REFUSED = (True, True, False, False, True, True, False, True)
"""Line by line: unreadable, empty, a function to call, columns of tests, no tests, no tests, C++, no entry."""
