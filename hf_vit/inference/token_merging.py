"""Token merging: every layer merges the most similar patches at inference.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv:2210.09461). It needs no training, and weights,
their names, the config and saved files do not change.

Tokens keep their order here, whereas the paper moves merged tokens to the end: this is simpler, and five trained
models lost no additional accuracy.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..model.modeling_hf_vit import HFViTAttention, HFViTLayer, HFViTPreTrainedModel
from ..model.pooling_hf_vit import (
    HFViTAttentionPooling,
    HFViTClassTokenAndMeanPooling,
    HFViTMeanOfAllPooling,
    HFViTMeanPooling,
    HFViTPatchAttentionPooling,
)
from ..model.validation_hf_vit import ROTARY

# Arguments and outputs of a forward that refer to single patches, and remedies.
REMEDIES = {
    "attention_mask": "omit it, since a merged token can contain both masked and other patches",
    "patch_grids": "pass images of one size, [batch, channels, height, width], instead of a pack",
    "output_hidden_states": "a merged token does not belong to one patch",
    "output_attentions": "a merged token does not belong to one patch",
}
ARGUMENTS = ("pixel_values", "bool_masked_pos", "attention_mask", "patch_grids")
UNDO = "merge_tokens(model, 0) turns merging off"


def match_patches(keys: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Choose the `number` most similar pairs of patches by bipartite soft matching.

    Each patch with an odd index is paired with the patch with an even index whose key has the highest cosine
    similarity.

    Args:
        keys: `[B, N, d]`, float32.
        number: Number of pairs, at most N // 2.

    Returns:
        Indices of the merged patches and of the patches that they merge into, `[B, number]` each.
    """
    with torch.autocast(keys.device.type, enabled=False):  # bf16 cannot distinguish most pairs
        directions = F.normalize(keys, dim=-1)
        similarity = directions[:, 1::2] @ directions[:, ::2].transpose(1, 2)  # [B, N // 2, (N + 1) // 2]
    highest, nearest = similarity.max(dim=-1)
    chosen = highest.topk(number, sorted=False).indices
    return 2 * chosen + 1, 2 * nearest.gather(1, chosen)


