"""Ladder Side-Tuning: its formulas, its gradients, and errors of its settings."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.conformance.bench import FEATURE_DIM, GRID, HEADS, loud, make_batch, stock
from tests.oracles.ladder import logits as by_hand
from vlpet_lightning.answers import sequence_probabilities
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.interop.hf.hf_peft import HFPeft
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet import Adapter, LadderSideNetwork, LoRA, Placement

KINDS = ("bart", "t5")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # the stock norm computes its variance in float32


def build(kind, trainable=("pet", "visual_embedding"), placements=None, layers=2, extension=None, **settings):
    """Build a tiny model with a side network."""
    lm = copy.deepcopy(stock(kind, layers))
    side = [Placement(["side"], partial(LadderSideNetwork, **settings))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return VLModel(
            BACKBONES[kind],
            lm,
            feature_dim=FEATURE_DIM,
            grid=GRID,
            placements=side if placements is None else placements,
            trainable=trainable,
            extension=extension,
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("settings", [{}, {"encoder_layers": [1], "decoder_layers": [0, 2], "temperature": 0.7}])
def test_the_network_is_that_of_the_formulas(attention, settings):
    model = build("t5", layers=3, **settings).double().eval()
    model.lm.set_attn_implementation(attention)
    for name in ("encoder", "decoder"):
        getattr(model.side, name).stack.set_attn_implementation(attention)
    loud(dict(model.named_parameters()))
    batch = make_batch("t5", "vqa")
    images = model.visual(batch.features.double(), None, model.lm.shared.weight)
    targets = torch.randint(2, 50, (3, 5), generator=torch.Generator().manual_seed(1))
    beside = tuple(settings.get(f"{name}_layers", range(3)) for name in ("encoder", "decoder"))
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    temperature = settings.get("temperature", 0.1)
    expected = by_hand(weights, batch.input_ids, images, targets, heads=HEADS, beside=beside, temperature=temperature)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(batch, targets), expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_propagated_back_through_the_backbone(kind):
    model, batch = build(kind).train(), make_batch(kind, "vqa")
    seen = []
    for module in model.lm.modules():
        module.register_forward_hook(
            lambda module, args, out: seen.extend(
                t for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t)
            )
        )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = model.loss(batch)
    inside = [t for t in seen if t.requires_grad and t.shape[-1] != 50]  # the output layer reads the side network
    assert len(seen) > 40
    assert not inside
    widths = [t.shape[-1] for t in saved if t.dim() == 3]
    assert widths.count(32) <= 2 * 2 + 2 + 2  # inputs of the projections down, and of the first ones
    loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbone_reads_text_alone(kind):
    model, batch = build(kind).eval(), make_batch(kind, "vqa")
    loud(model.unit_parameters())
    other = replace(batch, features=batch.features + 1)
    (text, side), (same, differs) = model.encode(batch), model.encode(other)
    assert text.shape == (3, 6, 32)
    assert side.shape == (3, 6 + GRID**2, 8)
    assert torch.equal(text, same)
    assert not torch.allclose(side, differs)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    """A sample has the same logits beside a longer one."""
    model, batch = build(kind).eval(), make_batch(kind, "vqa")
    loud(model.unit_parameters())
    short = replace(
        batch, input_ids=batch.input_ids[-1:, :4], features=batch.features[-1:], labels=batch.labels[-1:], weights=None
    )
    with torch.no_grad():
        torch.testing.assert_close(model(short), model(batch)[-1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gates_start_half_open(kind):
    side = build(kind).side
    assert len(side.gate_parameters()) == 4
    assert all(torch.equal(gate, torch.zeros(1)) for gate in side.gate_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_answers_have_the_probability_of_their_tokens(kind):
    model, batch = build(kind).eval(), make_batch(kind, "vqa")
    loud(model.unit_parameters())
    ids = model.generate(batch, num_beams=3, max_length=5, answers=2)
    found = sequence_probabilities(model, batch, ids)
    for row in range(len(ids)):
        one = replace(batch, input_ids=batch.input_ids[row // 2][None], features=batch.features[row // 2][None])
        with torch.no_grad():
            log_probabilities = model.decode(one, ids[row : row + 1, :-1])[0].log_softmax(dim=-1)
        tokens = ids[row, 1:].tolist()
        tokens = (
            tokens[: tokens.index(model.lm.config.eos_token_id) + 1]
            if model.lm.config.eos_token_id in tokens
            else tokens
        )
        expected = sum(log_probabilities[place, token] for place, token in enumerate(tokens)).exp()
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-7)


def test_peft_beside_a_side_network_is_refused():
    pytest.importorskip("peft")
    peft = HFPeft({"class_path": "peft.LoraConfig", "init_args": {"r": 2, "target_modules": ["q_proj"]}})
    with pytest.raises(ValueError, match="a method of Hugging Face peft beside a LadderSideNetwork"):
        build("bart", extension=peft)


# settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": 5}, "a reduction of 5 does not divide the backbone's width of 32"),
        ({"reduction": 0}, "reduction must be at least 1, got 0"),
        ({"encoder_layers": [0, 2]}, "encoder_layers: there is no layer 2; the encoder has layers 0 to 1"),
        ({"decoder_layers": []}, "decoder_layers must name at least one layer, in ascending order, got []"),
        ({"decoder_layers": [1, 0]}, "decoder_layers must name at least one layer, in ascending order, got [1, 0]"),
        ({"temperature": 0}, "temperature must be more than 0"),
        ({"start": "magnitude"}, "start must be one of pruned, fresh, got 'magnitude'"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_settings_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match="^" + message.replace("[", r"\[").replace("]", r"\]")):
        build(kind, **settings)


@pytest.mark.parametrize(("kind", "width"), [("bart", "attention heads"), ("t5", "d_kv of 8")])
def test_a_reduction_must_fit_the_heads(kind, width):
    with pytest.raises(ValueError, match=f"a reduction of 16 .*{width}"):
        build(kind, reduction=16)


def test_units_inside_the_backbone_are_refused():
    placements = [Placement("side", LadderSideNetwork), Placement("encoder.attn.query", partial(LoRA, rank=2))]
    with pytest.raises(
        ValueError, match=r"a side network, and units inside the backbone at encoder\.attn\.query: noth"
    ):
        build("bart", placements=placements)


def test_a_side_network_stands_at_its_site_alone():
    with pytest.raises(ValueError, match=r"LadderSideNetwork at site 'encoder\.ffn' runs beside the whole backbone"):
        build("bart", placements=[Placement("encoder.ffn", LadderSideNetwork)])
    with pytest.raises(ValueError, match="Adapter at site 'side' is no side network"):
        build("bart", placements=[Placement("side", partial(Adapter, rank=2))])
    with pytest.raises(ValueError, match="two units at site 'side'"):
        build("bart", placements=[Placement("side", LadderSideNetwork), Placement("side", LadderSideNetwork)])


@pytest.mark.parametrize("rule", ["encoder.layer_norm", "bias", "language_model", "all"])
def test_rules_that_train_the_backbone_are_refused(rule):
    with pytest.raises(ValueError, match=f"trainable rule '{rule}' selects .* tensors of the backbone"):
        build("bart", trainable=("pet", rule))


def test_the_visual_embedding_may_be_frozen():
    model = build("t5", trainable=("pet",)).train()
    model.loss(make_batch("t5", "vqa")).backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"side"}
