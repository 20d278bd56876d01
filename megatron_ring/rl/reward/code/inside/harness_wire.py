"""The wire format between the two processes of a unit test. Read as text, run in the sandbox; never imported.

One line of JSON per message. Plain data is copied: the receiver builds it from its own classes. Everything else stays in
its process, and the other side gets a number that stands for it. The receiver does not trust a message: it looks up only
the names below, and never evaluates anything.
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
"""Builtin functions that are not sent: they would act in the receiver's process."""
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
"""Classes of the standard library that are data, and the arguments that rebuild a value."""

_FACTS_WORDS = "errno strerror filename filename2 name path msg doc pos lineno colno offset text value code"
FACTS = _FACTS_WORDS.split()
"""Attributes of Python's own exceptions beside their arguments."""
DEEPEST = 9
"""Depth to which the causes of an exception, and the exceptions of a group, are sent."""


def encode(value, keep):
    """JSON for ``value``; ``keep(value)`` gives the JSON that stands for an object that is not plain data."""
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
    """The value of the JSON ``word``; ``found(word)`` gives the proxy of an object of the other process."""
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
            raise ValueError(f"{word['b']} cannot be sent")
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
    """Is ``value`` plain data that a callee could change?"""
    if type(value) in MUTABLE or type(value).__name__ in ("deque", "Counter", "OrderedDict", "defaultdict"):
        return True
    return type(value) is tuple and depth < 9 and any(holds_mutable(item, depth + 1) for item in value)


def become(old, new):
    """Change ``old`` in place so that it equals ``new``, and containers in it as well, where their classes agree."""
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
    """Names of an exception's classes, most derived first; the other side takes the first that it has."""
    return [[kind.__module__, kind.__qualname__] for kind in type(error).__mro__]


def exception_class(names):
    """The first of ``names`` that is an exception of the standard library; not unittest's, which its runner interprets."""
    for module, name in names:
        top = module.partition(".")[0]
        if top in sys.stdlib_module_names and top not in ("unittest", "bdb"):
            kind = named(module, name) if module == "builtins" or module in sys.modules else None
            if isinstance(kind, type) and issubclass(kind, BaseException):
                return kind
    return Exception


class Line:
    """A pipe in each direction; one line of JSON per message."""

    def __init__(self, read_fd, write_fd):
        self.read_file = os.fdopen(read_fd, "rb")
        self.write_file = os.fdopen(write_fd, "wb")

    def send(self, message):
        self.write_file.write(json.dumps(message).encode() + b"\n")
        self.write_file.flush()

    def receive(self):
        """The next message. EOFError if the other side has ended or its message is invalid."""
        line = self.read_file.readline()
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise EOFError("the other process has ended") from None
        if not isinstance(message, dict):
            raise EOFError("the other process has sent an invalid message")
        return message
