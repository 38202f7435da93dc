"""Maps over patches, drawn next to the images that the model saw.

Images are uint8 `[B, C, H, W]` before normalization; maps have one value or one colour per patch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .drawing import Figure, short
from .features import outlier_norm
from .tiles import Tile, in_rows, plot_tiles, rgb

COLUMNS = 8
DIM = 0.2  # brightness at the lowest value of a map; the image remains recognizable


def plot_attention_maps(
    images: np.ndarray, maps: np.ndarray, names: Sequence[str] | None = None, title: str = "Attention"
) -> Figure:
    """Draw each image, its map `[B, h, w]` in percent, and the image lit by the map, on one scale."""
    percents = 100 * maps
    scale = _root_scale(percents)
    groups = [
        [Tile(_shown(image), name), Tile(values, "attention"), Tile(_lit(image, scale["norm"](values)), "overlay")]
        for image, values, name in zip(images, percents, _names(images, names), strict=True)
    ]
    return _plot(groups, title, images, "attention to the patch, %", **scale)


def plot_images(images: np.ndarray, labels: Sequence[str], title: str = "Images") -> Figure:
    """Draw images with a label above each."""
    tiles = [[Tile(_shown(image), short(label, 30))] for image, label in zip(images, labels, strict=True)]
    return plot_tiles(in_rows(tiles, COLUMNS // 2), title, images.shape[2] / images.shape[3], 2.0)


def plot_heads(image: np.ndarray, maps: np.ndarray, name: str = "image", title: str = "Attention by head") -> Figure:
    """Draw one image `[C, H, W]` and the map of every head, `[A, h, w]` in percent, on one scale."""
    heads = [Tile(100 * values, f"head {number}") for number, values in enumerate(maps, start=1)]
    tiles = [[tile] for tile in (Tile(_shown(image), short(name, 19)), *heads)]
    return _plot(tiles, title, image[None], "attention to the patch, %", **_root_scale(100 * maps))


def plot_feature_components(
    images: np.ndarray,
    components: np.ndarray,
    names: Sequence[str] | None = None,
    title: str = "Principal components of features",
) -> Figure:
    """Draw each image and the first three components of its patches, `[B, h, w, 3]` in 0 to 1, as colours."""
    groups = [
        [Tile(_shown(image), name), Tile(colors, "features")]
        for image, colors, name in zip(images, components, _names(images, names), strict=True)
    ]
    return _plot(groups, title, images)


def plot_norm_maps(
    images: np.ndarray, norms: np.ndarray, names: Sequence[str] | None = None, title: str = "Norms of patches"
) -> Figure:
    """Draw each image and the norms of its patches in one layer, `[B, h, w]`; rings mark outliers over all images."""
    fence = outlier_norm(norms)
    groups = [
        [Tile(_shown(image), name), Tile(values, "norm", [(int(r), int(c)) for r, c in np.argwhere(values > fence)])]
        for image, values, name in zip(images, norms, _names(images, names), strict=True)
    ]
    return _plot(groups, title, images, "norm of the patch token")


def lit(image: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Return one image lit by its map, uint8 `[H, W, 3]`, and the values where it is darkest and brightest.

    Brightness grows with the square root of the value, so that differences between small values are visible. The
    scale ranges from the lowest value to the 0.995 quantile.

    Args:
        image: uint8 `[C, H, W]`, of any size; the map is interpolated to it.
        values: `[h, w]`.
    """
    low, high = float(values.min()), float(np.quantile(values, 0.995))
    light = ((values - low) / (high - low)).clip(0, 1) if high > low else np.ones_like(values)
    picture = _lit(image, DIM + (1 - DIM) * np.sqrt(light))
    return (255 * picture).round().astype(np.uint8), (low, high)


def _plot(
    groups: Sequence[Sequence[Tile]],
    title: str,
    images: np.ndarray,
    unit: str | None = None,
    norm: Any = None,
    **style: Any,
) -> Figure:
    if unit is not None and norm is None:
        from matplotlib.colors import Normalize

        values = np.concatenate([tile.picture.ravel() for group in groups for tile in group if tile.picture.ndim == 2])
        norm = Normalize(float(values.min()), float(values.max()))
    aspect = images.shape[2] / images.shape[3]
    return plot_tiles(in_rows(groups, COLUMNS), title, aspect, 1.25, unit, norm, **style)


def _root_scale(percents: np.ndarray) -> dict[str, Any]:
    """Return a square-root scale from 0 to the 0.995 quantile, so that one patch does not darken all others."""
    from matplotlib.colors import PowerNorm

    end = float(np.quantile(percents, 0.995)) or 1.0
    return {"norm": PowerNorm(0.5, 0, end), "extend": "max" if percents.max() > end else "neither"}


def _lit(image: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Multiply an image by a map of brightness in 0 to 1, interpolated between patches."""
    size = (image.shape[1], image.shape[2])
    smooth = F.interpolate(torch.tensor(light)[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0]
    return _shown(image) * smooth.clamp(0, 1).numpy()[..., None]


def _names(images: np.ndarray, names: Sequence[str] | None) -> list[str]:
    return [short(name, 19) for name in names or [f"image {number + 1}" for number in range(len(images))]]


def _shown(image: np.ndarray) -> np.ndarray:
    """Return a uint8 image `[C, H, W]` as colours `[H, W, 3]` in 0 to 1."""
    return rgb(image.transpose(1, 2, 0) / 255)
