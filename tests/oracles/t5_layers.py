"""T5's joint encoder and decoder layer with VL-PET in them, written out by hand from the formulas.

No code of the library or of transformers is called; weights are the state dict of an injected stack.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.oracles.bart_layers import Algebra, Weights, attend, below, bottleneck, gated_branch

BUCKETS, FARTHEST = 32, 128


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """T5's norm: no mean subtraction and no bias."""
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def bucket(distance: int, both_ways: bool) -> int:
    """Return the bucket of a relative position (key minus query)."""
    count = BUCKETS // 2 if both_ways else BUCKETS
    first = count if both_ways and distance > 0 else 0
    distance = abs(distance) if both_ways else max(-distance, 0)
    exact = count // 2
    if distance < exact:
        return first + distance
    far = exact + int(math.log(distance / exact) / math.log(FARTHEST / exact) * (count - exact))
    return first + min(far, count - 1)


def relative_bias(table: Tensor, length: int, both_ways: bool) -> Tensor:
    """Return the position bias ``(1, heads, length, length)`` from a table ``(buckets, heads)``."""
    rows = [[table[bucket(key - query, both_ways)] for key in range(length)] for query in range(length)]
    return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)[None]


def attention(weights: Weights, query: Tensor, memory: Tensor, value: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Attention without scaling of the scores, which T5 includes in its weights."""
    width = query.shape[-1] // heads
    q, k = query @ weights["q.weight"].T * width**0.5, memory @ weights["k.weight"].T
    return attend(Algebra(), q, k, value, bias, heads) @ weights["o.weight"].T


def encoder(
    weights: Weights, text: Tensor, visual: Tensor, real: Tensor, *, gate: str, heads: int, scale: float
) -> Tensor:
    """Compute the whole encoder.

    Args:
        weights: State dict of the encoder.
        text: ``(B, T, d)`` embedded text.
        visual: ``(B, V, d)``.
        real: ``(B, T)`` bool.
        gate: Name of the gate.
        heads: Number of heads of the attention and of the down projection.
        scale: Scale of every gated branch.

    Returns:
        ``(B, T + V, d)``.
    """
    ops = Algebra()
    length = text.shape[1]
    x = torch.cat([text, visual], dim=1)
    bias = x.new_zeros(1, heads, x.shape[1], x.shape[1])  # image tokens have no position
    table = weights["block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias[:, :, :length, :length] = relative_bias(table, length, both_ways=True)
    seen = torch.cat([real, real.new_ones(visual.shape[:2])], dim=1)
    bias = bias + torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, -1e4)[:, None, None]
    for index in range(sum(name.endswith("layer.1.layer_norm.weight") for name in weights)):
        block = below(weights, f"block.{index}.layer")
        attn = below(block, "0.SelfAttention")
        normed = rms_norm(x, block["0.layer_norm.weight"])
        a = attention(attn, normed, normed, normed @ attn["v.weight"].T, bias, heads)
        # the gate reads x before the norm
        x = x + scale * gated_branch(ops, below(attn, "o.unit"), x, a, gate, heads, None)
        ffn = below(block, "1.DenseReluDense")
        inner = torch.relu(rms_norm(x, block["1.layer_norm.weight"]) @ ffn["wi.weight"].T)
        a = inner @ ffn["wo.weight"].T
        x = x + scale * gated_branch(ops, below(ffn, "wo.unit"), x, a, gate, heads, None)
    return rms_norm(x, weights["final_layer_norm.weight"])


def decoder_layer(weights: Weights, x: Tensor, memory: Tensor, bias: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Compute a decoder layer with the value-parallel adapter; ``bias`` and ``mask`` are added to the scores."""
    attn, cross, ffn = (below(weights, f"layer.{name}") for name in ("0.SelfAttention", "1.EncDecAttention", "2"))
    normed = rms_norm(x, weights["layer.0.layer_norm.weight"])
    x = x + attention(attn, normed, normed, normed @ attn["v.weight"].T, bias, heads)
    value = memory @ cross["v.weight"].T + bottleneck(Algebra(), below(cross, "v.unit"), memory)
    x = x + attention(cross, rms_norm(x, weights["layer.1.layer_norm.weight"]), memory, value, mask, heads)
    inner = torch.relu(rms_norm(x, ffn["layer_norm.weight"]) @ ffn["DenseReluDense.wi.weight"].T)
    return x + inner @ ffn["DenseReluDense.wo.weight"].T
