"""SmolVLM: a SigLIP tower, pixel shuffling and a Llama decoder."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from vlpet_lightning.backbones.causal import CausalBackbone, ProjectedFeatures


class SmolVLM(CausalBackbone):
    """SmolVLM with images that are not split into tiles, one view of ``image_size`` per image."""

    kind = "smolvlm"
    config_class = SmolVLMConfig
    model_class = SmolVLMForConditionalGeneration
    known: ClassVar[dict[str, dict[str, Any]]] = {}
    text_template = "<|im_start|>User:{images}{text}<end_of_utterance>\nAssistant:"
    image_template = "<fake_token_around_image><global-img>{tokens}<fake_token_around_image>"
    text_path = "model.text_model"
    projector_path = "model.connector"

    def image_tokens(self, config: Any) -> int:
        return self._vectors(config) // config.scale_factor**2

    def _vectors(self, config: Any) -> int:
        return (config.vision_config.image_size // config.vision_config.patch_size) ** 2

    def visual_embedding(self, lm: Any, feature_dim: int, grid: int | None, projector: Any = None) -> nn.Module:
        config = lm.config
        return ProjectedFeatures(
            self.projector(lm),
            per_image=self.image_tokens(config),
            feature_dim=self.feature_dim(config),
            vectors=self._vectors(config),
        )
