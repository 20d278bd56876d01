"""config.json: what is said is computed or refused by name, what is left out has the published class's default, and
what we write means the model that was trained.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from megatron_ring.checkpoint.convert.conversion import Options
from megatron_ring.checkpoint.convert.hf_config import (
    TRAINING_ONLY,
    defaults_taken,
    hf_config,
    model_config,
    read_hf_config,
)
from megatron_ring.checkpoint.convert.plain_forward import plain_logits
from megatron_ring.checkpoint.convert.safetensors_io import SafetensorsFolder
from megatron_ring.checkpoint.convert.to_hf import megatron_to_hf
from megatron_ring.checkpoint.convert.to_megatron import hf_to_megatron
from megatron_ring.config.model import ModelConfig
from megatron_ring.errors import CheckpointError
from megatron_ring.families import FAMILIES
from tests.helpers.checkpoint.convert_cases import ODD, Silent, prompt, read_hf, run_tool, write_hf
from tests.helpers.checkpoint.published_configs import PUBLISHED
from tests.helpers.checkpoint.reference_model import logits_TV


def said(name: str, **changes: Any) -> dict[str, Any]:
    """The config of one of the odd models, changed; ``...`` takes a key out."""
    config = {**hf_config(ODD[name], {}, "float32"), **changes}
    return {key: value for key, value in config.items() if value is not ...}


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        model_config(config, "config.json")
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500
    return line


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_written_back_as_they_were(name: str):
    config = PUBLISHED[name]
    model = model_config(config, "config.json")
    again = hf_config(model, config, "bfloat16")
    assert model_config(again, "config.json") == model
    changed = {key for key, value in config.items() if key in again and again[key] != value}
    assert changed <= {"embedding_dropout", "output_dropout"}
    assert config.keys() - again.keys() <= {"n_routed_experts", "n_shared_experts", "rotary_dim", "dtype"}


def test_what_published_configs_say_in_other_words_is_the_same():
    plus = model_config(PUBLISHED["Ling-plus-base"], "config.json")
    assert (plus.num_experts, plus.moe_shared_expert_intermediate_size) == (64, 3072)
    assert model_config(PUBLISHED["Ling-1T"], "config.json").rotary_percent == 0.5
    old, new = (model_config(PUBLISHED[f"Qwen2-7B{more}"], "c") for more in ("", " of transformers 5"))
    assert old == new and old.rotary_base == 1000000.0


ROPE = {"rope_type": "default", "rope_theta": 600000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 600000.0}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "yarn of transformers 5": ("v2", {"rope_parameters": YARN, "rope_theta": ...}, "rope_parameters={'rope_type': 'ya"),
    "linear": ("v1", {"rope_parameters": {"type": "linear", "factor": 8.0}}, "only rope_type 'default'"),
    "a factor without a type": ("v1", {"rope_parameters": {"factor": 8.0}}, "only rope_type 'default'"),
    "a rope per kind of layer": ("v2", {"rope_parameters": {"full_attention": ROPE}}, "rope_parameters={'full_at"),
    "mrope": ("v2", {"rope_parameters": {**ROPE, "mrope_section": [8, 12, 12]}}, "mrope_section"),
    "rope of text": ("v2", {"rope_parameters": "yarn"}, "rope_parameters='yarn'"),
    "rope type of lists": ("v2", {"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type"),
    "yarn in the old words": ("dense", {"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling={'type': 'yarn'"),
    "two bases": ("v2", {"rope_parameters": {**ROPE, "rope_theta": 5e5}}, "rope_theta=600000.0 but rope_theta in rope_p"),
    "two shares": ("v2", {"rotary_dim": 8}, "partial_rotary_factor=0.5 but rotary_dim=8 of head_dim=8"),
    "part of v1's heads": ("v1", {"rotary_dim": 4}, "partial_rotary_factor=0.5 is not supported"),
    "no rotary_dim": ("v2", {"rotary_dim": "all"}, "rotary_dim='all'"),
    "v1 with a share": ("v1", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "v1 with q and k norms": ("v1", {"use_qk_norm": True}, "use_qk_norm=True"),
    "v1 with sigmoid scores": ("v1", {"score_function": "sigmoid"}, "score_function='sigmoid'"),
    "v1 with groups": ("v1", {"n_group": 2, "topk_group": 1}, "n_group=2"),
    "v1 with a scaling factor": ("v1", {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5"),
    "v1 with an expert bias": ("v1", {"moe_router_enable_expert_bias": True}, "enable_expert_bias=True"),
    "a factor by our name": ("v2", {"moe_router_topk_scaling_factor": 2.5}, "moe_router_topk_scaling_factor=2.5"),
    "biases": ("v1", {"attention_bias": True}, "attention_bias=True"),
    "no biases in Qwen2": ("dense", {"attention_bias": False}, "attention_bias=False"),
    "a window": ("dense", {"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window=True"),
    "not causal": ("dense", {"is_causal": False}, "is_causal=False"),
    "no gate": ("dense", {"swiglu": False}, "swiglu=False"),
    "v2 with NormHead": ("v2", {"norm_head": True}, "norm_head=True"),
    "a window of its own": ("v2", {"sliding_window": 128}, "sliding_window=128"),
    "window layers": ("dense", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=["),
    "a type too few": ("qwen3", {"layer_types": ["full_attention"] * 2}, "names 2 layers but num_hidden_layers=3"),
    "layers of text": ("dense", {"layer_types": "linear_attention"}, "layer_types='linear_attention'"),
    "logit scale": ("dense", {"logit_scale": 0.0625}, "logit_scale=0.0625"),
    "mup": ("v1", {"mup_multipliers": [0.5, 0.25]}, "mup_multipliers=[0.5, 0.25]"),
    "an activation": ("v1", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "tied": ("v1", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    "experts in every second layer": ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    "dense layers between": ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers=[0]"),
    "a shared expert": ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64"),
    "one expert of weight 1": ("qwen3_moe", {"num_experts_per_tok": 1}, "per_tok=1 needs moe_router_pre_softmax"),
    "biases in Qwen3": ("qwen3", {"attention_bias": True}, "attention_bias=True"),
    "a window in Qwen3": ("qwen3", {"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window=True"),
    "quantised": ("v1", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config={'quant_method': 'fp8'}"),
    "some layers only": ("v1", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    "a key of tomorrow": ("v2", {"depth_gate": "sigmoid"}, "depth_gate='sigmoid' is not known here"),
    "linear attention": ("v2", {"model_type": "bailing_hybrid"}, "model_type='bailing_hybrid'"),
    "interleaved": ("v2", {"rope_interleave": True}, "rope_interleave=True"),
    "an alias that differs": ("v1", {"n_routed_experts": 8}, "num_experts=6 but n_routed_experts=8"),
    "shared that differ": ("v2", {"n_shared_experts": 1}, "num_shared_experts=2 but n_shared_experts=1"),
    "shared experts off": ("v2", {"moe_router_enable_shared_expert": False}, "enable_shared_expert=False"),
    "a factor that is off": ("v2", {"moe_router_enable_routed_scaling": False}, "enable_routed_scaling=False"),
    "another score": ("v2", {"score_function": "sqrtsoftplus"}, "must be softmax or sigmoid"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_key_that_changes_the_computation_is_refused_by_name(case: str):
    name, changes, words = REFUSED[case]
    assert words in refused(said(name, **changes))


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("qwen3", {"rope_theta": 0}, "rope_theta=0.0 must be positive; correct it"),
        (
            "qwen3",
            {"num_key_value_heads": 4},
            "num_key_value_heads=4 must divide num_attention_heads=6; correct it",
        ),
        (
            "v2",
            {"topk_group": 1, "num_experts_per_tok": 3},
            "topk_group=1 leaves 2 experts to choose from, below num_experts_per_tok=3; correct it",
        ),
        (
            "qwen3_moe",
            {"num_experts": 0},
            "num_experts=0 does not fit family=qwen3_moe, which has experts; correct it",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias=True is not supported; it must be False"),
        ("qwen3", {"quantization_config": {}}, "quantization_config={} is not supported; it must be absent"),
    ],
)
def test_a_refusal_speaks_of_the_keys_of_config_json_and_of_no_flag(
    name: str, changes: dict[str, Any], line: str
):
    assert refused(said(name, **changes)) == f"config.json: {line}"


@pytest.mark.parametrize("nothing", [..., None, []], ids=str)
def test_a_config_without_architectures_is_no_other_familys(nothing: object):
    assert "architectures is missing; add the model's class" in refused(said("qwen3", architectures=nothing))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": ROPE, "rope_theta": ...},
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}, "partial_rotary_factor": ..., "rope_theta": ...},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {}},
        {"rotary_dim": 4},
        {"rotary_dim": 4, "partial_rotary_factor": ...},
        {"n_routed_experts": 6, "n_shared_experts": 2, "num_experts": ..., "num_shared_experts": ...},
        {"n_routed_experts": 6},
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 3},
        {"depth_gate": None, "use_depth_gate": False, "_commit_hash": "1f", "mup_enabled": False},
        {"logit_scale": 1.0, "attention_bias": False, "layer_types": ["full_attention"] * 3},
        {"eos_token_id": [7, 9], "temperature": 0.6, "task_specific_params": {"a": 1}},
        {"router_dtype": "None", "is_causal": True, "moe_router_enable_shared_expert": True},
        {"use_bias": ..., "use_qkv_bias": ..., "hidden_act": ..., "norm_topk_prob": ..., "router_dtype": ...},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_the_same_model_in_other_words_is_read(changes: dict[str, Any]):
    assert model_config(said("v2", **changes), "config.json") == model_config(said("v2"), "config.json")


@pytest.mark.parametrize("family", ["v1", "dense", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("switch", [..., None, False], ids=str)
def test_a_window_whose_switch_is_off_is_none(family: str, switch: object):
    """Both published classes leave ``use_sliding_window`` off, and note a window all the same."""
    changes = {"sliding_window": 4096, "use_sliding_window": switch}
    assert model_config(said(family, **changes), "c") == model_config(said(family), "c")


def test_what_tools_for_fine_tuning_note_is_no_setting_of_the_model():
    noted = {
        "unsloth_version": "2025.12.6", "unsloth_fixed": True, "model_name": "a/b", "neftune_noise_alpha": 5,
        "bf16": True, "seq_length": 32768, "model_max_length": 4096, "use_flash_attn": True, "chat_template": "{{ 1 }}",
        "transformers.js_config": {"dtype": "q4"}, "hf_device_map": {"": 0}, "encoder_repetition_penalty": 1.0,
    }  # fmt: skip
    assert model_config(said("dense", **noted), "c") == model_config(said("dense"), "c")


def test_null_key_and_value_heads_are_as_many_as_query_heads():
    """As Qwen2's class has it; absent they are 32."""
    assert model_config(said("dense", num_key_value_heads=None), "c").num_query_groups == 6


