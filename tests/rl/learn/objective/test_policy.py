"""Every objective against plain double-precision loops over single responses: loss, gradients, metrics."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_ring.config.rl import ObjectiveConfig, clip_bounds
from megatron_ring.config.settings import settings
from megatron_ring.model.build import Logits
from megatron_ring.rl.batch.microbatch import build_microbatch
from megatron_ring.rl.learn.objective import POLICY_LOSSES, PolicyLoss, PolicyObjective, metrics, register
from megatron_ring.rl.learn.objective.divergence import k3
from megatron_ring.rl.learn.objective.policy_losses import StepFacts, clipped_surrogate, token_ratio, tokens
from megatron_ring.rl.types import Pick
from megatron_ring.train.engine import StepReport
from tests.helpers.rl.policy_cases import (
    LENGTHS,
    NUM_TOKENS,
    PACKINGS,
    PICKS,
    VOCAB,
    columns_of,
    grid,
    off_policy,
    plain_loss,
    rollouts,
    with_columns,
)

FACTS = StepFacts(token_budget=100, dp_size=1, max_response_length=16)
PADDED = 256

OPTIONS = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.6, "entropy_coef": 0.01},
    "asymmetric": {"eps_clip": 0.1, "eps_clip_high": 0.28},
    "dual": {"eps_clip_c": 1.05, "kl_loss_coef": 0.0},
    "k1": {"kl_loss_coef": 0.3, "kl_loss_type": "k1"},
    "k2": {"kl_loss_coef": 0.3, "kl_loss_type": "k2"},
    "k3": {"kl_loss_coef": 0.3, "kl_loss_type": "k3"},
    "entropy": {"entropy_coef": 0.2, "kl_loss_coef": 0.0},
    "icepop": {"mismatch_correction": "icepop", "mismatch_low": 0.6, "mismatch_high": 1.8},
    "tis": {"mismatch_correction": "tis", "mismatch_high": 1.5},
    "mis": {"mismatch_correction": "mis", "mismatch_low": 0.6, "mismatch_high": 1.8},
    "mask": {"mismatch_correction": "mask", "mismatch_low": 0.6, "mismatch_high": 1.8},
    "lower": {"eps_clip": 1.0, "eps_clip_high": 0.1},
    "rollout": {"old_logprobs": "rollout"},
    "current": {"old_logprobs": "current", "mismatch_correction": "icepop"},
    "all": {
        "temperature": 1.3,
        "eps_clip_high": 0.28,
        "eps_clip_c": 2.0,
        "kl_loss_coef": 0.1,
        "entropy_coef": 0.05,
        "mismatch_correction": "icepop",
    },
}


class Problem:
    """Random logits per response, other policies around them, and both ways to the loss."""

    def __init__(self, objective: str, options: dict):
        options = dict(options)
        self.temperature = options.pop("temperature", 1.0)
        self.config = ObjectiveConfig(objective=objective, **options)
        generator = torch.Generator().manual_seed(5)
        self.logits = [2 * torch.randn(r, VOCAB, generator=generator) for _, r in LENGTHS]
        plain = rollouts()
        own = []
        for logits_RV, sample in zip(self.logits, plain, strict=True):
            picked_R1 = torch.from_numpy(sample.response.tokens_R).long()[:, None]
            logp_RV = (logits_RV / self.temperature).log_softmax(-1)
            own.append(logp_RV.gather(1, picked_R1).squeeze(1))
        self.scored, self.samples = off_policy(own, plain)
        self.objective = PolicyObjective(config=self.config, facts=FACTS, temperature=self.temperature)

    def microbatches(self, packing: str):
        parts = grid(self.samples, packing)
        slots = [m.num_slots for m in parts]
        named = {"old_logp_T": self.scored.old, "ref_logp_T": self.scored.ref}
        return with_columns(parts, {n: columns_of(v, self.samples, packing, slots) for n, v in named.items()})

    def expected(self):
        logits = [row.double().requires_grad_() for row in self.logits]
        loss = plain_loss(
            logits,
            self.samples,
            self.scored,
            self.config,
            temperature=self.temperature,
            token_budget=FACTS.token_budget,
            max_response_length=FACTS.max_response_length,
        )
        loss.backward()
        return loss.item(), [row.grad for row in logits]

    def packed_logits(self, packing: str, noise: float = 0.0):
        """[T, padded V] per microbatch; what stands at prompt and padding positions is ``noise``."""
        generator = torch.Generator().manual_seed(6)
        for row, microbatch in zip(PACKINGS[packing], grid(self.samples, packing), strict=True):
            out_TV = noise * torch.randn(microbatch.num_slots, PADDED, generator=generator)
            place = 0
            for index in row:
                prompt = LENGTHS[index][0]
                first, stop = place + prompt - 1, PICKS[index].stop
                out_TV[first : first + stop, :VOCAB] = self.logits[index][:stop]
                place += prompt + stop - 1
            yield out_TV

    def computed(self, packing: str, noise: float = 0.0):
        microbatches = self.microbatches(packing)
        weight = self.objective.local_denominator(microbatches)
        loss, gradients, sums = 0.0, [torch.zeros(r, VOCAB) for _, r in LENGTHS], {}
        rows = zip(PACKINGS[packing], microbatches, self.packed_logits(packing, noise), strict=True)
        for row, microbatch, logits_TV in rows:
            leaf_TV = logits_TV.requires_grad_()
            terms = self.objective(as_logits(leaf_TV * 1.0), microbatch)
            (terms.loss_sum / weight).backward()
            loss += terms.loss_sum.item() / weight
            for name, value in terms.sums.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            assert not leaf_TV.grad[microbatch.loss_mask_T == 0].any(), "only loss tokens have gradients"
            place = 0
            for index in row:
                prompt = LENGTHS[index][0]
                first, stop = place + prompt - 1, PICKS[index].stop
                gradients[index][:stop] = leaf_TV.grad[first : first + stop, :VOCAB]
                place += prompt + stop - 1
        return loss, gradients, sums


def as_logits(main_TV: torch.Tensor) -> Logits:
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return Logits(main_TV=main_TV, mtp_TV=(), vocab_start=0, vocab_size=VOCAB, tp_group=alone)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("objective", POLICY_LOSSES)
def test_loss_and_gradient_of_the_logits_are_those_of_plain_loops(objective, options):
    problem = Problem(objective, options)
    loss, gradients = problem.expected()
    for packing in ("one", "holes"):
        own_loss, own_gradients, _ = problem.computed(packing, noise=2.0)
        assert own_loss == pytest.approx(loss, rel=2e-6, abs=1e-7)
        own, expected = torch.cat(own_gradients).double(), torch.cat(gradients)
        assert (own - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("objective", POLICY_LOSSES)
def test_the_cases_reach_every_branch(objective):
    """A clip, a bound or a dual clip that never bites would prove nothing."""
    problem = Problem(objective, OPTIONS["all"])
    _, _, sums = problem.computed("two")
    assert 0 < sums["clip_fraction"] < NUM_TOKENS
    assert 0 < sums["masked_fraction"] < NUM_TOKENS
    if objective != "cispo":
        without = Problem(objective, {**OPTIONS["dual"], "eps_clip_c": 0.0}).expected()[1]
        with_dual = Problem(objective, OPTIONS["dual"]).expected()[1]
        assert not torch.allclose(torch.cat(without), torch.cat(with_dual))


@pytest.mark.parametrize("objective", POLICY_LOSSES)
def test_packing_and_number_of_microbatches_change_nothing(objective):
    problem = Problem(objective, OPTIONS["all"])
    loss, gradients, sums = problem.computed("one")
    for packing in ("two", "four", "holes"):
        other_loss, other, other_sums = problem.computed(packing, noise=1.0)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert other_sums == pytest.approx(sums, rel=1e-6)
        assert (torch.cat(other) - torch.cat(gradients)).norm() < 1e-6 * torch.cat(gradients).norm()


def test_c3po_divides_by_phi_however_many_tokens_there_are():
    objective = PolicyObjective(
        config=ObjectiveConfig(), facts=StepFacts(token_budget=4096, dp_size=4, max_response_length=16)
    )
    assert objective.local_denominator(grid(rollouts(), "two")) == 1024
    assert objective.local_denominator([build_microbatch(rollouts(), [], 32)]) == 1024


def test_what_the_others_divide_by_is_a_sum_over_the_step():
    parts = grid(rollouts(), "holes")
    weights = {
        name: PolicyObjective(config=ObjectiveConfig(objective=name), facts=FACTS).local_denominator(parts)
        for name in POLICY_LOSSES
    }
    expected = {"c3po": 100, "grpo": 12, "gspo": 12, "dapo": NUM_TOKENS, "cispo": NUM_TOKENS, "dr_grpo": 192}
    assert weights == expected


def test_on_policy_the_ratio_is_exactly_1_with_current_log_probabilities():
    problem = Problem("c3po", {"old_logprobs": "current"})
    for microbatch, logits_TV in zip(problem.microbatches("two"), problem.packed_logits("two"), strict=True):
        terms = problem.objective(as_logits(logits_TV), microbatch)
        assert terms.sums["ratio"].item() == microbatch.num_loss_tokens
        assert terms.peaks["ratio_max"].item() == 1.0
        assert terms.sums["clip_fraction"] == 0


def test_metrics_are_what_they_say():
    problem = Problem("c3po", OPTIONS["icepop"])
    _, _, sums = problem.computed("four")
    gaps = torch.cat(
        [
            (problem.scored.old[p.index] - torch.from_numpy(problem.samples[p.index].response.logprobs_R))[
                p.start : p.stop
            ]
            for p in PICKS
        ]
    )
    assert sums["tokens"] == NUM_TOKENS
    assert sums["mismatch"] == pytest.approx(gaps.abs().sum().item(), rel=1e-5)
    outside = ((gaps.exp() < 0.6) | (gaps.exp() > 1.8)).sum().item()
    assert sums["masked_fraction"] == outside
    peaks = [
        problem.objective(as_logits(logits_TV), microbatch).peaks["mismatch_max"].item()
        for microbatch, logits_TV in zip(
            problem.microbatches("four"), problem.packed_logits("four"), strict=True
        )
    ]
    assert max(peaks) == pytest.approx(gaps.abs().max().item(), rel=1e-5)


def test_clipping_by_hand():
    config = ObjectiveConfig(eps_clip=0.2, eps_clip_high=0.3, eps_clip_c=3.0)
    ratio_T = torch.tensor([1.5, 0.5, 1.1, 0.5, 1.5, 4.0])
    advantages_T = torch.tensor([1.0, 1.0, 2.0, -1.0, -1.0, -1.0])
    surrogate = clipped_surrogate(ratio_T, advantages_T, config)
    torch.testing.assert_close(surrogate.value_T, torch.tensor([1.3, 0.5, 2.2, -0.8, -1.5, -3.0]))
    assert surrogate.clipped_T.tolist() == [True, False, False, True, False, True]


def test_the_setting_offers_what_is_registered():
    assert settings()["objective"].choices == tuple(POLICY_LOSSES)


def test_ones_own_objective_can_be_registered_once():
    loss = PolicyLoss(surrogate=token_ratio, token_weight="1", denominator=tokens)
    with pytest.raises(ValueError, match="c3po exists"):
        register("c3po", loss)
    register("mine", loss)
    try:
        assert Problem("mine", {}).objective.local_denominator(grid(rollouts(), "two")) == NUM_TOKENS
    finally:
        del POLICY_LOSSES["mine"]


def test_a_microbatch_is_laid_out_as_its_example_says():
    sample = rollouts()[0]
    sample = replace(
        sample,
        prompt=replace(sample.prompt, tokens=(5, 6)),
        response=replace(
            sample.response,
            tokens_R=torch.tensor([7, 8, 2]).numpy(),
            logprobs_R=torch.tensor([-0.1, -0.7, -0.01]).numpy(),
        ),
        advantages_R=torch.tensor([1.0, 2.0, 3.0]).numpy(),
    )
    packed = build_microbatch([sample], [Pick(0, 1, 3)], 6)
    assert packed.tokens_T.tolist() == [5, 6, 7, 8, 0, 0]
    assert packed.labels_T.tolist() == [-100, -100, 8, 2, -100, -100]
    assert packed.rollout_logp_T.tolist() == pytest.approx([0, 0, -0.7, -0.01, 0, 0])
    assert packed.weights_T.tolist() == [0, 0, 0.5, 0.5, 0, 0]
    assert packed.advantages_T.tolist() == [0, 0, 2, 3, 0, 0]
    assert (packed.num_responses, packed.num_loss_tokens, packed.num_valid) == (1, 2, 4)
    with pytest.raises(ValueError, match="not a part"):
        build_microbatch([sample], [Pick(0, 2, 2)], 6)
    with pytest.raises(ValueError, match="no advantages"):
        build_microbatch([replace(sample, advantages_R=None)], [Pick(0, 0, 2)], 6)


def report(tokens: float, **values: float) -> StepReport:
    """An update of 4 loss tokens' worth of divisor; ``values`` are means over its loss tokens."""
    weight = 4.0
    names = PolicyObjective(config=ObjectiveConfig(), facts=FACTS).sum_names
    means = {name: values.get(name, 0.0) * tokens / weight for name in names}
    means |= {"tokens": tokens / weight, "mismatch_tokens": tokens / weight}
    return StepReport(
        loss=values.get("loss", 0.0),
        means=means,
        denominator=weight,
        valid=tokens,
        grad_norm=1.0,
        balance_loss=1.0,
        z_loss=0.0,
        max_violation=0.0,
        peaks={"mismatch_max": values.get("peak", 0.0), "ratio_max": values.get("peak", 0.0)},
    )


