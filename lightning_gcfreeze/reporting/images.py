"""Masks and frozen fractions as pixels, for loggers that take images."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.reporting.groups import History, shortened_name

MAX_SIDE = 128
"""Pixels of a mask image in height and width."""
MAX_ASPECT = 4
"""A mask image is about so many times as wide as high, or as high as wide, at most."""
LIVE, FROZEN = (247, 251, 255), (8, 48, 107)
"""The colours, red, green and blue, of 0 % and of 100 %. What is between is interpolated."""

Image = NDArray[np.uint8]
"""(height, width, 3)."""

_MAP_WIDTH, _MAP_HEIGHT, _MIN_ROW = 256, 192, 12  # pixels of the heat map, about as TensorBoard shows it, and of a row
_MAX_LABEL = 26  # characters


def mask_images(frozen: Named, shapes: Mapping[str, torch.Size], most: int) -> Iterator[tuple[str, Image]]:
    """Yield names and images of the largest matrices' masks: rows by columns, each pixel the mean of its elements.

    Args:
        frozen: ``{name: bool (*p.shape)}``. What has more than two dimensions is drawn as (first, all others).
        shapes: of whole parameters, which tell how large they are.
        most: images.
    """
    matrices = [name for name, mask_shape in shapes.items() if len(mask_shape) > 1 and mask_shape.numel()]
    for name in sorted(matrices, key=lambda name: -shapes[name].numel())[:most]:
        mask = frozen[name]
        if mask.numel():  # a process may have nothing of it
            cells = shrunk(mask.reshape(len(mask), -1).cpu().numpy())
            for axis in (0, 1):  # a narrow one gets larger cells
                cells = np.repeat(cells, max(1, cells.shape[1 - axis] // (MAX_ASPECT * cells.shape[axis])), axis=axis)
            yield name, coloured(cells)


def shrunk(matrix: NDArray[Any]) -> NDArray[np.float64]:
    """Return the means of the cells of at most `MAX_SIDE` x `MAX_SIDE`, which share rows and columns evenly."""
    for axis in (0, 1):
        size = matrix.shape[axis]
        edges = np.arange(min(size, MAX_SIDE)) * size // min(size, MAX_SIDE)
        sums = np.add.reduceat(matrix, edges, axis=axis, dtype=np.float64)
        matrix = sums / np.expand_dims(np.diff(edges, append=size), 1 - axis)
    return matrix


def heat_map(history: History, now: int) -> Image:
    """Draw frozen fractions: a row for each layer, the first one on top, over the steps from left to right.

    Args:
        history: of layers.
        now: the step of the last column; the first column is that of the first entry.
    """
    layers = list(history[-1][1])
    values = np.array([[fractions.get(layer, 0.0) for layer in layers] for _, fractions in history])
    columns = np.linspace(history[0][0], now, _MAP_WIDTH)
    at = np.searchsorted([step for step, _ in history], columns, side="right") - 1
    return coloured(np.repeat(values[at].T, max(_MIN_ROW, _MAP_HEIGHT // len(layers)), axis=0))


def labelled(image: Image, rows: Sequence[str], first: int, last: int) -> Image:
    """Return a heat map with the names of its rows on the left and its first and last step below, if Pillow has a font.

    Args:
        image: see `heat_map`.
        rows: names; long ones lose their beginning.
        first: step of the first column.
        last: step of the last column.
    """
    from PIL import Image as Picture
    from PIL import ImageDraw, ImageFont

    try:
        font = ImageFont.load_default(10)
    except (ImportError, TypeError):  # Pillow without FreeType, or before 10.1
        return image
    texts = [shortened_name(name, _MAX_LABEL) for name in rows]
    left, height = 8 + max(round(font.getlength(text)) for text in texts), len(image)
    picture = Picture.new("RGB", (left + image.shape[1], height + 14), "white")
    picture.paste(Picture.fromarray(image), (left, 0))
    draw = ImageDraw.Draw(picture)
    for i, text in enumerate(texts):
        draw.text((left - 4, (i + 0.5) * height / len(texts)), text, "black", font, anchor="rm")
    draw.text((left, height + 2), f"step {first}", "black", font)
    draw.text((left + image.shape[1] - 2, height + 2), f"step {last}", "black", font, anchor="ra")
    return np.asarray(picture)


def coloured(fractions: NDArray[np.float64]) -> Image:
    """Return (height, width) of numbers in [0, 1] in colours from `LIVE` to `FROZEN`, (height, width, 3)."""
    live, frozen = np.array(LIVE, float), np.array(FROZEN, float)
    image: Image = np.rint(live + fractions[:, :, None] * (frozen - live)).astype(np.uint8)
    return image
