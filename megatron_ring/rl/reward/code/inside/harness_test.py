"""The process of a unit test that runs the test and writes its result. Read as text, run in the sandbox; never imported.

The solution runs in another process, forked before this one reads the test, and shares only two pipes with it. This
process is not dumpable, so that processes of the same user can neither read its memory nor open its descriptors through
/proc. It alone can write to the descriptor of the result.
"""

import ast
import builtins
import contextlib
import ctypes
import io
import json
import os
import signal
import sys
import types

import harness_wire as wire
from harness_client import Client
from harness_proxies import Gone, Guard, Unsupported, is_remote
from harness_server import Server

_PR_SET_DUMPABLE = 4
_DEEPEST_SOURCE = 10_000
"""Recursion limit while a test is compiled: a sum of a thousand numbers is a thousand levels deep."""


def start_solution(load):
    """Fork the process in which the solution runs; the connection to it. The test must not have been read yet."""
    there_read, here_write = os.pipe()
    here_read, there_write = os.pipe()
    if os.fork() == 0:
        keep = {there_read, there_write}
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2 and fd not in keep:
                # one of them is the listed directory's own, which is closed already
                with contextlib.suppress(OSError):
                    os.close(fd)
        serve(wire.Line(there_read, there_write), load)
        os._exit(0)
    os.close(there_read)
    os.close(there_write)
    return Client(wire.Line(here_read, here_write))


def serve(line, load):
    import traceback

    sys.path.remove("/code")
    with contextlib.suppress(OSError), open(f"/proc/{os.getppid()}/mem", "rb"):
        line.send({"started": False, "open": True})
        return
    try:
        server = Server(line, load)
    except BaseException as error:
        told = "" if isinstance(error, SystemExit) else traceback.format_exception_only(error)[-1]
        compiles = not (isinstance(error, SystemExit) and error.code == 90)
        line.send(
            {"started": False, "compiles": compiles, "said": told, "memory": isinstance(error, MemoryError)}
        )
        return
    line.send({"started": True})
    try:
        server.serve()
    except (EOFError, OSError):
        return


def run_unit_test(load, names_of):
    """Run the test of standard input against the solution; the result goes to standard output, as JSON."""
    # before the fork, so that neither process is dumpable
    if ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        sys.exit("cannot hide from the solution: PR_SET_DUMPABLE")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    out = os.dup(1)
    os.dup2(2, 1)
    client = start_solution(load)
    task = json.loads(sys.stdin.read())
    sys.stdin = io.StringIO()
    try:
        started = client.line.receive()
    except EOFError:
        started = {"said": "the solution's process ended"}
    if started.get("started") is True:
        status, detail = result_of(client, task, names_of)
    elif started.get("open") is True:
        status, detail = (
            "unsupported",
            "this kernel lets the solution's process open the memory of the test's",
        )
    elif started.get("compiles") is False:
        status, detail = "compile_error", ""
    else:
        status = "memory" if started.get("memory") is True else "crashed"
        detail = str(started.get("said") or "ended before its tests did")
    # the sandbox ends the solution's process with this one
    os.write(out, json.dumps({"status": status, "detail": detail[-300:]}).encode())
    os._exit(0)


def result_of(client, task, names_of):
    """(status, detail) of the test; status is "passed", or says how it failed."""
    checks = Checks()
    try:
        run(client, task, names_of, checks)
        status, detail = ("passed", "") if checks.number else ("wrong", "no assertion of the test was run")
    except Unsupported:
        status, detail = "unsupported", ""
    except Gone:
        status, detail = "crashed", ""
    except AssertionError as error:
        status, detail = "wrong", told(error)
    except MemoryError as error:
        status, detail = "memory", told(error)
    except BaseException as error:
        status, detail = "crashed", told(error)
    if client.refused:
        return "unsupported", client.refused
    if client.gone:
        return "crashed", "ended before its tests did"
    if client.failed_inside is not None and status == "passed":
        return "wrong", told(client.failed_inside)
    return status, detail


def told(error):
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:
        return type(error).__name__


class Checks(ast.NodeTransformer):
    """Counts the assertions that are executed: assert, anything.assert...(), raises(), an if that raises, and the
    except of a try that fails if nothing is raised."""

    def __init__(self):
        self.number = 0

    def count(self, value=None):
        self.number += 1
        return value

    def counting(self):
        return ast.Expr(ast.Call(ast.Name("__count__", ast.Load()), [], []))

    def visit_Assert(self, node):
        return [self.counting(), self.generic_visit(node)]

    def visit_If(self, node):
        raises = any(isinstance(word, ast.Raise) for word in (*node.body, *node.orelse))
        node = self.generic_visit(node)
        return [self.counting(), node] if raises else node

    def visit_Try(self, node):
        tells = any(fails(word) for statement in (*node.body, *node.orelse) for word in ast.walk(statement))
        node = self.generic_visit(node)
        if tells:
            for handler in node.handlers:
                handler.body.insert(0, self.counting())
        return node

    def visit_With(self, node):
        words = [word for line in node.body for word in ast.walk(line)]
        asserts = any(isinstance(word, ast.Assert | ast.If) or is_assertion(word) for word in words)
        node = self.generic_visit(node)
        for item in node.items:
            guard = ast.Name("__guard__", ast.Load())
            item.context_expr = ast.Call(guard, [item.context_expr, ast.Constant(asserts)], [])
        return node

    def visit_Call(self, node):
        node = self.generic_visit(node)
        if is_assertion(node):
            return ast.Call(ast.Name("__count__", ast.Load()), [node], [])
        return node


