"""Small generated images and videos, and small random encoders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

RESNET = str(Path(__file__).parents[3] / "experiments" / "clip" / "tiny_rn.json")
VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1},
}
TICK = Fraction(1, 1000)
SIZE = (64, 64)


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (50, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_vit(path: Path) -> str:
    path.write_text(json.dumps(VIT))
    return str(path)


def grey(number: int) -> np.ndarray:
    """Return a frame whose shade encodes its number, with steps of ten shades to survive compression."""
    return np.full((*SIZE, 3), 10 * number + 20, dtype=np.uint8)


def number(image: Image.Image) -> int:
    """Return the number of a :func:`grey` frame."""
    return round((np.asarray(image).mean() - 20) / 10)


def video(path: Path, times: Sequence[int], frames: Sequence[np.ndarray] | None = None, **options: str) -> Path:
    """Write a video whose frame ``n`` appears ``times[n]`` milliseconds after its start.

    Args:
        path: Output file; its suffix determines the container.
        times: Increasing times.
        frames: ``(H, W, 3)`` uint8 each; by default, frame ``n`` is ``grey(n)``.
        options: Options of the container.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = frames or [grey(n) for n in range(len(times))]
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=1000, options={"qscale": "2"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = TICK
        for time, pixels in zip(times, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def sound(path: Path) -> Path:
    """Write a file with sound only."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn(path: Path) -> None:
    """Set the rotation of an mp4 file to a quarter turn clockwise, as phones do."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    quarter = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
    content[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in quarter)
    path.write_bytes(bytes(content))
