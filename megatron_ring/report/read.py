"""Read a run's folder: metrics.jsonl, and config.toml and sample.txt if they exist."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ring.config import RunConfig
from megatron_ring.config.load import config_from_mapping, read_toml
from megatron_ring.errors import DataError
from megatron_ring.observe.metrics_file import FIGURES, is_number, read_records
from megatron_ring.observe.responses import FILE, read_samples
from megatron_ring.plain import read_plain


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One quantity over the run, finite values only. Example: ``Series(steps=[1, 2], values=[8.3, 8.1])``."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What is known of one run.

    Example: ``Run(name="tiny", folder=Path("runs/tiny"), starts=[{"kind": "run", ...}],
    train=[{"kind": "train", "step": 1, "loss": 8.3, ...}], evals=[], ended=True, config=None, sample=None)``
    """

    name: str
    folder: Path
    starts: list[dict[str, Any]]
    train: list[dict[str, Any]]
    """Records of steps, in order; at least one."""
    evals: list[dict[str, Any]]
    """Records of validations, in order, one per step."""
    ended: bool
    """True when the run ended normally after its last step."""
    wall_seconds: float
    config: RunConfig | None
    sample: str | None
    """Text the trained model wrote."""
    responses: tuple[dict[str, Any], ...] = ()
    """Best and worst responses of the last step in ``samples.jsonl``."""

    def series(self, name: str) -> Series:
        """The values of ``name`` over the steps. Example: ``run.series("grad_norm")``."""
        return _series(self.train, name)

    def eval_series(self, name: str) -> Series:
        """The values of ``name`` over the validations."""
        return _series(self.evals, name)

    @property
    def last_step(self) -> int:
        return self.train[-1]["step"]

    @property
    def world_size(self) -> int:
        """Processes of the latest start; 1 if no start recorded it."""
        return self.starts[-1].get("world_size", 1) if self.starts else 1


def read_run(path: str | Path) -> Run:
    """The run in folder ``path``, or that of the metrics file ``path``.

    Raises DataError without metrics or a single step, ConfigError for a config.toml that does not load.
    """
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    records = read_records(file)
    train = [record for record in records if record["kind"] == "train"]
    if not train:
        raise DataError(f"metrics file {file} holds no training step; train a step, or name another run")
    for record in train:
        missing = [name for name in FIGURES if name not in record]
        if missing:
            raise DataError(
                f"metrics file {file}: step {record['step']} has no {missing[0]}; repair the file or name another run"
            )
    # a resume may validate the same step again: the later record counts
    evals = {record["step"]: record for record in records if record["kind"] == "eval"}
    folder = file.parent
    config, sample = folder / "config.toml", folder / "sample.txt"
    return Run(
        name=folder.resolve().name,
        folder=folder,
        starts=[record for record in records if record["kind"] == "run"],
        train=train,
        evals=[evals[step] for step in sorted(evals)],
        ended=records[-1]["kind"] == "end",
        wall_seconds=max(record.get("wall_seconds", 0.0) for record in records),
        config=config_from_mapping(read_toml(config)[1]) if config.exists() else None,
        sample=_text(sample) if sample.exists() else None,
        responses=_last_responses(folder / FILE),
    )


def _text(path: Path) -> str:
    try:
        return read_plain(path).decode("utf-8", "replace")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; repair or move the file") from None


def _last_responses(path: Path) -> tuple[dict[str, Any], ...]:
    rows = read_samples(path) if path.exists() else []
    return tuple(row for row in rows if row["step"] == rows[-1]["step"])


def _series(records: list[dict[str, Any]], name: str) -> Series:
    pairs = [(record["step"], record[name]) for record in records if is_number(record.get(name))]
    return Series(steps=[step for step, _ in pairs], values=[float(value) for _, value in pairs])
