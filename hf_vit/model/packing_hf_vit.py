"""Packs: images of many sizes in one sequence, without padding.

Dehghani et al., "Patch n' Pack: NaViT, a Vision Transformer for any Aspect Ratio and Resolution", NeurIPS 2023
(arXiv:2307.06304). The images stand one behind the other, each with its own class token, registers and positions, and
each attends to itself alone. What treats tokens one by one does not notice; here is what has to tell images apart.

Letters in shapes are those of modeling_hf_vit.py; T counts the tokens of all images, and a group is of n images of one
grid, with L tokens each.
"""

from collections.abc import Callable
from itertools import accumulate, groupby
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers.modeling_utils import PreTrainedModel

from .configuration_hf_vit import HFViTConfig


class HFViTPacking:
    """Say where each image of a pack lies, and which of them can be computed side by side.

    Tokens keep the order of the images. For the attention and the pooling they are brought into groups of images of
    one grid: a group is a batch, and no pair of tokens of two images is computed or stored.

    Args:
        pixel_values: `[rows, C*ph*pw]`, the flattened patches of all images.
        patch_grids: Integers `[images, 2]`, the (rows, columns) of patches of each image, in the same order.
        config: The architecture.

    Raises:
        ValueError: If the grids are not those of these patches, or the patches not those of the model.
    """

    def __init__(self, pixel_values: Tensor, patch_grids: Tensor | None, config: HFViTConfig) -> None:
        self.grids = _checked_grids(pixel_values, patch_grids, config)
        self.lengths = [config.num_prefix_tokens + prod(grid) for grid in self.grids]
        order = sorted(range(len(self.grids)), key=lambda image: self.grids[image])
        grouped = [self.grids[image] for image in order]
        groups = [(grid, len(list(images))) for grid, images in groupby(grouped)]
        self.group_grids = [grid for grid, _ in groups]
        self.groups = [(number, config.num_prefix_tokens + prod(grid)) for grid, number in groups]  # (n, L) each
        ends = [0, *accumulate(self.lengths[image] for image in order)]  # of the images, in the order of the groups
        image_of_token = torch.arange(len(order)).repeat_interleave(torch.tensor(self.lengths))  # [T]
        place_of_image = torch.tensor(order).argsort()
        tokens = place_of_image[image_of_token].argsort(stable=True)
        device = pixel_values.device
        self.image_of_token, self.place_of_image = image_of_token.to(device), place_of_image.to(device)
        self.tokens_of_groups, self.tokens_of_images = tokens.to(device), tokens.argsort().to(device)
        self.ends = torch.tensor(ends, dtype=torch.int32, device=device)
        self.use_flash = config._attn_implementation == "sdpa"

    def prepend(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """Put the tokens `[1, P, D]` before the patches of every image: from `[1, rows, D]` to `[1, T, D]`."""
        images = patches.split([length - prefix.shape[1] for length in self.lengths], dim=1)
        return torch.cat([part for image in images for part in (prefix, image)], dim=1)

    def spread(self, values: Tensor) -> Tensor:
        """Repeat a value of every image, `[images, 1, 1]`, for each of its tokens, `[1, T, 1]`."""
        return values.index_select(0, self.image_of_token.to(values.device)).transpose(0, 1)

    def grouped(self, states: Tensor) -> Tensor:
        """Bring tokens `[1, T, D]` into the order of the groups."""
        return states.index_select(1, self.tokens_of_groups.to(states.device))

    def split(self, states: Tensor) -> list[Tensor]:
        """View `[1, T, D]` or `[1, A, T, d]`, in the order of the groups, as `[n, L, D]` or `[n, A, L, d]` of each."""
        parts = states.split([prod(group) for group in self.groups], dim=-2)
        views = [part.unflatten(-2, group) for part, group in zip(parts, self.groups, strict=True)]
        return [view.movedim(-3, 0).squeeze(1) for view in views]

    def added(self, added: dict[tuple[int, int], Any]) -> Tensor | None:
        """Put what is added before every layer for each grid, `[layers, 1, L, D]`, one image behind the other."""
        of_images = [added[grid] for grid in self.grids]
        return None if of_images[0] is None else torch.cat(of_images, dim=2)

    def biases(self, bias: dict[tuple[int, int], Any]) -> list[list[Tensor]] | None:
        """Order the biases of all layers for each grid, `[layers, 1, A, L, L]`, by layer, then by group, if any."""
        of_groups = [bias[grid] for grid in self.group_grids]
        return None if of_groups[0] is None else [list(layer) for layer in zip(*of_groups, strict=True)]

    def rotation(self, rotation: dict[tuple[int, int], Any]) -> tuple[Tensor, Tensor] | None:
        """Put the cosines and the sines for each grid, `[1, 1, L, d]`, into the order of the groups, if any."""
        of_images = [rotation[grid] for grid in sorted(self.grids)]
        if of_images[0] is None:
            return None
        cosines, sines = (torch.cat(part, dim=2) for part in zip(*of_images, strict=True))
        return cosines, sines

    def pool(self, pooling: Callable[[Tensor], Tensor], hidden_states: Tensor) -> Tensor:
        """Let `pooling` reduce every image of `[1, T, D]`: to `[images, width]`, in the order of the images."""
        pooled = torch.cat([pooling(images) for images in self.split(self.grouped(hidden_states))])
        return pooled.index_select(0, self.place_of_image.to(pooled.device))

    def within_images(self, attention: Callable) -> Callable:
        """Let an attention function of transformers' interface see one group at a time.

        It is called with queries, keys and values in the order of the groups and a list with a mask for each, or
        `None`; what it gives back is in the order of the images.
        """

        def attend(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            masks: list[Tensor] | None,
            scaling: float,
            dropout: float = 0.0,
            **kwargs: Any,
        ) -> tuple[Tensor, None]:
            if masks is None and self._can_use_flash(value, dropout):
                attended = flash_attention(query, key, value, self, scaling)
            else:
                of_groups: list[Any] = masks or [None] * len(self.groups)
                groups = zip(*map(self.split, (query, key, value)), of_groups, strict=True)
                parts = [attention(module, *group, scaling=scaling, dropout=dropout, **kwargs)[0] for group in groups]
                attended = torch.cat([part.flatten(0, 1) for part in parts])  # [T, A, d]
            return attended.index_select(0, self.tokens_of_images.to(attended.device)).unsqueeze(0), None

        return attend

    def _can_use_flash(self, value: Tensor, dropout: float) -> bool:
        # For packs torch has no dropout of weights, and does not pad heads to a multiple of 8 as it does for batches.
        can_pack = self.use_flash and not dropout and value.shape[-1] % 8 == 0
        return can_pack and can_use_flash_attention(SDPAParams(value, value, value, None, 0.0, False, False))


def flash_attention(query: Tensor, key: Tensor, value: Tensor, packing: HFViTPacking, scaling: float) -> Tensor:
    """Attend within all images in one call, from `[1, A, T, d]` to `[T, A, d]`, in half precision on CUDA.

    Written from torch's documentation; where it was written there was no such device to run it on.
    """
    from torch.nn.attention.varlen import varlen_attn  # the import takes seconds, which no CPU need wait for

    # Under autocast a LayerNorm of queries and keys leaves them in float32.
    query, key, value = (state[0].transpose(0, 1).to(value.dtype) for state in (query, key, value))  # [T, A, d]
    ends, longest = packing.ends.to(value.device), max(packing.lengths)
    return cast(Tensor, varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling))


