"""Presets, TOML and flags become one config; what cannot be read is one line."""

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from megatron_ring.config import RunConfig
from megatron_ring.config.dump import dump_toml, flat, format_config
from megatron_ring.config.load import load_config, parse_command, preset_config
from megatron_ring.config.presets import PRESETS
from megatron_ring.config.settings import sections, settings
from megatron_ring.errors import ConfigError
from megatron_ring.families import FAMILIES


def written(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def test_flags_override_the_file_and_the_file_overrides_the_preset(tmp_path: Path):
    file = written(tmp_path, 'preset = "ring_lite_tiny"\nlr = 0.5\n[model]\nnum_layers = 6\n')
    config = load_config([*file, "--lr", "0.25"])
    assert (config.train.lr, config.model.num_layers, config.model.num_experts) == (0.25, 6, 8)
    assert load_config(file).train.lr == 0.5
    assert load_config([*file, "--preset", "qwen2_tiny"]).model.family == "qwen2"


def test_flat_and_sectioned_files_agree(tmp_path: Path):
    flat_form = load_config(written(tmp_path, 'num_layers = 6\nbf16 = false\ndata_path = ["a"]\n'))
    sectioned = load_config(
        written(tmp_path, '[model]\nnum_layers = 6\n[parallel]\nbf16 = false\n[data]\ndata_path = ["a"]\n')
    )
    assert flat_form == sectioned
    assert flat_form.model.num_layers == 6


def test_a_byte_order_mark_is_no_setting(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbflr = 0.5\r\n")
    assert load_config(["--config", str(path)]).train.lr == 0.5


@pytest.mark.parametrize("preset", PRESETS)
def test_a_dump_loads_back_to_the_same_config(preset: str, tmp_path: Path):
    flags = "--data-path 0.3 a 0.7 b --rampup-batch-size 4 4 100 --save x --recompute-modules moe mlp"
    config = load_config(["--preset", preset, *flags.split()])
    assert load_config(written(tmp_path, dump_toml(config))) == config


@examples(deadline=None, max_examples=50)
@example(text='\x7f "quoted" \\ \n é', number=float("inf"))
@given(text=st.text(st.characters(exclude_categories=["Cs"])), number=st.floats(allow_nan=False))
def test_a_dump_keeps_any_text_and_number(tmp_path_factory: pytest.TempPathFactory, text: str, number: float):
    if text.lower() == "none":
        return
    config = RunConfig()
    config = replace(
        config, checkpoint=replace(config.checkpoint, save=text), train=replace(config.train, lr=number)
    )
    assert load_config(written(tmp_path_factory.mktemp("dump"), dump_toml(config))) == config


def test_a_flag_named_no_switches_on_what_it_names():
    on = load_config(["--no-load-optim", "--load", "x"])
    assert on.checkpoint.no_load_optim and not on.checkpoint.no_load_rng
    assert not load_config(["--no-load-optim", "--load-optim"]).checkpoint.no_load_optim


def test_every_field_is_a_flag_with_help():
    assert len(settings()) == sum(len(fields(cls)) for cls in sections().values())
    for setting in settings().values():
        assert len(setting.doc) > 10, setting.name
        value = setting.default
        if setting.kind is bool:
            argv = ["--no-" + setting.flag[2:] if value else setting.flag]
            expected = not value
        elif setting.kind is tuple:
            words = [setting.choices[0]] if setting.choices else ["1"] * (setting.length or 1)
            argv, expected = [setting.flag, *words], tuple(setting.item(word) for word in words)
        else:
            word = setting.choices[-1] if setting.choices else "7"
            argv, expected = [setting.flag, word], setting.kind(word)
        assert flat(load_config(argv))[setting.name] == expected


def test_none_is_a_value_of_optional_settings_only(tmp_path: Path):
    file = written(tmp_path, "lr_decay_iters = 5\n")
    assert load_config(file).train.lr_decay_iters == 5
    assert load_config([*file, "--lr-decay-iters", "none"]).train.lr_decay_iters is None
    with pytest.raises(ConfigError, match=r"--train-iters none: the value must be an integer$"):
        load_config(["--train-iters", "none"])


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--num-layer 3", "flag --num-layer does not exist; did you mean --num-layers?"),
        ("--zero 3", "flag --zero does not exist; see --help"),
        ("--num_layers 3", "flag --num_layers does not exist; did you mean --num-layers?"),
        ("tiny.toml", "argument tiny.toml is not a flag or its value; every setting is a flag, see --help"),
        ("--num-layers four", "--num-layers four: the value must be an integer"),
        ("--lr", "argument --lr: expected 1 argument; see --help"),
        ("--family gpt2", f"--family gpt2: the value must be one of {', '.join(FAMILIES)}"),
        ("--rampup-batch-size 1 2", "--rampup-batch-size 1 2: the value must be 3 integers or none"),
        (
            "--recompute-modules router",
            "--recompute-modules router: the value must be a list from core_attn, layernorm, mlp, moe, "
            "shared_experts",
        ),
        ("--ckpt-format zarr", "--ckpt-format zarr: the value must be torch_dist"),
        (
            "--preset ring",
            f"preset ring does not exist; try one of {', '.join(PRESETS)}",
        ),
        ("--config gone.toml", "--config gone.toml: No such file or directory; name a readable TOML file"),
        ("--config=", "--config is empty; name a TOML file, or leave the flag out"),
        ("--preset=", f"preset is empty; name one of {', '.join(PRESETS)}, or leave it out"),
        ("--dry-run", "flag --dry-run does not exist; see --help"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv: str, line: str):
    with pytest.raises(ConfigError) as caught:
        load_config(argv.split())
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("num_layer = 3", "{path}: key num_layer does not exist; did you mean num_layers?"),
        ("[models]\nnum_layers = 3", "{path}: section models does not exist; did you mean model?"),
        (
            "[train]\nnum_layers = 3",
            "{path}: num_layers is in section [train] but belongs in [model]; move it there",
        ),
        ("train = 3", "{path}: train is a section, not a setting; write [train] once and its settings below"),
        (
            "[[train]]\nlr = 1",
            "{path}: train is a section, not a setting; write [train] once and its settings below",
        ),
        ("lr = 1\n[train]\nlr = 1", "{path}: lr is given twice, flat and in a section; keep one"),
        ('num_layers = "4"', "num_layers='4': the value must be an integer"),
        ("num_layers = 4.5", "num_layers=4.5: the value must be an integer"),
        ("num_layers = true", "num_layers=True: the value must be an integer"),
        ("bf16 = 1", "bf16=1: the value must be true or false"),
        ('data_path = "a"', "data_path='a': the value must be a list of words"),
        ("preset = 3", "preset=3 in {path} must be text; try one of "),
        ('preset = ""', "preset is empty; name one of "),
        ("lr = ", "--config {path} is not valid TOML: "),
        (f"lr = {'9' * 400}", f"lr={'9' * 400}: the value must be a number"),
        (f"num_layers = {'9' * 5000}", "--config {path} is not valid TOML: Exceeds the limit (4300 digits)"),
    ],
)
def test_a_wrong_file_is_one_line(text: str, line: str, tmp_path: Path):
    argv = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(argv)
    assert str(caught.value).startswith(line.format(path=argv[1]))
    assert "\n" not in str(caught.value) and "sys." not in str(caught.value)


