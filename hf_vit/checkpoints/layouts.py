"""Conversion of tensors between other layouts and ours: reversible steps, and tables of names that use them.

A family is a table of rows: our names, theirs, and the layout between them. `{}` stands for the number of a layer, `*`
for `weight` and `bias`. Rows of tensors that an architecture does not have are skipped, so that one table serves every
architecture of a family in both directions.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.configuration_hf_vit import HFViTConfig


@dataclass(frozen=True)
class Layout:
    """A reversible step: `read` converts their tensors to ours, `write` ours to theirs. Values do not change."""

    read: Callable[[list[Tensor]], list[Tensor]]
    write: Callable[[list[Tensor]], list[Tensor]]

    def then(self, other: "Layout") -> "Layout":
        """Return the step that reads with this one first, and writes with it last."""
        return Layout(
            lambda theirs: other.read(self.read(theirs)),
            lambda ours: self.write(other.write(ours)),
        )


def each(read: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor]) -> Layout:
    """Return the step that converts every tensor of a row in the same way."""
    return Layout(
        lambda theirs: [read(tensor) for tensor in theirs],
        lambda ours: [write(tensor) for tensor in ours],
    )


def same(config: HFViTConfig) -> Layout:
    """Leave tensors as they are."""
    return each(lambda tensor: tensor, lambda tensor: tensor)


def reshaped(ours: Sequence[int], theirs: Sequence[int]) -> Layout:
    """Change only the shape."""
    return each(lambda tensor: tensor.reshape(*ours), lambda tensor: tensor.reshape(*theirs))


def convolution(config: HFViTConfig) -> Layout:
    """Convert the patch convolution `[D, C, ph, pw]` to a matrix `[D, C*ph*pw]`."""
    return each(lambda kernel: kernel.flatten(1), lambda matrix: matrix.unflatten(1, (-1, *config.patch_shape)))


def channels_first(config: HFViTConfig) -> Layout:
    """Reorder the pixels of a patch in the last dimension from (row, column, channel) to (channel, row, column)."""
    patch, channels = config.patch_shape, config.num_channels
    return each(
        lambda theirs: theirs.unflatten(-1, (*patch, channels)).movedim(-1, -3).flatten(-3),
        lambda ours: ours.unflatten(-1, (channels, *patch)).movedim(-3, -1).flatten(-3),
    )


def token(config: HFViTConfig) -> Layout:
    """Convert a token that is stored as `[D]` to `[1, 1, D]`."""
    return reshaped((1, 1, config.hidden_size), (config.hidden_size,))


def heads_first(config: HFViTConfig, parts: int = 3) -> Layout:
    """Convert concatenated queries, keys and values, `[parts*A*d, ...]`, to rows ordered (head, part, d)."""
    return packed(parts).then(heads_together(config, parts))


def packed(parts: int) -> Layout:
    """Split a tensor of `parts` blocks of rows into `parts` tensors."""
    return Layout(
        lambda theirs: list(theirs[0].chunk(parts)),
        lambda ours: [torch.cat(ours)],
    )


def heads_together(config: HFViTConfig, parts: int = 3) -> Layout:
    """Convert queries, keys and values in separate tensors, `[A*d, ...]` each, to rows ordered (head, part, d)."""
    heads = config.num_attention_heads if parts == 3 else config.pooling_heads  # attention pooling has no queries here

    def read(theirs: list[Tensor]) -> list[Tensor]:
        return [torch.stack([part.unflatten(0, (heads, -1)) for part in theirs], dim=1).flatten(0, 2)]

    def write(ours: list[Tensor]) -> list[Tensor]:
        return [part.flatten(0, 1) for part in ours[0].unflatten(0, (heads, parts, -1)).unbind(1)]

    return Layout(read, write)


def rotated_pairs(config: HFViTConfig, columns_first: bool = False) -> Layout:
    """Reorder queries, keys and values for rotary positions, from adjacent pairs to pairs (i, i + d/2), rows first.

    Each half of a head, for the row and for the column, has one angle per pair. Attention does not depend on the order
    of the dimensions of queries and keys.
    """
    heads = config.num_attention_heads

    def read(theirs: list[Tensor]) -> list[Tensor]:
        query, key, value = theirs
        cells = [part.unflatten(0, (heads, 2, -1, 2)) for part in (query, key)]  # [A, axis, angle, pair, ...]
        cells = [part.flip(1) for part in cells] if columns_first else cells
        return [*(part.movedim(3, 1).flatten(0, 3) for part in cells), value]

    def write(ours: list[Tensor]) -> list[Tensor]:
        query, key, value = ours
        cells = [part.unflatten(0, (heads, 2, 2, -1)).movedim(1, 3) for part in (query, key)]
        cells = [part.flip(1) for part in cells] if columns_first else cells
        return [*(part.flatten(0, 3) for part in cells), value]

    return Layout(read, write)


def halves(config: HFViTConfig) -> Layout:
    """Split a projection of the gate and the hidden layer of an MLP, the gate first."""
    return packed(2)


def positions(config: HFViTConfig) -> Layout:
    """Split a table of all positions `[1, P+N, D]` into tables of prefix `[1, P, D]` and grid `[1, h, w, D]`.

    The grid is the config's. Without prefix positions, there is only the grid's table.
    """
    prefix, grid = config.num_prefix_positions or 0, config.grid_size

    def read(theirs: list[Tensor]) -> list[Tensor]:
        table = theirs[0].reshape(1, -1, theirs[0].shape[-1])
        of_grid = table[:, prefix:].unflatten(1, grid)
        return [table[:, :prefix], of_grid] if prefix else [of_grid]

    def write(ours: list[Tensor]) -> list[Tensor]:
        return [torch.cat([*ours[:-1], ours[-1].flatten(1, 2)], dim=1)]

    return Layout(read, write)


def flat_positions(config: HFViTConfig) -> Layout:
    """Split a table of all positions that is stored as `[P+N, D]`, like `positions`."""
    width = config.hidden_size
    return reshaped((1, -1, width), (-1, width)).then(positions(config))


# --------------------------------------------------------------------------------------------------- tables of names


class Row(NamedTuple):
    """A row of a family's table: our names, theirs, and a function from a config to the layout between them."""

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    layout: Callable[[HFViTConfig], Layout] = same


