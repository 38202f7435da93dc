"""Boxes of objects over their images: the true ones beside the predicted ones."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from ..data.boxes import draw_boxes
from ..data.masks import palette
from .drawing import GRAY, Figure, heading, new_figure
from .masks import legend
from .tiles import rgb

SHARP = 480  # minimum length of the longer side of a drawn image, pixels

Objects = tuple[Tensor, list[int]]  # (left, top, right, bottom) `[n, 4]`, relative to the image, and class indices


def plot_boxes(
    shown: Sequence[tuple[Tensor, Objects, Objects, str]], label_names: Sequence[str], title: str = "Predictions"
) -> Figure:
    """Draw images with their true boxes and with the predicted ones, one row for each image.

    Args:
        shown: For each image: its pixels, uint8 `[C, H, W]`, its objects, the predicted objects, and a text for the
            heading of the predicted objects.
        label_names: Names of the classes.
        title: Heading of the figure.
    """
    height, width = shown[0][0].shape[-2:]
    column = 3.6
    figure = new_figure(2 * column + 1.6, len(shown) * (column * height / width + 0.25) + 0.6)
    heading(figure, title)
    axes = figure.subplots(len(shown), 2, squeeze=False)
    seen: set[int] = set()
    for row, (image, truth, found, text) in zip(axes, shown, strict=True):
        for axis, name, objects in zip(row, ("boxes", f"predicted, {text}"), (truth, found), strict=True):
            axis.imshow(drawn(image, objects, len(label_names)))
            axis.axis("off")
            axis.set_title(name, fontsize=8, color=GRAY, pad=3)
            seen.update(objects[1])
    if seen:
        legend(figure, seen, palette(len(label_names)) / 255, label_names)
    return figure


def drawn(image: Tensor, objects: Objects, number: int) -> np.ndarray:
    """Return an enlarged image `[H, W, 3]` with boxes in class colors, from an image, uint8 `[C, H, W]`."""
    picture = Image.fromarray(rgb(image.permute(1, 2, 0).cpu().numpy()).round().astype(np.uint8))
    factor = max(1, -(-SHARP // max(picture.size)))
    picture = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.BICUBIC)
    boxes, classes = objects
    sides = np.array([picture.width, picture.height] * 2)
    return np.asarray(draw_boxes(picture, (boxes.numpy() * sides).tolist(), classes, [""] * len(classes), number))
