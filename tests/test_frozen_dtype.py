"""Frozen weights stored in bfloat16: which ones, what they compute, and that checkpoints and exports do not change."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.conformance.bench import Bench, gradients
from tests.conformance.cases import CASES
from tests.runs import Batches, make_batch, quiet_trainer, tiny_module
from vlpet_lightning import load_pet
from vlpet_lightning.frozen_weights import cast_frozen
from vlpet_lightning.interop.export.merge import merge_units
from vlpet_lightning.interop.export.pet_files import load_weights, save_pet
from vlpet_lightning.pet import LoRA, Placement

KINDS = ("bart", "t5")


def case(name):
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("kind", KINDS)
def test_only_frozen_weights_of_linear_layers_of_the_backbone_are_converted(kind):
    model = Bench(case("vlpet-large"), kind).fresh()
    before = {name: p.dtype for name, p in model.named_parameters()}
    converted = cast_frozen(model, torch.bfloat16)
    assert set(before.values()) == {torch.float32}
    halves = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    matrices = {
        name
        for name, p in model.named_parameters()
        if name.startswith("lm.")
        and p.dim() == 2
        and not p.requires_grad
        and "embed" not in name
        and "shared" not in name
    }
    matrices -= {name for name in matrices if "relative_attention_bias" in name}
    assert halves == matrices
    assert converted == sum(p.numel() for name, p in model.named_parameters() if name in halves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vlpet-large", "lora", "dora", "hyperformer-block"])
def test_loss_and_gradients_are_those_of_autocast(kind, name):
    """Autocast converts the same weights in every step: storing them converted changes no result."""
    bench = Bench(case(name), kind)
    model, batch = bench.loud(), bench.batch()
    stored = copy.deepcopy(model)
    cast_frozen(stored, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = gradients(model, batch), gradients(stored, batch)
        torch.testing.assert_close(stored.loss(batch), model.loss(batch), rtol=0, atol=0)
        assert torch.equal(
            stored.generate(batch, num_beams=2, max_length=5), model.generate(batch, num_beams=2, max_length=5)
        )
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0)


def test_a_layer_whose_unit_reads_its_weight_keeps_it():
    model = Bench(case("dora"), "bart").fresh()
    cast_frozen(model, torch.bfloat16)
    layer = model.lm.model.encoder.layers[0].self_attn
    assert layer.q_proj.weight.dtype == torch.float32
    assert layer.out_proj.weight.dtype == torch.bfloat16


def test_a_run_trains_and_resumes_in_either_type(tiny_backbone, tmp_path):
    data = Batches([make_batch("gqa", 3, seed) for seed in range(2)])
    module = tiny_module(tiny_backbone, frozen_dtype="bfloat16")
    trainer = quiet_trainer(tmp_path, precision="bf16-mixed", max_epochs=1)
    trainer.fit(module, data)
    assert module.model.lm.model.encoder.layers[0].fc1.weight.dtype == torch.bfloat16
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    again = tiny_module(tiny_backbone)
    quiet_trainer(tmp_path, max_epochs=2).fit(again, data, ckpt_path=tmp_path / "a.ckpt")


def test_an_export_loads_into_float32(tiny_backbone, tmp_path):
    module = tiny_module(tiny_backbone, frozen_dtype="bfloat16")
    module.configure_model()
    save_pet(module, tmp_path / "out")
    exact = tiny_module(tiny_backbone)
    exact.configure_model()
    load_weights(exact.model, tmp_path / "out")
    loaded = load_pet(tmp_path / "out", str(tiny_backbone))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    load_weights(module.model, tmp_path / "out")  # its backbone is the recorded one, although it is converted


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_trainer_without_bf16_is_refused(tiny_backbone, tmp_path, precision):
    module = tiny_module(tiny_backbone, frozen_dtype="bfloat16")
    module._trainer = type("Trainer", (), {"precision": precision, "datamodule": None})()
    with pytest.raises(ValueError, match=f"frozen_dtype bfloat16 needs autocast.*{precision}.*bf16-mixed"):
        module.configure_model()
    assert module.model is None


def test_an_unknown_type_is_refused(tiny_backbone):
    for dtype in ("int8", "nf4"):
        with pytest.raises(ValueError, match=f"frozen_dtype must be one of float32, bfloat16, got '{dtype}'"):
            tiny_module(tiny_backbone, frozen_dtype=dtype)


def test_converted_weights_are_not_merged(tiny_backbone):
    lora = [Placement(["encoder.attn.query"], lambda width: LoRA(width, rank=2))]
    module = tiny_module(tiny_backbone, frozen_dtype="bfloat16", placements=lora)
    module.configure_model()
    with pytest.raises(ValueError, match="merge a model with frozen_dtype float32"):
        merge_units(module.model)
