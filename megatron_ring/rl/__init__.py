"""Reinforcement learning on a fixed token budget: rollouts, rewards, advantages, C3PO and other objectives."""
