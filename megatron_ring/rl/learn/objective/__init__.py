"""What an RL step minimises: one objective class around a registry of small pure functions."""

from megatron_ring.rl.learn.objective.policy import PolicyObjective, loss_tokens, mean_mismatch, metrics
from megatron_ring.rl.learn.objective.policy_losses import POLICY_LOSSES, PolicyLoss, register

__all__ = [
    "POLICY_LOSSES",
    "PolicyLoss",
    "PolicyObjective",
    "loss_tokens",
    "mean_mismatch",
    "metrics",
    "register",
]
