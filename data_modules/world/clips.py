"""Short clips of colored shapes that move across the picture one after the other, with subtitles."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from PIL import Image

from data_modules.world.scenes import CELLS, COLORS, SHAPES, Thing, render

FRAMES = 8  # maximum per clip
SECONDS = 1.5  # between frames, as in the benchmark
NAMES = ("ann", "bob", "cara", "dan", "eve", "fred")


class Show(NamedTuple):
    """A segment of a clip: the object shown and the number of frames."""

    color: str
    shape: str
    frames: int

    @property
    def name(self) -> str:
        """Color and shape, such as ``red circle``."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Clip:
    """A clip.

    Args:
        shows: Segments in order; their colors and shapes differ.
        speaker: Name of the speaker in the subtitles.
        lines: The subtitles.
    """

    shows: tuple[Show, ...]
    speaker: str
    lines: tuple[str, ...]

    @property
    def frames(self) -> int:
        """Number of frames, at most :data:`FRAMES`."""
        return sum(show.frames for show in self.shows)


def random_clip(random: Random) -> Clip:
    """Draw a clip of two shapes of different colors, with two to four frames each."""
    colors, shapes = random.sample(list(COLORS), 2), random.sample(SHAPES, 2)
    lengths = [random.randint(2, FRAMES // 2) for _ in colors]
    shows = tuple(Show(*show) for show in zip(colors, shapes, lengths, strict=True))
    speaker = random.choice(NAMES)
    return Clip(shows, speaker, (f"i am {speaker}",))


def frames_of(clip: Clip, random: Random) -> list[Image.Image]:
    """Render the frames of a clip: each shape moves from cell to cell, to the left or to the right."""
    pictures = []
    for show in clip.shows:
        row, start, step = random.randrange(CELLS), random.randrange(CELLS), random.choice((-1, 1))
        for number in range(show.frames):
            place = (start + step * number) % CELLS
            pictures.append(render((Thing(show.shape, show.color, "large", row, place),), random))
    return pictures


def film_strip(pictures: list[Image.Image]) -> Image.Image:
    """Combine all frames into one picture, four per row, at half size."""
    side = pictures[0].width // 2
    strip = Image.new("RGB", (4 * side, -(-len(pictures) // 4) * side), "white")
    for number, picture in enumerate(pictures):
        strip.paste(picture.resize((side, side)), (number % 4 * side, number // 4 * side))
    return strip
