"""Every setting by its flat name: where it lives, what it may hold, and what its docstring says.

The dataclasses are the only place where a setting is stated; flags, TOML keys, help, the printed form and the checks
of single values are read from them here.
"""

import ast
import inspect
import math
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from megatron_ring.config.ranges import OneOf, Range
from megatron_ring.config.run import RunConfig
from megatron_ring.errors import ConfigError

LARGEST_INTEGER = 2**63 - 1
"""Larger ones fit in no float and in no tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One field of one section.

    Example: ``Setting(section="model", name="num_layers", kind=int, optional=False, choices=(), default=4,
    doc="Transformer layers ...")``.
    """

    section: str
    name: str
    kind: type
    """int, float, bool, str or tuple."""
    optional: bool
    """True when None ("none" in a file or flag) is a value."""
    choices: tuple[str, ...]
    """The only values allowed beside importable ones; empty when any is."""
    default: Any
    doc: str
    item: type = str
    """What a tuple holds."""
    length: int | None = None
    """How many items a tuple holds; None for any number."""
    ranges: tuple[Range, ...] = ()
    """What a number, or each item of a tuple, may be."""
    importable: bool = False
    """True when a user's ``module:name`` is allowed."""

    @property
    def flag(self) -> str:
        return flag(self.name)

    @property
    def help(self) -> str:
        """Docstring, range and default, as ``--help`` shows them."""
        facts = [*(each.words for each in self.ranges), f"default: {_shown(self.default)}"]
        return f"{self.doc} ({'; '.join(facts)})"


def flag(name: str) -> str:
    """Example: ``flag("num_layers")`` is ``"--num-layers"``."""
    return "--" + name.replace("_", "-")


@cache
def sections() -> dict[str, type]:
    """Section name -> its dataclass, in the order of :class:`RunConfig`."""
    hints = get_type_hints(RunConfig)
    return {f.name: hints[f.name] for f in fields(RunConfig)}


@cache
def settings() -> dict[str, Setting]:
    """Flat name -> setting, for every field of every section."""
    found: dict[str, Setting] = {}
    for section, cls in sections().items():
        hints, docs = get_type_hints(cls, include_extras=True), _field_docs(cls)
        for f in fields(cls):
            assert f.name not in found, f"two sections have a field {f.name}"
            assert f.default is not MISSING, f"{cls.__name__}.{f.name} needs a default"
            found[f.name] = _setting(section, f.name, hints[f.name], f.default, docs[f.name])
    return found


def is_importable(value: object) -> bool:
    """Has the value the form ``module:name``? Example: ``is_importable("my_losses.ppo:mine")``."""
    if not isinstance(value, str):
        return False
    module, _, name = value.partition(":")
    return name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def unknown(name: str, options: Sequence[str], what: str) -> ConfigError:
    """The error for a name that does not exist, with the closest one that does."""
    close = get_close_matches(name, options, n=1, cutoff=0.65)
    return ConfigError(
        f"{what} {name} does not exist; " + (f"did you mean {close[0]}?" if close else "see --help")
    )


def parse_flag(setting: Setting, words: Sequence[str]) -> Any:
    """Value of a flag from the words after it; ConfigError names flag, word and what is allowed."""
    if setting.optional and len(words) == 1 and words[0].lower() == "none":
        return None
    try:
        if setting.kind is tuple:
            return _checked(setting, tuple(setting.item(word) for word in words))
        return _checked(setting, setting.kind(words[0]))
    except ValueError:
        raise ConfigError(f"{setting.flag} {' '.join(words)}: the value must be {_wanted(setting)}") from None


def from_toml(setting: Setting, value: Any) -> Any:
    """Value of a TOML entry, with its type checked; ConfigError names key, value and what is allowed."""
    if setting.optional and isinstance(value, str) and value.lower() == "none":
        return None
    wrong = ConfigError(f"{setting.name}={value!r}: the value must be {_wanted(setting)}")
    if setting.kind is tuple:
        if not isinstance(value, list) or not all(_is_a(setting.item, item) for item in _items(value)):
            raise wrong
        value = _items(value)
    elif not _is_a(setting.kind, value):
        raise wrong
    try:
        return _checked(setting, float(value) if setting.kind is float else value)
    except (ValueError, OverflowError):
        raise wrong from None


def value_problems(section: object) -> Iterator[str]:
    """What is wrong with the single values of one section, such as a ``ModelConfig``: type, choice or range."""
    for f in fields(cast("Any", section)):
        problem = _value_problem(settings()[f.name], getattr(section, f.name))
        if problem is not None:
            yield problem


