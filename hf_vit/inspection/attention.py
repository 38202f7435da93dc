"""Attention of a model: its weights, the distance that they span, and their rollout through the layers.

Dosovitskiy et al. 2021 (arXiv:2010.11929), figures 6, 7, 11 and 14; Abnar and Zuidema, "Quantifying Attention Flow in
Transformers" (arXiv:2005.00928) for the rollout. The weights are computed one layer at a time, with any attention
implementation.
"""

from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.pooling_hf_vit import POOLINGS, HFViTAttentionPooling, HFViTMeanPooling, HFViTPatchAttentionPooling
from .drawing import BLUE, INK, ORANGE, Figure, bare, heading, new_figure, whole_numbers
from .layers import ALL, Scores, at_layer, grid_of, head_number, layer_number, layer_numbers, plain_encoder, walk

# The viewpoint of `attention_rollout`: the tokens that the pooling reads.
READ_BY = {
    "cls": "the class token",
    "mean": "the mean of the patches",
    "mean_all": "the mean of all tokens",
    "attention": "the query of the attention pooling",
    "attention_patches": "the query of the attention pooling",
    "cls_and_mean": "the class token and the mean of the patches, weighted equally",
    "cls_and_distillation": "the class token and the distillation token, weighted equally",
}


def attention_weights(
    model: Any, pixel_values: Tensor, layers: Iterable[int] | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number of each layer and its attention weights, float32 `[B, A, T, T]`; rows (queries) sum to 1.

    The order of tokens is class token, distillation token, registers, patches row by row. The weights of one layer are
    in memory at a time.

    Args:
        model: Any model class of this package, with any attention implementation.
        pixel_values: `[B, C, H, W]`, of any size that is a multiple of the patch.
        layers: Numbers from 1, negative from the end; by default all. They are yielded in the order of the model.

    Raises:
        ValueError: If there is no such layer.
    """
    numbers = layer_numbers(model, layers)
    for step in walk(model, pixel_values, numbers[-1]):
        if step.number in numbers:
            yield step.number, step.scores.weights().cpu().numpy()


# ---------------------------------------------------------------------------------------------------- distance


def patch_distances(grid: tuple[int, int], patch_shape: tuple[int, int]) -> Tensor:
    """Return the distances between the centres of all pairs of patches, `[N, N]` in pixels."""
    rows, columns = (torch.arange(number) * float(side) for number, side in zip(grid, patch_shape, strict=True))
    centres = torch.cartesian_prod(rows, columns)  # [N, 2]
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def uniform_distance(grid: tuple[int, int], patch_shape: tuple[int, int]) -> float:
    """Return the attention distance, in pixels, of attention that is uniform over patches."""
    return float(patch_distances(grid, patch_shape).mean())


@torch.no_grad()
def attention_distance(model: Any, batches: Iterable[Tensor]) -> np.ndarray:
    """Return the mean attention distance of each head, `[layers, A]` in pixels, as in the paper's figure 7, right.

    It is the distance between the centres of patches, weighted by the attention between them and averaged over queries
    and images. Attention to tokens without a position is ignored, and the rest is normalized to 1.

    Args:
        model: Any model class of this package.
        batches: Images `[B, C, H, W]`, each batch of any size that is a multiple of the patch. The weights of one head
            of one batch are in memory at a time, B * N^2 numbers.

    Raises:
        ValueError: If there is no image.
    """
    config = plain_encoder(model).config
    patches = slice(config.num_prefix_tokens, None)
    totals, number = np.zeros((config.num_hidden_layers, config.num_attention_heads)), 0
    for pixel_values in batches:
        distances = patch_distances(grid_of(model, pixel_values), config.patch_shape).to(model.device)
        for step in walk(model, pixel_values):
            # The softmax over the patches alone equals the softmax over all tokens, renormalized over the patches.
            for head, weights in enumerate(step.scores.of_heads(patches, patches)):
                of_queries = torch.einsum("bqk,qk->bq", weights, distances)
                totals[step.number - 1, head] += of_queries.mean(dim=1).sum().item()
        number += len(pixel_values)
    if not number:
        raise ValueError("Attention distance needs at least one batch of images, got none.")
    return (totals / number).astype(np.float32)


def plot_attention_distance(
    distance: np.ndarray, uniform: float | None = None, title: str = "Attention distance by layer and head"
) -> Figure:
    """Draw the attention distance of every head as a dot, `[layers, A]` in pixels, and the mean of each layer.

    Args:
        uniform: The distance of uniform attention, drawn as a line.
    """
    layers, heads = distance.shape
    numbers = np.arange(1, layers + 1)
    figure = new_figure(min(11.0, 5.0 + 0.12 * layers), 4.3)
    axis = bare(figure.subplots())
    # The heads of a layer are drawn side by side, so that none hides another.
    offsets = np.linspace(-0.18, 0.18, heads) if heads > 1 else np.zeros(1)
    x = (numbers[:, None] + offsets).ravel()
    axis.scatter(x, distance.ravel(), s=16, color=BLUE, alpha=0.65, lw=0, label="head")
    axis.plot(numbers, distance.mean(axis=1), color=ORANGE, lw=1.6, marker="_", ms=9, label="mean over heads")
    if uniform is not None:
        axis.axhline(uniform, color=INK, lw=1, ls=(0, (4, 3)), label="uniform attention")
    axis.set(xlabel="layer", ylabel="mean attention distance, pixels", xlim=(0.5, layers + 0.5))
    axis.set_ylim(0, 1.08 * max(float(distance.max()), uniform or 0) or 1)
    whole_numbers(axis)
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=3, fontsize=8)
    return heading(figure, title)


# ----------------------------------------------------------------------------------------------------- rollout


def rollout(averages: Iterable[Tensor]) -> Tensor:
    """Multiply the attention of all layers, averaged over heads, from the first to the last: `[B, T, T]`.

    The residual connection keeps half of each token: the identity is added to each layer's weights, and rows are
    normalized to 1.
    """
    return reduce(lambda below, layer: layer @ below, map(_with_residual, averages))


def _with_residual(average: Tensor) -> Tensor:
    mixed = average + torch.eye(average.shape[-1], device=average.device)
    return mixed / mixed.sum(dim=-1, keepdim=True)


@torch.no_grad()
def attention_rollout(model: Any, pixel_values: Tensor, layer: int = -1, head: int | None = None) -> np.ndarray:
    """Return how much of each patch reaches the output of the pooling, `[B, h, w]`: the paper's figures 6 and 14.

    The rollout is read at the tokens that the pooling reads, see `READ_BY`. If the model was built without its pooling
    layer, attention pooling is replaced by the mean of the patches. Values are fractions of 1; the remainder belongs
    to the tokens before the patches.

    Args:
        model: Any model class of this package.
        pixel_values: `[B, C, H, W]`, of any size that is a multiple of the patch.
        layer: The last layer to include, as if the model ended there; number from 1, or negative from the end.
        head: A head of that layer, number from 1; by default the mean over heads, as for all layers below. The mean of
            the results over all heads equals the default.

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
    """Return the weight of each token in the output of the pooling, `[B or 1, T]`, for tokens `[B, T, D]`."""
    config, number = encoder.config, tokens.shape[1]
    if encoder.pooler is not None:
        pooling = encoder.pooler.pooling
        if isinstance(pooling, HFViTAttentionPooling):
            return _read_by_attention(pooling, encoder.layernorm(tokens))
    else:
        kind = POOLINGS[config.pooling]
        pooling = HFViTMeanPooling(config) if issubclass(kind, HFViTAttentionPooling) else kind(config)
    # All other poolings are weighted sums over tokens, so pooling the identity matrix gives the weights.
    shares = pooling(torch.eye(number, device=tokens.device).unsqueeze(0))  # [1, T], or [1, 2*T] for two parts
    return shares.unflatten(1, (-1, number)).mean(dim=1)


def _read_by_attention(pooling: HFViTAttentionPooling, tokens: Tensor) -> Tensor:
    skipped = pooling.num_prefix_tokens if isinstance(pooling, HFViTPatchAttentionPooling) else 0
    query = pooling.query(pooling.probe).unflatten(-1, (-1, pooling.head_dim)).transpose(1, 2)  # [1, A, 1, d]
    keys_and_values = pooling.key_value(tokens[:, skipped:]).unflatten(-1, (-1, 2, pooling.head_dim))
    key = keys_and_values[:, :, :, 0].transpose(1, 2)  # [B, A, T, d]
    weights = Scores(query, key, None, pooling.head_dim**-0.5).average().squeeze(1)
    return F.pad(weights, (skipped, 0))


# -------------------------------------------------------------------------------------------------------- maps


@torch.no_grad()
def attention_maps(model: Any, pixel_values: Tensor, layer: int = -1) -> np.ndarray:
    """Return the attention of the class token to each patch for each head of a layer, `[B, A, h, w]`.

    Without a class token, it is the mean attention of all patches. Values are fractions of 1; the remainder belongs to
    the tokens before the patches.

    Args:
        model: Any model class of this package.
        pixel_values: `[B, C, H, W]`, of any size that is a multiple of the patch.
        layer: Number from 1, or negative from the end.

    Raises:
        ValueError: If there is no such layer.
    """
    scores = at_layer(model, pixel_values, layer).scores
    queries = slice(0, 1) if model.config.use_cls_token else slice(model.config.num_prefix_tokens, None)
    weights = torch.stack([head.mean(dim=1) for head in scores.of_heads(queries)], dim=1)  # [B, A, T]
    return _on_grid(model, pixel_values, weights)


def _on_grid(model: Any, pixel_values: Tensor, of_tokens: Tensor) -> np.ndarray:
    """Select the values of the patch tokens from those of all tokens, `[..., T]`, and return them as `[..., h, w]`."""
    of_patches = of_tokens[..., model.config.num_prefix_tokens :]
    return of_patches.unflatten(-1, grid_of(model, pixel_values)).cpu().numpy()
