"""Packs: images of different sizes in one sequence, without padding.

Dehghani et al., "Patch n' Pack: NaViT, a Vision Transformer for any Aspect Ratio and Resolution", NeurIPS 2023
(arXiv:2307.06304). Each image has its class token, registers and positions, and attends only to itself. Linear layers,
norms and MLPs treat tokens one by one and need no change; this file has the parts that must distinguish images.

Letters in shapes are those of modeling_hf_vit.py; T counts the tokens of all images. A group is n images of one grid,
with L tokens each.
"""

from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel

from .configuration_hf_vit import HFViTConfig
from .positions_hf_vit import HFViTPositions


class HFViTPacking:
    """Sort the images of a pack by grid, so that images of one grid can be computed as a batch.

    The encoder processes the sorted images: `sort` its input, and `restore` its output. No attention scores between
    tokens of different images are computed.

    Args:
        pixel_values: `[rows, C*ph*pw]`, the flattened patches of all images.
        patch_grids: Integers `[images, 2]`, the (rows, columns) of patches of each image, in the same order.
        config: The architecture.

    Attributes:
        grids: (rows, columns) of each image, sorted.
        lengths: Number of tokens of each image, sorted.
        groups: Number of images of each grid.

    Raises:
        ValueError: If `patch_grids` does not match the patches, or the patches do not match the model.
    """

    def __init__(self, pixel_values: Tensor, patch_grids: Tensor | None, config: HFViTConfig) -> None:
        given = _checked_grids(pixel_values, patch_grids, config)
        self._rows = [prod(grid) for grid in given]
        self._order = sorted(range(len(given)), key=given.__getitem__)
        self._places = sorted(range(len(given)), key=self._order.__getitem__)
        self.grids = [given[image] for image in self._order]
        self.groups = Counter(self.grids)
        self.prefix = config.num_prefix_tokens
        self.lengths = [self.prefix + prod(grid) for grid in self.grids]
        device = pixel_values.device
        self.image_of_token = torch.arange(len(given)).repeat_interleave(torch.tensor(self.lengths)).to(device)  # [T]
        self.ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)
        self.use_flash = config._attn_implementation == "sdpa"

    def sort(self, pixel_values: Tensor) -> Tensor:
        """Sort the patches `[rows, C*ph*pw]` of all images."""
        images = pixel_values.split(self._rows)
        return torch.cat([images[image] for image in self._order])

    def restore(self, outputs: BaseModelOutputWithPooling) -> BaseModelOutputWithPooling:
        """Reorder the outputs of the sorted images to the order of the pack."""

        def restored(states: Any) -> Any:
            if states is None:  # a layer that was not selected
                return None
            images = states.split(self.lengths, dim=1)
            return torch.cat([images[place] for place in self._places], dim=1)

        hidden_states, pooled = cast(Any, outputs.hidden_states), outputs.pooler_output
        return BaseModelOutputWithPooling(
            last_hidden_state=restored(outputs.last_hidden_state),
            pooler_output=None if pooled is None else cast(Any, pooled[self._places]),
            hidden_states=None if hidden_states is None else tuple(map(restored, hidden_states)),
        )

    def split(self, states: Tensor, has_prefix: bool = True) -> list[Tensor]:
        """View `[1, T, D]` or `[1, A, T, d]` as a batch `[n, L, D]` or `[n, A, L, d]` of each group.

        Without prefix, the states contain only patches.
        """
        sizes = [(number, prod(grid) + has_prefix * self.prefix) for grid, number in self.groups.items()]
        parts = states.split([prod(size) for size in sizes], dim=-2)
        return [part.unflatten(-2, size).movedim(-3, 0).squeeze(1) for part, size in zip(parts, sizes, strict=True)]

    def join(self, groups: list[tuple[Tensor, HFViTPositions]]) -> tuple[Tensor, HFViTPositions]:
        """Join the tokens `[n, L, D]` and the positions of all groups."""
        tokens = torch.cat([tokens.flatten(0, 1) for tokens, _ in groups]).unsqueeze(0)  # [1, T, D]
        added, biases, rotations = zip(*(positions for _, positions in groups), strict=True)
        return tokens, HFViTPositions(
            added=self._repeat(added),
            bias=None if biases[0] is None else list(zip(*biases, strict=True)),
            rotation=None if rotations[0] is None else tuple(map(self._repeat, zip(*rotations, strict=True))),
        )

    def _repeat(self, of_groups: tuple[Tensor | None, ...]) -> Any:
        """Repeat values `[..., 1, L, D]` of each group for its images, and join them to `[..., 1, T, D]`."""
        if of_groups[0] is None:
            return None
        pairs = zip(cast(tuple[Tensor, ...], of_groups), self.groups.values(), strict=True)
        return torch.cat([values for values, number in pairs for _ in range(number)], dim=-2)

    def spread(self, values: Tensor) -> Tensor:
        """Repeat a value per image, `[images, 1, 1]`, for each of its tokens, `[1, T, 1]`."""
        return values.index_select(0, self.image_of_token.to(values.device)).transpose(0, 1)

    def attend(
        self,
        attention: Callable,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        masks: list[Tensor] | None,
        scaling: float,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Call an attention function of transformers' interface for each group.

        Queries, keys and values are `[1, A, T, d]`; `masks` has one mask per group. Returns `[1, T, A, d]`.
        """
        if masks is None and self._can_use_flash(value, dropout):
            return flash_attention(query, key, value, self, scaling).unsqueeze(0), None
        of_groups: list[Any] = masks or [None] * len(self.groups)
        groups = zip(*map(self.split, (query, key, value)), of_groups, strict=True)
        parts = [attention(module, *group, scaling=scaling, dropout=dropout, **kwargs)[0] for group in groups]
        return torch.cat([part.flatten(0, 1) for part in parts]).unsqueeze(0), None

    def _can_use_flash(self, value: Tensor, dropout: float) -> bool:
        # torch's variable-length kernel has no dropout, and does not pad heads to a multiple of 8.
        can_pack = self.use_flash and not dropout and value.shape[-1] % 8 == 0
        return can_pack and can_use_flash_attention(SDPAParams(value, value, value, None, 0.0, False, False))


def flash_attention(query: Tensor, key: Tensor, value: Tensor, packing: HFViTPacking, scaling: float) -> Tensor:
    """Compute attention within each image in one call, from `[1, A, T, d]` to `[T, A, d]`; half precision on CUDA.

    Written from torch's documentation and not tested on a GPU.
    """
    from torch.nn.attention.varlen import varlen_attn  # takes seconds to import, and is not needed on a CPU

    # Under autocast, a LayerNorm of queries and keys leaves them in float32.
    query, key, value = (state[0].transpose(0, 1).to(value.dtype) for state in (query, key, value))  # [T, A, d]
    ends, longest = packing.ends.to(value.device), max(packing.lengths)
    return cast(Tensor, varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling))


# ----------------------------------------------------------------------------------------------------- input checks


def _checked_grids(pixel_values: Tensor, patch_grids: Tensor | None, config: HFViTConfig) -> list[tuple[int, int]]:
    width = config.num_channels * prod(config.patch_shape)
    if patch_grids is None or pixel_values.ndim != 2:
        raise ValueError(
            f"A pack is pixel_values [rows, {width}] with patch_grids [images, 2], got pixel_values "
            f"{list(pixel_values.shape)} {'without' if patch_grids is None else 'with'} patch_grids: pass both as the "
            "image processor returns them with packing=..., or images of one size without patch_grids."
        )
    if pixel_values.shape[1] != width:
        raise ValueError(
            f"Expected rows of {width} values, a patch of {config.num_channels} channels of {config.patch_shape} "
            f"pixels, got {pixel_values.shape[1]}: set patch_size of the image processor to the model's."
        )
    if patch_grids.ndim != 2 or patch_grids.shape[1] != 2 or patch_grids.is_floating_point():
        raise ValueError(
            "patch_grids must be integers [images, 2], the (rows, columns) of every image, got "
            f"{list(patch_grids.shape)} of {patch_grids.dtype}: pass what the image processor returns."
        )
    grids = [(rows, columns) for rows, columns in patch_grids.tolist()]
    if not grids or min(map(min, grids)) < 1 or sum(map(prod, grids)) != len(pixel_values):
        raise ValueError(
            "Expected grids of at least one patch, with one row of pixel_values per patch, got grids of "
            f"{sum(map(prod, grids))} patches and {len(pixel_values)} rows: keep all images of a pack, in their "
            "order, in both."
        )
    return grids


def check_pack_options(
    model: PreTrainedModel, bool_masked_pos: Any, attention_mask: Any, output_attentions: Any = None, **kwargs: Any
) -> None:
    """Raise `ValueError` for options of a model or a call that packs do not support."""
    config = model.config
    output_attentions = config.output_attentions if output_attentions is None else output_attentions
    one_size = "pass images of one size, [batch, channels, height, width]"
    remedies = {
        "bool_masked_pos": (bool_masked_pos is not None, one_size),
        "attention_mask": (attention_mask is not None, "leave it out, since a pack has no padding to mask"),
        "output_attentions": (output_attentions, one_size),
        "patch_dropout_prob": (model.training and config.patch_dropout_prob, f"set it to 0, or {one_size}"),
        "stem_layers": (config.stem_layers is not None, f"{one_size}, since a stem sees more than one patch"),
    }
    for name, (is_set, remedy) in remedies.items():
        if is_set:
            raise ValueError(f"A pack of images (patch_grids) does not support {name}: {remedy}.")


def reject_packs(model: nn.Module, patch_grids: Any) -> None:
    """Raise `ValueError` for a pack given to a model that returns images or feature maps."""
    if patch_grids is not None:
        raise ValueError(
            f"{type(model).__name__} takes images of one size, [batch, channels, height, width], not a pack "
            "(patch_grids): use HFViTModel, whose last_hidden_state contains the patches of every image."
        )