def test_minibatches_are_added_up_by_kind():
    """Sums are summed, maxima are maxima, means weigh tokens; an empty minibatch counts for nothing."""
    one, ten = report(1, entropy=1.0, loss=3.0, peak=0.2), report(10, entropy=2.0, loss=1.0, peak=0.9)
    found = metrics([one, ten, report(0)])
    assert found["entropy"] == pytest.approx(21 / 11), "not 1.5"
    assert (found["loss_tokens"], found["mismatch_max"], found["ratio_max"]) == (11, 0.9, 0.9)
    assert found["loss"] == 2.0, "each divided by the same Phi"
    assert metrics([report(0), report(0)]) == {"loss": 0.0, "loss_tokens": 0.0}


def test_the_engines_are_compared_on_the_same_weights_alone():
    """Tokens of an older policy and minibatches after an update say nothing about the engines' disagreement."""
    for old_logprobs in ("recompute", "rollout", "current"):
        problem = Problem("c3po", {"old_logprobs": old_logprobs})
        for sample in problem.samples[:3]:
            sample.response.versions_R[:] = -1
        older = sum(pick.num_tokens for pick in PICKS[:3])
        sums: dict[bool, float] = {}
        for moved in (False, True):
            sums[moved] = total = 0.0
            for microbatch, logits_TV in zip(
                problem.microbatches("two"), problem.packed_logits("two"), strict=True
            ):
                terms = problem.objective(as_logits(logits_TV), replace(microbatch, weights_moved=moved))
                sums[moved] += terms.sums["mismatch_tokens"].item()
                total += terms.sums["older_policy_share"].item()
            assert total == older
        assert sums[False] == NUM_TOKENS - older
        assert sums[True] == (sums[False] if old_logprobs == "recompute" else 0)


