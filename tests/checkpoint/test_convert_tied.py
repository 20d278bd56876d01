"""Tied embeddings go there and back as one tensor; a folder that repeats it is read, one that contradicts it refused."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.checkpoint.convert.conversion import Options
from megatron_ring.checkpoint.convert.folders import run_config_of
from megatron_ring.checkpoint.convert.hf_config import read_hf_config
from megatron_ring.checkpoint.convert.plain_forward import plain_logits
from megatron_ring.checkpoint.convert.repad import repad
from megatron_ring.checkpoint.convert.safetensors_io import SafetensorsFolder
from megatron_ring.checkpoint.convert.to_hf import megatron_to_hf
from megatron_ring.checkpoint.convert.to_megatron import hf_to_megatron
from megatron_ring.errors import CheckpointError
from megatron_ring.runtime.session import open_session
from megatron_ring.train.engine import Engine
from tests.helpers.checkpoint.convert_cases import (
    ODD,
    Silent,
    assert_same,
    prompt,
    read_hf,
    read_megatron,
    write_hf,
)
from tests.helpers.checkpoint.reference_model import logits_TV

TIED = ODD["qwen3_tied"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return write_hf(TIED, tmp_path / "hf")


def with_a_head(folder: Path, change: float) -> Path:
    """The same folder with a head beside the embedding: the same numbers, one of them moved by ``change``."""
    head = read_hf(folder)[EMBEDDING].clone()
    head[100, 36] += change
    save_file({HEAD: head}, folder / "head.safetensors")
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    said["weight_map"][HEAD] = "head.safetensors"
    said["metadata"]["total_size"] += head.nbytes
    index.write_text(json.dumps(said))
    return folder


def test_one_tensor_on_both_sides(tied: Path, tmp_path: Path):
    assert HEAD not in read_hf(tied) and read_hf_config(tied)["tie_word_embeddings"] is True
    step = hf_to_megatron(
        tied, tmp_path / "m", Options(verify=True), Silent(), divisible_by=16, tensor_size=2
    )
    keys = read_megatron(step)
    assert "output_layer.weight" not in keys and keys["embedding.word_embeddings.weight"].shape == (128, 37)
    back = megatron_to_hf(tmp_path / "m", tmp_path / "back", Options(verify=True), Silent())
    assert_same(read_hf(back), read_hf(tied))
    assert read_hf_config(back) == read_hf_config(tied)


def test_a_head_that_repeats_the_embedding_is_kept_once_and_said(tied: Path, tmp_path: Path):
    """As the published folders of small Qwen3 models have it."""
    plain, reporter = read_hf(tied), Silent()
    hf_to_megatron(with_a_head(tied, 0.0), tmp_path / "m", Options(verify=True), reporter)
    assert any(f"{HEAD} repeats {EMBEDDING}" in line for line in reporter.lines)
    back = megatron_to_hf(tmp_path / "m", tmp_path / "back", Options(), Silent())
    assert_same(read_hf(back), plain)


def test_a_head_of_its_own_under_a_config_that_ties_is_refused(tied: Path, tmp_path: Path):
    with pytest.raises(CheckpointError) as caught:
        hf_to_megatron(with_a_head(tied, 1e-3), tmp_path / "m", Options(), Silent())
    line = str(caught.value)
    assert f"{HEAD} is not {EMBEDDING}" in line and "tie_word_embeddings" in line and "\n" not in line
    assert not (tmp_path / "m").exists()


def test_the_plain_forward_pass_has_the_embedding_for_a_head(tied: Path):
    tokens_T = torch.tensor(prompt(TIED.vocab_size))
    expected_TV = logits_TV(read_hf(tied), read_hf_config(tied), tokens_T)
    found_TV = plain_logits(SafetensorsFolder(tied), TIED, tokens_T)
    assert expected_TV.std() > 0.1
    assert (found_TV - expected_TV).abs().max() / expected_TV.abs().max() < 1e-5


def test_repad_pads_the_only_vocabulary(tied: Path, tmp_path: Path):
    hf_to_megatron(tied, tmp_path / "m", Options(), Silent())
    before = read_megatron(tmp_path / "m/iter_0000000")
    step = repad(
        tmp_path / "m", tmp_path / "r", Options(verify=True), Silent(), divisible_by=7, tensor_size=2
    )
    after = read_megatron(step)
    rows = after.pop("embedding.word_embeddings.weight")
    assert rows.shape == (112, 37) and not rows[101:].any()
    assert torch.equal(rows[:101], before.pop("embedding.word_embeddings.weight")[:101])
    assert_same(after, before)


def test_an_untied_model_is_told_from_a_tied_one(tmp_path: Path):
    untied = write_hf(ODD["qwen3"], tmp_path / "untied")
    broken = shutil.copytree(untied, tmp_path / "broken")
    config = {**read_hf_config(broken), "tie_word_embeddings": True}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not model"):
        hf_to_megatron(broken, tmp_path / "m", Options(), Silent())


@pytest.mark.parametrize(
    ("name", "error"), [("qwen3", None), ("qwen3_tied", "another model: untie_embeddings")]
)
def test_a_checkpoint_from_before_there_were_ties_is_an_untied_models(
    name: str, error: str | None, tmp_path: Path
):
    hf_to_megatron(write_hf(ODD[name], tmp_path / "hf"), tmp_path / "m", Options(), Silent())
    state = tmp_path / "m/iter_0000000/trainer_state.json"
    said = json.loads(state.read_text())
    del said["model"]["untie_embeddings_and_output_weights"]
    state.write_text(json.dumps(said))
    config = run_config_of(tmp_path / "m/iter_0000000", None)
    expected = pytest.raises(CheckpointError, match=error) if error else nullcontext()
    with open_session(config.parallel, seed=3) as session:
        checkpointer = Checkpointer(config, Engine(config, session), session, stage="pretrain")
        with expected:
            checkpointer.load_weights(tmp_path / "m")
