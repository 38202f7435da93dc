"""The Vision Transformer.

Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", ICLR 2021
(arXiv:2010.11929). Equation (1) of the paper is `HFViTEmbeddings.forward`, equations (2) and (3) are the two residual
lines of `HFViTLayer.forward`, and equation (4) is the pooling. From parts to whole:

    patch embeddings -> embeddings -> attention -> layer -> model -> classifier

Letters in shapes: B batch, C channels, H W pixels, h w grid, N = h*w patches, P class, distillation and register
tokens, T = P + N tokens, D width, A heads, d width of a head.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_hf_vit import HFViTConfig
from .layers_hf_vit import (
    CORRUPTIONS,
    HFViTDropPath,
    HFViTGatedMLP,
    HFViTLayerScale,
    HFViTMaskToken,
    HFViTMLP,
    HFViTPatchDropout,
    eager_attention,
    patchify,
    sdpa_attention,
)
from .losses_hf_vit import classification_loss, scaled_logits
from .packing_hf_vit import HFViTPacking, check_pack_options
from .pooling_hf_vit import HFViTAttentionPooling, HFViTPooler, classifier_of
from .positions_hf_vit import (
    POSITIONS,
    POSITIONS_OF_LAYERS,
    HFViTLearnedPositions,
    HFViTPositions,
    HFViTPositionTable,
    HFViTRelativePositions,
    ResamplePositions,
    rotate,
)
from .repository_hf_vit import HFViTRepositoryMixin
from .stem_hf_vit import HFViTStem
from .validation_hf_vit import DTYPES

logger = logging.get_logger(__name__)

FLOATS = tuple(getattr(torch, name) for name in DTYPES)  # excludes the 8-bit dtypes of quantized weights


# ------------------------------------------------------------------------------------- from an image to a sequence


def compute_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype that a module computes in, taken from its first parameter that is not quantized."""
    for parameter in module.parameters():
        if parameter.dtype in FLOATS:
            return parameter.dtype
    return default


