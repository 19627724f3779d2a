"""Parameter counts of models known by name, on the meta device and without a download."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig

from vlpet_lightning import VLT5, VLBart, VLMBart, build
from vlpet_lightning.backbones import BACKBONES, config_of

# exact sizes of the checkpoints on the Hub, e.g. 406.3 M for bart-large and 247.6 M for t5-v1_1-base
PUBLISHED = {
    "facebook/bart-base": 139_420_416,
    "facebook/bart-large": 406_291_456,
    "facebook/mbart-large-50": 610_879_488,
    "facebook/mbart-large-cc25": 610_851_840,
    "t5-small": 60_506_624,
    "google-t5/t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "google-t5/t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "google-t5/t5-large": 737_668_096,
    "google/t5-v1_1-small": 76_961_152,
    "google/t5-v1_1-base": 247_577_856,
    "google/t5-v1_1-large": 783_150_080,
    "google/flan-t5-small": 76_961_152,
    "google/flan-t5-base": 247_577_856,
    "google/flan-t5-large": 783_150_080,
}
MODULES = {module.kind: module for module in (VLBart, VLMBart, VLT5)}


def test_every_known_name_has_a_published_size():
    assert set(PUBLISHED) == {
        name for backbone in BACKBONES.values() if backbone.has_encoder for name in backbone.known
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_known_by_name_has_its_published_size(name):
    config = config_of(name, "bart")  # whatever kind asks
    with torch.device("meta"):
        lm = BACKBONES[config.model_type].build(config)
    assert sum(p.numel() for p in lm.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["facebook/bart-large", "facebook/mbart-large-50", "t5-large", "google/t5-v1_1-base"])
def test_the_size_of_the_bare_backbone_leaves_out_the_added_rows(name):
    model = build(name, device="meta").built()
    assert model.backbone_parameters == PUBLISHED[name]
    tables = 1 + (model.lm.lm_head.weight is not model.lm.get_input_embeddings().weight)
    assert tables == (2 if "v1_1" in name else 1)
    added = tables * model.added_vocabulary * model.lm.config.d_model
    assert sum(p.numel() for p in model.lm.parameters()) == PUBLISHED[name] + added


# bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "kind", "words"),
    [
        (VLBart, "mbart", "VLBart needs a bart backbone, '{}' is 'mbart': use VLMBart"),
        (VLMBart, "t5", "VLMBart needs a mbart backbone, '{}' is 't5': use VLT5"),
        (VLT5, "bart", "VLT5 needs a t5 backbone, '{}' is 'bart': use VLBart"),
        (VLBart, "pegasus", "VLBart needs a bart backbone, '{}' is 'pegasus'"),
        (VLT5, "mt5", "VLT5 needs a t5 backbone, '{}' is 'mt5'"),
    ],
)
def test_a_model_of_another_family_is_refused(tmp_path, module, kind, words):
    AutoConfig.for_model(kind, decoder_start_token_id=0).save_pretrained(tmp_path)
    for pretrained in (True, False):
        with pytest.raises(ValueError) as error:
            module(str(tmp_path)).build(pretrained=pretrained)
        assert str(error.value) == words.format(tmp_path)


@pytest.mark.parametrize(
    ("kind", "unset", "named"),
    [
        ("t5", {"decoder_start_token_id": None}, "decoder_start_token_id"),
        ("bart", {"eos_token_id": None, "pad_token_id": None}, "eos_token_id, pad_token_id"),
        ("mbart", {"eos_token_id": None}, "eos_token_id"),
    ],
)
def test_a_config_that_lacks_a_token_is_refused(tmp_path, kind, unset, named):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "decoder_start_token_id": 0, **unset}))
    said = f"the config.json of '{tmp_path}' does not set {named}: add the values that the model was pretrained with"
    with pytest.raises(ValueError) as error:
        MODULES[kind](str(tmp_path)).build()
    assert str(error.value) == said
