"""Figures of semantic segmentation masks, drawn as colors over their images."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.masks import palette
from .drawing import GRAY, Figure, heading, new_figure, short
from .tiles import Tile, in_rows, plot_tiles, rgb

OPACITY = 0.6
LISTED = 24  # classes in the legend
COLUMNS = 4


def overlay(image: Tensor, classes: Tensor, number: int) -> np.ndarray:
    """Return an image with the colours of its classes over it, uint8 `[H, W, 3]`.

    Args:
        image: uint8 `[C, H, W]`.
        classes: Class indices `[H, W]`; pixels with 255 or another index without a class are not changed.
        number: Number of classes.
    """
    picture = rgb(image.permute(1, 2, 0).cpu().numpy()).astype(np.float64)
    indices = classes.cpu().numpy().astype(np.int64)
    is_known = indices < number
    colors = palette(number)[np.where(is_known, indices, 0)]
    mixed = np.where(is_known[..., None], OPACITY * colors + (1 - OPACITY) * picture, picture)
    return mixed.round().astype(np.uint8)


def plot_overlays(
    shown: Sequence[tuple[Tensor, Tensor, Tensor, str]], label_names: Sequence[str], title: str = "Predictions"
) -> Figure:
    """Draw images, their masks and the predicted masks, one row for each image, with the colours of the classes.

    Args:
        shown: For each image: its pixels, uint8 `[C, H, W]`, its mask and the predicted mask, `[H, W]`, and a text
            for the heading of the predicted mask.
        label_names: Names of the classes.
        title: Heading of the figure.
    """
    height, width = shown[0][1].shape
    column = 2.6
    figure = new_figure(3 * column + 1.6, len(shown) * (column * height / width + 0.25) + 0.6)
    heading(figure, title)
    axes = figure.subplots(len(shown), 3, squeeze=False)
    seen: set[int] = set()
    for row, (image, mask, predicted, text) in zip(axes, shown, strict=True):
        number, nowhere = len(label_names), torch.full_like(mask, 255)
        columns = {"image": nowhere, "mask": mask, f"predicted, {text}": predicted.where(mask < number, 255)}
        for axis, (name, classes) in zip(row, columns.items(), strict=True):
            axis.imshow(overlay(image, classes, number))
            axis.axis("off")
            axis.set_title(name, fontsize=8, color=GRAY, pad=3)
        seen |= {*mask.unique().tolist(), *predicted.unique().tolist()}
    legend(figure, seen, legend_colors(len(label_names)), label_names)
    return figure


def plot_masks(
    images: np.ndarray, classes: Tensor, names: Sequence[str], label_names: Sequence[str], title: str = "Predictions"
) -> Figure:
    """Draw each image, and the image with the colours of its predicted classes over it.

    Args:
        images: uint8 `[B, C, H, W]`.
        classes: Class indices `[B, H, W]`.
        names: Names of the images.
        label_names: Names of the classes.
        title: Heading of the figure.
    """
    groups = []
    for image, predicted, name in zip(images, classes, names, strict=True):
        pixels = torch.from_numpy(image)
        overlaid = overlay(pixels, predicted, len(label_names)) / 255
        groups.append([Tile(rgb(image.transpose(1, 2, 0) / 255), short(name, 19)), Tile(overlaid, "classes")])
    figure = plot_tiles(in_rows(groups, COLUMNS), title, images.shape[2] / images.shape[3], 2.0)
    legend(figure, classes.unique().tolist(), legend_colors(len(label_names)), label_names)
    return figure


def legend_colors(number: int) -> np.ndarray:
    """Return the colors that the classes have in an overlay on gray, float64 `[number, 3]` in 0 to 1."""
    return OPACITY * palette(number) / 255 + (1 - OPACITY) * 0.6


def legend(figure: Figure, classes: Iterable[int], colors: np.ndarray, label_names: Sequence[str]) -> None:
    """Add a legend of some classes to a figure; `colors` are those of all classes, `[num_labels, 3]` in 0 to 1."""
    from matplotlib.patches import Patch

    known = [index for index in sorted(classes) if index < len(label_names)][:LISTED]
    handles: list[Any] = [
        Patch(color=tuple(colors[index].tolist()), label=short(label_names[index], 18)) for index in known
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)


def chosen_images(accuracies: Tensor, number: int = 3, seed: int = 0) -> list[int]:
    """Return the indices of random images and of those with the lowest accuracy, at most `number` of each."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randperm(len(accuracies), generator=generator)[:number].tolist()
    worst = [index for index in accuracies.argsort(stable=True).tolist() if index not in random]
    return [*sorted(random), *worst[:number]]