class HFViTPatchEmbeddings(nn.Module):
    """Project flattened patches linearly: the strided convolution of other implementations as a matrix product.

    In the paper's hybrid models, the patches are cut from the features of a ResNet.
    """

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.num_channels = config.num_channels
        self.stem = nn.Identity() if config.stem_layers is None else HFViTStem(config)
        channels = self.stem.out_channels if isinstance(self.stem, HFViTStem) else config.num_channels
        height, width = config.patch_shape
        self.patch_shape = (height // config.stem_stride, width // config.stem_stride)
        size, eps = channels * prod(self.patch_shape), config.layer_norm_eps
        norm = nn.LayerNorm if config.use_patch_layernorm else nn.Identity
        self.layernorm_before = norm(size, eps=eps)
        self.projection = nn.Linear(size, config.hidden_size, bias=config.patch_bias)
        self.layernorm_after = norm(config.hidden_size, eps=eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.ndim == 2:  # a pack, which the image processor has cut into patches
            patches = pixel_values.unsqueeze(0)
        else:
            patches = patchify(self.stem(pixel_values), self.patch_shape)  # [B, N, C*ph*pw]
        return self.layernorm_after(self.projection(self.layernorm_before(patches)))  # [B, N, D]

    def check_shape(self, pixel_values: Tensor) -> None:
        """Raise `ValueError` unless the shape is `[B, C, H, W]`."""
        shape = list(pixel_values.shape)
        if len(shape) != 4 or shape[1] != self.num_channels:
            is_last = shape[-1] == self.num_channels and len(shape) == 4
            raise ValueError(
                f"pixel_values must be [batch, {self.num_channels}, height, width], got {shape}: "
                + ("the channels come first: use permute(0, 3, 1, 2) or " if is_last else "")
                + "prepare the images with the image processor, or set num_channels in the config."
            )


class HFViTEmbeddings(nn.Module):
    """Turn an image into a sequence, equation (1): [class token] [distillation token] [registers] patches."""

    def __init__(self, config: HFViTConfig, use_mask_token: bool = False) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embeddings = HFViTPatchEmbeddings(config)
        kinds = POSITIONS if config.position_placement == "input" else POSITIONS_OF_LAYERS
        self.position_embeddings = kinds[config.position_embedding_type](config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if config.use_cls_token else None
        self.distillation_token = nn.Parameter(torch.empty(1, 1, width)) if config.use_distillation_token else None
        registers = config.num_register_tokens
        self.register_tokens = nn.Parameter(torch.empty(1, registers, width)) if registers else None
        self.mask_token = CORRUPTIONS[config.mim_objective](config) if use_mask_token else None
        self.patch_dropout = HFViTPatchDropout(config.patch_dropout_prob)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, pixel_values: Tensor, is_masked: Tensor | None = None, packing: HFViTPacking | None = None
    ) -> tuple[Tensor, HFViTPositions]:
        """Return tokens `[B, T, D]`, and the positions that act inside the encoder."""
        pixel_values = pixel_values.to(compute_dtype(self, default=pixel_values.dtype))
        if packing is None:
            self.patch_embeddings.check_shape(pixel_values)
            grid = self.config.grid_of(*pixel_values.shape[-2:])
            patches = self.patch_embeddings(pixel_values)
            if is_masked is not None:
                patches = self._mask(patches, is_masked)
            tokens, positions = self._place(patches, grid, is_masked)
        else:  # every group of images with the same grid is a batch
            groups = packing.split(self.patch_embeddings(pixel_values), has_prefix=False)
            tokens, positions = packing.join(list(map(self._place, groups, packing.groups)))
        return self.dropout(tokens), positions

    def _place(self, patches: Tensor, grid: tuple[int, int], mask: Any = None) -> tuple[Tensor, HFViTPositions]:
        """Add positions to the patches, and put the other tokens before them."""
        placed = self.position_embeddings(patches, grid)
        patches, kept = self.patch_dropout(placed) if mask is None else self.patch_dropout(placed, mask)
        positions = self.position_embeddings.placed(patches, grid, kept)
        tokens = [self.cls_token, self.distillation_token, self.register_tokens]
        present: list[Tensor] = [token for token in tokens if token is not None]
        if present:
            prefix = self.position_embeddings.place_prefix(torch.cat(present, dim=1)).to(patches.dtype)
            patches = torch.cat([prefix.expand(patches.shape[0], -1, -1), patches], dim=1)
        return patches, positions  # [B, T, D]

    def _mask(self, patches: Tensor, is_masked: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError("bool_masked_pos needs a mask token: build the model with use_mask_token=True.")
        if is_masked.flatten(1).shape != patches.shape[:2]:
            raise ValueError(
                f"bool_masked_pos must be [batch, patches] = {list(patches.shape[:2])}, got {list(is_masked.shape)}."
            )
        return self.mask_token(patches, is_masked.flatten(1).bool())


# ------------------------------------------------------------------------------------------------------- the layer


class HFViTAttention(nn.Module):
    """Multi-head self-attention, with queries, keys and values from one matrix product (appendix A).

    The rows of its weight are ordered (head, q/k/v, head_dim), so that a tensor-parallel shard contains whole heads.
    """

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_width
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        inner = config.num_attention_heads * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * inner, bias=config.qkv_bias)
        norm = nn.LayerNorm if config.use_qk_norm else nn.Identity
        self.q_norm = norm(self.head_dim, eps=config.layer_norm_eps)
        self.k_norm = norm(self.head_dim, eps=config.layer_norm_eps)
        norm = nn.LayerNorm if config.use_attention_layernorm else nn.Identity
        self.layernorm = norm(inner, eps=config.layer_norm_eps)
        self.o_proj: nn.Module = nn.Identity()
        if config.use_output_projection:
            self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.proj_bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        packing: HFViTPacking | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        qkv = self.qkv(hidden_states).unflatten(-1, (-1, 3, self.head_dim))  # [B, T, A, 3, d]
        # Unbind before transposing, so that the backward pass joins the gradients in one copy.
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(3))  # [B, A, T, d] each
        query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        attend = self._attention_function(kwargs)
        if packing is not None:
            attend = partial(packing.attend, attend)
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(self.layernorm(attended.flatten(2))), weights

    def _attention_function(self, kwargs: Any) -> Callable:
        implementation = self.config._attn_implementation
        if implementation != "eager" and kwargs.get("output_attentions", self.config.output_attentions):
            logger.warning_once(
                f"output_attentions=True: {implementation!r} does not compute attention weights, so eager attention "
                "is used. It is slower, and its memory grows with batch x heads x tokens^2 in every layer."
            )
            return eager_attention
        if implementation == "sdpa":
            return sdpa_attention
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)


