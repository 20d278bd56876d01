"""What differs from the defaults is printed, and nothing else."""

import re

from megatron_ring.config.dump import flat, format_changed
from megatron_ring.config.load import load_config, preset_config
from megatron_ring.config.presets import PRESETS
from megatron_ring.config.settings import settings


def test_exactly_the_settings_that_differ_are_printed_with_their_values():
    for preset in PRESETS:
        config = preset_config(preset)
        differ = {name for name, value in flat(config).items() if value != settings()[name].default}
        text = format_changed(config)
        assert set(re.findall(r"(\w+)=", text)) == differ
    assert " num_layers=28 hidden_size=2048 " in format_changed(preset_config("ring_lite"))


def test_values_are_spelled_as_in_toml_and_a_long_one_stays_whole():
    long = "corpus/" * 30
    text = format_changed(load_config(["--data-path", "a b", long, "--no-bf16", "--lr", "1e-3"]))
    assert text.splitlines() == ["  bf16=false lr=0.001", f'  data_path=["a b", "{long}"]']


def test_only_the_sections_asked_for_are_printed_and_no_line_is_wide():
    config = preset_config("ring_lite")
    assert "num_layers" not in format_changed(config, ("train", "data"))
    assert max(map(len, format_changed(config).splitlines())) <= 118


def test_a_config_of_defaults_says_so():
    assert format_changed(load_config([])) == "  nothing"
