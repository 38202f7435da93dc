"""A model, layer by layer: what each gives, and what the softmax of its attention is taken of.

Fused kernels never form attention weights, so these are formed here, from the queries and keys that the layer has just
used: whatever made them, positions included, is in them. Nothing is kept from one layer to the next.
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
    """Queries and keys of an attention, `[B, A, T, d]`, and the bias of its scores, `[B or 1, A, T, T]`, if any."""

    query: Tensor
    key: Tensor
    bias: Tensor | None
    scaling: float

    def weights(self, queries: slice = ALL, keys: slice = ALL, heads: slice = ALL) -> Tensor:
        """Return the attention weights of a part, float32 `[B, heads, queries, keys]`; every row sums to one."""
        query, key = self.query[:, heads, queries].float(), self.key[:, heads, keys].float()
        scores = query @ key.transpose(2, 3) * self.scaling
        if self.bias is not None:
            scores = scores + self.bias[:, heads, queries, keys]
        return scores.softmax(dim=-1)

    def of_heads(self, queries: slice = ALL, keys: slice = ALL, heads: slice = ALL) -> Iterator[Tensor]:
        """Yield the weights of one head after the other, `[B, queries, keys]`."""
        for head in range(self.key.shape[1])[heads]:
            yield self.weights(queries, keys, slice(head, head + 1)).squeeze(1)

    def average(self, heads: slice = ALL) -> Tensor:
        """Return the weights averaged over heads, `[B, T, T]`, of which one at a time is in memory."""
        total, number = torch.zeros(()), 0
        for weights in self.of_heads(heads=heads):
            total, number = total.to(weights.device) + weights, number + 1
        return total / number


class Step(NamedTuple):
    """A layer that was passed: its number from 1, the tokens that it gives, `[B, T, D]`, and its attention."""

    number: int
    tokens: Tensor
    scores: Scores


@torch.no_grad()
def walk(model: Any, pixel_values: Tensor, last: int | None = None) -> Iterator[Step]:
    """Yield the layers of a model as images pass them, up to number `last`; in evaluation, without gradients.

    Args:
        model: Any model class of this package, with any attention implementation.
        pixel_values: `[B, C, H, W]`, of any size that the patch divides.

    Raises:
        ValueError: If the model's layers are not as they were loaded, or the images are none of its.
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
    """Return a layer by its number from 1, or negative from the end, as images pass it; arguments as for `walk`."""
    return deque(walk(model, pixel_values, layer_number(model, layer)), maxlen=1).pop()


def plain_encoder(model: Any) -> Any:
    """Return the encoder of a model whose layers can be walked."""
    if not isinstance(model, HFViTPreTrainedModel):
        raise ValueError(
            f"Expected a model of this package, got {type(model).__name__}: inspect it before it is wrapped, "
            "compiled or optimized for inference."
        )
    encoder: Any = model.base_model
    for layer in encoder.layers:
        if type(layer) is not HFViTLayer:
            raise ValueError(
                f"Expected HFViTLayer as it was loaded, got {type(layer).__name__}: inspect the model before it is "
                "sharded, and undo merged tokens by merge_tokens(model, 0)."
            )
    return encoder


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation, and every part of it back to what it was."""
    trained = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in trained:
            part.training = True


@contextmanager
def recording(attention: Any) -> Iterator[list[Scores]]:
    """Have an attention leave its scores in a list when it is called; it computes as before."""
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
    """Return the number of a layer, from 1; a negative one counts from the end.

    Raises:
        ValueError: If there is no such layer.
    """
    layers = model.config.num_hidden_layers
    if not 1 <= abs(layer) <= layers:
        raise ValueError(f"There are layers 1 to {layers}, or -1 to -{layers} from the end; got {layer}.")
    return layer if layer > 0 else layers + 1 + layer


def head_number(model: Any, head: int) -> int:
    """Return the number of a head, from 1.

    Raises:
        ValueError: If there is no such head.
    """
    heads = model.config.num_attention_heads
    if not 1 <= head <= heads:
        raise ValueError(f"There are heads 1 to {heads}; got {head}.")
    return head


def layer_numbers(model: Any, layers: Iterable[int] | None) -> list[int]:
    """Return the numbers of several layers, in order; of all if not given."""
    if layers is None:
        return list(range(1, model.config.num_hidden_layers + 1))
    numbers = sorted({layer_number(model, layer) for layer in layers})
    if not numbers:
        raise ValueError("layers is empty: name at least one, or leave it out for all.")
    return numbers


def grid_of(model: Any, pixel_values: Tensor) -> tuple[int, int]:
    """Return the (rows, columns) of patches in images."""
    return model.config.grid_of(*pixel_values.shape[-2:])
