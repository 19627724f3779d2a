"""Every method's unit compared with its formula, implemented independently."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from vlpet_lightning.pet import (
    IA3,
    VLPET,
    Adapter,
    Compacter,
    Context,
    FullGate,
    Gated,
    HyperFormer,
    L2NormGate,
    LargeGate,
    LayerNormGate,
    LoRA,
    LowRankAdapter,
    LowRankProjector,
    MiddleXGate,
    MiddleYGate,
    PerTask,
    Place,
    Prompt,
    SelfGated,
    SmallGate,
)

WIDTH, RANK, LENGTH = 12, 6, 5


def loud(module, seed=1):
    """Return the module in float64, with parameters large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.normal_(std=0.5, generator=generator)
    return module


def draw(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (3, LENGTH, WIDTH)), generator=generator, dtype=torch.float64)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def gelu(value):
    """The original's gelu_new."""
    return 0.5 * value * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))


def affine(layer, value):
    return value @ layer.weight.T + layer.bias


def bottleneck(unit, value):
    return affine(unit.up, gelu(affine(unit.down, value)))


X, H = draw(2), draw(3)

# adapters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flow", "expected"),
    [
        ("sequential", lambda unit: 0.5 * H + 4 * bottleneck(unit, H)),
        ("parallel", lambda unit: 0.5 * H + 4 * bottleneck(unit, X)),
        ("replace", lambda unit: 0.5 * X + 4 * bottleneck(unit, X)),
    ],
)
def test_an_adapter_reads_and_adds_to_what_its_flow_says(flow, expected):
    unit = loud(Adapter(WIDTH, rank=RANK, flow=flow, scale=4.0, pretrained_scale=0.5))
    close(unit(X, H), expected(unit))


def test_norms_stand_before_and_behind_the_bottleneck_inside_the_sum():
    unit = loud(Adapter(WIDTH, rank=RANK, norms=["before", "after"], scale=3.0))

    def norm(layer, value):
        value = value - value.mean(dim=-1, keepdim=True)
        return value / (value.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    close(unit(X, H), H + norm(unit.norm_after, 3 * bottleneck(unit, norm(unit.norm_before, H))))


def test_pairs_of_heads_do_not_see_each_other():
    unit = loud(Adapter(WIDTH, rank=RANK, heads=3, split="pairs"))
    hidden = gelu(affine(unit.down, H)).chunk(3, dim=-1)
    weights, biases = unit.up.weight.chunk(3), unit.up.bias.chunk(3)
    parts = [part @ weight.T + bias for part, weight, bias in zip(hidden, weights, biases, strict=True)]
    close(unit(X, H), H + torch.cat(parts, dim=-1))


@pytest.mark.parametrize("split", ["down", "up", "both"])
def test_other_heads_are_one_linear_layer_together(split):
    torch.manual_seed(0)
    plain = Adapter(WIDTH, rank=RANK)
    torch.manual_seed(0)
    split_up = Adapter(WIDTH, rank=RANK, heads=3, split=split)
    close(split_up(X.float(), H.float()), plain(X.float(), H.float()))


def test_a_compacter_is_a_sum_of_kronecker_products():
    unit = loud(Compacter(WIDTH, rank=RANK, division=3))

    def phm(layer, value):
        matrix = sum(torch.kron(a, w) for a, w in zip(layer.rule.weight, layer.W, strict=True))
        return value @ matrix + layer.b

    close(unit(X, H), H + phm(unit.up, gelu(phm(unit.down, H))))


def test_factors_of_a_compacter_may_be_of_low_rank_and_its_rule_may_be_shared():
    shared = nn.ModuleDict()
    units = [Compacter(WIDTH, rank=RANK, division=2, factor_rank=1, shared_rule=True) for _ in range(2)]
    for layer, unit in enumerate(units):
        unit.join(Place("encoder.attn", "encoder", layer, 2), shared)
    (rule,) = loud(shared).parameters()
    for unit in map(loud, units):
        assert not any("rule" in name for name, _ in unit.named_parameters())
        for layer in (unit.down, unit.up):
            small = layer.W_left @ layer.W_right
            assert torch.linalg.matrix_rank(small).tolist() == [1, 1]
            close(layer.matrix(), sum(torch.kron(a, w) for a, w in zip(rule, small, strict=True)))


def test_a_fresh_compacter_is_drawn_as_in_the_original():
    torch.manual_seed(0)
    unit = Compacter(768, rank=96, division=2)
    assert unit.down.rule.weight.std() < 0.03  # N(0, 0.01)
    bound = math.sqrt(2) * math.sqrt(6 / (768 / 2 + 96 / 2))  # Xavier with gain sqrt(2), separately for each W_i
    assert unit.down.W.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert unit.down.b.abs().max() == 0


def test_a_low_rank_adapter_has_projections_of_that_rank():
    unit = loud(LowRankAdapter(WIDTH, rank=RANK, factor_rank=2))

    def low(layer, value):
        matrix = layer.left @ layer.right
        assert torch.linalg.matrix_rank(matrix) == 2
        return value @ matrix + layer.b

    close(unit(X, H), H + low(unit.up, gelu(low(unit.down, H))))


# gates and what stands in their place -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (partial(FullGate, scale=2.0), lambda gate, x, h: h * 2 * torch.sigmoid(affine(gate.full, x))),
        (
            partial(LargeGate, rank=4, scale=3.0),
            lambda gate, x, h: h * 3 * torch.sigmoid(affine(gate.up, gelu(affine(gate.down, x)))),
        ),
        (
            partial(MiddleYGate, form="paper", scale=0.7),
            lambda gate, x, h: h * 0.7 * (torch.sigmoid(gate.vector) + 1),
        ),
        (L2NormGate, lambda gate, x, h: h / h.square().sum(dim=-1, keepdim=True).sqrt()),
        (
            LayerNormGate,
            lambda gate, x, h: (
                (h - h.mean(-1, keepdim=True))
                / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
                * gate.norm.weight
                + gate.norm.bias
            ),
        ),
    ],
)
def test_gates_beside_the_four_are_their_formulas(gate, expected):
    unit = loud(Gated(WIDTH, gate=gate))
    close(unit(X, H), expected(unit.gate, X, H))