class Rule(NamedTuple):
    """A row for one layer, and for weights or biases."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: Layout


def rules_of(
    table: Iterable[Row], config: HFViTConfig, names: Iterable[str], available: Collection[str] = ()
) -> list[Rule]:
    """Apply a family's table to an architecture.

    Args:
        table: Rows with the names of `HFViTModel` and of the heads. If several rows have the same names of ours, from
            several eras, the one with the largest share of `available` names is used; the first one on a tie.
        config: The architecture, with the grid of the tensors.
        names: Names of all parameters of the model; a row without any of them is skipped.
        available: Names in the file, when reading.

    Raises:
        AssertionError: If a parameter has no row, because the table lacks a feature of the config.
    """
    # Models with a head have the encoder under this name; the tables omit it.
    full_names = {name.removeprefix("vit."): name for name in names}
    candidates = [rules for row in table if (rules := _expand(row, config, full_names))]
    candidates.sort(key=lambda rules: -_share_available(rules, available))  # stable: the table's order breaks ties
    result: list[Rule] = []
    covered: set[str] = set()
    for rule in chain.from_iterable(candidates):
        if not covered.intersection(rule.ours):
            covered.update(rule.ours)
            result.append(rule)
    missing = set(full_names.values()) - covered
    assert not missing, f"The table has no row for {sorted(missing)}."
    return result


def _expand(row: Row, config: HFViTConfig, full_names: dict[str, str]) -> list[Rule]:
    """Return the rules of a row: one for each layer, and for weights and biases, that the model has."""
    ours, theirs = ((names,) if isinstance(names, str) else names for names in (row.ours, row.theirs))
    rules = []
    for layer in range(config.num_hidden_layers) if "{}" in "".join(ours) else (None,):
        for kind in ("weight", "bias") if "*" in "".join(ours) else (None,):
            present = [full_names[name] for name in (_fill(name, layer, kind) for name in ours) if name in full_names]
            if present:
                rules.append(
                    Rule(tuple(present), tuple(_fill(name, layer, kind) for name in theirs), row.layout(config))
                )
    return rules


def _share_available(rules: list[Rule], available: Collection[str]) -> float:
    needed = [name for rule in rules for name in rule.theirs]
    return sum(name in available for name in needed) / len(needed)


def _fill(name: str, layer: int | None, kind: str | None) -> str:
    if layer is not None:
        name = name.replace("{}", str(layer))
    return name if kind is None else name.replace("*", kind)


def grid_of_table(
    number: int, patch_size: tuple[int, int], image_size: tuple[int, int] | None, what: str
) -> tuple[int, int]:
    """Return the grid of a table of `number` positions: that of `image_size` if it fits, else a square.

    Raises:
        ValueError: If neither fits.
    """
    if image_size is not None:
        grid = (image_size[0] // patch_size[0], image_size[1] // patch_size[1])
        if grid[0] * grid[1] == number:
            return grid
    if not is_square(number):
        raise ValueError(f"{what} has {number} positions, which are not a square grid: pass --image-size HxW.")
    return isqrt(number), isqrt(number)


def is_square(number: int) -> bool:
    """Return whether `number` patches can form a square grid."""
    return isqrt(number) ** 2 == number


def count(names: Iterable[str], template: str, first: int = 0) -> int:
    """Return how many consecutive numbers from `first` on make `template` the beginning of a name."""
    names, number = list(names), first
    while any(name.startswith(template.format(number)) for name in names):
        number += 1
    return number - first


def resample_patch_projection(weight: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample a patch projection so that resized patches give the same tokens (FlexiViT, arXiv:2212.08013, sec. 3.4).

    The pseudo-inverse of the bilinear resize is applied to the weights. Tokens of larger patches are equal, those of
    smaller patches are the closest in the least-squares sense.

    Args:
        weight: `[D, C*ph*pw]`; computed in float64, returned in its dtype.
        old: `(height, width)` of its patches in pixels.
        new: `(height, width)` of the new patches in pixels.

    Returns:
        `[D, C*h*w]` for the new patches.
    """
    if new == old:
        return weight
    pixels = torch.eye(old[0] * old[1], dtype=torch.float64).view(-1, 1, *old)
    resize = F.interpolate(pixels, size=new, mode="bilinear").flatten(1).T  # [new pixels, old pixels]
    kernels = weight.double().unflatten(1, (-1, old[0] * old[1]))  # [D, C, old pixels]
    return (kernels @ torch.linalg.pinv(resize)).flatten(1).to(weight.dtype)


def adapt_channels(weight: Tensor, old: int, new: int) -> Tensor:
    """Adapt a patch projection to another number of channels.

    For one channel, the filters of all channels are summed, which is equivalent to repeating a gray image. For other
    numbers, the filters are repeated in order and scaled by `old / new`, as timm does (timm/models/_manipulate.py,
    `adapt_input_conv`).

    Args:
        weight: `[D, C*ph*pw]`; computed in float64, returned in its dtype.
        old: Number of channels of the weight.
        new: Number of channels of the result.
    """
    kernels = weight.double().unflatten(1, (old, -1))  # [D, C, ph*pw]
    chosen = kernels.sum(1, keepdim=True) if new == 1 else kernels[:, torch.arange(new) % old] * (old / new)
    return chosen.flatten(1).to(weight.dtype)
