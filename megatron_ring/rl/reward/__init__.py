"""Rewards: who judges a response, in processes that may hang or die without the trainer noticing."""
