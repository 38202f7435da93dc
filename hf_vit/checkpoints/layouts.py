"""How tensors of other layouts become ours and back: small reversible steps, and tables of names that use them.

A family is a table of rows: our names, theirs, and the layout between. `{}` stands for the number of a layer, `*` for
`weight` and `bias`. What the config does not have drops out, so that one table serves every architecture of a family
in both directions.
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
    """A reversible step: `read` makes our tensors of theirs, `write` theirs of ours. Values are never changed."""

    read: Callable[[list[Tensor]], list[Tensor]]
    write: Callable[[list[Tensor]], list[Tensor]]

    def then(self, other: "Layout") -> "Layout":
        """Return the step that reads by this one first, and writes by it last."""
        return Layout(
            lambda theirs: other.read(self.read(theirs)),
            lambda ours: self.write(other.write(ours)),
        )


def each(read: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor]) -> Layout:
    """Return the step that treats every tensor of a row alike."""
    return Layout(
        lambda theirs: [read(tensor) for tensor in theirs],
        lambda ours: [write(tensor) for tensor in ours],
    )


def same(config: HFViTConfig) -> Layout:
    """Leave tensors as they are."""
    return each(lambda tensor: tensor, lambda tensor: tensor)


def reshaped(ours: Sequence[int], theirs: Sequence[int]) -> Layout:
    """Change the shape alone."""
    return each(lambda tensor: tensor.reshape(*ours), lambda tensor: tensor.reshape(*theirs))


def convolution(config: HFViTConfig) -> Layout:
    """Patches: a convolution's `[D, C, ph, pw]` to a matrix `[D, C*ph*pw]`."""
    return each(lambda kernel: kernel.flatten(1), lambda matrix: matrix.unflatten(1, (-1, *config.patch_shape)))


def heads_first(config: HFViTConfig, parts: int = 3) -> Layout:
    """Queries, keys and values one behind the other, `[parts*A*d, ...]`, to rows ordered (head, part, d)."""
    return packed(parts).then(heads_together(config, parts))


def packed(parts: int) -> Layout:
    """One tensor of `parts` blocks of rows to as many tensors."""
    return Layout(
        lambda theirs: list(theirs[0].chunk(parts)),
        lambda ours: [torch.cat(ours)],
    )


def heads_together(config: HFViTConfig, parts: int = 3) -> Layout:
    """Queries, keys and values in tensors of their own, `[A*d, ...]` each, to rows ordered (head, part, d)."""
    heads = config.num_attention_heads

    def read(theirs: list[Tensor]) -> list[Tensor]:
        return [torch.stack([part.unflatten(0, (heads, -1)) for part in theirs], dim=1).flatten(0, 2)]

    def write(ours: list[Tensor]) -> list[Tensor]:
        return [part.flatten(0, 1) for part in ours[0].unflatten(0, (heads, parts, -1)).unbind(1)]

    return Layout(read, write)


def halves(config: HFViTConfig) -> Layout:
    """The gate and the hidden layer of an MLP in one projection, the gate first."""
    return packed(2)


def positions(config: HFViTConfig) -> Layout:
    """One table of all positions, `[1, P+N, D]`, to those of the prefix `[1, P, D]` and of the grid `[1, h, w, D]`.

    Reads the grid that the config is given; without positions of the prefix there is the grid's table alone.
    """
    prefix, grid = config.num_prefix_positions or 0, config.grid_size

    def read(theirs: list[Tensor]) -> list[Tensor]:
        table = theirs[0].reshape(1, -1, theirs[0].shape[-1])
        of_grid = table[:, prefix:].unflatten(1, grid)
        return [table[:, :prefix], of_grid] if prefix else [of_grid]

    def write(ours: list[Tensor]) -> list[Tensor]:
        return [torch.cat([*ours[:-1], ours[-1].flatten(1, 2)], dim=1)]

    return Layout(read, write)


# --------------------------------------------------------------------------------------------------- tables of names


class Row(NamedTuple):
    """A line of a family's table: our names, theirs, and the layout between them, made for a config."""

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    layout: Callable[[HFViTConfig], Layout] = same


class Rule(NamedTuple):
    """A row for one layer and one kind of tensor."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: Layout


def rules_of(
    table: Iterable[Row], config: HFViTConfig, names: Iterable[str], available: Collection[str] = ()
) -> list[Rule]:
    """Apply a family's table to an architecture.

    Args:
        table: Rows with our names as `HFViTModel` and the heads have them. Of several rows for the same names, which
            are names of several eras, that one counts of which most are available, the first if all are alike.
        config: The architecture, on the grid that the tensors have.
        names: Names of all parameters of the model; a row without any of them drops out.
        available: Names in the file, for reading.

    Raises:
        AssertionError: If a parameter has no row: the table does not know a feature that the config has.
    """
    # The heads keep the encoder under this name; the tables leave it out.
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
    """Return the rules of a row: one for each layer and kind of tensor that the model has."""
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
    """Return the grid of a table that does not say its own: that of the stated image if it fits, else the square,
    the only guess that all sources make.

    Raises:
        ValueError: If `number` is neither.
    """
    if image_size is not None:
        grid = (image_size[0] // patch_size[0], image_size[1] // patch_size[1])
        if grid[0] * grid[1] == number:
            return grid
    if not is_square(number):
        raise ValueError(f"{what} has {number} places, which is no square: pass --image-size HxW.")
    return isqrt(number), isqrt(number)


def is_square(number: int) -> bool:
    """Say whether `number` cells can be a square grid."""
    return isqrt(number) ** 2 == number


def count(names: Iterable[str], template: str, first: int = 0) -> int:
    """Return how many numbers, from `first` on, put into `template` for `{}`, begin a name."""
    names, number = list(names), first
    while any(name.startswith(template.format(number)) for name in names):
        number += 1
    return number - first


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
