"""The page of the check: goals, peers, parts that died."""

from __future__ import annotations

import re

import pytest

from tools.gpu import goals
from tools.gpu.page import compared, failed_peers, judged, page, table

WHERE = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0"}


def timed(what: str, who: str, ms: float, **more: float) -> dict:
    return {"what": what, "who": who, "ms": ms, **(more or {"GB/s": 10.0})}


def fast(*rows: dict, tiny: bool = False, bad: tuple[str, ...] = ()) -> dict[str, dict]:
    return {"fast": {"where": WHERE, "rows": list(rows), "bad": list(bad), "seconds": 3.0, "tiny": tiny}}


def test_ours_stands_beside_the_best_of_the_others_and_not_beside_itself():
    rows = [
        timed("norm", "ours", 2.0, **{"GB/s": 1500.0, "share": 0.5, "peak_share": 0.4}),
        timed("norm", "ours, in place", 0.5),
        timed("norm", "slow", 4.0),
        timed("norm", "fast", 1.0),
        {"what": "norm", "who": "broken", "failed": "differs from ours"},
        timed("copy", "torch", 1.0),
    ]
    assert list(compared(rows)) == [
        ("norm", "2.000", "1,500 GB/s", "50%", "40%", "fast", "0.50x"),
        ("copy (torch)", "1.000", "10 GB/s", "", "", "", ""),
    ]
    assert failed_peers(fast(*rows)) == [("norm", "broken", "differs from ours")]


def test_a_goal_is_met_or_missed_by_the_even_row_of_ours_and_one_that_was_not_measured_is_missed():
    rows = [
        timed("grouped GEMM forward, 8x8, skewed", "ours", 1.0, **{"TFLOP/s": 900.0}),
        timed("grouped GEMM forward, 8x8", "torch.grouped_mm", 1.0, **{"TFLOP/s": 900.0}),
        timed("grouped GEMM forward, 8x8", "ours", 1.0, **{"TFLOP/s": 499.9}),
        timed("grouped GEMM wgrad into fp32, 8x8", "ours", 1.0, **{"TFLOP/s": 900.0}),
        timed("grouped GEMM wgrad, 8x8", "ours", 1.0, **{"TFLOP/s": 400.0}),
        timed("log p + entropy forward, 8x8", "ours", 1.0, **{"GB/s": 1.0, "share": 0.1, "peak_share": 0.86}),
    ]
    found = {each.what: each for each in goals.verdicts(rows, WHERE["device"], tiny=False)}
    assert len(found) == len(goals.GOALS)
    assert [name for name, each in found.items() if each.met] == [
        "grouped GEMM wgrad",
        "log p + entropy forward",
    ]
    assert found["grouped GEMM forward"].seen == "500 TFLOP/s" and not found["grouped GEMM forward"].met
    assert found["MoE layer forward+backward"].seen == "not measured"
    assert found["log p + entropy forward"].goal == "85% of the memory's peak"


@pytest.mark.parametrize(
    ("device", "tiny"),
    [("cpu", False), ("NVIDIA GH200 480GB", False), ("NVIDIA H100 PCIe", False), ("NVIDIA H200", True)],
)
def test_goals_are_an_h100s_or_h200s_at_the_papers_sizes(device: str, tiny: bool):
    assert goals.verdicts([], device, tiny) == []
    assert goals.verdicts([], "NVIDIA H200", False)


def test_a_part_says_what_it_counts_itself_and_is_wrong_by_its_lines():
    parts = fast(timed("norm", "ours", 1.0)) | {
        "tests": fast(bad=("t: 1 != 2",))["fast"] | {"said": "3 passed"}
    }
    assert judged(parts) == [
        ("fast", "1 rows, 0 wrong, 3 s", True),
        ("tests", "3 passed, 1 wrong, 3 s", False),
    ]


def test_results_of_another_card_are_not_well_and_parts_that_did_not_run_are_named():
    other = {**fast(timed("norm", "ours", 1.0))["fast"], "where": {**WHERE, "torch": "2.13.0"}}
    parts = {"right": fast(timed("norm", "ours", 1.0))["fast"], "fast": other}
    assert judged(parts)[1] == ("fast", "1 rows, 0 wrong, 3 s, of another run (torch 2.13.0)", False)
    for text in (table(parts), page(parts)):
        assert "Not run: compile, same, tests, sanitizer, pretrain, rl." in text


def test_table_and_page_hold_the_same_and_say_the_card_and_what_is_no_time():
    rows = (timed("norm", "ours", 1.0), {"what": "norm", "who": "a|b", "failed": "<no> kernel"})
    parts = fast(*rows, tiny=True, bad=("norm: worse",))
    markdown, shown = table(parts), page(parts)
    assert (
        markdown.startswith("**NVIDIA H100 80GB HBM3**: torch 2.11.0")
        and "<h1>megatron_ring on NVIDIA H100" in shown
    )
    for text in (markdown, shown):
        assert "a rehearsal: the times mean nothing" in text and "norm: worse" in text
    assert "| norm | a\\|b | <no> kernel |" in markdown and "&lt;no&gt; kernel" in shown
    # every line of a table has as many cells
    widths = [
        len(re.findall(r"(?<!\\)\|", line))
        for line in markdown.split("\n")
        if line.startswith("| norm | 1.000")
    ]
    assert widths == [8]
