"""Rows of small images of equal size, the layout of figures of filters, positions and maps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .drawing import INK, Figure, heading, new_figure

GAP = 0.06  # space between tiles, relative to the width of a tile


class Tile(NamedTuple):
    """An array of values `[h, w]`, or of colours `[h, w, 3]` in 0 to 1, with a label above and marked grid cells.

    The label is escaped for matplotlib. Marks are (row, column) of the array.
    """

    picture: np.ndarray
    label: str = ""
    marks: Sequence[tuple[int, int]] = ()


def plot_tiles(
    rows: Sequence[Sequence[Tile]],
    title: str,
    aspect: float,
    side: float,
    unit: str | None = None,
    norm: Any = None,
    cmap: str = "viridis",
    extend: str = "neither",
) -> Figure:
    """Draw rows of tiles at one size, whatever the shapes of their arrays.

    Args:
        aspect: Height of a tile divided by its width.
        side: Longer side of a tile in inches.
        unit: Label of the colour bar; there is no colour bar without it.
        norm, cmap: Normalization and colour map of the values, the same for all tiles.
        extend: Ends of the scale that values exceed, as in `colorbar`.
    """
    from matplotlib.patheffects import withStroke

    side /= max(1.0, aspect)
    columns = max(map(len, rows))
    label_height = 0.17 / side if any(tile.label for row in rows for tile in row) else 0.0
    step = aspect + label_height + GAP
    width, height = columns * (1 + GAP) - GAP, len(rows) * step - GAP
    colorbar_inches = 0.9 if unit is not None else 0.0
    figure = new_figure(max(4.5, side * width + colorbar_inches + 0.4), side * height + 1.1)
    axis = figure.subplots()
    image = None
    for row, tiles in enumerate(rows):
        for column, (picture, label, marks) in enumerate(tiles):
            left, top = column * (1 + GAP), row * step + label_height
            extent = (left, left + 1, top + aspect, top)
            if picture.ndim == 2:
                image = axis.imshow(picture, extent=extent, norm=norm, cmap=cmap, interpolation="nearest")
            else:
                axis.imshow(picture.clip(0, 1), extent=extent)
            if label:
                axis.text(left, top - 0.03 / side, label, fontsize=7.5, va="bottom", color=INK, clip_on=True)
            if marks:
                centres = np.asarray(marks) + 0.5
                cells = picture.shape[:2]
                size = min(5.0, max(1.5, 60 * side / max(cells)))  # points (72 per inch), at most one cell
                axis.plot(
                    left + centres[:, 1] / cells[1], top + centres[:, 0] / cells[0] * aspect, ls="", marker="o",
                    ms=size, mfc="none", mec=INK, mew=size / 4,
                    path_effects=[withStroke(linewidth=size / 2, foreground="white")],
                )  # fmt: skip
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], aspect="equal")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=8)
    heading(figure, title)
    if unit is not None and image is not None:
        scale = figure.colorbar(image, ax=axis, extend=extend, shrink=0.9, aspect=30, pad=0.02)
        scale.set_label(unit, fontsize=8)
        scale.ax.tick_params(labelsize=8)
        scale.outline.set_visible(False)
    return figure


def in_rows(groups: Sequence[Sequence[Tile]], columns: int) -> list[list[Tile]]:
    """Arrange groups of tiles in rows of about equal length: at most `columns` tiles, or one group."""
    most = max(1, columns // max(map(len, groups)))  # groups per row
    parts = np.array_split(np.arange(len(groups)), -(-len(groups) // most))
    return [[tile for index in part for tile in groups[index]] for part in parts]


def rgb(picture: np.ndarray) -> np.ndarray:
    """Return an array `[H, W, C]` as `[H, W, 3]`: the first three channels, or the mean of one or two as gray."""
    return picture[..., :3] if picture.shape[2] >= 3 else np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2)
