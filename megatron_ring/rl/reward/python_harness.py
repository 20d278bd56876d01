"""What stands before a Python solution inside the sandbox. Read as text, run there; never imported by the trainer.

    harness.py stdin | function | unit_test

Standard input is the test's (stdin), or one JSON object: {"function", "args"} or {"test", "token"}. Exit codes: 90
the solution does not compile, 91 its result is not JSON, 92 a test failed. The token is printed after the last test:
a solution that exits early, with whatever code, does not have it.
"""

import builtins
import json
import os
import sys

SOURCE = "/code/solution.py"


def load(name):
    """The solution's globals after it has run as module ``name``."""
    import traceback
    import types

    with open(SOURCE, encoding="utf-8", errors="surrogateescape") as file:
        source = file.read()
    try:
        code = compile(source, "solution.py", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        traceback.print_exc(limit=0)
        sys.exit(90)
    # the site module, which is not loaded here, is where people's exit() comes from
    builtins.exit = builtins.quit = sys.exit
    module = types.ModuleType(name)
    module.__file__ = SOURCE
    sys.modules[name] = module
    if name == "solution":
        import typing

        module.__dict__.update({word: getattr(typing, word) for word in typing.__all__})
    sys.argv = ["solution.py"]
    exec(code, module.__dict__)
    return module.__dict__


def private_stdout():
    """Standard output kept for the harness; what the solution prints goes to standard error."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return kept


def call_function():
    task = json.loads(sys.stdin.read())
    out = private_stdout()
    found = load("solution")
    function = found.get(task["function"])
    if function is None and "Solution" in found:
        function = getattr(found["Solution"](), task["function"], None)
    if function is None:
        sys.exit(f"no function {task['function']}")
    result = function(*task["args"])
    try:
        text = json.dumps(result)
    except (TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(91)
    with open(out, "w") as file:
        file.write(text)


def run_unit_test():
    task = json.loads(sys.stdin.read())
    token, test = task.pop("token"), task.pop("test")
    out = private_stdout()
    names = load("solution")
    before = dict(names)
    try:
        exec(compile(test, "test.py", "exec"), names)
        run_collected({name: value for name, value in names.items() if before.get(name) is not value})
    except AssertionError:
        import traceback

        traceback.print_exc()
        sys.exit(92)
    sys.stdout.flush()
    os.write(out, token.encode())
    os._exit(0)


def run_collected(made):
    """Run what the test's source defines without calling it: test functions and unittest cases."""
    import unittest

    suite = unittest.TestSuite()
    for name, value in made.items():
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            suite.addTests(unittest.defaultTestLoader.loadTestsFromTestCase(value))
        elif name.startswith("test") and callable(value):
            value()
    if suite.countTestCases():
        outcome = unittest.TextTestRunner(stream=sys.stderr).run(suite)
        if not outcome.wasSuccessful():
            raise AssertionError("a unittest case failed")


MODES = {"stdin": lambda: load("__main__"), "function": call_function, "unit_test": run_unit_test}

if __name__ == "__main__":
    MODES[sys.argv[1]]()
