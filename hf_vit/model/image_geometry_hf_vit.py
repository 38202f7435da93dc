"""Sizes, crops and patches of images, and boxes in them. Sizes are (height, width)."""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import SizeDict

MAX_ASPECT = 64  # longest side / shortest side of an image before resizing for a square crop


def size_of(image: Image.Image | Tensor) -> tuple[int, int]:
    """Return (height, width); the last two dimensions of a tensor."""
    return (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[-2], image.shape[-1])


def covering_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest size with the aspect ratio of `size` that covers `target`.

    Rounding follows the original code: torchvision's `Resize` to a shorter side truncates, and timm's
    `ResizeKeepRatio` for rectangular targets rounds.
    """
    if target[0] == target[1]:
        return int(target[0] * size[0] / min(size)), int(target[0] * size[1] / min(size))
    ratio = min(size[0] / target[0], size[1] / target[1])
    return round(size[0] / ratio), round(size[1] / ratio)


def resized_size(old: tuple[int, int], size: SizeDict, crop_pct: float | None) -> tuple[int, int]:
    """Return the size that an image of size `old` is resized to."""
    if size.height and size.width:
        if crop_pct is None:
            return size.height, size.width
        return covering_size(old, (math.floor(size.height / crop_pct), math.floor(size.width / crop_pct)))
    if size.shortest_edge and size.longest_edge:
        return get_size_with_aspect_ratio(old, size.shortest_edge, size.longest_edge)
    if size.shortest_edge:
        return covering_size(old, (size.shortest_edge, size.shortest_edge))
    raise ValueError(f"Expected size with height and width or with shortest_edge, got {dict(size)}.")


def center_crop(image: Image.Image | Tensor, size: SizeDict, rounding: Callable[[float], int]) -> Image.Image | Tensor:
    """Crop `size` from the center; pixels outside of the image are black."""
    if not (size.height and size.width):
        raise ValueError(f"Expected crop_size with height and width, got {dict(size)}.")
    height, width = size_of(image)
    top, left = rounding((height - size.height) / 2), rounding((width - size.width) / 2)
    bottom, right = top + size.height, left + size.width
    if isinstance(image, Image.Image):
        return image.crop((left, top, right, bottom))
    return F.pad(image, (-left, right - width, -top, bottom - height))


def trim_long_side(image: Image.Image | Tensor, crop: SizeDict) -> Image.Image | Tensor:
    """Trim the ends of a very long image that a center crop would discard: resizing 1x20000 takes gigabytes."""
    sides = cast(int, crop.height), cast(int, crop.width)
    height, width = size_of(image)
    longest = math.ceil(MAX_ASPECT * max(sides) / min(sides) * min(height, width))
    if max(height, width) <= longest:
        return image
    return center_crop(image, SizeDict(height=min(height, longest), width=min(width, longest)), rounding=int)


def checked_patch_size(packing: int, patch_size: int | Sequence[int] | None) -> tuple[int, int]:
    """Return `patch_size` as (height, width) in pixels; 16 for `None`."""
    patch_size = 16 if patch_size is None else patch_size
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    if min(packing, height, width) < 1:
        raise ValueError(
            "Expected packing, the maximum number of patches per image, and patch_size in pixels of at least 1, got "
            f"{packing} and {(height, width)}: a square of 224 pixels has 196 patches of 16."
        )
    return height, width


def packed_grid(size: tuple[int, int], patch_size: tuple[int, int], packing: int) -> tuple[int, int]:
    """Return the (rows, columns) of patches that an image of `size` has in a pack.

    The image keeps its size, rounded up to whole patches, if these are at most `packing`. Otherwise it is downscaled
    as little as possible at the same aspect ratio, with each side rounded to the nearest whole patch.
    """
    own = (-(-size[0] // patch_size[0]), -(-size[1] // patch_size[1]))
    if math.prod(own) <= packing:
        return own

    def patches_along(other: int, number: int, side: int) -> int:
        """Return the number of patches along `other` for an image with `number` + 0.5 patches along `side`."""
        return max(1, -((side - (2 * number + 1) * other) // (2 * side)))

    # As an image grows, its grid changes when one of its sides reaches `number` + 0.5 patches.
    rows, columns = (max(1, (2 * side + patch) // (2 * patch)) for side, patch in zip(size, patch_size, strict=True))
    height, width = size[0] * patch_size[1], size[1] * patch_size[0]  # the aspect ratio in patches
    grids = [(rows, columns)]
    grids += [(number, patches_along(width, number, height)) for number in range(1, min(rows, packing + 1))]
    grids += [(patches_along(height, number, width), number) for number in range(1, min(columns, packing + 1))]
    return max((grid for grid in grids if math.prod(grid) <= packing), key=math.prod)


def packed_size(size: tuple[int, int], patch_size: tuple[int, int], packing: int) -> tuple[int, int]:
    """Return the size in pixels that an image of `size` has in a pack."""
    rows, columns = packed_grid(size, patch_size, packing)
    return rows * patch_size[0], columns * patch_size[1]


def cut_into_patches(image: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut an image `[C, H, W]` into patches `[rows, C, ph, pw]`, in the order of the model's `patchify`."""
    cut = image.unflatten(2, (-1, patch_size[1])).unflatten(1, (-1, patch_size[0]))  # [C, h, ph, w, pw]
    return cut.permute(1, 3, 0, 2, 4).flatten(0, 1)


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize logits `[B, num_labels, h, w]` to pixels `[B, num_labels, H, W]`, bilinearly in float32."""
    logits = logits.float()
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def corners_of(boxes: Tensor) -> Tensor:
    """Return (left, top, right, bottom) of boxes `[..., 4]` of center, width and height."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)
