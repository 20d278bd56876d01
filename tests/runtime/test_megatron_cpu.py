"""The stand-in for CUDA names: every row is needed, names its upstream line, and is undone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import megatron.core
import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import random as tracker

from megatron_ring.runtime.megatron_cpu import STAND_INS, StandIn, _resolve, hits, megatron_on_cpu, reset_hits
from tests.helpers.parallel.spawning import several_worlds, spawn
from tests.helpers.parallel.watching import assert_ended_well

UPSTREAM = Path(megatron.core.__file__).parent
KEYS = {row.key for row in STAND_INS}


def served_lines(row: StandIn) -> list[tuple[str, int]]:
    """``("a.py:3,5 (why)",)`` as ``[("a.py", 3), ("a.py", 5)]``; anything else is a mistake in the table."""
    lines = []
    for entry in row.serves:
        match = re.fullmatch(r"([\w/]+\.py):(\d+(?:,\d+)*)(?: \(.+\))?", entry)
        assert match, f"{row.key}: {entry!r} is not file:line,line (why)"
        lines += [(match[1], int(number)) for number in match[2].split(",")]
    return lines


@pytest.mark.parametrize("row", STAND_INS, ids=lambda row: row.key)
def test_every_row_names_upstream_lines_that_say_cuda(row: StandIn):
    for file, number in served_lines(row):
        line = (UPSTREAM / file).read_text().splitlines()[number - 1]
        assert "cuda" in line, f"{file}:{number} says {line.strip()!r}"


@pytest.mark.parametrize("row", STAND_INS, ids=lambda row: row.key)
def test_what_a_row_replaces_exists_upstream(row: StandIn):
    assert hasattr(_resolve(row.target), row.name)


def test_keys_are_unique_and_hits_are_counted_from_the_reset_on():
    assert len(KEYS) == len(STAND_INS)
    with megatron_on_cpu():
        torch.cuda.current_device()
        assert "current_device" in hits()
        reset_hits()
        assert hits() == frozenset()


def attributes() -> list[object]:
    return [
        vars(_resolve(row.target)).get(row.name, getattr(_resolve(row.target), row.name)) for row in STAND_INS
    ]


@pytest.mark.parametrize("fails", [False, True], ids=["leaving", "an-error"])
def test_everything_is_undone_on_exit(fails):
    before = attributes()
    with pytest.raises(KeyError) if fails else megatron_on_cpu(), megatron_on_cpu():
        assert all(new is not old for new, old in zip(attributes(), before, strict=True))
        if fails:
            raise KeyError
    assert all(new is old for new, old in zip(attributes(), before, strict=True))
    assert clip_grads.torch is torch


def test_inside_cuda_names_mean_the_host_and_other_devices_stay():
    with megatron_on_cpu():
        assert torch.cuda.current_device() == torch.device("cpu")
        assert clip_grads.torch.tensor([1.0], device="cuda").device.type == "cpu"
        assert clip_grads.torch.zeros(2, device="meta").is_meta
        assert clip_grads.torch.float32 is torch.float32
        state = tracker._get_cuda_rng_state()
        first = torch.rand(3)
        tracker._set_cuda_rng_state(state)
        assert torch.equal(first, torch.rand(3))


def test_it_refuses_a_machine_with_cuda(monkeypatch):
    before = attributes()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="must not be entered where CUDA exists"), megatron_on_cpu():
        pass
    assert all(new is old for new, old in zip(attributes(), before, strict=True))


@pytest.mark.slow
@several_worlds
def test_training_uses_every_row_and_no_row_is_for_nothing(tmp_path):
    """One process and two, fp32 and bf16, with multi-token prediction, recompute and a checkpoint."""
    seen: set[str] = set()
    for world in (1, 2):
        assert_ended_well(spawn(world, "tests.helpers.runtime.seam_worker", str(tmp_path)))
    for path in tmp_path.glob("hits.*.json"):
        seen |= set(json.loads(path.read_text()))
    assert seen == KEYS
    assert len(list(tmp_path.glob("hits.*.json"))) == 3