PUBLISHED_DEFAULTS: dict[str, dict[str, Any]] = {
    "v1": {
        "rms_norm_eps": 1e-5, "max_position_embeddings": 16384, "rope_theta": 10000.0, "initializer_range": 0.02,
        "first_k_dense_replace": 0, "norm_head": False, "num_experts_per_tok": 2, "num_hidden_layers": 24,
        "vocab_size": 30592, "num_experts": 16, "num_shared_experts": 0, "head_dim": 8,
    },
    "v2": {
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 600000.0, "initializer_range": 0.02,
        "first_k_dense_replace": 1, "num_experts_per_tok": 8, "num_hidden_layers": 20,
        "vocab_size": 157184, "num_experts": 256, "num_shared_experts": 1, "head_dim": 128, "n_group": 8,
        "topk_group": 4, "moe_intermediate_size": 512, "intermediate_size": 5120, "use_qk_norm": True,
        "partial_rotary_factor": 1.0, "score_function": "sigmoid", "routed_scaling_factor": 1.0,
        "moe_router_enable_expert_bias": True, "num_nextn_predict_layers": 0, "num_key_value_heads": 4,
    },
    "dense": {
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 10000.0, "initializer_range": 0.02,
        "num_hidden_layers": 32, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
        "head_dim": 8,
    },
    "qwen3": {
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 10000.0, "initializer_range": 0.02,
        "num_hidden_layers": 32, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
        "head_dim": 128, "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 10000.0, "initializer_range": 0.02,
        "num_hidden_layers": 24, "vocab_size": 151936, "intermediate_size": 6144, "num_key_value_heads": 4,
        "head_dim": 8, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": False, "tie_word_embeddings": False,
    },
}  # fmt: skip
# room for any one of the defaults beside the others
_WIDE: dict[str, Any] = {
    "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 256, "head_dim": 8, "num_experts": 64,
    "n_group": 4, "topk_group": 3, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "key"), [(family, key) for family, keys in PUBLISHED_DEFAULTS.items() for key in keys]
)
def test_an_absent_key_has_the_published_classs_default(family: str, key: str):
    config = said(family)
    config |= {name: value for name, value in _WIDE.items() if name in config}
    with_default = {**config, key: PUBLISHED_DEFAULTS[family][key]}
    without = {name: value for name, value in config.items() if name != key}
    assert model_config(without, "c") == model_config(with_default, "c")
    if key not in ("initializer_range", "head_dim") or (family, key) in (
        ("v2", "head_dim"),
        ("qwen3", "head_dim"),
    ):
        assert defaults_taken(without, "c") == {key: PUBLISHED_DEFAULTS[family][key]}
    assert defaults_taken(with_default, "c") == {}


