"""Configurations of pretrained decoder-only models, and the sizes that they refuse."""

from __future__ import annotations

import pytest
import torch

from tests.backbones.tiny_vlm import QWEN
from vlpet_lightning.backbones import BACKBONES, config_of
from vlpet_lightning.backbones.causal import CausalBackbone
from vlpet_lightning.backbones.template import read_template

CAUSAL = [backbone for backbone in BACKBONES.values() if isinstance(backbone, CausalBackbone)]
KNOWN = {  # parameters of the published checkpoints, and tokens of an image
    "HuggingFaceTB/SmolVLM-256M-Instruct": (256_484_928, 64),
    "HuggingFaceTB/SmolVLM-500M-Instruct": (507_482_304, 64),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (2_246_784_880, 81),
    "google/paligemma2-3b-pt-224": (3_032_242_416, 256),
    "Qwen/Qwen2.5-VL-3B-Instruct": (3_754_622_976, 256),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_configurations_have_the_published_number_of_parameters(name):
    config = config_of(name, "smolvlm")
    backbone = BACKBONES[config.model_type]
    if name.startswith("Qwen"):
        backbone = backbone.with_image_size(448, 448)
    with torch.device("meta"):
        lm = backbone.build(config)
    assert (sum(p.numel() for p in lm.parameters()), backbone.image_tokens(config)) == KNOWN[name]


def test_every_known_configuration_is_tested():
    assert {name for backbone in CAUSAL for name in backbone.known} == set(KNOWN)


class Characters:
    """Tokenizer whose tokens are characters."""

    eos_token_id, pad_token_id, unk_token_id = 0, None, None

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}

    def convert_tokens_to_ids(self, token):
        return 1  # any special token


@pytest.mark.parametrize("backbone", CAUSAL, ids=lambda backbone: backbone.kind)
def test_default_templates_can_be_read(backbone):
    template = read_template(Characters(), backbone.text_template, backbone.image_template)
    around = [template.before, template.image_before, template.image_after, template.between, template.after]
    written = "".join(chr(token) for part in around for token in part)
    assert written == backbone.text_template.replace(
        "{images}", backbone.image_template.replace("{tokens}", "")
    ).replace("{text}", "")


def test_qwen_needs_the_size_of_its_images():
    with pytest.raises(ValueError, match="a qwen2_5_vl model takes images of any size: set image_size"):
        BACKBONES["qwen2_5_vl"].image_tokens(QWEN)


@pytest.mark.parametrize("size", [(12, 16), (16, 12), (0, 8)])
def test_qwen_refuses_images_that_tokens_do_not_divide(size):
    backbone = BACKBONES["qwen2_5_vl"].with_image_size(*size)
    with pytest.raises(ValueError, match=f"images of {size[0]} x {size[1]} pixels cannot be divided into tokens of 8"):
        backbone.image_tokens(QWEN)
