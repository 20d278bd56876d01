"""Sources of problems: JSONL files, and reasoning-gym's generators."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

from megatron_ring.config.rl import GYM_PREFIX
from megatron_ring.data.corpus.documents import read_records
from megatron_ring.data.json_text import parse_json
from megatron_ring.data.prompts.problem_lines import Problem, read_problem
from megatron_ring.errors import DataError

GYM_DOMAIN = "reasoning_gym"
GYM_SIZE = 100_000
"""Number of problems of a generated source without a size parameter."""

HASH_DEPENDENT = frozenset(
    {"codeio", "isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication"}
    | {"ransom_note", "word_ladder"}
)
"""Data sets whose problems depend on Python's hash seed and so differ between processes (reasoning-gym 0.1.25)."""

UNSUITABLE = {
    "acre": "its problems depend on the size",
    "boxnet": "its problems have no answer",
    "composite": "it is a mixture; blend its data sets by weight instead",
    "graph_color": "its problems have no answer",
    "propositional_logic": "its problems have no answer",
    "rubiks_cube": "its problems have no answer",
    "rush_hour": "its problems have no answer",
}
"""Data sets that cannot be learned from, and why (reasoning-gym 0.1.25)."""


class PromptSource(Protocol):
    """A fixed list of problems. Equal fingerprints mean equal lists."""

    name: str
    num_left_out: int
    """Problems left out because their solve rate is outside the limits."""
    domains: frozenset[str]
    """Domains of its problems; each needs a reward function."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...


def open_source(
    source: str, *, solve_rate_min: float = 0.0, solve_rate_max: float = 1.0, freezing: bool = False
) -> PromptSource:
    """The problems that ``source`` names: a JSONL file, or ``reasoning_gym:NAME?PARAMETERS``.

    Args:
        source: see :class:`JsonlSource` and :class:`GymSource`.
        solve_rate_min: problems of a file with a recorded ``solve_rate`` below this are left out.
        solve_rate_max: and those above this.
        freezing: allow generators whose problems differ between processes.

    Raises:
        DataError: the source cannot be read, or has no problems.
    """
    if source.startswith(GYM_PREFIX):
        return GymSource.parse(source, freezing=freezing)
    return JsonlSource(source, solve_rate_min=solve_rate_min, solve_rate_max=solve_rate_max)


class JsonlSource:
    """Problems of a JSONL file.

    Example of a line: ``{"prompt": "1 + 1 = ?", "domain": "math", "answer": "2", "solve_rate": 0.4}``.
    :mod:`megatron_ring.data.prompts.problem_lines` lists all keys.
    """

    def __init__(self, path: str | Path, *, solve_rate_min: float = 0.0, solve_rate_max: float = 1.0) -> None:
        self.name = str(path)
        self._problems: list[Problem] = []
        self.num_left_out = 0
        digest = hashlib.blake2b(f"{solve_rate_min} {solve_rate_max}".encode(), digest_size=8)
        for record in read_records([path]):
            digest.update(record.raw)
            fields = parse_json(record.raw, record.origin, unique=True) if record.is_json else None
            if not isinstance(fields, dict):
                raise DataError(
                    f"{record.origin} is not a JSON object; name a .jsonl file with one problem per line"
                )
            rate = fields.get("solve_rate")
            if rate is not None and not _is_rate(rate):
                raise DataError(f"{record.origin}: solve_rate={rate!r} must be a number from 0 to 1")
            problem = read_problem(fields, record.origin)
            if rate is None or solve_rate_min <= rate <= solve_rate_max:
                self._problems.append(problem)
            else:
                self.num_left_out += 1
        if not self._problems:
            some = (
                f"all {self.num_left_out} problems are outside solve rates {solve_rate_min} to {solve_rate_max}; "
                "widen --solve-rate-min and --solve-rate-max"
            )
            raise DataError(
                f"{path}: {some if self.num_left_out else 'contains no problems; write one JSON object per line'}"
            )
        self.domains = frozenset(problem.domain for problem in self._problems)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Problem:
        return self._problems[index]


class GymSource:
    """A reasoning-gym data set, whose problems are generated when they are drawn.

    Example: ``reasoning_gym:chain_sum?min_terms=2&max_terms=3&seed=7&size=10000``. ``seed`` and ``size`` exist for every
    data set; the other parameters are the data set's own. reasoning-gym makes problem i from seed + i, so the seed is
    hashed first: seeds 7 and 8 share no problems, except for rare repetitions.
    """

    def __init__(
        self,
        dataset: str,
        *,
        size: int = GYM_SIZE,
        seed: int = 0,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = GYM_PREFIX + dataset
        self.num_left_out = 0
        self.domains = frozenset({GYM_DOMAIN})
        self._dataset = dataset
        digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
        # numpy's seeds must be below 2**32
        spread = int.from_bytes(digest) % (1 << 31)
        create = _gym_factory()
        try:
            self._entries = create(dataset, size=size, seed=spread, **(parameters or {}))
        except (ValueError, TypeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{self.name}: {reason}; see reasoning-gym's data sets and their parameters"
            ) from None
        identity = [dataset, size, seed, sorted((parameters or {}).items()), version("reasoning-gym")]
        self.fingerprint = hashlib.blake2b(repr(identity).encode(), digest_size=8).hexdigest()

    @classmethod
    def parse(cls, source: str, *, freezing: bool = False) -> GymSource:
        """The data set of ``reasoning_gym:NAME?PARAMETERS``. Raises DataError as :func:`open_source`."""
        name, _, query = source.removeprefix(GYM_PREFIX).partition("?")
        if name in UNSUITABLE:
            raise DataError(f"{source}: {UNSUITABLE[name]}; use another data set")
        if name in HASH_DEPENDENT and not freezing:
            raise DataError(
                f"{source}: its problems differ between processes (Python's hash seed); freeze them with "
                f"tools/freeze_prompts.py --source '{source}' --output FILE.jsonl and name that file"
            )
        try:
            parameters = {key: _value(text) for key, text in parse_qsl(query, strict_parsing=bool(query))}
        except ValueError:
            raise DataError(f"{source}: parameters must be name=value, joined by &; see --help") from None
        size, seed = parameters.pop("size", GYM_SIZE), parameters.pop("seed", 0)
        if not isinstance(size, int) or not isinstance(seed, int) or size < 1:
            raise DataError(f"{source}: size={size} and seed={seed} must be integers, the size positive")
        return cls(name, size=size, seed=seed, parameters=parameters)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Problem:
        # through JSON, so that the verifier gets the same values here as from a checkpoint or another process
        entry = json.loads(json.dumps(self._entries[index], default=_plain))
        return Problem(
            domain=GYM_DOMAIN,
            text=entry["question"],
            messages=({"role": "user", "content": entry["question"]},),
            reference={"dataset": self._dataset, "entry": entry},
        )


def _gym_factory() -> Any:
    try:
        from reasoning_gym.factory import create_dataset
    except ImportError as error:
        raise DataError(
            f"reasoning-gym cannot be imported ({error}); pip install reasoning-gym, or name a JSONL file of problems"
        ) from error
    return create_dataset


def _plain(value: Any) -> Any:
    """Values that JSON cannot represent: numpy's numbers become Python's, others (fractions) become strings."""
    return value.item() if hasattr(value, "item") else str(value)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
