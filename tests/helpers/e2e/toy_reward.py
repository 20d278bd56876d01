"""A reward that a random model earns half the time: a verifier without libraries, for tests of the loop."""

from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.rl.types import RewardResult


def even(prompt: Prompt, text: str) -> RewardResult:
    """1 where the answer has an even number of characters."""
    right = len(text) % 2 == 0
    return RewardResult(score=float(right), status="correct" if right else "wrong")


def never(prompt: Prompt, text: str) -> RewardResult:
    """0 whatever the answer."""
    return RewardResult(score=0.0, status="wrong")


def one(prompt: Prompt, text: str) -> RewardResult:
    """1 whatever the answer."""
    return RewardResult(score=1.0, status="correct")
