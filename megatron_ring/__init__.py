"""megatron_ring: mixture-of-experts reasoning models, from text to reasoner, on Megatron-Core."""

__version__ = "0.1.0"
