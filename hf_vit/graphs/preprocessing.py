"""The image processor inside a graph: from images of any size, uint8 [B, H, W, C], to pixel values and scores.

Resizing is two products with matrices whose entries are Pillow's filters, rounded to levels in between as Pillow does.
A crop is a choice of rows of these matrices, so that no size inside the graph depends on that of the image.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..model.image_geometry_hf_vit import resized_size
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..model.losses_hf_vit import activation_of
from ..model.modeling_hf_vit import HFViTForImageClassification
from .open_sizes import Model, as_tensor, kernel
from .tracing import IMAGES, Graph

FILTERS = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
LUMA = (19595, 38470, 7471)  # of red, green and blue, in 65536ths: Pillow's mode L
MOST_LEVELS = 1.01  # that a pixel may differ from the processor, which rounds the weights of filters to 16 bits
JUST_BELOW = 1e-4  # values this close to the midpoint of two levels are rounded up, in every runtime
ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "softmax": ("probabilities", lambda logits: logits.softmax(dim=-1)),
    "sigmoid": ("probabilities", torch.sigmoid),
    "none": ("values", lambda logits: logits),
}


class Plan(NamedTuple):
    """What an image processor does, as far as a graph can.

    Attributes:
        size: (height, width) of its output.
        covered: (height, width) that the resized image covers at its aspect ratio; `None` if it has exactly `size`.
        rounding: Rounds the margins of a centre crop.
    """

    size: tuple[int, int]
    covered: tuple[int, int] | None
    rounding: Callable[[Tensor], Tensor]


def plan_of(processor: HFViTImageProcessor) -> Plan:
    """Return what a processor does.

    Raises:
        ValueError: If a graph cannot do it.
    """
    problem = None
    if processor.packing is not None:
        problem = "packs patches"
    elif processor.value_range is not None:
        problem = "maps a range of values to 8 bits"
    elif not processor.do_resize:
        problem = "does not resize"
    elif processor.resample not in FILTERS:
        problem = f"resizes with resample={processor.resample}, neither bilinear (2) nor bicubic (3)"
    elif processor.do_normalize and not processor.do_rescale:
        problem = "normalizes without do_rescale"
    size: dict[str, Any]
    crop: dict[str, Any]
    size, crop = (dict(each or {}) for each in (processor.size, processor.crop_size))
    height, width, shortest = size.get("height", 0), size.get("width", 0), size.get("shortest_edge")
    if size.get("longest_edge") or (shortest and not processor.do_center_crop):
        problem = problem or "gives images of different sizes"
    if problem is not None:
        raise ValueError(
            f"The image processor {problem}, which a graph cannot do: leave --with-preprocessing out, or change "
            "preprocessor_config.json."
        )
    if shortest:
        return Plan((crop["height"], crop["width"]), (shortest, shortest), torch.trunc)
    if processor.crop_pct is not None:
        covered = resized_size((height, width), processor.size, processor.crop_pct)
        return Plan((height, width), covered, torch.round)
    if processor.do_center_crop and (crop["height"], crop["width"]) != (height, width):
        raise ValueError(
            "The image processor crops an image of one fixed size to another, which a graph cannot do: use crop_pct."
        )
    return Plan((height, width), None, torch.round)


def resizing_matrix(old: int, resized: Tensor, first: Tensor, new: int, mode: str) -> Tensor:
    """Return the matrix `[new, old]` that resizes a side to `resized` pixels and keeps `new` of them from `first` on.

    `old` may be symbolic. Pixels outside of the image are black. The weights are those of Pillow's `resize`.
    """
    side = as_tensor(old)
    points = torch.arange(new, dtype=torch.float32) + first  # [new]
    centers = (points + 0.5) * side / resized
    distances = (centers.unsqueeze(1) - (torch.arange(old).float() + 0.5)).abs()
    weights = kernel(distances * torch.minimum(resized / side, torch.ones(1)), mode, antialias=True)
    weights = weights / weights.sum(dim=1, keepdim=True)
    is_inside = (points >= 0) & (points < resized)
    return torch.where(is_inside.unsqueeze(1), weights, torch.zeros_like(weights))


def to_levels(pixels: Tensor) -> Tensor:
    """Round pixels to levels from 0 to 255."""
    return (pixels + (0.5 + JUST_BELOW)).floor().clamp(0, 255)


class Preprocessing(nn.Module):
    """The steps of an image processor: resize, crop, rescale and normalize."""

    mean: Tensor
    std: Tensor

    def __init__(self, processor: HFViTImageProcessor, num_channels: int) -> None:
        super().__init__()
        self.plan, self.mode = plan_of(processor), FILTERS[processor.resample]
        self.is_gray = bool(processor.do_grayscale)
        self.num_channels = 3 if self.is_gray else num_channels  # of the images
        scale = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (
            torch.tensor(values if processor.do_normalize else [default], dtype=torch.float32).view(-1, 1, 1) / scale
            for values, default in ((processor.image_mean, 0.0), (processor.image_std, 1.0))
        )
        if self.is_gray:
            mean, std = mean[:1], std[:1]
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return pixel values `[B, C, h, w]` for images uint8 `[B, H, W, C]`."""
        pixels = images.permute(0, 3, 1, 2).float()
        if self.is_gray:
            luma = torch.tensor(LUMA, dtype=torch.float32).view(3, 1, 1) / 65536
            pixels = to_levels((pixels * luma).sum(dim=1, keepdim=True))
        (rows, columns), (height, width) = self._matrices(images.shape[1], images.shape[2]), self.plan.size
        assert rows.shape[0] == height and columns.shape[0] == width
        pixels = to_levels(rows @ to_levels(pixels @ columns.T))  # [B, C, h, w]
        return (pixels - self.mean) / self.std

    def _matrices(self, height: int, width: int) -> list[Tensor]:
        old = [as_tensor(height), as_tensor(width)]
        new = [torch.full((1,), float(side)) for side in self.plan.size]
        resized = new if self.plan.covered is None else self._covering(old, self.plan.covered)
        first = [self.plan.rounding((side - kept) / 2) for side, kept in zip(resized, new, strict=True)]
        return [
            resizing_matrix(side, *each, self.mode)
            for side, each in zip((height, width), zip(resized, first, self.plan.size, strict=True), strict=True)
        ]

    @staticmethod
    def _covering(old: list[Tensor], covered: tuple[int, int]) -> list[Tensor]:
        """Return what `image_geometry_hf_vit.covering_size` does, for tensors."""
        if covered[0] == covered[1]:
            shortest = torch.minimum(*old)
            return [(covered[0] * side / shortest).floor() for side in old]
        is_high = old[0] * covered[1] > old[1] * covered[0]  # the width decides
        number = torch.where(is_high, old[1], old[0])
        target = torch.where(is_high, torch.full((1,), float(covered[1])), torch.full((1,), float(covered[0])))
        return [(side * target / number).round() for side in old]


