"""How the two processes of a unit test hand values to one another. Read as text, run in the sandbox; never imported.

One line of JSON per message. Plain data travels as a copy, made of classes of the receiver's own; everything else
stays where it is, and the other side holds a number for it. What arrives is data whoever wrote it: nothing in it
is looked up but by the names below, and no code is ever made of it.
"""

import builtins
import importlib
import json
import os
import sys

SMALL = 1 << 62
SEQUENCES = {tuple: "t", set: "s", frozenset: "f"}
ACTING = {
    "eval",
    "exec",
    "compile",
    "open",
    "breakpoint",
    "getattr",
    "setattr",
    "delattr",
    "globals",
    "locals",
    "vars",
}
"""Functions of Python that would act on what they are called with in the receiver's process."""
MUTABLE = (list, dict, set, bytearray)
STDLIB = {
    ("fractions", "Fraction"): lambda v: [v.numerator, v.denominator],
    ("decimal", "Decimal"): lambda v: [str(v)],
    ("datetime", "date"): lambda v: [v.year, v.month, v.day],
    ("datetime", "time"): lambda v: [v.hour, v.minute, v.second, v.microsecond],
    ("datetime", "datetime"): lambda v: [v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond],
    ("datetime", "timedelta"): lambda v: [v.days, v.seconds, v.microseconds],
    ("collections", "deque"): lambda v: [list(v), v.maxlen],
    ("collections", "Counter"): lambda v: [dict(v)],
    ("collections", "OrderedDict"): lambda v: [[list(item) for item in v.items()]],
    ("builtins", "range"): lambda v: [v.start, v.stop, v.step],
    ("builtins", "slice"): lambda v: [v.start, v.stop, v.step],
    ("builtins", "complex"): lambda v: [v.real, v.imag],
}
"""Classes of the standard library that are data, and what makes such a value anew."""

_FACTS_WORDS = "errno strerror filename filename2 name path msg doc pos lineno colno offset text value code"
FACTS = _FACTS_WORDS.split()
"""What Python's own exceptions know beside their words."""
DEEPEST = 9
"""Causes of causes, and groups in groups, that travel."""


def encode(value, keep):
    """JSON for ``value``; ``keep(value)`` gives the object that stands for what is no plain data."""
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        return value if -SMALL < value < SMALL else {"i": hex(value)}
    if kind is list:
        return [encode(item, keep) for item in value]
    if kind in SEQUENCES:
        return {SEQUENCES[kind]: [encode(item, keep) for item in value]}
    if kind is dict or (kind.__module__, kind.__qualname__) == ("collections", "defaultdict"):
        return {"d": [[encode(key, keep), encode(item, keep)] for key, item in value.items()]}
    if kind in (bytes, bytearray):
        return {"y" if kind is bytes else "Y": value.hex()}
    if value is Ellipsis or value is NotImplemented:
        return {"b": "Ellipsis" if value is Ellipsis else "NotImplemented"}
    parts = STDLIB.get((kind.__module__, kind.__qualname__))
    known = parts is not None and kind is named(kind.__module__, kind.__qualname__)
    if known and getattr(value, "tzinfo", None) is None:
        return {"S": [kind.__module__, kind.__qualname__, encode(parts(value), keep)]}
    if (
        kind in (type, type(len))
        and getattr(builtins, value.__name__, None) is value
        and value.__name__ not in ACTING
    ):
        return {"b": value.__name__}
    if kind is type(sys) and value.__name__ in sys.stdlib_module_names:
        return {"m": value.__name__}
    return keep(value)


def decode(word, found):
    """The value of ``word``; ``found(word)`` gives what stands for the other side's object."""
    if isinstance(word, list):
        return [decode(item, found) for item in word]
    if not isinstance(word, dict):
        return word
    for kind, tag in SEQUENCES.items():
        if tag in word:
            return kind([decode(item, found) for item in word[tag]])
    if "i" in word:
        return int(word["i"], 16)
    if "d" in word:
        return {decode(key, found): decode(item, found) for key, item in word["d"]}
    if "y" in word:
        return bytes.fromhex(word["y"])
    if "Y" in word:
        return bytearray.fromhex(word["Y"])
    if "b" in word:
        if word["b"].startswith("_") or word["b"] in ACTING:
            raise ValueError(f"{word['b']} does not travel")
        return getattr(builtins, word["b"])
    if "m" in word and word["m"] in sys.stdlib_module_names:
        return importlib.import_module(word["m"])
    if "S" in word:
        module, name, parts = word["S"]
        if (module, name) not in STDLIB:
            raise ValueError(f"no data of {module}.{name}")
        return named(module, name)(*decode(parts, found))
    return found(word)


def named(module, name):
    """An attribute of a module of the standard library."""
    return getattr(importlib.import_module(module), name, None)


def holds_mutable(value, depth=0):
    """Whether a callee could change ``value``, as far as it is plain data."""
    if type(value) in MUTABLE or type(value).__name__ in ("deque", "Counter", "OrderedDict", "defaultdict"):
        return True
    return type(value) is tuple and depth < 9 and any(holds_mutable(item, depth + 1) for item in value)


def become(old, new):
    """Change ``old`` in place to equal ``new``, containers inside it as well, where their kinds agree."""
    if type(old) is not type(new):
        return
    if type(old) in (list, tuple) and len(old) == len(new):
        for place, (was, now) in enumerate(zip(old, new, strict=True)):
            if holds_mutable(was) and type(was) is type(now):
                become(was, now)
            elif type(old) is list:
                old[place] = now
    elif type(old) in (list, bytearray):
        old[:] = new
    elif isinstance(old, dict):
        kept = {
            key: old[key]
            for key, now in new.items()
            if key in old and holds_mutable(now) and type(old[key]) is type(now)
        }
        for key, was in kept.items():
            become(was, new[key])
        old.clear()
        dict.update(old, {**new, **kept})
    elif hasattr(old, "clear"):
        old.clear()
        getattr(old, "extend", getattr(old, "update", None))(new)


def classes_of(error):
    """Names of an exception's classes, most derived first, for the other side to find the nearest it has."""
    return [[kind.__module__, kind.__qualname__] for kind in type(error).__mro__]


def exception_class(names):
    """The nearest of a standard library's exceptions. Those of unittest mean something to its runner: not these."""
    for module, name in names:
        top = module.partition(".")[0]
        if top in sys.stdlib_module_names and top not in ("unittest", "bdb"):
            kind = named(module, name) if module == "builtins" or module in sys.modules else None
            if isinstance(kind, type) and issubclass(kind, BaseException):
                return kind
    return Exception


class Line:
    """A pipe in each direction, a line of JSON at a time."""

    def __init__(self, read_fd, write_fd):
        self.read_file = os.fdopen(read_fd, "rb")
        self.write_file = os.fdopen(write_fd, "wb")

    def send(self, message):
        self.write_file.write(json.dumps(message).encode() + b"\n")
        self.write_file.flush()

    def receive(self):
        """The next message; EOFError when the other side has ended or says what is none."""
        line = self.read_file.readline()
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise EOFError("the other process has ended") from None
        if not isinstance(message, dict):
            raise EOFError("the other process speaks no sense")
        return message
