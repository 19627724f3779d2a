"""Models loaded without their vision tower train, count and are recognised like whole ones."""

from __future__ import annotations

import copy
import re
import shutil

import pytest
import torch
from lightning import seed_everything
from safetensors.torch import load_file, save_file
from torch import nn

from tests.backbones.test_causal_runs import PLACEMENTS, RULES, Losses, batches, random_batch
from tests.backbones.tiny_vlm import DECODER, MODELS, TOWER, build, save_smolvlm
from tests.conformance.bench import gradients, through_a_file
from tests.runs import Batches, quiet_trainer
from vlpet_lightning import VLCausal
from vlpet_lightning.backbones.unloaded_tower import Unloaded, first_rows
from vlpet_lightning.frozen_weights import cast_frozen
from vlpet_lightning.interop.export.backbone_record import backbone_checksums
from vlpet_lightning.interop.export.merge import save_merged
from vlpet_lightning.model import VLModel
from vlpet_lightning.parameters import count_parameters

KINDS = sorted(MODELS)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """Return a kind, and the model of one folder, whole and without its tower."""
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param).lm.save_pretrained(folder)
    return request.param, load(request.param, folder), load(request.param, folder, tower=False)


def load(kind, folder, tower=True):
    backbone = MODELS[kind].backbone if tower else MODELS[kind].backbone.without_tower()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = backbone.load(str(folder), DECODER["vocab_size"], 0.0)
        return VLModel(backbone, lm, feature_dim=TOWER, placements=PLACEMENTS, trainable=RULES).eval()


def towers(model):
    """Return the parameters of the tower without those of the projector."""
    tower, projector = (f"lm.{path}." for path in (model.backbone.tower_path, model.backbone.projector_path))
    named = model.named_parameters()
    return {n: p for n, p in named if n.startswith(tower) and not n.startswith(projector)}


def test_losses_gradients_and_answers_are_those_of_the_whole_model(pair):
    _, whole, without = pair
    assert {p.device.type for p in towers(without).values()} == {"meta"}
    assert not [n for n, p in without.named_parameters() if p.is_meta and n not in towers(without)]
    for images in (1, 2):
        batch = random_batch(whole, images)
        assert torch.equal(without.loss(batch), whole.loss(batch))
        expected = gradients(whole, batch)
        found = gradients(without, batch)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
        answers = (one.generate(batch, num_beams=2, max_length=5) for one in (without, whole))
        assert torch.equal(*answers)


def test_parameters_checksums_and_fingerprint_are_those_of_the_whole_model(pair):
    _, whole, without = pair
    assert count_parameters(without) == count_parameters(whole)
    assert without.backbone_parameters == whole.backbone_parameters
    assert without.trainable == whole.trainable
    shapes = [{n: (p.shape, p.requires_grad) for n, p in model.named_parameters()} for model in (without, whole)]
    assert list(shapes[0].items()) == list(shapes[1].items())  # in the same order
    assert backbone_checksums(without) == backbone_checksums(whole)
    assert set(without.own_state()) == set(whole.own_state())
    fingerprints = [model.backbone.tower_fingerprint(model.lm) for model in (without, whole)]
    assert fingerprints[0] == fingerprints[1]


def test_models_without_towers_are_moved_cast_and_copied(pair):
    _, whole, without = pair
    batch = random_batch(whole)
    expected = whole.loss(batch)
    fingerprint = without.backbone.tower_fingerprint(without.lm)
    for twin in (copy.deepcopy(without).to("cpu"), through_a_file(without, weights_only=False)):
        assert torch.equal(twin.loss(batch), expected)
        assert twin.backbone.tower_fingerprint(twin.lm) == fingerprint
    half = copy.deepcopy(without)
    assert cast_frozen(half, torch.bfloat16) > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half.loss(batch), whole.loss(batch))
    assert half.backbone.tower_fingerprint(half.lm) == fingerprint
    assert next(iter(copy.deepcopy(without).double().unit_parameters().values())).dtype == torch.float64


# one family -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_smolvlm(tmp_path_factory.mktemp("smolvlm"))


def module_of(folder, whole=False, **settings):
    module = VLCausal(str(folder), PLACEMENTS, list(RULES), **settings)
    module.loads_whole_backbone = whole
    module.configure_model()
    return module


def is_whole(module):
    return not any(isinstance(part, Unloaded) for part in module.modules())


def fingerprint(module):
    return module.model.backbone.tower_fingerprint(module.model.lm)


