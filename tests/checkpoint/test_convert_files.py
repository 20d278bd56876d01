"""Conversion of folders: bit-equal both ways, bad input refused in a line, interrupted runs resumed and never
taken as finished.
"""

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ring.checkpoint.convert import stream
from megatron_ring.checkpoint.convert.hf_config import hf_config, model_config, read_hf_config
from megatron_ring.checkpoint.convert.plain_forward import plain_logits
from megatron_ring.checkpoint.convert.plan import safetensors_files
from megatron_ring.checkpoint.convert.repad import repad
from megatron_ring.checkpoint.convert.safetensors_io import SafetensorsFolder
from megatron_ring.checkpoint.convert.tensor_map import Box, TensorCopy
from megatron_ring.checkpoint.convert.to_hf import Export, megatron_to_hf
from megatron_ring.checkpoint.convert.to_megatron import hf_to_megatron
from megatron_ring.checkpoint.convert.torch_dist_io import TorchDistFolder
from megatron_ring.checkpoint.run_lock import hold_run_folder
from megatron_ring.config.load import preset_config
from megatron_ring.config.presets import PRESETS
from megatron_ring.errors import CheckpointError
from megatron_ring.launch.commands import convert
from tests.helpers.checkpoint.checkpoints import SMALL
from tests.helpers.checkpoint.convert_cases import (
    ODD,
    Silent,
    assert_same,
    prompt,
    read_hf,
    read_megatron,
    run_tool,
    write_hf,
)
from tests.helpers.checkpoint.reference_model import logits_TV


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ODD)
def test_there_and_back_is_bit_equal(name: str, dtype: str, tmp_path: Path):
    source = write_hf(ODD[name], tmp_path / "hf", dtype)
    reporter = Silent()
    folder = hf_to_megatron(source, tmp_path / "megatron", SMALL, reporter, divisible_by=8)
    assert len(list(folder.glob("*.distcp"))) > 2 and any(
        "equal bit by bit" in line for line in reporter.lines
    )
    back = megatron_to_hf(tmp_path / "megatron", tmp_path / "back", SMALL, reporter)
    assert_same(read_hf(back), read_hf(source))
    assert len(list(back.glob("*.safetensors"))) > 1
    assert read_hf_config(back) == read_hf_config(source)
    assert (back / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    again = hf_to_megatron(back, tmp_path / "again", SMALL, reporter, divisible_by=8)
    assert_same(read_megatron(again), read_megatron(folder))
    for path in tmp_path.rglob("*"):
        assert not path.name.endswith((".incomplete", ".part", ".lock")) and path.name != ".done", path


def test_a_workers_error_is_the_conversions(hf: dict[str, Path], tmp_path: Path):
    """The parent looks at the source first; what breaks later breaks in a worker."""
    source = SafetensorsFolder(hf["v1"])
    boxes = {name: Box.whole(info.shape) for name, info in source.tensors.items()}
    copies = {name: [TensorCopy(name, box, name, box)] for name, box in boxes.items()}
    job = stream.Job(
        source=tmp_path / "gone",
        source_format="safetensors",
        target_format="safetensors",
        copies=copies,
        tensors=source.tensors,
        files=safetensors_files(source.tensors, 20_000),
    )
    with pytest.raises(CheckpointError, match="gone: no such folder"):
        stream.write(job, tmp_path, list(job.files), 2, lambda _: None)


def test_padding_is_zero_and_follows_the_layout(hf: dict[str, Path], tmp_path: Path):
    folder = hf_to_megatron(hf["v1"], tmp_path / "m", SMALL, Silent(), divisible_by=16, tensor_size=4)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = read_megatron(folder)[key]
        assert rows.shape == (128, 37) and (rows[101:] == 0).all() and (rows[:101] != 0).any()


def test_two_processes_write_what_one_does(hf: dict[str, Path], tmp_path: Path):
    one = hf_to_megatron(hf["v2_mtp"], tmp_path / "one", SMALL, Silent())
    done = run_tool("hf-to-megatron", hf["v2_mtp"], tmp_path / "two", "--workers", 2, "--max-file-gb", 2e-5)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "two/iter_0000000"
    assert "GB/s" in done.stdout
    assert {p.name: p.read_bytes() for p in one.glob("*.distcp")} == {
        p.name: p.read_bytes() for p in two.glob("*.distcp")
    }


def test_casting_is_named_and_spares_the_expert_bias(hf: dict[str, Path], tmp_path: Path):
    reporter = Silent()
    options = dataclasses.replace(SMALL, dtype=torch.bfloat16)
    folder = hf_to_megatron(hf["v2"], tmp_path / "m", options, reporter)
    tensors = read_megatron(folder)
    kinds = {key: tensor.dtype for key, tensor in tensors.items()}
    assert {key for key, kind in kinds.items() if kind == torch.float32} == {
        k for k in kinds if k.endswith("expert_bias")
    }
    own = read_hf(hf["v2"])["model.layers.1.mlp.experts.3.up_proj.weight"]
    assert torch.equal(tensors["decoder.layers.1.mlp.experts.fc1_weight"][3, 1], own.bfloat16())
    assert any("cast float32 -> bfloat16" in line for line in reporter.lines)


def test_normalised_head_is_what_the_model_divides_by(hf: dict[str, Path], tmp_path: Path):
    hf_to_megatron(hf["v1"], tmp_path / "m", SMALL, Silent())
    back = megatron_to_hf(tmp_path / "m", tmp_path / "h", SMALL, Silent(), Export(normalize_head=True))
    assert read_hf_config(back)["norm_head"] is False
    raw, normed = read_hf(hf["v1"])["lm_head.weight"], read_hf(back)["lm_head.weight"]
    torch.testing.assert_close(normed, raw / (raw.norm(dim=0) + 1e-7))


def test_multi_token_prediction_layers_can_stay_behind(hf: dict[str, Path], tmp_path: Path):
    hf_to_megatron(hf["v2_mtp"], tmp_path / "m", SMALL, Silent())
    back = megatron_to_hf(tmp_path / "m", tmp_path / "h", SMALL, Silent(), Export(without_mtp=True))
    whole = read_hf(hf["v2_mtp"])
    assert_same(
        read_hf(back),
        {n: t for n, t in whole.items() if not n.startswith(("model.layers.3.", "model.layers.4."))},
    )
    assert read_hf_config(back)["num_nextn_predict_layers"] == 0


def test_repad_pads_anew_and_keeps_the_optimizer(hf: dict[str, Path], tmp_path: Path):
    folder = hf_to_megatron(hf["v1"], tmp_path / "m", SMALL, Silent(), divisible_by=16)
    before = read_megatron(folder)
    # a run's checkpoint has moments beside each weight, in the weight's shape
    with_moments = before | {f"optimizer.state.exp_avg.{key}": -tensor for key, tensor in before.items()}
    _rewrite(folder, with_moments)
    reporter = Silent()
    after_folder = repad(tmp_path / "m", tmp_path / "r", SMALL, reporter, divisible_by=7, tensor_size=2)
    after = read_megatron(after_folder)
    assert after.keys() == with_moments.keys()
    for key, tensor in after.items():
        rows = 101 if tensor.shape[0] == 112 else tensor.shape[0]
        assert torch.equal(tensor[:rows], with_moments[key][:rows]) and (tensor[rows:] == 0).all()
    assert after["optimizer.state.exp_avg.output_layer.weight"].shape == (112, 37)
    assert any("_extra_state objects dropped" in line for line in reporter.lines)
    assert "make_vocab_size_divisible_by = 7" in (after_folder / "config.toml").read_text()
    assert_same(read_hf(megatron_to_hf(tmp_path / "r", tmp_path / "h", SMALL, Silent())), read_hf(hf["v1"]))


def _rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Save ``tensors`` and an object in PyTorch's own words in place of what is in ``folder``."""
    import torch.distributed.checkpoint as dcp

    for path in [*folder.glob("*.distcp"), folder / ".metadata"]:
        path.unlink()
    objects = {"decoder.layers.0.self_attention.linear_qkv._extra_state/shard_0_1": {"amax": 3}}
    dcp.save({**tensors, **objects}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


def _edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def _edit_tensors(folder: Path, first=lambda _: None, each=lambda _: None) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        if path.name.startswith("model-00001"):
            first(tensors)
        each(tensors)
        save_file(tensors, path)
    (folder / "model.safetensors.index.json").unlink()


def _truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(path, path.stat().st_size - 100)


BAD = {
    "no such folder": (shutil.rmtree, "config.json: No such file"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: "),
    "another family": (
        lambda f: _edit_config(f, architectures=["LlamaForCausalLM"]),
        "is another family's model",
    ),
    "two families in one config": (
        lambda f: _edit_config(f, architectures=["Qwen2ForCausalLM"]),
        "model_type='bailing_moe' is another family's than architectures=Qwen2ForCausalLM",
    ),
    "tied": (
        lambda f: _edit_config(f, tie_word_embeddings=True),
        "tie_word_embeddings=True is not supported",
    ),
    "scaled rope": (
        lambda f: _edit_config(f, rope_scaling={"type": "yarn"}),
        "rope_scaling={'type': 'yarn'} is not",
    ),
    "setting missing": (lambda f: _edit_config(f, num_experts=None), "num_experts is missing"),
    "setting of another type": (
        lambda f: _edit_config(f, hidden_size="37"),
        "'37' for hidden_size is no int",
    ),
    "impossible sizes": (
        lambda f: _edit_config(f, num_key_value_heads=4),
        "must divide num_attention_heads=6",
    ),
    "too many layers": (
        lambda f: _edit_config(f, num_hidden_layers=4),
        "model.layers.3.input_layernorm.weight",
    ),
    "too few layers": (
        lambda f: _edit_config(f, num_hidden_layers=2),
        "not part of a bailing_moe of 2 layers",
    ),
    "another width": (
        lambda f: _edit_config(f, moe_intermediate_size=13),
        "but the config makes it [13, 37]",
    ),
    "missing tensor": (
        lambda f: _edit_tensors(f, lambda t: t.pop("model.word_embeddings.weight")),
        "is missing",
    ),
    "extra tensor": (lambda f: _edit_tensors(f, lambda t: t.update(x=torch.zeros(2))), "x is not part of"),
    "wrong shape": (
        lambda f: _edit_tensors(f, lambda t: t.update({"model.word_embeddings.weight": torch.zeros(99, 37)})),
        "model.word_embeddings.weight is [99, 37] but the config makes it [101, 37]",
    ),
    "integers": (
        lambda f: _edit_tensors(f, lambda t: t.update(x=torch.zeros(2, dtype=torch.int8))),
        "has dtype I8",
    ),
    "mixed dtypes": (
        lambda f: _edit_tensors(
            f,
            each=lambda t: t.update(
                {n: x.bfloat16() for n, x in t.items() if n.endswith("experts.0.gate_proj.weight")}
            ),
        ),
        "have dtypes torch.bfloat16, torch.float32; choose one with --dtype",
    ),
    "truncated shard": (_truncate, "truncated or damaged"),
    "missing shard": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "missing although"),
    "garbage shard": (
        lambda f: sorted(f.glob("*.safetensors"))[1].write_bytes(b"\xff" * 64),
        "no safetensors file",
    ),
    "garbage index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no weight map"),
    "index that leaves the folder": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x"}}'),
        "not a file beside it",
    ),
    "no weights": (
        lambda f: [p.unlink() for p in f.iterdir() if "safetensors" in p.name],
        "holds no *.safetensors",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_hugging_face_input_is_refused_and_nothing_is_written(
    case: str, hf: dict[str, Path], tmp_path: Path
):
    damage, message = BAD[case]
    shutil.copytree(hf["v1"], tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(CheckpointError) as caught:
        hf_to_megatron(tmp_path / "hf", tmp_path / "m", SMALL, Silent())
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "m").exists()


class _Harmful:
    def __reduce__(self):
        return (os.system, ("true",))


def _cut_chunk_file(folder: Path) -> None:
    path = sorted(folder.glob("*.distcp"))[-1]
    os.truncate(path, path.stat().st_size - 10)


def _garble_chunks(folder: Path) -> None:
    for path in folder.glob("*.distcp"):
        path.write_bytes(b"\0" * path.stat().st_size)


def _cut_object(folder: Path) -> None:
    """The last of the first file: not a tensor."""
    path = folder / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 10)


BAD_MEGATRON = {
    "metadata missing": (lambda f: (f / ".metadata").unlink(), "neither .metadata nor"),
    "metadata damaged": (lambda f: os.truncate(f / ".metadata", 100), "cannot be read safely"),
    "metadata that runs code": (
        lambda f: (f / ".metadata").write_bytes(pickle.dumps(_Harmful())),
        "cannot be read safely (it names posix.system)",
    ),
    "file missing": (lambda f: sorted(f.glob("*.distcp"))[0].unlink(), "missing although .metadata names it"),
    "file truncated": (_cut_chunk_file, "truncated; copy it again"),
    "file cut in an object": (_cut_object, "truncated; copy it again"),
    "chunks damaged": (_garble_chunks, "cannot be read"),
    "config missing": (lambda f: (f / "config.toml").unlink(), "--config FILE.toml"),
    "config of another model": (
        lambda f: (f / "config.toml").write_text(
            (f / "config.toml").read_text().replace("num_layers = 3", "num_layers = 5")
        ),
        "decoder.layers.3.input_layernorm.weight",
    ),
}


@pytest.mark.parametrize("case", BAD_MEGATRON)
def test_bad_megatron_input_is_refused_and_nothing_looks_finished(
    case: str, hf: dict[str, Path], tmp_path: Path
):
    damage, message = BAD_MEGATRON[case]
    folder = hf_to_megatron(hf["v1"], tmp_path / "m", SMALL, Silent())
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        megatron_to_hf(folder, tmp_path / "h", SMALL, Silent())
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command is given"),
        (["hf-to-megatron", "nowhere", "out", "--workers", "0"], "workers=0 must be at least 1"),
        (["hf-to-megatron", "nowhere", "out"], "nowhere/config.json: No such file"),
        (["megatron-to-hf", "nowhere", "out"], "nowhere: no such folder"),
        (["repad", ".", "out"], "neither .metadata nor latest_checkpointed_iteration.txt"),
        (["check", "."], "neither .metadata nor"),
        (["hf-to-megatron", "nowhere", "out", "--dtpye", "bf16"], "--dtpye"),
        (["hf-to-megatron", "", "out"], "argument IN: the name is empty; name a file or folder"),
        (["hf-to-megatron", "nowhere", ""], "argument OUT: the name is empty"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(words: list[str], message: str, tmp_path: Path):
    done = run_tool(*words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("hf-to-megatron", "--max-file-gb 1e300", "max_file_gb=1e+300 must be positive and at most 1000000"),
        ("megatron-to-hf", "--max-file-gb nan", "max_file_gb=nan must be positive"),
        (
            "hf-to-megatron",
            "--make-vocab-size-divisible-by 0",
            "make_vocab_size_divisible_by=0 must be at least 1",
        ),
        ("repad", "--make-vocab-size-divisible-by 0", "make_vocab_size_divisible_by=0 must be at least 1"),
        ("repad", "--tensor-model-parallel-size -8", "tensor_model_parallel_size=-8 must be at least 1"),
        (
            "hf-to-megatron",
            "--make-vocab-size-divisible-by 99999999999999",
            "padded to a multiple of 99999999999999 rows, which must be at most 16777216; lower --make-vocab",
        ),
    ],
)
def test_a_number_that_fits_no_conversion_is_refused_first(
    command: str, flags: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(convert, "exit_on_sigterm", lambda: None)
    with pytest.raises(CheckpointError) as caught:
        convert.main([command, "nowhere", "out", *flags.split()])
    assert message in str(caught.value)


def test_a_folder_in_which_a_run_writes_is_left_alone(hf: dict[str, Path], tmp_path: Path, monkeypatch):
    with hold_run_folder(tmp_path / "m"):
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(CheckpointError, match="writes its checkpoints there"):
            hf_to_megatron(hf["v1"], tmp_path / "m", SMALL, Silent())
        monkeypatch.undo()
    assert not (tmp_path / "m").exists()


def test_nothing_that_exists_is_written_over(hf: dict[str, Path], tmp_path: Path):
    hf_to_megatron(hf["dense"], tmp_path / "m", SMALL, Silent())
    with pytest.raises(CheckpointError, match="holds checkpoints already"):
        hf_to_megatron(hf["dense"], tmp_path / "m", SMALL, Silent())
    (tmp_path / "h").mkdir()
    (tmp_path / "h/mine").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        megatron_to_hf(tmp_path / "m", tmp_path / "h", SMALL, Silent())
    (tmp_path / "h/mine").unlink()
    assert_same(
        read_hf(megatron_to_hf(tmp_path / "m", tmp_path / "h", SMALL, Silent())), read_hf(hf["dense"])
    )


def test_a_chunk_is_read_in_place_whatever_its_cut(tmp_path: Path):
    """PyTorch's own writer cuts differently: one chunk per tensor."""
    import torch.distributed.checkpoint as dcp

    tensors = {"a": torch.randn(7, 5), "b": torch.randn(3, 2, 4).bfloat16(), "c": torch.randn(5)}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    folder = TorchDistFolder(tmp_path)
    ((_, view),) = folder.views("a", Box((2, 1), (3, 2)))
    assert torch.equal(view, tensors["a"][2:5, 1:3])
    ((_, view),) = folder.views("b", Box((1, 0, 2), (2, 2, 2)))
    assert torch.equal(view, tensors["b"][1:, :, 2:])


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.endswith("_tiny")])
def test_a_config_survives_its_own_words(preset: str):
    model = preset_config(preset).model
    config = hf_config(model, {}, "bfloat16")
    own = {"moe_aux_loss_coeff", "moe_z_loss_coeff", "ffn_hidden_size"}
    read = dataclasses.asdict(model_config(json.loads(json.dumps(config)), "config.json"))
    assert {k: v for k, v in read.items() if k not in own} == {
        k: v for k, v in dataclasses.asdict(model).items() if k not in own
    }


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_one_expert_per_token_is_the_same_model_whatever_is_said_of_its_normalisation(name: str):
    """The gates normalise where there are several weights; an engine that asks the config alone is told not to."""
    model = dataclasses.replace(ODD[name], moe_router_topk=1)
    config = hf_config(model, {}, "float32")
    assert config["norm_topk_prob"] is False
    for said in (True, False):
        assert model_config({**config, "norm_topk_prob": said}, "config.json") == model_config(config, "-")
    assert model_config(config, "-").moe_router_topk == 1
    several = hf_config(ODD[name], {}, "float32")
    assert several["norm_topk_prob"] is True
    with pytest.raises(CheckpointError, match="norm_topk_prob=False is not supported"):
        model_config({**several, "norm_topk_prob": False}, "config.json")


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_one_expert_per_token_goes_there_and_back_and_computes_what_the_published_gate_does(
    name: str, tmp_path: Path
):
    model = dataclasses.replace(ODD[name], moe_router_topk=1)
    source = write_hf(model, tmp_path / "hf")
    hf_to_megatron(source, tmp_path / "megatron", SMALL, Silent())
    back = megatron_to_hf(tmp_path / "megatron", tmp_path / "back", SMALL, Silent())
    assert read_hf_config(back) == read_hf_config(source)
    tokens_T = torch.tensor(prompt(model.vocab_size))
    expected_TV = logits_TV(read_hf(back), read_hf_config(back), tokens_T)
    found_TV = plain_logits(SafetensorsFolder(back), model, tokens_T)
    assert expected_TV.std() > 0.1
    assert (found_TV - expected_TV).abs().max() / expected_TV.abs().max() < 1e-5


def test_a_published_config_is_read():
    """The settings that Ring-lite's config.json publishes, and nothing else in the file."""
    published = {
        "architectures": ["BailingMoeForCausalLM"], "model_type": "bailing_moe", "hidden_size": 2048,
        "num_hidden_layers": 28, "vocab_size": 126464, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
        "num_shared_experts": 2, "first_k_dense_replace": 0, "intermediate_size": 5632, "norm_topk_prob": True,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 600000, "tie_word_embeddings": False,
        "use_bias": False, "use_qkv_bias": False, "norm_head": True, "initializer_range": 0.006,
        "max_position_embeddings": 32768, "pad_token_id": 126081, "eos_token_id": 126081,
    }  # fmt: skip
    model = model_config(published, "config.json")
    preset = preset_config("ring_lite").model
    trained = ("moe_aux_loss_coeff", "moe_z_loss_coeff")
    assert model == dataclasses.replace(preset, **{name: getattr(model, name) for name in trained})
    assert hf_config(model, published, "bfloat16")["eos_token_id"] == 126081
