"""Position embeddings, resampled to any grid of patches.

Learned (the paper's, and its ablations in appendix D.4), sine-cosine (arXiv:2205.01580), relative (arXiv:2106.08254)
and rotary (arXiv:2508.10104, arXiv:2403.13298). Each kind is one class; `POSITIONS` maps the config's names to them.
The letters in shapes are those of modeling_hf_vit.py.
"""

from operator import index
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from .configuration_hf_vit import POSITION_INTERPOLATIONS, HFViTConfig
from .splines_hf_vit import geometric_spline
from .validation_hf_vit import GEOMETRIC_SPLINES, pair

WITHOUT_FLOAT64 = ("mps", "xpu")  # device types; of XPU, only some devices


def resample_position_embeddings(
    table: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    interpolation: str = "bicubic_antialias",
) -> Tensor:
    """Resample learned position embeddings of patches between (rows, columns) grids.

    Args:
        table: `[K, rows*columns, D]` without class or register tokens. Computed in float32, returned in its dtype.
        old_grid: `(rows, columns)` of `table`.
        new_grid: Target `(rows, columns)`. A grid with the same number of cells but another aspect ratio differs.
        interpolation: A key of `POSITION_INTERPOLATIONS`, or of `GEOMETRIC_SPLINES` for offsets between patches.

    Returns:
        `[K, rows*columns, D]` on `new_grid`.

    Example:
        >>> resample_position_embeddings(torch.randn(1, 14 * 14, 192), (14, 14), (24, 16)).shape
        torch.Size([1, 384, 192])
    """
    if new_grid == old_grid:
        return table
    cells = table.float().unflatten(1, old_grid).permute(0, 3, 1, 2)  # [K, D, rows, columns]
    if interpolation in GEOMETRIC_SPLINES:
        cells = _resample_by_splines(cells, new_grid, GEOMETRIC_SPLINES[interpolation])
        return cells.flatten(2).transpose(1, 2).to(table)
    how = dict(POSITION_INTERPOLATIONS[interpolation])
    if offset := how.pop("offset", 0):
        how["scale_factor"] = tuple((new + offset) / old for new, old in zip(new_grid, old_grid, strict=True))
    else:
        how["size"] = new_grid
    cells = F.interpolate(cells, **how)
    return cells.flatten(2).transpose(1, 2).to(table.dtype)


def _resample_by_splines(cells: Tensor, grid: tuple[int, int], degree: int) -> Tensor:
    """Resample `[K, D, rows, columns]` in float64, which autocast does not convert."""
    device = torch.device("cpu") if cells.device.type in WITHOUT_FLOAT64 else cells.device
    sizes = zip(cells.shape[2:], grid, strict=True)
    rows, columns = (geometric_spline(old, new, degree).to(device) for old, new in sizes)
    return rows @ cells.to(rows) @ columns.T


def resample_table(table: Tensor, grid: tuple[int, int], interpolation: str) -> Tensor:
    """Resample a table with its grid in its shape, `[K, rows, columns, D]`, to another grid."""
    old_grid = (table.shape[1], table.shape[2])
    return resample_position_embeddings(table.flatten(1, 2), old_grid, grid, interpolation).unflatten(1, grid)


