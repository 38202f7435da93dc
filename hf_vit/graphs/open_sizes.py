"""Position embeddings that are resampled inside a graph, for any image size.

They use only operations that all runtimes agree on. Resize is not one: versions of exporters and runtimes differ in
antialiasing and in Keys' coefficient, and some runtimes have no cosine of doubles.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..model.configuration_hf_vit import POSITION_INTERPOLATIONS, HFViTConfig
from ..model.dense_hf_vit import HFViTBackbone
from ..model.detection_hf_vit import HFViTForObjectDetection
from ..model.modeling_hf_vit import HFViTForImageClassification, HFViTModel
from ..model.positions_hf_vit import HFViTPositionTable, HFViTSinCos2DPositions
from ..model.segmentation_hf_vit import HFViTForSemanticSegmentation
from ..model.validation_hf_vit import GEOMETRIC_SPLINES

Model = (
    HFViTForImageClassification | HFViTForSemanticSegmentation | HFViTForObjectDetection | HFViTModel | HFViTBackbone
)

KEYS = {True: -0.5, False: -0.75}  # coefficient of torch's bicubic kernel with and without antialiasing


def resampling_weights(
    old: int,
    new: int,
    mode: str,
    antialias: bool = False,
    align_corners: bool = False,
    offset: float | Tensor = 0.0,
) -> Tensor:
    """Return the matrix `[new, old]` that resamples one dimension as `torch.nn.functional.interpolate` does.

    `new` may be symbolic. The arguments are those of `POSITION_INTERPOLATIONS`.
    """
    points = torch.arange(new).float()  # [new]; older versions of TensorRT have no range of floats
    number = as_tensor(new)
    corners = points * (old - 1) / (number - 1).clamp(min=1)
    centers = corners if align_corners else (points + 0.5) * old / (number + offset) - 0.5
    taps = torch.arange(-2, old + 2)
    distances = (centers.unsqueeze(1) - taps).abs()  # [new, old + 4]
    if antialias:
        weights = kernel(distances * number.clamp(max=old) / old, mode, antialias)[:, 2:-2]
        return weights / weights.sum(dim=1, keepdim=True)
    outside_in = nn.functional.one_hot(taps.clamp(0, old - 1), old).float()  # the border is repeated
    return (outside_in.T @ kernel(distances, mode, antialias).T).T


def as_tensor(size: int) -> Tensor:
    """Return a symbolic size as a float tensor `[1]`: not every runtime can compute with symbolic sizes."""
    return torch.arange(size)[-1:].float() + 1


def kernel(distances: Tensor, mode: str, antialias: bool) -> Tensor:
    """Return the weights of points at these distances: Keys' cubic convolution, or a triangle."""
    if mode == "bilinear":
        return (1 - distances).clamp(min=0)
    a = KEYS[antialias]
    near = ((a + 2) * distances - (a + 3)) * distances * distances + 1
    far = ((distances - 5) * distances + 8) * distances * a - 4 * a
    return torch.where(distances <= 1, near, torch.where(distances < 2, far, torch.zeros_like(far)))


class OpenPositionTable(HFViTPositionTable):
    """The same table, resampled to a symbolic grid by matrix products."""

    def forward(self, grid: tuple[int, int]) -> Tensor:
        table = self.weight.permute(0, 3, 1, 2)  # [K, D, rows, columns]
        dtype = table.dtype
        table = table if dtype == torch.float32 else table.float()
        how = dict(POSITION_INTERPOLATIONS[self.interpolation])
        if "offset" in how:  # the table's own grid is not resampled
            is_other = (as_tensor(grid[0]) != table.shape[2]) | (as_tensor(grid[1]) != table.shape[3])
            how["offset"] = how["offset"] * is_other.float()
        # All constants are left factors: int8 quantizes constant right factors as weights.
        if table.shape[3] > 1:
            table = table @ resampling_weights(table.shape[3], grid[1], **how).T
        if table.shape[2] > 1:
            table = resampling_weights(table.shape[2], grid[0], **how) @ table
        table = table.permute(0, 2, 3, 1)
        return table if dtype == torch.float32 else table.to(dtype)


class OpenSinCos2DPositions(HFViTSinCos2DPositions):
    """The same angles in float32, with an error of about 1e-6, since some runtimes have no sine of doubles."""

    ANGLES = torch.float32


OPEN: dict[type[nn.Module], type[nn.Module]] = {
    HFViTPositionTable: OpenPositionTable,
    HFViTSinCos2DPositions: OpenSinCos2DPositions,
}


@contextmanager
def opened(model: Model) -> Iterator[None]:
    """Replace the position embeddings of a model by those for dynamic sizes, temporarily."""
    changed = [(module, type(module)) for module in model.modules() if type(module) in OPEN]
    for module, kind in changed:
        module.__class__ = OPEN[kind]
    try:
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind


def fixed_size(config: HFViTConfig) -> str | None:
    """Return why a graph of this model has a fixed image size; `None` if the size is dynamic."""
    height, width = config.image_shape
    if config.stem_layers is not None:
        return f"The padding of the ResNet stem depends on the image size: the graph accepts {height}x{width} only."
    if config.position_interpolation in GEOMETRIC_SPLINES:
        return (
            f"The spline of the relative positions ({config.position_interpolation}) depends on the image size: the "
            f"graph accepts {height}x{width} only."
        )
    if min(config.grid_size) < 2:
        return f"The model's grid is one patch wide or high: the graph accepts {height}x{width} only."
    return None