def test_nothing_comparable_logs_no_mismatch():
    alone = report(4, peak=0.3)
    alone.means["mismatch_tokens"] = 0.0
    found = metrics([alone])
    assert "mismatch" not in found and "mismatch_max" not in found and found["ratio_max"] == 0.3


def test_extreme_ratios_are_held_and_counted():
    """fp32's exponential overflows at 89; verl holds log ratios within 20 and k3 within 10."""
    problem = Problem("c3po", {"kl_loss_coef": 0.1, "mismatch_correction": "tis"})
    part = problem.microbatches("one")[0]
    (logits_TV,) = problem.packed_logits("one")
    place = int(part.loss_mask_T.nonzero()[0])
    for name, moved in (("old_logp_T", -200.0), ("ref_logp_T", 200.0), ("rollout_logp_T", -400.0)):
        getattr(part, name)[place] += moved
    logits_TV.requires_grad_()
    terms = problem.objective(as_logits(logits_TV * 1.0), part)
    terms.loss_sum.backward()
    assert torch.isfinite(terms.loss_sum) and torch.isfinite(logits_TV.grad).all()
    assert terms.sums["clamped_fraction"].item() == 1
    assert terms.peaks["ratio_max"].item() == pytest.approx(math.exp(20.0), rel=1e-5)
    torch.testing.assert_close(
        k3(torch.zeros(3), torch.tensor([0.5, 3.0, -30.0])), torch.tensor([0.148721, 10.0, 10.0])
    )