class PreprocessedGraph(Graph):
    """A graph from images, uint8 `[B, H, W, C]` of any size of at least 2x2, to scores.

    A classifier returns `probabilities`, or the `values` of a regression; other models return what `Graph` does.
    """

    input = IMAGES
    preprocessing: Preprocessing

    def __init__(self, model: Model, processor: HFViTImageProcessor, precision: str = "fp32") -> None:
        super().__init__(model, precision)
        self.processor = processor
        self.preprocessing = Preprocessing(processor, model.config.num_channels)
        self.activation = None
        if isinstance(model, HFViTForImageClassification):
            name, self.activation = ACTIVATIONS[activation_of(model.config)]
            self.outputs = (name,)

    def in_float32(self) -> "PreprocessedGraph":
        return PreprocessedGraph(self.original, self.processor)

    def preprocessed(self, images: Tensor) -> Tensor:
        return self.preprocessing(images)

    def forward(self, images: Tensor) -> Any:
        answer = super().forward(images)
        return answer if self.activation is None else self.activation(answer)

    def example(self) -> tuple[Tensor, dict[int, Any]]:
        Dim = torch.export.Dim
        example = torch.zeros(2, 37, 53, self.preprocessing.num_channels, dtype=torch.uint8)
        return example, {0: Dim("batch"), 1: Dim("height", min=2), 2: Dim("width", min=2)}

    def positions(self) -> AbstractContextManager[None]:
        return nullcontext()  # the model sees one size

    def check(self, images: np.ndarray) -> None:
        """Raise `ValueError` if the pixels of images differ by more than one level from those of the processor."""
        options: dict[str, Any] = {"return_tensors": "pt", "input_data_format": "channels_last"}
        expected = self.processor(list(images), **options)["pixel_values"]
        levels = (self.preprocessed(torch.from_numpy(images)) - expected) * self.preprocessing.std
        if not (difference := levels.abs().max().item()) <= MOST_LEVELS:
            raise ValueError(
                f"The pixels of the graph differ by {difference:.1f} of 255 levels from those of the image processor: "
                "leave --with-preprocessing out, and please report the processor."
            )
