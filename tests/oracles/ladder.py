"""Ladder Side-Tuning on T5, written out by hand from the formulas (section 3 of the paper, and its released code).

No code of the library or of transformers is called; weights are the state dict of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.oracles.bart_layers import Algebra, Weights, below
from tests.oracles.t5_layers import attention, relative_bias, rms_norm

NEVER = -1e9
TABLE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def block(weights: Weights, x: Tensor, bias: Tensor, heads: int, memory: Tensor | None, mask: Tensor) -> Tensor:
    """Compute one layer of an encoder, or of a decoder if there is a memory.

    Args:
        weights: State dict of the layer.
        x: ``(B, T, width)``.
        bias: Added to the scores of the self-attention.
        heads: Number of heads.
        memory: ``(B, S, width)`` encoder states.
        mask: Added to the scores of the cross-attention.
    """
    attn = below(weights, "layer.0.SelfAttention")
    normed = rms_norm(x, weights["layer.0.layer_norm.weight"])
    x = x + attention(attn, normed, normed, normed @ attn["v.weight"].T, bias, heads)
    last = 1
    if memory is not None:
        cross, last = below(weights, "layer.1.EncDecAttention"), 2
        normed = rms_norm(x, weights["layer.1.layer_norm.weight"])
        x = x + attention(cross, normed, memory, memory @ cross["v.weight"].T, mask, heads)
    ffn = below(weights, f"layer.{last}")
    inner = torch.relu(rms_norm(x, ffn["layer_norm.weight"]) @ ffn["DenseReluDense.wi.weight"].T)
    return x + inner @ ffn["DenseReluDense.wo.weight"].T


def rung(weights: Weights, side: Tensor, lower: Tensor, temperature: float) -> Tensor:
    """Compute the input of a side layer; ``side`` may have image tokens after those of ``lower``."""
    gate = Algebra().sigmoid(weights["gate"] / temperature)
    found = gate * side
    found[:, : lower.shape[1]] += (1 - gate) * (lower @ weights["down.weight"].T + weights["down.bias"])
    return found


def stack(
    weights: Weights,
    side: Weights,
    embedded: Tensor,
    images: Tensor,
    biases: tuple[Tensor, Tensor],
    memories: tuple[Tensor | None, Tensor | None],
    masks: tuple[Tensor, Tensor],
    *,
    heads: int,
    beside: Sequence[int],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Compute a stack of the backbone and the one beside it.

    Args:
        weights: State dict of the backbone's stack.
        side: State dict of the side stack, with its rungs.
        embedded: ``(B, T, d)`` embedded tokens, for both.
        images: ``(B, V, d)`` image tokens, for the side stack alone.
        biases: Added to the scores of the self-attention, of the backbone and of the side stack.
        memories: Encoder states of both; None in an encoder.
        masks: Added to the scores of the cross-attention of both.
        heads: Number of heads of both.
        beside: The backbone's layers that have a side layer.
        temperature: Divisor of the gates' logits.

    Returns:
        States of both.
    """
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("block."))
    first = below(side, "rungs.0.first")
    s = torch.cat([embedded, images], dim=1) @ first["weight"].T + first["bias"]
    for index in range(layers):
        embedded = block(below(weights, f"block.{index}"), embedded, biases[0], heads, memories[0], masks[0])
        if index in beside:
            number = list(beside).index(index)
            s = rung(below(side, f"rungs.{number}"), s, embedded, temperature)
            s = block(below(side, f"stack.block.{number}"), s, biases[1], heads, memories[1], masks[1])
    return (
        rms_norm(embedded, weights["final_layer_norm.weight"]),
        rms_norm(s, side["stack.final_layer_norm.weight"]),
    )


def logits(
    weights: Weights,
    ids: Tensor,
    images: Tensor,
    targets: Tensor,
    *,
    heads: int,
    beside: tuple[Sequence[int], Sequence[int]],
    temperature: float = 0.1,
) -> Tensor:
    """Compute logits ``(B, L, vocabulary)``.

    Args:
        weights: State dict of the model: the backbone below ``lm``, the side network below ``side``.
        ids: ``(B, T)`` token ids; 0 is padding.
        images: ``(B, V, d)`` image tokens.
        targets: ``(B, L)`` inputs of the decoder.
        heads: Number of heads.
        beside: Layers of the encoder and of the decoder that have a side layer.
        temperature: Divisor of the gates' logits.
    """
    table = weights["lm.shared.weight"]
    settings = {"heads": heads, "temperature": temperature}
    text, length = ids.shape[1], targets.shape[1]
    real = torch.cat([ids != 0, torch.ones(images.shape[:2], dtype=torch.bool)], dim=1)
    mask = torch.zeros(real.shape, dtype=table.dtype).masked_fill(~real, NEVER)[:, None, None]
    encoder, decoder = (below(weights, f"lm.{name}") for name in ("encoder", "decoder"))
    side_encoder, side_decoder = (below(weights, f"side.{name}") for name in ("encoder", "decoder"))
    among_text = torch.zeros(1, heads, real.shape[1], real.shape[1], dtype=table.dtype)
    among_text[:, :, :text, :text] = relative_bias(side_encoder[f"stack.{TABLE}"], text, both_ways=True)
    none = torch.zeros(())
    states = stack(
        encoder,
        side_encoder,
        table[ids],
        images,
        (relative_bias(encoder[TABLE], text, both_ways=True) + mask[..., :text], among_text + mask),
        (None, None),
        (none, none),
        beside=beside[0],
        **settings,
    )
    later = torch.full((length, length), NEVER, dtype=table.dtype).triu(1)
    _, side = stack(
        decoder,
        side_decoder,
        table[targets],
        table[targets][:, :0],
        tuple(
            relative_bias(each, length, both_ways=False) + later
            for each in (decoder[TABLE], side_decoder[f"stack.{TABLE}"])
        ),
        states,
        (mask[..., :text], mask),
        beside=beside[1],
        **settings,
    )
    up = side @ weights["side.up.weight"].T + weights["side.up.bias"]
    return up * table.shape[1] ** -0.5 @ table.T
