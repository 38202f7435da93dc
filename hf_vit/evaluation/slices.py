"""Weak slices of a classifier: groups of images with more errors than the others."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.audit import Picture
from .intervals import interval_of

LEAST_IMAGES = 10  # of a slice
PARTS = 4  # quarters of a number such as the brightness


@dataclass(frozen=True)
class Slice:
    """A group of images: its name, their number, the number of errors, and the interval of the accuracy."""

    name: str
    images: int
    errors: int
    low: float
    high: float

    @property
    def accuracy(self) -> float:
        return 1 - self.errors / self.images


def weak_slices(
    predicted: Tensor, labels: Tensor, names: Sequence[str], pictures: Sequence[Picture]
) -> tuple[list[Slice], Slice]:
    """Return the groups whose accuracy is below that of all images, the weakest first, and all images as a group.

    Groups are the true classes, the predicted classes, the formats, and quarters of size, aspect ratio and
    brightness. Their intervals are widened for the number of groups, and must lie below the accuracy of all images.

    Args:
        predicted, labels: Class indices `[N]`.
        names: Names of the classes.
        pictures: What is known of the images.
    """
    is_wrong = predicted != labels
    groups = [(f"label {name}", labels == index) for index, name in enumerate(names)]
    groups += [(f"predicted as {name}", predicted == index) for index, name in enumerate(names)]
    formats = [picture.format for picture in pictures]
    groups += [(f"format {name}", torch.tensor([each == name for each in formats])) for name in sorted(set(formats))]
    numbers = {
        "pixels": torch.tensor([float(picture.size[0] * picture.size[1]) for picture in pictures]),
        "height / width": torch.tensor([picture.size[0] / picture.size[1] for picture in pictures]),
        "brightness (0 to 255)": torch.tensor([float(picture.small.mean()) for picture in pictures]),
    }
    for name, values in numbers.items():
        groups += _quarters(name, values)
    groups = [(name, chosen) for name, chosen in groups if int(chosen.sum()) >= LEAST_IMAGES]
    everything = _slice("all images", is_wrong, torch.ones_like(is_wrong), 1)
    slices = [_slice(name, is_wrong, chosen, len(groups)) for name, chosen in groups]
    weak = [each for each in slices if each.high < everything.accuracy]
    return sorted(weak, key=lambda each: each.accuracy), everything


def _slice(name: str, is_wrong: Tensor, chosen: Tensor, choices: int) -> Slice:
    count, errors = int(chosen.sum()), int((is_wrong & chosen).sum())
    return Slice(name, count, errors, *interval_of(1 - errors / max(1, count), max(1, count), choices))


def _quarters(name: str, values: Tensor) -> list[tuple[str, Tensor]]:
    """Return the images between quartiles of a number, fewer parts if many images have the same number."""
    edges = values.quantile(torch.linspace(0, 1, PARTS + 1)).unique()
    return [
        (f"{name} from {low:,.4g} to {high:,.4g}", (values >= low) & ((values < high) | (high == edges[-1])))
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
