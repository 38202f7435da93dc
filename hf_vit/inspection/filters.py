"""Filters of the first layer: the patch projection, or the stem of a hybrid."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .drawing import Figure
from .tiles import Tile, plot_tiles, rgb


def principal_components(rows: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return the principal components of rows `[n, D]`, float64 `[number, D]`, and their shares of the variance.

    The largest entry of each component is positive, so that the result is unique. Both are on the CPU: some
    accelerators have no float64.
    """
    rows = rows.cpu().double()
    centred = rows - rows.mean(dim=0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # in ascending order, directions in columns
    variances, directions = variances.flip(0).clamp(min=0), directions.T.flip(0)[:number]
    largest = directions.take_along_dim(directions.abs().argmax(dim=1, keepdim=True), dim=1)
    shares = variances / variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return directions * largest.sign(), shares[:number]


@torch.no_grad()
def patch_filters(model: Any, components: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """Return the first principal components of the patch projection as images, as in the paper's figure 7, left.

    Returns:
        Components of norm 1, `[K, ph, pw, C]`, and their shares of the variance `[K]`. K is `components`, or fewer if
        there are fewer filters or weights.

    Raises:
        ValueError: If the model is a hybrid.
    """
    projection = model.base_model.embeddings.patch_embeddings
    if model.config.stem_layers is not None:
        raise ValueError(
            "Expected a projection of pixels, got a hybrid, which projects features of its stem: use stem_filters."
        )
    weight = projection.projection.weight  # [D, C*ph*pw]
    directions, shares = principal_components(weight, min(components, max(1, len(weight) - 1)))
    filters = directions.unflatten(1, (-1, *projection.patch_shape)).permute(0, 2, 3, 1)
    return filters.float().numpy(), shares.float().numpy()


@torch.no_grad()
def stem_filters(model: Any) -> np.ndarray:
    """Return the filters of a hybrid's first convolution, `[stem_width, 7, 7, C]`, standardized to mean 0 and norm 1.

    Raises:
        ValueError: If the model has no stem.
    """
    if model.config.stem_layers is None:
        raise ValueError("Expected a hybrid, got a model without a stem: use patch_filters.")
    weight = model.base_model.embeddings.patch_embeddings.stem.conv.weight.float()  # [K, C, 7, 7]
    weight = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
    return F.normalize(weight.flatten(1)).view_as(weight).permute(0, 2, 3, 1).cpu().numpy()


def plot_filters(filters: np.ndarray, shares: np.ndarray | None = None, title: str = "Patch filters") -> Figure:
    """Draw filters `[K, h, w, C]`, each scaled to its own range; gray is zero.

    Three channels are drawn as red, green and blue, a single channel in gray. For other numbers, the first seven
    filters are drawn with one row per channel.

    Args:
        shares: Shares of the variance `[K]`, written above the filters.
    """
    number, height, width, channels = filters.shape
    scale = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    pictures = 0.5 + filters / (2 * np.where(scale > 0, scale, 1))
    labels = [f"{index + 1}" for index in range(number)]
    if shares is not None:
        labels = [f"{label}:  {100 * share:.2g} %" for label, share in zip(labels, shares, strict=True)]
    if channels in (1, 3):
        columns = 7 if number <= 28 else 8
        tiles = [Tile(rgb(picture), label) for picture, label in zip(pictures, labels, strict=True)]
        rows = [tiles[start : start + columns] for start in range(0, number, columns)]
    else:
        shown = list(zip(pictures, labels, strict=True))[:7]
        rows = [
            [
                Tile(rgb(picture[..., channel, None]), label if channel == 0 else f"channel {channel + 1}")
                for picture, label in shown
            ]
            for channel in range(channels)
        ]
    return plot_tiles(rows, title, aspect=height / width, side=0.95)
