"""The console's progress lines, and numbers formatted for people."""

from collections import deque
from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

# steps whose mean duration predicts the rest
_ETA_STEPS = 100


class ProgressLine:
    """A line every ``log_interval`` steps, at least ``least_seconds`` apart; coloured in a terminal."""

    def __init__(
        self, total_steps: int, log_interval: int, least_seconds: float, shown: tuple[str, ...]
    ) -> None:
        self._total_steps = total_steps
        self._log_interval = log_interval
        self._least_seconds = least_seconds
        self._printed_at = 0.0
        self._shown = shown
        self._console = Console(highlight=False, soft_wrap=True)
        self._ends: deque[float] = deque(maxlen=_ETA_STEPS + 1)
        self._first_step_seconds: float | None = None
        self._tokens = 0
        self._seconds = 0.0
        self._means: list[float] = []

    def add(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        tokens: int,
        seconds: float,
        mfu: float | None,
        wall_seconds: float,
    ) -> None:
        """Count one step; ``wall_seconds`` is the time from the run's start to the step's end."""
        is_first = self._first_step_seconds is None
        if is_first:
            self._first_step_seconds = seconds
        self._ends.append(wall_seconds)
        self._tokens += tokens
        self._seconds += seconds
        if self._shown and self._shown[0] in values:
            self._means.append(values[self._shown[0]])
        is_due = step % self._log_interval == 0 and wall_seconds >= self._printed_at + self._least_seconds
        if not (is_first or is_due or step == self._total_steps):
            return
        self._printed_at = wall_seconds
        parts = {name: values[name] for name in self._shown if name in values}
        if self._means:
            parts = {self._shown[0]: 0.0, **parts, self._shown[0]: sum(self._means) / len(self._means)}
        texts = [_labelled(name, value) for name, value in parts.items()]
        texts.append(count(self._tokens / self._seconds) + " tok/s")
        if mfu is not None:
            texts.append(f"MFU {100 * mfu:.1f}%")
        if step < self._total_steps:
            texts.append(f"ETA {duration((self._total_steps - step) * self._step_seconds())}")
        self._print("step", "bold cyan", step, texts)
        self._tokens, self._seconds, self._means = 0, 0.0, []

    def show_eval(self, step: int, values: Mapping[str, float]) -> None:
        self._print("eval", "bold green", step, [_labelled(name, value) for name, value in values.items()])

    def _step_seconds(self) -> float:
        """Mean seconds between the last steps, validations and saves included; the first step, a warm-up, is left out."""
        if len(self._ends) < 2:
            assert self._first_step_seconds is not None
            return self._first_step_seconds
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)

    def _print(self, word: str, style: str, step: int, texts: list[str]) -> None:
        width = len(str(self._total_steps))
        line = Text.assemble((word, style), f" {step:>{width}}/{self._total_steps}")
        for text in texts:
            line.append(" | ", style="dim")
            line.append(text)
        self._console.print(line)


_COUNTS = ("problems",)
"""Values shown without decimals."""


def _labelled(name: str, value: float) -> str:
    shown = f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
    if name == "lr":
        shown = f"{value:.2e}"
    elif name in _COUNTS:
        shown = f"{value:.0f}"
    return f"{name.replace('_', ' ')} {shown}"


def count(value: float) -> str:
    """A large number in three digits. Example: ``count(16_801_974_272)`` is ``"16.8G"``."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:#.3g}".rstrip(".") + unit
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """A duration in its two largest units. Example: ``duration(7509)`` is ``"2h 05m"``."""
    whole = round(seconds)
    for unit, small, size, part in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // part:02d}{small}"
    return f"{whole}s"
