"""LLaVA-OneVision: a SigLIP tower, an MLP projector and a Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from vlpet_lightning.backbones.causal import CausalBackbone, with_projector
from vlpet_lightning.pet.placement import AnySite


class NewlineAfter:
    """Projected features of an image, followed by the model's line-break token.

    Args:
        model: The library's base model, which owns the projector and the token.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, features: Tensor) -> Tensor:
        """Map ``(n, F, D)`` features to ``(n, F + 1, d)`` tokens."""
        tokens = self.model.multi_modal_projector(features)
        return torch.cat([tokens, self.model.image_newline.expand(len(tokens), 1, -1)], dim=1)


class LlavaOnevision(CausalBackbone):
    """LLaVA-OneVision with one crop per image, which is the library's format of several images.

    The library divides a single image into crops (anyres) unless ``batch_num_images`` counts more than one.
    """

    kind = "llava_onevision"
    sites: ClassVar[dict[str, AnySite]] = with_projector("linear_1", "linear_2")
    config_class = LlavaOnevisionConfig
    model_class = LlavaOnevisionForConditionalGeneration
    known: ClassVar[dict[str, dict[str, Any]]] = {}
    text_template = "<|im_start|>user\n{images}\n{text}<|im_end|>\n<|im_start|>assistant\n"
    image_template = "{tokens}"
    text_path = "model.language_model"
    projector_path = "model.multi_modal_projector"
    tower_path = "model.vision_tower"

    def image_tokens(self, config: Any) -> int:
        return self.vectors(config) + 1

    def projector_function(self, lm: Any) -> Callable[[Tensor], Tensor]:
        return NewlineAfter(lm.model)

    def visual_parameters(self, lm: Any, visual: nn.Module) -> dict[str, nn.Parameter]:
        return super().visual_parameters(lm, visual) | {"lm.model.image_newline": lm.model.image_newline}
