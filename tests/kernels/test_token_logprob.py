"""token_logprob: every backend against log_softmax in fp64, whole and split over vocabulary shards."""

import os
import socket

import pytest
import torch
import torch.multiprocessing
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ring.errors import ConfigError
from megatron_ring.kernels import dispatch, token_logprob
from megatron_ring.kernels.token_logprob.reference import merge
from tests.helpers.kernels.backends import INTERPRETED, relative_error, run_in_the_interpreter

# columns per block of the Triton kernels
BLOCK = 4096


def random_logits(tokens: int, columns: int, scale: float = 3.0) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(columns)) * scale


def expected(
    logits_TV: Tensor, targets_T: Tensor, temperature: float, vocab_size: int | None
) -> tuple[Tensor, Tensor]:
    """(logp_T, entropy_T) by log_softmax; both 0 where the target is outside the vocabulary."""
    logp_TV = (logits_TV[:, :vocab_size] / temperature).log_softmax(-1)
    inside_T = (targets_T >= 0) & (targets_T < logp_TV.shape[1])
    logp_T = logp_TV.gather(1, targets_T.where(inside_T, 0)[:, None]).squeeze(1)
    plogp_TV = torch.where(logp_TV == -torch.inf, 0.0, logp_TV.exp() * logp_TV.clamp(min=-1e30))
    return logp_T * inside_T, -plogp_TV.sum(-1) * inside_T


