"""Which device a process works on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megatron_ring.runtime import device
from tests.helpers.paths import python_path


@pytest.mark.parametrize(("word", "visible"), [("cpu", ""), ("CPU", ""), ("", "0,1")])
def test_a_device_that_is_not_wanted_is_hidden_from_torch_and_megatron_too(word: str, visible: str):
    """They ask for CUDA themselves; where they found one that we do not use, the session could not open."""
    environment = {"MEGATRON_RING_DEVICE": word, "CUDA_VISIBLE_DEVICES": "0,1", "PYTHONPATH": python_path()}
    code = "import os; from megatron_ring.runtime import device; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.stdout.rstrip("\n") == visible, done.stderr


def test_parameters_are_made_on_the_device_unless_a_block_says_otherwise(monkeypatch: pytest.MonkeyPatch):
    assert device.of_new_parameters() == device.device()
    monkeypatch.setattr(device, "device", lambda: torch.device("cuda", 1))
    assert device.of_new_parameters() == torch.device("cuda", 1)
    with torch.device("meta"):
        assert device.of_new_parameters() == torch.device("meta")
