"""Errors a user can cause. Each message names the value, the rule it breaks and the remedy, in one line.

Entry points turn a RingError into that line on stderr and exit code 2 (see ``megatron_ring.launch.entry``);
anything else is a bug of ours and keeps its traceback.
"""


class RingError(Exception):
    """Base of every error that a user, not the code, has to resolve."""

    exit_code = 2
    speaks: bool | None = None
    """Should this rank print the line? None: not decided yet."""

    def __init__(self, message: object) -> None:
        # a name of a file that is no UTF-8 holds half a surrogate pair, which no store or socket takes
        super().__init__(str(message).encode("utf-8", "backslashreplace").decode())


class ConfigError(RingError):
    """A configuration value breaks a rule: raised before any process group exists."""


class DataError(RingError):
    """A corpus, tokenizer or sample file is missing, corrupt or does not fit the model."""


class CheckpointError(RingError):
    """A checkpoint is missing, incomplete, corrupt, or belongs to another model."""


class RolloutError(RingError):
    """A generation engine failed, or returned something that cannot be used."""


class RewardError(RingError):
    """A verifier or the code sandbox is missing or misconfigured."""


class Interrupted(RingError):
    """The user pressed Ctrl-C."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__(
            "interrupted (SIGINT, Ctrl-C); what has been saved stays. SIGTERM lets a run save before it leaves"
        )