def test_a_config_without_groups_computes_what_the_published_gate_does_and_says_so(tmp_path: Path):
    """8 groups, of which 4: the choice of experts, and so every logit, is another without them."""
    model = dataclasses.replace(
        ODD["v2"], num_experts=32, moe_router_num_groups=8, moe_router_group_topk=4, moe_router_topk=4
    )
    folder = write_hf(model, tmp_path / "hf")
    whole = read_hf_config(folder)
    tokens_T = torch.tensor(prompt(model.vocab_size))
    expected_TV = logits_TV(read_hf(folder), whole, tokens_T).log_softmax(-1)
    ungrouped_TV = logits_TV(read_hf(folder), {**whole, "n_group": 1, "topk_group": 1}, tokens_T).log_softmax(
        -1
    )
    assert (expected_TV - ungrouped_TV).abs().max() > 0.1
    short = {key: value for key, value in whole.items() if key not in ("n_group", "topk_group")}
    (folder / "config.json").write_text(json.dumps(short))
    found_TV = plain_logits(SafetensorsFolder(folder), model_config(short, "c"), tokens_T).log_softmax(-1)
    assert (found_TV - expected_TV).abs().max() < 1e-4
    reporter = Silent()
    hf_to_megatron(folder, tmp_path / "m", Options(), reporter)
    assert any("leaves out what its class then takes: n_group=8, topk_group=4" in x for x in reporter.lines)


