"""Near duplicates: images that were encoded again, resized, mirrored, recoloured or cropped a little.

Each image is reduced to a thumbnail of gray values. Candidates are the thumbnails with the highest correlation at a
quarter of the pixels, mirrored or not. A candidate is aligned by a scale and a shift per axis with Gauss-Newton steps
(Lucas and Kanade 1981; Baker and Matthews 2004), and compared by the correlation of its gradients: those of smooth
images, such as two skies, differ where their gray values do not. model_cards/audit states what is found.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..model.image_conversion_hf_vit import convert_to_rgb, pil_of_tensor, to_8_bit, values_of_file
from .neighbors import nearest

SIDE, COARSE = 32, 16  # pixels of a thumbnail, and of one that candidates are found with
NEAR = 0.9  # correlation of gradients from which two images are near duplicates
CANDIDATES = 5  # per image and orientation
LEAST_CORRELATION = 0.5  # of the gray values of candidates
PROMISING = 0.5  # correlation of gradients after a coarse alignment, from which it is refined
LEAST_CONTRAST = 2.0  # standard deviation of gray values, of 255, below which an image shows nothing to compare
LEAST_OVERLAP = 0.75  # of the thumbnails after alignment
STEPS, LARGEST_STEP, LARGEST_CHANGE = 8, 0.1, 0.25  # of the alignment; 2 is the side of an image
PAIRS = 2048  # that are aligned at once


class Near(NamedTuple):
    """Two near duplicates: their positions, the correlation of their gradients, and whether one mirrors the other."""

    first: int
    second: int
    similarity: float
    is_mirrored: bool


def small_picture(image: Image.Image | Tensor) -> np.ndarray:
    """Return a decoded image as uint8 `[SIDE, SIDE, 3]`, upright; more than 3 channels become their mean."""
    if isinstance(image, Tensor):
        pixels = to_8_bit(values_of_file(image))
        if len(pixels) not in (1, 3):
            pixels = pixels.float().mean(dim=0, keepdim=True).to(torch.uint8)
        image = pil_of_tensor(pixels)
    return np.asarray(convert_to_rgb(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0))


def gray_values(pictures: Sequence[np.ndarray]) -> Tensor:
    """Return thumbnails as float32 `[N, SIDE, SIDE]` from the results of `small_picture`."""
    if not len(pictures):
        return torch.zeros(0, SIDE, SIDE)
    return torch.from_numpy(np.stack(pictures)).float() @ torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601


def near_duplicates(thumbnails: Tensor, others: Tensor | None = None) -> list[Near]:
    """Find near duplicates of thumbnails among themselves, or among others.

    An image is compared with its `CANDIDATES` most similar ones, mirrored or not. Images with less than
    `LEAST_CONTRAST` are left out.

    Args:
        thumbnails, others: Results of `gray_values`.

    Returns:
        Pairs, the most similar first. Without `others`, `first < second`; otherwise `first` is of `thumbnails` and
        `second` of `others`.
    """
    bank = thumbnails if others is None else others
    found: dict[tuple[int, int], Near] = {}
    for is_mirrored in (False, True):
        queries = thumbnails.flip(-1) if is_mirrored else thumbnails
        for pairs in _parts(_candidates(queries, bank, others is None)):
            similarity = aligned_similarity(queries[pairs[:, 0]], bank[pairs[:, 1]])
            for (first, second), value in zip(pairs.tolist(), similarity.tolist(), strict=True):
                key = (first, second) if others is not None else (min(first, second), max(first, second))
                if value >= NEAR and (key not in found or value > found[key].similarity):
                    found[key] = Near(*key, value, is_mirrored)
    return sorted(found.values(), key=lambda pair: (-pair.similarity, pair))


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(PAIRS) if len(rows) else ()


def _candidates(queries: Tensor, bank: Tensor, is_same: bool) -> Tensor:
    """Return positions of similar thumbnails, `[P, 2]`."""
    shown, compared = _with_contrast(queries), _with_contrast(bank)
    if not len(shown) or not len(compared):
        return torch.zeros(0, 2, dtype=torch.int64)
    similarity, found = nearest(_coarse(queries[shown]), _coarse(bank[compared]), CANDIDATES + is_same)
    first, second = shown[:, None].expand_as(found), compared[found]
    is_wanted = similarity >= LEAST_CORRELATION
    if is_same:
        is_wanted &= first != second
    return torch.stack([first[is_wanted], second[is_wanted]], dim=1)


def _with_contrast(thumbnails: Tensor) -> Tensor:
    values = thumbnails.flatten(1)
    variance = values.square().mean(dim=1) - values.mean(dim=1).square()
    return (variance >= LEAST_CONTRAST**2).nonzero().flatten()


def _coarse(thumbnails: Tensor) -> Tensor:
    """Return unit vectors whose products are correlations of gray values, `[N, COARSE * COARSE]`."""
    small = F.adaptive_avg_pool2d(thumbnails[:, None], COARSE).flatten(1)
    return F.normalize(small - small.mean(dim=1, keepdim=True), dim=1)


def aligned_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return the correlation of the gradients of thumbnails `[P, SIDE, SIDE]` after alignment, `[P]`."""
    change = torch.zeros(len(first), 4)  # scale - 1 and shift in x, and the same in y
    small, others = (F.adaptive_avg_pool2d(each[:, None], COARSE)[:, 0] for each in (first, second))
    change, similarity = _align(small, others, change)
    promising = (similarity >= PROMISING).nonzero().flatten()
    for chosen in _parts(promising):
        similarity[chosen] = _align(first[chosen], second[chosen], change[chosen])[1]
    return similarity


