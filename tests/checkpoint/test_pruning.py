"""What ``--keep-last-n`` deletes while a run saves."""

from __future__ import annotations

from megatron_ring.checkpoint import folder as folders
from tests.checkpoint.test_checkpointer import TRAINER, checkpointer


def test_a_run_in_a_folder_with_later_steps_keeps_what_it_saves(tmp_path):
    """A run that begins anew, or goes back, where another went further."""
    with checkpointer(save=str(tmp_path), keep_last_n=1) as writer:
        for iteration in (20, 5, 7):
            writer.save(iteration, TRAINER)
            assert folders.latest(tmp_path) == folders.folder_of(tmp_path, iteration)
    assert folders.iterations(tmp_path) == [7, 20]
    with checkpointer(seed=2, load=str(tmp_path)) as reader:
        assert reader.load(tmp_path) == TRAINER