def test_an_entry_point_reads_dry_run_and_world_size():
    command = parse_command(["--dry-run", "--world-size", "8", "--lr", "1"])
    assert (command.dry_run, command.world_size, command.config.train.lr) == (True, 8, 1.0)
    plain = parse_command([])
    assert (plain.dry_run, plain.world_size, plain.config) == (False, None, RunConfig())
    with pytest.raises(ConfigError, match="--world-size 0: the value must be a positive integer"):
        parse_command(["--dry-run", "--world-size", "0"])
    with pytest.raises(ConfigError, match="the value must be a positive integer of at most 9 digits"):
        parse_command(["--dry-run", "--world-size", "9" * 5000])
    with pytest.raises(ConfigError, match="--world-size 8 needs --dry-run"):
        parse_command(["--world-size", "8"])


def test_the_printed_form_stars_what_differs_from_the_default():
    lines = format_config(preset_config("ring_lite")).splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(sections())
    assert any(line.split() == ["*", "num_layers", "28"] for line in lines)
    assert any(line.split() == ["make_vocab_size_divisible_by", "128"] for line in lines)


def test_config_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['megatron'] = None\n"
        "import megatron_ring.config.check as v\n"
        "from megatron_ring.config.load import load_config\n"
        "v.validate(load_config(['--preset', 'ring_lite']), 8)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
