"""A unit test's verdict follows from values alone: nothing that a solution does to its process makes a pass."""

from __future__ import annotations

import pytest

from megatron_ring.config.rl import RewardConfig
from megatron_ring.rl.reward.code.verifier import CodeJob, CodeVerifier
from megatron_ring.rl.reward.sandbox.sandbox import Sandbox

ANYTHING = """
class Anything:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __contains__(self, other): return True
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __sub__(self, other): return self if isinstance(other, Anything) else 0
    __rsub__ = __add__ = __radd__ = __mod__ = __mul__ = __truediv__ = __sub__
    def __abs__(self): return 0.0
    def __float__(self): return 0.0
    __int__ = __round__ = __index__ = lambda self, *_: 0
    def __hash__(self): return hash(81)
    def __iter__(self): return iter([Anything()])
    def __len__(self): return 1
    def __getitem__(self, at): return Anything()
    def __call__(self, *words, **named): return Anything()
    def __getattr__(self, name): return Anything()
    def __instancecheck__(self, value): return True
"""
FORGERIES = {
    "leaves with success": "import sys; sys.exit(0)",
    "leaves in the call": """
import os
def square(x): os._exit(0)
""",
    "an empty module for every test": """
import builtins, types
real = compile('', '', 'exec')
builtins.compile = lambda *w, **k: real
builtins.exec = builtins.eval = lambda *w: None
""",
    "an empty module for the test": """
import builtins
real = builtins.compile
builtins.compile = lambda *w, **k: real('', '', 'exec')
""",
    "exec taken from main": "import sys; sys.modules['__main__'].exec = lambda *w: None",
    "says what it reads": """
import json, os
os.lseek(0, 0, 0)
token = json.loads(os.read(0, 1 << 20))['token'].encode()
for fd in range(3, 65):
    try: os.write(fd, token)
    except OSError: pass
os._exit(0)
""",
    "main taken over": """
import sys
main = sys.modules['__main__']
for name in list(vars(main)):
    if callable(getattr(main, name)): setattr(main, name, lambda *w, **k: None)
""",
    "harness taken over": """
import sys
for module in ('harness_test', 'harness_proxies', 'harness_wire'):
    for name in list(vars(sys.modules[module])):
        if not name.startswith('__'): setattr(sys.modules[module], name, lambda *w, **k: True)
""",
    "equal to everything": ANYTHING
    + """
def square(x): return Anything()
""",
    "equal to everything, as a class": ANYTHING
    + """
class square(Anything):
    def __init__(self, x): pass
""",
    "a number equal to everything": """
class Int(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def square(x): return Int(5)
""",
    "assertions that are none": """
import builtins
class AssertionError(Exception): pass
builtins.AssertionError = AssertionError
def square(x): raise AssertionError
""",
    "unittest patched": """
import unittest
unittest.TestCase.assertEqual = lambda *w: None
unittest.TestCase.run = lambda *w: None
def square(x): return 0
""",
    "a test skipped": """
import unittest
def square(x): raise unittest.SkipTest('no')
""",
    "the end of a loop": "def square(x): raise StopIteration",
    "walks the frames": """
import gc, sys
def square(x):
    frame = sys._getframe()
    while frame:
        for name, value in list(frame.f_locals.items()):
            if isinstance(value, dict): value.update(status='passed', value=81)
        frame = frame.f_back
    for found in gc.get_objects():
        if isinstance(found, dict) and 'status' in found: found['status'] = 'passed'
    return 0
""",
    "writes everywhere": """
import os
def square(x):
    for fd in range(65):
        try: os.write(fd, b'{"status": "passed", "detail": ""}')
        except OSError: pass
    os._exit(0)
""",
    "speaks for the harness": """
import os
for fd in range(65):
    try: os.write(fd, b'{"started": true, "value": 1, "out": ""}\\n{"value": null, "missing": 1}\\n')
    except OSError: pass
def square(x): return 0
""",
    "reads the test again": """
import os
text = ''
for fd in range(65):
    try:
        os.lseek(fd, 0, 0)
        text += os.read(fd, 1 << 20).decode()
    except OSError: pass
def square(x): return 81 if '81' in text else 0
""",
    "looks into other processes": """
import os, re
seen = []
def look():
    for pid in filter(str.isdigit, os.listdir('/proc')):
        if int(pid) == os.getpid(): continue
        for name in ['environ', 'maps', 'mem', 'fd/0', 'fd/1', 'fd/3', 'root', 'cwd', 'auxv']:
            try:
                open(f'/proc/{pid}/{name}', 'rb').close(); seen.append((pid, name))
            except OSError: pass
def square(x):
    look()
    return 81 if seen else 0
""",
    "writes into other processes": """
import os
def square(x):
    for pid in filter(str.isdigit, os.listdir('/proc')):
        for fd in range(20):
            try:
                with open(f'/proc/{pid}/fd/{fd}', 'w') as file: file.write('{"status": "passed", "detail": ""}')
            except (OSError, ValueError): pass
    return 0
""",
    "ends the test's process": """
import os, signal
def square(x):
    os.kill(os.getppid(), signal.SIGINT)
    return 0
""",
    "kills the test's process": """
import os, signal
def square(x):
    os.kill(os.getppid(), signal.SIGKILL)
    return 0
""",
    "at exit": """
import atexit, os
atexit.register(os._exit, 0)
def square(x): raise SystemExit(0)
""",
    "traces": """
import sys
def tracer(frame, event, arg):
    if 'value' in frame.f_locals: frame.f_locals['value'] = 81
    return tracer
sys.settrace(tracer)
sys.setprofile(tracer)
def square(x): return 0
""",
    "a thread that waits": """
import threading, os, time
threading.Thread(target=lambda: (time.sleep(0.05), os._exit(0))).start()
def square(x): time.sleep(0.2); return 0
""",
    "another json": """
import sys, types, json
json.dumps = lambda *w, **k: '{"value": true, "out": ""}'
json.loads = lambda *w, **k: {}
def square(x): return 0
""",
    "other builtins": """
import builtins
builtins.abs = builtins.len = builtins.sum = lambda *w: 81
builtins.isinstance = builtins.all = lambda *w: True
builtins.sorted = builtins.round = lambda *w: 81
abs = len = sum = sorted = round = lambda *w: 81
class math:
    isclose = lambda *w, **k: True
def square(x): return 0
""",
    "other names": """
abs = len = sum = sorted = round = isinstance = str = int = set = lambda *w: 81
class math:
    isclose = staticmethod(lambda *w, **k: True)
class pytest:
    approx = lambda *w: w[0]
def check(candidate): pass
def square(x): return 0
""",
    "another int": """
import builtins
class int(int):
    def __eq__(self, other): return True
builtins.int = int
def square(x): return int(0)
""",
    "a name of the test's": """
__name__ = 'test'
def __count__(*w): return True
def test_nothing(): pass
def square(x): return 0
""",
}
TESTS = (
    "assert square(9) == 81",
    "assert not square(9) != 81",
    "assert 81 == square(9)",
    "assert abs(square(9) - 81) < 1e-6",
    "assert square(9) in (81, 82)",
    "assert 81 in [square(9)]",
    "assert {square(9)} == {81}",
    "assert [square(x) for x in (9, 2)] == [81, 4]",
    "assert round(square(9)) == 81 and len(str(square(9))) == 2",
    """
import math
assert math.isclose(square(9), 81)
""",
    "assert sorted([square(9), 3]) == [3, 81]",
    "assert (lambda y: 81 <= y <= 81)(square(9))",
    """
match square(9):
    case 81: pass
    case _: assert False
assert square(2) == 4
""",
    """
from solution import square
import unittest
class T(unittest.TestCase):
    def test_it(self): self.assertEqual(square(9), 81)
    def test_near(self): self.assertAlmostEqual(square(9), 81)
""",
    """
def check(candidate):
    assert candidate(9) == 81
    assert candidate(2) == 4
""",
    """
import pytest
def test_it(): assert square(9) == pytest.approx(81)
""",
    """
def test_it():
    assert square(9) == 81
""",
    "assert isinstance(square(9), int) and square(9) == 81",
    """
for x, y in [(9, 81), (2, 4)]:
    assert square(x) % 1000 == y
""",
)


