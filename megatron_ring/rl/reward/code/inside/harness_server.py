"""The process of a unit test in which the solution runs. Read as text, run in the sandbox; never imported.

It is forked before the test is read, so its memory never holds the test or its result. It serves requests: look up a name,
read an attribute, call, apply an operator. The solution may break this process: it can only send values.
"""

import builtins
import io
import sys
import types

import harness_wire as wire

METHODS = (types.MethodType, types.BuiltinMethodType, type([].__len__))
_UNARY_WORDS = (
    "__len__ __bool__ __iter__ __next__ __abs__ __neg__ __pos__ __invert__ __int__ __float__ __complex__ "
    "__index__ __round__ __trunc__ __floor__ __ceil__ __reversed__ __hash__ __str__ __repr__ __format__"
)
UNARY = _UNARY_WORDS.split()
_BINARY_WORDS = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift divmod"
BINARY = _BINARY_WORDS.split()
ARITHMETIC = [f"__{before}{name}__" for name in BINARY for before in ("", "r", "i")]
_OTHER_WORDS = "__call__ __enter__ __exit__ __getitem__ __setitem__ __delitem__ __contains__"
OTHER = _OTHER_WORDS.split()
DATA = (list, dict, tuple, set, frozenset, str, bytes, bytearray, int, float)