class HFViTLayer(GradientCheckpointingLayer):
    """One block of the encoder, equations (2) and (3)."""

    def __init__(self, config: HFViTConfig, number: int) -> None:
        super().__init__()
        scale = nn.Identity if config.layer_scale_init_value is None else HFViTLayerScale
        drop_path = config.drop_path_rate * number / max(config.num_hidden_layers - 1, 1)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = HFViTAttention(config)
        self.attention_scale = scale(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        mlp = HFViTGatedMLP if config.use_gated_mlp else HFViTMLP
        self.mlp = mlp(config, bias=config.mlp_bias, use_layernorm=config.use_mlp_layernorm)
        self.mlp_scale = scale(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = HFViTDropPath(drop_path)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        packing: HFViTPacking | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, rotation, packing, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.attention_scale(self.dropout(attended)), packing)
        transformed = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.mlp_scale(self.dropout(transformed)), packing)


# ------------------------------------------------------------------------------------------------------- the model


class HFViTPreTrainedModel(HFViTRepositoryMixin, PreTrainedModel):  # type: ignore[misc]
    """Base class: the attributes of the models that transformers reads, and the weight initialization."""

    config: HFViTConfig
    config_class = HFViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    # Accelerate's FSDP shards each of these modules separately, and also the patch embeddings (`_input_embed_layer`),
    # which it cannot shard as part of another module. The pooler is not listed, since not every model has one.
    _no_split_modules = ["HFViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HFViTLayer, "attentions": HFViTAttention}
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        with_own_parameters = (
            HFViTEmbeddings,
            HFViTMaskToken,
            HFViTPositionTable,
            HFViTLearnedPositions,
            HFViTRelativePositions,
            HFViTAttentionPooling,
        )
        if isinstance(module, with_own_parameters):
            for parameter in module.parameters(recurse=False):
                init.trunc_normal_(parameter, std=self.config.initializer_range)
        elif isinstance(module, HFViTLayerScale):
            init.constant_(module.weight, cast(float, self.config.layer_scale_init_value))
        elif hasattr(module, "init_own_weights"):  # a module of another file
            cast(Any, module).init_own_weights()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Also save the config as metadata, so that a file of `torch.save(model.state_dict(), path)` contains it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            architecture = {"architectures": [type(self).__name__]}
            destination._metadata[prefix[:-1]]["hf_vit_config"] = {**self.config.to_dict(), **architecture}


class HFViTModel(HFViTPreTrainedModel):
    """The encoder and the pooling, whose output is the input of a head.

    Args:
        config: The architecture.
        add_pooling_layer: Whether to compute `pooler_output`.
        use_mask_token: Whether to create a learned token that replaces masked patches.
    """

    def __init__(self, config: HFViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False) -> None:
        super().__init__(config)
        self.embeddings = HFViTEmbeddings(config, use_mask_token=use_mask_token)
        norm = {True: nn.LayerNorm, False: nn.Identity}
        width, eps = config.hidden_size, config.layer_norm_eps
        self.pre_layernorm = norm[config.use_pre_layernorm](width, eps=eps)
        self.layers = nn.ModuleList([HFViTLayer(config, number) for number in range(config.num_hidden_layers)])
        self.layernorm = norm[config.final_layernorm == "tokens"](width, eps=eps)
        self.pooler = HFViTPooler(config) if add_pooling_layer else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        patch_grids: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: `[B, C, H, W]`, normalized by the image processor. Height and width can be any multiples of
                the patch size; positions are resampled. For a pack, `[rows, C*ph*pw]`.
            bool_masked_pos: `[B, N]`, true where a patch is masked; for a model with a mask token.
            attention_mask: `[B, T]`, 1 for tokens to attend to, tokens before the patches first.
            patch_grids: For a pack, integers `[B, 2]`: the (rows, columns) of each image, as the image processor
                returns them with `packing`. Tokens are then `[1, T, D]`, image after image.
            kwargs: As in transformers, such as `output_attentions` and `output_hidden_states`.

        Returns:
            `last_hidden_state` `[B, T, D]` after the final LayerNorm, ordered class token, distillation token,
            registers, patches row by row; `pooler_output` `[B, pooled_width]`, or `[B, representation_size]` with a
            pre-logits layer.
        """
        if pixel_values is None:
            raise ValueError("pixel_values is missing: pass the output of the image processor, [B, C, H, W].")
        if patch_grids is None and pixel_values.ndim != 2:
            return self._encode(pixel_values, bool_masked_pos, attention_mask, return_dict=True, **kwargs)
        check_pack_options(self, bool_masked_pos=bool_masked_pos, attention_mask=attention_mask, **kwargs)
        packing = HFViTPacking(pixel_values, patch_grids, self.config)
        return packing.restore(self._encode(packing.sort(pixel_values), packing=packing, return_dict=True, **kwargs))

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def _encode(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        packing: HFViTPacking | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        hidden_states, positions = self.embeddings(pixel_values, bool_masked_pos, packing)
        hidden_states = self.pre_layernorm(hidden_states)
        mask = None
        if packing is None:
            mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
        for number, layer in enumerate(self.layers):
            hidden_states = positions.add_to(hidden_states, number)
            layer_mask = positions.add_to_mask(mask, number)
            hidden_states = layer(hidden_states, layer_mask, positions.rotation, packing, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        pooled = None if self.pooler is None else self.pooler(hidden_states, packing)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


# -------------------------------------------------------------------------------------------------- the classifier


class HFViTForImageClassification(HFViTPreTrainedModel):
    """The encoder with a linear classifier on the pooled output.

    Example:
        >>> small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
        >>> model = HFViTForImageClassification(HFViTConfig(**small, image_size=32, patch_size=8)).eval()
        >>> model(torch.rand(2, 3, 32, 32)).logits.shape
        torch.Size([2, 2])
        >>> model(torch.rand(2, 3, 40, 24)).logits.shape  # positions are resampled to a grid of 5x3
        torch.Size([2, 2])
    """

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels  # custom losses of Trainer read it
        self.vit = HFViTModel(config)
        self.classifier = classifier_of(config)
        self.loss_function = classification_loss
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # As in the paper's fine-tuning (appendix B.1.1), a new head on a loaded encoder starts at zero.
        projection = self.vit.embeddings.patch_embeddings.projection
        is_encoder_loaded = getattr(projection.weight, "_is_hf_initialized", False)
        if module is self.classifier and (self.config.zero_init_head or is_encoder_loaded):
            for parameter in module.parameters():
                init.zeros_(parameter)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: `[B, C, H, W]`, or a pack with its `patch_grids`, as for `HFViTModel`.
            labels: As for `classification_loss`. If given, the loss is computed.
            kwargs: As for `HFViTModel`, including `patch_grids`.

        Returns:
            `logits` `[B, num_labels]`, as returned by `scaled_logits`, and, with labels, `loss`.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs = self.vit(pixel_values, **kwargs)
        logits = scaled_logits(self.classifier(outputs.pooler_output), self.config)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, num_items_in_batch=num_items_in_batch)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


register_checkpoint_conversion_mapping(
    HFViTModel.__name__,
    # One converter per name: transformers' quantizers look up target names, and a group `\1` is not a name.
    [
        WeightConverter(name, name, [ResamplePositions()])
        for name in (f"position_embeddings.{table}.weight" for table in ("table", "rows", "columns", "offsets"))
    ],
    overwrite=True,
)

__all__ = [
    "HFViTForImageClassification",
    "HFViTModel",
    "HFViTPreTrainedModel",
]