class HFViTPositionTable(nn.Module):
    """Hold a learned table `[K, rows, columns, D]`, and return it on any grid.

    Its shape contains the grid, so that a checkpoint states which grid it was trained on.
    """

    def __init__(self, config: HFViTConfig, shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.interpolation = config.position_interpolation

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Return the table on `grid`, `[K, rows, columns, D]`."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            # One graph per grid: torch 2.11 to 2.15 cannot compile an interpolation to a symbolic size.
            grid = (index(grid[0]), index(grid[1]))
        if grid == self.weight.shape[1:3]:
            return self.weight
        return resample_table(self.weight, grid, self.interpolation)


class HFViTPositions(NamedTuple):
    """Positions that act inside the encoder; a field is `None` if this kind of positions does not use it.

    Attributes:
        added: Added to the tokens before each layer, `[layers, B or 1, T, D]`.
        bias: Added to the attention scores of each layer, `[layers, B or 1, A, T, T]`. For a pack, a list per layer
            with one `[1, A, L, L]` per group of images.
        rotation: Cosines and sines that rotate queries and keys, `[B or 1, 1, T, d]` each.
    """

    added: Tensor | None = None
    bias: Any = None
    rotation: tuple[Tensor, Tensor] | None = None

    def add_to(self, hidden_states: Tensor, layer: int) -> Tensor:
        """Add the positions of layer number `layer` to its input `[B, T, D]`."""
        return hidden_states if self.added is None else hidden_states + self.added[layer]

    def add_to_mask(self, mask: Any, layer: int) -> Any:
        """Combine an attention mask, boolean or additive, with the bias of layer number `layer`."""
        if self.bias is None:
            return mask
        bias = self.bias[layer]
        if mask is None:
            return bias
        if mask.dtype == torch.bool:
            return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
        return bias + mask


class HFViTNoPositions(nn.Module):
    """Add no positions: the patches are an unordered set. Base class of the other kinds."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return patches `[B, N, D]` with the positions that are added at the input."""
        return patches

    def place_prefix(self, tokens: Tensor) -> Tensor:
        """Return the tokens before the patches, `[1, P, D]`, with the positions that are added at the input."""
        return tokens

    def placed(self, patches: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> HFViTPositions:
        """Return the positions that act inside the encoder.

        Args:
            patches: Embedded patches; their dtype and device are used.
            grid: (rows, columns) of all patches.
            kept: Indices of the patches that patch dropout kept, `[B, K]`; `None` for all.
        """
        return HFViTPositions()


class HFViTLearnedPositions(HFViTNoPositions):
    """One learned vector per patch, and one for the class token: the paper's choice."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        width, number = config.hidden_size, config.num_prefix_positions
        layers = config.num_hidden_layers if config.position_placement == "every_layer" else 1
        self.prefix = nn.Parameter(torch.empty(layers, number, width)) if number else None
        self._make_tables(config, layers)

    def _make_tables(self, config: HFViTConfig, layers: int) -> None:
        self.table = HFViTPositionTable(config, (layers, *config.grid_size, config.hidden_size))

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return patches + self.on_grid(grid)

    def place_prefix(self, tokens: Tensor) -> Tensor:
        if self.prefix is None:
            return tokens
        placed = self.prefix.shape[1]
        return torch.cat([tokens[:, :placed] + self.prefix, tokens[:, placed:]], dim=1)

    def on_grid(self, grid: tuple[int, int]) -> Tensor:
        """Return the embeddings of all patches, `[1, N, D]`, or `[layers, N, D]` if every layer has its own."""
        return self.table(grid).flatten(1, 2)


class HFViTLearned2DPositions(HFViTLearnedPositions):
    """A vector of D/2 per row and one of D/2 per column, concatenated (appendix D.4)."""

    def _make_tables(self, config: HFViTConfig, layers: int) -> None:
        rows, columns = config.grid_size
        self.rows = HFViTPositionTable(config, (layers, rows, 1, config.hidden_size // 2))
        self.columns = HFViTPositionTable(config, (layers, 1, columns, config.hidden_size // 2))

    def on_grid(self, grid: tuple[int, int]) -> Tensor:
        rows = self.rows((grid[0], 1)).expand(-1, -1, grid[1], -1)
        columns = self.columns((1, grid[1])).expand(-1, grid[0], -1, -1)
        return torch.cat([rows, columns], dim=-1).flatten(1, 2)


class HFViTLayerPositions(HFViTLearnedPositions):
    """Learned vectors added to the input of every layer, shared by all layers or not (appendix D.4)."""

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return patches

    def place_prefix(self, tokens: Tensor) -> Tensor:
        return tokens

    def placed(self, patches: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> HFViTPositions:
        added = self.on_grid(grid).expand(self.config.num_hidden_layers, -1, -1)
        added = added.unsqueeze(1) if kept is None else added[:, kept]  # [layers, B or 1, K, D]
        number = 0 if self.prefix is None else self.prefix.shape[1]
        added = F.pad(added, (0, 0, self.config.num_prefix_tokens - number, 0))
        if self.prefix is not None:
            prefix = self.prefix.unsqueeze(1).expand(*added.shape[:2], -1, -1)
            added = torch.cat([prefix, added], dim=2)
        return HFViTPositions(added=added)


class HFViTLayer2DPositions(HFViTLayerPositions, HFViTLearned2DPositions):
    """Like `HFViTLayerPositions`, with a vector of D/2 per row and one of D/2 per column."""


class HFViTSinCos2DPositions(HFViTNoPositions):
    """Fixed sines and cosines of the column and the row, a quarter of the width each (arXiv:2205.01580).

    Computed from the row and column indices on the given grid; nothing is resampled.
    """

    TEMPERATURE = 10_000
    ANGLES = torch.float64

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return patches + self.on_grid(grid, patches.device).to(patches.dtype)

    def on_grid(self, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
        """Return the embeddings of all patches, float32 `[1, N, D]`."""
        # In float64, as NumPy in the original code: float32 powers differ in the last digits. The table is computed on
        # the device, since copying it from the CPU would synchronize with the device in every forward pass.
        is_wide = device is None or device.type not in WITHOUT_FLOAT64
        powers, angles = (torch.float64, self.ANGLES) if is_wide else (torch.float32, torch.float32)
        frequencies = self.frequencies(device, powers).to(angles)
        rows, columns = (torch.arange(size, device=device, dtype=angles) for size in grid)
        row_angles = torch.outer(rows, frequencies).unsqueeze(1).expand(-1, grid[1], -1)  # [h, w, D/4]
        column_angles = torch.outer(columns, frequencies).unsqueeze(0).expand(grid[0], -1, -1)
        parts = [column_angles.sin(), column_angles.cos(), row_angles.sin(), row_angles.cos()]
        return torch.cat(parts, dim=-1).flatten(0, 1).unsqueeze(0).float()

    def frequencies(self, device: torch.device | None, dtype: torch.dtype) -> Tensor:
        """Return the angles between neighboring positions, `[D/4]`."""
        quarter = self.config.hidden_size // 4
        return self.TEMPERATURE ** -(torch.arange(quarter, device=device, dtype=dtype) / max(quarter - 1, 1))


class HFViTRelativePositions(HFViTNoPositions):
    """A learned bias per layer, head and offset (rows, columns) between two patches.

    Tokens before the patches have no offset. They get no bias, or three per head: for attending to patches, for being
    attended to by patches, and among themselves (BEiT, arXiv:2106.08254).
    """

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        rows, columns = config.grid_size
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        self.offsets = HFViTPositionTable(config, (layers, 2 * rows - 1, 2 * columns - 1, heads))
        self.prefix = nn.Parameter(torch.empty(layers, 3, heads)) if config.num_prefix_positions else None

    def placed(self, patches: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> HFViTPositions:
        if self.config._attn_implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                f"Relative positions need an attention that takes a bias, got {self.config._attn_implementation!r}: "
                "use attn_implementation='sdpa' or 'eager'."
            )
        bias = self.bias_of_patches(grid).unsqueeze(2)  # [layers, A, 1, N, N]
        if kept is not None:
            bias = bias[:, :, 0, kept.unsqueeze(2), kept.unsqueeze(1)]  # [layers, A, B, K, K]
        return HFViTPositions(bias=self._with_prefix(bias.transpose(1, 2)))

    def bias_of_patches(self, grid: tuple[int, int]) -> Tensor:
        """Return the bias that each layer adds to the attention scores between patches, `[layers, A, N, N]`."""
        rows, columns = grid
        table = self.offsets((2 * rows - 1, 2 * columns - 1))  # [layers, 2h-1, 2w-1, A]
        row = torch.arange(rows, device=table.device).unsqueeze(1).expand(-1, columns).flatten()  # [N]
        column = torch.arange(columns, device=table.device).unsqueeze(0).expand(rows, -1).flatten()
        row_offset = row.unsqueeze(1) - row.unsqueeze(0) + rows - 1  # [N, N]
        column_offset = column.unsqueeze(1) - column.unsqueeze(0) + columns - 1
        return table[:, row_offset, column_offset].permute(0, 3, 1, 2)

    def _with_prefix(self, bias: Tensor) -> Tensor:
        """Extend the bias between patches by that of the tokens before them, to `[layers, B or 1, A, T, T]`."""
        number, patches = self.config.num_prefix_tokens, bias.shape[-1]
        if self.prefix is None:
            return F.pad(bias, (number, 0, number, 0))
        to_patches, from_patches, between = self.prefix.unsqueeze(1)[..., None, None].unbind(2)  # [layers, 1, A, 1, 1]
        outer = bias.shape[:3]
        rows = torch.cat([between.expand(*outer, number, number), to_patches.expand(*outer, number, patches)], dim=-1)
        columns = torch.cat([from_patches.expand(*outer, patches, number), bias], dim=-1)
        return torch.cat([rows, columns], dim=-2)


class HFViTRotaryPositions(HFViTNoPositions):
    """Rotate queries and keys by angles that grow with the position: two-dimensional RoPE.

    Half of the angles depend on the row, half on the column (arXiv:2508.10104, section 3.2).
    """

    def placed(self, patches: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> HFViTPositions:
        angles = self.angles(grid, patches.device)
        placed = []
        for values, neutral in ((angles.cos(), 1.0), (angles.sin(), 0.0)):  # tokens before the patches do not rotate
            values = values.unsqueeze(0) if kept is None else values[kept]  # [B or 1, N, d]
            values = F.pad(values, (0, 0, self.config.num_prefix_tokens, 0), value=neutral)
            placed.append(values.unsqueeze(1).to(patches.dtype))
        return HFViTPositions(rotation=(placed[0], placed[1]))

    def angles(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Return the angles of all patches, float32 `[N, d]`."""
        exponents = torch.arange(0, 1, 4 / self.config.head_width, device=device)
        turn = 2 * torch.pi if self.config.rope_coordinates == "centered" else 1.0
        frequencies = turn / self.config.rope_theta**exponents  # [d/4]
        rows, columns = self.coordinates(grid, device)
        row_angles = torch.outer(rows, frequencies).unsqueeze(1).expand(-1, grid[1], -1)  # [h, w, d/4]
        column_angles = torch.outer(columns, frequencies).unsqueeze(0).expand(grid[0], -1, -1)
        return torch.cat([row_angles, column_angles] * 2, dim=-1).flatten(0, 1)

    def coordinates(self, grid: tuple[int, int], device: torch.device) -> list[Tensor]:
        """Return the coordinates of rows `[h]` and of columns `[w]`: centers in [-1, 1], or indices on `rope_grid`."""
        numbers = [torch.arange(size, device=device) for size in grid]
        if self.config.rope_coordinates == "centered":
            return [(2 * number + 1) / size - 1 for number, size in zip(numbers, grid, strict=True)]
        indices = [number + float(self.config.rope_offset) for number in numbers]
        if self.config.rope_grid is None:
            return indices
        own_grid = pair("rope_grid", self.config.rope_grid)
        return [index / size * own for index, size, own in zip(indices, grid, own_grid, strict=True)]


class HFViTLearnedRotaryPositions(HFViTRotaryPositions, HFViTLearnedPositions):
    """Add learned vectors at the input, and rotate queries and keys (EVA-02, arXiv:2303.11331)."""


def rotate(states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate `[B, A, T, d]`: dimensions i and i + d/2 are the coordinates of one plane."""
    cosines, sines = rotation
    first, second = states.chunk(2, dim=-1)
    return states * cosines + torch.cat([-second, first], dim=-1) * sines


POSITIONS: dict[str, type[HFViTNoPositions]] = {
    "learned": HFViTLearnedPositions,
    "learned_2d": HFViTLearned2DPositions,
    "sincos_2d": HFViTSinCos2DPositions,
    "relative": HFViTRelativePositions,
    "rotary": HFViTRotaryPositions,
    "learned_rotary": HFViTLearnedRotaryPositions,
    "none": HFViTNoPositions,
}
POSITIONS_OF_LAYERS: dict[str, type[HFViTNoPositions]] = {
    "learned": HFViTLayerPositions,
    "learned_2d": HFViTLayer2DPositions,
}


class ResamplePositions(ConversionOps):
    """Resample a position table of a checkpoint to the grid of the model that loads it."""

    def convert(self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **kwargs: Any) -> dict:
        (stored,) = input_dict.values()
        table = stored[0] if isinstance(stored, list) else stored
        name, model = kwargs["full_layer_name"], kwargs["model"]
        _, rows, columns, _ = model.get_parameter(name).shape
        if not table.numel():  # sharded along its first dimension, which is often 1: this rank may hold no row
            return {name: table.new_empty(table.shape[0], rows, columns, table.shape[3])}
        # The model may be another one, such as DETR with ours as its backbone, and has another config then.
        config = model.get_submodule(name.rpartition(".position_embeddings.")[0]).config
        return {name: resample_table(table, (rows, columns), config.position_interpolation)}

    @property
    def reverse_op(self) -> "ConversionOps":
        return self  # saving does not resample
