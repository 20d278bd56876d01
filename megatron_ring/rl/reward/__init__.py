"""Rewards: which verifier scores which domain, and which problems a verifier can check.

One folder per kind of verifier (``mathematics``, ``gym``, ``code``), one for programs that a model wrote (``sandbox``), one
for the processes in which verifiers run (``workers``).
"""
