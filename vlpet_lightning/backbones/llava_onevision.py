"""LLaVA-OneVision: a SigLIP tower, an MLP projector and a Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt, prod, sqrt
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from vlpet_lightning.backbones.causal import CausalBackbone, sites_of
from vlpet_lightning.backbones.image_processor import resized
from vlpet_lightning.pet.placement import AnySite

CLASS_TOKEN = ("clip_vision_model",)  # towers whose first state is not that of a patch
LARGEST_RATIO = 1.1  # above which pack_image_features of the library interpolates the features of tiles


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


class LinesOfTiles:
    """Projected features of an image and its tiles: those of the image, then the lines of patches across the tiles.

    A line ends with the model's line-break token, as in ``pack_image_features`` of the library for images without
    padding.

    Args:
        model: The library's base model, which owns the projector and the token.
        rows: Rows of tiles.
        columns: Columns of tiles.
    """

    def __init__(self, model: Any, rows: int, columns: int) -> None:
        self.model = model
        self.rows, self.columns = rows, columns

    def __call__(self, features: Tensor) -> Tensor:
        """Map ``(n, (1 + rows * columns) * F, D)`` features to ``(n, F + lines * (patches + 1), d)`` tokens."""
        tokens = self.model.multi_modal_projector(features)
        views = tokens.unflatten(1, (1 + self.rows * self.columns, -1))
        side = isqrt(views.shape[2])
        tiles = views[:, 1:].unflatten(2, (side, side)).unflatten(1, (self.rows, self.columns))
        lines = tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        ends = self.model.image_newline.expand(*lines.shape[:2], 1, -1)
        return torch.cat([views[:, 0], torch.cat([lines, ends], dim=2).flatten(1, 2)], dim=1)


class LlavaOnevision(CausalBackbone):
    """LLaVA-OneVision with one crop per image, which is the library's format of several images, or with tiles (anyres).

    The library divides a single image into crops unless ``batch_num_images`` counts more than one. Stored features are
    the tower's states at ``config.vision_feature_layer``, those of several layers side by side, in row-major order;
    ``config.vision_feature_select_strategy`` ``default`` leaves out the first one. With ``tiling``, those of the whole
    image come first, and then those of the tiles in row-major order.

    Attributes:
        tiling: Rows and columns of tiles of all images; None for one crop.
    """

    kind = "llava_onevision"
    sites: ClassVar[dict[str, AnySite]] = sites_of(("linear_1", "linear_2"))
    config_class = LlavaOnevisionConfig
    model_class = LlavaOnevisionForConditionalGeneration
    known: ClassVar[dict[str, dict[str, Any]]] = {}
    text_template = "<|im_start|>user\n{images}\n{text}<|im_end|>\n<|im_start|>assistant\n"
    image_template = "{tokens}"
    text_path = "model.language_model"
    projector_path = "model.multi_modal_projector"
    tower_path = "model.vision_tower"
    image_settings = ("tiling",)
    tiling: tuple[int, int] | None = None

    def feature_dim(self, config: Any) -> int:
        return config.vision_config.hidden_size * len(_layers(config))

    def vectors(self, config: Any) -> int:
        per_view = self._per_view(config)
        if self.tiling is None:
            return per_view
        self._tiled_size(config)
        return per_view * (1 + prod(self.tiling))

    def _per_view(self, config: Any) -> int:
        return self.view_vectors(config) - (config.vision_feature_select_strategy == "default")

    def view_vectors(self, config: Any) -> int:
        return super().view_vectors(config) + (config.vision_config.model_type in CLASS_TOKEN)

    @property
    def views(self) -> int:
        return 1 if self.tiling is None else 1 + prod(self.tiling)

    def tower_layers(self, lm: Any) -> Sequence[nn.Module]:
        layers = self.all_layers(lm)
        return layers[: max(layer if layer >= 0 else len(layers) + 1 + layer for layer in _layers(lm.config))]

    def unread(self, lm: Any) -> Sequence[nn.Module]:
        tower = lm.get_submodule(self.tower_path)
        norm = getattr(getattr(tower, "vision_model", tower), "post_layernorm", None)
        layers = self.all_layers(lm)[len(self.tower_layers(lm)) :]
        return [*layers] if norm is None else [*layers, norm]

    def _tiled_size(self, config: Any) -> tuple[int, int]:
        """Return the height and width of the divided image in pixels.

        Raises:
            ValueError: If the model's configuration does not divide images in this way.
        """
        rows, columns = self.tiling or (1, 1)
        side, patches = config.vision_config.image_size, super().view_vectors(config)
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        if [rows * side, columns * side] not in [list(size) for size in config.image_grid_pinpoints]:
            reason = f"image_grid_pinpoints has no {rows * side} x {columns * side} pixels"
        elif sqrt(rows * columns / most) > LARGEST_RATIO:
            reason = f"{config.vision_aspect_ratio} shrinks the features of so many tiles"
        elif self._per_view(config) != patches:
            reason = f"a view has {self._per_view(config)} vectors of {patches} patches"
        else:
            return rows * side, columns * side
        raise ValueError(
            f"tiling is {[rows, columns]}, which does not fit config.json ({reason}): choose another or omit it"
        )

    def image_tokens(self, config: Any) -> int:
        per_view = self._per_view(config)
        if self.tiling is None:
            return per_view + 1
        rows, columns = (number * isqrt(per_view) for number in self.tiling)
        return per_view + rows * (columns + 1)

    def process(self, config: Any, processor: Any, image: Image) -> Tensor:
        """Return the views of an image, with tiling after resizing it to the grid of tiles."""
        if self.tiling is None:
            found = processor(images=[[image, image]], return_tensors="pt", **self.processing)["pixel_values"]
            return found.flatten(0, -4)[0]
        size = self._tiled_size(config)
        whole = resized(image, *size, processor)
        settings = {"image_grid_pinpoints": [list(size)], **self.processing}
        return processor(images=[whole], return_tensors="pt", **settings)["pixel_values"][0]

    def pixel_shape(self, config: Any) -> tuple[int, ...]:
        one = super().pixel_shape(config)
        return one if self.tiling is None else (1 + prod(self.tiling), *one)

    def tower_output(self, lm: Any, pixels: Tensor) -> Tensor:
        states = lm.model.vision_tower(pixels.flatten(0, -4), output_hidden_states=True).hidden_states
        found = torch.cat([states[layer] for layer in _layers(lm.config)], dim=-1)
        if lm.config.vision_feature_select_strategy == "default":
            found = found[:, 1:]
        return found.reshape(len(pixels), -1, found.shape[-1])

    def patch_tokens(self, config: Any) -> Tensor:
        found, view = super().patch_tokens(config), self._per_view(config)
        line = 1 if self.tiling is None else self.tiling[1] * isqrt(view) + 1
        found[view + line - 1 :: line] = False  # line breaks
        return found

    def whole_view(self, config: Any) -> slice:
        return slice(0, self._per_view(config))

    def projector_function(self, lm: Any) -> Callable[[Tensor], Tensor]:
        return NewlineAfter(lm.model) if self.tiling is None else LinesOfTiles(lm.model, *self.tiling)

    def visual_parameters(self, lm: Any, visual: nn.Module) -> dict[str, nn.Parameter]:
        return super().visual_parameters(lm, visual) | {"lm.model.image_newline": lm.model.image_newline}
