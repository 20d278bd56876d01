"""A model of a few GB there and back: bit-equal, in memory that does not grow with it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import python_path

ROOT = Path(__file__).parents[2]
NUM_LAYERS = 2
NUM_BYTES = 3_362_279_424
"""Ring-lite's embedding, head and two of its layers in bf16."""
ROOM = 3 * NUM_BYTES


@pytest.mark.all
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_few_gb_there_and_back_take_little_memory(tmp_path: Path):
    """The largest RssAnon of any process, sampled by the benchmark, which also compares all checksums."""
    free = shutil.disk_usage(tmp_path).free
    if free < ROOM:
        pytest.skip(f"{tmp_path}: {free / 1e9:.0f} GB free, it takes {ROOM / 1e9:.0f} GB")
    tool = ROOT / "tools/benchmark/convert.py"
    words = [
        sys.executable,
        str(tool),
        "--scratch",
        str(tmp_path / "scratch"),
        "--num-layers",
        str(NUM_LAYERS),
    ]
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["bytes"] == NUM_BYTES and report["bit_equal"] is True
    for direction in ("hf_to_megatron", "megatron_to_hf"):
        # a Python process with torch in it is about 0.15 GB; the rest are buffers of 32 MB
        assert 0.05 < report[direction]["peak_rss_anon_gb"] < 0.5, report
    assert not (tmp_path / "scratch").exists()
