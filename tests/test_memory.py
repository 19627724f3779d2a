"""Activation memory on fake tensors, compared with real tensors and with formulas."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adafactor, AdamW

from tests.conformance import MORE_KINDS
from tests.conformance.bench import FEATURE_DIM, GRID, INNER, LAYERS, Bench, Case, backbone_of, config, make_model
from tests.conformance.cases import CASES
from vlpet_lightning.cpu_kernels import torch_kernels
from vlpet_lightning.memory import (
    GPUKernels,
    autocast_type,
    fake_tensors,
    make_batch,
    optimizer_bytes,
    saved_for_backward,
    size,
)
from vlpet_lightning.optim import HFAdamW
from vlpet_lightning.pet.ladder import Rung

OURS = {case.name: case for case in CASES if case.peft is None}
SHAPE = {"text": 6, "target": 4, "features": (GRID**2,), "width": FEATURE_DIM}
KINDS = ("bart", "t5")


def on_fake_tensors(case, kind, samples=3, task=None, **settings):
    """Return the activation memory of a case; inside the fake mode, as tensors of two modes cannot be mixed."""
    with fake_tensors():
        model = make_model(case, kind, backbone_of(kind).build(config(kind))).train()
        batch = make_batch(task or case.tasks[0], samples, **SHAPE, weighted=True)
        return saved_for_backward(model, batch, **settings)


def on_real_tensors(case, kind, samples=3, **settings):
    model = Bench(case, kind).fresh().train()
    return saved_for_backward(model, make_batch(case.tasks[0], samples, **SHAPE, weighted=True), gpu=False, **settings)


def test_nothing_is_kept_after_measuring():
    model = Bench(OURS["vlpet-large"], "bart").fresh().train()
    kept = [weakref.ref(parameter) for parameter in model.parameters()]
    saved_for_backward(model, make_batch("vqa", 3, **SHAPE, weighted=True), gpu=False)
    del model
    gc.collect()
    assert not [ref for ref in kept if ref() is not None]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("bart", name) for name in list(OURS)[::2]),
        *(pytest.param("bart", name, marks=pytest.mark.slow) for name in list(OURS)[1::2]),
        *(("t5", name) for name in list(OURS)[::4]),
        *((kind, name) for kind in MORE_KINDS for name in ("vlpet-large", "prompt-both")),
    ],
)
def test_fake_tensors_save_what_real_tensors_save(kind, name):
    found = on_real_tensors(OURS[name], kind)
    assert found > 0
    assert on_fake_tensors(OURS[name], kind, gpu=False) == found


@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors_save_what_real_tensors_save_under_autocast(kind):
    case = OURS["vlpet-large"]
    found = on_real_tensors(case, kind, precision="bf16-mixed")
    fake = on_fake_tensors(case, kind, gpu=False, precision="bf16-mixed")
    assert fake == pytest.approx(found, rel=1e-3)  # means and deviations of some norms have another type
    assert found != on_real_tensors(case, kind)


def test_the_bytes_are_those_of_a_formula():
    """A two-layer network saves its input, and the hidden activation once although two functions save it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

        def loss(self, batch):
            return self.down(F.relu(self.up(batch))).sum()

    found = saved_for_backward(Net(), torch.zeros(5, 16), gpu=False)  # type: ignore[arg-type]
    assert found == 4 * 5 * (16 + 64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gpu", [True, False])
def test_activations_grow_linearly_with_the_batch(kind, gpu):
    two, four, six = (on_fake_tensors(OURS["vlpet-large"], kind, samples, gpu=gpu) for samples in (2, 4, 6))
    assert six - four == four - two
    assert four == pytest.approx(2 * two, rel=0.03)


def test_full_fine_tuning_saves_more_than_a_frozen_model():
    frozen = Case("frozen", (), lambda sizes: 0, trainable=("visual_embedding",))
    full = Case("full", (), lambda sizes: 0, trainable=("all",))
    for kind in KINDS:
        assert on_fake_tensors(full, kind) > 1.1 * on_fake_tensors(frozen, kind)
        assert on_fake_tensors(OURS["vlpet-large"], kind) > on_fake_tensors(frozen, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_side_network_saves_nothing_of_its_backbone_but_the_inputs_of_its_projections(kind):
    model = Bench(OURS["ladder"], kind).fresh().train()
    made, tapped = {}, {}  # outputs by storage, which are kept so that no storage reuses the key of another

    def record(module, args, output):
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor):
                assert not tensor.requires_grad, type(module).__name__
                made[tensor.untyped_storage()._cdata] = tensor
                if module in layers:
                    tapped[tensor.untyped_storage()._cdata] = tensor
                break

    layers = {layer for stack in model.backbone.layers(model.lm).values() for layer in stack}
    for module in model.lm.modules():
        module.register_forward_hook(record)
    batch = make_batch("vqa", 3, **SHAPE, weighted=True)
    saved = storages(lambda: model.loss(batch))
    assert len(layers) == len(tapped) < len(made)
    assert set(saved) & set(made) == set(tapped)


def test_a_rung_saves_its_inputs_and_the_projected_text():
    samples, text, images, width, narrow = 2, 3, 5, 32, 8
    rung = Rung(width, narrow, first=False, temperature=0.1, init="normal")
    rung.tap(rung, (), torch.zeros(samples, text, width))
    side = torch.zeros(samples, text + images, narrow, requires_grad=True)
    found = kept(lambda: rung(rung, (side,))[0])
    per_token = 4 * samples
    expected = [per_token * text * width, per_token * (text + images) * narrow, per_token * text * narrow]
    assert [size for size in found if size > 8] == sorted(expected)


def in_the_order_of_the_backbone(model):
    """Undo the exchange of dropout and ReLU in the side layers of T5."""
    for module in model.side.modules():
        if hasattr(module, "wo"):
            module.act, module.dropout = module.dropout, module.act
    return model


def test_dropout_before_the_relu_saves_less_and_computes_the_same():
    models = [Bench(OURS["ladder"], "t5").fresh().train() for _ in range(2)]
    in_the_order_of_the_backbone(models[1]).load_state_dict(models[0].state_dict())
    batch = make_batch("vqa", 3, **SHAPE, weighted=True)
    gradients = []
    for model in models:
        torch.manual_seed(1)
        model.loss(batch).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    with torch_kernels():  # those for a CPU keep masks of one byte in either order
        less, more = (saved_for_backward(model, batch, gpu=False) for model in models)
    tokens = 3 * (SHAPE["text"] + GRID**2 + SHAPE["target"])
    assert more - less == 4 * LAYERS * tokens * INNER // 4


def test_parameters_and_buffers_are_not_counted():
    case = OURS["vlpet-large"]
    with fake_tensors():
        model = make_model(case, "bart", backbone_of("bart").build(config("bart"))).train()
        weights = sum(map(size, model.parameters()))
        found = saved_for_backward(model, make_batch("vqa", 1, **SHAPE))
    assert found < weights  # every weight of a layer is saved for the gradient of its input


def storages(function):
    """Return the storages of the tensors that a function's graph saves, by identity."""
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return held


def kept(function):
    """Return the bytes of the tensors that a function's graph saves, once per storage."""
    return sorted(storage.nbytes() for storage in storages(function).values())


def test_attention_of_a_gpu_keeps_inputs_and_output_and_no_probabilities():
    samples, heads, length, width = 2, 4, 64, 16

    def attend():
        return F.scaled_dot_product_attention(*tensors, attn_mask=mask, dropout_p=0.1)

    with fake_tensors():
        tensors = [torch.zeros(samples, heads, length, width, requires_grad=True) for _ in range(3)]
        mask = torch.ones(samples, 1, 1, length, dtype=torch.bool)
        with GPUKernels():
            gpu = kept(attend)
        cpu = kept(attend)
    one = 4 * samples * heads * length * width
    normalizers = 4 * samples * heads * length
    # query, key, value, output; one float per row; the mask in float; seed and offset of the dropout
    assert gpu == sorted([one] * 4 + [normalizers, 4 * samples * length, 8, 8])
    probabilities = 4 * samples * heads * length * length
    assert cpu.count(probabilities) >= 2


def test_the_mask_of_a_gpu_has_aligned_rows():
    with fake_tensors(), GPUKernels():
        tensors = [torch.zeros(2, 4, 9, 16, requires_grad=True) for _ in range(3)]
        mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
        found = kept(lambda: F.scaled_dot_product_attention(*tensors, attn_mask=mask))
    assert 4 * 2 * 16 in found  # 9 rounded up to 16


def test_a_dropout_mask_of_a_gpu_has_one_byte_per_element():
    with fake_tensors():
        x = torch.zeros(10, 7, requires_grad=True)
        with GPUKernels():
            assert kept(lambda: F.dropout(x, 0.1, True)) == [70]
            assert kept(lambda: F.dropout(x, 0.1, False)) == []
            assert kept(lambda: nn.Dropout(0.0)(x)) == []
        assert kept(lambda: F.dropout(x, 0.1, True)) == [280]


def test_norms_of_a_gpu_are_float32_under_autocast():
    with fake_tensors(), torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.zeros(10, 8, dtype=torch.bfloat16, requires_grad=True)
        with GPUKernels():
            assert F.layer_norm(x, (8,)).dtype == torch.float32
            assert torch.softmax(x, 1).dtype == torch.float32
        assert F.layer_norm(x, (8,)).dtype == torch.bfloat16


def test_half_precision_saves_less():
    case = OURS["vlpet-large"]
    full, half = (on_fake_tensors(case, "bart", 64, precision=name) for name in ("32-true", "bf16-mixed"))
    assert 0.5 * full < half < 0.85 * full  # norms and residuals stay in float32
    assert on_fake_tensors(case, "bart", 64, precision="16-mixed") == half


def test_two_images_save_more_than_one():
    case = OURS["vlpet-large"]
    with fake_tensors():
        model = make_model(case, "bart", backbone_of("bart").build(config("bart"))).train()
        one, two = (
            saved_for_backward(model, make_batch(task, 2, **{**SHAPE, "features": features}))
            for task, features in (("vqa", (4,)), ("nlvr2", (2, 4)))
        )
    assert two > one


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (partial(HFAdamW, lr=0.1), lambda tensors: 2 * sum(map(size, tensors))),
        (partial(AdamW, lr=0.1), lambda tensors: 2 * sum(map(size, tensors)) + 4 * len(tensors)),
        (partial(SGD, lr=0.1), lambda tensors: 0),
        (partial(SGD, lr=0.1, momentum=0.9), lambda tensors: sum(map(size, tensors))),
        # a row, a column and a step of the matrix; all of the vector, and its step
        (partial(Adafactor, lr=0.1), lambda tensors: 4 * (30 + 20 + 1 + 7 + 1)),
    ],
)
def test_the_state_of_an_optimiser_is_that_of_a_real_step(make, expected):
    real = [nn.Parameter(torch.zeros(30, 20)), nn.Parameter(torch.zeros(7))]
    optimizer = make([{"params": real}])
    for parameter in real:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    values = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert sum(map(size, values)) == expected(real)
    with fake_tensors():
        fake = [nn.Parameter(torch.zeros(30, 20)), nn.Parameter(torch.zeros(7))]
        assert optimizer_bytes(make, fake) == expected(real)
        assert all(parameter.grad is None for parameter in fake)


def test_the_state_of_an_optimiser_that_needs_values_first_is_unknown():
    class Picky(SGD):
        def step(self, closure=None):
            return self.param_groups[0]["params"][0].grad.sum().item()

    with fake_tensors():
        assert optimizer_bytes(partial(Picky, lr=0.1), [nn.Parameter(torch.zeros(3))]) is None


def test_precisions_have_their_short_names_too():
    assert autocast_type("32") is autocast_type("32-true") is None
    assert autocast_type("bf16-mixed") == torch.bfloat16
    with pytest.raises(ValueError, match="precision '64-true' is not supported here: choose from 32-true, bf16-mixed"):
        autocast_type("64-true")
