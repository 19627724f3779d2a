"""BART's layers with VL-PET in them, written out by hand from the formulas (paper sections 3.2 to 3.4).

No code of the library is called; weights are the state dict of an injected layer. The same formulas run with two sets
of operations: :class:`Algebra` spells out every function, and :class:`Kernels` calls torch's, so that results can be
compared bitwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]


class Algebra:
    """The functions of a layer in textbook form, without dropout."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x @ weight.T + bias

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = (centred**2).mean(dim=-1, keepdim=True)
        return centred / (variance + 1e-5).sqrt() * weight + bias

    def gelu(self, x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def gelu_new(self, x: Tensor) -> Tensor:
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    def sigmoid(self, x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))

    def softmax(self, x: Tensor) -> Tensor:
        powers = torch.exp(x - x.amax(dim=-1, keepdim=True))
        return powers / powers.sum(dim=-1, keepdim=True)

    def dropout(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Kernels(Algebra):
    """The same functions with torch's kernels.

    Args:
        rate: Dropout rate; dropout is drawn in the same order as in BART.
    """

    rate: float = 0.0

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def gelu_new(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def sigmoid(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def softmax(self, x: Tensor) -> Tensor:
        return F.softmax(x, dim=-1)

    def dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.rate)


def below(weights: Weights, name: str) -> Weights:
    """Return the weights with a prefix, without the prefix."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}


def _linear(ops: Algebra, weights: Weights, name: str, x: Tensor) -> Tensor:
    return ops.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(ops: Algebra, weights: Weights, name: str, x: Tensor) -> Tensor:
    return ops.norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def bottleneck(ops: Algebra, weights: Weights, x: Tensor) -> Tensor:
    return _linear(ops, weights, "up", ops.gelu_new(_linear(ops, weights, "down", x)))


# gates: (operations, weights, x (B, S, d), h (B, S, d), real (B, S) or None) -> factors -------------------------------


def large(ops: Algebra, weights: Weights, x: Tensor, h: Tensor, real: Tensor | None) -> Tensor:
    return ops.sigmoid(bottleneck(ops, weights, x))  # (B, S, d)


def middle_x(ops: Algebra, weights: Weights, x: Tensor, h: Tensor, real: Tensor | None) -> Tensor:
    return ops.sigmoid(_linear(ops, weights, "score", x + h))  # (B, S, 1)


def middle_y(ops: Algebra, weights: Weights, x: Tensor, h: Tensor, real: Tensor | None) -> Tensor:
    return 1 + weights["vector"]  # (d,)


def small(ops: Algebra, weights: Weights, x: Tensor, h: Tensor, real: Tensor | None) -> Tensor:
    tokens = ops.sigmoid(_linear(ops, weights, "score", torch.cat([x, h], dim=-1)))  # (B, S, 1)
    if real is None:
        return tokens.mean(dim=1, keepdim=True)  # (B, 1, 1), padding included
    counted = real[..., None].to(tokens.dtype)
    return (tokens * counted).sum(dim=1, keepdim=True) / counted.sum(dim=1, keepdim=True)


Gate = Callable[[Algebra, Weights, Tensor, Tensor, Tensor | None], Tensor]
GATES: dict[str, Gate] = {"large": large, "middleX": middle_x, "middleY": middle_y, "small": small}


def gated_branch(
    ops: Algebra, unit: Weights, x: Tensor, a: Tensor, gate: str, heads: int, real: Tensor | None
) -> Tensor:
    """``G * (a + W_up gelu_new(concat_i(W_i a + b_i)) + b_up)`` where ``a`` is the frozen sublayer's output."""
    rows = zip(unit["down.weight"].chunk(heads), unit["down.bias"].chunk(heads), strict=True)
    z = torch.cat([ops.linear(a, weight, bias) for weight, bias in rows], dim=-1)
    h = a + _linear(ops, unit, "up", ops.gelu_new(z))
    return h * GATES[gate](ops, below(unit, "gate"), x, h, real)


# layers ---------------------------------------------------------------------------------------------------------------


def attend(ops: Algebra, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Scaled dot product attention of projected ``(B, *, d)``; ``mask`` is added to the scores."""

    def split(tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, *, d / heads)

    scores = split(q) @ split(k).transpose(2, 3) * (q.shape[-1] // heads) ** -0.5 + mask
    return (ops.dropout(ops.softmax(scores)) @ split(v)).transpose(1, 2).flatten(2)


def cross_value(ops: Algebra, weights: Weights, memory: Tensor) -> Tensor:
    """Value-parallel adapter: ``W_v e + b_v + W_up gelu_new(W_down e + b_down) + b_up``."""
    return _linear(ops, weights, "v_proj", memory) + bottleneck(ops, below(weights, "v_proj.unit"), memory)


def cross_attention(
    ops: Algebra, weights: Weights, x: Tensor, memory: Tensor, mask: Tensor, attention_heads: int
) -> Tensor:
    """Attention to the encoder's output ``(B, S, d)`` with adapted values and unchanged keys."""
    q, k = _linear(ops, weights, "q_proj", x), _linear(ops, weights, "k_proj", memory)
    v = cross_value(ops, weights, memory)
    return _linear(ops, weights, "out_proj", attend(ops, q, k, v, mask, attention_heads))


def encoder_layer(
    ops: Algebra,
    weights: Weights,
    x: Tensor,
    mask: Tensor,
    *,
    gate: str,
    attention_heads: int,
    heads: int,
    real: Tensor | None = None,
) -> Tensor:
    """Compute an encoder layer with VL-PET after both sublayers.

    Args:
        ops: Operations to use.
        weights: State dict of the layer.
        x: ``(B, S, d)``.
        mask: ``(B, 1, 1, S)``, added to the attention scores.
        gate: Key of :data:`GATES`.
        attention_heads: Number of attention heads.
        heads: Number of heads of VL-PET's down projection.
        real: ``(B, S)`` mask of the positions that the small gate averages over; None for all.
    """
    q, k, v = (_linear(ops, weights, f"self_attn.{name}_proj", x) for name in "qkv")
    a = _linear(ops, weights, "self_attn.out_proj", attend(ops, q, k, v, mask, attention_heads))
    h = gated_branch(ops, below(weights, "self_attn.out_proj.unit"), x, a, gate, heads, real)
    x = _norm(ops, weights, "self_attn_layer_norm", x + ops.dropout(h))

    a = _linear(ops, weights, "fc2", ops.dropout(ops.gelu(_linear(ops, weights, "fc1", x))))
    h = gated_branch(ops, below(weights, "fc2.unit"), x, a, gate, heads, real)
    return _norm(ops, weights, "final_layer_norm", x + ops.dropout(h))


def decoder_layer(
    ops: Algebra, weights: Weights, x: Tensor, memory: Tensor, causal: Tensor, mask: Tensor, attention_heads: int
) -> Tensor:
    """Compute a decoder layer with the value-parallel adapter; ``causal`` and ``mask`` are added to the scores."""
    q, k, v = (_linear(ops, weights, f"self_attn.{name}_proj", x) for name in "qkv")
    h = _linear(ops, weights, "self_attn.out_proj", attend(ops, q, k, v, causal, attention_heads))
    x = _norm(ops, weights, "self_attn_layer_norm", x + ops.dropout(h))

    h = cross_attention(ops, below(weights, "encoder_attn"), x, memory, mask, attention_heads)
    x = _norm(ops, weights, "encoder_attn_layer_norm", x + ops.dropout(h))

    h = _linear(ops, weights, "fc2", ops.dropout(ops.gelu(_linear(ops, weights, "fc1", x))))
    return _norm(ops, weights, "final_layer_norm", x + ops.dropout(h))