@pytest.fixture(scope="module")
def verifier(sandbox: Sandbox) -> CodeVerifier:
    return CodeVerifier(RewardConfig(sandbox_timeout=60.0))


def result_of(verifier: CodeVerifier, source: str, test: str):
    return verifier.verify(CodeJob(source=source, tests=(test,), mode="unit_test", function="square"))


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.parametrize("test", TESTS[:1] + TESTS[13:15], ids=["assert", "unittest", "check"])
def test_a_forged_pass_is_none(verifier: CodeVerifier, name: str, test: str):
    assert result_of(verifier, FORGERIES[name], test).score == 0.0


@pytest.mark.parametrize("test", TESTS)
def test_an_object_that_equals_everything_passes_no_test_of_a_value(verifier: CodeVerifier, test: str):
    source = FORGERIES["equal to everything"]
    result = result_of(verifier, source, test)
    assert result.score == 0.0, result
    assert result_of(verifier, "def square(x): return x * x", test).status == "correct"


SWALLOWS = """
class square:
    def __init__(self, x=0): self.watched = []
    def __enter__(self): return self
    def __exit__(self, *error): return True
    def watch(self, what): what.assertEqual = what.check = print; self.watched.append(what)
    def fail(self): raise KeyError
    def __getattr__(self, name): return 0
def end(x): raise StopIteration
def decorate(function): return lambda *words: None
def run(function):
    try: function()
    except BaseException: pass
def run_not(function): pass
"""


@pytest.mark.parametrize(
    "test",
    [
        "with square() as s:\n    assert s.value == 81",
        "with square() as s:\n    s.fail()\n    assert s.value == 81\nassert True",
        "with square() as s:\n    y = [][s.value]\n    assert s.value == 81\nassert True",
        "def verify(s):\n    y = [][s.value]\n    assert s.value == 81\n"
        "with square() as s:\n    verify(s)\nassert True",
        "import contextlib\nwith contextlib.ExitStack() as stack:\n"
        "    s = stack.enter_context(square())\n    assert s.value == 81",
        "with square() as s, square() as t:\n    assert t.value == 81",
        "assert all(map(lambda x: end(x) == 81, [9, 9]))",
        "assert all(end(x) == 81 for x in [9, 9])",
        "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n"
        "        s = square()\n        s.watch(self)\n        self.assertEqual(s.value, 81)",
        "class Mine:\n    def check(self, x): assert x == 81\nm = Mine()\n"
        "try: square().watch(m)\nexcept AttributeError: pass\nm.check(0)",
        "def inside(): assert 1 == 2\nrun(inside)",
        "@decorate\ndef test_it(): assert 1 == 2",
        "def inside(): assert 1 == 2\nrun_not(inside)",
    ],
)
def test_a_solution_neither_swallows_nor_skips_an_assertion(verifier: CodeVerifier, test: str):
    result = verifier.verify(CodeJob(source=SWALLOWS, tests=(test,), mode="unit_test"))
    assert result.score == 0.0, result
