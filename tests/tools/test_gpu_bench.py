"""What a row of the check's timings says, and what it never does."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from tools.gpu import peers
from tools.gpu.bench import TINY, Bench, Side, peer, relative_error, side
from tools.gpu.peaks import Peak, peak_of
from tools.gpu.results import Results


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench("cpu", TINY, Results(tmp_path, "fast"))


def rows_of(bench: Bench) -> list[dict]:
    return json.loads(bench.results.path.read_text())["rows"]


def test_a_peer_that_gives_something_else_is_named_and_has_no_time(bench: Bench):
    x = torch.ones(8)
    bench.compare(
        "twice",
        [
            side("ours", lambda: x * 2),
            side("close", lambda: x * 2.01),
            side("once", lambda: x),
            side("short", lambda: x[:4]),
        ],
        bytes_moved=64,
    )
    ours, close, once, short = rows_of(bench)
    assert "error" not in ours and close["error"] == pytest.approx(0.005)
    assert once["failed"].startswith("differs from ours by 5.0e-01") and "ms" not in once
    assert "differs from ours by inf" in short["failed"] and bench.results.bad == []


def test_a_peer_that_fails_is_a_row_and_what_comes_after_it_is_timed(bench: Bench):
    def fails() -> torch.Tensor:
        raise RuntimeError("no\n such kernel")

    def cannot_be_made():
        raise ImportError("built for another torch")

    x = torch.ones(8)
    sides = [side("ours", lambda: x), side("a", fails), Side("b", cannot_be_made), side("c", lambda: x)]
    bench.compare("same", sides, flops=8)
    ours, a, b, c = rows_of(bench)
    assert (
        a["failed"] == "RuntimeError: no such kernel"
        and b["failed"] == "ImportError: built for another torch"
    )
    assert "ms" in ours and "ms" in c and bench.results.bad == []


def test_if_ours_fails_the_part_is_wrong(bench: Bench):
    x = torch.ones(8)
    bench.compare("same", [side("ours", lambda: x.no_such()), side("theirs", lambda: x)], flops=8)
    assert bench.results.bad == ["same, ours: AttributeError: 'Tensor' object has no attribute 'no_such'"]
    assert [row["who"] for row in rows_of(bench)] == ["theirs"]


def test_ours_of_another_kind_is_held_to_ours_as_well(bench: Bench):
    x = torch.ones(8)
    bench.compare("same", [side("ours", lambda: x), side("ours, in place", lambda: x * 2)], flops=8)
    assert bench.results.bad[0].startswith("same, ours, in place: differs from ours by 1.0e+00")


def test_a_share_is_the_time_at_the_slower_of_both_roofs_over_the_time_taken(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench, "milliseconds", lambda work, budget: 4.0)
    bench.roof, bench.peak = Peak(1e12, 1e9), Peak(2e12, 4e9)
    # a product of 1 ms that moves what takes 2 ms
    bench.compare("both", [side("ours", lambda: torch.ones(1))], flops=1e9, bytes_moved=2e6)
    (row,) = rows_of(bench)
    assert row["share"] == 0.5 and row["peak_share"] == 0.125 and row["TFLOP/s"] == 0.2


def test_a_package_that_is_not_there_is_no_side_and_a_broken_one_a_failed_row(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    assert peer("no_such_package", "x", lambda: lambda: None) == []
    x, weight = torch.ones(4, 8), torch.ones(8)
    broken = types.ModuleType("liger_kernel")
    broken.__spec__ = types.SimpleNamespace(name="liger_kernel")
    monkeypatch.setitem(sys.modules, "liger_kernel", broken)
    bench.compare("norm", [side("ours", lambda: x), *peers.norm(x, weight, 1e-6)], bytes_moved=64)
    assert [row["who"] for row in rows_of(bench)] == ["ours", "Liger"]
    assert rows_of(bench)[1]["failed"].startswith(
        "ModuleNotFoundError: No module named 'liger_kernel.transformers'"
    )


def test_an_error_of_no_number_is_not_small():
    one = torch.ones(4)
    assert relative_error([one * float("nan")], [one]) == float("inf")
    assert relative_error([one], []) == float("inf")
    assert relative_error([one, one * 3], [one, one * 2]) == 0.5


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", Peak(989e12, 3.35e12)),
        ("NVIDIA H100 PCIe", Peak(756e12, 2.0e12)),
        ("NVIDIA H200", Peak(989e12, 4.8e12)),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB", Peak(312e12, 2.039e12)),
        ("cpu", None),
    ],
)
def test_a_card_is_known_by_the_words_of_its_name(name: str, peak: Peak | None):
    assert peak_of(name) == peak
