"""PaliGemma and PaliGemma 2: a SigLIP tower, a linear projector and a Gemma decoder that reads the prompt both ways."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from vlpet_lightning.backbones.base import VocabularyProjection
from vlpet_lightning.backbones.causal import CausalBackbone, sites_of
from vlpet_lightning.backbones.siglip import SIGLIP_SO400M
from vlpet_lightning.pet.placement import AnySite

GEMMA2_NORMS = {  # one before and one after each sublayer
    "attn": ("input_layernorm", "post_attention_layernorm"),
    "ffn": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


class PaliGemma(CausalBackbone):
    """PaliGemma with images of the tower's size."""

    kind = "paligemma"
    sites: ClassVar[dict[str, AnySite]] = sites_of(("linear", "linear"))
    config_class = PaliGemmaConfig
    model_class = PaliGemmaForConditionalGeneration
    known: ClassVar[dict[str, dict[str, Any]]] = {  # sizes; all others are the library's defaults
        "google/paligemma2-3b-pt-224": {
            "text_config": {  # of Gemma 2 2B
                "model_type": "gemma2",
                "vocab_size": 257216,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
            },
            "vision_config": SIGLIP_SO400M
            | {"model_type": "siglip_vision_model", "vision_use_head": False, "image_size": 224},
            "projection_dim": 2304,
            "hidden_size": 2304,
        },
    }
    text_template = "{images}<bos>{text}\n"
    image_template = "{tokens}"
    text_path = "model.language_model"
    projector_path = "model.multi_modal_projector"
    tower_path = "model.vision_tower"
    prompt_both_ways = True

    def tower_output(self, lm: Any, pixels: Tensor) -> Tensor:
        return lm.model.vision_tower(pixels).last_hidden_state

    def image_tokens(self, config: Any) -> int:
        return self.vectors(config)

    def norm_endings(self, lm: Any, place: str) -> str | tuple[str, ...]:
        if self.text_config(lm.config).model_type == "gemma2":
            return GEMMA2_NORMS.get(place, ())
        return super().norm_endings(lm, place)

    def positions(self, lm: Any, mask: Tensor, images: int, prompt: int) -> tuple[Tensor, Tensor]:
        positions, answer = super().positions(lm, mask, images, prompt)
        return positions + 1, answer + 1  # the first token is at position 1

    def vocabulary_projection(self, lm: Any) -> VocabularyProjection:
        """Return how logits are computed; Gemma 2's are soft-capped, which transformers 5.17 leaves out here."""
        softcap = getattr(self.text_config(lm.config), "final_logit_softcapping", None)
        return VocabularyProjection(lm.lm_head, softcap=softcap)