def _other_values(name: str) -> list[Any]:
    """Values of a field of ours that are not its default."""
    default, kind = getattr(ModelConfig(), name), get_type_hints(ModelConfig)[name]
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, str):
        return [value for value in get_args(kind) if value != default]
    if default is None:
        return [0.01]
    return [default * 2 or 1, default + 1] if isinstance(default, int) else [default * 0.5 or 0.5]


@pytest.mark.parametrize("base", ["v1", "v2_mtp", "dense", "qwen3_tied", "qwen3_moe_raw"])
@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ModelConfig) if f.name != "family"])
def test_every_setting_is_written_or_trains_only_or_is_refused(field: str, base: str):
    """A config.json that says less than the model is another model's."""
    for value in _other_values(field):
        model = dataclasses.replace(ODD[base], **{field: value})
        if getattr(ODD[base], field) == value:
            continue
        try:
            config = hf_config(model, {}, "float32")
        except CheckpointError as error:
            assert f"{field}=" in str(error) and "\n" not in str(error)
            continue
        try:
            again = model_config(json.loads(json.dumps(config)), "c")
        except CheckpointError as error:
            # sizes that fit no model are refused wherever they come from
            family = FAMILIES[model.family]
            assert field in family.fields or field in family.implied, error
            continue
        unused = not ODD[base].is_moe and field in ("moe_router_topk", "moe_ffn_hidden_size")
        one_group = (field, value) == ("moe_router_num_groups", 1) and again.moe_router_num_groups == 0
        assert getattr(again, field) == value or field in TRAINING_ONLY or unused or one_group


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_percent": 0.5},
        {"moe_router_score_function": "sigmoid"},
        {"moe_router_topk_scaling_factor": 2.5},
        {"qk_layernorm": True},
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    ],
    ids=lambda changes: list(changes)[-1],
)
def test_a_v1_that_its_config_cannot_say_is_not_exported(changes: dict[str, Any]):
    with pytest.raises(
        CheckpointError, match=f"{next(iter(changes))}=.* cannot be expressed in the config of a bailing_moe"
    ):
        hf_config(dataclasses.replace(ODD["v1"], **changes), {}, "float32")


