"""Image files as 8-bit RGB pictures."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # Pillow modes with more than 8 bits per channel


def read_image(path: Path, *, exif_orientation: bool = True) -> Image.Image:
    """Read the first frame of an image file as 8-bit RGB.

    Images of more than 8 bits are scaled by their own value range; transparent images are composited over white.

    Args:
        path: Path of an image file.
        exif_orientation: Apply the image's EXIF orientation.

    Raises:
        ValueError: If the file is not an image, or has values that are not finite.
        Exception: Any error that Pillow raises for a damaged file.
    """
    content = path.read_bytes()
    try:
        with Image.open(BytesIO(content)) as image:
            image.verify()  # verifies checksums if the format has them; decoding alone does not check a PNG's
    except UnidentifiedImageError as error:
        raise ValueError("no image, or one of an unknown format") from error
    with Image.open(BytesIO(content)) as opened:
        return to_rgb(opened, exif_orientation=exif_orientation)


def to_rgb(image: Image.Image, *, exif_orientation: bool = True) -> Image.Image:
    """Convert an open picture to 8-bit RGB, as :func:`read_image` does.

    Raises:
        ValueError: If it has values that are not finite.
    """
    picture = ImageOps.exif_transpose(image) if exif_orientation else image
    if picture.mode in DEEP:
        return _to_8_bits(picture).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale values to 0 .. 255 by their minimum and maximum, or by the range of the type if all are equal."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    low, high = values.min(), values.max()
    if low == high:
        low, high = 0.0, 1.0 if image.mode == "F" else 2.0**16 - 1
    scaled = 255 * (values - low) / (high - low)
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