class Server:
    """The solution's objects by number, and the loop that serves the test's requests."""

    def __init__(self, line, load):
        self.line = line
        self.objects = {}
        self.numbers = {}
        self.callbacks = {}
        self.said = io.BytesIO()
        sys.stdout = io.TextIOWrapper(self.said, "utf-8", "surrogateescape", newline="\n", write_through=True)
        builtins.input = self.ask_input
        self.names = load("solution")

    def keep(self, value):
        """The JSON that stands for an object: its number and the special methods of its class."""
        number = self.numbers.get(id(value))
        if number is None:
            if "_ring_callback" in vars(type(value)):
                return {"k": type(value)._ring_callback}
            number = self.numbers[id(value)] = len(self.objects)
            self.objects[number] = value
        kind = type(value)
        can = [name for name in (*UNARY, *ARITHMETIC, *OTHER) if getattr(kind, name, None) is not None]
        word = {"o": number, "of": kind.__name__, "can": can, "eq": kind.__eq__ is not object.__eq__}
        if isinstance(value, type):
            word["type"] = value.__name__
            if issubclass(value, BaseException):
                word["bases"] = [[base.__module__, base.__qualname__] for base in value.__mro__]
        elif isinstance(value, types.CoroutineType):
            word["coroutine"] = True
        word["data"] = isinstance(value, DATA)
        return word

    def found(self, word):
        if "o" in word:
            return self.objects[word["o"]]
        if "E" in word:
            return self.exception(*word["E"])
        number = word["k"]
        if number not in self.callbacks:
            self.callbacks[number] = self.callback(number, word.get("can", []))
        return self.callbacks[number]

    def callback(self, number, can):
        """A proxy of an object of the test. Calls and the listed special methods run in the test's process."""

        def there(name):
            def act(*words, **named):
                words = words if name == "__call__" else words[1:]
                return self.ask(
                    {"do": name, "k": number, "words": self.encode(words), "named": self.encode(named)}
                )

            return act

        body = {name: there(name) for name in can if name != "__getattr__"}
        if "__getattr__" in can:
            body["__getattr__"] = lambda _, name: self.ask({"do": "get", "k": number, "name": name})
            body["__setattr__"] = lambda _, name, value: self.ask(
                {"do": "set", "k": number, "name": name, "value": self.encode(value)}
            )
        if "__call__" in can:
            body["__call__"] = lambda _, *words, **named: there("__call__")(*words, **named)
        made = type("FromTheTest", (), {**body, "_ring_callback": number})()
        return made

    def exception(self, names, words):
        own = self.names.get(names[0][1]) if names[0][0] == "solution" else None
        return (own or wire.exception_class(names))(*words)

    def encode(self, value):
        return wire.encode(value, self.keep)

    def decode(self, word):
        return wire.decode(word, self.found)

    def printed(self):
        text = self.said.getvalue().decode("utf-8", "surrogateescape")
        self.said.seek(0)
        self.said.truncate()
        return text

    def ask(self, message):
        """Send a request to the test's process while serving one of its own."""
        self.line.send({**message, "out": self.printed()})
        while True:
            answer = self.line.receive()
            if "raise" in answer:
                raise self.exception(answer["raise"], answer["words"])
            if "value" in answer:
                return self.decode(answer["value"])
            self.answer(answer)

    def ask_input(self, prompt="", /):
        return self.ask({"do": "input", "words": str(prompt)})

    def serve(self):
        while True:
            self.answer(self.line.receive())

    def answer(self, request):
        try:
            reply = getattr(self, "do_" + request["ask"])(request)
        except BaseException as error:
            reply = self.told(error)
        self.line.send({**reply, "out": self.printed()})

    def told(self, error, depth=0):
        """The JSON of an exception, with its cause and the exceptions of a group."""
        plain = (str, int, float, bytes, type(None))
        words = [word if isinstance(word, plain) else repr(word) for word in error.args]
        said = {
            "raise": wire.classes_of(error),
            "words": self.encode(words),
            "object": self.keep(error),
            "notes": [str(note) for note in getattr(error, "__notes__", ())],
        }
        if type(error).__module__.partition(".")[0] in sys.stdlib_module_names:
            facts = {name: getattr(error, name) for name in wire.FACTS if hasattr(error, name)}
            said["facts"] = self.encode({key: fact for key, fact in facts.items() if isinstance(fact, plain)})
        if depth < wire.DEEPEST:
            if error.__cause__ is not None:
                said["cause"] = self.told(error.__cause__, depth + 1)
            if isinstance(error, BaseExceptionGroup):
                said["parts"] = [self.told(part, depth + 1) for part in error.exceptions]
        return said

    def do_name(self, request):
        if request["name"] not in self.names:
            return {"missing": True}
        return {"value": self.encode(self.names[request["name"]])}

    def do_get(self, request):
        target = self.objects[request["o"]]
        value = getattr(target, request["name"])
        if (
            not request.get("whole")
            and isinstance(value, METHODS)
            and getattr(value, "__self__", None) is target
        ):
            return {"method": request["name"]}
        return {"value": self.encode(value)}

    def do_set(self, request):
        setattr(self.objects[request["o"]], request["name"], self.decode(request["value"]))
        return {"value": None}

    def do_del(self, request):
        delattr(self.objects[request["o"]], request["name"])
        return {"value": None}

    def do_call(self, request):
        """Call an object, a method of it, or its class's operator; reply with the arguments that the call changed."""
        target = self.objects[request["o"]]
        words, named = self.decode(request["words"]), self.decode(request["named"])
        changing = [*words, *named.values()]
        changing = [(place, word) for place, word in enumerate(changing) if wire.holds_mutable(word)]
        before = [self.encode(word) for _, word in changing]
        name = request["name"]
        if name is None:
            result = target(*words, **named)
        elif request["operator"]:
            result = getattr(type(target), name)(target, *words)
        else:
            result = getattr(target, name)(*words, **named)
        after = [self.encode(word) for _, word in changing]
        reply = {
            "changed": [
                [place, now]
                for (place, _), was, now in zip(changing, before, after, strict=True)
                if was != now
            ]
        }
        for place, word in changing:
            if word is result:
                return {**reply, "same": place}
        return {**reply, "value": self.encode(result)}

    def do_compare(self, request):
        left, right = self.objects[request["o"]], self.objects[request["other"]]
        return {"value": self.encode(getattr(type(left), request["name"])(left, right))}

    def do_is(self, request):
        value, kind = self.decode(request["value"]), self.objects[request["o"]]
        return {"value": (issubclass if request["class"] else isinstance)(value, kind)}

    def do_class(self, request):
        return {"value": self.encode(type(self.objects[request["o"]]))}

    def do_data(self, request):
        """The plain data of an object whose class derives from list, dict or the like."""
        value = self.objects[request["o"]]
        base = next(kind for kind in DATA if isinstance(value, kind))
        return {"value": self.encode(base(value))}

    def do_copy(self, request):
        import copy

        return {
            "value": self.encode(
                (copy.deepcopy if request["deep"] else copy.copy)(self.objects[request["o"]])
            )
        }

    def do_await(self, request):
        import asyncio

        return {"value": self.encode(asyncio.run(self.objects[request["o"]]))}

    def do_evaluate(self, request):
        act = eval if request["name"] == "eval" else exec
        return {"value": self.encode(act(request["source"], self.names))}
