"""Fewer tokens at inference: in every layer the patches that are most alike become one.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv:2210.09461), on a model that is trained and stays
as it is: weights, their names, the config and what is saved do not change. From parts to whole:

    matching -> merging, and what a forward knows of it -> layer and poolings that take part -> merge_tokens

Tokens stay in their order, where the paper moves those that were merged into behind the others: it is simpler, and
five trained models lost no more by it.
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

# What a forward may be asked for beside merging: nothing that is about every patch.
REMEDIES = {
    "attention_mask": "leave it out, since a merged token may hold patches that are masked and others",
    "patch_grids": "give images of one size, [batch, channels, height, width], instead of a pack",
    "output_hidden_states": "it has fewer tokens in every layer, so that none is of one patch",
    "output_attentions": "it has fewer tokens in every layer, so that none is of one patch",
}
ARGUMENTS = ("pixel_values", "bool_masked_pos", "attention_mask", "patch_grids")
UNDO = "merge_tokens(model, 0) makes the model compute with every patch again"


def match_patches(keys: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Choose patches to merge, by bipartite soft matching: the `number` most similar pairs.

    Each patch of an odd index looks for the patch of an even index whose key has the most similar direction.

    Args:
        keys: `[B, N, d]`, float32.
        number: At most N // 2.

    Returns:
        Indices of patches that merge and of those that they merge into, `[B, number]` each.
    """
    with torch.autocast(keys.device.type, enabled=False):  # in bf16 most pairs would be equally similar
        directions = F.normalize(keys, dim=-1)
        similarity = directions[:, 1::2] @ directions[:, ::2].transpose(1, 2)  # [B, N // 2, (N + 1) // 2]
    highest, nearest = similarity.max(dim=-1)
    chosen = highest.topk(number, sorted=False).indices
    return 2 * chosen + 1, 2 * nearest.gather(1, chosen)


class Merging:
    """Hold what the parts of one model share in a forward, and begin anew with the next.

    So a model is not to be called by several threads at a time.

    Attributes:
        sizes: How many patches each token holds, float32 `[B, T]`; 1 for tokens before the patches, which never merge.
    """

    def __init__(self, model: HFViTPreTrainedModel, per_layer: int) -> None:
        self.config: Any = model.config
        self.per_layer = per_layer
        self.keys: Tensor = torch.empty(0)
        self.sizes: Tensor | None = None
        self.handle: RemovableHandle = model.base_model.register_forward_pre_hook(self.begin, with_kwargs=True)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forget the images before, and raise `ValueError` for a wish that merging cannot fulfil."""
        self.sizes = None
        if model.training:
            raise ValueError(f"Tokens are merged at inference alone: call model.eval(); {UNDO}.")
        if self.config._attn_implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                "The sizes of tokens are added to the scores of the attention, which "
                f"{self.config._attn_implementation!r} does not offer: use attn_implementation='sdpa' or 'eager'."
            )
        given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        for name, remedy in REMEDIES.items():
            wish = given.get(name, getattr(self.config, name, None))
            if wish is not None and wish is not False:
                raise ValueError(f"{name} does not go with merged tokens: {remedy}; {UNDO}.")

    def bias(self, key: Tensor) -> Tensor | None:
        """Return what lets a key of `[B, A, K, d]` count for as many as it holds patches, `[B, 1, 1, K]`."""
        if self.sizes is None:  # before the first merging all hold one
            return None
        return self.sizes[:, None, None, -key.shape[2] :].log().to(key.dtype)

    def mean(self, tokens: Tensor) -> Tensor:
        """Average `[B, K, D]`, all tokens or the last of them, over the patches that they hold."""
        assert self.sizes is not None  # there is a layer before every pooling
        sizes = self.sizes[:, -tokens.shape[1] :, None].to(tokens.dtype)
        return (tokens * sizes).sum(dim=1) / sizes.sum(dim=1)

    def attend(
        self, attention: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Call an attention function of transformers' interface with sizes for a mask, and keep the mean key."""
        if key.shape[1] != self.config.num_attention_heads:
            raise ValueError(
                f"Tokens are matched by the mean of {self.config.num_attention_heads} heads, of which this process "
                f"has {key.shape[1]}: use the model without tensor parallelism."
            )
        self.keys = key.detach().mean(dim=1, dtype=torch.float32)  # [B, T, d]
        return attention(module, query, key, value, self.bias(key), **kwargs)

    def merge(self, hidden_states: Tensor) -> Tensor:
        """Average pairs of patches by their sizes, half of the patches at most: `[B, T, D]` to `[B, T - number, D]`.

        Rows are numbered through all images, since to gather along a dimension in the midst takes nine times as long.
        """
        batch, tokens, _ = hidden_states.shape
        prefix = self.config.num_prefix_tokens
        sizes = hidden_states.new_ones(batch, tokens, dtype=torch.float32) if self.sizes is None else self.sizes
        number = min(self.per_layer, (tokens - prefix) // 2)
        merged, into = (patches + prefix for patches in match_patches(self.keys[:, prefix:], number))
        is_merged = torch.zeros_like(sizes, dtype=torch.int8).scatter(1, merged, 1)
        kept = is_merged.argsort(dim=1, stable=True)[:, : tokens - number]

        first = tokens * torch.arange(batch, device=kept.device).unsqueeze(1)
        merged, into, kept = ((first + places).flatten() for places in (merged, into, kept))
        rows, sizes = hidden_states.flatten(0, 1), sizes.flatten()
        together = sizes.index_add(0, into, sizes[merged])
        share = (sizes[merged] / together[into]).to(rows.dtype).unsqueeze(1)
        # A step towards the other instead of a weighted sum: what is alike stays the same to the bit.
        rows = rows.index_add(0, into, share * (rows.index_select(0, merged) - rows.index_select(0, into)))
        self.sizes = together.index_select(0, kept).unflatten(0, (batch, -1))
        return rows.index_select(0, kept).unflatten(0, (batch, -1))


# ------------------------------------------------------------------------------------------------ parts of a model


class MergingAttention(HFViTAttention):
    """Attend to tokens by their sizes."""

    merging: Merging

    def _attention_function(self, kwargs: Any) -> Callable:
        return partial(self.merging.attend, super()._attention_function(kwargs))


class MergingLayer(HFViTLayer):
    """Merge between attention and MLP; at inference, so without dropout."""

    merging: Merging

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attended, _ = self.attention(self.layernorm_before(hidden_states), *args, **kwargs)
        hidden_states = self.merging.merge(hidden_states + self.attention_scale(attended))
        return hidden_states + self.mlp_scale(self.mlp(self.layernorm_after(hidden_states)))


class MergingMeanPooling(HFViTMeanPooling):
    """Average the patches by their sizes."""

    merging: Merging

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.merging.mean(hidden_states[:, self.num_prefix_tokens :])


class MergingMeanOfAllPooling(HFViTMeanOfAllPooling):
    """Average all tokens by their sizes."""

    merging: Merging

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.merging.mean(hidden_states)


class MergingClassTokenAndMeanPooling(HFViTClassTokenAndMeanPooling, MergingMeanPooling):
    """Put the class token and that average one behind the other."""


class MergingAttentionPooling(HFViTAttentionPooling):
    """Let the learned query attend to tokens by their sizes."""

    merging: Merging

    def forward(self, hidden_states: Tensor) -> Tensor:
        query = self.query(self.probe).expand(len(hidden_states), -1, -1).unflatten(-1, (-1, self.head_dim))
        key, value = self.key_value(hidden_states).unflatten(-1, (-1, 2, self.head_dim)).transpose(1, 2).unbind(3)
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=self.merging.bias(key))
        pooled = self.o_proj(attended.transpose(1, 2).flatten(2))
        return (pooled + self.mlp(self.layernorm(pooled))).squeeze(1)


