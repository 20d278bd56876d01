"""The topics of a report, and the quantities it begins with. A metric that no topic names goes to ``OTHER``."""

from collections.abc import Iterable

SPEED = "Speed"
TOPICS: dict[str, tuple[str, ...]] = {
    "What was learnt": (
        "reward", "loss", "perplexity", "accuracy", "response_length", "problems", "entropy", "mtp_loss",
        "reward_std", "response_length_std", "cut_share", "empty_share", "status/", "reward/", "accuracy/", "epoch",
    ),
    "Optimizer step": (
        "grad_norm", "lr", "clip_fraction", "policy_loss", "kl", "approx_kl", "ratio", "ratio_max",
        "clamped_fraction", "skipped", "value_loss", "value_error", "value_mean", "return_mean",
    ),
    "Budget": (
        "c3po/utilisation", "c3po/shortfall", "loss_tokens", "generated_tokens", "c3po/", "uninformative_groups",
        "stale_responses", "rollout_rounds", "global_batch_size", "consumed_samples",
    ),
    "Packing": ("packing/fill", "packing", "packing/", "conversations"),
    "Experts": (
        "max_violation", "balance_loss", "router_z_loss", "router_flip_rate", "missing_routes", "router_flip_rate/",
    ),
    "Mismatch of rollout and trainer": ("mismatch", "mismatch_max", "older_policy_share", "masked_fraction"),
    SPEED: ("tokens_per_second", "mfu"),
}  # fmt: skip
"""Topic -> names of metrics, the most important first; a name that ends in ``/`` is a prefix."""

OTHER = "Other"


def by_topic(names: Iterable[str]) -> dict[str, list[str]]:
    """Topic -> the ``names`` that belong to it, in the order above; empty topics are left out.

    Example: ``by_topic(["lr", "mine", "reward"])`` is ``{"What was learnt": ["reward"], "Optimizer step": ["lr"],
    "Other": ["mine"]}``.
    """
    left = list(dict.fromkeys(names))
    found: dict[str, list[str]] = {}
    # an exact name wins over a prefix of another topic
    full = {entry: topic for topic, entries in TOPICS.items() for entry in entries}
    for topic, entries in TOPICS.items():
        for entry in entries:
            for name in [n for n in left if n == entry or (entry.endswith("/") and n.startswith(entry))]:
                if full.get(name, topic) == topic:
                    found.setdefault(topic, []).append(name)
                    left.remove(name)
    return {**found, OTHER: left} if left else found


def headline(names: Iterable[str]) -> list[str]:
    """The quantities to look at first: the paper's curves for reinforcement learning, else loss and speed."""
    names = set(names)
    paper = (
        "reward",
        "response_length",
        "entropy",
        "grad_norm",
        "loss_tokens",
        "tokens_per_second",
        "mfu",
        "lr",
    )
    usual = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu")
    return [name for name in (paper if "reward" in names else usual) if name in names]