def test_a_response_whose_ratio_is_too_large_is_held_and_counted_by_gspo():
    problem = Problem("gspo", {})
    part = problem.microbatches("one")[0]
    (logits_TV,) = problem.packed_logits("one")
    first = part.segment_of_T == part.segment_of_T[part.loss_mask_T > 0][0]
    part.old_logp_T[first & (part.loss_mask_T > 0)] -= 15.0
    terms = problem.objective(as_logits(logits_TV), part)
    assert terms.sums["clamped_fraction"].item() == int((first & (part.loss_mask_T > 0)).sum())
    assert terms.peaks["ratio_max"].item() == pytest.approx(math.exp(10.0), rel=1e-5)


def test_cispo_clips_from_above_alone_unless_told_otherwise():
    assert clip_bounds(ObjectiveConfig(objective="cispo")) == (0.0, 1.2)
    assert clip_bounds(ObjectiveConfig(objective="cispo", eps_clip_high=4.0)) == (0.0, 5.0)
    assert clip_bounds(ObjectiveConfig(objective="cispo", eps_clip=0.3)) == (0.7, 1.3)
    assert clip_bounds(ObjectiveConfig()) == (0.8, 1.2)
    assert clip_bounds(ObjectiveConfig(eps_clip=1.0, eps_clip_high=0.28)) == (0.0, 1.28)