def _align(first: Tensor, second: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Return the change of coordinates at which `second` correlates best with `first`, and that of the gradients."""
    side = first.shape[-1]
    places = (torch.arange(side) + 0.5) / side * 2 - 1
    grid_y, grid_x = torch.meshgrid(places, places, indexing="ij")
    first, second = _with_gradients(first), _with_gradients(second)
    best = torch.full((len(first),), -1.0)
    best_change, best_gradients = change, best.clone()
    for step in range(STEPS + 1):
        x, y = (
            grid * (1 + scale[:, None, None]) + shift[:, None, None]
            for grid, (scale, shift) in ((grid_x, change[:, :2].T), (grid_y, change[:, 2:].T))
        )
        moved = F.grid_sample(second, torch.stack([x, y], dim=-1), padding_mode="border", align_corners=False)
        inside = ((x.abs() <= 1) & (y.abs() <= 1)).float()
        area = inside.sum(dim=(1, 2), keepdim=True).clamp(min=1)
        values, others = (_centered(each[:, 0], inside, area) for each in (first, moved))
        correlation = _cosine(values, others)
        is_better = (correlation > best) & (area.flatten() >= LEAST_OVERLAP * side**2)
        gradients = _cosine(first[:, 1:] * inside[:, None], moved[:, 1:] * inside[:, None])
        best, best_gradients = torch.where(is_better, correlation, best), gradients.where(is_better, best_gradients)
        best_change = change.where(is_better[:, None], best_change)
        if step == STEPS:
            break
        gain = (values * others).sum(dim=(1, 2), keepdim=True) / others.square().sum(dim=(1, 2), keepdim=True).clamp(
            min=1e-6
        )
        slopes = torch.stack([moved[:, 1] * grid_x, moved[:, 1], moved[:, 2] * grid_y, moved[:, 2]], dim=1)
        slopes = (_centered(slopes, inside[:, None], area[:, None]) * gain[:, None]).flatten(2)  # [P, 4, side * side]
        system = slopes @ slopes.transpose(1, 2) + 1e-2 * side * torch.eye(4)
        update = torch.linalg.solve(system, slopes @ (values - gain * others).flatten(1)[..., None])[..., 0]
        change = (change + update.clamp(-LARGEST_STEP, LARGEST_STEP)).clamp(-LARGEST_CHANGE, LARGEST_CHANGE)
    return best_change, best_gradients


def _with_gradients(thumbnails: Tensor) -> Tensor:
    """Return standardized values and their derivatives by x and y, in units of half an image, `[P, 3, side, side]`."""
    std, mean = torch.std_mean(thumbnails, dim=(1, 2), keepdim=True)
    values = ((thumbnails - mean) / std.clamp(min=1e-3))[:, None]
    padded = F.pad(values, (1, 1, 1, 1), mode="replicate")
    factor = thumbnails.shape[-1] / 4
    by_x = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) * factor
    by_y = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) * factor
    return torch.cat([values, by_x, by_y], dim=1)


def _centered(values: Tensor, inside: Tensor, area: Tensor) -> Tensor:
    return (values - (values * inside).sum(dim=(-2, -1), keepdim=True) / area) * inside


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return F.cosine_similarity(first.flatten(1), second.flatten(1), dim=1)


def groups_of(pairs: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Yield the positions that pairs connect, directly or through others, each group in order."""
    parent: dict[int, int] = {}

    def root(index: int) -> int:
        while parent.setdefault(index, index) != index:
            index = parent[index]
        return index

    for first, second in pairs:
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    members: dict[int, list[int]] = {}
    for index in sorted(parent):
        members.setdefault(root(index), []).append(index)
    yield from members.values()
