"""The injected layers compared with layers written out by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import BartForConditionalGeneration

from tests.oracles.bart_layers import Algebra, Kernels, cross_value, decoder_layer, encoder_layer
from tests.parity import tiny_bart
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.pet import (
    VLPET,
    Context,
    LargeGate,
    MiddleXGate,
    MiddleYGate,
    ParallelAdapter,
    Placement,
    SmallGate,
    inject,
)

GATES = {"large": partial(LargeGate, rank=8), "middleX": MiddleXGate, "middleY": MiddleYGate, "small": SmallGate}
HEADS = 4  # of attention and of the down projection
LENGTHS = (7, 4)  # real encoder positions of the two samples
RATE = 0.1


def injected(gate, attention, dtype):
    """Build a BART with VL-PET, with weights large enough to matter."""
    config = tiny_bart()
    config.dropout = config.attention_dropout = config.activation_dropout = RATE
    backbone = BACKBONES["bart"]
    lm = backbone.build(config)
    assert isinstance(lm, BartForConditionalGeneration)
    lm.set_attn_implementation(attention)
    placements = [
        Placement(["encoder.attn", "encoder.ffn"], partial(VLPET, rank=8, heads=HEADS, gate=GATES[gate])),
        Placement(["decoder.cross.value"], partial(ParallelAdapter, rank=8)),
    ]
    inject(backbone.layers(lm), backbone.sites, placements)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            parameter.normal_(std=0.3, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return lm.to(dtype).eval()


def draw(dtype, length=LENGTHS[0], seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(LENGTHS), length, 32, generator=generator, dtype=dtype)


def padding(dtype):
    """Return ``real`` (B, S) and the additive attention mask (B, 1, 1, S)."""
    real = torch.arange(LENGTHS[0]) < torch.tensor(LENGTHS)[:, None]
    return real, torch.zeros(real.shape, dtype=dtype).masked_fill(~real, torch.finfo(dtype).min)[:, None, None]


def causal_mask(length, dtype):
    return torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layer", [0, 1])
def test_an_encoder_layer_has_every_bit_of_the_written_one(gate, layer):
    stock = injected(gate, "eager", torch.float32).model.encoder.layers[layer]
    x, (_, mask) = draw(torch.float32), padding(torch.float32)
    # one head: the product of all rows at once may round differently from one product per head
    expected = encoder_layer(Kernels(), stock.state_dict(), x, mask, gate=gate, attention_heads=HEADS, heads=1)
    assert torch.equal(stock(x, mask), expected)


@pytest.mark.parametrize("gate", GATES)
def test_dropout_comes_behind_the_unit(gate):
    stock = injected(gate, "eager", torch.float32).model.encoder.layers[0].train()
    x, (_, mask) = draw(torch.float32), padding(torch.float32)
    torch.manual_seed(11)
    ours = stock(x, mask)
    torch.manual_seed(11)
    weights = stock.state_dict()
    expected = encoder_layer(Kernels(RATE), weights, x, mask, gate=gate, attention_heads=HEADS, heads=1)
    assert torch.equal(ours, expected)
    without = encoder_layer(Kernels(), weights, x, mask, gate=gate, attention_heads=HEADS, heads=1)
    assert not torch.equal(ours, without)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("gate", GATES)
def test_an_encoder_layer_and_its_gradients_are_those_of_the_formulas(gate, attention):
    stock = injected(gate, attention, torch.float64).model.encoder.layers[1]
    x, (_, mask) = draw(torch.float64), padding(torch.float64)
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in stock.named_parameters()}
    expected = encoder_layer(Algebra(), weights, x, mask, gate=gate, attention_heads=HEADS, heads=HEADS)
    ours = stock(x, mask)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    (ours**3).sum().backward()
    (expected**3).sum().backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    expected_gradients = {name: weights[name].grad for name in gradients}  # names the difference
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-10)


def test_the_small_gate_of_a_layer_that_is_told_its_padding_averages_real_tokens():
    stock = injected("small", "sdpa", torch.float64).model.encoder.layers[0]
    x, (real, mask) = draw(torch.float64), padding(torch.float64)
    for unit in (stock.self_attn.out_proj.unit, stock.fc2.unit):
        unit.gate.context = Context("vqa", real)
    written = partial(
        encoder_layer,
        Algebra(),
        stock.state_dict(),
        x,
        mask,
        gate="small",
        attention_heads=HEADS,
        heads=HEADS,
    )
    ours = stock(x, mask)
    torch.testing.assert_close(ours, written(real=real), rtol=0, atol=1e-12)
    assert (ours - written()).abs().max() > 1e-3


def test_the_cross_attention_values_carry_the_parallel_adapter_and_the_keys_do_not():
    stock = injected("large", "eager", torch.float32).model.decoder.layers[0].encoder_attn
    memory = draw(torch.float32)
    weights = stock.state_dict()
    assert torch.equal(stock.v_proj(memory), cross_value(Kernels(), weights, memory))
    keys = Kernels().linear(memory, weights["k_proj.weight"], weights["k_proj.bias"])
    assert torch.equal(stock.k_proj(memory), keys)


def test_a_decoder_layer_has_every_bit_of_the_written_one():
    stock = injected("large", "eager", torch.float32).model.decoder.layers[1]
    x, memory = draw(torch.float32, length=5, seed=6), draw(torch.float32)
    causal, (_, mask) = causal_mask(5, torch.float32), padding(torch.float32)
    ours = stock(x, causal, encoder_hidden_states=memory, encoder_attention_mask=mask)
    assert torch.equal(ours, decoder_layer(Kernels(), stock.state_dict(), x, memory, causal, mask, HEADS))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_decoder_layer_is_that_of_the_formulas(attention):
    stock = injected("large", attention, torch.float64).model.decoder.layers[0]
    x, memory = draw(torch.float64, length=5, seed=6), draw(torch.float64)
    causal, (_, mask) = causal_mask(5, torch.float64), padding(torch.float64)
    ours = stock(x, causal, encoder_hidden_states=memory, encoder_attention_mask=mask)
    expected = decoder_layer(Algebra(), stock.state_dict(), x, memory, causal, mask, HEADS)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
