"""Proxies that a unit test holds in place of the solution's objects. Read as text, run in the sandbox; never imported.

A comparison with an expected value never depends on the solution's process: a proxy never equals plain data, `in` compares
the items that the object yields, and an operator between a proxy and plain data gives another proxy that cannot be
converted to a number. So an object that equals everything passes no test that expects a value.
"""

import contextlib
import types
import weakref

import harness_wire as wire

_NUMBERS_WORDS = (
    "__abs__ __bool__ __int__ __float__ __complex__ __index__ __round__ __trunc__ __floor__ __ceil__"
)
NUMBERS = _NUMBERS_WORDS.split()
_OPERATORS_WORDS = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift divmod"
OPERATORS = _OPERATORS_WORDS.split()
ARITHMETIC = {f"__{before}{name}__" for name in OPERATORS for before in ("", "r", "i")}
_PLAIN_WORDS = (
    "__len__ __iter__ __next__ __neg__ __pos__ __invert__ __reversed__ __hash__ __str__ __repr__ "
    "__format__ __call__ __enter__ __exit__ __getitem__ __setitem__ __delitem__"
)
PLAIN = _PLAIN_WORDS.split()


class Gone(BaseException):
    """The solution's process has ended."""


class Unsupported(BaseException):
    """The test does something that is impossible across two processes."""


class Remote:
    """A proxy of an object of the solution. Special methods are added per class: those of the solution's class."""

    __slots__ = ("__weakref__", "_ring")

    def __getattr__(self, name):
        return self._ring.client.attribute(self, name)

    def __setattr__(self, name, value):
        self._ring.client.set_attribute(self, name, value)

    def __delattr__(self, name):
        self._ring.client.request({"ask": "del", "o": self._ring.number, "name": name})

    @property
    def __class__(self):
        if self._ring.data:
            return type(self._ring.client.data(self))
        kind = self._ring.client.value({"ask": "class", "o": self._ring.number})
        return kind if is_remote(kind) else type(self)

    @property
    def __dict__(self):
        return self._ring.client.attribute(self, "__dict__")

    @property
    def __doc__(self):
        return self._ring.client.attribute(self, "__doc__")

    def __eq__(self, other):
        mine = self._ring
        if not is_remote(other):
            return mine.data and mine.client.data(self) == other
        theirs = other._ring
        if mine.number == theirs.number:
            return True
        return (mine.eq or theirs.eq) and bool(compare("__eq__", "__eq__", self, other))

    def __ne__(self, other):
        return not self == other

    def __lt__(self, other):
        return order("__lt__", "__gt__", self, other)

    def __le__(self, other):
        return order("__le__", "__ge__", self, other)

    def __gt__(self, other):
        return order("__gt__", "__lt__", self, other)

    def __ge__(self, other):
        return order("__ge__", "__le__", self, other)

    def __instancecheck__(self, value):
        return self._ring.client.is_a(self, value, False)

    def __subclasscheck__(self, value):
        return self._ring.client.is_a(self, value, True)

    def __mro_entries__(self, bases):
        self._ring.client.refuse("a class derived from the solution's")

    def __copy__(self):
        return self._ring.client.value({"ask": "copy", "o": self._ring.number, "deep": False})

    def __deepcopy__(self, memo):
        return self._ring.client.value({"ask": "copy", "o": self._ring.number, "deep": True})


class Method:
    """A bound method of an object of the solution: called with one request, without a separate object there."""

    def __init__(self, owner, name):
        self.owner, self.__name__ = owner, name

    def __call__(self, *words, **named):
        return self.owner._ring.client.call(self.owner, self.__name__, words, named)


def is_remote(value):
    return issubclass(type(value), Remote)


def compare(name, mirrored, left, right):
    """Compare two objects of the solution as Python does; None if neither class implements the comparison."""
    for method, one, other in ((name, left, right), (mirrored, right, left)):
        said = one._ring.client.value(
            {"ask": "compare", "o": one._ring.number, "name": method, "other": other._ring.number}
        )
        if said is not NotImplemented:
            return said
    return None


def order(name, mirrored, left, right):
    if is_remote(right):
        said = compare(name, mirrored, left, right)
        if said is not None:
            return said
    elif left._ring.data:
        return getattr(left._ring.client.data(left), name)(right)
    raise TypeError("an object of the solution's has no order beside plain data")


def forwarded(name):
    def act(self, *words, **named):
        if name in ARITHMETIC:
            return arithmetic(self, name, words)
        if name == "__exit__":
            # only Guard may let it suppress an exception
            return self._ring.client.call(self, name, (*words[:2], None), {}, True) and None
        if name in NUMBERS and self._ring.mixed:
            raise TypeError("an object made of the solution's and plain data is no number")
        return self._ring.client.call(self, name, words, named, name != "__call__")

    return act


