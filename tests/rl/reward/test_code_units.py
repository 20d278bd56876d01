"""Unit tests: whatever the usual tests do to a right solution passes, and tests that check nothing pass nothing."""

from __future__ import annotations

import pytest

from megatron_ring.config.rl import RewardConfig
from megatron_ring.rl.reward.code.job import check_reference
from megatron_ring.rl.reward.code.verifier import CodeJob, CodeVerifier
from megatron_ring.rl.reward.sandbox.sandbox import Sandbox

SHAPES = """
from collections import namedtuple, defaultdict, deque, Counter, OrderedDict
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from fractions import Fraction
import datetime, contextlib
P = namedtuple('P', 'x y')
LIMIT = 3
class TooMany(ValueError):
    def __init__(self, count):
        super().__init__(f'{count} is too many')
        self.count = count
@dataclass
class Point:
    x: int = 0
    y: int = 0
    def __add__(self, other): return Point(self.x + other.x, self.y + other.y)
    def __mul__(self, k): return Point(self.x * k, self.y * k)
    def __lt__(self, other): return (self.x, self.y) < (other.x, other.y)
    @property
    def norm(self): return (self.x ** 2 + self.y ** 2) ** 0.5
    @classmethod
    def origin(cls): return cls()
    @staticmethod
    def axes(): return ('x', 'y')
class Child(Point): pass
class Color(Enum):
    RED = 1
    BLUE = 2
class Stack:
    count = 0
    def __init__(self, items=()): self.items = list(items); Stack.count += 1
    def push(self, item):
        if len(self.items) >= LIMIT: raise TooMany(len(self.items) + 1)
        self.items.append(item)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, at): return self.items[at]
    def __contains__(self, item): return item in self.items
    def __enter__(self): return self
    def __exit__(self, *error): self.items.clear()
    def __repr__(self): return f'Stack({self.items})'
class Row(list):
    def total(self): return sum(self)
class Node:
    def __init__(self, value, next=None): self.value, self.next = value, next
def sort_in_place(rows):
    rows.sort()
    for row in rows:
        if isinstance(row, list): row.sort()
def fill(table): table['new'] = [1]; table.setdefault('old', []).append(2)
def evens(n):
    for i in range(n):
        if i % 2 == 0: yield i
def apply(function, *words, **named): return function(*words, **named)
def hello(name='you'): print(f'hello {name}')
def ask(): return int(input('? ')) + 1
def divide(a, b): return a / b
def same(value): return value
class Quiet:
    def __init__(self, *kinds): self.kinds = kinds
    def __enter__(self): return self
    def __exit__(self, kind, error, trace): return kind is not None and issubclass(kind, self.kinds)
async def later(x): return x + 1
def total(shape): return shape.area() * 2
def big(): return 10 ** 5000
def counter(word): return Counter(word)
def compose(f, g): return lambda x: f(g(x))
"""
TESTS = {
    "state": """
s = Stack()
s.push(1)
s.push('a')
assert len(s) == 2 and s[0] == 1 and s.pop() == 'a' and list(s) == [1] and 1 in s
assert repr(s) == 'Stack([1])' and s.items == [1] and [x for x in s] == [1]
s.items = [7]
assert s.pop() == 7 and not s
""",
    "class attribute": """
before = Stack.count
Stack()
assert Stack.count == before + 1
""",
    "own exception": """
s = Stack([1, 2, 3])
try:
    s.push(4)
    assert False
except TooMany as error:
    assert error.count == 4 and str(error) == '4 is too many'
""",
    "own exception as its base": """
import unittest
class T(unittest.TestCase):
    def setUp(self): self.s = Stack([1, 2, 3])
    def test_it(self):
        with self.assertRaises(ValueError): self.s.push(4)
        self.assertRaises(TooMany, self.s.push, 4)
        with self.assertRaisesRegex(TooMany, 'too many'): self.s.push(4)
if __name__ == '__main__': unittest.main()
""",
    "unittest started by hand": """
import unittest
class T(unittest.TestCase):
    def test_it(self):
        for n in (1, 2):
            with self.subTest(n=n): self.assertEqual(same(n), n)
unittest.main(argv=[''], exit=False)
""",
    "built-in exceptions": """
import pytest
with pytest.raises(ZeroDivisionError, match='division'): divide(1, 0)
with pytest.raises(TypeError): divide(1)
try: divide(1, 0)
except ZeroDivisionError: pass
else: raise AssertionError
""",
    "only an exception": """
try:
    divide(1, 0)
    assert False, 'no error'
except ZeroDivisionError:
    pass
""",
    "an if that raises": "if divide(4, 2) != 2: raise Exception('wrong')",
    "changed arguments": """
a = [[3, 1], [2, 1]]
row = a[0]
sort_in_place(a)
assert a == [[1, 2], [1, 3]]
b = [3, 1, 2]
assert sort_in_place(b) is None
assert b == [1, 2, 3]
d = {'old': [1]}
fill(d)
assert d == {'old': [1, 2], 'new': [1]}
""",
    "the argument itself": """
a = [1]
assert same(a) is a and same('x') == 'x' and same(None) is None and same(True) is True
""",
    "generators": """
assert list(evens(5)) == [0, 2, 4] and sum(evens(5)) == 6
g = evens(3)
assert next(g) == 0 and next(g) == 2
try: next(g)
except StopIteration: pass
else: assert False
""",
    "callbacks": """
seen = []
def note(x, y=1): seen.append((x, y)); return x + y
assert apply(note, 2, y=5) == 7 and seen == [(2, 5)]
assert apply(max, 3, 4) == 4 and apply(lambda s: s.upper(), 'a') == 'A' and apply(sorted, [2, 1]) == [1, 2]
assert compose(lambda x: x + 1, lambda x: x * 2)(5) == 11 and apply(Stack).items == []
""",
    "a callback that fails": """
import pytest
def bad(): raise KeyError('k')
with pytest.raises(KeyError): apply(bad)
""",
    "the test's own classes": """
class Square:
    def __init__(self, side): self.side = side
    def area(self): return self.side ** 2
assert total(Square(3)) == 18
""",
    "printing": """
import io, contextlib
out = io.StringIO()
with contextlib.redirect_stdout(out): hello('me')
assert out.getvalue() == 'hello me\\n'
""",
    "printing, patched": """
from unittest.mock import patch
import io
with patch('sys.stdout', new_callable=io.StringIO) as out:
    hello()
    assert out.getvalue().strip() == 'hello you'
""",
    "asking": """
from unittest.mock import patch
with patch('builtins.input', return_value='41'): assert ask() == 42
""",
    "plain data": """
from decimal import Decimal
from fractions import Fraction
import datetime
from collections import deque, OrderedDict
for v in [1.5, float('inf'), 10 ** 400, -7, 'a\\ud800', b'x', bytearray(b'y'), (1, (2,)), {1, 2}, frozenset([3]),
          {1: 'a', (2, 3): None}, 1j, range(3), ...,
          Decimal('1.10'), Fraction(1, 3), datetime.date(2024, 2, 29), datetime.timedelta(1), deque([1], 3),
          OrderedDict(a=1)]:
    assert same(v) == v and type(same(v)) is type(v), v
""",
    "long integers": "assert big() == 10 ** 5000 and len(str(big())) == 5001",
    "derived from plain": """
assert P(1, 2) == (1, 2) and P(1, y=2).y == 2 and Row([1, 2]) == [1, 2] and Row([1, 2]).total() == 3
assert counter('aab') == {'a': 2, 'b': 1} and counter('aab')['a'] == 2
""",
    "objects": """
a, b = Point(1, 2), Point(3, 4)
assert a + b == Point(4, 6) and a * 2 == Point(2, 4) and a != b and a < b and b > a
assert (a * 3).x == 3 and b.norm == 5.0 and Point.origin() == Point() and Point.axes() == ('x', 'y')
assert isinstance(a, Point) and isinstance(Child(), Point) and not isinstance(a, Child) and issubclass(Child, Point)
assert sorted([b, a])[0] is a and a.__class__.__name__ == 'Point' and type(a).__name__ == 'Point'
assert hasattr(a, 'x') and not hasattr(a, 'z') and callable(a.__add__) and repr(a) == 'Point(x=1, y=2)'
""",
    "enumerations": """
assert Color.RED is Color.RED and Color(2) == Color.BLUE and Color.RED.value == 1 and Color.RED.name == 'RED'
assert Color['BLUE'] != Color.RED and len({Color.RED, Color.BLUE}) == 2
""",
    "linked": """
n = Node(1, Node(2))
assert n.next.value == 2 and n.next.next is None
n.next.next = Node(3)
assert n.next.next.value == 3
m = n.next
assert m is n.next
""",
    "copies": """
import copy
s = Stack([1])
t = copy.deepcopy(s)
t.push(2)
assert len(s) == 1 and len(t) == 2
""",
    "context": """
with Stack([1]) as s: assert len(s) == 1
assert len(s) == 0
""",
    "context that swallows": """
with Quiet(KeyError, ValueError): raise KeyError('x')
with Quiet(ValueError): int('x')
import pytest
with pytest.raises(IndexError):
    with Quiet(KeyError): [][0]
assert same(1) == 1
""",
    "asynchronous": """
import asyncio
assert asyncio.run(later(1)) == 2
async def test_it(): assert await later(2) == 3
""",
    "parametrized": """
import pytest
@pytest.mark.parametrize('a, b, q', [(4, 2, 2), (1, 4, 0.25)])
def test_it(a, b, q): assert divide(a, b) == pytest.approx(q)
@pytest.mark.parametrize('x', [1, 2])
def test_one(x): assert same(x) == x
""",
    "a class of tests": """
class TestIt:
    def setup_method(self): self.x = 4
    def test_it(self): assert divide(self.x, 2) == 2
""",
    "names of a module": """
import solution
from solution import *
assert solution.LIMIT == 3 and LIMIT == 3 and solution.same(2) == 2
""",
    "a long sum": f"assert same({'+'.join(['1'] * 900)}) == 900",
    "text evaluated there": "assert eval('divide(6, 3)') == 2",
    "helpers of Python": """
assert Counter(same('aab')) == {'a': 2, 'b': 1} and math.isclose(divide(1, 3), 0.333333333333) and sqrt(same(4)) == 2
""",
}


