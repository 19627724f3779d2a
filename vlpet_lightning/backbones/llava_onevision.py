"""LLaVA-OneVision: a SigLIP tower, an MLP projector and a Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from vlpet_lightning.backbones.causal import CausalBackbone

CLASS_TOKEN = ("clip_vision_model",)  # towers whose first state is not that of a patch


def _layers(config: Any) -> list[int]:
    """Return the layers of the tower that the projector reads."""
    layers = config.vision_feature_layer
    return [layers] if isinstance(layers, int) else list(layers)


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

    The library divides a single image into crops (anyres) unless ``batch_num_images`` counts more than one. Stored
    features are the tower's states at ``config.vision_feature_layer``, those of several layers side by side, in
    row-major order; ``config.vision_feature_select_strategy`` ``default`` leaves out the first one.
    """

    kind = "llava_onevision"
    config_class = LlavaOnevisionConfig
    model_class = LlavaOnevisionForConditionalGeneration
    known: ClassVar[dict[str, dict[str, Any]]] = {}
    text_template = "<|im_start|>user\n{images}\n{text}<|im_end|>\n<|im_start|>assistant\n"
    image_template = "{tokens}"
    text_path = "model.language_model"
    projector_path = "model.multi_modal_projector"
    tower_path = "model.vision_tower"

    def feature_dim(self, config: Any) -> int:
        return config.vision_config.hidden_size * len(_layers(config))

    def vectors(self, config: Any) -> int:
        class_token = config.vision_config.model_type in CLASS_TOKEN
        return super().vectors(config) + class_token - (config.vision_feature_select_strategy == "default")

    def image_tokens(self, config: Any) -> int:
        return self.vectors(config) + 1

    def pixels(self, config: Any, processor: Any, image: Image) -> Tensor:
        found = processor(images=[[image, image]], return_tensors="pt", **self.processing)["pixel_values"]
        return found.flatten(0, -4)[0].float()

    def tower_output(self, lm: Any, pixels: Tensor) -> Tensor:
        states = lm.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        found = torch.cat([states[layer] for layer in _layers(lm.config)], dim=-1)
        return found[:, 1:] if lm.config.vision_feature_select_strategy == "default" else found

    def projector_function(self, lm: Any) -> Callable[[Tensor], Tensor]:
        return NewlineAfter(lm.model)

    def visual_parameters(self, lm: Any, visual: nn.Module) -> dict[str, nn.Parameter]:
        return super().visual_parameters(lm, visual) | {"lm.model.image_newline": lm.model.image_newline}
