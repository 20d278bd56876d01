"""What ``--keep-last-n`` deletes while a run saves."""

from __future__ import annotations

from megatron_ring.checkpoint import folder as folders
from tests.helpers.checkpoint.checkpoints import TRAINER, checkpointer


def test_a_run_in_a_folder_with_later_steps_keeps_what_it_saves(tmp_path):
    """A run that begins anew, or goes back, where another went further."""
    with checkpointer(save=str(tmp_path), keep_last_n=1) as writer:
        for iteration in (20, 5, 7):
            writer.save(iteration, TRAINER)
            assert folders.latest(tmp_path) == folders.folder_of(tmp_path, iteration)
    assert folders.iterations(tmp_path) == [7, 20]
    with checkpointer(seed=2, load=str(tmp_path)) as reader:
        assert reader.load(tmp_path) == TRAINER


def test_a_critic_is_deleted_with_its_policy_and_never_before(tmp_path):
    """A critic is saved first: pruned by its own count, it would leave the policy before without one."""
    critics = tmp_path / folders.CRITIC
    for folder, steps in ((tmp_path, (2, 4, 6, 9)), (critics, (1, 2, 4, 6, 8, 9))):
        for step in steps:
            folders.folder_of(folder, step).mkdir(parents=True)
    folders.prune(tmp_path, 6, 2)
    assert folders.iterations(tmp_path) == [4, 6, 9]
    assert folders.iterations(critics) == [4, 6, 8, 9]
