"""Images of coloured shapes, drawn by a program, so that every question about them has a known answer."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SIZE = 64  # pixels of an edge
CELL = 32  # pixels of an edge of one of the four places
KINDS = ("circle", "square", "triangle")
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 210, 40)}
PLACES = ("top left", "top right", "bottom left", "bottom right")
CLASSES = 1 + len(KINDS) * len(COLOURS)  # of a patch: the background, or a kind and a colour


class Shape(NamedTuple):
    """One shape of an image. `place` is an index of PLACES; an image has at most one shape at each."""

    place: int
    kind: str
    colour: str

    @property
    def name(self) -> str:
        """The shape in words: "red circle"."""
        return f"{self.colour} {self.kind}"


def draw_shapes(draw: random.Random) -> list[Shape]:
    """One to three shapes, in reading order."""
    places = sorted(draw.sample(range(4), draw.choice((1, 2, 2, 3, 3))))
    return [Shape(place, draw.choice(KINDS), draw.choice(list(COLOURS))) for place in places]


def paint(shapes: list[Shape], draw: random.Random) -> NDArray[np.uint8]:
    """The image (SIZE, SIZE, 3) of shapes. Size and position within the place of each are random; edges are smooth."""
    background = np.array([draw.randint(225, 255)] * 3, np.float32)
    image = np.tile(background, (SIZE, SIZE, 1))
    grid: Any = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5
    for shape in shapes:
        radius = draw.uniform(8, 14)
        row, column = divmod(shape.place, 2)
        y = grid[0] - row * CELL - draw.uniform(radius + 1, CELL - radius - 1)
        x = grid[1] - column * CELL - draw.uniform(radius + 1, CELL - radius - 1)
        colour = np.array(COLOURS[shape.colour], np.float32) + draw.uniform(-15, 15)
        cover = np.clip(0.5 - distance(shape.kind, y, x, radius), 0, 1)[:, :, None]
        image = image * (1 - cover) + colour * cover
    return np.clip(image, 0, 255).round().astype(np.uint8)


def distance(kind: str, y: Any, x: Any, radius: float) -> Any:
    """Pixels from each point to the edge of a shape around (0, 0); negative inside."""
    if kind == "circle":
        return np.hypot(y, x) - radius
    if kind == "square":
        return np.maximum(np.abs(y), np.abs(x)) - 0.85 * radius
    slope = np.abs(x) * 0.894 - (y + radius) * 0.447  # the two sides that meet at the top
    return np.maximum(slope, y - radius)


def patch_labels(shapes: list[Shape], image: NDArray[np.uint8], patch: int) -> NDArray[np.int64]:
    """The class of each patch of an image, (SIZE / patch)^2 numbers in reading order. A patch shows a shape if a
    tenth of it differs from the background."""
    rows = SIZE // patch
    corner = image[0, 0].astype(np.int16)
    differs = np.abs(image.astype(np.int16) - corner).max(axis=2) > 30
    share = differs.reshape(rows, patch, rows, patch).mean(axis=(1, 3))
    labels = np.zeros((2, rows // 2, 2, rows // 2), np.int64)  # row of places, row, column of places, column
    for place, kind, colour in shapes:
        labels[place // 2, :, place % 2] = 1 + KINDS.index(kind) * len(COLOURS) + list(COLOURS).index(colour)
    return np.where(share > 0.1, labels.reshape(rows, rows), 0).flatten()
