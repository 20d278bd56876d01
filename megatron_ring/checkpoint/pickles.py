"""A restricted unpickler for files from outside: it reads a pickle as plain values and never imports or calls anything.

Python's unpickler imports the names in a pickle, calls them, sets attributes, and reserves memory for a memo of the length
that the pickle claims. Here a name becomes a :class:`Name`, a call or an object a record of the request (:class:`Built`),
and a dict a list of pairs (:class:`Pairs`), so that not even a key is hashed. Each opcode makes at most one value, so
memory is bounded by the length of the pickle. The caller picks out the values that it expects, by ``isinstance``.
"""

from __future__ import annotations

import contextlib
import gc
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

MAX_OPCODES = 50_000_000
"""Several times what the largest checkpoints need; this many take about ten seconds and a few gigabytes."""
_MAX_LONG_BYTES = 64
_MAX_NAME_BYTES = 1000


class PickleError(ValueError):
    """A pickle is damaged, contains a name that is not allowed, or needs an operation that plain data does not."""


class Name:
    """A global name in a pickle. Example: ``Name("torch", "float32")``. One object per name and pickle."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Built:
    """A call or a new object that a pickle requests: of which name, with which arguments and which state."""

    __slots__ = ("args", "of", "state")

    def __init__(self, of: Name, args: tuple[Any, ...]):
        self.of, self.args, self.state = of, args, None


class Pairs:
    """A dict in a pickle: its pairs in order; keys are not compared."""

    __slots__ = ("pairs",)

    def __init__(self) -> None:
        self.pairs: list[tuple[Any, Any]] = []


class Stored:
    """A reference to data outside of the pickle (torch: a tensor's bytes); ``key`` is the pickle's name for it."""

    __slots__ = ("key",)

    def __init__(self, key: Any):
        self.key = key


def read_pickle(
    data: bytes,
    allowed: Mapping[str, str],
    *,
    enums: Collection[str] = (),
    stored: bool = False,
    max_opcodes: int = MAX_OPCODES,
) -> Any:
    """The value of the pickle ``data``. ``allowed``: module -> the names of it that may occur, separated by spaces.

    ``enums`` are those of them (``module.name``) whose members may be written as ``getattr(enum, "MEMBER")``, as Python
    3.11.0 to 3.11.3 does; such a member is read as ``Built(enum, ("MEMBER",))``, and no other ``getattr`` is let through.
    With ``stored`` the pickle may refer to data outside of it (:class:`Stored`).

    Raises:
        PickleError: what is wrong, in one line.
    """
    try:
        return _Machine(data, allowed, enums, stored).run(max_opcodes)
    except (IndexError, KeyError, struct.error):
        raise PickleError("it is damaged") from None
    except UnicodeDecodeError:
        raise PickleError("it holds a string that is not UTF-8") from None


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Switch the garbage collector off in this block: reading makes millions of values and no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Machine:
    """Reads one pickle: opcodes of protocols 2 to 5, without extension codes and shared buffers."""

    def __init__(self, data: bytes, allowed: Mapping[str, str], enums: Collection[str], stored: bool):
        self._data, self._at = data, 0
        self._allowed = {module: frozenset(names.split()) for module, names in allowed.items()}
        self._enums = frozenset(enums)
        if enums:
            self._allowed["builtins"] = self._allowed.get("builtins", frozenset()) | {"getattr"}
        self._stored = stored
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._names: dict[tuple[str, str], Name] = {}

    def run(self, max_opcodes: int) -> Any:
        data, actions = self._data, _ACTIONS
        for _ in range(max_opcodes):
            code = data[self._at]
            self._at += 1
            action = actions[code]
            if action is None:
                if code == _STOP:
                    return self._stop()
                raise PickleError(f"it uses opcode {bytes([code])!r}, which no data needs")
            action(self)
        raise PickleError(f"it has more than {max_opcodes:,} opcodes")

    def _stop(self) -> Any:
        if self._below or len(self._stack) != 1 or self._at != len(self._data):
            raise PickleError("it is damaged")
        return self._stack[0]

    def _take(self, count: int) -> bytes:
        start, end = self._at, self._at + count
        if count < 0 or end > len(self._data):
            raise PickleError("it ends early")
        self._at = end
        return self._data[start:end]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _long(self, num_bytes: int) -> int:
        if num_bytes > _MAX_LONG_BYTES:
            raise PickleError(f"it holds an integer of {num_bytes:,} bytes")
        return int.from_bytes(self._take(num_bytes), "little", signed=True)

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + _MAX_NAME_BYTES)
        line = self._take(end - self._at if end >= 0 else -1)
        self._at += 1
        return line.decode("utf-8")

    def _to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _pop(self) -> None:
        del self._stack[-1]

    def _pop_mark(self) -> None:
        self._to_mark()

    def _tuple(self) -> None:
        items = tuple(self._to_mark())
        self._stack.append(items)

    def _tuple_of(self, count: int) -> None:
        stack = self._stack
        if len(stack) < count:
            raise PickleError("it is damaged")
        stack[-count:] = [tuple(stack[-count:])]

    def _frozen(self) -> None:
        items = self._to_mark()
        self._stack.append(items)

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise PickleError("it appends to what is no list")
        target += items

    def _appends(self) -> None:
        self._extend(self._to_mark())

    def _append(self) -> None:
        item = self._stack.pop()
        self._extend([item])

    def _put(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not Pairs or len(items) % 2:
            raise PickleError("it sets items of what is no dict")
        target.pairs += zip(items[::2], items[1::2], strict=True)

    def _setitems(self) -> None:
        self._put(self._to_mark())

    def _setitem(self) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        self._put([key, value])

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _keep(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("it names something that is no name")
        # the whole name must match: "torch" also has an "os.system"
        if name not in self._allowed.get(module, ()):
            raise PickleError(f"it names {module[:100]}.{name[:100]}")
        self._stack.append(self._names.setdefault((module, name), Name(module, name)))

    def _global(self) -> None:
        module = self._line()
        self._name(module, self._line())

    def _stack_global(self) -> None:
        name = self._stack.pop()
        self._name(self._stack.pop(), name)

    def _call(self) -> None:
        args = self._stack.pop()
        of = self._stack.pop()
        if type(of) is not Name or type(args) is not tuple:
            raise PickleError("it calls what is no name")
        if (of.module, of.name) == ("collections", "OrderedDict") and not args:
            self._stack.append(Pairs())
        elif (of.module, of.name) == ("builtins", "getattr"):
            self._stack.append(self._member(*args) if len(args) == 2 else self._member(None, None))
        else:
            self._stack.append(Built(of, args))

    def _member(self, enum: Any, name: Any) -> Built:
        if type(enum) is not Name or str(enum) not in self._enums or not isinstance(name, str):
            raise PickleError("it names builtins.getattr")
        return Built(enum, (name,))

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if type(target) is not Built or target.state is not None:
            raise PickleError("it changes what it did not build")
        target.state = state

    def _persistent(self) -> None:
        if not self._stored:
            raise PickleError("it refers to something outside itself")
        self._stack[-1] = Stored(self._stack[-1])

    def _frame(self) -> None:
        if self._number("<Q") > len(self._data) - self._at:
            raise PickleError("it ends early")

    def _protocol(self) -> None:
        if not 2 <= self._take(1)[0] <= 5:
            raise PickleError("it has an unknown protocol")


def _pushes(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def action(machine: _Machine) -> None:
        # compute the value first: reading it may replace the stack
        item = value(machine)
        machine._stack.append(item)

    return action


def _text(form: str) -> Callable[[_Machine], None]:
    return _pushes(lambda m: m._take(m._number(form)).decode("utf-8"))


def _binary(form: str) -> Callable[[_Machine], None]:
    return _pushes(lambda m: m._take(m._number(form)))


_STOP = ord(".")
_BY_CODE: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine._protocol,
    b"\x95": _Machine._frame,
    b"(": _Machine._mark,
    b"0": _Machine._pop,
    b"1": _Machine._pop_mark,
    b"N": _pushes(lambda m: None),
    b"\x88": _pushes(lambda m: True),
    b"\x89": _pushes(lambda m: False),
    b"K": _pushes(lambda m: m._take(1)[0]),
    b"M": _pushes(lambda m: m._number("<H")),
    b"J": _pushes(lambda m: m._number("<i")),
    b"\x8a": _pushes(lambda m: m._long(m._take(1)[0])),
    b"\x8b": _pushes(lambda m: m._long(m._number("<i"))),
    b"G": _pushes(lambda m: m._number(">d")),
    b"\x8c": _text("<B"),
    b"X": _text("<I"),
    b"\x8d": _text("<Q"),
    b"C": _binary("<B"),
    b"B": _binary("<I"),
    b"\x8e": _binary("<Q"),
    b"]": _pushes(lambda m: []),
    b"}": _pushes(lambda m: Pairs()),
    b")": _pushes(lambda m: ()),
    b"\x8f": _pushes(lambda m: []),
    b"a": _Machine._append,
    b"e": _Machine._appends,
    b"\x90": _Machine._appends,
    b"s": _Machine._setitem,
    b"u": _Machine._setitems,
    b"\x91": _Machine._frozen,
    b"t": _Machine._tuple,
    b"\x85": lambda m: m._tuple_of(1),
    b"\x86": lambda m: m._tuple_of(2),
    b"\x87": lambda m: m._tuple_of(3),
    b"h": lambda m: m._get(m._take(1)[0]),
    b"j": lambda m: m._get(m._number("<I")),
    b"q": lambda m: m._keep(m._take(1)[0]),
    b"r": lambda m: m._keep(m._number("<I")),
    b"\x94": _Machine._memoize,
    b"c": _Machine._global,
    b"\x93": _Machine._stack_global,
    b"R": _Machine._call,
    b"\x81": _Machine._call,
    b"b": _Machine._build,
    b"Q": _Machine._persistent,
}
_ACTIONS = [_BY_CODE.get(bytes([code])) for code in range(256)]
