"""What position embeddings have learned about where patches lie."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from .drawing import INK
from .layers import layer_number
from .tiles import GAP, Tile, in_rows, plot_tiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SHOWN = 16  # patches along a side, each with a heat map; of more, every second, third, ...
REMEDIES = {
    "relative": "position_bias shows what it adds to the attention",
    "rotary": "it is not learned, and acts in attention_weights",
    "none": "a model with learned or sincos_2d positions has some",
}


@torch.no_grad()
def position_similarity(model: Any, grid: tuple[int, int] | None = None, layer: int = 1) -> np.ndarray:
    """Return the cosine similarity of all pairs of position embeddings, `[rows, columns, rows, columns]`.

    The centre of figure 7 of the paper. Entry `[r, c]` compares the patch in row r, column c with every other.

    Args:
        model: Any model class of this package.
        grid: (rows, columns) that positions are brought to first, as for an image of that size; the model's own if
            not given.
        layer: Where every layer has its own positions, the one that is meant: number from 1, or negative from the end.

    Raises:
        ValueError: If the positions of the model are no vectors that are added to patches, or there is no such grid
            or layer.
    """
    grid = _checked(model, grid)
    positions = model.base_model.embeddings.position_embeddings
    kind = model.config.position_embedding_type
    if not hasattr(positions, "on_grid"):
        raise ValueError(
            f"position_embedding_type={kind!r} has no vector for each patch, so there is nothing to compare: "
            f"{REMEDIES[kind]}."
        )
    vectors = positions.on_grid(grid)  # [1, N, D], or of every layer
    of_layer = vectors[layer_number(model, layer) - 1 if len(vectors) > 1 else 0]
    directions = F.normalize(of_layer.float(), dim=-1)  # [N, D]
    return (directions @ directions.T).cpu().numpy().reshape(*grid, *grid)


@torch.no_grad()
def position_bias(model: Any, layer: int = -1, grid: tuple[int, int] | None = None) -> np.ndarray:
    """Return what relative positions add to the attention scores of a layer, `[A, 2*rows-1, 2*columns-1]`.

    Entry `[a, rows-1 + r, columns-1 + c]` is of head a, for the patch that lies r rows below and c columns right of
    the one that looks: in the centre is the patch itself.

    Args:
        model: Any model class of this package with `position_embedding_type="relative"`.
        layer: Number from 1, or negative from the end.
        grid: (rows, columns) that offsets are brought to first; the model's own if not given.

    Raises:
        ValueError: If positions are of another kind, or there is no such layer or grid.
    """
    kind = model.config.position_embedding_type
    if kind != "relative":
        raise ValueError(
            f"position_embedding_type={kind!r} adds nothing to attention scores: position_similarity shows vectors."
        )
    rows, columns = _checked(model, grid)
    offsets = model.base_model.embeddings.position_embeddings.offsets((2 * rows - 1, 2 * columns - 1))
    # The model counts from the patch that is looked at to the one that looks.
    return offsets[layer_number(model, layer) - 1].flip(0, 1).permute(2, 0, 1).float().cpu().numpy()


def _checked(model: Any, grid: tuple[int, int] | None) -> tuple[int, int]:
    rows, columns = model.config.grid_size if grid is None else grid
    if rows < 1 or columns < 1:
        raise ValueError(f"A grid has at least one row and one column of patches, got {rows}x{columns}.")
    return rows, columns


def plot_position_similarity(similarity: np.ndarray, title: str = "Similarity of position embeddings") -> "Figure":
    """Draw one heat map for each patch, laid out as the patches lie in the image; a ring marks the patch itself."""
    from matplotlib.colors import Normalize

    rows, columns = similarity.shape[:2]
    others = similarity.reshape(rows * columns, -1)[~np.eye(rows * columns, dtype=bool)]
    # Every patch is wholly similar to itself: without it, the scale shows the differences between the others.
    low, high = (float(others.min()), float(others.max())) if others.size else (0.0, 1.0)
    every = -(-max(rows, columns) // MOST_SHOWN)
    row_numbers, column_numbers = range(0, rows, every), range(0, columns, every)
    tiles = [
        [Tile(similarity[row, column], marks=[(row, column)]) for column in column_numbers] for row in row_numbers
    ]
    figure = plot_tiles(
        tiles,
        title,
        aspect=rows / columns,
        side=min(1.2, 7.5 / len(column_numbers)),
        unit="cosine similarity",
        norm=Normalize(low, high),
        extend="max" if others.size and high < 1 else "neither",
    )
    axis, aspect = figure.axes[0], rows / columns
    axis.set_xticks(0.5 + (1 + GAP) * np.arange(len(column_numbers)), [str(number + 1) for number in column_numbers])
    axis.set_yticks(
        aspect / 2 + (aspect + GAP) * np.arange(len(row_numbers)), [str(number + 1) for number in row_numbers]
    )
    some = {1: "", 2: ", every 2nd", 3: ", every 3rd"}.get(every, f", every {every}th")
    axis.set_xlabel(f"column of the patch{some}", color=INK)
    axis.set_ylabel(f"row of the patch{some}", color=INK)
    return figure


def plot_position_bias(bias: np.ndarray, title: str = "Bias of relative positions") -> "Figure":
    """Draw for each head the bias of every offset, `[A, 2*rows-1, 2*columns-1]`; the patch itself is the centre."""
    from matplotlib.colors import CenteredNorm

    heads, rows, columns = bias.shape
    centre = [(rows // 2, columns // 2)]
    tiles = [[Tile(bias[head], f"head {head + 1}", centre)] for head in range(heads)]
    figure = plot_tiles(
        in_rows(tiles, 8),
        title,
        aspect=rows / columns,
        side=1.2,
        unit="added to the attention score",
        norm=CenteredNorm(0, float(np.abs(bias).max()) or 1.0),
        cmap="PuOr_r",
    )
    figure.axes[0].set_xlabel(
        f"columns to the right, {1 - columns // 2 - 1} to {columns // 2} in each tile", color=INK
    )
    figure.axes[0].set_ylabel(f"rows down, {1 - rows // 2 - 1} to {rows // 2} in each tile", color=INK)
    return figure
