"""Images of coloured shapes: drawn by a program, so that every question about them has a known answer."""

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
Pixels = NDArray[np.uint8]


class Shape(NamedTuple):
    """One shape of an image. `place` is an index of PLACES; an image has at most one shape at each."""

    place: int
    kind: str
    colour: str


def draw_shapes(draw: random.Random) -> list[Shape]:
    """One to three shapes, in reading order."""
    places = sorted(draw.sample(range(4), draw.choice((1, 2, 2, 3, 3))))
    return [Shape(place, draw.choice(KINDS), draw.choice(list(COLOURS))) for place in places]


def paint(shapes: list[Shape], draw: random.Random) -> Pixels:
    """The image (SIZE, SIZE, 3) of shapes: smooth edges, and a random size and position within the place of each."""
    background = np.array([draw.randint(225, 255)] * 3, np.float32)
    image = np.tile(background, (SIZE, SIZE, 1))
    grid: Any = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5
    for shape in shapes:
        radius = draw.uniform(8, 14)
        top, left = shape.place // 2 * CELL, shape.place % 2 * CELL
        y = grid[0] - top - draw.uniform(radius + 1, CELL - radius - 1)
        x = grid[1] - left - draw.uniform(radius + 1, CELL - radius - 1)
        colour = np.array(COLOURS[shape.colour], np.float32) + draw.uniform(-15, 15)
        cover = np.clip(0.5 - outside(shape.kind, y, x, radius), 0, 1)[:, :, None]
        image = image * (1 - cover) + colour * cover
    return np.clip(image, 0, 255).round().astype(np.uint8)


def outside(kind: str, y: Any, x: Any, radius: float) -> Any:
    """How many pixels each point lies outside of a shape around (0, 0); negative inside."""
    if kind == "circle":
        return np.hypot(y, x) - radius
    if kind == "square":
        return np.maximum(np.abs(y), np.abs(x)) - 0.85 * radius
    slope = np.abs(x) * 0.894 - (y + radius) * 0.447  # the two sides that meet at the top
    return np.maximum(slope, y - radius)


def patch_labels(shapes: list[Shape], image: Pixels, patch: int) -> NDArray[np.int64]:
    """What each patch of an image shows, (SIZE / patch)^2 numbers in reading order: 0 is the background, others are
    a kind and a colour. A patch shows a shape if a tenth of it differs from the background."""
    rows = SIZE // patch
    corner = image[0, 0].astype(np.int16)
    different = np.abs(image.astype(np.int16) - corner).max(axis=2) > 30
    share = different.reshape(rows, patch, rows, patch).mean(axis=(1, 3))
    labels = np.zeros((rows, rows), np.int64)
    half = rows // 2
    for place, kind, colour in shapes:
        top, left = place // 2 * half, place % 2 * half
        labels[top : top + half, left : left + half] = 1 + KINDS.index(kind) * len(COLOURS) + list(COLOURS).index(colour)
    return np.where(share > 0.1, labels, 0).flatten()
