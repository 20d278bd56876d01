"""A policy's critic goes with it where a checkpoint is written again."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_ring.checkpoint import folder as folders
from megatron_ring.checkpoint.convert import repad as repad_module
from megatron_ring.checkpoint.convert.conversion import Options
from megatron_ring.checkpoint.convert.repad import repad
from megatron_ring.checkpoint.convert.to_hf import megatron_to_hf
from megatron_ring.checkpoint.convert.to_megatron import hf_to_megatron
from megatron_ring.errors import CheckpointError
from tests.helpers.checkpoint.convert_cases import Silent, assert_same, read_megatron

NAME = "iter_0000000"


@pytest.fixture
def run(hf: dict[str, Path], tmp_path: Path) -> Path:
    """A run's folder with a policy and a critic of other numbers and one row of head."""
    root = tmp_path / "run"
    hf_to_megatron(hf["v1"], root, Options(), Silent(), divisible_by=16)
    critic = shutil.copytree(root / NAME, root / folders.CRITIC / NAME)
    tensors = {key: -tensor for key, tensor in read_megatron(critic).items()}
    head = torch.full((1, 37), 0.5)
    tensors |= {"output_layer.weight": head, "optimizer.state.exp_avg.output_layer.weight": head * 2}
    for path in [*critic.glob("*.distcp"), critic / ".metadata"]:
        path.unlink()
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(critic), no_dist=True)
    return root


def test_a_repadded_policy_has_its_critic(run: Path, tmp_path: Path):
    out = repad(run, tmp_path / "out", Options(verify=True), Silent(), divisible_by=7, tensor_size=2)
    assert out == tmp_path / "out" / NAME
    own, critic = folders.parts_of(out)
    before, after = read_megatron(run / folders.CRITIC / NAME), read_megatron(critic)
    embedding = "embedding.word_embeddings.weight"
    assert (before[embedding].shape, after[embedding].shape) == ((112, 37), (112, 37))
    assert torch.equal(after[embedding][:101], before[embedding][:101])
    del before[embedding], after[embedding]
    assert_same(after, before)
    assert read_megatron(own)["output_layer.weight"].shape == (112, 37)


def test_a_critic_is_not_exported(run: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="so it is a critic, which no engine reads; name the policy's"):
        megatron_to_hf(run / folders.CRITIC / NAME, tmp_path / "out", Options(), Silent())
    assert not (tmp_path / "out").exists()


def test_a_repad_that_is_stopped_between_critic_and_policy_is_done_again(
    run: Path, tmp_path: Path, monkeypatch
):
    write = repad_module._repad

    def stopped(folder: Path, target: Path, *rest):
        if target.name != folders.CRITIC:
            raise KeyboardInterrupt
        return write(folder, target, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(repad_module, "_repad", stopped)
        repad(run, tmp_path / "out", Options(), Silent(), divisible_by=7, tensor_size=2)
    assert (tmp_path / "out/critic" / NAME).is_dir() and not folders.iterations(tmp_path / "out")
    out = repad(run, tmp_path / "out", Options(), Silent(), divisible_by=8, tensor_size=1)
    for part in folders.parts_of(out):
        assert "make_vocab_size_divisible_by = 8" in (part / "config.toml").read_text()


@pytest.mark.parametrize("how", ["replaced", "link", "here"])
def test_a_policy_under_another_name_keeps_its_critic_and_its_files(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    """A save killed between two names, a link to the best step, ``.``: each lost the critic or the tokenizer."""
    source = run
    if how == "replaced":
        (run / NAME).rename(run / f"{NAME}.replaced")
    elif how == "link":
        source = tmp_path / "best"
        source.symlink_to(run / NAME)
        (tmp_path / "hf").mkdir()  # another model's, beside the link
    else:
        monkeypatch.chdir(run / NAME)
        source = Path()
    (run / "hf/tokenizer_note.json").write_text("{}")
    out = repad(source, tmp_path / "out", Options(), Silent(), divisible_by=7, tensor_size=2)
    assert folders.parts_of(out) == [out, tmp_path / "out/critic" / NAME]
    assert (tmp_path / "out/hf/tokenizer_note.json").exists()
    exported = megatron_to_hf(source, tmp_path / "hf_out", Options(), Silent())
    assert (exported / "tokenizer_note.json").exists()
