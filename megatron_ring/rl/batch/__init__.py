"""C3PO's token budget: which sampled tokens an optimizer step trains on (paper, 3.2, eq. 3 and figure 3).

Pure: whole numbers in, whole numbers out; every process that is given the same candidates chooses the same.
It runs after rewards and advantages are known and before the backward pass.

Invariants (one test each), counted in response tokens summed over data-parallel ranks:

- a minibatch holds exactly Phi tokens, or all that there are: what is missing is counted as the shortfall,
  and the caller still divides by Phi (``overshoot="response"`` may hold more: up to one response);
- no token is in two minibatches, nor in two steps when its rest is carried over;
- every token on offer is accounted for: sampled = selected + cut + carried + wasted + excluded;
- the choice depends on the seed, never on the order in which candidates are listed, and an order other than
  arrival never on who finished first;
- what was carried into this step comes before anything new, oldest first.
"""

from megatron_ring.rl.batch.select import select
from megatron_ring.rl.batch.selection import BudgetCounts, Candidate, Selection
from megatron_ring.rl.batch.selection_stats import SelectionStats, audit

__all__ = ["BudgetCounts", "Candidate", "Selection", "SelectionStats", "audit", "select"]
