"""Compare log p of one prompt: through Megatron's model, and through a forward pass over the plain tensors.

It proves that every weight is in its place and that two pieces of code agree on the arithmetic. It proves nothing
about the reading of config.json, which both share: there a setting is read, or refused by name (``hf_rules``).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megatron_ring.checkpoint.convert.folders import find_checkpoint, run_config_of
from megatron_ring.checkpoint.convert.hf_config import model_config, read_hf_config
from megatron_ring.checkpoint.convert.plain_forward import plain_logits
from megatron_ring.checkpoint.convert.safetensors_io import SafetensorsFolder
from megatron_ring.checkpoint.convert.to_hf import head_scale
from megatron_ring.checkpoint.convert.torch_dist_io import TorchDistFolder
from megatron_ring.checkpoint.index import read_index
from megatron_ring.checkpoint.megatron_io import load_sharded
from megatron_ring.checkpoint.state import load_tensors, tensors_only
from megatron_ring.config.model import ModelConfig
from megatron_ring.config.model_stats import count_parameters
from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.data.batch.microbatch import pack_microbatch
from megatron_ring.errors import CheckpointError
from megatron_ring.families import FAMILIES
from megatron_ring.model.build import build_model
from megatron_ring.model.packed import pack_inputs
from megatron_ring.model.sharding import sharding_metadata
from megatron_ring.runtime.session import open_session

NUM_TOKENS = 32
TOLERANCE = 1e-4
"""Largest difference of log p between two fp32 computations in different orders, with room for deep models."""


def check_logits(hf_folder: Path, megatron_path: Path, dtype: torch.dtype | None = None) -> str:
    """One line: the largest difference in log p over a random prompt, or why the check was left out.

    ``dtype`` is what the conversion cast the weights to: those it came from are rounded alike before they are run.

    Raises:
        CheckpointError: the two compute different things.
    """
    folder = find_checkpoint(megatron_path)
    model = replace(run_config_of(folder, None).model, transformer_impl="local")
    needed, free = 8 * count_parameters(model).total, _available_bytes()
    if needed > free:
        return (
            f"logits not compared: it takes {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"
        )
    generator = torch.Generator().manual_seed(0)
    tokens_T = torch.randint(0, model.vocab_size, (NUM_TOKENS,), generator=generator)
    with torch.no_grad():
        source = SafetensorsFolder(hf_folder)
        theirs = model_config(read_hf_config(hf_folder), str(hf_folder / "config.json"))
        expected_TV = plain_logits(source, theirs, tokens_T, dtype).log_softmax(-1)
        head = source.tensors[f"{FAMILIES[model.family].tensors.head}.weight"] if model.norm_head else None
        normalised = head.dtype if head and not theirs.norm_head else None
        found_TV = _megatron_logits(folder, model, tokens_T, dtype, normalised).log_softmax(-1)
    gap = (expected_TV - found_TV).abs().max().item()
    if not gap < TOLERANCE:
        raise CheckpointError(
            f"{hf_folder} and {folder} compute different models: log p differs by {gap:.2e}, more than "
            f"{TOLERANCE:.0e}; convert again with --verify"
        )
    return (
        f"logits agree: log p over {NUM_TOKENS} tokens x {model.vocab_size} differs by {gap:.1e} at most "
        "(weights and arithmetic; both sides take the settings from one reading of config.json)"
    )


def _megatron_logits(
    folder: Path,
    model: ModelConfig,
    tokens_T: torch.Tensor,
    dtype: torch.dtype | None,
    normalised: torch.dtype | None,
) -> torch.Tensor:
    """Logits [T, V]; ``normalised`` is the dtype of a head that was exported with NormHead applied to it."""
    parallel = ParallelConfig(bf16=False)
    with open_session(parallel, seed=0) as session:
        as_run = replace(model, norm_head=False) if normalised else model
        (chunk,) = build_model(as_run, parallel, session.topology, session.device, 0)
        state = chunk.sharded_state_dict(metadata=sharding_metadata(session.topology))
        loaded = load_sharded({"model": tensors_only(state)}, folder, read_index(folder))
        load_tensors(chunk, state, loaded["model"])
        if normalised:
            (scale_D,) = head_scale(TorchDistFolder(folder), model).values()
            head_VD = chunk.get_parameter("output_layer.weight")
            head_VD.copy_((head_VD * scale_D.to(head_VD.device)).to(normalised))
        if dtype is not None:
            # the expert bias is a buffer, and never cast
            for weight in chunk.parameters():
                weight.copy_(weight.to(dtype))
        chunk.eval()
        empty = torch.zeros(len(tokens_T))
        microbatch = pack_microbatch([(tokens_T.tolist(), tokens_T.tolist(), empty.tolist())], len(tokens_T))
        microbatch = microbatch.to(session.device)
        return chunk(microbatch, pack_inputs(microbatch)).main_TV[:, : model.vocab_size].float().cpu()


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no MemAvailable in /proc/meminfo")