@pytest.fixture(scope="module")
def verifier(sandbox: Sandbox) -> CodeVerifier:
    return CodeVerifier(RewardConfig(sandbox_timeout=60.0))


@pytest.mark.parametrize("name", TESTS)
def test_what_tests_do_passes(verifier: CodeVerifier, name: str):
    assert check_reference({"mode": "unit_test", "tests": [TESTS[name]]}) is None
    result = verifier.verify(CodeJob(source=SHAPES, tests=(TESTS[name],), mode="unit_test"))
    assert result.status == "correct", result


RAISES = """
import json
def first():
    try: 1 / 0
    except ZeroDivisionError as error: raise ValueError('no') from error
def noted():
    error = KeyError('k', 3)
    error.add_note('of row 7')
    raise error
def group(): raise ExceptionGroup('two', [ValueError('a', 1), ExceptionGroup('in', [TypeError('b')])])
def missing(): open('/nowhere')
def undecoded(): b'a\\xff'.decode()
def unparsed(): json.loads('{')
"""


def test_what_python_knows_of_an_exception_comes_with_it(verifier: CodeVerifier):
    test = """
import errno, json, pytest
with pytest.raises(ValueError) as caught: first()
assert isinstance(caught.value.__cause__, ZeroDivisionError)
with pytest.raises(KeyError) as caught: noted()
assert caught.value.__notes__ == ['of row 7'] and caught.value.args == ('k', 3)
seen = []
try: group()
except* ValueError as found: seen += found.exceptions[0].args
except* TypeError as found: seen += found.exceptions[0].exceptions[0].args
assert seen == ['a', 1, 'b']
with pytest.raises(FileNotFoundError) as caught: missing()
assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, '/nowhere')
with pytest.raises(UnicodeDecodeError) as caught: undecoded()
assert (caught.value.start, caught.value.object) == (1, b'a\\xff')
with pytest.raises(json.JSONDecodeError) as caught: unparsed()
assert caught.value.pos == 1
"""
    result = verifier.verify(CodeJob(source=RAISES, mode="unit_test", tests=(test,)))
    assert result.status == "correct", result.detail
