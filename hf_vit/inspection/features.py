"""Features of patches as colours, and norms of tokens.

Features as colours: Oquab et al., "DINOv2" (arXiv:2304.07193), figure 1. Norms: Darcet et al., "Vision Transformers
Need Registers" (arXiv:2309.16588), who found background patches with far larger norms than all others.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .drawing import BLUE, INK, ORANGE, SERIES, Figure, bare, heading, new_figure, whole_numbers
from .filters import principal_components
from .layers import at_layer, grid_of, layer_numbers, walk

SPREAD = (0.02, 0.98)  # quantiles that map to 0 and 1, so that a few extreme patches do not dim all others


@torch.no_grad()
def feature_components(model: Any, pixel_values: Tensor, layer: int | None = None, components: int = 3) -> np.ndarray:
    """Return the first principal components of patches over all images, in 0 to 1: `[B, h, w, components]`.

    Three components can be drawn as colours: patches of the same colour have similar features in all images.

    Args:
        model: Any model class of this package.
        pixel_values: `[B, C, H, W]`, of any size that is a multiple of the patch.
        layer: Number of the layer from 1, or negative from the end; by default the output of the final LayerNorm.
        components: Number of components, at most the width of the model.

    Raises:
        ValueError: If there is no such layer, or too many components.
    """
    width = model.config.hidden_size
    if not 1 <= components <= width:
        raise ValueError(f"Expected 1 to {width} components, the width of the model, got {components}.")
    tokens = at_layer(model, pixel_values, -1 if layer is None else layer).tokens
    if layer is None:
        tokens = model.base_model.layernorm(tokens)
    patches = tokens[:, model.config.num_prefix_tokens :].cpu().double()  # [B, N, D]
    rows = patches.flatten(0, 1)
    directions, _ = principal_components(rows, components)
    projected = (rows - rows.mean(dim=0)) @ directions.T  # [B*N, components]
    low, high = projected.quantile(torch.tensor(SPREAD, dtype=rows.dtype), dim=0)
    spread = (high - low).clamp(min=1e-9)
    scaled = ((projected - (low + high) / 2) / spread + 0.5).clamp(0, 1)
    return scaled.unflatten(0, (len(patches), *grid_of(model, pixel_values))).float().numpy()


@torch.no_grad()
def token_norms(
    model: Any, pixel_values: Tensor, layers: Iterable[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the L2 norms of the output tokens of layers, before any final LayerNorm.

    Args:
        model: Any model class of this package.
        pixel_values: `[B, C, H, W]`, of any size that is a multiple of the patch.
        layers: Numbers from 1, negative from the end; by default all. They are returned in the order of the model.

    Returns:
        Norms of patches `[layers, B, h, w]`, and of the tokens before them `[layers, B, P]`: class token, distillation
        token, registers.

    Raises:
        ValueError: If there is no such layer.
    """
    numbers, prefix = layer_numbers(model, layers), model.config.num_prefix_tokens
    steps = walk(model, pixel_values, numbers[-1])
    norms = torch.stack([step.tokens.float().norm(dim=-1) for step in steps if step.number in numbers])  # [L, B, T]
    patches = norms[..., prefix:].unflatten(-1, grid_of(model, pixel_values))
    return patches.cpu().numpy(), norms[..., :prefix].cpu().numpy()


def outlier_norm(norms: np.ndarray) -> float:
    """Return the norm above which a patch is an outlier: 3 interquartile ranges above the third quartile.

    This is the outer fence of Tukey, "Exploratory Data Analysis" (1977). Darcet et al. choose a threshold for one
    model from its histogram; the fence applies to all models.

    Args:
        norms: Norms of the patches of one layer, of any shape.
    """
    first, third = np.quantile(norms, (0.25, 0.75))
    return float(third + 3 * (third - first))


def plot_token_norms(
    patches: np.ndarray, prefix: np.ndarray, layer: int = -1, title: str = "Norms of tokens"
) -> Figure:
    """Draw a histogram of patch norms in one layer with the share of outliers, and norms by layer.

    Args:
        patches, prefix: Results of `token_norms` for all layers.
        layer: Layer of the histogram, number from 1, or negative from the end.
    """
    layers = len(patches)
    number = layer if layer > 0 else layers + 1 + layer
    norms = patches.reshape(layers, -1)
    fence = outlier_norm(norms[number - 1])
    share = float((norms[number - 1] > fence).mean())

    figure = new_figure(9.5, 4.2)
    left, right = figure.subplots(1, 2)
    bare(left)
    low, high = float(norms[number - 1].min()), float(max(norms[number - 1].max(), fence))
    bins = np.linspace(low, high, 49) if high - low > 1e-6 * max(high, 1e-30) else 12
    left.hist(norms[number - 1], bins=bins, color=BLUE, log=True)
    left.axvline(fence, color=ORANGE, lw=1.4, ls=(0, (4, 3)))
    left.yaxis.set_major_formatter("{x:,.0f}")
    left.yaxis.set_minor_formatter("")
    left.set(xlabel=f"norm of patch tokens after layer {number}", ylabel="patches", ylim=(0.7, None))
    left.set_title(f"outliers, right of the line: {share:.2%} of patches", fontsize=9, color=INK, loc="left")

    bare(right)
    numbers = np.arange(1, layers + 1)
    lowest, low_band, middle, high_band, highest = np.quantile(norms, (0, 0.05, 0.5, 0.95, 1), axis=1)
    marker = "o" if layers < 30 else None
    right.fill_between(numbers, low_band, high_band, color=BLUE, alpha=0.2, lw=0, label="patches, 5 to 95 %")
    right.plot(numbers, middle, color=BLUE, marker=marker, ms=3.5, label="patches, median")
    right.plot(numbers, highest, color=ORANGE, marker="^" if marker else None, ms=3.5, lw=1, label="largest patch")
    if prefix.shape[2]:
        of_prefix = np.median(prefix.reshape(layers, -1), axis=1)
        right.plot(
            numbers, of_prefix, color=SERIES[2], marker="s" if marker else None, ms=3.5, lw=1,
            label="tokens before the patches, median",
        )  # fmt: skip
    right.set(xlabel="layer", ylabel="norm of tokens", xlim=(0.5, layers + 0.5))
    if lowest.min() > 0 and highest.max() / lowest.min() > 30:
        right.set_yscale("log")
    else:
        right.set_ylim(0, None)
    whole_numbers(right)
    right.legend(frameon=False, fontsize=8)
    return heading(figure, title)