# ------------------------------------------------------------------------------------------------------ refusals


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
            f"The grids of patch_grids have {sum(map(prod, grids))} patches together, at least one each, and "
            f"pixel_values has {len(pixel_values)} rows: keep all images of a pack, in their order, in both."
        )
    return grids


def refuse_beside_a_pack(
    model: PreTrainedModel, bool_masked_pos: Any, attention_mask: Any, output_attentions: Any = None, **kwargs: Any
) -> None:
    """Raise `ValueError` for what a model or a call may have beside a batch but not beside a pack."""
    config = model.config
    output_attentions = config.output_attentions if output_attentions is None else output_attentions
    one_size = "give images of one size, [batch, channels, height, width]"
    remedies = {
        "bool_masked_pos": (bool_masked_pos is not None, one_size),
        "attention_mask": (attention_mask is not None, "leave it out, since a pack has no padding to hide"),
        "output_attentions": (output_attentions, one_size),
        "patch_dropout_prob": (model.training and config.patch_dropout_prob, f"set it to 0, or {one_size}"),
        "stem_layers": (config.stem_layers is not None, f"{one_size}, since a stem sees beyond each patch"),
    }
    for name, (is_there, remedy) in remedies.items():
        if is_there:
            raise ValueError(f"A pack of images (patch_grids) does not go with {name}: {remedy}.")


def refuse_packs(model: nn.Module, patch_grids: Any) -> None:
    """Raise `ValueError` for a model that gives back images and so takes images of one size."""
    if patch_grids is not None:
        raise ValueError(
            f"{type(model).__name__} takes images of one size, [batch, channels, height, width], not a pack "
            "(patch_grids): use HFViTModel, whose last_hidden_state has the patches of every image."
        )
