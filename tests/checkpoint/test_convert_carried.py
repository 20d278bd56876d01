"""What stands beside the weights is not taken for them, and what is carried over describes the weights it goes with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_ring.checkpoint.convert import conversion
from megatron_ring.checkpoint.convert.conversion import Options
from megatron_ring.checkpoint.convert.hf_config import hf_config, model_config, read_hf_config
from megatron_ring.checkpoint.convert.to_hf import Export, megatron_to_hf
from megatron_ring.checkpoint.convert.to_megatron import hf_to_megatron
from megatron_ring.errors import CheckpointError
from tests.helpers.checkpoint.convert_cases import ODD, Silent


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v1", {"tie_word_embeddings": True}),
        ("dense", {"rope_scaling": {"type": "yarn", "factor": 4}}),
        ("dense", {"use_sliding_window": True, "sliding_window": 8}),
        ("v1", {"norm_softmax": True}),
        ("v1", {"partial_rotary_factor": 0.5}),
        ("v2", {"quantization_config": {"quant_method": "fp8"}}),
        ("v2", {"hidden_act": "gelu"}),
        ("v2", {"norm_head": True}),
        ("v2", {"logit_scale": 0.5}),
        ("v2", {"layer_types": ["sliding_attention"] * 3}),
        ("v2", {"depth_gate": "sigmoid"}),
    ],
    ids=str,
)
def test_a_config_of_another_model_is_not_carried_over(name: str, said: dict[str, Any]):
    base = hf_config(ODD[name], {}, "float32")
    with pytest.raises(CheckpointError) as caught:
        hf_config(ODD[name], {**base, **said}, "float32")
    line = str(caught.value)
    assert list(said)[-1] in line and "config.json to carry over" in line and "--hf-files" in line
    assert "\n" not in line


@pytest.mark.parametrize(("name", "tied"), [("dense", False), ("qwen3", False), ("qwen3_tied", True)])
def test_whether_embeddings_are_tied_is_said_of_the_trained_model(name: str, tied: bool):
    """The tokenizer of a smaller Qwen stands beside ``tie_word_embeddings: true``, where engines drop ``lm_head``."""
    base = {**hf_config(ODD[name], {}, "float32"), "tie_word_embeddings": not tied}
    assert hf_config(ODD[name], base, "float32")["tie_word_embeddings"] is tied


@pytest.mark.parametrize("name", ODD)
def test_sizes_of_a_config_that_is_carried_over_are_the_trained_ones(name: str):
    base = hf_config(ODD[name], {}, "float32") | {
        "rope_theta": 5.0,
        "num_hidden_layers": 77,
        "temperature": 0.6,
    }
    made = hf_config(ODD[name], base, "float32")
    assert model_config(made, "c") == model_config(hf_config(ODD[name], {}, "float32"), "c")
    assert made["temperature"] == 0.6


def test_layer_types_of_a_config_that_is_carried_over_are_as_many_as_the_layers():
    """transformers loads no model with another number of them than ``num_hidden_layers``."""
    base = {**hf_config(ODD["qwen3"], {}, "float32"), "layer_types": ["full_attention"] * 28}
    assert hf_config(ODD["qwen3"], base, "float32")["layer_types"] == ["full_attention"] * 3


def test_a_base_with_an_adapter_is_not_taken_for_the_model(hf: dict[str, Path], tmp_path: Path):
    source = shutil.copytree(hf["v1"], tmp_path / "source")
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: the model is a base with an adapter"):
        hf_to_megatron(source, tmp_path / "m", Options(), Silent())
    assert not (tmp_path / "m").exists()


def test_what_describes_other_weights_does_not_go_into_an_export(hf: dict[str, Path], tmp_path: Path):
    files = shutil.copytree(hf["v1"], tmp_path / "files")
    others = ("adapter_config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json")
    for name in others:
        (files / name).write_text("{}")
    hf_to_megatron(hf["v1"], tmp_path / "m", Options(), Silent())
    back = megatron_to_hf(tmp_path / "m", tmp_path / "back", Options(), Silent(), Export(hf_files=files))
    assert (back / "tokenizer.json").exists() and not any((back / name).exists() for name in others)


def test_a_single_file_beside_shards_is_one_model_too_many(hf: dict[str, Path], tmp_path: Path):
    """transformers reads the single file, vLLM the shards that the index names."""
    source = shutil.copytree(hf["v1"], tmp_path / "source")
    save_file({"lm_head.weight": torch.zeros(3)}, source / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds model\.safetensors and, in model\.safetensors\.index\.json, shards"
    ):
        hf_to_megatron(source, tmp_path / "m", Options(), Silent())


def test_a_link_to_nothing_is_an_unfinished_download(hf: dict[str, Path], tmp_path: Path):
    """As in a snapshot of the hub's cache whose blob is not there yet."""
    source = shutil.copytree(hf["v1"], tmp_path / "source")
    (source / "chat_template.jinja").symlink_to("../../blobs/1f")
    with pytest.raises(
        CheckpointError, match=r"chat_template.jinja: a link to nothing; complete the download"
    ):
        hf_to_megatron(source, tmp_path / "m", Options(), Silent())
    assert not (tmp_path / "m").exists()


def test_a_resumed_export_has_nothing_of_the_files_first_named(
    hf: dict[str, Path], tmp_path: Path, monkeypatch
):
    """Stopped while it verifies, an export holds what it carried over already."""
    hf_to_megatron(hf["v1"], tmp_path / "m", Options(), Silent())
    first = shutil.copytree(hf["v1"], tmp_path / "first")
    (first / "chat_template.jinja").write_text("{{ messages }}")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(conversion, "compare", stopped)
        with pytest.raises(KeyboardInterrupt):
            export = Export(hf_files=first)
            megatron_to_hf(tmp_path / "m", tmp_path / "back", Options(verify=True), Silent(), export)
    assert (tmp_path / "back.incomplete/chat_template.jinja").exists()
    reporter = Silent()
    back = megatron_to_hf(
        tmp_path / "m", tmp_path / "back", Options(verify=True), reporter, Export(hf_files=hf["v1"])
    )
    assert any(line.startswith("resuming") for line in reporter.lines)
    assert not (back / "chat_template.jinja").exists()
    assert json.loads((back / "config.json").read_text()) == read_hf_config(hf["v1"])


def test_an_export_goes_where_a_link_leads(hf: dict[str, Path], tmp_path: Path):
    """A link to an empty folder, or to none yet, on a larger disk; it used to end when all was written."""
    hf_to_megatron(hf["v1"], tmp_path / "m", Options(), Silent())
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        link = tmp_path / f"link_to_{name}"
        link.symlink_to(name)
        megatron_to_hf(tmp_path / "m", link, Options(), Silent())
        assert link.is_symlink() and (tmp_path / name / "config.json").exists()
    assert not list(tmp_path.glob("*.incomplete"))