def rewrite(folder, out, change):
    """Copy a model with its tensors changed."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    save_file(change(load_file(out / "model.safetensors")), out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_shards_and_other_types_are_read(folder, tmp_path):
    whole = module_of(folder, whole=True)
    half = rewrite(folder, tmp_path / "half", lambda state: {name: t.bfloat16() for name, t in state.items()})
    parts = shutil.copytree(folder, tmp_path / "parts")
    (parts / "model.safetensors").unlink()
    lm = whole.model.backbone.load(str(folder), len(whole.tokenizer), 0.0)
    lm.save_pretrained(parts, max_shard_size="20KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    for other in (half, parts):
        found, expected = module_of(other), module_of(other, whole=True)
        assert not is_whole(found)
        assert is_whole(expected)
        assert fingerprint(found) == fingerprint(expected) == fingerprint(whole)
        for batch in batches(whole):
            assert torch.equal(found.loss(batch), expected.loss(batch))


def test_only_first_rows_of_the_tower_are_used(folder, tmp_path):
    def spoil(state):
        for name, tensor in state.items():
            if "vision_model" in name:
                tensor[1 if tensor.dim() > 1 else 0 :] = torch.nan
        return state

    found = module_of(rewrite(folder, tmp_path / "spoiled", spoil))
    assert fingerprint(found) == fingerprint(module_of(folder))


def test_towers_of_other_files_are_loaded(folder, tmp_path):
    expected = module_of(folder)
    state = load_file(folder / "model.safetensors")
    other = shutil.copytree(folder, tmp_path / "bin")
    (other / "model.safetensors").unlink()
    torch.save(state, other / "pytorch_model.bin")
    with pytest.warns(UserWarning, match=r"the vision tower of .* is loaded, too: its weights are not in safetensors"):
        found = module_of(other)
    assert is_whole(found)
    assert fingerprint(found) == fingerprint(expected)
    assert torch.equal(found.loss(batches(found)[0]), expected.loss(batches(found)[0]))


def test_rows_are_found_once_under_the_name_of_the_tower(tmp_path):
    part = nn.Linear(3, 2)
    names = ("visual.blocks.weight", "text.blocks.weight", "old.tower.model.blocks.weight", "twice.m.weight")
    for number, key in enumerate((*names, "a.twice.weight")):
        save_file({key: torch.full((2, 3), float(number))}, tmp_path / key)
    files = {file.name: file for file in tmp_path.iterdir()}
    assert first_rows(files, "visual", "blocks", part)["weight"].tolist() == [[0, 0, 0]]
    assert first_rows(files, "tower", "blocks", part)["weight"].tolist() == [[2, 2, 2]]
    assert first_rows(files, "old", "blocks", part) is None  # two modules between
    assert first_rows(files, "twice", "", part) is None
    assert first_rows(files, "blocks", "", part) is None
    assert first_rows(files, "visual", "blocks", nn.Linear(3, 4)) is None


def test_files_with_the_names_of_older_versions_are_read(tmp_path):
    """Published PaliGemma files were written by them."""
    build("paligemma2").lm.save_pretrained(tmp_path)
    found = []
    for between in ("vision_tower.", "vision_tower.vision_model."):
        state = load_file(tmp_path / "model.safetensors")
        state = {re.sub(r"vision_tower\.(vision_model\.)?", between, name): t for name, t in state.items()}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        models = [load("paligemma2", tmp_path, tower) for tower in (True, False)]
        assert towers(models[1])
        assert all(p.is_meta for p in towers(models[1]).values())
        found += [model.backbone.tower_fingerprint(model.lm) for model in models]
    assert len(set(found)) == 1


def test_runs_have_the_losses_weights_and_answers_of_runs_with_the_tower(folder, tmp_path):
    seen, states, answers = [], [], []
    for whole in (True, False):
        seed_everything(3)
        module, record = VLCausal(str(folder), PLACEMENTS, list(RULES), lr=1e-2), Losses()
        module.loads_whole_backbone = whole
        data = batches(module_of(folder))
        quiet_trainer(tmp_path, max_epochs=2, callbacks=[record]).fit(module, Batches(data))
        assert is_whole(module) == whole
        seen.append(record.seen)
        states.append(module.own_state())
        answers.append([module.answer(batch) for batch in data])
    assert seen[0] == seen[1]
    assert len(seen[0]) == 2 * len(data)
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    assert answers[0] == answers[1]


def test_whole_models_are_needed_to_merge_and_to_run_the_tower(folder, tmp_path):
    module = module_of(folder)
    with pytest.raises(ValueError, match="the vision tower is not loaded, as training and testing read stored feat"):
        save_merged(module.model, tmp_path / "merged", module.tokenizer, backbone=str(folder))
    assert not (tmp_path / "merged").exists()
    with pytest.raises(RuntimeError, match="the vision tower is not loaded"):
        module.model.backbone.tower_output(module.model.lm, torch.zeros(1, 3, 16, 16))
