"""Runs a Python solution inside the sandbox. Read as text and run there; the trainer imports only its tables.

    main.py stdin | function | unit_test

Standard input is the test's (stdin), or one JSON object: {"function", "lines"} (lines of JSON, function), or the task that
harness_test reads (unit_test). Exit codes: 90 the solution does not compile, 91 its result is not JSON.

A script (stdin) runs as in plain Python. Functions and classes also find the names that LeetCode and LiveCodeBench provide,
if they use them without defining them. All may recurse deeply and print integers of any length.
"""

import builtins
import importlib
import json
import os
import re
import sys

SOURCE = "/code/solution.py"
MODULES = (
    "typing", "collections", "heapq", "bisect", "itertools", "functools", "math", "operator", "re", "string", "random",
    "copy", "datetime", "statistics", "sys", "os", "io", "time", "json", "array", "fractions", "decimal", "enum",
    "dataclasses", "abc", "queue", "threading",
)  # fmt: skip
STAR = {
    "typing": "Any Callable DefaultDict Deque Dict FrozenSet Generator Iterable Iterator List Literal Mapping "
    "NamedTuple NoReturn Optional OrderedDict Sequence Set Text Tuple Type TypeVar Union",
    "collections": "ChainMap Counter defaultdict deque namedtuple OrderedDict UserDict UserList UserString",
    "heapq": "heapify heappop heappush heappushpop heapreplace merge nlargest nsmallest",
    "bisect": "bisect bisect_left bisect_right insort insort_left insort_right",
    "itertools": "accumulate chain combinations combinations_with_replacement compress count cycle dropwhile filterfalse "
    "groupby islice pairwise permutations product repeat starmap takewhile tee zip_longest",
    "functools": "cache cached_property cmp_to_key lru_cache partial reduce singledispatch total_ordering wraps",
    "math": "acos acosh asin asinh atan atan2 atanh ceil comb copysign cos cosh degrees dist e erf exp expm1 fabs "
    "factorial floor fmod frexp fsum gcd hypot inf isclose isfinite isinf isnan isqrt lcm ldexp lgamma log log10 log1p "
    "log2 modf nan perm pi prod radians remainder sin sinh sqrt tan tanh tau trunc ulp",
    "operator": "add and_ attrgetter concat contains eq floordiv ge getitem gt index inv invert is_ is_not itemgetter le "
    "lshift lt matmul methodcaller mod mul ne neg not_ or_ pos rshift setitem sub truediv truth xor",
    "re": "compile findall finditer fullmatch match search split",
    "string": "ascii_letters ascii_lowercase ascii_uppercase capwords digits hexdigits octdigits printable punctuation "
    "whitespace",
    "random": "choice choices randint randrange sample shuffle uniform",
    "copy": "copy deepcopy",
    "datetime": "date datetime timedelta timezone",
    "statistics": "mean median mode pstdev pvariance stdev variance",
    "fractions": "Fraction",
    "decimal": "Decimal getcontext",
    "enum": "Enum IntEnum auto",
    "dataclasses": "dataclass field",
    "abc": "ABC abstractmethod",
    "io": "BytesIO StringIO",
}
RECURSION = 550_000
"""LeetCode's own limit."""
THREAD_STACK = 1 << 26


class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next


class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val, self.left, self.right = val, left, right


def provided(source):
    """Those of the names that LeetCode and LiveCodeBench provide which occur in ``source``.

    A name of both a module and a function in it (bisect, copy) means the module if a point follows it.
    """
    words = set(re.findall(r"\w+", source)) - set(dir(builtins))
    found = {kind.__name__: kind for kind in (ListNode, TreeNode) if kind.__name__ in words}
    for module in MODULES:
        for name in words.intersection(STAR.get(module, "").split()) - set(found):
            found[name] = getattr(importlib.import_module(module), name)
    for module in words.intersection(MODULES):
        if module not in found or re.search(rf"\b{module}\.", source):
            found[module] = importlib.import_module(module)
    if "datetime" in words and re.search(r"\bdatetime\.(now|today|strptime|combine|fromisoformat)\b", source):
        found["datetime"] = importlib.import_module("datetime").datetime
    return found


def make_room(source):
    """Allow deep recursion and integers of any length. The stack grows with its use, within the memory limit."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
    sys.setrecursionlimit(RECURSION)
    sys.set_int_max_str_digits(0)
    if "stack_size" in source:
        import threading

        # a thread's stack is reserved at once: the sizes that people set to be safe would take all memory
        real = threading.stack_size
        threading.stack_size = lambda size=0: real(min(size, THREAD_STACK))


def load(name):
    """The solution's globals after it has run as module ``name``."""
    import types

    with open(SOURCE, encoding="utf-8", errors="surrogateescape") as file:
        source = file.read()
    try:
        code = compile(source, "solution.py", "exec")
    except (SyntaxError, ValueError):
        import traceback

        traceback.print_exc(limit=0)
        sys.exit(90)
    except (MemoryError, RecursionError):
        # Python raises these for a source that is nested too deeply for its compiler
        print("the source is nested too deeply", file=sys.stderr)
        sys.exit(90)
    # exit() and quit() come from the site module, which is not loaded here
    builtins.exit = builtins.quit = sys.exit
    module = types.ModuleType(name)
    module.__file__ = SOURCE
    sys.modules[name] = module
    if name == "solution":
        # in the builtins, so that the module's own globals are those that the solution defined
        module.__dict__["__builtins__"] = {**vars(builtins), **provided(source)}
        if os.path.exists("/code/prompt.py"):
            with open("/code/prompt.py", encoding="utf-8") as file:
                exec(compile(file.read(), "prompt.py", "exec"), module.__dict__)
    sys.argv = ["solution.py"]
    make_room(source)
    exec(code, module.__dict__)
    return module.__dict__


def private_stdout():
    """Standard output, for the harness alone; from now on the solution's prints go to standard error."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return kept


def call_function():
    sys.set_int_max_str_digits(0)
    task = json.loads(sys.stdin.read())
    out = private_stdout()
    found = load("solution")
    function = found.get(task["function"])
    if function is None and "Solution" in found:
        function = getattr(found["Solution"](), task["function"], None)
    if function is None:
        sys.exit(f"no function {task['function']}")
    result = function(*map(json.loads, task["lines"]))
    try:
        text = json.dumps(result)
    except (TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(91)
    with open(out, "w") as file:
        file.write(text)


def run_unit_test():
    sys.path.insert(0, "/code")
    import harness_test

    sys.set_int_max_str_digits(0)
    harness_test.run_unit_test(load, provided)


MODES = {"stdin": lambda: load("__main__"), "function": call_function, "unit_test": run_unit_test}

if __name__ == "__main__":
    MODES[sys.argv[1]]()
