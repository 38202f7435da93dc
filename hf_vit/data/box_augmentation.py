"""Augmentation that moves boxes with pixels: a random window of the image, and a flip.

The window may be larger than the image, so that objects become smaller, too (scale jitter as in arXiv:2012.07177,
within a smaller range). Objects of which little remains in the window are removed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF

from ..model.image_geometry_hf_vit import corners_of

LARGEST_WINDOW = 1.25  # side of the window, relative to that of the image
MOST_SQUEEZED = 1.25  # ratio of the sides of the window, relative to that of the image
LEAST_VISIBLE = 0.3  # share of the area of a box, below which it is removed


class BoxedAugmentation:
    """Augment an image uint8 `[C, H, W]` and its objects `[N, 5]`: class, and centre, width and height of the box.

    All random numbers come from torch's default generator.

    Args:
        size: (height, width) of the output.
        smallest_crop: Smallest area of the window, relative to that of the image; `None` for the whole image, and no
            flip.
        fill: Value per channel, or one for all, of what lies outside of the image.
        recolor: What else is done to the pixels.
    """

    def __init__(
        self,
        size: tuple[int, int],
        smallest_crop: float | None,
        fill: Sequence[int],
        recolor: Callable[[Tensor], Tensor],
    ) -> None:
        self.size, self.smallest_crop, self.fill, self.recolor = size, smallest_crop, list(fill), recolor

    def __call__(self, example: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        pixels, objects = example
        if self.smallest_crop is None:
            return self.recolor(tvF.resize(pixels, list(self.size), antialias=True)), objects
        top, left, height, width = self._window(pixels.shape[-2], pixels.shape[-1])
        window = cut_out(pixels, top, left, height, width, self.fill)
        window = tvF.resize(window, list(self.size), antialias=True)
        sides = torch.tensor([pixels.shape[-1], pixels.shape[-2]] * 2)
        corners = corners_of(objects[:, 1:]) * sides - torch.tensor([left, top] * 2)
        corners = corners / torch.tensor([width, height] * 2)
        if torch.rand(()) < 0.5:
            window = window.flip(-1)
            corners = torch.stack([1 - corners[:, 2], corners[:, 1], 1 - corners[:, 0], corners[:, 3]], dim=1)
        return self.recolor(window), visible(objects[:, 0], corners)

    def _window(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return top, left, height and width of a random window of an image, in pixels."""
        assert self.smallest_crop is not None
        zoom, squeeze, down, right = torch.rand(4).tolist()
        smallest = self.smallest_crop**0.5
        side = smallest * (LARGEST_WINDOW / smallest) ** zoom  # zooms of the same factor are equally likely
        ratio = MOST_SQUEEZED ** (squeeze - 0.5)
        rows, columns = max(1, round(side * height * ratio)), max(1, round(side * width / ratio))
        # A window of a larger side contains the image along it.
        return round(down * (height - rows)), round(right * (width - columns)), rows, columns


def cut_out(pixels: Tensor, top: int, left: int, height: int, width: int, fill: Sequence[int]) -> Tensor:
    """Return a window of an image `[C, H, W]`, with a fill outside of the image."""
    outside = [max(0, -left), max(0, -top), max(0, left + width - pixels.shape[-1])]
    outside.append(max(0, top + height - pixels.shape[-2]))
    inner = pixels[:, max(0, top) : top + height, max(0, left) : left + width]
    return tvF.pad(inner, outside, fill=list(fill)) if any(outside) else inner


def visible(classes: Tensor, corners: Tensor) -> Tensor:
    """Return objects with boxes clipped to the image, without objects of which less than a share remains."""
    clipped = corners.clamp(0, 1)
    sizes, whole = clipped[:, 2:] - clipped[:, :2], corners[:, 2:] - corners[:, :2]
    is_kept = sizes.prod(dim=1) >= LEAST_VISIBLE * whole.prod(dim=1)
    rows = torch.cat([classes[:, None], (clipped[:, :2] + clipped[:, 2:]) / 2, sizes], dim=1)
    return rows[is_kept]
