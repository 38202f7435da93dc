"""The Vision Transformer.

Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", ICLR 2021
(arXiv:2010.11929). Equations (1) to (4) of the paper are `HFViTEmbeddings.forward`, the two residual lines of
`HFViTLayer.forward`, and the pooling. The file goes from parts to whole:

    patches -> positions -> attention, MLP, layer -> pooling -> model -> heads

Letters in shapes: B batch, C channels, H W pixels, h w grid, N = h*w patches, P class and register tokens,
T = P + N tokens, D width, A heads, d width of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_hf_vit import POSITION_INTERPOLATIONS, HFViTConfig
from .packing_hf_vit import HFViTPacking, refuse_beside_a_pack, refuse_packs
from .repository_hf_vit import complete_repository, replace_empty_form
from .stem_hf_vit import HFViTStem

logger = logging.get_logger(__name__)


# ----------------------------------------------------------------------------------------------------- patches


def patchify(pixels: Tensor, patch_shape: tuple[int, int]) -> Tensor:
    """Cut images `[B, C, H, W]` into flattened patches `[B, N, C*ph*pw]`, row by row."""
    patch_height, patch_width = patch_shape
    cut = pixels.unflatten(3, (-1, patch_width)).unflatten(2, (-1, patch_height))  # [B, C, h, ph, w, pw]
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_shape: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Put flattened patches `[B, N, C*ph*pw]` back together to images `[B, C, H, W]`."""
    cut = patches.unflatten(2, (-1, *patch_shape)).unflatten(1, grid)  # [B, h, w, C, ph, pw]
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class HFViTPatchEmbeddings(nn.Module):
    """Project flattened patches linearly: the strided convolution of other implementations as a matrix product.

    In the paper's hybrid the patches are of a ResNet's features.
    """

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.num_channels = config.num_channels
        self.stem = nn.Identity() if config.stem_layers is None else HFViTStem(config)
        channels = self.stem.out_channels if isinstance(self.stem, HFViTStem) else config.num_channels
        height, width = config.patch_shape
        self.patch_shape = (height // config.stem_stride, width // config.stem_stride)
        size, eps = channels * prod(self.patch_shape), config.layer_norm_eps
        norm = nn.LayerNorm if config.use_patch_layernorm else nn.Identity
        self.layernorm_before = norm(size, eps=eps)
        self.projection = nn.Linear(size, config.hidden_size, bias=config.patch_bias)
        self.layernorm_after = norm(config.hidden_size, eps=eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.ndim == 2:  # a pack, whose patches the image processor has cut
            return self._project(pixel_values.unsqueeze(0).to(self.projection.weight.dtype))
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values must be [batch, {self.num_channels}, height, width], got {list(pixel_values.shape)}: "
                "let the image processor prepare the images, or set num_channels in the config."
            )
        features = self.stem(pixel_values.to(self.projection.weight.dtype))
        return self._project(patchify(features, self.patch_shape))

    def _project(self, patches: Tensor) -> Tensor:
        return self.layernorm_after(self.projection(self.layernorm_before(patches)))  # [B, N, D]


class HFViTMaskToken(nn.Module):
    """Show a learned token in place of every masked patch, as SimMIM does (arXiv:2111.09886)."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, 1, config.hidden_size))

    def forward(self, patches: Tensor, is_masked: Tensor) -> Tensor:
        return torch.where(is_masked.unsqueeze(-1), self.weight.to(patches.dtype), patches)


class HFViTPaperCorruption(HFViTMaskToken):
    """Replace 80 % of the masked patches by the token and 10 % by another patch, and keep 10 % (appendix B.1.2).

    The draw belongs to training. In evaluation every masked patch shows the token, so that results repeat.
    """

    def forward(self, patches: Tensor, is_masked: Tensor) -> Tensor:
        masked = super().forward(patches, is_masked)
        if not self.training:
            return masked
        draw = torch.rand(is_masked.shape, device=patches.device).unsqueeze(-1)
        pool = patches.flatten(0, 1)  # [B*N, D]
        others = pool[torch.randint(len(pool), is_masked.shape, device=patches.device)]
        corrupted = torch.where(draw < 0.8, masked, torch.where(draw < 0.9, others, patches))
        return torch.where(is_masked.unsqueeze(-1), corrupted, patches)


class HFViTPatchDropout(nn.Module):
    """Keep a random subset of the patches in training (arXiv:2212.00794)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the patches kept `[B, K, D]` and their indices `[B, K]`, or all of them and `None`."""
        if not self.training or not self.probability:
            return patches, None
        batch, number, _ = patches.shape
        kept = max(1, round(number * (1 - self.probability)))
        indices = torch.rand(batch, number, device=patches.device).argsort(dim=1)[:, :kept]
        return patches.take_along_dim(indices.unsqueeze(-1), dim=1), indices


# --------------------------------------------------------------------------------------------------- positions


def resample_position_embeddings(
    table: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    interpolation: str = "bicubic_antialias",
) -> Tensor:
    """Resample learned position embeddings of patches between (rows, columns) grids.

    Args:
        table: `[K, rows*columns, D]` without class or register tokens; computed in float32, returned in its dtype.
        old_grid: `(rows, columns)` of `table`.
        new_grid: `(rows, columns)` wanted. The same number of cells in another aspect is another grid.
        interpolation: A key of `POSITION_INTERPOLATIONS`.

    Returns:
        `[K, rows*columns, D]` on `new_grid`.

    Example:
        >>> resample_position_embeddings(torch.randn(1, 14 * 14, 192), (14, 14), (24, 16)).shape
        torch.Size([1, 384, 192])
    """
    if new_grid == old_grid:
        return table
    cells = table.float().unflatten(1, old_grid).permute(0, 3, 1, 2)  # [K, D, rows, columns]
    cells = F.interpolate(cells, size=new_grid, **POSITION_INTERPOLATIONS[interpolation])
    return cells.flatten(2).transpose(1, 2).to(table.dtype)


def resample_table(table: Tensor, grid: tuple[int, int], interpolation: str) -> Tensor:
    """Resample a table that has its grid in its shape, `[K, rows, columns, D]`, to `grid`."""
    old_grid = (table.shape[1], table.shape[2])
    return resample_position_embeddings(table.flatten(1, 2), old_grid, grid, interpolation).unflatten(1, grid)


class HFViTPositionTable(nn.Module):
    """Hold a learned table over a grid, `[K, rows, columns, D]`, and answer for any other grid.

    The table keeps its grid in its shape, so that a checkpoint says by itself which grid it was learned on.
    A resampled table is kept for each grid until the weights change, the module moves, or training begins.
    """

    MOST_KEPT = 64

    def __init__(self, config: HFViTConfig, shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.interpolation = config.position_interpolation
        self._resampled: dict[tuple[int, int], tuple[int, Tensor]] = {}

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Return the table on `grid`, `[K, rows, columns, D]`."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            # One graph a grid: torch (2.11 to 2.15) cannot derive an interpolation to a size that is a symbol.
            grid = (index(grid[0]), index(grid[1]))
        if grid == self.weight.shape[1:3]:
            return self.weight
        # A kept table has no gradient; a compiled graph keeps nothing by itself.
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or self.weight.is_inference():
            return resample_table(self.weight, grid, self.interpolation)
        version, table = self._resampled.get(grid, (-1, self.weight))
        if version != self.weight._version:
            with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be used elsewhere
                table = resample_table(self.weight, grid, self.interpolation)
            if len(self._resampled) == self.MOST_KEPT:
                self._resampled.clear()
            self._resampled[grid] = (self.weight._version, table)
        return table

    def _apply(self, fn: Callable, recurse: bool = True) -> "HFViTPositionTable":
        self._resampled.clear()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> "HFViTPositionTable":
        self._resampled.clear()
        return super().train(mode)


class HFViTNoPositions(nn.Module):
    """Leave the patches a bag without order; also what the other kinds of position embedding start from."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return `patches` `[B, N, D]` with their positions."""
        return patches

    def place_prefix(self, tokens: Tensor) -> Tensor:
        """Return the tokens before the patches, `[1, P, D]`, with their positions."""
        return tokens

    def added_to_layers(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor] | None:
        """Return what is added to what enters each layer: to tokens before the patches, `[layers, K, D]`, if to any,
        and to patches, `[layers, N, D]`; nothing, if all is done at the input."""
        return None

    def rotation(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return the cosines and sines that turn queries and keys of patches, float32 `[N, d]` each, if any."""
        return None

    def attention_bias(self, grid: tuple[int, int]) -> Tensor | None:
        """Return what every layer adds to its attention scores between patches, `[layers, A, N, N]`, if anything."""
        return None

    def prefix_bias(self, bias: Tensor) -> Tensor:
        """Put the bias of the tokens before the patches around theirs, `[layers, B or 1, A, T, T]`."""
        raise NotImplementedError


class HFViTLearnedPositions(HFViTNoPositions):
    """The paper's: one learned vector a patch, and one for the class token."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        placed = config.num_prefix_positions
        number = config.num_hidden_layers if config.position_placement == "every_layer" else 1
        self.prefix = nn.Parameter(torch.empty(number, placed, config.hidden_size)) if placed else None
        self._make_tables(config, number)

    def _make_tables(self, config: HFViTConfig, number: int) -> None:
        self.table = HFViTPositionTable(config, (number, *config.grid_size, config.hidden_size))

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return patches + self.on_grid(grid)

    def place_prefix(self, tokens: Tensor) -> Tensor:
        if self.prefix is None:
            return tokens
        placed = self.prefix.shape[1]
        return torch.cat([tokens[:, :placed] + self.prefix, tokens[:, placed:]], dim=1)

    def on_grid(self, grid: tuple[int, int]) -> Tensor:
        """Return the embeddings of all positions, `[1, N, D]`; `[layers, N, D]` where every layer has its own."""
        return self.table(grid).flatten(1, 2)


class HFViTLearned2DPositions(HFViTLearnedPositions):
    """The ablation of the paper's appendix D.4: a vector of D/2 a row and one of D/2 a column, concatenated."""

    def _make_tables(self, config: HFViTConfig, number: int) -> None:
        rows, columns = config.grid_size
        self.rows = HFViTPositionTable(config, (number, rows, 1, config.hidden_size // 2))
        self.columns = HFViTPositionTable(config, (number, 1, columns, config.hidden_size // 2))

    def on_grid(self, grid: tuple[int, int]) -> Tensor:
        rows = self.rows((grid[0], 1)).expand(-1, -1, grid[1], -1)
        columns = self.columns((1, grid[1])).expand(-1, grid[0], -1, -1)
        return torch.cat([rows, columns], dim=-1).flatten(1, 2)


class HFViTLayerPositions(HFViTLearnedPositions):
    """Learned vectors that are added to what enters every layer, its own ones or those of all (appendix D.4)."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        self.num_layers = config.num_hidden_layers

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return patches

    def place_prefix(self, tokens: Tensor) -> Tensor:
        return tokens

    def added_to_layers(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor]:
        prefix = None if self.prefix is None else self.prefix.expand(self.num_layers, -1, -1)
        return prefix, self.on_grid(grid).expand(self.num_layers, -1, -1)


class HFViTLayer2DPositions(HFViTLayerPositions, HFViTLearned2DPositions):
    """The same with a vector of D/2 a row and one of D/2 a column."""


class HFViTSinCos2DPositions(HFViTNoPositions):
    """Fixed sines and cosines of the column and the row, a quarter of the width each (arXiv:2205.01580).

    A position is the patch's index on the grid at hand, so that nothing is resampled.
    """

    TEMPERATURE = 10_000
    ANGLES = torch.float64

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        self.width = config.hidden_size

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return patches + self.on_grid(grid, patches.device).to(patches.dtype)

    def on_grid(self, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
        """Return the embeddings of all positions, float32 `[1, N, D]`."""
        quarter = self.width // 4
        # In float64, as numpy computes it at the source: float32 powers are off in the last digits.
        exponents = torch.arange(quarter, device=device, dtype=torch.float64) / max(quarter - 1, 1)
        frequencies = (self.TEMPERATURE**-exponents).to(self.ANGLES)
        rows, columns = (torch.arange(size, device=device, dtype=self.ANGLES) for size in grid)
        row_angles = torch.outer(rows, frequencies).unsqueeze(1).expand(-1, grid[1], -1)  # [h, w, D/4]
        column_angles = torch.outer(columns, frequencies).unsqueeze(0).expand(grid[0], -1, -1)
        parts = [column_angles.sin(), column_angles.cos(), row_angles.sin(), row_angles.cos()]
        return torch.cat(parts, dim=-1).flatten(0, 1).unsqueeze(0).float()


class HFViTRelativePositions(HFViTNoPositions):
    """A learned bias for every layer, head and offset (rows, columns) between two patches.

    Tokens before the patches have no place: either no bias, or one bias a head for looking at patches, one for being
    looked at by them, and one among themselves (BEiT, arXiv:2106.08254).
    """

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        rows, columns = config.grid_size
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        self.config = config
        self.offsets = HFViTPositionTable(config, (layers, 2 * rows - 1, 2 * columns - 1, heads))
        self.prefix = nn.Parameter(torch.empty(layers, 3, heads)) if config.num_prefix_positions else None

    def attention_bias(self, grid: tuple[int, int]) -> Tensor:
        if self.config._attn_implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                "Relative positions are added to the scores of the attention, which "
                f"{self.config._attn_implementation!r} does not offer: use attn_implementation='sdpa' or 'eager'."
            )
        rows, columns = grid
        table = self.offsets((2 * rows - 1, 2 * columns - 1))  # [layers, 2h-1, 2w-1, A]
        row = torch.arange(rows, device=table.device).unsqueeze(1).expand(-1, columns).flatten()  # [N]
        column = torch.arange(columns, device=table.device).unsqueeze(0).expand(rows, -1).flatten()
        row_offset = row.unsqueeze(1) - row.unsqueeze(0) + rows - 1  # [N, N]
        column_offset = column.unsqueeze(1) - column.unsqueeze(0) + columns - 1
        return table[:, row_offset, column_offset].permute(0, 3, 1, 2)

    def prefix_bias(self, bias: Tensor) -> Tensor:
        number = self.config.num_prefix_tokens
        if self.prefix is None:
            return F.pad(bias, (number, 0, number, 0))
        to_patches, from_patches, between = self.prefix.unsqueeze(1)[..., None, None].unbind(2)  # [layers, 1, A, 1, 1]
        patches = bias.shape[-1]
        outside = bias.shape[:3]
        rows = torch.cat(
            [between.expand(*outside, number, number), to_patches.expand(*outside, number, patches)], dim=-1
        )
        columns = torch.cat([from_patches.expand(*outside, patches, number), bias], dim=-1)
        return torch.cat([rows, columns], dim=-2)


class HFViTRotaryPositions(HFViTNoPositions):
    """Turn queries and keys by angles that grow with the patch's place, RoPE in two dimensions (DINOv3).

    A place is that of the patch's centre in [-1, 1] along each side of the image, whatever the grid; half of the
    angles go by the row, half by the column (arXiv:2508.10104, section 3.2).
    """

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        self.theta = config.rope_theta
        self.head_dim = config.head_width

    def rotation(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, 1, 4 / self.head_dim, device=device)
        frequencies = 2 * torch.pi / self.theta**exponents  # [d/4]
        rows, columns = ((2 * torch.arange(size, device=device) + 1) / size - 1 for size in grid)
        row_angles = torch.outer(rows, frequencies).unsqueeze(1).expand(-1, grid[1], -1)  # [h, w, d/4]
        column_angles = torch.outer(columns, frequencies).unsqueeze(0).expand(grid[0], -1, -1)
        angles = torch.cat([row_angles, column_angles] * 2, dim=-1).flatten(0, 1)  # [N, d]
        return angles.cos(), angles.sin()


def rotate(states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn `[B, A, T, d]`: dimensions i and i + d/2 are the coordinates of one plane."""
    cosines, sines = rotation
    first, second = states.chunk(2, dim=-1)
    return states * cosines + torch.cat([-second, first], dim=-1) * sines


POSITIONS: dict[str, type[HFViTNoPositions]] = {
    "learned": HFViTLearnedPositions,
    "learned_2d": HFViTLearned2DPositions,
    "sincos_2d": HFViTSinCos2DPositions,
    "relative": HFViTRelativePositions,
    "rotary": HFViTRotaryPositions,
    "none": HFViTNoPositions,
}
POSITIONS_OF_LAYERS: dict[str, type[HFViTNoPositions]] = {
    "learned": HFViTLayerPositions,
    "learned_2d": HFViTLayer2DPositions,
}
CORRUPTIONS = {"pixels": HFViTMaskToken, "mean_color": HFViTPaperCorruption}


class HFViTEmbeddings(nn.Module):
    """Turn an image into a sequence, equation (1): [class token] [distillation token] [registers] patches.

    Positions are added here, or returned for the layers or the attention to use.
    """

    def __init__(self, config: HFViTConfig, use_mask_token: bool = False) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embeddings = HFViTPatchEmbeddings(config)
        kinds = POSITIONS if config.position_placement == "input" else POSITIONS_OF_LAYERS
        self.position_embeddings = kinds[config.position_embedding_type](config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if config.use_cls_token else None
        self.distillation_token = nn.Parameter(torch.empty(1, 1, width)) if config.use_distillation_token else None
        registers = config.num_register_tokens
        self.register_tokens = nn.Parameter(torch.empty(1, registers, width)) if registers else None
        self.mask_token = CORRUPTIONS[config.mim_objective](config) if use_mask_token else None
        self.patch_dropout = HFViTPatchDropout(config.patch_dropout_prob)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, pixel_values: Tensor, is_masked: Tensor | None = None, packing: HFViTPacking | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | list[list[Tensor]] | None, tuple[Tensor, Tensor] | None]:
        """Return tokens `[B, T, D]`; what is added to them before every layer, `[layers, B or 1, T, D]`, if positions
        act there; and for the attention, if they act there, a bias of its scores `[layers, B or 1, A, T, T]` and the
        cosines and sines of a rotation `[B or 1, 1, T, d]`.

        Of a pack the bias is a list for every layer, with `[1, A, L, L]` for every group of images.
        """
        if packing is not None:
            return self._pack(self.patch_embeddings(pixel_values), packing)
        grid = self.config.grid_of(*pixel_values.shape[-2:])
        patches = self.patch_embeddings(pixel_values)
        if is_masked is not None:
            patches = self._mask(patches, is_masked)
        patches = self.position_embeddings(patches, grid)
        patches, kept = self.patch_dropout(patches)
        prefix = self._prefix_tokens()
        tokens = (
            torch.cat([prefix.to(patches.dtype).expand(patches.shape[0], -1, -1), patches], dim=1)
            if prefix is not None
            else patches
        )
        added, bias = self._added_to_layers(grid, kept), self._attention_bias(grid, kept)
        return self.dropout(tokens), added, bias, self._rotation(grid, kept, tokens)

    def _pack(
        self, patches: Tensor, packing: HFViTPacking
    ) -> tuple[Tensor, Tensor | None, list[list[Tensor]] | None, tuple[Tensor, Tensor] | None]:
        """Give the patches of every image, `[1, rows, D]` together, its positions and its tokens before them."""
        positions, added, bias, rotation = {}, {}, {}, {}
        for grid in set(packing.grids):
            # What is added to zeros is the position alone, of every kind of position.
            positions[grid] = self.position_embeddings(patches.new_zeros(1, prod(grid), patches.shape[2]), grid)
            added[grid] = self._added_to_layers(grid, None)
            bias[grid] = self._attention_bias(grid, None)
            rotation[grid] = self._rotation(grid, None, patches)
        patches = patches + torch.cat([positions[grid] for grid in packing.grids], dim=1)
        prefix = self._prefix_tokens()
        tokens = patches if prefix is None else packing.prepend(prefix.to(patches.dtype), patches)
        return self.dropout(tokens), packing.added(added), packing.biases(bias), packing.rotation(rotation)

    def _mask(self, patches: Tensor, is_masked: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError("bool_masked_pos needs a mask token: build the model with use_mask_token=True.")
        if is_masked.flatten(1).shape != patches.shape[:2]:
            raise ValueError(
                f"bool_masked_pos must be [batch, patches] = {list(patches.shape[:2])}, got {list(is_masked.shape)}."
            )
        return self.mask_token(patches, is_masked.flatten(1).bool())

    def _prefix_tokens(self) -> Tensor | None:
        tokens = [self.cls_token, self.distillation_token, self.register_tokens]
        present: list[Tensor] = [token for token in tokens if token is not None]
        return self.position_embeddings.place_prefix(torch.cat(present, dim=1)) if present else None

    def _added_to_layers(self, grid: tuple[int, int], kept: Tensor | None) -> Tensor | None:
        added = self.position_embeddings.added_to_layers(grid)
        if added is None:
            return None
        prefix, patches = added
        patches = patches.unsqueeze(1) if kept is None else patches[:, kept]  # [layers, B or 1, K, D]
        placed = 0 if prefix is None else prefix.shape[1]
        patches = F.pad(patches, (0, 0, self.config.num_prefix_tokens - placed, 0))
        if prefix is None:
            return patches
        return torch.cat([prefix.unsqueeze(1).expand(-1, patches.shape[1], -1, -1), patches], dim=2)

    def _attention_bias(self, grid: tuple[int, int], kept: Tensor | None) -> Tensor | None:
        bias = self.position_embeddings.attention_bias(grid)
        if bias is None:
            return None
        bias = bias.unsqueeze(2)  # [layers, A, 1, N, N]
        if kept is not None:
            bias = bias[:, :, 0, kept.unsqueeze(2), kept.unsqueeze(1)]  # [layers, A, B, K, K]
        return self.position_embeddings.prefix_bias(bias.transpose(1, 2))  # [layers, B or 1, A, T, T]

    def _rotation(self, grid: tuple[int, int], kept: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor] | None:
        rotation = self.position_embeddings.rotation(grid, tokens.device)
        if rotation is None:
            return None
        prefix = self.config.num_prefix_tokens  # tokens without a place are not turned: cosine 1, sine 0
        turned = []
        for values, neutral in zip(rotation, (1.0, 0.0), strict=True):
            values = values.unsqueeze(0) if kept is None else values[kept]  # [B or 1, N, d]
            turned.append(F.pad(values, (0, 0, prefix, 0), value=neutral).unsqueeze(1).to(tokens.dtype))
        return turned[0], turned[1]


# --------------------------------------------------------------------------------------------------- the layer


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attend in plain matrix products: from `[B, A, T, d]` to the output `[B, T, A, d]` and weights `[B, A, T, T]`."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask = attention_mask if attention_mask.ndim == 4 else attention_mask[:, None, None]
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


# Matrix units of the CPU, which torch uses for products in bf16.
HAS_AMX = torch.cpu._is_amx_tile_supported()
# Above so many tokens the weights, which products form, take more memory than the time is worth.
SHORT_SEQUENCE = 1024


class HFViTProductAttention(torch.autograd.Function):
    """Attend in plain matrix products, forward and backward: `[B, A, T, d]` each to `[B, A, T, d]`.

    Keeps the weights, B * A * T^2 numbers. No autocast in here: it would take the softmax to float32 and back.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        shape = query.shape
        query, key, value = (part.reshape(-1, *shape[2:]) for part in (query, key, value))  # [B*A, T, d]
        weights = scaled_product(query, key.mT, scaling).softmax(dim=-1)  # [B*A, T, T]
        ctx.save_for_backward(query, key, value, weights)
        ctx.shape, ctx.scaling = shape, scaling
        return (weights @ value).view(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, of_attended: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        query, key, value, weights = ctx.saved_tensors
        of_attended = of_attended.reshape(query.shape)
        of_weights = of_attended @ value.mT
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query = scaled_product(of_scores, key, ctx.scaling)
        of_key = scaled_product(of_scores.mT, query, ctx.scaling)
        of_value = weights.mT @ of_attended
        return of_query.view(ctx.shape), of_key.view(ctx.shape), of_value.view(ctx.shape), None


def scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Multiply `[n, i, j]` by `[n, j, k]` and by a number, rounding once."""
    return torch.baddbmm(left.new_zeros(()), left, right, beta=0, alpha=scaling)


def sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by torch's fused kernels, or where these are slow by plain products; arguments as `eager_attention`'s.

    The fused kernel's backward on a CPU is a third of a whole training step in bf16; products on matrix units take
    a small part of that for short sequences. In evaluation, where nothing is kept, the fused kernel is faster.
    """
    is_trained = torch.is_grad_enabled() and query.requires_grad
    is_plain = attention_mask is None and not dropout and query.shape[2] <= SHORT_SEQUENCE
    if HAS_AMX and is_trained and is_plain and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        if torch.compiler.is_compiling():  # which derives and fuses the steps by itself
            attended = (query @ key.mT * scaling).softmax(dim=-1).to(value.dtype) @ value
        else:
            attended = HFViTProductAttention.apply(query, key, value, scaling)
    else:
        attended = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    return attended.transpose(1, 2), None


class HFViTAttention(nn.Module):
    """Multi-head self-attention, with queries, keys and values from one matrix product.

    Its rows are ordered (head, q/k/v, head_dim), so that any shard by heads is a complete attention of its own.
    """

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_width
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        inner = config.num_attention_heads * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * inner, bias=config.qkv_bias)
        norm = nn.LayerNorm if config.use_qk_norm else nn.Identity
        self.q_norm = norm(self.head_dim, eps=config.layer_norm_eps)
        self.k_norm = norm(self.head_dim, eps=config.layer_norm_eps)
        self.o_proj: nn.Module = nn.Identity()
        if config.use_output_projection:
            self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.proj_bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        packing: HFViTPacking | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        if packing is not None:
            hidden_states = packing.grouped(hidden_states)
        qkv = self.qkv(hidden_states).unflatten(-1, (-1, 3, self.head_dim))  # [B, T, A, 3, d]
        # Taken apart before they are transposed: the gradients are put together again in one copy.
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(3))  # [B, A, T, d] each
        query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        attend = self._attention_function(kwargs)
        if packing is not None:
            attend = packing.within_images(attend)
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(attended.flatten(2)), weights

    def _attention_function(self, kwargs: Any) -> Callable:
        implementation = self.config._attn_implementation
        if implementation != "eager" and kwargs.get("output_attentions", self.config.output_attentions):
            logger.warning_once(
                f"Attention weights were asked for: {implementation} does not form them, so they are computed in "
                "plain matrix products, slower and with a memory of batch x heads x tokens^2 in every layer."
            )
            return eager_attention
        if implementation == "sdpa":
            return sdpa_attention
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)


class HFViTMLP(nn.Module):
    """Two dense layers with a GELU between them."""

    def __init__(self, config: HFViTConfig, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.dropout(self.activation(self.fc1(hidden_states))))


class HFViTGatedMLP(HFViTMLP):
    """The MLP with its hidden layer gated by a second projection (arXiv:2002.05202), SwiGLU with a SiLU."""

    def __init__(self, config: HFViTConfig, bias: bool = True) -> None:
        super().__init__(config, bias)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.dropout(self.activation(self.gate(hidden_states)) * self.fc1(hidden_states)))


class HFViTLayerScale(nn.Module):
    """Scale every channel of a residual branch by a learned factor (arXiv:2103.17239)."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.weight


class HFViTDropPath(nn.Module):
    """Drop a residual branch for whole samples in training, stochastic depth (arXiv:1603.09382)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, hidden_states: Tensor, packing: HFViTPacking | None = None) -> Tensor:
        if not self.training or not self.probability:
            return hidden_states
        keep = 1 - self.probability
        samples = len(hidden_states) if packing is None else len(packing.grids)
        kept = hidden_states.new_empty(samples, 1, 1).bernoulli_(keep)
        if packing is not None:
            kept = packing.spread(kept)  # [1, T, 1]
        return hidden_states * kept / keep


class HFViTLayer(GradientCheckpointingLayer):
    """One block of the encoder, equations (2) and (3)."""

    def __init__(self, config: HFViTConfig, number: int) -> None:
        super().__init__()
        scale = nn.Identity if config.layer_scale_init_value is None else HFViTLayerScale
        drop_path = config.drop_path_rate * number / max(config.num_hidden_layers - 1, 1)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = HFViTAttention(config)
        self.attention_scale = scale(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = (HFViTGatedMLP if config.use_gated_mlp else HFViTMLP)(config, bias=config.mlp_bias)
        self.mlp_scale = scale(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = HFViTDropPath(drop_path)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        packing: HFViTPacking | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, rotation, packing, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.attention_scale(self.dropout(attended)), packing)
        transformed = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.mlp_scale(self.dropout(transformed)), packing)


# ----------------------------------------------------------------------------------------------------- pooling


class HFViTClassTokenPooling(nn.Module):
    """Read the class token, equation (4)."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[:, 0]


class HFViTMeanPooling(nn.Module):
    """Average the patches; class and register tokens are left out."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.num_prefix_tokens = config.num_prefix_tokens

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[:, self.num_prefix_tokens :].mean(dim=1)


class HFViTMeanOfAllPooling(HFViTClassTokenPooling):
    """Average all tokens."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.mean(dim=1)


class HFViTClassTokenAndMeanPooling(HFViTMeanPooling):
    """Put the class token and the average of the patches one behind the other, `[B, 2*D]` (arXiv:2304.07193)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.cat([hidden_states[:, 0], super().forward(hidden_states)], dim=-1)


class HFViTDistillationPooling(HFViTClassTokenPooling):
    """Put the class and the distillation token one behind the other, `[B, 2*D]` (arXiv:2012.12877)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[:, :2].flatten(1)


class HFViTAttentionPooling(nn.Module):
    """Let one learned query attend to all tokens (arXiv:2106.04560, big_vision's MAP head)."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)  # rows ordered (head, k/v, head_dim)
        self.o_proj = nn.Linear(width, width)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = HFViTMLP(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        query = self.query(self.probe).expand(hidden_states.shape[0], -1, -1).unflatten(-1, (-1, self.head_dim))
        key, value = self.key_value(hidden_states).unflatten(-1, (-1, 2, self.head_dim)).transpose(1, 2).unbind(3)
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), key, value)  # [B, A, 1, d]
        pooled = self.o_proj(attended.transpose(1, 2).flatten(2))
        return (pooled + self.mlp(self.layernorm(pooled))).squeeze(1)


class HFViTPatchAttentionPooling(HFViTAttentionPooling):
    """Let one learned query attend to the patches alone, as timm has it."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        self.num_prefix_tokens = config.num_prefix_tokens

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states[:, self.num_prefix_tokens :])


POOLINGS: dict[str, type[nn.Module]] = {
    "cls": HFViTClassTokenPooling,
    "mean": HFViTMeanPooling,
    "mean_all": HFViTMeanOfAllPooling,
    "attention": HFViTAttentionPooling,
    "attention_patches": HFViTPatchAttentionPooling,
    "cls_and_mean": HFViTClassTokenAndMeanPooling,
    "cls_and_distillation": HFViTDistillationPooling,
}


class HFViTPooler(nn.Module):
    """Reduce tokens `[B, T, D]` to what the head reads, `[B, pooled_width]` or `[B, representation_size]`."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.pooling = POOLINGS[config.pooling](config)
        width, size = config.pooled_width, config.representation_size
        norm = nn.LayerNorm if config.final_layernorm == "pooled" else nn.Identity
        self.layernorm = norm(width, eps=config.layer_norm_eps)
        # The paper's head in pre-training: one hidden layer with tanh.
        self.pre_logits = nn.Identity() if size is None else nn.Linear(width, size)
        self.activation = nn.Identity() if size is None else nn.Tanh()

    def forward(self, hidden_states: Tensor, packing: HFViTPacking | None = None) -> Tensor:
        pooled = self.pooling(hidden_states) if packing is None else packing.pool(self.pooling, hidden_states)
        return self.activation(self.pre_logits(self.layernorm(pooled)))


# --------------------------------------------------------------------------------------------------- the model


class ResamplePositions(ConversionOps):
    """Bring a position table of a checkpoint to the grid of the model that loads it."""

    def convert(self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **kwargs: Any) -> dict:
        (stored,) = input_dict.values()
        table = stored[0] if isinstance(stored, list) else stored
        name, interpolation = kwargs["full_layer_name"], kwargs["config"].position_interpolation
        _, rows, columns, _ = kwargs["model"].get_parameter(name).shape
        if not table.numel():  # sharded along its first dimension, often 1, a rank may hold none of it
            return {name: table.new_empty(table.shape[0], rows, columns, table.shape[3])}
        return {name: resample_table(table, (rows, columns), interpolation)}

    @property
    def reverse_op(self) -> "ConversionOps":
        return self  # what is saved has the model's grid already


PUSH_OPTIONS = ("commit_message", "private", "token", "revision", "create_pr", "max_shard_size")


class HFViTPreTrainedModel(PreTrainedModel):
    """What every class of this file shares: its place in transformers, initial weights, and how it is saved."""

    config: HFViTConfig
    config_class = HFViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["HFViTEmbeddings", "HFViTLayer", "HFViTPooler"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HFViTLayer, "attentions": HFViTAttention}
    _input_embed_layer = "patch_embeddings"
    # Reads checkpoints of other libraries; set by the package where it is installed, since it does not travel along.
    _read_foreign: Callable | None = None
    _image_processor: Any = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Self:
        """Load a model as `PreTrainedModel` does; with the package installed, also from other libraries' checkpoints.

        Positions are resampled where `image_size` is given. All arguments are those of `PreTrainedModel`.
        """
        name, read = pretrained_model_name_or_path, cls._read_foreign
        if read is not None and name is not None and kwargs.get("state_dict") is None:
            foreign = read(str(name), cls.__name__, kwargs)
            if foreign is not None:
                config, state_dict, processor, kwargs = foreign
                result = super().from_pretrained(None, *model_args, config=config, state_dict=state_dict, **kwargs)
                model = result[0] if isinstance(result, tuple) else result
                model.config.name_or_path = model.name_or_path = str(name)
                model._image_processor = processor  # of the source; saved with the model
                return result
        return super().from_pretrained(name, *model_args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        with_own_parameters = (
            HFViTEmbeddings,
            HFViTMaskToken,
            HFViTPositionTable,
            HFViTLearnedPositions,
            HFViTRelativePositions,
            HFViTAttentionPooling,
        )
        if isinstance(module, with_own_parameters):
            for parameter in module.parameters(recurse=False):
                init.trunc_normal_(parameter, std=self.config.initializer_range)
        elif isinstance(module, HFViTLayerScale):
            init.constant_(module.weight, cast(float, self.config.layer_scale_init_value))

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | PathLike,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save a folder that stands alone: weights, config, image processors, this code and a card.

        The weights have the names of the modules in memory, so that every `load_state_dict` reads them. A processor
        or card that lies in the folder already is left as it is. Arguments are those of `PreTrainedModel`.
        """
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if self.should_save_on_this_rank(is_main_process):
            complete_repository(save_directory, self.config, __file__, self._image_processor)
            if push_to_hub:
                options = {name: value for name, value in kwargs.items() if name in PUSH_OPTIONS}
                self.push_to_hub(repo_id or Path(save_directory).name, **options)  # type: ignore[arg-type]

    @classmethod
    def is_remote_code(cls) -> bool:
        """Keep transformers from copying code: it looks for the class's own module, which FSDP replaces."""
        return False

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # At a push, transformers puts its empty form of a card over ours.
        replace_empty_form(working_dir, self.config, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


class HFViTModel(HFViTPreTrainedModel):
    """The encoder, with the pooling that its head reads.

    Args:
        config: The architecture.
        add_pooling_layer: Whether `pooler_output` is computed.
        use_mask_token: Whether masked patches can be replaced by a learned token.
    """

    def __init__(self, config: HFViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False) -> None:
        super().__init__(config)
        self.embeddings = HFViTEmbeddings(config, use_mask_token=use_mask_token)
        norm = {True: nn.LayerNorm, False: nn.Identity}
        width, eps = config.hidden_size, config.layer_norm_eps
        self.pre_layernorm = norm[config.use_pre_layernorm](width, eps=eps)
        self.layers = nn.ModuleList([HFViTLayer(config, number) for number in range(config.num_hidden_layers)])
        self.layernorm = norm[config.final_layernorm == "tokens"](width, eps=eps)
        self.pooler = HFViTPooler(config) if add_pooling_layer else None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        patch_grids: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: `[B, C, H, W]`, normalised by the image processor. Any height and width that the patch
                divides: positions are resampled to the grid at hand. Of a pack, `[rows, C*ph*pw]`.
            bool_masked_pos: `[B, N]`, true where a patch is masked; for a model with a mask token.
            attention_mask: `[B, T]`, 1 for tokens that are attended to, prefix tokens first.
            patch_grids: Integers `[B, 2]`, with a pack: the (rows, columns) of each image, as the image processor
                returns them with `packing`. Tokens are then `[1, T, D]`, all images one behind the other.
            kwargs: As transformers has them: `output_attentions` and `output_hidden_states` give those of all layers.

        Returns:
            `last_hidden_state` `[B, T, D]` behind the final LayerNorm of tokens, ordered class token, distillation
            token, registers, patches row by row; `pooler_output` `[B, pooled_width]` (`[B, representation_size]`
            behind a pre-logits layer).
        """
        if pixel_values is None:
            raise ValueError("pixel_values is missing: pass what the image processor returns, [B, C, H, W].")
        packing, mask = None, None
        if patch_grids is not None or pixel_values.ndim == 2:
            refuse_beside_a_pack(self, bool_masked_pos=bool_masked_pos, attention_mask=attention_mask, **kwargs)
            packing = HFViTPacking(pixel_values, patch_grids, self.config)
        hidden_states, added, bias, rotation = self.embeddings(pixel_values, bool_masked_pos, packing)
        hidden_states = self.pre_layernorm(hidden_states)
        if packing is None:
            mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
        for number, layer in enumerate(self.layers):
            scores = mask if bias is None else with_bias(mask, bias[number])
            hidden_states = hidden_states if added is None else hidden_states + added[number]
            hidden_states = layer(hidden_states, scores, rotation, packing, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        pooled = None if self.pooler is None else self.pooler(hidden_states, packing)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


def with_bias(mask: Any, bias: Tensor) -> Tensor:
    """Join a mask of the attention, boolean or added, with a bias that is added to its scores."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    return bias + mask


# --------------------------------------------------------------------------------------------------- the heads


def classification_loss(
    labels: Tensor,
    logits: Tensor,
    config: HFViTConfig,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute the loss of a classifier in float32, without writing a guess into the config.

    Args:
        labels: Classes `[B]`; soft labels `[B, num_labels]` that sum to one (mixup, distillation); 0/1 for each label
            `[B, num_labels]` with `problem_type="multi_label_classification"`; or targets of a regression.
        logits: `[B, num_labels]`.
        config: Of which `problem_type` decides, and the labels where it is `None`.
        num_items_in_batch: Entries of `labels` over all accumulated batches, which the sum is divided by instead of
            the mean over this batch.

    Raises:
        ValueError: If soft labels do not sum to one, or their shape is not that of the logits.
    """
    logits, labels = logits.float(), labels.to(logits.device)
    is_class = not labels.is_floating_point() and labels.ndim == 1
    kind = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    if kind == "single_label_classification" and is_class:
        loss = F.cross_entropy(logits, labels, reduction="none")  # [B]; a label of -100 is ignored
        entries = (labels != -100).sum().clamp(min=1)
        return loss.sum() / (entries if num_items_in_batch is None else num_items_in_batch)
    if kind == "regression" and config.num_labels == 1:
        logits = logits.squeeze(-1)
        labels = labels.reshape(logits.shape)
    if labels.shape != logits.shape:
        raise ValueError(
            f"{kind} with {config.num_labels} labels needs labels of shape {list(logits.shape)}, or class numbers "
            f"[batch] for single_label_classification; got {list(labels.shape)} of {labels.dtype}."
        )
    labels = labels.float()
    if kind == "single_label_classification":
        _check_soft_labels(labels, config)
        # Every row is one distribution: its entries together count as num_labels items.
        loss = -(labels * logits.log_softmax(dim=-1)) * logits.shape[-1]
    elif kind == "regression":
        loss = F.mse_loss(logits, labels, reduction="none")
    else:
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return loss.mean() if num_items_in_batch is None else loss.sum() / num_items_in_batch


def _check_soft_labels(labels: Tensor, config: HFViTConfig) -> None:
    # Stated, the kind is believed. Guessed, several labels an image must not pass as one distribution.
    if config.problem_type is not None or torch.compiler.is_compiling():
        return
    if (labels.sum(dim=-1) - 1).abs().max() > 1e-3:
        raise ValueError(
            "Labels [batch, num_labels] were taken for soft labels, but their rows do not sum to one: set "
            "problem_type='multi_label_classification' in the config for several labels an image."
        )


class HFViTDistilledClassifier(nn.Module):
    """Classify by the class and by the distillation token, and average (arXiv:2012.12877)."""

    def __init__(self, width: int, num_labels: int) -> None:
        super().__init__()
        self.cls = nn.Linear(width // 2, num_labels)
        self.distillation = nn.Linear(width // 2, num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        cls, distillation = pooled.chunk(2, dim=-1)
        return (self.cls(cls) + self.distillation(distillation)) / 2


class HFViTForImageClassification(HFViTPreTrainedModel):
    """The encoder with a linear classifier on what the pooling gives.

    Example:
        >>> small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
        >>> model = HFViTForImageClassification(HFViTConfig(**small, image_size=32, patch_size=8)).eval()
        >>> model(torch.rand(2, 3, 32, 32)).logits.shape
        torch.Size([2, 2])
        >>> model(torch.rand(2, 3, 40, 24)).logits.shape  # positions are resampled to the grid of 5x3
        torch.Size([2, 2])
    """

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        self.vit = HFViTModel(config)
        width = config.representation_size or config.pooled_width
        classifier = HFViTDistilledClassifier if config.pooling == "cls_and_distillation" else nn.Linear
        self.classifier = classifier(width, config.num_labels) if config.num_labels else nn.Identity()
        self.loss_function = classification_loss
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # The paper fine-tunes from a head of zeros (appendix B.1.1): so does a new head on an encoder that was loaded.
        projection = self.vit.embeddings.patch_embeddings.projection
        is_encoder_loaded = getattr(projection.weight, "_is_hf_initialized", False)
        if module is self.classifier and (self.config.zero_init_head or is_encoder_loaded):
            for parameter in module.parameters():
                init.zeros_(parameter)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: `[B, C, H, W]`, or a pack with its `patch_grids`, as for `HFViTModel`.
            labels: See `classification_loss`; with labels there is a loss.
            kwargs: As for `HFViTModel`, `patch_grids` among them.

        Returns:
            `logits` `[B, num_labels]` and, with labels, `loss`.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs = self.vit(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, num_items_in_batch=num_items_in_batch)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@dataclass
class HFViTMaskedImageModelingOutput(MaskedImageModelingOutput):
    """What `HFViTForMaskedImageModeling` returns.

    `reconstruction` is an image `[B, C, H, W]`: predicted pixels, or every patch in its likeliest mean colour.
    `predictions` is what the loss reads: pixels `[B, N, C*ph*pw]`, or scores of the colours `[B, N, 8**C]`.
    """

    predictions: torch.FloatTensor | None = None


class PixelObjective(nn.Module):
    """Predict the pixels of masked patches; L1 loss (SimMIM, arXiv:2111.09886)."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.patch_shape = config.patch_shape
        self.decoder = nn.Linear(config.hidden_size, config.num_channels * prod(self.patch_shape))

    def loss(self, predictions: Tensor, pixel_values: Tensor) -> Tensor:
        """Return the loss of every patch, `[B, N]`."""
        return (predictions.float() - patchify(pixel_values.float(), self.patch_shape)).abs().mean(dim=-1)

    def paint(self, predictions: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the image `[B, C, H, W]` that the predictions stand for."""
        return unpatchify(predictions, self.patch_shape, grid)


class MeanColorObjective(nn.Module):
    """Predict the mean colour of masked patches, 3 bits a channel; cross-entropy (the paper's appendix B.1.2).

    Colours are levels of [-1, 1], the range of the paper's pixels (`image_mean` and `image_std` of 0.5).
    """

    LEVELS = 8

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.patch_shape = config.patch_shape
        self.num_channels = config.num_channels
        self.decoder = nn.Linear(config.hidden_size, self.LEVELS**config.num_channels)

    def loss(self, predictions: Tensor, pixel_values: Tensor) -> Tensor:
        """Return the loss of every patch, `[B, N]`."""
        return F.cross_entropy(predictions.float().transpose(1, 2), self.colors(pixel_values), reduction="none")

    def colors(self, pixel_values: Tensor) -> Tensor:
        """Return the number of every patch's mean colour, `[B, N]` in 0 to 8**C - 1, first channel highest."""
        patches = patchify(pixel_values.float(), self.patch_shape).unflatten(2, (self.num_channels, -1))
        levels = ((patches.mean(dim=-1) + 1) / 2 * self.LEVELS).long().clamp(0, self.LEVELS - 1)  # [B, N, C]
        return (levels * self._places(levels.device)).sum(dim=-1)

    def paint(self, predictions: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the image `[B, C, H, W]` that the predictions stand for."""
        places = self._places(predictions.device)
        levels = predictions.argmax(dim=-1, keepdim=True) // places % self.LEVELS  # [B, N, C]
        colors = (levels.to(predictions.dtype) + 0.5) / self.LEVELS * 2 - 1
        return unpatchify(colors.repeat_interleave(prod(self.patch_shape), dim=-1), self.patch_shape, grid)

    def _places(self, device: torch.device) -> Tensor:
        return self.LEVELS ** torch.arange(self.num_channels - 1, -1, -1, device=device)


OBJECTIVES: dict[str, type[PixelObjective | MeanColorObjective]] = {
    "pixels": PixelObjective,
    "mean_color": MeanColorObjective,
}


def refuse_patch_dropout(model: PreTrainedModel) -> None:
    """Raise `ValueError` for a model that must answer for every patch but would drop some."""
    if model.config.patch_dropout_prob:
        raise ValueError(
            f"{type(model).__name__} returns something for every patch: set patch_dropout_prob=0, "
            f"got {model.config.patch_dropout_prob}."
        )


class HFViTForMaskedImageModeling(HFViTPreTrainedModel):
    """The encoder with a decoder that predicts masked patches; `config.mim_objective` says what of them."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        refuse_patch_dropout(self)
        self.vit = HFViTModel(config, add_pooling_layer=False, use_mask_token=True)
        self.objective = OBJECTIVES[config.mim_objective](config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HFViTMaskedImageModelingOutput:
        """Predict patches, and compare those that are masked.

        Args:
            pixel_values: `[B, C, H, W]`, as for `HFViTModel`.
            bool_masked_pos: `[B, N]`, true where a patch is masked; with it there is a loss, over masked patches.
            kwargs: As for `HFViTModel`.
        """
        refuse_packs(self, kwargs.get("patch_grids"))
        outputs = self.vit(pixel_values, bool_masked_pos=bool_masked_pos, **kwargs)
        patches = outputs.last_hidden_state[:, self.config.num_prefix_tokens :]
        predictions = self.objective.decoder(patches)
        pixel_values = cast(Tensor, pixel_values)
        loss = None
        if bool_masked_pos is not None:
            is_masked = bool_masked_pos.flatten(1).float()
            losses = self.objective.loss(predictions, pixel_values)
            loss = (losses * is_masked).sum() / is_masked.sum().clamp(min=1)
        return HFViTMaskedImageModelingOutput(
            loss=loss,
            reconstruction=self.objective.paint(predictions, self.config.grid_of(*pixel_values.shape[-2:])),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            predictions=predictions,
        )


class HFViTBackbone(BackboneMixin, HFViTPreTrainedModel):
    """The encoder for segmentation and detection heads: feature maps of chosen stages."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        refuse_patch_dropout(self)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.vit = HFViTModel(config, add_pooling_layer=False)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Return a feature map for each of `config.out_features`.

        Args:
            pixel_values: `[B, C, H, W]`, as for `HFViTModel`.

        Returns:
            `feature_maps`, `[B, D, h, w]` each; tokens `[B, T, D]` with `reshape_hidden_states=False`.
        """
        refuse_packs(self, kwargs.get("patch_grids"))
        outputs = self.vit(pixel_values, **kwargs)
        grid = self.config.grid_of(*pixel_values.shape[-2:])
        feature_maps = []
        for stage, hidden_state in zip(self.stage_names, outputs.hidden_states, strict=True):
            if stage not in self.out_features:
                continue
            if self.config.apply_layernorm:
                hidden_state = self.vit.layernorm(hidden_state)
            if self.config.reshape_hidden_states:
                patches = hidden_state[:, self.config.num_prefix_tokens :]
                hidden_state = patches.transpose(1, 2).unflatten(2, grid).contiguous()  # [B, D, h, w]
            feature_maps.append(hidden_state)
        return BackboneOutput(
            feature_maps=tuple(feature_maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


register_checkpoint_conversion_mapping(
    HFViTModel.__name__,
    [
        WeightConverter(
            r"position_embeddings\.(table|rows|columns|offsets)\.weight",
            r"position_embeddings.\1.weight",
            [ResamplePositions()],
        )
    ],
    overwrite=True,
)

__all__ = [
    "HFViTBackbone",
    "HFViTForImageClassification",
    "HFViTForMaskedImageModeling",
    "HFViTModel",
    "HFViTPreTrainedModel",
]