@pytest.mark.parametrize("gate", [MiddleXGate, SmallGate, MiddleYGate, partial(LargeGate, rank=4)])
def test_a_gate_may_be_added(gate):
    unit = loud(VLPET(WIDTH, rank=RANK, heads=2, gate=gate, combine="add"))
    adapted = H + bottleneck(unit, H)
    close(unit(X, H), adapted + unit.gate(X, adapted))


def test_a_gate_around_a_unit_reads_what_it_is_told_and_may_stand_inside_a_residual():
    build = partial(Gated, unit=partial(Adapter, rank=RANK), gate=MiddleXGate, scale=0.3, residual="x")
    for reads in ("adapted", "sublayer"):
        unit = loud(build(WIDTH, reads=reads))
        adapted = H + bottleneck(unit.unit, H)
        score = affine(unit.gate.score, X + (adapted if reads == "adapted" else H))
        close(unit(X, H), X + 0.3 * torch.sigmoid(score) * adapted)


def test_gating_alone_uses_its_own_argument_as_the_update():
    for gates in ("h", "sum"):
        unit = loud(SelfGated(WIDTH, rank=RANK, gates=gates, scale=0.5))
        delta = bottleneck(unit, X)
        gate = torch.sigmoid(delta)
        close(unit(X, H), 0.5 * ((delta + H) * gate if gates == "sum" else delta + H * gate))


def test_a_scale_without_the_papers_form_is_refused():
    with pytest.raises(ValueError, match=r"scale 2\.0 belongs to `form: paper`"):
        MiddleYGate(WIDTH, scale=2.0)


# LoRA, IA3, prompts -------------------------------------------------------------------------------------------------


def test_lora_adds_its_scaled_product_and_starts_as_nothing():
    torch.manual_seed(0)
    unit = LoRA(WIDTH, rank=4, alpha=32.0)
    assert torch.equal(unit(X.float(), H.float()), H.float())
    assert unit.lora_A.weight.abs().max() <= 1 / math.sqrt(WIDTH)  # kaiming with a = sqrt(5)
    loud(unit).eval()
    close(unit(X, H), H + 8 * X @ unit.lora_A.weight.T @ unit.lora_B.weight.T)


def test_loras_dropout_is_on_its_input_alone():
    unit = loud(LoRA(WIDTH, rank=4, dropout=1.0))
    close(unit.train()(X, H), H)


@pytest.mark.parametrize("form", ["scale", "delta"])
def test_ia3_rescales_channels(form):
    fresh = IA3(WIDTH, form=form).double()
    assert torch.equal(fresh(X, H), H)
    unit = loud(IA3(WIDTH, form=form))
    close(unit(X, H), H * (unit.vector if form == "scale" else 1 + unit.vector))


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("form", ["scale", "delta"])
def test_ia3_and_its_merged_layer_agree(form, side):
    layer, unit = loud(nn.Linear(WIDTH, WIDTH)), loud(IA3(WIDTH, form=form), seed=4)
    expected = unit(X, layer(X)) if side == "output" else layer(unit(X, X))
    unit.merge(layer, side=side)
    close(layer(X), expected)


