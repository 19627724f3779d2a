"""Idefics3 and SmolVLM: a SigLIP tower, pixel shuffling and a Llama decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, ClassVar, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from vlpet_lightning.backbones.causal import CausalBackbone, sites_of
from vlpet_lightning.backbones.image_processor import resized
from vlpet_lightning.backbones.siglip import SIGLIP_BASE, SIGLIP_SO400M
from vlpet_lightning.backbones.template import TOKENS
from vlpet_lightning.pet.placement import AnySite

Described = TypeVar("Described", bound="Idefics3")
FAKE = "<fake_token_around_image>"


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


class EachView:
    """Projected features of the views of an image, one view after the other.

    Args:
        projector: Module that projects the features of a view.
        views: Number of views.
    """

    def __init__(self, projector: nn.Module, views: int) -> None:
        self.projector = projector
        self.views = views

    def __call__(self, features: Tensor) -> Tensor:
        """Map ``(n, views * F, D)`` features to ``(n, T, d)`` tokens."""
        tokens = self.projector(features.reshape(len(features) * self.views, -1, features.shape[-1]))
        return tokens.reshape(len(features), -1, tokens.shape[-1])


class Idefics3(CausalBackbone):
    """Idefics3, the architecture of the first SmolVLM.

    An image is one view of the tower's ``image_size``. With ``tiling``, it is resized to ``rows x columns`` tiles of
    that size, and its views are the tiles in row-major order and the whole image. Stored features are those of the
    views, one after the other, each in row-major order.

    Attributes:
        tiling: Rows and columns of tiles of all images; None for one view.
    """

    kind = "idefics3"
    sites: ClassVar[dict[str, AnySite]] = sites_of(("modality_projection.proj", "modality_projection.proj"))
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
    image_template = f"{FAKE}<global-img>{TOKENS}{FAKE}"
    text_path = "model.text_model"
    projector_path = "model.connector"
    tower_path = "model.vision_model"

    image_settings = ("tiling",)
    tiling: tuple[int, int] | None = None

    @property
    def views(self) -> int:
        return 1 if self.tiling is None else prod(self.tiling) + 1

    @property
    def processing(self) -> dict[str, Any]:
        if self.tiling is None:
            return {"do_image_splitting": False}
        return {"do_image_splitting": True, "do_resize": False}  # the processor keeps the shape of images

    def with_sizes(self: Described, settings: Mapping[str, Any]) -> Described:
        found = super().with_sizes(settings)
        if settings.get("tiling") is not None and prod(settings["tiling"]) == 1:
            raise ValueError("tiling is [1, 1], which the library does not divide: omit it")
        return found

    def default_image_template(self) -> str:
        """Return the template, with the tags and line breaks of ``Idefics3Processor`` for tiles."""
        if self.tiling is None:
            return self.image_template
        rows, columns = (range(1, number + 1) for number in self.tiling)
        tiles = ["".join(f"{FAKE}<row_{row}_col_{column}>{TOKENS}" for column in columns) + "\n" for row in rows]
        return "".join(tiles) + "\n" + self.image_template

    def process(self, config: Any, processor: Any, image: Image) -> Tensor:
        """Return the views of an image, with tiling after resizing it to the grid of tiles."""
        if self.tiling is None:
            return super().process(config, processor, image)
        height, width = (number * config.vision_config.image_size for number in self.tiling)
        whole = resized(image, height, width, processor)
        return processor(images=[whole], return_tensors="pt", **self.processing)["pixel_values"][0]

    def pixel_shape(self, config: Any) -> tuple[int, ...]:
        one = super().pixel_shape(config)
        return one if self.tiling is None else (self.views, *one)

    def tower_output(self, lm: Any, pixels: Tensor) -> Tensor:
        views = pixels.flatten(0, -4)
        side = lm.config.vision_config.patch_size
        patches = views.new_ones(len(views), views.shape[2] // side, views.shape[3] // side, dtype=torch.bool)
        found = lm.model.vision_model(views, patch_attention_mask=patches).last_hidden_state
        return found.reshape(len(pixels), -1, found.shape[-1])

    def projector_function(self, lm: Any) -> Callable[[Tensor], Tensor]:
        return EachView(self.projector(lm), self.views)

    def whole_view(self, config: Any) -> slice:
        tokens = self.image_tokens(config)
        return slice(tokens - tokens // self.views, tokens)

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