def guard(manager, asserts):
    return Guard(manager, asserts) if is_remote(manager) else manager


def is_assertion(node):
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    return name == "raises" or (isinstance(node.func, ast.Attribute) and name.startswith(("assert", "fail")))


def fails(node):
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", "") == "fail"
    return isinstance(node, ast.Assert | ast.Raise)


def run(client, task, names_of, checks):
    source = task["test"]
    code = counted(source, checks)
    # so that a test's ``if __name__ == "__main__"`` block runs as well
    test = sys.modules["__main__"] = types.ModuleType("__main__")
    names = test.__dict__
    given = {name: value for name, value in names_of(source).items() if name not in task["names"]}
    names["__builtins__"] = {**vars(builtins), **given}
    module = types.ModuleType("solution")
    module.__getattr__ = lambda name: solution_name(client, name)
    sys.modules["solution"] = module
    # modules that would run code from a value of the solution
    for module_name in ("pickle", "_pickle", "marshal", "shelve", "dill"):
        sys.modules[module_name] = None
    for word in ("eval", "exec"):
        names[word] = evaluator(client, word)
    trusted = {}
    if task.get("prompt"):
        exec(compile(task["prompt"], "prompt.py", "exec"), trusted)
        names.update({name: value for name, value in trusted.items() if not name.startswith("__")})
    for name in task["names"]:
        if name not in trusted or name == task["entry"]:
            reply = client.request({"ask": "name", "name": name})
            if "missing" not in reply:
                names[name] = client.decode(reply["value"])
    if "unittest" in source:
        import unittest

        unittest.main = lambda *words, **named: None
    if "pytest" in source:
        import harness_pytest

        sys.modules["pytest"] = harness_pytest
    names["__count__"], names["__guard__"] = checks.count, guard
    exec(code, names)
    if task["calls_check"]:
        names["check"](entry(names, task["entry"]))
    run_collected([value for value in names.values() if getattr(value, "__module__", None) == "__main__"])


def counted(source, checks):
    """A test's code, instrumented to count its assertions."""
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(_DEEPEST_SOURCE)
    tree = checks.visit(ast.parse(source, "test.py"))
    code = compile(ast.fix_missing_locations(tree), "test.py", "exec")
    sys.setrecursionlimit(usual)
    return code


def entry(names, word):
    """The function that ``add`` or ``Solution().add`` names; ``add`` may also be a method of a class Solution."""
    name, _, method = word.partition("().")
    if method:
        return getattr(names[name](), method)
    if name not in names and "Solution" in names:
        return getattr(names["Solution"](), name)
    return names[name]


def solution_name(client, name):
    if name.startswith("__"):
        raise AttributeError(name)
    reply = client.request({"ask": "name", "name": name})
    if "missing" in reply:
        raise AttributeError(name)
    return client.decode(reply["value"])


def evaluator(client, word):
    return lambda text, *_: client.value({"ask": "evaluate", "name": word, "source": str(text)})


def run_collected(made):
    """Run test functions and test classes that the test's source defines without calling them."""
    unittest = sys.modules.get("unittest")
    for value in made:
        if isinstance(value, type) and unittest is not None and issubclass(value, unittest.TestCase):
            run_cases(unittest, value)
        elif isinstance(value, type) and value.__name__.startswith("Test"):
            for name in vars(value):
                if name.startswith("test"):
                    case = value()
                    getattr(case, "setup_method", lambda *_: None)()
                    run_function(getattr(case, name))
                    getattr(case, "teardown_method", lambda *_: None)()
        elif isinstance(value, types.FunctionType) and value.__name__.startswith("test"):
            run_function(value)


def run_function(function):
    rows = getattr(function, "parameters", None)
    for words in [{}] if rows is None else rows:
        result = function(**words)
        if isinstance(result, types.CoroutineType):
            import asyncio

            asyncio.run(result)


def run_cases(unittest, kind):
    outcome = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(kind).run(outcome)
    if outcome.failures or outcome.unexpectedSuccesses:
        raise AssertionError(outcome.failures[0][1] if outcome.failures else "unexpected success")
    if outcome.errors:
        raise RuntimeError(outcome.errors[0][1])
