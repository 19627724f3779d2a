"""Video frames at regular times, decoded by PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

MOST = 10_000  # frames per video: more than four hours at the default rate; more means a broken time stamp
SLACK = 1  # seconds by which a file may end before its declared duration


def frames_of_video(path: Path, seconds: Fraction) -> Iterator[Image.Image]:
    """Decode the frames shown at 0, 1, 2 ... times ``seconds`` after the first frame.

    A frame is shown until the next one appears, at any frame rate, and is rotated as the file says.

    Args:
        path: Path of the video.
        seconds: Interval between frames.

    Yields:
        The frames in RGB; a frame shown for longer is yielded several times.

    Raises:
        ValueError: If the file has no video, a damaged frame or too many frames, or ends before its declared duration.
        Exception: Any error that PyAV raises for a damaged file.
    """
    import av

    with av.open(str(path)) as container:
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise ValueError("no video in it")
        taken = 0
        for frame, end in _shown(container, streams[0]):
            image = None
            while taken * seconds < end:
                if taken == MOST:
                    raise ValueError(f"more than {MOST:,} frames at {float(seconds)} s: cut it, or give more seconds")
                image = image or _upright(frame)
                yield image
                taken += 1
        if not taken:
            raise ValueError("no frame in it can be decoded")


def _shown(container: Any, stream: Any) -> Iterator[tuple[Any, Fraction]]:
    """Yield frames in time order, each with the time at which the next one replaces it."""
    stream.thread_type = "AUTO"
    usual = 1 / (stream.average_rate or Fraction(25))
    read = Fraction(0)  # end time of the packets read so far, of any kind
    shown, first, time = None, Fraction(0), Fraction(0)
    for packet in container.demux():
        if packet.pts is not None:
            read = max(read, (packet.pts + (packet.duration or 0)) * packet.time_base)
        for frame in packet.decode() if packet.stream is stream else ():
            appears = time + usual if frame.pts is None else frame.pts * frame.time_base
            if frame.is_corrupt:  # the decoder filled in data that it could not read
                raise ValueError(f"a damaged frame at {float(appears):.1f} s")
            if shown is None:
                first = appears
            else:
                yield shown, appears - first
            shown, time = frame, appears
    declared = Fraction(container.duration or 0, 1_000_000)
    if declared - read > SLACK:  # Matroska counts from 0, others from their first time stamp, which is never less
        raise ValueError(f"cut short: it ends after {float(read):.1f} s of {float(declared):.1f} s")
    if shown is not None:
        yield shown, time - first + (shown.duration * shown.time_base if shown.duration else usual)


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
