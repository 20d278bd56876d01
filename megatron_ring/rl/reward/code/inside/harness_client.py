"""The test's side of the connection to the solution's process. Read as text, run in the sandbox; never imported.

The test sends requests. While one is served, the solution may use objects that the test has passed to it: it may call
them and, of instances of the test's own classes, read and set public attributes. It cannot reach the result from there.
"""

import builtins
import sys

import harness_wire as wire
from harness_proxies import Gone, Method, Proxies, Unsupported, is_remote
from harness_server import OTHER, UNARY


class Client:
    """The connection to the solution's process."""

    def __init__(self, line):
        self.line = line
        self.proxies = Proxies(self)
        self.handed = []
        self.failed_inside = None
        self.refused = None
        self.gone = False

    def request(self, message):
        """Send a request; the solution's reply. Before it replies it may use objects of the test."""
        if self.gone:
            raise Gone
        try:
            self.line.send(message)
            while True:
                reply = self.line.receive()
                sys.stdout.write(str(reply.get("out", "")))
                if "do" not in reply:
                    break
                self.line.send(self.answer(reply))
        except OSError:
            self.gone = True
            raise Gone from None
        except EOFError:
            self.gone = True
            raise Gone from None
        if "raise" in reply:
            error = self.proxies.error(reply)
            # raised by a call, it would silently end a loop of the test
            if isinstance(error, StopIteration | StopAsyncIteration) and message.get("name") != "__next__":
                raise RuntimeError("the solution raised StopIteration") from error
            raise error
        return reply

    def answer(self, asked):
        """Serve the solution's request on an object that the test has passed to it."""
        try:
            return {"value": self.encode(self.act(asked))}
        except AssertionError as error:
            # even if the solution catches it, the test has failed
            self.failed_inside = error
            return {"raise": wire.classes_of(error), "words": []}
        except (Gone, Unsupported):
            raise
        except BaseException as error:
            return {"raise": wire.classes_of(error), "words": [str(word) for word in error.args]}

    def act(self, asked):
        if asked["do"] == "input":
            return builtins.input(asked["words"])
        target, can = self.handed[asked["k"]]
        name = asked["do"]
        if name in ("get", "set"):
            if "__getattr__" not in can or asked["name"].startswith("_"):
                raise AttributeError(asked["name"])
            if name == "get":
                return getattr(target, asked["name"])
            # the test's methods cannot be replaced: an assertion could be one
            if callable(getattr(type(target), asked["name"], None)):
                raise AttributeError(asked["name"])
            return setattr(target, asked["name"], self.decode(asked["value"]))
        if name not in can:
            raise TypeError(f"{name} is not offered")
        words, named = self.decode(asked["words"]), self.decode(asked["named"])
        return target(*words, **named) if name == "__call__" else getattr(type(target), name)(target, *words)

    def value(self, message):
        return self.decode(self.request(message)["value"])

    def call(self, target, name, words, named, operator=False):
        """Call in the other process; changes that it makes to its arguments are made here as well."""
        given = [*words, *named.values()]
        changing = [word for word in given if wire.holds_mutable(word)]
        reply = self.request(
            {
                "ask": "call",
                "o": target._ring.number,
                "name": None if name == "__call__" else name,
                "operator": operator,
                "words": self.encode(list(words)),
                "named": self.encode(named),
            }
        )
        for place, now in reply.get("changed", []):
            if given[place] in changing:
                wire.become(given[place], self.decode(now))
        return given[reply["same"]] if "same" in reply else self.decode(reply["value"])

    def attribute(self, target, name):
        reply = self.request({"ask": "get", "o": target._ring.number, "name": name})
        return Method(target, name) if "method" in reply else self.decode(reply["value"])

    def set_attribute(self, target, name, value):
        self.request({"ask": "set", "o": target._ring.number, "name": name, "value": self.encode(value)})

    def data(self, target):
        """The plain data of an object whose class derives from list, dict or the like."""
        return self.value({"ask": "data", "o": target._ring.number})

    def is_a(self, target, value, is_class):
        asked = {"ask": "is", "o": target._ring.number, "value": self.encode(value), "class": is_class}
        return self.value(asked) is True

    def encode(self, value):
        return wire.encode(value, self.keep)

    def decode(self, word):
        return wire.decode(word, self.found)

    def found(self, word):
        return self.handed[word["k"]][0] if "k" in word else self.proxies.of(word)

    def keep(self, value):
        """The JSON that stands for an object of the test, and the special methods that may be used on it."""
        if is_remote(value):
            return {"o": value._ring.number}
        if isinstance(value, Method):
            reply = self.request(
                {"ask": "get", "o": value.owner._ring.number, "name": value.__name__, "whole": True}
            )
            return {"o": reply["value"]["o"]}
        if isinstance(value, type) and "_ring_number" in vars(value):
            return {"o": value._ring_number}
        if isinstance(value, BaseException):
            return {"E": [wire.classes_of(value), [str(word) for word in value.args]]}
        if any(kind.__module__.partition(".")[0] == "unittest" for kind in type(value).__mro__):
            return self.refuse("an object of unittest's")
        if type(value).__module__ in ("__main__", "io", "_io"):
            can = [name for name in (*UNARY, *OTHER) if getattr(type(value), name, None) is not None]
            can.append("__getattr__")
        elif hasattr(type(value), "__next__"):
            can = ["__iter__", "__next__"]
        elif callable(value):
            can = ["__call__"]
        else:
            return self.refuse(f"an argument of class {type(value).__name__}")
        for number, (held, _) in enumerate(self.handed):
            if held is value:
                return {"k": number, "can": can}
        self.handed.append((value, can))
        return {"k": len(self.handed) - 1, "can": can}

    def refuse(self, what):
        self.refused = f"{what} cannot pass between the test's process and the solution's"
        raise Unsupported(self.refused)
