"""Pixels as the input of a model: read from image files by its own image processor, and run through its tower.

In a batch, pixels take the place of stored features, and have their number of axes: the input of the tower for an image
is ``(F, D)`` numbers, here its rows of pixels in all channels and views, or its patches (Qwen2.5-VL).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from vlpet_lightning.backbones.image_processor import load_image_processor
from vlpet_lightning.backbones.projected_features import ProjectedFeatures

PIXELS = "pixels"
# settings of the image processor that are recorded
SETTINGS = (
    *("do_resize", "size", "max_image_size", "resample", "do_center_crop", "crop_size", "do_pad"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)


def rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape in a batch of an image whose input to the tower has another shape."""
    *others, columns = shape
    return prod(others), columns


def processing_record(backbone: Any, processor: Any) -> dict[str, Any]:
    """Return the settings of an image processor that its output depends on, as plain data."""
    config = json.loads(json.dumps(processor.to_dict(), default=str))
    return {key: config.get(key) for key in SETTINGS} | backbone.processing


class PixelReader:
    """A model's own image processor, for data modules that read image files; it can be sent to other processes.

    Args:
        backbone: Description of the model, with its image settings.
        config: Its configuration.
        name_or_path: Folder or Hub name of the model.

    Raises:
        FileNotFoundError: If the image processor is not available.
    """

    def __init__(self, backbone: Any, config: Any, name_or_path: str) -> None:
        self.backbone, self.config, self.name = backbone, config, name_or_path
        self.processor = load_image_processor(name_or_path, **backbone.processing)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the pixels of an image in a batch."""
        return rows_of(self.backbone.pixel_shape(self.config))

    def record(self) -> dict[str, Any]:
        """Describe the pixels as plain data, like the ``extractor`` of a feature store."""
        return {
            "model": f"hf:{Path(self.name).name if Path(self.name).is_dir() else self.name}",
            "features": PIXELS,
            **self.backbone.recorded_settings(),
            "processing": processing_record(self.backbone, self.processor),
        }

    def __call__(self, image: Image) -> Tensor:
        """Return the ``(F, D)`` float32 pixels of an RGB image.

        Raises:
            ValueError: If the image processor does not fit the model.
        """
        pixels = self.backbone.pixels(self.config, self.processor, image)
        return pixels.reshape(rows_of(tuple(pixels.shape)))


class ProjectedPixels(ProjectedFeatures):
    """Image tokens from pixels: the model's own tower and projector, which belong to the language model.

    Args:
        projector: As for :class:`ProjectedFeatures`.
        tower: Computes ``(n, F, D)`` features from the pixels of ``n`` images.
        shape: Shape of the tower's input for one image.
        settings: Other arguments of :class:`ProjectedFeatures`.
    """

    def __init__(
        self,
        projector: Callable[[Tensor], Tensor],
        tower: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        **settings: Any,
    ) -> None:
        super().__init__(projector, **settings)
        self._tower = (tower,)
        self.shape = shape

    @property
    def input_shape(self) -> tuple[int, int]:
        """Shape of the pixels of an image in a batch."""
        return rows_of(self.shape)

    def forward(self, features: Tensor, boxes: Tensor | None, token_embedding: Tensor) -> Tensor:
        """Run the tower and project its output.

        Args:
            features: ``(B, F, D)`` or ``(B, N, F, D)`` pixels.
            boxes: Not used.
            token_embedding: Determines the type of the tokens.

        Returns:
            ``(B, V, d)`` image tokens, one image after the other.

        Raises:
            ValueError: If the shape of the pixels is not that of the vision tower's input.
        """
        if tuple(features.shape[-2:]) != self.input_shape:
            raise ValueError(
                f"pixels have shape {tuple(features.shape)}, the tower reads {self.input_shape} per image: make them "
                "with the image processor of this model, or set image_input to features"
            )
        found = self._tower[0](features.reshape(-1, *self.shape))
        found = found.unflatten(0, features.shape[:-2])
        return super().forward(found, boxes, token_embedding)
