"""The stages: which sections and rules of a config each one has, which files it needs, and its entry point.

A stage is one entry here and one file, which may be anybody's: ``register_stage(StageSpec(...))``.
"""

from dataclasses import dataclass

from megatron_ring.config import inputs
from megatron_ring.config.importable import require_own_modules
from megatron_ring.config.inputs import Input
from megatron_ring.config.rules import Rule, budget, data, objective, rollout, training
from megatron_ring.config.settings import is_importable, sections
from megatron_ring.errors import ConfigError

COMMON_SECTIONS = ("model", "parallel", "train", "data", "checkpoint", "logging")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """One stage.

    Example: ``StageSpec(name="distil", does="learn from a teacher", sections=COMMON_SECTIONS,
    rules=(training.number_of_steps, training.batches), inputs=(inputs.corpus, inputs.checkpoints),
    entry="my_stages.distil:distil")``.
    """

    name: str
    does: str
    """Its line in ``ring --help``."""
    sections: tuple[str, ...]
    """Sections of a config that it reads, and that are printed."""
    rules: tuple[Rule, ...]
    """The stage's own rules, beside the rules of every stage (``config/check.py``), in order."""
    inputs: tuple[Input, ...]
    """What must be on disk before a process starts, in order."""
    entry: str
    """``module:function``; the function takes the RunConfig and runs the stage on this process."""


STAGES: dict[str, StageSpec] = {}
"""Stages by name."""


def register_stage(spec: StageSpec) -> None:
    """Add a stage.

    Raises:
        ValueError: the name is taken or empty, a section does not exist, or the entry is no ``module:function``.
    """
    if spec.name in STAGES:
        raise ValueError(f"stage {spec.name} exists")
    if spec.name.split() != [spec.name]:
        raise ValueError(f"stage {spec.name!r}: its name must be one word")
    if not is_importable(spec.entry):
        raise ValueError(f"stage {spec.name}: entry={spec.entry!r} must have the form module:function")
    for section in spec.sections:
        if section not in sections():
            raise ValueError(f"stage {spec.name}: section {section} is none of {', '.join(sections())}")
    STAGES[spec.name] = spec


def stage_spec(name: str) -> StageSpec:
    """The stage of this name; ConfigError for an unknown one."""
    if name not in STAGES:
        raise ConfigError(f"stage {name} does not exist; try one of {', '.join(STAGES)}")
    return STAGES[name]


register_stage(
    StageSpec(
        name="pretrain",
        does="pre-train a model on a corpus",
        sections=COMMON_SECTIONS,
        rules=(training.number_of_steps, training.batches, data.corpus),
        inputs=(inputs.corpus, inputs.tokenizer_if_named, inputs.checkpoints),
        entry="megatron_ring.stages.pretrain:pretrain",
    )
)
register_stage(
    StageSpec(
        name="sft",
        does="fine-tune a model on conversations",
        sections=(*COMMON_SECTIONS, "sft"),
        rules=(training.batches, data.chat_template, data.fine_tuning),
        inputs=(inputs.conversations, inputs.tokenizer, inputs.checkpoints),
        entry="megatron_ring.stages.sft:train_sft",
    )
)
register_stage(
    StageSpec(
        name="rl",
        does="train a model by reinforcement learning with C3PO",
        sections=(*COMMON_SECTIONS, "rollout", "budget", "objective", "reward"),
        rules=(
            training.number_of_steps,
            data.chat_template,
            rollout.prompts,
            rollout.lengths,
            rollout.rewards,
            objective.groups,
            objective.advantages,
            objective.objective,
            objective.mismatch,
            objective.replay,
            objective.further_tokens,
            rollout.sampling,
            budget.budget,
            budget.supply,
        ),
        inputs=(inputs.problems, inputs.tokenizer, inputs.checkpoints, require_own_modules),
        entry="megatron_ring.stages.rl:train_rl",
    )
)
