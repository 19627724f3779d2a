"""Merging units into their layers, and LoRA in Hugging Face peft's format."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.interop.export.exported import loud, module_of
from tests.runs import make_batch, placements
from vlpet_lightning import load_pet, merge_units
from vlpet_lightning.interop.export.merge import save_merged
from vlpet_lightning.interop.export.pet_files import check_exportable
from vlpet_lightning.interop.hf.peft_format import save_peft
from vlpet_lightning.pet import IA3, Adapter, LoRA, PerTask, Placement, Prompt, UnitLinear

PROJECTIONS = [f"{stack}.attn.{part}" for stack in ("encoder", "decoder") for part in ("query", "value")]
LORA = Placement([*PROJECTIONS, "decoder.cross.value"], partial(LoRA, rank=4, alpha=8))
SCALES = Placement(["encoder.attn", "encoder.ffn.inner", "decoder.cross.memory", "decoder.attn.key"], IA3)
MERGEABLE = {
    "lora": [LORA],
    "ia3": [SCALES],
    "both": [LORA, SCALES],
    # two units at one layer, on its input and its output
    "one layer": [
        Placement(["decoder.cross.memory"], IA3),
        Placement(["decoder.cross.key", "decoder.cross.value"], partial(LoRA, rank=4)),
    ],
}


@pytest.fixture
def make(tiny_backbone, tiny_t5):
    def made(kind, where, trainable=("pet", "visual_embedding"), **changes):
        backbone = {"bart": tiny_backbone, "t5": tiny_t5}[kind]
        module = module_of(kind, backbone, placements=where, trainable=list(trainable), **changes)
        loud(module.model).eval()
        return module

    return made


def strengthen(model):
    """Enlarge the backbone's weights so that scaling a channel matters; fresh weights are almost zero."""
    with torch.no_grad():
        for layers in model.backbone.layers(model.lm).values():
            for layer in layers:
                for module in layer.modules():
                    if isinstance(module, UnitLinear):
                        module.weight.normal_(std=0.3)


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["bart", "t5"])
@pytest.mark.parametrize("method", MERGEABLE)
def test_a_merged_model_computes_the_same(make, kind, method):
    model, batch = make(kind, MERGEABLE[method]).model, make_batch("vqa", 3, 0)
    strengthen(model)
    before = model(batch)
    model.enabled = False
    assert (model(batch) - before).abs().max() > 1e-3
    model.enabled = True
    assert merge_units(model) is model
    torch.testing.assert_close(model(batch), before, rtol=1e-5, atol=1e-5)
    assert not model.injected
    assert not model.unit_parameters()
    assert not any(".unit." in name or ".input_unit." in name for name in model.state_dict())
    assert all(m.unit is None and m.input_unit is None for m in model.modules() if isinstance(m, UnitLinear))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            [Placement(["decoder.ffn"], partial(Adapter, rank=4))],
            r"'decoder\.ffn' \(fc2\): Adapter cannot be merged: it is not",
        ),
        (
            [Placement(["encoder.attn"], LoRA)],
            r"'encoder\.attn' \(self_attn\.out_proj\): LoRA cannot be merged: there it reads the input of the whole",
        ),
        (
            [Placement(["encoder.ffn"], LoRA)],
            r"'encoder\.ffn' \(fc2\): LoRA cannot be merged: there it reads the input of the whole",
        ),
        ([Placement(["encoder.ffn.inner"], LoRA)], "LoRA cannot be merged at a site on the input of a layer"),
        ([Placement(["decoder.prompt"], partial(Prompt, length=2, hidden=4))], "Prompt cannot be merged: its tokens"),
        ([Placement(["decoder.attn.key"], partial(PerTask, unit=LoRA, tasks=["vqa"]))], "a unit a task"),
        (placements(), "VLPET cannot be merged"),
    ],
)
def test_a_unit_that_cannot_be_merged_says_why_and_nothing_is_changed(make, where, message):
    model, batch = make("bart", where if len(where) > 1 else [LORA, *where]).model, make_batch("vqa", 3, 0)
    before, output = values(model), model(batch)
    with pytest.raises(ValueError, match=message):
        merge_units(model)
    after = values(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(batch), output)


