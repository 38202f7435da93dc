"""Where a model looks: attention weights, how far they reach, and what they bring together through the layers.

Dosovitskiy et al. 2021 (arXiv:2010.11929), figures 6, 7, 11 and 14; Abnar and Zuidema, "Quantifying Attention Flow in
Transformers" (arXiv:2005.00928) for the rollout. Weights are formed one layer at a time, whatever kernel the model
attends with.
"""

from collections.abc import Iterable, Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.pooling_hf_vit import POOLINGS, HFViTAttentionPooling, HFViTMeanPooling, HFViTPatchAttentionPooling
from .drawing import BLUE, INK, ORANGE, bare, new_figure, plain, whole_numbers
from .layers import ALL, Scores, at_layer, grid_of, head_number, layer_number, layer_numbers, plain_encoder, walk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# From where `attention_rollout` looks: what the pooling reads.
READ_BY = {
    "cls": "the class token",
    "mean": "the mean of the patches",
    "mean_all": "the mean of all tokens",
    "attention": "the query of the attention pooling",
    "attention_patches": "the query of the attention pooling",
    "cls_and_mean": "the class token and the mean of the patches, half each",
    "cls_and_distillation": "the class and the distillation token, half each",
}


def attention_weights(
    model: Any, pixel_values: Tensor, layers: Iterable[int] | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number of a layer and its attention weights, float32 `[B, A, T, T]`: rows are queries, and sum to one.

    Tokens are ordered class token, distillation token, registers, patches row by row. A layer's weights are formed
    when it is its turn, and not kept.

    Args:
        model: Any model class of this package, with any attention implementation.
        pixel_values: `[B, C, H, W]`, of any size that the patch divides.
        layers: Numbers from 1, negative from the end; all if not given. They come in the order of the model.

    Raises:
        ValueError: If there is no such layer.
    """
    numbers = layer_numbers(model, layers)
    for step in walk(model, pixel_values, numbers[-1]):
        if step.number in numbers:
            yield step.number, step.scores.weights().cpu().numpy()


# ---------------------------------------------------------------------------------------------------- distance


def patch_distances(grid: tuple[int, int], patch_shape: tuple[int, int]) -> Tensor:
    """Return the distances between the centres of all patches, `[N, N]` in pixels."""
    rows, columns = (torch.arange(number) * float(side) for number, side in zip(grid, patch_shape, strict=True))
    centres = torch.cartesian_prod(rows, columns)  # [N, 2]
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def uniform_distance(grid: tuple[int, int], patch_shape: tuple[int, int]) -> float:
    """Return the mean distance, in pixels, of attention that looks at all patches alike."""
    return float(patch_distances(grid, patch_shape).mean())


@torch.no_grad()
def attention_distance(model: Any, batches: Iterable[Tensor]) -> np.ndarray:
    """Return how far each head looks, `[layers, A]` in pixels: the right of the paper's figure 7.

    It is the distance between the centres of patches, weighted by attention from patch to patch, and averaged over
    queries and images. What a patch gives to tokens that lie nowhere is left out, and the rest weighs 1 again.

    Args:
        model: Any model class of this package.
        batches: Images `[B, C, H, W]`, each batch of any size that the patch divides; one head of one batch is in
            memory at a time, B * N^2 numbers.

    Raises:
        ValueError: If there is no image.
    """
    config = plain_encoder(model).config
    patches = slice(config.num_prefix_tokens, None)
    totals, number = np.zeros((config.num_hidden_layers, config.num_attention_heads)), 0
    for pixel_values in batches:
        distances = patch_distances(grid_of(model, pixel_values), config.patch_shape).to(model.device)
        for step in walk(model, pixel_values):
            # Among patches alone the softmax is what is left of the whole one, brought to 1 again.
            for head, weights in enumerate(step.scores.of_heads(patches, patches)):
                of_queries = torch.einsum("bqk,qk->bq", weights, distances)
                totals[step.number - 1, head] += of_queries.mean(dim=1).sum().item()
        number += len(pixel_values)
    if not number:
        raise ValueError("Attention distance is measured on images, and there is none: give at least one batch.")
    return (totals / number).astype(np.float32)


def plot_attention_distance(
    distance: np.ndarray, uniform: float | None = None, title: str = "Attention distance by layer and head"
) -> "Figure":
    """Draw a dot for every head of every layer, `[layers, A]` in pixels, and the mean of each layer.

    Args:
        uniform: Distance of attention that looks at all patches alike, drawn as a line to compare with.
    """
    layers, heads = distance.shape
    numbers = np.arange(1, layers + 1)
    figure = new_figure(min(11.0, 5.0 + 0.12 * layers), 4.3)
    axis = bare(figure.subplots())
    # Heads of a layer lie side by side, so that none hides another.
    beside = np.linspace(-0.18, 0.18, heads) if heads > 1 else np.zeros(1)
    places = (numbers[:, None] + beside).ravel()
    axis.scatter(places, distance.ravel(), s=16, color=BLUE, alpha=0.65, lw=0, label="a head")
    axis.plot(numbers, distance.mean(axis=1), color=ORANGE, lw=1.6, marker="_", ms=9, label="mean of the heads")
    if uniform is not None:
        axis.axhline(uniform, color=INK, lw=1, ls=(0, (4, 3)), label="all patches alike")
    axis.set(xlabel="layer", ylabel="mean attention distance, pixels", xlim=(0.5, layers + 0.5))
    axis.set_ylim(0, 1.08 * max(float(distance.max()), uniform or 0) or 1)
    whole_numbers(axis)
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=3, fontsize=8)
    figure.suptitle(plain(title), fontsize=12, color=INK)
    return figure


# ----------------------------------------------------------------------------------------------------- rollout


def rollout(averages: Iterable[Tensor]) -> Tensor:
    """Multiply attention through the layers, from the first to the last: `[B, T, T]` each to `[B, T, T]`.

    Each is averaged over heads, as the paper does. Half of every token comes by the residual connection, the other
    half by attention: the identity is added, and every row is brought to the sum 1.
    """
    return reduce(lambda below, layer: layer @ below, map(_with_residual, averages))


def _with_residual(average: Tensor) -> Tensor:
    mixed = average + torch.eye(average.shape[-1], device=average.device)
    return mixed / mixed.sum(dim=-1, keepdim=True)


@torch.no_grad()
def attention_rollout(model: Any, pixel_values: Tensor, layer: int = -1, head: int | None = None) -> np.ndarray:
    """Return how much of each patch reaches what the head reads, `[B, h, w]`: figures 6 and 14 of the paper.

    The view is from what the pooling reads, see `READ_BY`: from the class token, where there is one to read. Without a
    pooling layer, attention pooling counts as the mean of the patches. Values are shares of 1, of which the tokens
    before the patches have the rest.

    Args:
        model: Any model class of this package.
        pixel_values: `[B, C, H, W]`, of any size that the patch divides.
        layer: The last one to go through, as if it were the model's; number from 1, or negative from the end.
        head: The one of that layer to follow, number from 1; the layers below are averaged over heads in any case, and
            the mean over all heads of what this gives is what it gives without.

    Raises:
        ValueError: If there is no such layer or head.

    Example:
        >>> from hf_vit import HFViTModel
        >>> from hf_vit.variants import config_of
        >>> model = HFViTModel(config_of("ViT-Ti/16", num_hidden_layers=2)).eval()
        >>> attention_rollout(model, torch.rand(1, 3, 96, 128)).shape
        (1, 6, 8)
    """
    number = layer_number(model, layer)
    heads = ALL if head is None else slice(head_number(model, head) - 1, head)
    tokens = torch.empty(0)

    def averages() -> Iterator[Tensor]:
        nonlocal tokens
        for step in walk(model, pixel_values, number):
            tokens = step.tokens
            yield step.scores.average(heads if step.number == number else ALL)

    product = rollout(averages())
    seen = (_tokens_read(model.base_model, tokens).unsqueeze(1) @ product).squeeze(1)  # [B, T]
    return _on_grid(model, pixel_values, seen)


def _tokens_read(encoder: Any, tokens: Tensor) -> Tensor:
    """Return the share that each token has in what the pooling reads of `[B, T, D]`, `[B or 1, T]`."""
    config, number = encoder.config, tokens.shape[1]
    if encoder.pooler is not None:
        pooling = encoder.pooler.pooling
        if isinstance(pooling, HFViTAttentionPooling):
            return _read_by_attention(pooling, encoder.layernorm(tokens))
    else:
        kind = POOLINGS[config.pooling]
        pooling = HFViTMeanPooling(config) if issubclass(kind, HFViTAttentionPooling) else kind(config)
    # All others are sums over tokens: what they make of the identity is the share of each.
    shares = pooling(torch.eye(number, device=tokens.device).unsqueeze(0))  # [1, T], or [1, 2*T] of two halves
    return shares.unflatten(1, (-1, number)).mean(dim=1)


def _read_by_attention(pooling: HFViTAttentionPooling, tokens: Tensor) -> Tensor:
    left_out = pooling.num_prefix_tokens if isinstance(pooling, HFViTPatchAttentionPooling) else 0
    query = pooling.query(pooling.probe).unflatten(-1, (-1, pooling.head_dim)).transpose(1, 2)  # [1, A, 1, d]
    keys_and_values = pooling.key_value(tokens[:, left_out:]).unflatten(-1, (-1, 2, pooling.head_dim))
    key = keys_and_values[:, :, :, 0].transpose(1, 2)  # [B, A, T, d]
    weights = Scores(query, key, None, pooling.head_dim**-0.5).average().squeeze(1)
    return F.pad(weights, (left_out, 0))


# -------------------------------------------------------------------------------------------------------- maps


@torch.no_grad()
def attention_maps(model: Any, pixel_values: Tensor, layer: int = -1) -> np.ndarray:
    """Return how much each head of a layer looks at each patch, `[B, A, h, w]`, seen from the class token.

    A model without class token is seen from all its patches, averaged. Values are shares of 1, of which the tokens
    before the patches have the rest.

    Args:
        model: Any model class of this package.
        pixel_values: `[B, C, H, W]`, of any size that the patch divides.
        layer: Number from 1, or negative from the end.

    Raises:
        ValueError: If there is no such layer.
    """
    scores = at_layer(model, pixel_values, layer).scores
    queries = slice(0, 1) if model.config.use_cls_token else slice(model.config.num_prefix_tokens, None)
    weights = torch.stack([head.mean(dim=1) for head in scores.of_heads(queries)], dim=1)  # [B, A, T]
    return _on_grid(model, pixel_values, weights)


def _on_grid(model: Any, pixel_values: Tensor, of_tokens: Tensor) -> np.ndarray:
    """Bring values of tokens, `[..., T]`, to the grid of patches, `[..., h, w]`."""
    of_patches = of_tokens[..., model.config.num_prefix_tokens :]
    return of_patches.unflatten(-1, grid_of(model, pixel_values)).cpu().numpy()
