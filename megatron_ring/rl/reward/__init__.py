"""Rewards: who judges which domain, and what may be judged. One room per kind of verifier, and one for its processes."""
