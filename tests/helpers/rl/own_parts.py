"""An objective and an advantage estimator of a user's own: together they are DAPO with group_mean."""

import numpy as np

from megatron_ring.rl.learn.objective import PolicyLoss, register
from megatron_ring.rl.learn.objective.policy_losses import token_ratio, tokens
from megatron_ring.rl.rollout.inprocess import InProcessEngine


def half(rewards_G: np.ndarray) -> np.ndarray:
    """Half of what group_mean gives."""
    return (rewards_G - rewards_G.mean()) / 2


def twice(logp_T, log_ratio_T, microbatch, config):
    """Twice PPO's surrogate."""
    surrogate = token_ratio(logp_T, log_ratio_T, microbatch, config)
    return surrogate._replace(value_T=2 * surrogate.value_T)


def too_few(rewards_G: np.ndarray) -> np.ndarray:
    """One number for a whole group."""
    return rewards_G.mean(keepdims=True)


def unable(rewards_G: np.ndarray) -> np.ndarray:
    """Nothing."""
    raise ArithmeticError("cannot compare")


class Dying(InProcessEngine):
    """An engine that fails twice: at its first call, and then while it is closed."""

    def generate(self, requests, sampling, budget=None):
        raise ArithmeticError("cannot decode")

    def close(self):
        raise OSError("is gone already")


doubled = PolicyLoss(surrogate=twice, token_weight="1", denominator=tokens)
register("mine", doubled)
