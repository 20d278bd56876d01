"""The processes in which verifiers run: the pool in the trainer, the workers, and their isolation."""