def test_a_config_made_anew_has_the_tokenizers_pad_and_end(tmp_path: Path):
    """The published classes' own lie beyond a vocabulary of 101, where no embedding can be made."""
    source = write_hf(ODD["v1"], tmp_path / "hf")
    assert read_hf_config(source)["pad_token_id"] is None
    hf_to_megatron(source, tmp_path / "m", Options(), Silent())
    files = tmp_path / "m/hf"
    (files / "config.json").unlink()
    tokenizer = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
        "decoder": None, "truncation": None, "padding": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "<pad>": 5, "<end>": 9}, "unk_token": "a"},
    }  # fmt: skip
    (files / "tokenizer.json").write_text(json.dumps(tokenizer))
    (files / "tokenizer_config.json").write_text('{"eos_token": "<end>", "pad_token": "<pad>"}')
    reporter = Silent()
    made = read_hf_config(megatron_to_hf(tmp_path / "m", tmp_path / "back", Options(), reporter))
    assert (made["pad_token_id"], made["eos_token_id"]) == (5, 9)
    assert any("made anew, with the tokenizer's pad_token_id=5, eos_token_id=9" in x for x in reporter.lines)
    for path in files.iterdir():
        path.unlink()
    files.rmdir()
    bare = read_hf_config(megatron_to_hf(tmp_path / "m", tmp_path / "bare", Options(), reporter))
    assert (bare["pad_token_id"], bare["eos_token_id"]) == (None, None)
    assert any("without pad and eos tokens: no tokenizer is at hand" in x for x in reporter.lines)


def test_a_token_of_minus_one_is_none_and_carried_over():
    base = said("qwen3", pad_token_id=-1, eos_token_id=[7, -1])
    again = hf_config(model_config(base, "c"), base, "float32")
    assert (again["pad_token_id"], again["eos_token_id"]) == (-1, [7, -1])


@pytest.mark.parametrize("token", [126081, -5])
def test_tokens_beyond_the_vocabulary_are_not_carried_over(token):
    with pytest.raises(CheckpointError, match=rf"pad_token_id={token} .* is not below vocab_size=101"):
        hf_config(ODD["v1"], said("v1", pad_token_id=token), "float32")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is beyond"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06 must be positive"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf is beyond"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps=1000000"),
        ({"vocab_size": 2**62}, f"vocab_size={2**62} is beyond"),
        ({"vocab_size": 10**5000 // 10**4000}, "vocab_size=1000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is beyond"),
        ({"num_hidden_layers": 10_000, "num_experts": 100_000}, "num_experts=100000 in each of 10000 layers"),
        ({"num_hidden_layers": -3}, "num_hidden_layers=-3 must be positive"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_experts_per_tok": True}, "the value True for num_experts_per_tok is no int"),
        ({"hidden_size": [37]}, "the value [37] for hidden_size is no int"),
        ({"hidden_size": 37.0}, "the value 37.0 for hidden_size is no int"),
        ({"norm_head": "yes"}, "the value 'yes' for norm_head is no bool"),
        ({"num_shared_experts": "2"}, "the value '2' for num_shared_experts is no int"),
        ({"num_shared_experts": {}}, "the value {} for num_shared_experts is no int"),
        ({"architectures": "BailingMoeForCausalLM"}, "architectures='BailingMoeForCausalLM' is another"),
        ({"architectures": [{"a": 1}]}, "is another family's model"),
        ({"architectures": 7}, "is another family's model"),
        ({"model_type": ["bailing_moe"]}, "model_type=['bailing_moe']"),
        ({"head_dim": 0}, "head_dim=0 must be positive"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be positive"),
        ({"intermediate_size": {}}, "the value {} for intermediate_size"),
    ],
    ids=str,
)
def test_odd_values_are_one_line(changes: dict[str, Any], words: str):
    assert words in refused(said("v1", **changes))


FILES = {
    "nested deeply": ("[" * 100_000, "nested too deeply"),
    "a string": ('"config"', "holds a string but must hold a JSON object"),
    "latin-1": (b'{"a": "\xe9"}', "can't decode"),
    "a key twice": ('{"n_group": 8, "n_group": 1}', "the key 'n_group' is there twice"),
    "a long number": ('{"vocab_size": ' + "9" * 5000 + "}", "digits"),
    "empty": ("", "Expecting value"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_config_is_one_line(case: str, tmp_path: Path):
    content, words = FILES[case]
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError) as caught:
        read_hf_config(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_value_nested_deeply_is_one_line_whatever_asks_for_it():
    for depth in (10, 300, 900):
        deep: list[Any] = []
        for _ in range(depth):
            deep = [deep]
        assert "rope_parameters=" in refused(said("v2", rope_parameters=deep))
        assert "odd=" in refused(said("v2", odd=deep))


def test_a_pipe_in_the_place_of_config_json_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "config.json")
    done = run_tool("hf-to-megatron", tmp_path, tmp_path / "out", timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "config.json: is no plain file" in done.stderr
