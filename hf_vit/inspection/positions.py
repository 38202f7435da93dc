"""Similarity of position embeddings, and bias of relative positions."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .drawing import INK, Figure
from .layers import layer_number
from .tiles import GAP, Tile, in_rows, plot_tiles

MOST_SHOWN = 16  # heat maps along a side; for larger grids, only every second, third, ... patch is drawn
REMEDIES = {
    "relative": "use position_bias for what it adds to the attention scores",
    "rotary": "rotary positions are not learned; their effect is part of attention_weights",
    "none": "use a model with learned or sincos_2d positions",
}


@torch.no_grad()
def position_similarity(model: Any, grid: tuple[int, int] | None = None, layer: int = 1) -> np.ndarray:
    """Return the cosine similarity of all pairs of position embeddings, `[rows, columns, rows, columns]`.

    As in the paper's figure 7, center. Entry `[r, c]` compares the patch in row r, column c with all patches.

    Args:
        model: Any model class of this package.
        grid: (rows, columns) to resample positions to first; by default the model's own grid.
        layer: The layer, if each layer has its own positions: number from 1, or negative from the end.

    Raises:
        ValueError: If the model has no position vectors that are added to patches, or the grid or layer is invalid.
    """
    grid = _checked(model, grid)
    positions = model.base_model.embeddings.position_embeddings
    kind = model.config.position_embedding_type
    if not hasattr(positions, "on_grid"):
        raise ValueError(
            f"Expected one position vector per patch, got position_embedding_type={kind!r}: {REMEDIES[kind]}."
        )
    vectors = positions.on_grid(grid)  # [1, N, D], or of every layer
    of_layer = vectors[layer_number(model, layer) - 1 if len(vectors) > 1 else 0]
    directions = F.normalize(of_layer.float(), dim=-1)  # [N, D]
    return (directions @ directions.T).cpu().numpy().reshape(*grid, *grid)


@torch.no_grad()
def position_bias(model: Any, layer: int = -1, grid: tuple[int, int] | None = None) -> np.ndarray:
    """Return the bias that relative positions add to the attention scores of a layer, `[A, 2*rows-1, 2*columns-1]`.

    Entry `[a, rows-1 + r, columns-1 + c]` is the bias of head a for a key patch r rows below and c columns right of
    the query patch; the centre is the query patch itself.

    Args:
        model: Any model class of this package with `position_embedding_type="relative"`.
        layer: Number from 1, or negative from the end.
        grid: (rows, columns) to resample the bias to first; by default the model's own grid.

    Raises:
        ValueError: If the model has other positions, or the grid or layer is invalid.
    """
    kind = model.config.position_embedding_type
    if kind != "relative":
        raise ValueError(
            f"position_embedding_type={kind!r} adds nothing to attention scores: use position_similarity."
        )
    rows, columns = _checked(model, grid)
    offsets = model.base_model.embeddings.position_embeddings.offsets((2 * rows - 1, 2 * columns - 1))
    # The model's offsets go from key to query; the result's go from query to key.
    return offsets[layer_number(model, layer) - 1].flip(0, 1).permute(2, 0, 1).float().cpu().numpy()


def _checked(model: Any, grid: tuple[int, int] | None) -> tuple[int, int]:
    rows, columns = model.config.grid_size if grid is None else grid
    if rows < 1 or columns < 1:
        raise ValueError(f"Expected a grid with at least one row and one column, got {rows}x{columns}.")
    return rows, columns


def plot_position_similarity(similarity: np.ndarray, title: str = "Similarity of position embeddings") -> Figure:
    """Draw one heat map per patch, arranged like the patches of the image; a ring marks the patch itself."""
    from matplotlib.colors import Normalize

    rows, columns = similarity.shape[:2]
    others = similarity.reshape(rows * columns, -1)[~np.eye(rows * columns, dtype=bool)]
    # The scale excludes the similarity of each patch with itself, which is 1 and would hide other differences.
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
    step = {1: "", 2: ", every 2nd", 3: ", every 3rd"}.get(every, f", every {every}th")
    axis.set_xlabel(f"patch column{step}", color=INK)
    axis.set_ylabel(f"patch row{step}", color=INK)
    return figure


def plot_position_bias(bias: np.ndarray, title: str = "Bias of relative positions") -> Figure:
    """Draw the bias of every offset for each head, `[A, 2*rows-1, 2*columns-1]`; the query patch is in the centre."""
    from matplotlib.colors import CenteredNorm

    heads, rows, columns = bias.shape
    centre = [(rows // 2, columns // 2)]
    tiles = [[Tile(bias[head], f"head {head + 1}", centre)] for head in range(heads)]
    figure = plot_tiles(
        in_rows(tiles, 8),
        title,
        aspect=rows / columns,
        side=1.2,
        unit="bias of the attention score",
        norm=CenteredNorm(0, float(np.abs(bias).max()) or 1.0),
        cmap="PuOr_r",
    )
    figure.axes[0].set_xlabel(f"column offset, {-(columns // 2)} to {columns // 2} in each tile", color=INK)
    figure.axes[0].set_ylabel(f"row offset, {-(rows // 2)} to {rows // 2} in each tile", color=INK)
    return figure
