"""sample_token: every backend against the cumulative distribution written out in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_ring.errors import ConfigError
from megatron_ring.kernels import sample_token
from tests.helpers.kernels.backends import INTERPRETED, relative_error, run_in_the_interpreter


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def allowed(p_V: Tensor, top_p: float, top_k: int) -> Tensor:
    """Mask of the tokens that may be taken, by sorting."""
    order = p_V.argsort(descending=True, stable=True)
    kept = order[: top_k or len(order)]
    mass = p_V[kept] / p_V[kept].sum()
    kept = kept[(mass.cumsum(0) - mass) < top_p] if top_p < 1 else kept
    mask = torch.zeros_like(p_V, dtype=torch.bool)
    mask[kept] = True
    return mask


def check(V: int, temperature=1.0, top_p=1.0, top_k=0, rows=6):
    logits_TV = 2 * random(rows, V)
    uniform_T = torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    uniform_T[:2] = torch.tensor([0.0, 1 - 2**-53])[: min(rows, 2)]
    tokens_T, logp_T = sample_token(logits_TV, uniform_T, temperature=temperature, top_p=top_p, top_k=top_k)
    assert tokens_T.dtype == torch.int64 and tokens_T.shape == logp_T.shape == (rows,)
    for t in range(rows):
        p_V = (logits_TV[t].double() / temperature).softmax(0)
        kept_V = torch.where(allowed(p_V, top_p, top_k), p_V, 0.0)
        ends_V = kept_V.cumsum(0) / kept_V.sum()
        token = int(tokens_T[t])
        assert kept_V[token] > 0
        # inside its interval, up to rounding
        assert ends_V[token] - kept_V[token] / kept_V.sum() - 1e-5 <= uniform_T[t] <= ends_V[token] + 1e-5
        assert abs(float(logp_T[t]) - math.log(p_V[token])) < 1e-4


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 250, 1024, 1025])
def test_vocabulary_edges(backend, vocabulary):
    check(vocabulary)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_rows(backend, rows):
    check(33, rows=rows)


@pytest.mark.parametrize("temperature", [0.3, 2.5])
def test_temperature(backend, temperature):
    check(100, temperature)


@pytest.mark.parametrize(
    ("top_p", "top_k"), [(0.5, 0), (1e-9, 0), (0.9, 5), (1.0, 1), (1.0, 7), (1.0, 500), (0.99, 500)]
)
def test_bounds(backend, top_p, top_k):
    check(60, 0.8, top_p, top_k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(backend, dtype):
    logits_TV = random(4, 40).to(dtype)
    tokens_T, logp_T = sample_token(logits_TV, torch.full((4,), 0.4, dtype=torch.float64))
    assert logp_T.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want_T = logits_TV.double().log_softmax(-1).gather(1, tokens_T[:, None]).squeeze(1)
    assert relative_error(logp_T, want_T) < 1e-5


def test_rows_of_a_wider_tensor(backend):
    wide_TV = random(6, 50)
    uniform_T = torch.linspace(0, 0.99, 6, dtype=torch.float64)
    tokens_T, logp_T = sample_token(wide_TV[:, :31], uniform_T)
    again_T, logp_again_T = sample_token(wide_TV[:, :31].contiguous(), uniform_T)
    assert torch.equal(tokens_T, again_T) and torch.equal(logp_T, logp_again_T)
    assert int(tokens_T.max()) < 31


def test_even_numbers_draw_the_distribution(backend):
    """A grid of numbers hits every token as often as its mass says."""
    logits_V = 2 * random(9)
    rows = 1000 if backend != "triton" else 60
    uniform_T = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    tokens_T, _ = sample_token(logits_V.expand(rows, 9).contiguous(), uniform_T)
    share_V = torch.bincount(tokens_T, minlength=9) / rows
    assert (share_V - logits_V.softmax(0)).abs().max() <= 1.01 / rows


def test_temperature_zero_takes_the_first_of_the_most_likely(backend):
    logits_TV = torch.tensor([[0.0, 3.0, 3.0, 1.0], [9.0, 0.0, 0.0, 0.0]])
    tokens_T, logp_T = sample_token(logits_TV, torch.tensor([0.9, 0.9]).double(), temperature=0)
    assert tokens_T.tolist() == [1, 0]
    assert relative_error(logp_T, logits_TV.log_softmax(-1)[[0, 1], [1, 0]]) < 1e-6


def test_the_docstring_example_holds(backend):
    logits_TV = torch.tensor([[0.5, 0.25, 0.25]]).log()
    uniform_T = torch.tensor([0.6]).double()
    for top_k, token, logp in ((0, 1, -1.3863), (1, 0, -0.6931)):
        tokens_T, logp_T = sample_token(logits_TV, uniform_T, top_k=top_k)
        assert tokens_T.tolist() == [token] and abs(float(logp_T) - logp) < 1e-4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0}])
def test_a_row_that_is_not_finite_stays_in_the_vocabulary(backend, bad, settings):
    for place in (0, 1029, slice(None)):
        logits_TV = random(3, 1030)
        logits_TV[1, place] = bad
        tokens_T, logp_T = sample_token(logits_TV, torch.tensor([0.1, 0.5, 0.9]).double(), **settings)
        assert ((tokens_T >= 0) & (tokens_T < 1030)).all()
        assert logp_T.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -2}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        sample_token(torch.zeros(1, 2), torch.zeros(1).double(), **bad)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "triton and not interpreter")
