"""Generation: what an engine is asked and answers, and the engine that decodes on the training weights."""

from megatron_ring.rl.rollout.inprocess import InProcessEngine
from megatron_ring.rl.rollout.protocol import Request, RolloutEngine, SamplingParams

__all__ = ["InProcessEngine", "Request", "RolloutEngine", "SamplingParams"]