def _value_problem(setting: Setting, value: Any) -> str | None:
    remedy = f"set {setting.flag}"
    if setting.optional and value == "":
        # an unset shell variable must not turn saving off without notice
        return f"{setting.name}='' is empty; write none, or a value for {setting.flag}"
    if value is None:
        fits = setting.optional
    elif setting.kind is tuple:
        fits = isinstance(value, tuple) and all(_is_a(setting.item, item) for item in _items(value))
    else:
        fits = _is_a(setting.kind, value)
    if fits and value is not None:
        try:
            _checked(setting, value)
        except ValueError:
            fits = False
    if not fits:
        return f"{setting.name}={value!r} must be {_wanted(setting)}; {remedy}"
    if setting.kind is tuple and "" in _items(value):
        # a path would be the current folder
        return f"{setting.name}={list(_items(value))} has an empty word; name what was meant, or leave it out"
    if any(isinstance(item, str) and "\0" in item for item in _items(value)):
        return f"{setting.name}={value!r} holds a null character, which no file's name may; {remedy}"
    for item in () if value is None else _items(value):
        shown = f"{setting.name}={item}" if item is value else f"{setting.name}={_shown(value)}: {item}"
        if isinstance(item, float) and not math.isfinite(item):
            return f"{shown} must be finite; {remedy}"
        for allowed in setting.ranges:
            if not allowed.holds(item):
                return f"{shown} must be {allowed.words}; {allowed.remedy or remedy}"
        if isinstance(item, int) and abs(item) > LARGEST_INTEGER:
            return f"{shown} must be an integer of 64 bits; {remedy}"
    return None


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(str(item) for item in cast("tuple[Any, ...]", value)) or "empty"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def _is_a(kind: type, value: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _items(value: Any) -> tuple[Any, ...]:
    """The items of a list or tuple; a single value is its own only item."""
    return tuple(cast("list[Any]", value)) if isinstance(value, (list, tuple)) else (value,)


def _checked(setting: Setting, value: Any) -> Any:
    """``value`` if its length and choices fit, else ValueError."""
    items = _items(value)
    if setting.choices and any(item not in setting.choices for item in items):
        own = setting.importable and all(item in setting.choices or is_importable(item) for item in items)
        if not own:
            raise ValueError
    if setting.length is not None and len(items) != setting.length:
        raise ValueError
    return value


def _wanted(setting: Setting) -> str:
    nouns = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    if setting.kind is tuple:
        one = {int: "integers", float: "numbers", str: "words"}[setting.item]
        text = f"{setting.length} {one}" if setting.length else f"a list of {one}"
        text = f"a list from {', '.join(setting.choices)}" if setting.choices else text
    elif len(setting.choices) == 1:
        text = setting.choices[0]
    else:
        text = f"one of {', '.join(setting.choices)}" if setting.choices else nouns[setting.kind]
    if setting.importable:
        text += ", or module:name of your own"
    return f"{text} or none" if setting.optional else text


def _setting(section: str, name: str, hint: Any, default: Any, doc: str) -> Setting:
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
        optional = True
    hint, marks = _marks(hint)
    item, length, kind, choices = str, None, hint, ()
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        length = None if inner[-1] is Ellipsis else len(inner)
        item, marks = _marks(inner[0])
        item, choices = _choices(item)
        kind = tuple
    else:
        kind, choices = _choices(hint)
    for mark in marks:
        if isinstance(mark, OneOf):
            choices = mark.names
    return Setting(
        section=section,
        name=name,
        kind=kind,
        optional=optional,
        choices=choices,
        default=default,
        doc=doc,
        item=item,
        length=length,
        ranges=tuple(mark for mark in marks if isinstance(mark, Range)),
        importable=any(isinstance(mark, OneOf) and mark.importable for mark in marks),
    )


def _marks(hint: Any) -> tuple[Any, tuple[Range | OneOf, ...]]:
    """The bare type of a field and what is annotated on it."""
    if get_origin(hint) is not Annotated:
        return hint, ()
    bare, *marks = get_args(hint)
    return bare, tuple(marks)


def _choices(hint: Any) -> tuple[type, tuple[str, ...]]:
    return (str, get_args(hint)) if get_origin(hint) is Literal else (hint, ())


def _field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal under it in the class body."""
    (body,) = (n for n in ast.parse(inspect.getsource(cls)).body if isinstance(n, ast.ClassDef))
    docs: dict[str, str] = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[node.target.id] = " ".join(str(after.value.value).split())
    return docs
