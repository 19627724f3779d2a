"""Dropout, ReLU and attention that keep less for the backward pass on a CPU.

On a CPU, torch keeps dropout's random factors in the type of the input, the output of a ReLU, and three tensors of the
size of attention's probabilities if these have dropout. The functions here keep masks of one byte per element instead,
and the probabilities once. Outputs, gradients and random numbers are those of torch, to the last bit. They have no
second derivatives, and must not be recomputed by a checkpoint outside of their context; :func:`torch_kernels` turns
them off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_enabled = True


def cpu_kernels(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which a training step on a device keeps less; does nothing unless it is a CPU."""
    return CPUKernels() if device.type == "cpu" and _enabled else nullcontext()


@contextmanager
def torch_kernels() -> Iterator[None]:
    """Let :func:`cpu_kernels` do nothing, e.g. to compare with torch's own functions."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


class CPUKernels(TorchFunctionMode):
    """Replaces dropout, ReLU and attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return INSTEAD.get(func, func)(*args, **(kwargs or {}))


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Apply dropout; the arguments are those of :func:`torch.nn.functional.dropout`."""
    if not training or not 0 < p < 1 or inplace or not _recorded(input):
        return F.dropout(input, p, training, inplace)
    return _Dropout.apply(input, p)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """Apply ReLU; the arguments are those of :func:`torch.nn.functional.relu`."""
    return F.relu(input, inplace) if inplace or not _recorded(input) else _ReLU.apply(input)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend with dropout; the arguments are those of :func:`torch.nn.functional.scaled_dot_product_attention`."""
    inputs = query, key, value
    ours = 0 < dropout_p < 1 and not is_causal and not enable_gqa and any(map(_recorded, inputs))
    ours = ours and query.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    ours = ours and torch.float64 not in (query.dtype, key.dtype, value.dtype)
    if attn_mask is not None:
        known = attn_mask.dtype in (torch.bool, query.dtype) or torch.is_autocast_enabled("cpu")
        ours = ours and known and not attn_mask.requires_grad
    if not ours:
        return F.scaled_dot_product_attention(
            *inputs, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(dtype) for tensor in inputs)
        attn_mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    with torch.autocast("cpu", enabled=False):
        return _Attention.apply(query, key, value, attn_mask, dropout_p, scale)


def _recorded(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _draw(like: Tensor, p: float) -> Tensor:
    return torch.empty_like(like, dtype=torch.bool).bernoulli_(1 - p)


def _kept(tensor: Tensor, mask: Tensor, p: float) -> Tensor:
    """Return ``tensor * (mask / (1 - p))``."""
    return mask.view(torch.uint8).to(tensor.dtype).div_(1 - p).mul_(tensor)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, p: float) -> Tensor:
        result = torch.empty_like(input)  # before the mask, which would be allocated in a gap of its size
        mask = _draw(input, p)
        ctx.save_for_backward(mask)
        ctx.p = p
        return result.copy_(mask.view(torch.uint8)).div_(1 - p).mul_(input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return _kept(grad, mask, ctx.p), None


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        result = torch.relu(input)
        ctx.save_for_backward(result.bool())  # not a number counts, as in torch
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, grad, grad.new_zeros(()))


class _Attention(torch.autograd.Function):
    """As torch's math kernel, in float32 (aten/src/ATen/native/transformers/attention.cpp)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, p: float, scale: float | None
    ) -> Tensor:
        ctx.p, ctx.root = p, math.sqrt(query.shape[-1] ** -0.5 if scale is None else scale)
        flat_query, flat_key, flat_value = _flat(query, key, value, ctx.root)
        scores = flat_query.bmm(flat_key).unflatten(0, query.shape[:2])
        if bias is not None:
            if bias.dtype == torch.bool:
                bias = torch.zeros_like(bias, dtype=scores.dtype).masked_fill_(~bias, -torch.inf)
            scores.add_(bias)
        probabilities = torch.ops.aten._safe_softmax(scores, -1)
        del scores
        mask = _draw(probabilities, p)
        ctx.save_for_backward(query, key, value, probabilities, mask)
        return _kept(probabilities, mask, p).flatten(0, 1).bmm(flat_value).unflatten(0, query.shape[:2]).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probabilities, mask = ctx.saved_tensors
        dtype, heads, grad = query.dtype, query.shape[:2], grad.float().flatten(0, 1)
        query, key, value = _flat(query, key, value, ctx.root)
        kept = _kept(probabilities, mask, ctx.p).flatten(0, 1)
        # operands are laid out as in torch, because the rounding of a product depends on it
        in_value = kept.transpose(1, 2).bmm(grad)
        scores = _kept(grad.bmm(value.transpose(1, 2)).unflatten(0, heads), mask, ctx.p)
        scores = torch.ops.aten._softmax_backward_data(scores, probabilities, -1, probabilities.dtype).flatten(0, 1)
        in_query = scores.bmm(key.transpose(1, 2)).mul_(ctx.root)
        in_key = query.transpose(1, 2).bmm(scores).transpose(1, 2).mul_(ctx.root)
        return *(found.unflatten(0, heads).to(dtype) for found in (in_query, in_key, in_value)), None, None, None


def _flat(query: Tensor, key: Tensor, value: Tensor, root: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries ``(B * heads, L, width)``, keys ``(B * heads, width, S)`` and values in float32.

    Queries and keys are multiplied by the root of the scale.
    """
    flat_key = (key.float().transpose(-2, -1) * root).flatten(0, 1)
    return (query.float() * root).flatten(0, 1), flat_key, value.float().flatten(0, 1)


INSTEAD: dict[Any, Callable[..., Any]] = {
    F.dropout: dropout,
    F.relu: relu,
    F.scaled_dot_product_attention: attention,
}