class MergingPatchAttentionPooling(HFViTPatchAttentionPooling, MergingAttentionPooling):
    """Let the learned query attend to the patches alone, by their sizes."""


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


# --------------------------------------------------------------------------------------------------------- the model


def merge_tokens(model: Any, per_layer: int) -> Any:
    """Let a model merge `per_layer` patches in every layer, half of them at most; 0 undoes it.

    The model is changed in place, in the way it computes alone: its weights, names, config and what it saves are as
    before. Its `last_hidden_state` has fewer tokens, `[B, T - layers * per_layer, D]`; it cannot train.

    Args:
        model: `HFViTModel` or `HFViTForImageClassification`, as it was loaded.
        per_layer: Patches to merge in each layer. With 12 layers and 196 patches, 8 to 13 is what the paper has.

    Returns:
        The same model.

    Raises:
        ValueError: If it is no such model, its output is of every patch, or its layers need the place of patches.

    Example:
        >>> from hf_vit import HFViTModel
        >>> from hf_vit.variants import config_of
        >>> model = merge_tokens(HFViTModel(config_of("ViT-Ti/16", num_hidden_layers=2)).eval(), 8)
        >>> model(torch.rand(1, 3, 224, 224)).last_hidden_state.shape  # of 197 tokens 2 * 8 are merged
        torch.Size([1, 181, 192])
    """
    if not isinstance(model, HFViTPreTrainedModel):
        raise ValueError(
            f"Expected HFViTModel or HFViTForImageClassification, got {type(model).__name__}: merge before the model "
            "is wrapped or compiled."
        )
    if isinstance(per_layer, bool) or not isinstance(per_layer, int) or per_layer < 0:
        raise ValueError(f"per_layer is a number of patches, 0 or more, got {per_layer!r}.")
    if per_layer:
        _refuse_what_cannot_merge(model)
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


def _refuse_what_cannot_merge(model: Any) -> None:
    encoder, positions = model.base_model, model.config.position_embedding_type
    if encoder.pooler is None:
        raise ValueError(
            f"This {type(model).__name__} returns something for every patch, but merged patches share a token: use "
            "HFViTForImageClassification, or HFViTModel with its pooling layer."
        )
    placement = model.config.position_placement
    if positions in ("relative", "rotary") or placement != "input":
        raise ValueError(
            f"With {positions!r} positions at {placement!r} every layer asks where a patch lies, but merged patches "
            "lie in several places: use a model whose positions are added at the input."
        )
    for layer in encoder.layers:
        if type(layer) not in (HFViTLayer, MergingLayer) or "forward" in vars(layer):
            raise ValueError(
                f"Expected HFViTLayer as it was loaded, got {type(layer).__name__} with hooks or shards: merge before "
                "the model is sharded, and load it without device_map."
            )
