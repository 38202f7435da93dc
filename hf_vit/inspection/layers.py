"""Run a model layer by layer, and return the output tokens and the attention scores of each layer.

Fused kernels do not return attention weights, so they are computed here from the queries and keys that the layer used,
which include any position encoding. Only one layer is in memory at a time.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model.modeling_hf_vit import HFViTLayer, HFViTPreTrainedModel

ALL = slice(None)


@dataclass(frozen=True)
class Scores:
    """Queries and keys of an attention layer, `[B, A, T, d]`, and any bias of its scores, `[B or 1, A, T, T]`."""

    query: Tensor
    key: Tensor
    bias: Tensor | None
    scaling: float

    def weights(self, queries: slice = ALL, keys: slice = ALL, heads: slice = ALL) -> Tensor:
        """Return the attention weights of a slice, float32 `[B, heads, queries, keys]`; rows sum to 1."""
        query, key = self.query[:, heads, queries].float(), self.key[:, heads, keys].float()
        scores = query @ key.transpose(2, 3) * self.scaling
        if self.bias is not None:
            scores = scores + self.bias[:, heads, queries, keys]
        return scores.softmax(dim=-1)

    def of_heads(self, queries: slice = ALL, keys: slice = ALL, heads: slice = ALL) -> Iterator[Tensor]:
        """Yield the weights of each head, `[B, queries, keys]`."""
        for head in range(self.key.shape[1])[heads]:
            yield self.weights(queries, keys, slice(head, head + 1)).squeeze(1)

    def average(self, heads: slice = ALL) -> Tensor:
        """Return the mean of the weights over heads, `[B, T, T]`, with one head in memory at a time."""
        total, number = torch.zeros(()), 0
        for weights in self.of_heads(heads=heads):
            total, number = total.to(weights.device) + weights, number + 1
        return total / number


class Step(NamedTuple):
    """The output of a layer: its number from 1, its tokens `[B, T, D]`, and the scores of its attention."""

    number: int
    tokens: Tensor
    scores: Scores


@torch.no_grad()
def walk(model: Any, pixel_values: Tensor, last: int | None = None) -> Iterator[Step]:
    """Run images through a model and yield each layer up to number `last`, in evaluation mode without gradients.

    Args:
        model: Any model class of this package, with any attention implementation.
        pixel_values: `[B, C, H, W]`, of any size that is a multiple of the patch.

    Raises:
        ValueError: If the model's layers were modified after loading, or the images do not fit the model.
    """
    encoder = plain_encoder(model)
    if pixel_values.ndim != 4:
        raise ValueError(f"pixel_values must be [batch, channels, height, width], got {list(pixel_values.shape)}.")
    with evaluating(encoder):
        tokens, positions = encoder.embeddings(pixel_values.to(encoder.device))
        tokens = encoder.pre_layernorm(tokens)
        for number, layer in enumerate(encoder.layers[:last]):
            tokens = positions.add_to(tokens, number)
            with recording(layer.attention) as recorded:
                tokens = layer(tokens, positions.add_to_mask(None, number), positions.rotation)
            yield Step(number + 1, tokens, recorded.pop())


def at_layer(model: Any, pixel_values: Tensor, layer: int) -> Step:
    """Run images through a model and return the step of one layer, numbered from 1, or negative from the end."""
    return deque(walk(model, pixel_values, layer_number(model, layer)), maxlen=1).pop()


def plain_encoder(model: Any) -> Any:
    """Return the encoder of a model; raise `ValueError` if its layers were modified after loading."""
    if not isinstance(model, HFViTPreTrainedModel):
        raise ValueError(
            f"Expected a model of this package, got {type(model).__name__}: inspect the model before wrapping, "
            "compiling or optimizing it."
        )
    encoder: Any = model.base_model
    for layer in encoder.layers:
        if type(layer) is not HFViTLayer:
            raise ValueError(
                f"Expected layers of type HFViTLayer, got {type(layer).__name__}: inspect the model before sharding "
                "it, and undo token merging with merge_tokens(model, 0)."
            )
    return encoder


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode, and restore the mode of each of its modules afterwards."""
    trained = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in trained:
            part.training = True


@contextmanager
def recording(attention: Any) -> Iterator[list[Scores]]:
    """Record the scores of an attention layer in a list when it is called. Its output does not change."""
    recorded: list[Scores] = []
    function_for = attention._attention_function

    def function_that_records(kwargs: Any) -> Callable:
        attend = function_for(kwargs)

        def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, bias: Any, **options: Any) -> Any:
            recorded.append(Scores(query, key, bias, options["scaling"]))
            return attend(module, query, key, value, bias, **options)

        return record

    attention._attention_function = function_that_records
    try:
        yield recorded
    finally:
        del attention._attention_function


def layer_number(model: Any, layer: int) -> int:
    """Return the number of a layer, counted from 1. A negative `layer` counts from the end.

    Raises:
        ValueError: If there is no such layer.
    """
    layers = model.config.num_hidden_layers
    if not 1 <= abs(layer) <= layers:
        raise ValueError(f"Expected a layer from 1 to {layers}, or -1 to -{layers} from the end, got {layer}.")
    return layer if layer > 0 else layers + 1 + layer


def head_number(model: Any, head: int) -> int:
    """Return the number of a head, counted from 1, if the model has such a head.

    Raises:
        ValueError: If there is no such head.
    """
    heads = model.config.num_attention_heads
    if not 1 <= head <= heads:
        raise ValueError(f"Expected a head from 1 to {heads}, got {head}.")
    return head


def layer_numbers(model: Any, layers: Iterable[int] | None) -> list[int]:
    """Return the numbers of the given layers in ascending order, by default of all layers."""
    if layers is None:
        return list(range(1, model.config.num_hidden_layers + 1))
    numbers = sorted({layer_number(model, layer) for layer in layers})
    if not numbers:
        raise ValueError("layers is empty: give at least one layer, or None for all.")
    return numbers


def grid_of(model: Any, pixel_values: Tensor) -> tuple[int, int]:
    """Return the grid of patches (rows, columns) of images."""
    return model.config.grid_of(*pixel_values.shape[-2:])
