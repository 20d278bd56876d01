"""An RL run that is killed at any line of a step and started again is the run that never died."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.helpers.e2e.rl_settings import STEPS, settings
from tests.helpers.e2e.rl_worker import LINES
from tests.helpers.e2e.runs import environment, losses
from tests.helpers.e2e.waiting import waiting_samples
from tests.helpers.parallel.spawning import several_worlds
from tests.helpers.parallel.watching import assert_ended_well, run_to_the_end

pytestmark = several_worlds


@pytest.fixture(scope="module")
def runs(corpus, problems, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rl")
    (folder / "settings.json").write_text(json.dumps(settings(corpus, problems)))
    command = [sys.executable, "-m", "tests.helpers.e2e.rl_worker", str(folder)]
    result = run_to_the_end(command, env=environment(), timeout=2400)
    assert_ended_well(result)
    codes = json.loads((folder / "codes.json").read_text())
    assert codes["straight"] == [0], result.stderr[-4000:]
    return folder


def sampled(path: Path) -> dict[int, object]:
    """Step -> what was sampled and carried; of a step that was done twice, the later word."""
    return dict(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_a_run_killed_at_any_line_repeats_the_straight_run(runs, line):
    codes = json.loads((runs / "codes.json").read_text())
    assert codes[line] == [-9, 0]
    assert sampled(runs / f"{line}.jsonl") == sampled(runs / "straight.jsonl")
    assert losses(runs / line) == losses(runs / "straight")
    assert set(losses(runs / line)) == set(range(1, STEPS + 1))


@pytest.mark.slow
def test_the_runs_interrupt_and_carry_responses(runs):
    """Else the test above would not show that they are kept."""
    steps = sampled(runs / "straight.jsonl")
    assert any(rows[-1] for rows in steps.values()), "nothing was carried"
    assert waiting_samples(runs / "straight/iter_0000002"), "nothing was interrupted"