def test_lora_and_its_merged_layer_agree():
    layer, unit = loud(nn.Linear(WIDTH, WIDTH)), loud(LoRA(WIDTH, rank=4), seed=4).eval()
    expected = unit(X, layer(X))
    unit.merge(layer)
    close(layer(X), expected)


def test_a_unit_that_cannot_be_merged_says_why():
    for unit in (Adapter(WIDTH, rank=RANK), Prompt(WIDTH, length=2, hidden=3)):
        with pytest.raises(ValueError, match=f"{type(unit).__name__} cannot be merged: it"):
            unit.merge(nn.Linear(WIDTH, WIDTH))


def test_a_prompt_is_reparametrised_and_comes_first():
    unit = loud(Prompt(WIDTH, length=2, hidden=3))
    tokens = affine(unit.up, torch.tanh(affine(unit.down, unit.embedding.weight)))
    close(unit(H, H), torch.cat([tokens.expand(3, -1, -1), H], dim=1))


def test_a_projector_gates_its_low_rank_projection():
    for residual in (False, True):
        unit = loud(LowRankProjector(7, WIDTH, rank=RANK, gate_rank=4, residual=residual))
        features = draw(5, 2, 3, 7)
        gate = torch.sigmoid(affine(unit.gate_up, gelu(affine(unit.gate_down, features))))
        close(unit(features), bottleneck(unit, features) * (residual + gate))


# tasks --------------------------------------------------------------------------------------------------------------


def test_the_batchs_task_chooses_the_unit():
    unit = loud(PerTask(WIDTH, unit=partial(Adapter, rank=RANK), tasks=["vqa", "gqa"], share=["down"]))
    assert unit.units["vqa"].down is unit.units["gqa"].down
    outputs = {}
    for task in ("vqa", "gqa"):
        unit.context = Context(task)
        outputs[task] = unit(X, H)
        close(outputs[task], H + bottleneck(unit.units[task], H))
    assert not torch.allclose(outputs["vqa"], outputs["gqa"])


@pytest.mark.parametrize(
    ("context", "error", "words"),
    [
        (None, RuntimeError, "called without a batch"),
        (Context("caption"), ValueError, "no unit for task 'caption': there are vqa, gqa"),
    ],
)
def test_a_task_without_a_unit_is_an_error(context, error, words):
    unit = PerTask(WIDTH, unit=partial(Adapter, rank=RANK), tasks=["vqa", "gqa"])
    unit.context = context
    with pytest.raises(error, match=words):
        unit(X.float(), H.float())


def test_a_part_that_is_not_there_cannot_be_shared():
    with pytest.raises(ValueError, match="Adapter has no part 'gate' to share: choose from down, up"):
        PerTask(WIDTH, unit=partial(Adapter, rank=RANK), tasks=["vqa", "gqa"], share=["gate"])


SITES = {"encoder.ffn": "feed_forward", "encoder.attn": "self_attention"}


def hyper(generators):
    shared = nn.ModuleDict()
    build = partial(HyperFormer, tasks=["vqa", "gqa"], rank=RANK, embedding=7, hidden=5, projected=3)
    units = {}
    for site in SITES:
        for layer in range(2):
            units[site, layer] = build(WIDTH, generators=generators)
            units[site, layer].join(Place(site, "encoder", layer, 2), shared)
    return loud(shared), units


@pytest.mark.parametrize("generators", ["block", "one"])
def test_hyperformer_makes_its_weights_from_task_layer_and_block(generators):
    shared, units = hyper(generators)
    net, vectors = shared["hypernet_encoder"], shared["task_embedding"].vectors
    for (site, layer), unit in units.items():
        assert list(unit.parameters()) == []
        for task in ("vqa", "gqa"):
            unit.context = Context(task)
            block = SITES[site]
            parts = [vectors[task], net.layer_embedding.weight[layer]]
            if generators == "one":
                index = {"feed_forward": 0, "self_attention": 1, "cross_attention": 2}[block]
                parts.append(net.block_embedding.weight[index])
            first, _, second = net.project
            e = affine(second, torch.relu(affine(first, torch.cat(parts))))
            e = (e - e.mean()) / (e.var(correction=0) + 1e-6).sqrt() * net.LayerNorm.weight + net.LayerNorm.bias
            name = block if generators == "block" else "all"

            def made(maker, shape, e=e):
                return affine(maker.weight_generator, e).view(shape), affine(maker.bias_generator, e)

            down, down_bias = made(net.down[name], (RANK, WIDTH))
            up, up_bias = made(net.up[name], (WIDTH, RANK))
            close(unit(X, H), H + gelu(H @ down.T + down_bias) @ up.T + up_bias)


