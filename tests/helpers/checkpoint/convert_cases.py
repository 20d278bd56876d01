"""Models and helpers of the conversion tests. No torch at import: parents that only spawn read it too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ring.config.model import ModelConfig
from tests.helpers.parallel.cases import MODELS
from tests.helpers.parallel.watching import PATIENCE, run_preloaded
from tests.helpers.paths import python_path

ROOT = Path(__file__).parents[3]
TOOL = [sys.executable, str(ROOT / "tools/convert_checkpoint.py")]

_ODD: dict[str, Any] = dict(
    num_layers=3,
    hidden_size=37,
    ffn_hidden_size=23,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=8,
    vocab_size=101,
    init_method_std=0.3,
)
_ODD_EXPERTS: dict[str, Any] = dict(
    num_experts=6, moe_ffn_hidden_size=11, moe_shared_expert_intermediate_size=22, moe_router_topk=2
)
_QWEN_EXPERTS: dict[str, Any] = {**_ODD_EXPERTS, "moe_shared_expert_intermediate_size": 0}
_V2: dict[str, Any] = dict(
    family="bailing_moe_v2",
    qk_layernorm=True,
    rotary_percent=0.5,
    first_k_dense_replace=1,
    moe_router_score_function="sigmoid",
    moe_router_num_groups=3,
    moe_router_group_topk=2,
    moe_router_topk_scaling_factor=2.5,
    moe_router_enable_expert_bias=True,
)
ODD: dict[str, ModelConfig] = {
    "v1": ModelConfig(family="bailing_moe", norm_head=True, **_ODD, **_ODD_EXPERTS),
    "v1_plain_head": ModelConfig(family="bailing_moe", **_ODD, **_ODD_EXPERTS),
    "v2": ModelConfig(**_V2, **_ODD, **_ODD_EXPERTS),
    "v2_mtp": ModelConfig(mtp_num_layers=2, **_V2, **_ODD, **_ODD_EXPERTS),
    "dense": ModelConfig(family="qwen2", add_qkv_bias=True, **_ODD),
    "qwen3": ModelConfig(family="qwen3", qk_layernorm=True, **_ODD),
    "qwen3_tied": ModelConfig(
        family="qwen3", qk_layernorm=True, untie_embeddings_and_output_weights=False, **_ODD
    ),
    "qwen3_moe": ModelConfig(family="qwen3_moe", qk_layernorm=True, **_ODD, **_QWEN_EXPERTS),
    "qwen3_moe_raw": ModelConfig(
        family="qwen3_moe", qk_layernorm=True, moe_router_pre_softmax=True, **_ODD, **_QWEN_EXPERTS
    ),
}
"""Widths that nothing divides."""


def layout_settings(name: str) -> dict[str, Any]:
    """A model that divides over every layout; its vocabulary is padded differently at tp 4 than at tp 1."""
    base = "v1" if name == "v1_plain_head" else name
    changes = {"norm_head": False} if name == "v1_plain_head" else {}
    return {**MODELS[base], **changes, "make_vocab_size_divisible_by": 6, "init_method_std": 0.15}


LAYOUT_MODELS = ("v1", "v1_plain_head", "v2_mtp", "dense", "qwen3", "qwen3_moe")
LAYOUTS: dict[int, dict[str, list[dict[str, int]]]] = {
    1: {name: [dict()] for name in LAYOUT_MODELS},
    2: {
        "v1": [dict(tp=2), dict(ep=2), dict(pp=2), dict(pp=2, vpp=2), dict(tp=2, etp=2)],
        "v1_plain_head": [dict(tp=2)],
        "v2_mtp": [dict(tp=2), dict(ep=2), dict(pp=2), dict(pp=2, vpp=2), dict(tp=2, etp=2)],
        "dense": [dict(tp=2), dict(pp=2)],
        "qwen3": [dict(tp=2), dict(pp=2), dict(pp=2, vpp=2)],
        "qwen3_moe": [dict(ep=2), dict(pp=2)],
    },
    4: {
        "v1": [dict(tp=4), dict(tp=2, pp=2, ep=2)],
        "v2_mtp": [dict(tp=4), dict(tp=2, ep=2, etp=2), dict(pp=2, vpp=2, ep=2)],
        "dense": [dict(tp=4)],
        "qwen3": [dict(tp=2, pp=2)],
        "qwen3_moe": [dict(tp=2, pp=2, ep=2)],
    },
    8: {
        "v1": [dict(tp=2, pp=2, ep=2), dict(tp=2, pp=2, vpp=2, ep=2, etp=2)],
        "v2_mtp": [dict(tp=2, pp=2, ep=4, etp=1), dict(tp=4, pp=2)],
        "dense": [dict(tp=4, pp=2)],
        "qwen3": [dict(tp=4, pp=2)],
        "qwen3_moe": [dict(tp=2, pp=2, vpp=2, ep=2, etp=2)],
    },
}
"""World size -> model -> layouts: at each one the converted checkpoint is loaded, run, published and
saved.
"""


def layout_name(model: str, world: int, layout: dict[str, int]) -> str:
    return "-".join([model, f"w{world}", *(f"{k}{v}" for k, v in layout.items())])


class Silent:
    """A reporter that remembers its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def progress(self, title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        yield lambda _: None


def write_hf(model: ModelConfig, folder: Path, dtype: str = "float32", max_file_bytes: int = 30_000) -> Path:
    """A random Hugging Face folder in several files, with a tokenizer file beside them."""
    from tools.make_random_checkpoint import write_random_checkpoint

    write_random_checkpoint(model, folder, dtype, max_file_bytes, seed=5)
    (folder / "tokenizer.json").write_text('{"of": "test"}', encoding="utf-8")
    return folder


def read_hf(folder: Path) -> dict[str, Any]:
    """Every tensor of a folder, read by the safetensors package through the index."""
    from safetensors import safe_open

    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    tensors = {}
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, framework="pt") as opened:
            tensors[name] = opened.get_tensor(name)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    return tensors


def read_megatron(folder: Path) -> dict[str, Any]:
    """Every tensor of a torch_dist folder, read by PyTorch's own reader."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def assert_same(own: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal names, dtypes, shapes and bits."""
    import torch

    assert own.keys() == other.keys(), own.keys() ^ other.keys()
    for name in own:
        assert own[name].dtype == other[name].dtype, name
        assert torch.equal(own[name], other[name]), name


NUM_TOKENS = 24


def prompt(vocab_size: int) -> list[int]:
    return [(37 * i * i + 11 * i + 5) % vocab_size for i in range(NUM_TOKENS)]


def run_tool(*words: object, cwd: Path = ROOT, timeout: int = PATIENCE) -> subprocess.CompletedProcess[str]:
    """``tools/convert_checkpoint.py`` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    return run_preloaded([*TOOL[1:], *map(str, words)], 1, cwd=cwd, env=environment, timeout=timeout)
