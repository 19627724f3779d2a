"""SmolVLM: a SigLIP tower, pixel shuffling and a Llama decoder."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from vlpet_lightning.backbones.causal import CausalBackbone


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
        return self.vectors(config) // config.scale_factor**2