def test_hyperformer_has_a_generator_a_kind_of_block_or_one_for_all():
    assert set(hyper("block")[0]["hypernet_encoder"].down) == {"feed_forward", "self_attention"}
    assert set(hyper("one")[0]["hypernet_encoder"].down) == {"all"}


def test_hyperformer_refuses_other_settings_in_the_same_stack_and_places_it_does_not_know():
    shared, _ = hyper("block")
    other = HyperFormer(WIDTH, tasks=["vqa", "gqa"], rank=4, embedding=7, hidden=5, projected=3)
    with pytest.raises(ValueError, match="share one network: give them the same settings"):
        other.join(Place("encoder.attn", "encoder", 0, 2), shared)
    with pytest.raises(ValueError, match=r"no place at site 'decoder\.cross\.value'"):
        other.join(Place("decoder.cross.value", "decoder", 0, 2), nn.ModuleDict())


PRODUCTS = {
    "compacter": partial(Compacter, rank=RANK, division=2),
    "factorized": partial(Compacter, rank=RANK, division=2, factor_rank=1),
    "low rank": partial(LowRankAdapter, rank=RANK, factor_rank=2),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_factor_of_a_product_that_starts_as_zero_can_learn(name):
    """Train for three steps: a factor has no gradient while the other one is zero."""
    unit = PRODUCTS[name](WIDTH).double()
    unit.start_as_identity()
    assert torch.equal(unit(X, H), H)
    start = {key: p.detach().clone() for key, p in unit.named_parameters()}
    optimizer = torch.optim.SGD(unit.parameters(), lr=1.0)
    for _ in range(4):
        optimizer.zero_grad()
        (unit(X, H) - draw(6)).square().mean().backward()
        optimizer.step()
    assert [key for key, p in unit.named_parameters() if torch.equal(p, start[key])] == []


def test_hyperformer_can_start_as_the_identity():
    shared, units = hyper("block")
    unit = units["encoder.ffn", 1]
    unit.context = Context("gqa")
    assert not torch.equal(unit(X, H), H)
    unit.start_as_identity()
    assert torch.equal(unit(X, H), H)
    (unit(X, H) - draw(6)).square().mean().backward()
    assert shared["hypernet_encoder"].up["feed_forward"].weight_generator.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Adapter(WIDTH, rank=6, heads=4), "rank 6 is not divisible by heads 4"),
        (lambda: Adapter(WIDTH, rank=5, heads=5, split="up"), "width 12 is not divisible by heads 5"),
        (
            lambda: Adapter(WIDTH, rank=6, flow="around"),
            "flow must be one of sequential, parallel, replace, got 'around'",
        ),
        (lambda: Adapter(WIDTH, rank=6, norms=["behind"]), "norms must be one of before, after, got 'behind'"),
        (lambda: Adapter(WIDTH, rank=6, init="zeros"), "unknown init 'zeros': choose from normal, uniform"),
        (lambda: Compacter(WIDTH, rank=5, division=2), "width 5 is not divisible by division 2"),
        (lambda: Compacter(WIDTH, rank=6, division=5), "width 12 is not divisible by division 5"),
        (lambda: Compacter(WIDTH, rank=6, factor_rank=0), "factor_rank must be at least 1, got 0"),
        (lambda: LoRA(WIDTH, rank=0), "rank must be at least 1, got 0"),
        (lambda: IA3(WIDTH, form="shift"), "form must be one of scale, delta, got 'shift'"),
        (lambda: Prompt(WIDTH, length=0), "length must be at least 1, got 0"),
        (lambda: PerTask(WIDTH, unit=IA3, tasks=["vqa", "vqa"]), "tasks must be different names"),
        (lambda: HyperFormer(WIDTH, tasks=[]), "tasks must be different names, at least one"),
        (lambda: Gated(WIDTH, combine="divide"), "combine must be one of multiply, add, got 'divide'"),
    ],
)
def test_settings_that_cannot_be_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: Adapter(WIDTH, rank=RANK, flow="replace"),
        lambda: SelfGated(WIDTH),
        lambda: Prompt(WIDTH),
        lambda: Gated(WIDTH, gate=LayerNormGate),
        lambda: Gated(WIDTH, residual="x"),
        lambda: VLPET(WIDTH, rank=RANK, heads=2, gate=MiddleXGate, combine="add"),
    ],
)
def test_what_has_no_identity_start_says_what_to_do(build):
    unit = build()
    assert not unit.is_identity
    with pytest.raises(ValueError, match="has no identity start"):
        unit.start_as_identity()
