"""transformers' own classes: their folders go there and back bit for bit, and our model computes their log p and their
gradients.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.checkpoint.convert.conversion import Options
from megatron_ring.checkpoint.convert.folders import run_config_of
from megatron_ring.checkpoint.convert.model_map import tensor_map
from megatron_ring.checkpoint.convert.publish import hf_parts, shards_of
from megatron_ring.checkpoint.convert.to_hf import megatron_to_hf
from megatron_ring.checkpoint.convert.to_megatron import hf_to_megatron
from megatron_ring.checkpoint.state import model_state
from megatron_ring.data.batch.microbatch import pack_microbatch
from megatron_ring.runtime.session import open_session
from megatron_ring.train.engine import Engine
from megatron_ring.train.objective import NextTokenObjective
from tests.helpers.checkpoint.convert_cases import Silent, assert_same, prompt

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("MEGATRON_RING_VLLM", ROOT / ".venv-vllm")) / "bin/python"
WORKER = ROOT / "tests/helpers/checkpoint/transformers_worker.py"

_SIZES: dict[str, Any] = dict(
    num_hidden_layers=3,
    hidden_size=36,
    intermediate_size=28,
    num_attention_heads=6,
    num_key_value_heads=3,
    vocab_size=101,
    max_position_embeddings=64,
    initializer_range=0.3,
    rope_theta=10000.0,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
# heads wider than hidden_size / num_attention_heads
_QWEN3: dict[str, Any] = {**_SIZES, "model_type": "qwen3", "head_dim": 8}
_QWEN3_MOE: dict[str, Any] = {
    **_QWEN3,
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {**_SIZES, "model_type": "qwen2"},
    "qwen2_tied": {**_SIZES, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": _QWEN3,
    "qwen3_tied": {**_QWEN3, "tie_word_embeddings": True},
    "qwen3_moe": {**_QWEN3_MOE, "norm_topk_prob": True},
    "qwen3_moe_raw": {**_QWEN3_MOE, "norm_topk_prob": False},
}

pytestmark = [
    pytest.mark.all,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not PYTHON.exists(), reason=f"{PYTHON.parents[1]} is not there; run tools/setup_vllm.sh"
    ),
]


def ask_transformers(*words: str) -> None:
    command = [str(PYTHON), str(WORKER), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]


def every_tensor(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def our_log_p_and_gradients(root: Path, tokens: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """log p [T, V] and the gradients of the mean loss, under the names of the Hugging Face folder."""
    config = run_config_of(root / "iter_0000000", None)
    config = replace(config, checkpoint=replace(config.checkpoint, load=str(root), finetune=True))
    T = len(tokens) - 1
    with open_session(config.parallel, seed=3) as session:
        engine = Engine(config, session)
        Checkpointer(config, engine, session, stage="pretrain").load(root)
        whole = pack_microbatch([(tokens, tokens, [0.0] * len(tokens))], len(tokens))
        vocab_size = config.model.vocab_size
        (log_p,) = engine.forward(
            [whole], lambda _, logits: (torch.zeros(()), logits.main_TV[:, :vocab_size].log_softmax(-1))
        )
        trained = pack_microbatch([(tokens[:-1], tokens[1:], [1.0] * T)], T)
        engine.accumulate([trained], NextTokenObjective())
        for parameter in engine.models[0].parameters():
            parameter.data = parameter.main_grad.view(parameter.shape)
        mapping = tensor_map(config.model, engine.models[0].vocab_size)
        gradients = {name: torch.zeros(shape) for name, shape in mapping.names.items()}
        for part in hf_parts(mapping, shards_of(model_state(engine))):
            gradients[part.name][part.box.slices()] = part.data
    return log_p, gradients


@pytest.mark.parametrize("name", MODELS)
def test_a_class_of_transformers_and_our_model_are_the_same(name: str, tmp_path: Path):
    theirs, back, root = tmp_path / "theirs", tmp_path / "back", tmp_path / "megatron"
    ask_transformers("make", str(theirs), json.dumps(MODELS[name]))
    hf_to_megatron(theirs, root, Options(verify=True), Silent())
    megatron_to_hf(root, back, Options(verify=True), Silent())
    assert_same(every_tensor(back), every_tensor(theirs))
    # what we wrote is what they read
    tokens = prompt(101)
    ask_transformers("run", str(back), json.dumps(tokens), str(tmp_path / "out.safetensors"))
    expected = load_file(tmp_path / "out.safetensors")
    expected_TV = expected.pop("log_p")
    log_p_TV, gradients = our_log_p_and_gradients(root, tokens)
    assert expected_TV.std() > 0.1, "too flat to tell anything"
    assert (log_p_TV - expected_TV).abs().max() < 1e-4
    assert {f"gradient.{name}" for name in gradients} == expected.keys()
    for name, found in gradients.items():
        wanted = expected[f"gradient.{name}"]
        gap = (found - wanted).norm() / wanted.norm().clamp(min=1e-9)
        assert gap < 1e-5, f"gradient of {name} differs by {gap:.1e}"
