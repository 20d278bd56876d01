"""Verifiers' processes: a pool, the walls around them, and how each of them ends."""
