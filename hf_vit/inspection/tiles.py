"""Small pictures side by side, of values or of colours: what filters, positions and maps over images are drawn as."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .drawing import INK, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 0.06  # between tiles, of a tile's width


class Tile(NamedTuple):
    """A picture, `[h, w]` of values or `[h, w, 3]` of colours in 0 to 1, what stands above it, and places to mark.

    A label is text as matplotlib takes it. Marks are cells, (row, column), as in the picture of values.
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
) -> "Figure":
    """Draw rows of tiles, all of one size, whatever number of cells each has.

    Args:
        aspect: Height of a tile, of its width.
        side: Width of a tile in inches; less if it is higher than wide.
        unit: What the values are; with it there is a colour bar.
        norm, cmap: Scale and colours of the values, the same for all tiles.
        extend: Ends of the scale that values go beyond, as `colorbar` takes it.
    """
    from matplotlib.patheffects import withStroke

    side /= max(1.0, aspect)
    columns = max(map(len, rows))
    heading = 0.17 / side if any(tile.label for row in rows for tile in row) else 0.0
    step = aspect + heading + GAP
    width, height = columns * (1 + GAP) - GAP, len(rows) * step - GAP
    colorbar_inches = 0.9 if unit is not None else 0.0
    figure = new_figure(max(4.5, side * width + colorbar_inches + 0.4), side * height + 1.1)
    axis = figure.subplots()
    image = None
    for row, tiles in enumerate(rows):
        for column, (picture, label, marks) in enumerate(tiles):
            left, top = column * (1 + GAP), row * step + heading
            extent = (left, left + 1, top + aspect, top)
            if picture.ndim == 2:
                image = axis.imshow(picture, extent=extent, norm=norm, cmap=cmap, interpolation="nearest")
            else:
                axis.imshow(picture.clip(0, 1), extent=extent)
            if label:
                axis.text(left, top - 0.03 / side, label, fontsize=7.5, va="bottom", color=INK, clip_on=True)
            if marks:
                places = np.asarray(marks) + 0.5
                cells = picture.shape[:2]
                size = min(5.0, max(1.5, 60 * side / max(cells)))  # points, of 72 an inch: at most a cell
                axis.plot(
                    left + places[:, 1] / cells[1], top + places[:, 0] / cells[0] * aspect, ls="", marker="o",
                    ms=size, mfc="none", mec=INK, mew=size / 4,
                    path_effects=[withStroke(linewidth=size / 2, foreground="white")],
                )  # fmt: skip
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], aspect="equal")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=8)
    figure.suptitle(plain(title), fontsize=12, color=INK)
    if unit is not None and image is not None:
        scale = figure.colorbar(image, ax=axis, extend=extend, shrink=0.9, aspect=30, pad=0.02)
        scale.set_label(unit, fontsize=8)
        scale.ax.tick_params(labelsize=8)
        scale.outline.set_visible(False)
    return figure


def in_rows(groups: Sequence[Sequence[Tile]], columns: int) -> list[list[Tile]]:
    """Lay out groups of tiles in rows of about the same length: `columns` tiles, or a group if that is longer."""
    most = max(1, columns // max(map(len, groups)))  # groups in a row
    together = -(-len(groups) // -(-len(groups) // most))
    starts = range(0, len(groups), together)
    return [[tile for group in groups[start : start + together] for tile in group] for start in starts]


def shown(image: np.ndarray) -> np.ndarray:
    """Return uint8 `[C, H, W]` as colours `[H, W, 3]` in 0 to 1: the mean in gray where there are not three."""
    picture = image.transpose(1, 2, 0) / 255
    return picture if picture.shape[2] == 3 else np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2)