def arithmetic(left, name, others):
    result = left._ring.client.call(left, name, others, {}, True)
    mixed = left._ring.mixed or any(not is_remote(other) or other._ring.mixed for other in others)
    if not mixed or result is NotImplemented:
        return result
    if not is_remote(result):
        raise TypeError("an operator between an object of the solution's and plain data gave plain data")
    ring = types.SimpleNamespace(**vars(result._ring))
    ring.mixed = True
    return bare(type(result), ring)


class Guard:
    """A context manager of the solution in a with statement of the test.

    It may suppress an exception only if the statement's own lines raise it and contain no assertion: else it could suppress
    a failed assertion, or skip one.
    """

    def __init__(self, manager, asserts):
        self.manager, self.asserts = manager, asserts

    def __enter__(self):
        return type(self.manager).__enter__(self.manager)

    def __exit__(self, kind, error, trace):
        said = self.manager._ring.client.call(self.manager, "__exit__", (kind, error, None), {}, True)
        return said is True and not self.asserts and kind is not None and trace.tb_next is None


def contains(self, item):
    return any(item is found or item == found for found in self)


def bare(kind, ring):
    made = object.__new__(kind)
    object.__setattr__(made, "_ring", ring)
    return made


class Proxies:
    """Makes the proxies: one for each object of the solution, as long as the test holds it."""

    def __init__(self, client):
        self.client = client
        self.kinds = {}
        self.made = weakref.WeakValueDictionary()
        self.errors = {}

    def of(self, word):
        if "bases" in word:
            kind = self.error_class(word["bases"])
            kind._ring_number = word["o"]
            return kind
        if word.get("coroutine"):
            return self.coroutine(word["o"])
        made = self.made.get(word["o"])
        if made is None:
            ring = types.SimpleNamespace(
                client=self.client,
                number=word["o"],
                eq=bool(word["eq"]),
                data=bool(word["data"]),
                mixed=False,
            )
            made = self.made[word["o"]] = bare(self.kind(str(word["of"]), tuple(map(str, word["can"]))), ring)
        return made

    async def coroutine(self, number):
        return self.client.value({"ask": "await", "o": number})

    def kind(self, name, can):
        if (name, can) not in self.kinds:
            body = {word: forwarded(word) for word in can if word in ARITHMETIC or word in (*PLAIN, *NUMBERS)}
            if "__iter__" in can or "__getitem__" in can:
                body["__contains__"] = contains
            if "__hash__" not in can:
                body["__hash__"] = None
            self.kinds[name, can] = type(name, (Remote,), {"__slots__": (), **body})
        return self.kinds[name, can]

    def error_class(self, names):
        """A class for an exception of the solution, derived from the nearest base class that Python has."""
        module, name = map(str, names[0])
        if wire.exception_class([names[0]]) is not Exception or (module, name) == ("builtins", "Exception"):
            return wire.exception_class(names)
        if len(names) == 1:
            return Exception
        if (module, name) not in self.errors:
            body = {
                "__module__": module,
                "__getattr__": of_the_error("attribute"),
                "__str__": of_the_error("text"),
            }
            self.errors[module, name] = type(name, (self.error_class(names[1:]),), body)
        return self.errors[module, name]

    def error(self, reply):
        """The exception to raise here for the one that the solution raised."""
        kind = self.error_class(reply["raise"])
        words = self.client.decode(reply["words"])
        parts = [self.error(part) for part in reply.get("parts", ())]
        try:
            error = kind(words[0], parts) if issubclass(kind, BaseExceptionGroup) else kind(*words)
        except Exception:
            # its constructor takes other arguments, as that of JSONDecodeError does
            kind = Exception if issubclass(kind, BaseExceptionGroup) else kind
            error = kind.__new__(kind)
        if not parts:
            error.args = tuple(words)
        if "solution" in str(kind.__module__):
            error._ring_object = self.of(reply["object"])
        for name, fact in self.client.decode(reply.get("facts", {"d": []})).items():
            if name in wire.FACTS:
                with contextlib.suppress(AttributeError, TypeError, ValueError):
                    setattr(error, name, fact)
        for note in reply.get("notes", ()):
            error.add_note(str(note))
        if "cause" in reply:
            error.__cause__ = self.error(reply["cause"])
        return error


def of_the_error(what):
    """``__getattr__`` or ``__str__`` of an exception of the solution: asks the solution's own object."""

    def attribute(self, name):
        there = vars(self).get("_ring_object")
        if there is None or name.startswith("_"):
            raise AttributeError(name)
        return getattr(there, name)

    def text(self):
        there = vars(self).get("_ring_object")
        return Exception.__str__(self) if there is None else str(there)

    return attribute if what == "attribute" else text