def check(
    logits_TV: Tensor,
    targets_T: Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Both values and the gradient of each alone and of both, against fp64."""
    wide_TV = logits_TV.double().requires_grad_()
    want = expected(wide_TV, targets_T, temperature, vocab_size)
    dout = torch.randn(2, len(targets_T), generator=torch.Generator().manual_seed(1))
    for chosen in ((0,), (1,), (0, 1)):
        leaf_TV = logits_TV.clone().requires_grad_()
        got = token_logprob(leaf_TV, targets_T, temperature=temperature, vocab_size=vocab_size)
        assert relative_error(got[0], want[0]) < tolerance
        assert relative_error(got[1], want[1]) < tolerance
        (grad_TV,) = torch.autograd.grad([got[i] for i in chosen], leaf_TV, [dout[i] for i in chosen])
        (want_TV,) = torch.autograd.grad(
            [want[i] for i in chosen], wide_TV, [dout[i].double() for i in chosen], retain_graph=True
        )
        assert grad_TV.dtype == logits_TV.dtype
        assert relative_error(grad_TV, want_TV.nan_to_num()) < tolerance


@pytest.mark.parametrize("columns", [1, 7, 8, 9, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_column_block_edges(backend, columns):
    check(random_logits(2, columns), torch.tensor([columns - 1, columns // 2]))


@pytest.mark.parametrize("tokens", [0, 1, 2, 5])
def test_few_tokens(backend, tokens):
    check(random_logits(tokens, 33), torch.arange(tokens), temperature=0.7)


def test_padding_columns_and_ignored_targets(backend):
    logits_TV = random_logits(6, 40)
    logits_TV[:, 37:] = 100.0
    check(logits_TV, torch.tensor([0, 36, 37, -100, -1, 20]), vocab_size=37)
    logp_T, entropy_T = token_logprob(logits_TV, torch.tensor([0, 36, 37, -100, -1, 20]), vocab_size=37)
    assert logp_T[2:5].tolist() == [0, 0, 0]
    assert entropy_T[2:5].tolist() == [0, 0, 0]


def test_an_ignored_row_is_not_read_and_gets_zeros(backend):
    logits_TV = random_logits(3, 10)
    logits_TV[1] = torch.nan
    logits_TV.requires_grad_()
    logp_T, entropy_T = token_logprob(logits_TV, torch.tensor([1, -100, 2]))
    (grad_TV,) = torch.autograd.grad((logp_T + entropy_T).sum(), logits_TV)
    assert logp_T.isfinite().all()
    assert grad_TV.isfinite().all()
    assert grad_TV[1].count_nonzero() == 0


@pytest.mark.parametrize("offset", [-200.0, -20000.0, 300.0])
def test_rows_far_from_zero(backend, offset):
    """A running maximum that starts at 0 gives inf or NaN here."""
    # quarters survive the offset exactly
    logits_TV = (random_logits(3, 300) * 4).round() / 4 + offset
    check(logits_TV, torch.tensor([0, 150, 299]), temperature=0.5)


def test_columns_of_minus_infinity(backend):
    logits_TV = random_logits(3, BLOCK + 100)
    logits_TV[:, 5] = -torch.inf
    # a first block of nothing
    logits_TV[1, : BLOCK + 50] = -torch.inf
    logits_TV[2, 1:] = -torch.inf
    check(logits_TV, torch.tensor([0, BLOCK + 60, 0]))


def test_fp16_logits(backend):
    logits_TV = random_logits(3, 50).half()
    leaf_TV = logits_TV.clone().requires_grad_()
    targets_T = torch.tensor([0, 20, 49])
    logp_T, entropy_T = token_logprob(leaf_TV, targets_T)
    want = expected(logits_TV.double(), targets_T, 1.0, None)
    assert logp_T.dtype == entropy_T.dtype == torch.float32
    assert relative_error(logp_T, want[0]) < 1e-5
    assert relative_error(entropy_T, want[1]) < 1e-5
    check(logits_TV, targets_T, tolerance=1e-3)


def test_bf16_logits(backend):
    logits_TV = random_logits(3, 50).bfloat16()
    targets_T = torch.tensor([0, 20, 49])
    got = token_logprob(logits_TV, targets_T)
    want = expected(logits_TV.double(), targets_T, 1.0, None)
    assert relative_error(got[0], want[0]) < 1e-5
    assert relative_error(got[1], want[1]) < 1e-5
    # the gradient is rounded to bf16: to nearest, or, in the interpreter, towards zero
    check(logits_TV, targets_T, tolerance=1e-2)


def test_without_entropy(backend):
    logits_TV = random_logits(4, 20).requires_grad_()
    logp_T, entropy_T = token_logprob(logits_TV, torch.arange(4), with_entropy=False)
    assert entropy_T is None
    (grad_TV,) = torch.autograd.grad(logp_T.sum(), logits_TV)
    (want_TV,) = torch.autograd.grad(logits_TV.double().log_softmax(-1).diagonal().sum(), logits_TV)
    assert relative_error(grad_TV, want_TV) < 1e-5


def test_rows_with_a_pitch(backend):
    """A slice of wider rows is read in place."""
    wide_TV, targets_T = random_logits(3, 64), torch.tensor([0, 5, 39])
    got = token_logprob(wide_TV[:, :40], targets_T)
    want = expected(wide_TV[:, :40].double(), targets_T, 1.0, None)
    assert relative_error(got[0], want[0]) < 1e-5
    got = token_logprob(wide_TV.t(), torch.zeros(64, dtype=torch.long))
    want = expected(wide_TV.t().double(), torch.zeros(64, dtype=torch.long), 1.0, None)
    assert relative_error(got[0], want[0]) < 1e-5


def test_gradient_in_place_is_the_same_and_guards_other_users(backend):
    leaf_TV, targets_T = random_logits(3, 50).requires_grad_(), torch.tensor([0, -100, 49])
    (want_TV,) = torch.autograd.grad(sum(token_logprob(leaf_TV, targets_T, vocab_size=47)).sum(), leaf_TV)
    logits_TV = leaf_TV * 1
    logp_T, entropy_T = token_logprob(logits_TV, targets_T, vocab_size=47, inplace_backward=True)
    (grad_TV,) = torch.autograd.grad((logp_T + entropy_T).sum(), leaf_TV)
    assert torch.equal(grad_TV, want_TV)
    assert torch.equal(logits_TV, want_TV)
    logits_TV = leaf_TV * 1
    other = logits_TV.square().sum()
    token_logprob(logits_TV, targets_T, inplace_backward=True)[0].sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_under_activation_recompute(backend):
    x_TV = random_logits(3, 30).requires_grad_()

    def loss(x_TV: Tensor) -> Tensor:
        return sum(token_logprob(x_TV.sin(), torch.tensor([0, 5, -100]))).sum()

    (plain,) = torch.autograd.grad(loss(x_TV), x_TV)
    (again,) = torch.autograd.grad(checkpoint(loss, x_TV, use_reentrant=False), x_TV)
    assert torch.equal(plain, again)


def test_the_docstring_example_holds(backend):
    logits_TV = torch.tensor([[3.0, 3.0, 9.0], [0.0, 0.0, 0.0]])
    logp_T, entropy_T = token_logprob(logits_TV, torch.tensor([1, -100]), vocab_size=2)
    assert relative_error(logp_T, torch.tensor([-0.693147, 0.0])) < 1e-5
    assert relative_error(entropy_T, torch.tensor([0.693147, 0.0])) < 1e-5


def test_shards_merge_to_the_whole(backend):
    """Three shards, the last of padding alone: partial sums merge to the unsplit answer."""
    logits_TV, targets_T = random_logits(4, 30), torch.tensor([0, 19, 20, 25])
    logits_TV[3, :20] = -torch.inf
    kernels = dispatch.implementation(logits_TV, "token_logprob")
    partials = []
    for start, columns in ((0, 20), (20, 6), (26, 0)):
        local_T = targets_T - start
        local_T = torch.where((local_T >= 0) & (local_T < columns), local_T, -1)
        partials.append(kernels.token_logprob_partials(logits_TV[:, start:], local_T, columns, 0.7))
    logp_T, entropy_T, *_ = merge(torch.stack(partials), 0.7)
    want = expected(logits_TV.double(), targets_T, 0.7, 26)
    assert relative_error(logp_T, want[0]) < 1e-5
    assert relative_error(entropy_T, want[1]) < 1e-5


def one_rank(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    # 24 columns over two ranks, of which 21 are vocabulary
    logits_TV, targets_T = random_logits(5, 24), torch.tensor([0, 11, 12, 20, -100])
    wide_TV = logits_TV.double().requires_grad_()
    want = expected(wide_TV, targets_T, 0.9, 21)
    (want_TV,) = torch.autograd.grad((2 * want[0] + want[1]).sum(), wide_TV)
    mine = slice(12 * rank, 12 * rank + 12)
    shard_TV = logits_TV[:, mine].clone().requires_grad_()
    got = token_logprob(
        shard_TV,
        targets_T,
        temperature=0.9,
        vocab_start=12 * rank,
        vocab_size=21,
        group=torch.distributed.group.WORLD,
    )
    (got_TV,) = torch.autograd.grad((2 * got[0] + got[1]).sum(), shard_TV)
    assert relative_error(got[0], want[0]) < 1e-5
    assert relative_error(got[1], want[1]) < 1e-5
    assert relative_error(got_TV, want_TV[:, mine]) < 1e-5
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
def test_two_ranks_agree_with_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(one_rank, args=(port,), nprocs=2)


def test_temperature_must_be_positive():
    with pytest.raises(ConfigError, match=r"temperature=0 must be > 0"):
        token_logprob(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), temperature=0)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "triton and not interpreter")
