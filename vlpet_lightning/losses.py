"""Losses of the tasks, as sums and counts, without keeping the logits of a batch.

The vocabulary projection and the cross entropy are computed together, in chunks of target tokens. Each chunk's
gradient is computed right after its loss, so that only one chunk of ``(tokens, vocabulary)`` logits exists at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlpet_lightning.batch import IGNORED

CPU_CHUNK, GPU_CHUNK = 2**24, 2**27  # logits in memory at a time: 64 and 512 MB in float32
ALIGNED = 8  # vocabularies are padded to a multiple in 16-bit types, for which fast GPU kernels need aligned rows


def sample_factors(labels: Tensor, kind: str, weights: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Return the factor of each sample's token losses, and the count to divide their sum by.

    Source: src/multitask_model.py, ``train_step`` of each task.

    Args:
        labels: ``(B, L)`` target ids, :data:`IGNORED` on padding. A sample without any target is not counted.
        kind: ``token`` averages over target tokens; ``sample`` averages the mean token loss over samples;
            ``weighted_sample`` also multiplies each sample's loss by its weight.
        weights: ``(B,)`` weights of the samples, or None.

    Returns:
        ``(B,)`` factors, or None for 1; a scalar number of samples or target tokens.
    """
    tokens = (labels != IGNORED).sum(dim=1)
    if kind == "token":
        return None, tokens.sum()
    factors = 1 / tokens.clamp(min=1)
    if kind == "weighted_sample" and weights is not None:
        factors = factors * weights
    return factors, (tokens > 0).sum()


def vocabulary_logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute logits ``(..., vocabulary)`` from states ``(..., d)``.

    On a CPU in float32, the matrix product is computed as its transpose, because MKL is slow if the second matrix is
    much wider than the first is tall: 1.7 times the speed of :func:`torch.nn.functional.linear` for 80 to 1280 states
    of BART-base on one thread (docs/performance.md).
    """
    if states.device.type != "cpu" or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(states, weight, bias)
    flat = states.flatten(0, -2)
    logits = torch.mm(weight, flat.t()) if bias is None else torch.addmm(bias.unsqueeze(1), weight, flat.t())
    return logits.t().unflatten(0, states.shape[:-1])


def soft_capped(logits: Tensor, bound: float) -> Tensor:
    """Squash logits to absolute values below a bound (Gemma 2)."""
    return torch.tanh(logits / bound) * bound


def token_losses(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    factors: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute the sum of the cross entropies of target tokens from their decoder states.

    Args:
        states: ``(P, d)`` decoder states that predict the targets.
        weight: ``(vocabulary, d)`` vocabulary projection.
        bias: ``(vocabulary,)`` bias of the projection, without gradient, or None.
        labels: ``(P,)`` target ids.
        factors: ``(P,)`` factors of the tokens' losses, without gradient, or None for 1.
        softcap: Bound of the logits, see :func:`soft_capped`, or None.

    Returns:
        Scalar in float32.
    """
    if not torch.is_grad_enabled():  # inside the function it is always off
        states, weight = states.detach(), weight.detach()
    return _TokenLosses.apply(states, weight, bias, labels, factors, softcap)


class _TokenLosses(torch.autograd.Function):
    """Loss and gradient in one pass; the backward pass only scales the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        factors: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        of_states, of_weight = ctx.needs_input_grad[:2]
        dtype, vocabulary = weight.dtype, len(weight)
        limit = GPU_CHUNK if states.is_cuda else CPU_CHUNK
        rows = max(1, limit // len(weight))
        if torch.is_autocast_enabled(states.device.type):
            weight = weight.to(torch.get_autocast_dtype(states.device.type))  # once for all chunks
            added = -vocabulary % ALIGNED
            weight = F.pad(weight, (0, 0, 0, added))
            bias = None if bias is None else F.pad(bias, (0, added))
        total = states.new_zeros((), dtype=torch.float32)
        states_gradient = torch.empty_like(states) if of_states else None
        weight_gradient = torch.zeros_like(weight, dtype=dtype) if of_weight else None
        for start in range(0, len(states), rows):
            part = slice(start, start + rows)
            logits = vocabulary_logits(states[part], weight, bias).float()
            if softcap is not None:
                logits = soft_capped(logits, softcap)
            logits[:, vocabulary:] = -torch.inf  # the padding
            target = labels[part].unsqueeze(1)
            factor = None if factors is None else factors[part].float().unsqueeze(1)
            normalizer = logits.logsumexp(dim=1, keepdim=True)
            losses = normalizer - logits.gather(1, target)
            total += (losses if factor is None else losses * factor).sum()
            if not (of_states or of_weight):
                continue
            slope = None if softcap is None else (1 - (logits / softcap) ** 2).clamp_(min=0)  # 0 on the padding
            gradient = logits.sub_(normalizer).exp_()  # softmax
            gradient.scatter_add_(1, target, torch.full_like(losses, -1.0))
            if factor is not None:
                gradient.mul_(factor)
            if slope is not None:
                gradient.mul_(slope)
            if states_gradient is not None:
                states_gradient[part] = F.linear(gradient, weight.t())
            if weight_gradient is not None:
                weight_gradient += gradient.t() @ states[part]
        ctx.save_for_backward(states_gradient, None if weight_gradient is None else weight_gradient[:vocabulary])
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if saved is None else saved * upstream.to(saved.dtype) for saved in ctx.saved_tensors)
        return (*gradients, None, None, None, None)
