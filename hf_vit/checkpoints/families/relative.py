"""Relative positions of BEiT (arXiv:2106.08254) and timm: a table of biases by offset, for every layer or for all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...model.configuration_hf_vit import HFViTConfig
from ..layouts import Layout, Row

RELATIVE = ("embeddings.position_embeddings.prefix", "embeddings.position_embeddings.offsets.weight")
BIASES = "relative_position_bias_table"


def relative_rows(of_layers: Sequence[str], shared: str) -> list[Row]:
    """Return the rows of BEiT's relative positions: tables of the layers, one for all, or both, which are added."""
    return [
        Row(RELATIVE, (*of_layers, shared), added_offsets),
        Row(RELATIVE, tuple(of_layers), offsets),
        Row(RELATIVE, shared, shared_offsets),
    ]


def offsets(config: HFViTConfig) -> Layout:
    """Convert biases per offset `[(2h-1)*(2w-1) + 3, A]`, a table per layer or for all, to `[layers, 2h-1, 2w-1, A]`.

    With a class token, it has the last three rows, in our order: class token to patches, patches to it, and to itself.
    """
    rows, columns = config.grid_size
    layers, prefix = config.num_hidden_layers, 3 if config.num_prefix_positions else 0

    def read(theirs: list[Tensor]) -> list[Tensor]:
        tables = torch.stack(theirs).expand(layers, -1, -1)
        number = tables.shape[1] - prefix
        of_grid = tables[:, :number].unflatten(1, (2 * rows - 1, 2 * columns - 1))
        return [tables[:, number:], of_grid] if prefix else [of_grid]

    def write(ours: list[Tensor]) -> list[Tensor]:
        return list(torch.cat([ours[-1].flatten(1, 2), *ours[:-1]], dim=1).unbind(0))

    return Layout(read, write)


def shared_offsets(config: HFViTConfig) -> Layout:
    """Convert biases per offset that all layers share.

    Raises:
        ValueError: When writing layers with different biases.
    """
    joined = offsets(config)

    def write(ours: list[Tensor]) -> list[Tensor]:
        first, *others = joined.write(ours)
        if any(not torch.equal(first, other) for other in others):
            raise ValueError("Relative positions differ between layers, so they cannot be stored as one shared table.")
        return [first]

    return Layout(joined.read, write)


def added_offsets(config: HFViTConfig) -> Layout:
    """Convert biases per offset of every layer, and add the biases that all layers share."""
    joined = offsets(config)

    def read(theirs: list[Tensor]) -> list[Tensor]:
        return joined.read([of_layer + theirs[-1] for of_layer in theirs[:-1]])

    def write(ours: list[Tensor]) -> list[Tensor]:
        of_layers = joined.write(ours)
        return [*of_layers, torch.zeros_like(of_layers[0])]

    return Layout(read, write)
