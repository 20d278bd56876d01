"""Rules between settings, one file per topic; ``config/check.py`` and ``config/stages.py`` have them in order.

A rule reads no file. It may assume that single values are in their ranges and that earlier rules hold.
"""

from collections.abc import Callable, Iterator

from megatron_ring.config.run import RunConfig

Rule = Callable[[RunConfig, int], Iterator[str]]
"""(config, number of processes) -> one line per problem: value, rule, remedy."""
