"""The image processor of a pretrained model."""

from __future__ import annotations

from typing import Any

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
