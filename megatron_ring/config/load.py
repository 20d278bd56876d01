"""A run's config from a preset, a TOML file and flags, each overriding the one before.

The flags are argparse's, generated from the dataclasses: what a flag leaves out must stay distinguishable
from its default, so that a TOML file can fill it, and every mistake is one line.
"""

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from megatron_ring.config.presets import PRESETS
from megatron_ring.config.run import RunConfig
from megatron_ring.config.settings import from_toml, parse_flag, sections, settings, unknown
from megatron_ring.errors import ConfigError
from megatron_ring.plain import read_plain

_MAX_BYTES = 10_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """What a command line asks for. Example: ``Command(config=RunConfig(), dry_run=True, world_size=8)``."""

    config: RunConfig
    dry_run: bool
    """Print the plan and stop."""
    world_size: int | None
    """Processes to plan for; None when the launcher's count is meant."""


def load_config(argv: Sequence[str]) -> RunConfig:
    """The config that flags ``argv`` describe: preset < TOML (``--config FILE``) < flags.

    Raises ConfigError (unknown flag or key, wrong type, unreadable file) in one line; rules between settings
    are :func:`megatron_ring.config.check.validate`'s.
    """
    return _config(_parser(run_options=False), argv)[0]


def parse_command(argv: Sequence[str]) -> Command:
    """:func:`load_config` plus the options of an entry point: ``--dry-run`` and ``--world-size N``."""
    config, options = _config(_parser(run_options=True), argv)
    size = options["world_size"]
    if size is not None and (not size.isdecimal() or len(size) > 9 or int(size) < 1):
        raise ConfigError(f"--world-size {size}: the value must be a positive integer of at most 9 digits")
    if size is not None and not options["dry_run"]:
        raise ConfigError(f"--world-size {size} needs --dry-run; a real run takes the launcher's count")
    return Command(config=config, dry_run=options["dry_run"], world_size=None if size is None else int(size))


def config_from_mapping(values: Mapping[str, Any]) -> RunConfig:
    """RunConfig from flat names, defaults for the rest. Example: ``{"num_layers": 2, "lr": 1e-3}``."""
    grouped: dict[str, dict[str, Any]] = {section: {} for section in sections()}
    for name, value in values.items():
        grouped[settings()[name].section][name] = value
    return RunConfig(**{section: cls(**grouped[section]) for section, cls in sections().items()})


def preset_config(name: str) -> RunConfig:
    """The config of one preset; ConfigError for an unknown name."""
    return config_from_mapping(_preset(name))


def read_toml(path: str | Path) -> tuple[str | None, dict[str, Any]]:
    """(preset it names or None, flat values) of a TOML file, with sections or flat."""
    try:
        tables = tomllib.loads(read_plain(Path(path), _MAX_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; name a readable TOML file") from None
    except RecursionError:
        raise ConfigError(f"--config {path} is nested too deeply; write tables of settings only") from None
    except ValueError as error:
        # for a number of over 4300 digits Python adds a remedy for programmers
        why = str(error).partition("; use sys.")[0]
        raise ConfigError(f"--config {path} is not valid TOML: {why}; correct that line") from None
    preset = tables.pop("preset", None)
    if preset is not None and not isinstance(preset, str):
        raise ConfigError(f"preset={preset!r} in {path} must be text; try one of {', '.join(PRESETS)}")
    values: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            _read_section(path, key, cast("dict[str, Any]", value), values)
        else:
            _read_value(path, key, value, values)
    return preset, values


def _read_section(path: str | Path, section: str, table: Mapping[str, Any], values: dict[str, Any]) -> None:
    if section not in sections():
        raise unknown(section, list(sections()), f"{path}: section")
    for key, value in table.items():
        if key in settings() and settings()[key].section != section:
            home = settings()[key].section
            raise ConfigError(
                f"{path}: {key} is in section [{section}] but belongs in [{home}]; move it there"
            )
        _read_value(path, key, value, values)


def _read_value(path: str | Path, key: str, value: Any, values: dict[str, Any]) -> None:
    if key not in settings():
        if key in sections():
            raise ConfigError(
                f"{path}: {key} is a section, not a setting; write [{key}] once and its settings below"
            )
        raise unknown(key, list(settings()), f"{path}: key")
    if key in values:
        raise ConfigError(f"{path}: {key} is given twice, flat and in a section; keep one")
    values[key] = from_toml(settings()[key], value)


def _preset(name: str) -> dict[str, Any]:
    if name == "":
        raise ConfigError(f"preset is empty; name one of {', '.join(PRESETS)}, or leave it out")
    if name not in PRESETS:
        raise ConfigError(f"preset {name} does not exist; try one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[RunConfig, dict[str, Any]]:
    known, rest = parser.parse_known_args(list(argv))
    if rest:
        flag = rest[0].split("=")[0]
        if not flag.startswith("-"):
            raise ConfigError(
                f"argument {flag} is not a flag or its value; every setting is a flag, see --help"
            )
        raise unknown(flag, [setting.flag for setting in settings().values()], "flag")
    given = vars(known)
    flags = {name: given.pop(name) for name in list(given) if name in settings()}
    for name, words in flags.items():
        if not isinstance(words, bool):
            flags[name] = parse_flag(settings()[name], words)
    if given["config"] == "":
        # an unset shell variable must not start a run of the defaults
        raise ConfigError("--config is empty; name a TOML file, or leave the flag out")
    preset, from_file = read_toml(given["config"]) if given["config"] is not None else (None, {})
    preset = preset if given["preset"] is None else given["preset"]
    from_preset = {} if preset is None else _preset(preset)
    return config_from_mapping({**from_preset, **from_file, **flags}), given


def named_path(word: str) -> Path:
    """Type of an argument that names a file or folder; an empty word would be the current folder."""
    if not word:
        raise argparse.ArgumentTypeError("the name is empty; name a file or folder")
    return Path(word)


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are a ConfigError of one line, not a usage page; our tools use it as well."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def _parser(*, run_options: bool) -> argparse.ArgumentParser:
    parser = OneLineParser(
        allow_abbrev=False, usage="%(prog)s [--preset NAME] [--config FILE] [--FLAG VALUE ...]"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file; keys are the flags' names with underscores"
    )
    parser.add_argument("--preset", metavar="NAME", help=f"start from one of: {', '.join(PRESETS)}")
    if run_options:
        parser.add_argument(
            "--dry-run", action="store_true", help="print config, layout and sizes, then stop"
        )
        parser.add_argument("--world-size", metavar="N", help="processes to plan a dry run for")
    groups = {section: parser.add_argument_group(section) for section in sections()}
    for setting in settings().values():
        help_text = setting.help.replace("%", "%%")
        options: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS, "help": help_text}
        group = groups[setting.section]
        if setting.name.startswith("no_"):
            # argparse reads any --no-X as switching X off, so these two flags are spelled out
            group.add_argument(setting.flag, action="store_true", **options)
            group.add_argument(setting.flag.replace("--no-", "--"), action="store_false", **options)
            continue
        if setting.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            many = setting.kind is tuple
            words = [*setting.choices, *(["MODULE:NAME"] if setting.importable else [])]
            metavar = "|".join(words) or setting.name.split("_")[-1].upper()
            options |= {"nargs": "+" if many else 1, "metavar": metavar}
        group.add_argument(setting.flag, **options)
    return parser
