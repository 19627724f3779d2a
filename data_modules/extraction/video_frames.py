"""The frames of a video that are shown at regular times, decoded by PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

MOST = 10_000  # frames taken of a video: more than four hours of them, or a broken time stamp
SLACK = 1  # seconds that a file may end before its header says so


def frames_of_video(path: Path, seconds: Fraction) -> Iterator[Image.Image]:
    """Decode the frames shown at 0, 1, 2 ... times some seconds after the first frame appears.

    A frame is shown until the next one appears, whatever the rate of frames, and turned as the file says.

    Args:
        path: Of the video.
        seconds: Between two frames that are wanted.

    Yields:
        The frames in RGB; one that is shown for longer comes several times.

    Raises:
        ValueError: If the file has no video, a damaged frame or too many, or ends before its header says so.
        Exception: Whatever PyAV raises for a damaged file.
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
    """Frames in the order of time, each with the time at which it is replaced."""
    stream.thread_type = "AUTO"
    usual = 1 / (stream.average_rate or Fraction(25))
    read = Fraction(0)  # how far packets of any kind reach
    shown, first, time = None, Fraction(0), Fraction(0)
    for packet in container.demux():
        if packet.pts is not None:
            read = max(read, (packet.pts + (packet.duration or 0)) * packet.time_base)
        for frame in packet.decode() if packet.stream is stream else ():
            appears = time + usual if frame.pts is None else frame.pts * frame.time_base
            if frame.is_corrupt:  # the decoder made up what it could not read
                raise ValueError(f"a damaged frame at {float(appears):.1f} s")
            if shown is None:
                first = appears
            else:
                yield shown, appears - first
            shown, time = frame, appears
    declared = Fraction(container.duration or 0, 1_000_000)
    if declared - read > SLACK:  # Matroska counts from 0, others from their first time stamp: that is never less
        raise ValueError(f"cut short: it ends after {float(read):.1f} s of {float(declared):.1f} s")
    if shown is not None:
        yield shown, time - first + (shown.duration * shown.time_base if shown.duration else usual)


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
