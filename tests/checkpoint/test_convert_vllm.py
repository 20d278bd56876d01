"""Exported folders in vLLM: the engine that will serve them computes the reference model's tokens and log
p.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_ring.checkpoint.convert.conversion import Options
from megatron_ring.checkpoint.convert.hf_config import read_hf_config
from megatron_ring.checkpoint.convert.to_hf import Export, megatron_to_hf
from megatron_ring.checkpoint.convert.to_megatron import hf_to_megatron
from megatron_ring.config.model import ModelConfig
from tests.helpers.checkpoint.convert_cases import ODD, Silent, prompt, read_hf, write_hf
from tests.helpers.checkpoint.reference_model import logits_TV

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("MEGATRON_RING_VLLM", ROOT / ".venv-vllm")) / "bin/python"
# widths are multiples of 32 and heads are 64 wide: what vLLM's CPU kernels take
_SIZES = dict(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=64,
    vocab_size=256,
    init_method_std=0.15,
)
_EXPERTS = dict(
    num_experts=8, moe_ffn_hidden_size=32, moe_shared_expert_intermediate_size=64, moe_router_topk=2
)
_QWEN_EXPERTS = {**_EXPERTS, "moe_shared_expert_intermediate_size": 0}


def fitted(name: str, **values) -> ModelConfig:
    return dataclasses.replace(ODD[name], **_SIZES, **values)


MODELS = {
    "v1": fitted("v1", **_EXPERTS),
    "v1_plain_head": fitted("v1_plain_head", **_EXPERTS),
    "v2": fitted("v2", **_EXPERTS, moe_router_num_groups=4, moe_router_group_topk=2),
    "v2_mtp": fitted("v2_mtp", **_EXPERTS, moe_router_num_groups=4, moe_router_group_topk=2),
    # the Qwen2 classes make heads hidden_size / num_attention_heads wide
    "dense": dataclasses.replace(fitted("dense"), hidden_size=256),
    "qwen3": fitted("qwen3"),
    "qwen3_tied": fitted("qwen3_tied"),
    "qwen3_moe": fitted("qwen3_moe", **_QWEN_EXPERTS),
    "qwen3_moe_raw": fitted("qwen3_moe_raw", **_QWEN_EXPERTS),
}


@pytest.mark.all
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON.parents[1]} is not there; run tools/setup_vllm.sh")
@pytest.mark.parametrize("name", MODELS)
def test_vllm_computes_the_reference_models_tokens_and_log_p(name: str, tmp_path: Path):
    hf_to_megatron(write_hf(MODELS[name], tmp_path / "hf"), tmp_path / "megatron", Options(), Silent())
    folder = megatron_to_hf(
        tmp_path / "megatron", tmp_path / "exported", Options(), Silent(), Export(without_mtp=True)
    )
    tokens, out = prompt(256), tmp_path / "out.json"
    worker = [
        str(PYTHON),
        str(ROOT / "tests/helpers/checkpoint/vllm_worker.py"),
        str(folder),
        json.dumps(tokens),
        str(out),
    ]
    done = subprocess.run(worker, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(out.read_text())
    tensors, config = read_hf(folder), read_hf_config(folder)
    for _ in range(16):
        logps_TV = logits_TV(tensors, config, torch.tensor(tokens)).log_softmax(-1)
        tokens = [*tokens, int(logps_TV[-1].argmax())]
    assert found["tokens"] == tokens[-16:]
    logps_TV = logits_TV(tensors, config, torch.tensor(tokens)).log_softmax(-1)
    expected = logps_TV[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)
    assert expected.std() > 0.1
    assert (torch.tensor(found["logps"]) - expected).abs().max() < 1e-4
