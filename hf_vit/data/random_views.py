"""Random views of a batch of normalized images: crops, flips, and changes of brightness, contrast and saturation.

The random numbers are arguments, one row per image, so that the views of an image can follow from a seed of its own.
Images may have any number of channels: saturation scales the difference of each channel from the mean over channels.
Strengths are in units of normalized pixel values.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RATIO = 4 / 3  # largest change of the aspect ratio by a crop, as in RandomResizedCrop
JITTERED, GRAY = 0.8, 0.2  # probabilities of jitter, and of a gray view
NUMBERS = 9  # random numbers per view


@dataclass(frozen=True)
class Crops:
    """Size and areas of one kind of view.

    Attributes:
        size: (height, width) in pixels, to which crops are resampled.
        areas: Smallest and largest share of the image's area.
    """

    size: tuple[int, int]
    areas: tuple[float, float]


def views_of(pixel_values: Tensor, draws: Tensor, crops: Crops, jitter: float) -> Tensor:
    """Return one view of every image, `[B, C, *crops.size]`.

    Args:
        pixel_values: Normalized images, `[B, C, H, W]`.
        draws: Random numbers in [0, 1), `[B, NUMBERS]`.
        crops: The kind of view.
        jitter: Strength of changes of brightness, contrast and saturation; with 0, no image is made gray either.
    """
    area, aspect, across, down, flip, *colors = draws.to(pixel_values.dtype).unbind(1)  # [B] each
    low, high = crops.areas
    share, ratio = low + (high - low) * area, RATIO ** (2 * aspect - 1)
    width, height = (share * ratio).sqrt().clamp(max=1), (share / ratio).sqrt().clamp(max=1)
    # Matrices from a point of the view to its source, both from -1 to 1.
    zero, sign = torch.zeros_like(width), torch.where(flip < 0.5, -1.0, 1.0).to(width)
    x, y = (1 - width) * (2 * across - 1), (1 - height) * (2 * down - 1)
    matrices = torch.stack([width * sign, zero, x, zero, height, y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, [len(draws), pixel_values.shape[1], *crops.size], align_corners=False)
    views = F.grid_sample(pixel_values, grid, padding_mode="reflection", align_corners=False)
    return _jittered(views, [color.view(-1, 1, 1, 1) for color in colors], jitter) if jitter else views


def _jittered(images: Tensor, draws: list[Tensor], strength: float) -> Tensor:
    """Change brightness, contrast and saturation of some images `[B, C, H, W]`, and make some gray."""
    brightness, contrast, saturation, gray = draws
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    is_changed = brightness < JITTERED
    changed = mean + (images - mean) * (1 + strength * (2 * contrast - 1))
    changed = changed + strength * (2 * brightness / JITTERED - 1)
    tone = changed.mean(dim=1, keepdim=True)
    changed = tone + (changed - tone) * (1 + strength * (2 * saturation - 1))
    images = torch.where(is_changed, changed, images)
    return torch.where(gray < GRAY, images.mean(dim=1, keepdim=True).expand_as(images), images)
