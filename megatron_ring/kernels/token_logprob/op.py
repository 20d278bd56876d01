"""``token_logprob``: log p of the target token and entropy, vocabulary-parallel, one pass and one collective.

Legend: T tokens, V vocabulary columns of this rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ring.errors import ConfigError
from megatron_ring.kernels import dispatch
from megatron_ring.kernels.token_logprob.reference import merge


def token_logprob(
    logits_TV: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    with_entropy: bool = True,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Communicates: one all_gather of [T, 4] over ``group`` (if given); all its ranks must call.

    Returns ``(logp_T, entropy_T)`` in nats, fp32 (fp64 for fp64 logits), of ``softmax(logits / temperature)``, both
    differentiable; entropy is None without ``with_entropy``. ``logits_TV`` are this rank's columns; the first one has
    vocabulary id ``vocab_start``. Columns with id >= ``vocab_size`` are padding and ignored.

    A target outside the vocabulary (such as -100) gives log p 0, entropy 0 and gradient 0; rows with a negative target or
    one >= ``vocab_size`` are not read. The gradient is exact on every rank if the loss is the same on all ranks of
    ``group`` (no communication in backward).

    Example, uniform over two columns; the third is padding (vocab_size = 2)::

        logits = [[3., 3., 9.], [0., 0., 0.]], targets = [1, -100]
        ->  logp = [-.6931, 0.], entropy = [.6931, 0.]

    Saved for backward: the logits (no copy) and four numbers per token. ``inplace_backward`` overwrites the logits with
    the gradient, so their values must not be needed after backward.
    """
    if temperature <= 0:
        raise ConfigError(f"temperature={temperature} must be > 0")
    logp_T, entropy_T = _TokenLogprob.apply(
        logits_TV, targets_T, temperature, vocab_start, vocab_size, group, with_entropy, inplace_backward
    )
    return logp_T, entropy_T


def _local_targets(targets_T: Tensor, vocab_start: int, columns: int, vocab_size: int | None) -> Tensor:
    """Column of each target in this shard; -1 if another shard may have it, -2 if no shard has it."""
    local_T = targets_T - vocab_start
    local_T = torch.where((local_T >= 0) & (local_T < columns), local_T, -1)
    nowhere_T = targets_T < 0
    if vocab_size is not None:
        nowhere_T |= targets_T >= vocab_size
    return local_T.masked_fill(nowhere_T, -2)


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        logits_TV,
        targets_T,
        temperature,
        vocab_start,
        vocab_size,
        group,
        with_entropy,
        inplace_backward,
    ):
        columns = logits_TV.shape[1]
        if vocab_size is not None:
            columns = min(max(vocab_size - vocab_start, 0), columns)
        local_T = _local_targets(targets_T, vocab_start, columns, vocab_size)
        if logits_TV.stride(-1) != 1:
            logits_TV = logits_TV.contiguous()
        kernels = dispatch.implementation(logits_TV, "token_logprob")
        partials_RT4 = kernels.token_logprob_partials(logits_TV, local_T, columns, temperature)[None]
        if group is not None and group.size() > 1:
            partials_T4 = partials_RT4[0]
            partials_RT4 = partials_T4.new_empty(group.size() * partials_T4.shape[0], 4)
            dist.all_gather_into_tensor(partials_RT4, partials_T4, group=group)
            partials_RT4 = partials_RT4.view(group.size(), -1, 4)
        logp_T, entropy_T, max_T, log_sum_T, found_T = merge(partials_RT4, temperature)
        local_T = local_T.masked_fill(~found_T, -2)
        ctx.save_for_backward(logits_TV, local_T, max_T, log_sum_T, entropy_T)
        ctx.columns, ctx.temperature, ctx.inplace = columns, temperature, inplace_backward
        ctx.set_materialize_grads(False)
        return logp_T, entropy_T if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp_T, dentropy_T):
        logits_TV, local_T, max_T, log_sum_T, entropy_T = ctx.saved_tensors
        if dlogp_T is None:
            dlogp_T = torch.zeros_like(max_T)
        out_TV = logits_TV if ctx.inplace else torch.empty_like(logits_TV)
        kernels = dispatch.implementation(logits_TV, "token_logprob")
        kernels.token_logprob_gradient(
            logits_TV,
            local_T,
            ctx.columns,
            ctx.temperature,
            max_T,
            log_sum_T,
            entropy_T,
            dlogp_T,
            dentropy_T,
            out_TV,
        )
        if ctx.inplace:
            # whoever saved the logits too gets autograd's error, not a gradient in their place
            torch.autograd.graph.increment_version(logits_TV)
        return out_TV, None, None, None, None, None, None, None
