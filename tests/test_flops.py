"""The FLOPs formula compared with torch's own counter, at real sizes on the meta device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.conformance import MORE_KINDS, Bench, bench
from tests.conformance.bench import GRID, Case, config, make_model
from tests.conformance.bench import make_batch as conformance_batch
from tests.conformance.cases import CASES as CONFORMANCE
from tests.conformance.cases import at
from tests.runs import FEATURE_DIM, make_batch, tiny_module
from vlpet_lightning import Batch
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.commands.params import model_of
from vlpet_lightning.device_peaks import arithmetic_of, peak_flops
from vlpet_lightning.flops import Matrices, Sizes, sizes_of, training_flops
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet import LadderSideNetwork

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
TEXT, IMAGES, TARGET = 20, 36, 6
KINDS = ("bart", "t5")
T5 = ["backbone/t5_base.yaml"]
CASES = {
    "vlpet_large": (["pet/vlpet_large.yaml"], 0.02),
    "vlpet_small": (["pet/vlpet_small.yaml"], 0.02),
    "lora": (["pet/lora.yaml"], 0.02),
    "vl_adapter": (["pet/vl_adapter.yaml"], 0.02),
    "compacter": (["pet/compacter.yaml"], 0.04),  # its weights are generated, and products with them are not counted
    "bitfit": (["pet/bitfit.yaml"], 0.02),
    "frozen": (["pet/frozen.yaml"], 0.02),
    "full": (["pet/full.yaml"], 0.02),
    "vlpet_large_t5": ([*T5, "pet/vlpet_large_t5.yaml"], 0.02),
    "full_t5": ([*T5, "pet/full_t5.yaml"], 0.02),
    "lst": (["pet/lst.yaml"], 1e-5),
    "lst_t5": ([*T5, "pet/lst_t5.yaml"], 1e-5),
}


def counted(model: VLModel, batch: Batch) -> tuple[int, int]:
    """Count forward and backward FLOPs with torch, whose counter does not support fused attention on CPUs."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        total, count = model.loss_terms(batch)
        forward = counter.get_total_flops()
        (total / count).backward()
    return forward, counter.get_total_flops() - forward


def sample(text: int = TEXT, images: int = IMAGES, target: int = TARGET, width: int = 2048) -> Batch:
    return Batch(
        task="gqa",
        input_ids=torch.full((1, text), 7),
        features=torch.zeros(1, images, width),
        labels=torch.full((1, target), 7),
    )


AT_FULL_SIZE = ("vlpet_large", "vlpet_large_t5", "lora", "full", "lst")  # the others are slow


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in AT_FULL_SIZE else pytest.mark.slow) for name in CASES]
)
def test_the_formula_counts_what_torch_counts_at_the_real_size(name):
    overlays, tolerance = CASES[name]
    words = [word for path in ("image_text.yaml", *overlays) for word in ("--config", str(EXPERIMENTS / path))]
    model = model_of(words).train().to_empty(device="cpu")  # values do not matter
    forward, backward = counted(model, sample())
    found = training_flops(sizes_of(model), images=IMAGES, source=TEXT + IMAGES, target=TARGET)
    assert found == pytest.approx(forward + backward, rel=tolerance)
    # those of the vocabulary projection are computed with the loss
    if name.startswith("lst"):  # no gradient passes through the backbone
        assert backward < 0.3 * forward
    else:
        assert backward > 0.75 * forward


def test_the_formula_counts_what_torch_counts_at_the_tiny_size(tiny_backbone):
    module = tiny_module(tiny_backbone)
    module.configure_model()
    batch = make_batch("gqa", 3, 0)
    source = batch.input_ids.shape[1] + 4
    found = training_flops(sizes_of(module.model), images=4, source=source, target=batch.labels.shape[1])
    assert batch.features.shape[-1] == FEATURE_DIM
    assert 3 * found == pytest.approx(sum(counted(module.model, batch)), rel=0.05)