def test_a_unit_a_task_is_merged_for_a_given_task(make):
    per_task = partial(PerTask, unit=partial(LoRA, rank=4), tasks=["vqa", "gqa"])
    outputs = {}
    for task in ("vqa", "gqa"):
        model, batch = make("bart", [Placement(PROJECTIONS, per_task)]).model, make_batch(task, 3, 0)
        before = model(batch)
        with pytest.raises(ValueError, match="no unit for task 'caption' to merge: there are vqa, gqa"):
            merge_units(model, task="caption")
        outputs[task] = merge_units(model, task=task)(batch)
        torch.testing.assert_close(outputs[task], before, rtol=1e-5, atol=1e-5)
    assert (outputs["vqa"] - outputs["gqa"]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_merged_folder_is_a_backbone_with_an_export_that_belongs_to_it(make, tmp_path, kind):
    module = make(kind, [LORA], ["pet", "visual_embedding", "encoder.layer_norm"])
    batch = make_batch("vqa", 3, 0)
    before = module.model(batch)
    record = save_merged(module.model, tmp_path, module.tokenizer, backbone=module.backbone_name)
    assert record["method"].startswith("LoRA(rank=4")
    heading = f"# Parameter-efficient tuning of {Path(module.backbone_name).name}\n"
    assert heading in (tmp_path / "README.md").read_text()
    torch.testing.assert_close(load_pet(tmp_path)(batch), before, rtol=1e-5, atol=1e-5)
    whole = load_file(tmp_path / "model.safetensors")
    assert not any("unit" in name for name in whole)
    assert all(name.startswith("visual.") for name in load_file(tmp_path / "pet_model.safetensors"))


# Hugging Face peft's format -----------------------------------------------------------------------------------------


def logits(lm, batch):
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.input_ids != lm.config.pad_token_id}
    return lm(**inputs, decoder_input_ids=batch.labels.clamp(min=0), use_cache=False).logits


# peft uses a deprecated name of transformers
OLD_NAME = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@OLD_NAME
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_lora_loads_in_peft_with_equal_outputs(make, tmp_path, kind):
    peft = pytest.importorskip("peft")
    two = [LORA, Placement(["decoder.cross.query"], partial(LoRA, rank=2, alpha=4))]
    module = make(kind, two)
    model, batch = module.model, make_batch("vqa", 3, 0)
    save_peft(model, tmp_path, backbone=module.backbone_name)
    assert len(json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]) == 2
    expected = logits(model.lm, batch)
    model.enabled = False
    assert (logits(model.lm, batch) - expected).abs().max() > 1e-2

    bare = module_of(kind, module.backbone_name, placements=[], trainable=["visual_embedding"]).model.eval()
    bare.set_added_rows(load_file(tmp_path / "pet_model.safetensors")["added_vocabulary"])
    loaded = peft.PeftModel.from_pretrained(bare.lm, tmp_path).eval()
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-6, atol=1e-6)
    held = load_file(tmp_path / "pet_model.safetensors")
    assert not any("lora" in name for name in held)
    assert "visual.feature.0.weight" in held
    assert "PeftModel.from_pretrained" in (tmp_path / "README.md").read_text()
    again = load_pet(tmp_path, module.backbone_name)
    ours = again.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())


@OLD_NAME
def test_a_method_of_peft_exports_in_its_format(make, tmp_path):
    peft = pytest.importorskip("peft")
    method = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "use_dora": True, "target_modules": ["q_proj"]}}
    module = make("bart", [], peft=method)
    model, batch = module.model, make_batch("vqa", 3, 0)
    save_peft(model, tmp_path, backbone=module.backbone_name)
    bare = module_of("bart", module.backbone_name, placements=[], trainable=["visual_embedding"]).model.eval()
    bare.set_added_rows(model.added_rows)
    loaded = peft.PeftModel.from_pretrained(bare.lm, tmp_path).eval()
    torch.testing.assert_close(logits(loaded, batch), logits(model.lm, batch), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="merge it with peft's own"):
        merge_units(model)
    again = load_pet(tmp_path, module.backbone_name).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_an_adapter_file_that_is_damaged_or_missing_is_named(make, tmp_path):
    module = make("bart", [LORA])
    save_peft(module.model, tmp_path, backbone=module.backbone_name)
    adapter = tmp_path / "adapter_model.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    adapter.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged or of another export"):
        load_pet(tmp_path, module.backbone_name)
    adapter.unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model.safetensors in .*: copy the whole folder"):
        load_pet(tmp_path, module.backbone_name)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (placements(), "peft has no format for VLPET at 'encoder.attn'"),
        ([Placement(["encoder.attn"], LoRA)], "LoRA at 'encoder.attn' does not read the input of the layer"),
        ([], "has no LoRA"),
    ],
)
def test_what_peft_has_no_format_for_is_refused_and_nothing_is_written(make, tmp_path, where, message):
    module = make("bart", where, ["pet", "visual_embedding"] if where else ["visual_embedding"])
    with pytest.raises(ValueError, match=message):
        save_peft(module.model, tmp_path / "out", backbone="x")
    assert not (tmp_path / "out").exists()
    check_exportable(module.model)
