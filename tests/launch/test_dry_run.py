"""The dry run says what a run would be."""

import pytest

from megatron_ring.config.load import load_config, preset_config
from megatron_ring.config.model_stats import count_rank, rank_memory
from megatron_ring.config.presets import PRESETS
from megatron_ring.launch.dry_run import dry_run, gib


def rows(text: str, section: str) -> list[list[str]]:
    """Cells of the lines under a section's title."""
    block = text[text.index(f"\n{section}\n") :].strip().split("\n\n")[0]
    return [line.split() for line in block.splitlines()[1:]]


def test_parameters_and_step_are_counted():
    flags = "--preset ring_lite --expert-model-parallel-size 8 --seq-length 4096 --global-batch-size 64"
    text = dry_run(load_config(flags.split()), 8)
    assert ["total", "16,801,974,272"] in rows(text, "Parameters")
    assert ["active", "per", "token", "2,753,153,024"] in rows(text, "Parameters")
    assert ["microbatches", "per", "rank", "8"] in rows(text, "Step")
    assert ["tokens", "per", "step", "262,144"] in rows(text, "Step")


def test_a_model_that_no_config_json_can_describe_is_named_before_it_is_trained():
    """Its export is refused, and a training run is a late place to hear of it."""
    text = dry_run(load_config(["--preset", "qwen3_moe_tiny"]), 1)
    assert ["export", "to", "Hugging", "Face", "as", "qwen3_moe"] in rows(text, "Parameters")
    for flags, why in (
        (
            "--preset qwen3_tiny --family qwen2",
            "qk_layernorm=True cannot be expressed in the config of a qwen2",
        ),
        (
            "--preset ring_lite_tiny --moe-shared-expert-intermediate-size 96",
            "moe_shared_expert_intermediate_size=96 must be a multiple of moe_ffn_hidden_size=64",
        ),
    ):
        text = dry_run(load_config(flags.split()), 1)
        assert f"export to Hugging Face refused: {why}" in " ".join(text.split())


def test_stages_show_layers_parameters_and_memory_per_rank():
    flags = "--preset ring_mini_v2_tiny --pipeline-model-parallel-size 2 --mtp-num-layers 1"
    config = load_config([*flags.split(), "--num-virtual-stages-per-pipeline-rank", "2"])
    first, last = rows(dry_run(config, 2), "Pipeline stages")[1:]
    assert first[:4] == ["0", "embedding,", "0,", "2"]
    assert last[:5] == ["1", "1,", "3,", "mtp,", "head"]
    assert first[4] == f"{count_rank(config.model, config.parallel, 0).total:,}"
    memory = rank_memory(config.model, config.parallel, 1, 2)
    assert " ".join(last[-2:]) == gib(memory.total)


def test_ranks_show_their_coordinates_and_experts():
    flags = "--preset ring_lite_tiny --tensor-model-parallel-size 2 --sequence-parallel"
    config = load_config([*flags.split(), "--expert-model-parallel-size", "4", "--micro-batch-size", "1"])
    table = rows(dry_run(config, 8), "Ranks")
    assert table[0] == ["rank", "pp", "dp", "tp", "ep", "etp", "edp", "experts"]
    assert table[4] == ["3", "0", "1", "1", "3", "0", "0", "6-7"]
    assert len(table) == 9


def test_reinforcement_learning_shows_its_responses_and_budget():
    flags = (
        "--preset ring_lite_tiny --rollout-token-budget 400000 --max-response-length 4096 --token-budget 4096"
    )
    table = rows(dry_run(load_config(flags.split()), 1, stage="rl"), "Step")
    assert ["responses", "per", "rollout", "step", "8,192"] in table
    assert ["responses", "decoded", "at", "the", "same", "time", "97"] in table
    assert ["response", "tokens", "per", "optimizer", "step", "4,096", "(global)"] in table


def test_a_large_world_is_cut_short_and_says_so():
    config = load_config(
        ["--preset", "ring_lite", "--expert-model-parallel-size", "8", "--global-batch-size", "256"]
    )
    table = rows(dry_run(config, 256), "Ranks")
    assert table[-1] == ["...", "and", "192", "more", "ranks"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_plain_plan(preset: str):
    text = dry_run(preset_config(preset), 1)
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 110
    assert "\x1b" in dry_run(preset_config(preset), 1, styled=True)


def test_bytes_read_as_mebibytes_when_small():
    assert (gib(3 * 2**30), gib(2**20)) == ("3.00 GiB", "1.0 MiB")
