"""Splines that resample tables of relative positions, as timm and the authors of BEiT do.

The entries of a table are placed at geometrically growing offsets instead of 0, 1, 2, ..., so that offsets between
near patches keep their biases, and the largest offset of the table is that of the new grid
(github.com/microsoft/unilm, beit/run_class_finetuning.py). A spline is linear in the table, so a matrix computes it.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor


@torch.compiler.assume_constant_result
def geometric_spline(old: int, new: int, degree: int) -> Tensor:
    """Return the matrix `[new, old]`, float64, that resamples one dimension of a table from -old//2..old//2.

    Args:
        old: Number of offsets in the table, odd.
        new: Number of offsets on the new grid, odd.
        degree: 1 for linear interpolation, 3 for the cubic spline without knots next to the ends ("not-a-knot").
            Offsets beyond those of the table get the values of its ends.
    """
    return torch.from_numpy(_matrix(old, new, degree).copy())


@cache
def _matrix(old: int, new: int, degree: int) -> np.ndarray:
    offsets = _offsets(old // 2, new // 2)
    targets = np.clip(np.arange(new) - new // 2, offsets[0], offsets[-1])
    degree = min(degree, old - 1)
    first = (degree + 1) // 2
    inner = offsets[first : first + old - degree - 1]
    knots = np.pad(inner, degree + 1, constant_values=(offsets[0], offsets[-1]))
    return np.linalg.solve(_b_splines(offsets, knots, degree).T, _b_splines(targets, knots, degree).T).T


def _offsets(number: int, largest: int) -> np.ndarray:
    """Return the offsets 0, 1, 1 + q, 1 + q + q^2, ... on both sides of 0, which end at `largest`.

    The ratio q is between 1.01 and 1.5. It is found by the same bisection as in the original code, since its last
    digits matter.
    """
    left, right = 1.01, 1.5
    ratio = left
    while right - left > 1e-6:
        ratio = (left + right) / 2
        if (1 - ratio**number) / (1 - ratio) > largest:
            right = ratio
        else:
            left = ratio
    one_side = np.cumsum(ratio ** np.arange(number))
    return np.concatenate([-one_side[::-1], [0.0], one_side])


def _b_splines(points: np.ndarray, knots: np.ndarray, degree: int) -> np.ndarray:
    """Return the values of all B-splines at points, by the recursion of Cox and de Boor."""
    interval = np.searchsorted(knots, points, side="right") - 1
    interval = np.clip(interval, degree, len(knots) - degree - 2)  # the last one includes its end
    values = np.eye(len(knots) - 1)[interval]
    for order in range(1, degree + 1):
        width = knots[order:] - knots[:-order]
        rise = (points[:, None] - knots[:-order]) / np.where(width > 0, width, 1)
        values = rise[:, :-1] * values[:, :-1] + (1 - rise[:, 1:]) * values[:, 1:]
    return values