class Merging:
    """Share state between the modules of a model during a forward, so only one thread may call the model at a time.

    Attributes:
        keys: Keys of the last attention, averaged over heads, float32 `[B, T, d]`.
        sizes: Number of patches in each token, float32 `[B, T]`; 1 for tokens before the patches, which never merge.
    """

    def __init__(self, model: HFViTPreTrainedModel, per_layer: int) -> None:
        self.config: Any = model.config
        self.per_layer = per_layer
        self.keys: Tensor = torch.empty(0)
        self.sizes: Tensor | None = None
        self.handle: RemovableHandle = model.base_model.register_forward_pre_hook(self.begin, with_kwargs=True)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reset the sizes, and raise `ValueError` for arguments that merging does not support."""
        self.sizes = None
        if model.training:
            raise ValueError(f"Tokens are merged at inference only: call model.eval(); {UNDO}.")
        if self.config._attn_implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                "Token merging adds the sizes of tokens to the attention scores, which "
                f"{self.config._attn_implementation!r} does not support: use attn_implementation='sdpa' or 'eager'."
            )
        given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        for name, remedy in REMEDIES.items():
            value = given.get(name, getattr(self.config, name, None))
            if value is not None and value is not False:
                raise ValueError(f"{name} does not work with token merging: {remedy}; {UNDO}.")

    def bias(self, key: Tensor) -> Tensor | None:
        """Return the bias that weights keys `[B, A, K, d]` by their number of patches, `[B, 1, 1, K]`."""
        if self.sizes is None:  # nothing is merged yet
            return None
        return self.sizes[:, None, None, -key.shape[2] :].log().to(key.dtype)

    def mean(self, tokens: Tensor) -> Tensor:
        """Average all tokens or the last K of them, `[B, K, D]`, weighted by their number of patches."""
        assert self.sizes is not None  # a layer precedes every pooling
        sizes = self.sizes[:, -tokens.shape[1] :, None].to(tokens.dtype)
        return (tokens * sizes).sum(dim=1) / sizes.sum(dim=1)

    def attend(
        self, attention: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Call an attention function of transformers' interface with the sizes as mask, and store the mean keys."""
        if key.shape[1] != self.config.num_attention_heads:
            raise ValueError(
                f"Tokens are matched by the mean of {self.config.num_attention_heads} heads, but this process has "
                f"{key.shape[1]}: use the model without tensor parallelism."
            )
        self.keys = key.detach().mean(dim=1, dtype=torch.float32)
        return attention(module, query, key, value, self.bias(key), **kwargs)

    def merge(self, hidden_states: Tensor) -> Tensor:
        """Replace pairs of patches by their weighted mean: `[B, T, D]` to `[B, T - number, D]`.

        Tokens are indexed across the whole batch, since gathering along an inner dimension takes nine times as long.
        """
        batch, tokens, _ = hidden_states.shape
        prefix = self.config.num_prefix_tokens
        sizes = hidden_states.new_ones(batch, tokens, dtype=torch.float32) if self.sizes is None else self.sizes
        number = min(self.per_layer, (tokens - prefix) // 2)
        merged, into = (patches + prefix for patches in match_patches(self.keys[:, prefix:], number))
        is_merged = torch.zeros_like(sizes, dtype=torch.int8).scatter(1, merged, 1)
        kept = is_merged.argsort(dim=1, stable=True)[:, : tokens - number]

        first = tokens * torch.arange(batch, device=kept.device).unsqueeze(1)
        merged, into, kept = ((first + indices).flatten() for indices in (merged, into, kept))
        rows, sizes = hidden_states.flatten(0, 1), sizes.flatten()
        together = sizes.index_add(0, into, sizes[merged])
        share = (sizes[merged] / together[into]).to(rows.dtype).unsqueeze(1)
        # x + s * (y - x) instead of a weighted sum: merging equal tokens is exact.
        rows = rows.index_add(0, into, share * (rows.index_select(0, merged) - rows.index_select(0, into)))
        self.sizes = together.index_select(0, kept).unflatten(0, (batch, -1))
        return rows.index_select(0, kept).unflatten(0, (batch, -1))


class MergingModule(nn.Module):
    """Provide the shared state to a module of a merging model."""

    merging: Merging


class MergingAttention(MergingModule, HFViTAttention):
    """Attend to tokens weighted by their sizes."""

    def _attention_function(self, kwargs: Any) -> Callable:
        return partial(self.merging.attend, super()._attention_function(kwargs))


class MergingLayer(MergingModule, HFViTLayer):
    """Merge tokens between attention and MLP, without dropout."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attended, _ = self.attention(self.layernorm_before(hidden_states), *args, **kwargs)
        hidden_states = self.merging.merge(hidden_states + self.attention_scale(attended))
        return hidden_states + self.mlp_scale(self.mlp(self.layernorm_after(hidden_states)))


class MergingMeanPooling(MergingModule, HFViTMeanPooling):
    """Average the patches weighted by their sizes."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.merging.mean(hidden_states[:, self.num_prefix_tokens :])


class MergingMeanOfAllPooling(MergingModule, HFViTMeanOfAllPooling):
    """Average all tokens weighted by their sizes."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.merging.mean(hidden_states)


class MergingClassTokenAndMeanPooling(HFViTClassTokenAndMeanPooling, MergingMeanPooling):
    """Concatenate the class token and the weighted average of the patches."""


class MergingAttentionPooling(MergingModule, HFViTAttentionPooling):
    """Attend to tokens with a learned query, weighted by their sizes."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        query = self.query(self.probe).expand(len(hidden_states), -1, -1).unflatten(-1, (-1, self.head_dim))
        key, value = self.key_value(hidden_states).unflatten(-1, (-1, 2, self.head_dim)).transpose(1, 2).unbind(3)
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=self.merging.bias(key))
        pooled = self.o_proj(attended.transpose(1, 2).flatten(2))
        return (pooled + self.mlp(self.layernorm(pooled))).squeeze(1)


