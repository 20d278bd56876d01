"""Rules between settings, one file per topic; ``config/check.py`` and ``config/stages.py`` have them in order.

A rule looks at no file and may rely on single values being in their ranges and on the rules before it.
"""

from collections.abc import Callable, Iterator

from megatron_ring.config.run import RunConfig

Rule = Callable[[RunConfig, int], Iterator[str]]
"""(config, number of processes) -> one line per problem: value, rule, remedy."""
