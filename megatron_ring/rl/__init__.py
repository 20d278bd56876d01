"""Reinforcement learning on a fixed token budget: rollouts, rewards, advantages, C3PO and its rivals."""
