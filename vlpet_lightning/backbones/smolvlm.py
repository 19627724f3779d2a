"""Idefics3 and SmolVLM: a SigLIP tower, pixel shuffling and a Llama decoder."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from vlpet_lightning.backbones.causal import CausalBackbone, with_projector
from vlpet_lightning.backbones.siglip import SIGLIP_BASE, SIGLIP_SO400M
from vlpet_lightning.pet.placement import AnySite


def _smollm2(width: int, inner: int, layers: int, heads: int, key_value_heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 49280,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


class Idefics3(CausalBackbone):
    """Idefics3, the architecture of the first SmolVLM, with images that are not split into tiles.

    An image is one view of the tower's ``image_size``.
    """

    kind = "idefics3"
    sites: ClassVar[dict[str, AnySite]] = with_projector("modality_projection.proj", "modality_projection.proj")
    config_class: ClassVar[Any] = Idefics3Config
    model_class: ClassVar[Any] = Idefics3ForConditionalGeneration
    known: ClassVar[dict[str, dict[str, Any]]] = {  # sizes; all others are the library's defaults
        "HuggingFaceTB/SmolVLM-256M-Instruct": {
            "text_config": _smollm2(576, 1536, 30, 9, 3),
            "vision_config": SIGLIP_BASE | {"image_size": 512},
            "scale_factor": 4,
        },
        "HuggingFaceTB/SmolVLM-500M-Instruct": {
            "text_config": _smollm2(960, 2560, 32, 15, 5),
            "vision_config": SIGLIP_BASE | {"image_size": 512},
            "scale_factor": 4,
        },
    }
    text_template = "<|im_start|>User:{images}{text}<end_of_utterance>\nAssistant:"
    image_template = "<fake_token_around_image><global-img>{tokens}<fake_token_around_image>"
    text_path = "model.text_model"
    projector_path = "model.connector"
    tower_path = "model.vision_model"
    processing: ClassVar[dict[str, Any]] = {"do_image_splitting": False}
    extractable = True

    def tower_output(self, lm: Any, pixels: Tensor) -> Tensor:
        side = lm.config.vision_config.patch_size
        patches = pixels.new_ones(len(pixels), pixels.shape[2] // side, pixels.shape[3] // side, dtype=torch.bool)
        return lm.model.vision_model(pixels, patch_attention_mask=patches).last_hidden_state

    def image_tokens(self, config: Any) -> int:
        return self.vectors(config) // config.scale_factor**2


class SmolVLM(Idefics3):
    """SmolVLM2, whose parts are those of :class:`Idefics3`."""

    kind = "smolvlm"
    config_class = SmolVLMConfig
    model_class = SmolVLMForConditionalGeneration
    known: ClassVar[dict[str, dict[str, Any]]] = {
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct": {
            "text_config": _smollm2(2048, 8192, 24, 32, 32),
            "vision_config": SIGLIP_SO400M | {"image_size": 384},
            "scale_factor": 3,
        },
    }
