"""T5's injected stacks compared with stacks written out by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.oracles.t5_layers import bucket, decoder_layer, encoder, relative_bias
from tests.parity import tiny_t5
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.pet import (
    VLPET,
    LargeGate,
    MiddleXGate,
    MiddleYGate,
    ParallelAdapter,
    Placement,
    SmallGate,
    inject,
)

GATES = {"large": partial(LargeGate, rank=8), "middleX": MiddleXGate, "middleY": MiddleYGate, "small": SmallGate}
HEADS, SCALE = 4, 0.3
# the stock norm computes its variance in float32
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
T5 = BACKBONES["t5"]


def injected(gate, attention="eager"):
    """Build a T5 with VL-PET, with weights large enough to matter."""
    lm = T5.build(tiny_t5())
    lm.set_attn_implementation(attention)
    placements = [
        Placement(["encoder.attn", "encoder.ffn"], partial(VLPET, rank=8, heads=HEADS, gate=GATES[gate], scale=SCALE)),
        Placement(["decoder.cross.value"], partial(ParallelAdapter, rank=8)),
    ]
    inject(T5.layers(lm), T5.sites, placements)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            parameter.normal_(std=0.3, generator=generator)
            if "norm" in name:
                parameter.add_(1)
    return lm.double().eval()


def draw(*shape, seed=5):
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IDS = torch.tensor([[7, 8, 9, 10, 1], [11, 12, 1, 0, 0]])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("gate", GATES)
def test_the_joint_encoder_is_that_of_the_formulas(gate, attention):
    lm, visual = injected(gate, attention), draw(2, 4)
    real = IDS != 0
    mask = torch.cat([real, real.new_ones(2, 4)], dim=1)
    ours = T5.encode(lm, IDS, visual, mask)
    written = partial(encoder, lm.encoder.state_dict(), lm.shared(IDS), visual, gate=gate, heads=HEADS, scale=SCALE)
    torch.testing.assert_close(ours, written(real), **CLOSE)
    assert (ours - written(torch.ones_like(real)))[1].abs().max() > 1e-3  # the mask matters


def test_image_tokens_stand_nowhere():
    """With token-wise gates, permuting the image tokens permutes their outputs and changes nothing else."""
    lm, visual = injected("large"), draw(2, 4)
    mask = torch.ones(2, 9, dtype=torch.bool)
    straight, turned = (T5.encode(lm, IDS, images, mask) for images in (visual, visual.flip(1)))
    torch.testing.assert_close(turned[:, 5:].flip(1), straight[:, 5:], **CLOSE)
    torch.testing.assert_close(turned[:, :5], straight[:, :5], **CLOSE)
    text = T5.encode(lm, IDS.flip(1), visual, mask)[:, :5].flip(1)
    assert (text - straight[:, :5]).abs().max() > 1e-3  # text tokens do have positions


def test_a_decoder_layer_is_that_of_the_formulas():
    lm = injected("large")
    x, memory = draw(2, 5, seed=6), draw(2, 9)
    table = lm.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    causal = torch.full((5, 5), -1e9, dtype=torch.float64).triu(1)
    bias = relative_bias(table, 5, both_ways=False) + causal
    mask = torch.zeros(2, 1, 1, 9, dtype=torch.float64)
    mask[1, ..., 3:5] = -1e9
    ours = lm.decoder.block[0](
        x,
        position_bias=bias,
        encoder_hidden_states=memory,
        encoder_decoder_position_bias=mask.expand(2, HEADS, 5, 9),
    )[0]
    expected = decoder_layer(lm.decoder.block[0].state_dict(), x, memory, bias, mask, HEADS)
    torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_are_those_of_the_stock_model(both_ways):
    stack = injected("large").encoder if both_ways else injected("large").decoder
    stock = stack.block[0].layer[0].SelfAttention.compute_bias(200, 200)
    table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    for query, key in ((0, 0), (3, 0), (0, 3), (150, 0), (0, 150), (20, 90), (90, 20), (199, 100)):
        assert torch.equal(stock[0, :, query, key], table[bucket(key - query, both_ways)])
