"""Patch projections at other patch sizes, as FlexiViT has them (Beyer et al. 2023, arXiv:2212.08013)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_patch_projection(weight: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a projection of patches so that tokens of resized patches stay what they were.

    The pseudo-inverse of the patches' bilinear resize, applied to the weights (section 3.4): for patches that grow the
    tokens are equal, for others as near as can be in the least-squares sense.

    Args:
        weight: `[D, C*ph*pw]`, computed in float64, returned in its dtype.
        old: `(height, width)` of its patches in pixels.
        new: `(height, width)` wanted.

    Returns:
        `[D, C*h*w]` of the new patches.
    """
    if new == old:
        return weight
    pixels = torch.eye(old[0] * old[1], dtype=torch.float64).view(-1, 1, *old)
    resize = F.interpolate(pixels, size=new, mode="bilinear").flatten(1).T  # [new pixels, old pixels]
    kernels = weight.double().unflatten(1, (-1, old[0] * old[1]))  # [D, C, old pixels]
    return (kernels @ torch.linalg.pinv(resize)).flatten(1).to(weight.dtype)
