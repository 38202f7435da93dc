"""Position embeddings: learned, fixed, relative, rotary; resampled to any grid."""

from collections.abc import Callable
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from .configuration_hf_vit import POSITION_INTERPOLATIONS, HFViTConfig


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
