"""Images with boxes of objects: from their rows to batches, and as drawings.

Labels of a batch are float32 `[B, M, 5]`: the class, and the centre, width and height of the box, relative to the
image. Rows of class -1 are empty, and lower classes mean ignored objects: see `objects`.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from torch import Tensor

from .images import EvaluationImages, TrainingImages, padded
from .masks import palette, refuse_cropping

LINE, FONT = 1 / 150, 1 / 24  # width of lines and height of letters, relative to the shorter side of an image


class WithBoxes:
    """Images with the boxes of their objects, which `augment` moves with the pixels; mixed into `EvaluationImages`."""

    def __init__(self, split: Any, columns: tuple[str, str], *options: Any, **named: Any) -> None:
        refuse_cropping(options[0], "boxes")
        parent: Any = super()
        parent.__init__(split, columns, *options, **named)
        images: Any = self
        if images.is_on_device:
            raise ValueError("cache=device does not move boxes with images: set cache to ram.")

    def objects(self, index: int) -> Tensor:
        """Return the objects of an image, float32 `[N, 5]`."""
        images: Any = self
        return torch.tensor(images.labels[index], dtype=torch.float32).reshape(-1, 5)

    def augment(self, pixels: Any, visit: Any) -> Any:
        """Return changed pixels of one visit, with its objects."""
        parent: Any = super()
        return parent.augment((pixels, self.objects(visit.index)), visit)


class BoxedEvaluationImages(WithBoxes, EvaluationImages):
    """Images with objects, as the processor makes them. Labels are padded to the same number of rows."""

    @cached_property
    def most(self) -> int:
        """The largest number of objects of an image, at least 1."""
        return max([1, *map(len, cast(list[list[Any]], self.labels))])

    def label(self, index: int) -> Tensor:
        """Return the objects of an image, float32 `[most, 5]`, without decoding it."""
        return padded(self.objects(index), self.most)

    def example(self, pixels: Any, visit: Any) -> dict[str, Any]:
        image, objects = pixels
        return {"pixel_values": image, "labels": padded(objects, self.most)}


class BoxedTrainingImages(WithBoxes, TrainingImages):
    """Augmented images with objects, without those that are ignored."""

    def objects(self, index: int) -> Tensor:
        objects = super().objects(index)
        return objects[objects[:, 0] >= 0]

    def example(self, pixels: Any, visit: Any) -> dict[str, Any]:
        image, objects = pixels
        return {"pixel_values": image, "labels": padded(objects, max(1, len(objects)))}


def draw_boxes(
    image: np.ndarray | PILImage.Image,
    boxes: Sequence[Sequence[float]],
    classes: Sequence[int],
    texts: Sequence[str],
    number: int,
) -> PILImage.Image:
    """Return an RGB image with boxes in the colours of their classes.

    Args:
        image: uint8 `[H, W, 3]`, or a PIL image.
        boxes: (left, top, right, bottom) in pixels.
        classes, texts: Class index and label of each; an empty label is not drawn.
        number: Number of classes.
    """
    drawn = (PILImage.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")
    colors = palette(max(1, number)).tolist()
    side = min(drawn.size)
    line, height = max(2, round(LINE * side)), max(9, round(FONT * side))
    font, draw = ImageFont.load_default(height), ImageDraw.Draw(drawn)
    for box, index in zip(boxes, classes, strict=True):
        draw.rectangle(tuple(box), outline=tuple(colors[index]), width=line)
    for (left, top, _, _), index, text in zip(boxes, classes, texts, strict=True):  # over all boxes
        if text:
            place = (left, max(0, top - height - 2))
            draw.rectangle(draw.textbbox(place, text, font=font), fill=tuple(colors[index]))
            draw.text(place, text, font=font, fill="white" if sum(colors[index]) < 400 else "black")
    return drawn