@pytest.mark.parametrize("name", ["vlpet-large", "full"])
@pytest.mark.parametrize("kind", MORE_KINDS)
def test_the_formula_counts_other_backbones(kind, name):
    case = next(case for case in CONFORMANCE if case.name == name)
    model, batch = Bench(case, kind).fresh().train(), conformance_batch(kind, "gqa")
    source = batch.input_ids.shape[1] + model.visual.tokens(batch.features)
    batch.labels = batch.labels.clamp(min=2)  # the loss is computed for real targets only
    found = training_flops(sizes_of(model), images=4, source=source, target=batch.labels.shape[1])
    assert len(batch) * found == pytest.approx(sum(counted(model, batch)), rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "target", "settings"),
    [(5, 3, {}), (2, 7, {}), (5, 3, {"reduction": 2}), (5, 3, {"encoder_layers": [1], "decoder_layers": [0]})],
)
def test_operations_of_both_networks_are_those_that_torch_counts(kind, text, target, settings):
    case = Case("ladder", (at(("side",), LadderSideNetwork, **settings),), lambda sizes: 0)
    model = make_model(case, kind, BACKBONES[kind].build(config(kind))).train()
    images = GRID**2
    batch = sample(text, images, target, width=bench.FEATURE_DIM)
    found = training_flops(sizes_of(model), images=images, source=text + images, target=target)
    box = 2 * 2 * 5 * bench.WIDTH  # the embedding of the zero box, for all tokens at once, is left out of the formula
    assert found + box == sum(counted(model, batch))


def test_backbone_beside_a_side_network_reads_text_and_passes_no_gradient():
    case = Case("ladder", (at(("side",), LadderSideNetwork),), lambda sizes: 0)
    with torch.device("meta"):
        sizes = sizes_of(make_model(case, "bart", BACKBONES["bart"].build(config("bart"))))
    width, inner, layers, narrow = bench.WIDTH, bench.INNER, bench.LAYERS, bench.WIDTH // 4
    encoder_layer, keys_and_values, down = 4 * width**2 + 2 * width * inner, 2 * width**2, width * narrow
    text = layers * (encoder_layer + keys_and_values + down)
    assert sizes.matrices["text"] == Matrices(text, trained=layers * down, passed=0)
    found = {(one.width, one.queries, one.keys): passed for one, passed in sizes.attentions}
    assert found == {
        (width, "text", "text"): False,
        (width, "target", "target"): False,
        (width, "target", "text"): False,
        (narrow, "source", "source"): True,
        (narrow, "target", "target"): True,
        (narrow, "target", "source"): True,
    }


def test_a_frozen_backbone_costs_two_thirds_of_a_trained_one():
    weights = 1000
    trained = Sizes({"source": Matrices(weights, weights, weights)})
    frozen = Sizes({"source": Matrices(weights, 0, weights)})
    tokens = {"images": 0, "source": 7, "target": 0}
    assert training_flops(trained, **tokens) == 6 * weights * 7
    assert training_flops(frozen, **tokens) == 4 * weights * 7


@pytest.mark.parametrize(
    ("device", "arithmetic", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "tf32", 417.5),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA A100-SXM4-40GB", "tf32", 156),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("Tesla V100-SXM2-32GB", "fp32", 15.7),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 3090", "bf16", 71),
        ("NVIDIA GeForce RTX 4090", "fp32", 82.6),
    ],
)
def test_the_peak_of_a_device_is_the_published_one(device, arithmetic, teraflops):
    assert peak_flops(device, arithmetic) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(("device", "arithmetic"), [("Some Card 9000", "fp32"), ("Tesla T4", "bf16")])
def test_a_peak_that_nobody_published_is_none(device, arithmetic):
    assert peak_flops(device, arithmetic) is None


@pytest.mark.parametrize(
    ("precision", "matmul", "arithmetic"),
    [
        ("bf16-mixed", "highest", "bf16"),
        ("16-mixed", "highest", "fp16"),
        ("32-true", "highest", "fp32"),
        ("32-true", "high", "tf32"),
    ],
)
def test_the_arithmetic_is_that_of_the_matrix_products(monkeypatch, precision, matmul, arithmetic):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul)
    assert arithmetic_of(precision) == arithmetic
