"""The image processor of a pretrained model, and resizing before it."""

from __future__ import annotations

from typing import Any

from PIL.Image import Image
from transformers import AutoImageProcessor

from vlpet_lightning.backbones.folder import first_line


def load_image_processor(name_or_path: str, **settings: Any) -> Any:
    """Load the image processor of a model.

    Args:
        name_or_path: Folder or Hub name.
        settings: Settings that replace its own.

    Raises:
        FileNotFoundError: If it is not available.
    """
    try:
        return AutoImageProcessor.from_pretrained(name_or_path, **settings)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no image processor of {name_or_path!r} ({first_line(error)}): give a folder with "
            "preprocessor_config.json, or run where the hub can be reached"
        ) from error


def resized(image: Image, height: int, width: int, processor: Any) -> Image:
    """Resize an image with the filter of an image processor, without keeping its shape."""
    return image.resize((width, height), processor.resample)
