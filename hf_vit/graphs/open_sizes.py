"""Position embeddings that resample inside a graph, for any image size."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..model.configuration_hf_vit import POSITION_INTERPOLATIONS, HFViTConfig
from ..model.modeling_hf_vit import HFViTForImageClassification, HFViTModel
from ..model.positions_hf_vit import HFViTPositionTable, HFViTSinCos2DPositions

Model = HFViTForImageClassification | HFViTModel


# Of a bicubic kernel in torch, with antialiasing and without.
KEYS = {True: -0.5, False: -0.75}


def resampling_weights(old: int, new: int, mode: str, antialias: bool = False, align_corners: bool = False) -> Tensor:
    """Return the matrix `[new, old]` that resamples a line as `torch.nn.functional.interpolate` does.

    `new` may be a symbol. Arguments are those of `interpolate`.
    """
    places = torch.arange(new, dtype=torch.float32)  # [new]
    number = places[-1:] + 1  # as a tensor: a symbol has no minimum everywhere
    corners = places * (old - 1) / (number - 1).clamp(min=1)
    centers = corners if align_corners else (places + 0.5) * old / number - 0.5
    taps = torch.arange(-2, old + 2)
    distances = (centers.unsqueeze(1) - taps).abs()  # [new, old + 4]
    if antialias:
        weights = kernel(distances * number.clamp(max=old) / old, mode, antialias)[:, 2:-2]
        return weights / weights.sum(dim=1, keepdim=True)
    outside_in = nn.functional.one_hot(taps.clamp(0, old - 1), old).float()  # what lies outside is the border's cell
    return (outside_in.T @ kernel(distances, mode, antialias).T).T


def kernel(distances: Tensor, mode: str, antialias: bool) -> Tensor:
    """Return the weights of cells that are so far away: Keys' cubic convolution, or a triangle."""
    if mode == "bilinear":
        return (1 - distances).clamp(min=0)
    a = KEYS[antialias]
    near = ((a + 2) * distances - (a + 3)) * distances * distances + 1
    far = ((distances - 5) * distances + 8) * distances * a - 4 * a
    return torch.where(distances <= 1, near, torch.where(distances < 2, far, torch.zeros_like(far)))


class OpenPositionTable(HFViTPositionTable):
    """The same table, resampled by products of matrices to a grid of symbols."""

    def forward(self, grid: tuple[int, int]) -> Tensor:
        cells = self.weight.permute(0, 3, 1, 2)  # [K, D, rows, columns]
        how = POSITION_INTERPOLATIONS[self.interpolation]
        # The table is a left factor, as all constants here: right ones are what int8 takes for weights.
        if cells.shape[3] > 1:
            cells = cells @ resampling_weights(cells.shape[3], grid[1], **how).T
        if cells.shape[2] > 1:
            cells = resampling_weights(cells.shape[2], grid[0], **how) @ cells
        return cells.permute(0, 2, 3, 1)


class OpenSinCos2DPositions(HFViTSinCos2DPositions):
    """The same angles, in float32: off by some 1e-6, where doubles have no sine."""

    ANGLES = torch.float32


OPEN: dict[type[nn.Module], type[nn.Module]] = {
    HFViTPositionTable: OpenPositionTable,
    HFViTSinCos2DPositions: OpenSinCos2DPositions,
}


@contextmanager
def opened(model: Model) -> Iterator[None]:
    """Let positions of a model be those for open sizes."""
    changed = [(module, type(module)) for module in model.modules() if type(module) in OPEN]
    for module, kind in changed:
        module.__class__ = OPEN[kind]
    try:
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind


def fixed_size(config: HFViTConfig) -> str | None:
    """Say why a graph of this model is for its own size alone; `None` where it takes any."""
    height, width = config.image_shape
    if config.stem_layers is not None:
        return (
            f"The padding of the ResNet stem goes by the size of the image: the graph is for {height}x{width} alone."
        )
    if min(config.grid_size) < 2:
        return f"The model's own grid is one patch wide or high: the graph is for {height}x{width} alone."
    return None
