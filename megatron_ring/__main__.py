"""``python -m megatron_ring`` is the ``ring`` command; torchrun starts it with ``-m megatron_ring``."""

from megatron_ring.launch.ring import main

# checkpoint writers spawn and import this file again
if __name__ == "__main__":
    main()