class MergingPatchAttentionPooling(HFViTPatchAttentionPooling, MergingAttentionPooling):
    """Attend to the patches with a learned query, weighted by their sizes."""


PARTS: dict[type[nn.Module], type[nn.Module]] = {
    HFViTAttention: MergingAttention,
    HFViTLayer: MergingLayer,
    HFViTMeanPooling: MergingMeanPooling,
    HFViTMeanOfAllPooling: MergingMeanOfAllPooling,
    HFViTClassTokenAndMeanPooling: MergingClassTokenAndMeanPooling,
    HFViTAttentionPooling: MergingAttentionPooling,
    HFViTPatchAttentionPooling: MergingPatchAttentionPooling,
}
PLAIN_PARTS = {merging: plain for plain, merging in PARTS.items()}


def merge_tokens(model: Any, per_layer: int) -> Any:
    """Merge `per_layer` patches in every layer of a model, at most half of them; 0 turns merging off.

    The model is modified in place. Its weights, config and saved files do not change, but it cannot be trained, and
    `last_hidden_state` has fewer tokens, `[B, T - layers * per_layer, D]`.

    Args:
        model: `HFViTModel` or `HFViTForImageClassification`, not wrapped, compiled or sharded.
        per_layer: Number of patches to merge in each layer. The paper uses 8 to 13 with 12 layers and 196 patches.

    Returns:
        The same model.

    Raises:
        ValueError: For other models, models with an output per patch, and positions that are used in every layer.

    Example:
        >>> from hf_vit import HFViTModel
        >>> from hf_vit.variants import config_of
        >>> model = merge_tokens(HFViTModel(config_of("ViT-Ti/16", num_hidden_layers=2)).eval(), 8)
        >>> model(torch.rand(1, 3, 224, 224)).last_hidden_state.shape  # 197 - 2 * 8 tokens
        torch.Size([1, 181, 192])
    """
    if not isinstance(model, HFViTPreTrainedModel):
        raise ValueError(
            f"Expected HFViTModel or HFViTForImageClassification, got {type(model).__name__}: call merge_tokens "
            "before the model is wrapped or compiled."
        )
    if isinstance(per_layer, bool) or not isinstance(per_layer, int) or per_layer < 0:
        raise ValueError(f"per_layer must be a number of patches, 0 or more, got {per_layer!r}.")
    if per_layer:
        _check_model(model)
    parts: list[Any] = list(model.modules())
    for part in parts:
        if type(part) in PLAIN_PARTS:
            part.__class__ = PLAIN_PARTS[type(part)]
            part.merging.handle.remove()
            del part.merging
    if per_layer:
        merging = Merging(model, per_layer)
        for part in parts:
            if type(part) in PARTS:
                part.__class__ = PARTS[type(part)]
                part.merging = merging
    return model


def _check_model(model: Any) -> None:
    encoder, positions = model.base_model, model.config.position_embedding_type
    if encoder.pooler is None:
        raise ValueError(
            f"{type(model).__name__} without pooling has an output per patch, but merged patches share a token: use "
            "HFViTForImageClassification, or HFViTModel with its pooling layer."
        )
    placement = model.config.position_placement
    if positions in ("relative", *ROTARY) or placement != "input":
        raise ValueError(
            f"With {positions!r} positions at {placement!r} every layer uses the position of each patch, but merged "
            "patches have several: use a model that adds positions at the input only."
        )
    for layer in encoder.layers:
        if type(layer) not in (HFViTLayer, MergingLayer) or "forward" in vars(layer):
            raise ValueError(
                f"Expected a plain HFViTLayer, got {type(layer).__name__} with hooks or shards: call merge_tokens "
                "before the model is sharded, and load it without device_map."
            )
