"""Segmentation of large images with sliding windows of the size that a model was trained at.

Overlapping windows cover the image, and the logits of a pixel are the mean over its windows, as in mmsegmentation
(open-mmlab/mmsegmentation, `EncoderDecoder.slide_inference`). Here, means are computed at the resolution of the logits
instead of the pixels, which needs 16 times less memory for a model with a prediction for every 4x4 pixels.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import SemanticSegmenterOutput

from ..model.segmentation_hf_vit import HFViTForSemanticSegmentation

WINDOWS_AT_ONCE = 8  # per image of a batch, which bounds the memory

Size = tuple[int, int]  # (height, width), pixels


def sliding_window_logits(
    forward: Callable[..., Any], pixel_values: Tensor, window: Size, stride: Size, patch: Size = (1, 1)
) -> Tensor:
    """Return the mean logits of overlapping windows, float32 `[B, num_labels, h, w]` for the whole images.

    The last window along a side ends at the border, so it may overlap more than others.

    Args:
        forward: Maps `pixel_values` to outputs with `logits`, such as a model for segmentation.
        pixel_values: `[B, C, H, W]`. A side that is shorter than the window has one window of its own length.
        window, stride: Size of the windows, and the steps between them.
        patch: All sizes must be multiples of it, so that the logits of different windows are on one grid.

    Raises:
        ValueError: If a size is not a multiple of the patch, or the stride leaves gaps.
    """
    size = (pixel_values.shape[2], pixel_values.shape[3])
    for name, sides in (("image", size), ("window", window), ("stride", stride)):
        if any(side < 1 or side % step for side, step in zip(sides, patch, strict=True)):
            raise ValueError(f"Expected {name} sizes in multiples of the patch {patch}, got {tuple(sides)}.")
    if any(step > side for step, side in zip(stride, window, strict=True)):
        raise ValueError(f"Expected a stride of at most the window {tuple(window)}, got {tuple(stride)}.")
    height, width = (min(pair) for pair in zip(size, window, strict=True))
    corners = list(product(_starts(size[0], height, stride[0]), _starts(size[1], width, stride[1])))
    total = visits = torch.empty(0)
    for first in range(0, len(corners), WINDOWS_AT_ONCE):
        group = corners[first : first + WINDOWS_AT_ONCE]
        crops = [pixel_values[..., top : top + height, left : left + width] for top, left in group]
        logits = forward(pixel_values=torch.cat(crops)).logits.float()
        rows, columns = logits.shape[-2:]
        if not len(total):
            whole = size[0] * rows // height, size[1] * columns // width
            total = logits.new_zeros(len(pixel_values), logits.shape[1], *whole)
            visits = logits.new_zeros(whole)
        for (top, left), part in zip(group, logits.split(len(pixel_values)), strict=True):
            top, left = top * rows // height, left * columns // width
            total[..., top : top + rows, left : left + columns] += part
            visits[top : top + rows, left : left + columns] += 1
    return total / visits


def _starts(size: int, window: int, stride: int) -> Iterator[int]:
    """Yield where windows start along a side: every stride, and the last one at the end."""
    yield from range(0, size - window, stride)
    yield size - window


class WindowedSegmenter(HFViTForSemanticSegmentation):
    """A model for segmentation that slides windows of its own image size over images of any size; made by `slide`.

    Images are enlarged to whole patches, so that the logits cover the image exactly. Windows overlap by a third, as in
    the configurations of mmsegmentation.
    """

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> SemanticSegmenterOutput:
        """Return `logits` `[B, num_labels, h, w]` of the whole images.

        Args:
            pixel_values: `[B, C, H, W]`.
            kwargs: As for `HFViTModel`.
        """
        window, patch = self.config.image_shape, self.config.patch_shape
        down, across = (max(1, 2 * side // step // 3) * step for side, step in zip(window, patch, strict=True))
        size = [-(-side // step) * step for side, step in zip(pixel_values.shape[-2:], patch, strict=True)]
        if size != list(pixel_values.shape[-2:]):
            pixel_values = F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)

        def forward(pixel_values: Tensor) -> Any:
            return HFViTForSemanticSegmentation.forward(self, pixel_values, **kwargs)

        return SemanticSegmenterOutput(
            logits=sliding_window_logits(forward, pixel_values, window, (down, across), patch)
        )


def slide(model: Any, processor: Any, image_size: Size | None = None) -> None:
    """Change a model for segmentation and its image processor, so that windows slide over whole images.

    Args:
        model, processor: As `load` returns them; the size of the windows is the model's image size.
        image_size: (height, width) in pixels to which images are resized; by default they keep their sizes.

    Raises:
        ValueError: If the model is not one for segmentation.
    """
    if not isinstance(model, HFViTForSemanticSegmentation):
        raise ValueError(
            f"Sliding windows need a model for segmentation, got {type(model).__name__}: remove --windows."
        )
    model.__class__ = WindowedSegmenter
    if image_size is None:
        processor.do_resize = False
    else:
        processor.set_output_size(image_size)
