"""Multi-token prediction looks ahead inside its segment only, in its inputs and in its targets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_ring.data.batch.microbatch import pack_microbatch
from megatron_ring.model.build import Logits
from megatron_ring.model.packed import pack_inputs
from megatron_ring.train.objective import NextTokenObjective
from tests.helpers.model.small import small_engine

ALONE = torch.nn.Module()
ALONE.size = lambda: 1


def test_the_loss_at_depth_d_is_the_cross_entropy_of_the_label_d_places_on_in_the_same_segment():
    generator = torch.Generator().manual_seed(2)
    rows = []
    for length in (5, 1, 3):
        tokens = torch.randint(0, 7, (length,), generator=generator)
        labels = torch.randint(0, 7, (length,), generator=generator)
        rows.append((tokens, labels, torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0])[:length]))
    microbatch = pack_microbatch(rows, 12)
    # two padded columns that would win every softmax
    main_TV, *mtp_TV = torch.randn(3, 12, 9, generator=generator).double()
    for logits_TV in (main_TV, *mtp_TV):
        logits_TV[:, 7:] = 50.0
    logits = Logits(main_TV=main_TV, mtp_TV=tuple(mtp_TV), vocab_start=0, vocab_size=7, tp_group=ALONE)
    expected = [0.0, 0.0, 0.0]
    start = 0
    for _, labels, mask in rows:
        for depth, logits_TV in enumerate((main_TV, *mtp_TV)):
            for i in range(len(labels) - depth):
                logp = logits_TV[start + i, :7].log_softmax(0)[labels[i + depth]]
                expected[depth] -= logp.item() * mask[i + depth].item()
        start += len(labels)
    terms = NextTokenObjective(mtp_loss_scaling_factor=0.3)(logits, microbatch)
    assert terms.sums["lm_loss"].item() == pytest.approx(expected[0], rel=1e-5)
    assert terms.sums["mtp_loss"].item() == pytest.approx((expected[1] + expected[2]) / 2, rel=1e-5)
    assert terms.loss_sum.item() == pytest.approx(expected[0] + 0.15 * (expected[1] + expected[2]), rel=1e-5)


def test_a_prediction_reads_its_segments_tokens_up_to_its_depth_and_no_further():
    """Change one token at a time and see which positions of each depth's logits move."""
    rows = [(torch.arange(n) + 3, torch.arange(n), torch.ones(n)) for n in (6, 5)]
    microbatch = pack_microbatch(rows, 12)
    with small_engine("v2_mtp", mtp_num_layers=2) as engine, torch.no_grad():
        model = engine.models[0].eval()

        def run(tokens_T: torch.Tensor) -> list[torch.Tensor]:
            logits = model(replace(microbatch, tokens_T=tokens_T), pack_inputs(microbatch))
            return [logits.main_TV, *logits.mtp_TV]

        whole = run(microbatch.tokens_T)
        for changed in range(11):
            tokens_T = microbatch.tokens_T.clone()
            tokens_T[changed] = 100
            segment = range(0, 6) if changed < 6 else range(6, 11)
            for depth, (before_TV, after_TV) in enumerate(zip(whole, run(tokens_T), strict=True)):
                # rows that share a matrix product with others may differ in rounding
                moved = ((before_TV - after_TV).abs().amax(1) > 1e-5).nonzero().flatten().tolist()
                assert moved == [t for t in segment if t + depth >= changed], (changed, depth)
