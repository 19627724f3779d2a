"""Scenes of one or two objects on a grid of cells, and their rendering."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle")
COLORS = {
    "red": (214, 40, 40),
    "green": (43, 147, 72),
    "blue": (36, 84, 190),
    "yellow": (245, 203, 40),
    "purple": (126, 54, 168),
    "orange": (243, 124, 28),
}
SIZES = {"small": 0.30, "large": 0.47}  # half the side length, in cells
CELLS = 4
PIXELS = 128
OVERSAMPLING = 2  # drawn larger and scaled down, because Pillow draws without antialiasing


@dataclass(frozen=True)
class Thing:
    """An object in a cell.

    Args:
        shape: One of :data:`SHAPES`.
        color: One of :data:`COLORS`.
        size: One of :data:`SIZES`.
        row: Cells from the top.
        column: Cells from the left.
    """

    shape: str
    color: str
    size: str
    row: int
    column: int

    @property
    def height(self) -> str:
        """``top`` or ``bottom``."""
        return "top" if self.row < CELLS // 2 else "bottom"

    @property
    def side(self) -> str:
        """``left`` or ``right``."""
        return "left" if self.column < CELLS // 2 else "right"


Scene = tuple[Thing, ...]


def random_scene(random: Random) -> Scene:
    """Draw a scene of one or two objects, equally often, in different cells; two objects differ in shape or color."""
    cells = random.sample(range(CELLS * CELLS), random.choice((1, 2)))
    while True:
        scene = tuple(
            Thing(
                shape=random.choice(SHAPES),
                color=random.choice(list(COLORS)),
                size=random.choice(list(SIZES)),
                row=cell // CELLS,
                column=cell % CELLS,
            )
            for cell in cells
        )
        if len({(thing.shape, thing.color) for thing in scene}) == len(scene):
            return scene


def matching(scene: Scene, **attributes: str) -> list[Thing]:
    """Return the objects of a scene with given attributes, such as ``color="red"`` or ``side="left"``."""
    return [thing for thing in scene if all(getattr(thing, name) == value for name, value in attributes.items())]


def render(scene: Scene, random: Random) -> Image.Image:
    """Render a scene.

    Args:
        scene: Its objects.
        random: Random generator for small variations of position within the cell, color and background.

    Returns:
        An RGB picture of :data:`PIXELS` by :data:`PIXELS`.
    """
    side = PIXELS * OVERSAMPLING
    cell = side / CELLS
    grey = random.randint(205, 245)
    image = Image.new("RGB", (side, side), (grey, grey, grey + random.randint(-8, 8)))
    draw = ImageDraw.Draw(image)
    for thing in scene:
        half = SIZES[thing.size] * cell * random.uniform(0.94, 1.0)
        free = cell / 2 - half
        x = (thing.column + 0.5) * cell + random.uniform(-free, free)
        y = (thing.row + 0.5) * cell + random.uniform(-free, free)
        fill = tuple(max(0, min(255, value + random.randint(-14, 14))) for value in COLORS[thing.color])
        box = (x - half, y - half, x + half, y + half)
        if thing.shape == "circle":
            draw.ellipse(box, fill=fill)
        elif thing.shape == "square":
            draw.rectangle(box, fill=fill)
        else:
            draw.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=fill)
    return image.resize((PIXELS, PIXELS), Image.Resampling.BOX)
