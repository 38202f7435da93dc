"""What the first layer looks for: the filters of the patch projection, or of the stem before it."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .tiles import Tile, plot_tiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def principal_components(rows: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return the directions in which rows `[n, D]` vary most, `[number, D]`, and their shares of the variance.

    Float64. A direction's largest entry is positive, so that the same rows give the same directions.
    """
    centred = rows.double() - rows.double().mean(dim=0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # in ascending order, directions in columns
    variances, directions = variances.flip(0).clamp(min=0), directions.T.flip(0)[:number]
    largest = directions.take_along_dim(directions.abs().argmax(dim=1, keepdim=True), dim=1)
    shares = variances / variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return directions * largest.sign(), shares[:number]


@torch.no_grad()
def patch_filters(model: Any, components: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """Return the first principal components of the patch projection as images, the left of the paper's figure 7.

    Returns:
        The components, `[K, ph, pw, C]` of length 1 each, and their shares of the variance `[K]`. K is `components`,
        or less where filters or their weights are fewer.

    Raises:
        ValueError: If the patches are not of pixels.
    """
    projection = model.base_model.embeddings.patch_embeddings
    if model.config.stem_layers is not None:
        raise ValueError(
            "The patches of a hybrid are of features, not of pixels, so that its projection is no picture: "
            "stem_filters shows what it looks for first."
        )
    weight = projection.projection.weight  # [D, C*ph*pw]
    directions, shares = principal_components(weight, min(components, max(1, len(weight) - 1)))
    filters = directions.unflatten(1, (-1, *projection.patch_shape)).permute(0, 2, 3, 1)
    return filters.float().cpu().numpy(), shares.float().cpu().numpy()


@torch.no_grad()
def stem_filters(model: Any) -> np.ndarray:
    """Return the filters of a hybrid's first convolution, `[stem_width, 7, 7, C]`, of mean 0 as they are used.

    Raises:
        ValueError: If the model has no stem.
    """
    if model.config.stem_layers is None:
        raise ValueError("The model has no stem in front of its patches: patch_filters shows what it looks for.")
    weight = model.base_model.embeddings.patch_embeddings.stem.conv.weight.float()  # [K, C, 7, 7]
    weight = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
    return F.normalize(weight.flatten(1)).view_as(weight).permute(0, 2, 3, 1).cpu().numpy()


def plot_filters(filters: np.ndarray, shares: np.ndarray | None = None, title: str = "Patch filters") -> "Figure":
    """Draw filters `[K, h, w, C]`, each in its own range around gray, which is zero.

    Three channels are drawn as red, green and blue. Of another number each channel is a row of its own, for the first
    seven filters; one channel alone is drawn in gray.

    Args:
        shares: Of the variance, `[K]`, written above the filters.
    """
    number, height, width, channels = filters.shape
    scale = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    pictures = 0.5 + filters / (2 * np.where(scale > 0, scale, 1))
    labels = [f"{index + 1}" for index in range(number)]
    if shares is not None:
        labels = [f"{label}:  {100 * share:.2g} %" for label, share in zip(labels, shares, strict=True)]
    if channels in (1, 3):
        columns = 7 if number <= 28 else 8
        tiles = [Tile(_rgb(picture), label) for picture, label in zip(pictures, labels, strict=True)]
        rows = [tiles[start : start + columns] for start in range(0, number, columns)]
    else:
        shown = list(zip(pictures, labels, strict=True))[:7]
        rows = [
            [
                Tile(_rgb(picture[..., channel, None]), label if channel == 0 else f"channel {channel + 1}")
                for picture, label in shown
            ]
            for channel in range(channels)
        ]
    return plot_tiles(rows, title, aspect=height / width, side=0.95)


def _rgb(picture: np.ndarray) -> np.ndarray:
    return np.broadcast_to(picture, (*picture.shape[:2], 3))
