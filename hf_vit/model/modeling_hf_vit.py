"""The Vision Transformer.

Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", ICLR 2021
(arXiv:2010.11929). Equations (1) to (4) of the paper are `HFViTEmbeddings.forward`, the two residual lines of
`HFViTLayer.forward`, and the pooling. The file goes from parts to whole:

    patches -> positions -> attention, MLP, layer -> pooling -> model -> heads

Letters in shapes: B batch, C channels, H W pixels, h w grid, N = h*w patches, P class and register tokens,
T = P + N tokens, D width, A heads, d width of a head.
"""

from collections.abc import Callable
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
)
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
    with_bias,
)
from .losses_hf_vit import classification_loss
from .packing_hf_vit import HFViTPacking, refuse_beside_a_pack
from .pooling_hf_vit import HFViTAttentionPooling, HFViTPooler
from .positions_hf_vit import (
    POSITIONS,
    POSITIONS_OF_LAYERS,
    HFViTLearnedPositions,
    HFViTPositionTable,
    HFViTRelativePositions,
    ResamplePositions,
    rotate,
)
from .repository_hf_vit import complete_repository, replace_empty_form
from .stem_hf_vit import HFViTStem

logger = logging.get_logger(__name__)


# ----------------------------------------------------------------------------------------------------- patches


class HFViTPatchEmbeddings(nn.Module):
    """Project flattened patches linearly: the strided convolution of other implementations as a matrix product.

    In the paper's hybrid the patches are of a ResNet's features.
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
        if pixel_values.ndim == 2:  # a pack, whose patches the image processor has cut
            return self._project(pixel_values.unsqueeze(0).to(self.projection.weight.dtype))
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values must be [batch, {self.num_channels}, height, width], got {list(pixel_values.shape)}: "
                "let the image processor prepare the images, or set num_channels in the config."
            )
        features = self.stem(pixel_values.to(self.projection.weight.dtype))
        return self._project(patchify(features, self.patch_shape))

    def _project(self, patches: Tensor) -> Tensor:
        return self.layernorm_after(self.projection(self.layernorm_before(patches)))  # [B, N, D]


# --------------------------------------------------------------------------------------------------- positions


class HFViTEmbeddings(nn.Module):
    """Turn an image into a sequence, equation (1): [class token] [distillation token] [registers] patches.

    Positions are added here, or returned for the layers or the attention to use.
    """

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
    ) -> tuple[Tensor, Tensor | None, Tensor | list[list[Tensor]] | None, tuple[Tensor, Tensor] | None]:
        """Return tokens `[B, T, D]`; what is added to them before every layer, `[layers, B or 1, T, D]`, if positions
        act there; and for the attention, if they act there, a bias of its scores `[layers, B or 1, A, T, T]` and the
        cosines and sines of a rotation `[B or 1, 1, T, d]`.

        Of a pack the bias is a list for every layer, with `[1, A, L, L]` for every group of images.
        """
        if packing is not None:
            return self._pack(self.patch_embeddings(pixel_values), packing)
        grid = self.config.grid_of(*pixel_values.shape[-2:])
        patches = self.patch_embeddings(pixel_values)
        if is_masked is not None:
            patches = self._mask(patches, is_masked)
        patches = self.position_embeddings(patches, grid)
        patches, kept = self.patch_dropout(patches)
        prefix = self._prefix_tokens()
        tokens = (
            torch.cat([prefix.to(patches.dtype).expand(patches.shape[0], -1, -1), patches], dim=1)
            if prefix is not None
            else patches
        )
        added, bias = self._added_to_layers(grid, kept), self._attention_bias(grid, kept)
        return self.dropout(tokens), added, bias, self._rotation(grid, kept, tokens)

    def _pack(
        self, patches: Tensor, packing: HFViTPacking
    ) -> tuple[Tensor, Tensor | None, list[list[Tensor]] | None, tuple[Tensor, Tensor] | None]:
        """Give the patches of every image, `[1, rows, D]` together, its positions and its tokens before them."""
        positions, added, bias, rotation = {}, {}, {}, {}
        for grid in set(packing.grids):
            # What is added to zeros is the position alone, of every kind of position.
            positions[grid] = self.position_embeddings(patches.new_zeros(1, prod(grid), patches.shape[2]), grid)
            added[grid] = self._added_to_layers(grid, None)
            bias[grid] = self._attention_bias(grid, None)
            rotation[grid] = self._rotation(grid, None, patches)
        patches = patches + torch.cat([positions[grid] for grid in packing.grids], dim=1)
        prefix = self._prefix_tokens()
        tokens = patches if prefix is None else packing.prepend(prefix.to(patches.dtype), patches)
        return self.dropout(tokens), packing.added(added), packing.biases(bias), packing.rotation(rotation)

    def _mask(self, patches: Tensor, is_masked: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError("bool_masked_pos needs a mask token: build the model with use_mask_token=True.")
        if is_masked.flatten(1).shape != patches.shape[:2]:
            raise ValueError(
                f"bool_masked_pos must be [batch, patches] = {list(patches.shape[:2])}, got {list(is_masked.shape)}."
            )
        return self.mask_token(patches, is_masked.flatten(1).bool())

    def _prefix_tokens(self) -> Tensor | None:
        tokens = [self.cls_token, self.distillation_token, self.register_tokens]
        present: list[Tensor] = [token for token in tokens if token is not None]
        return self.position_embeddings.place_prefix(torch.cat(present, dim=1)) if present else None

    def _added_to_layers(self, grid: tuple[int, int], kept: Tensor | None) -> Tensor | None:
        added = self.position_embeddings.added_to_layers(grid)
        if added is None:
            return None
        prefix, patches = added
        patches = patches.unsqueeze(1) if kept is None else patches[:, kept]  # [layers, B or 1, K, D]
        placed = 0 if prefix is None else prefix.shape[1]
        patches = F.pad(patches, (0, 0, self.config.num_prefix_tokens - placed, 0))
        if prefix is None:
            return patches
        return torch.cat([prefix.unsqueeze(1).expand(-1, patches.shape[1], -1, -1), patches], dim=2)

    def _attention_bias(self, grid: tuple[int, int], kept: Tensor | None) -> Tensor | None:
        bias = self.position_embeddings.attention_bias(grid)
        if bias is None:
            return None
        bias = bias.unsqueeze(2)  # [layers, A, 1, N, N]
        if kept is not None:
            bias = bias[:, :, 0, kept.unsqueeze(2), kept.unsqueeze(1)]  # [layers, A, B, K, K]
        return self.position_embeddings.prefix_bias(bias.transpose(1, 2))  # [layers, B or 1, A, T, T]

    def _rotation(self, grid: tuple[int, int], kept: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor] | None:
        rotation = self.position_embeddings.rotation(grid, tokens.device)
        if rotation is None:
            return None
        prefix = self.config.num_prefix_tokens  # tokens without a place are not turned: cosine 1, sine 0
        turned = []
        for values, neutral in zip(rotation, (1.0, 0.0), strict=True):
            values = values.unsqueeze(0) if kept is None else values[kept]  # [B or 1, N, d]
            turned.append(F.pad(values, (0, 0, prefix, 0), value=neutral).unsqueeze(1).to(tokens.dtype))
        return turned[0], turned[1]


# --------------------------------------------------------------------------------------------------- the layer


class HFViTAttention(nn.Module):
    """Multi-head self-attention, with queries, keys and values from one matrix product.

    Its rows are ordered (head, q/k/v, head_dim), so that any shard by heads is a complete attention of its own.
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
        if packing is not None:
            hidden_states = packing.grouped(hidden_states)
        qkv = self.qkv(hidden_states).unflatten(-1, (-1, 3, self.head_dim))  # [B, T, A, 3, d]
        # Taken apart before they are transposed: the gradients are put together again in one copy.
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(3))  # [B, A, T, d] each
        query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        attend = self._attention_function(kwargs)
        if packing is not None:
            attend = packing.within_images(attend)
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
        return self.o_proj(attended.flatten(2)), weights

    def _attention_function(self, kwargs: Any) -> Callable:
        implementation = self.config._attn_implementation
        if implementation != "eager" and kwargs.get("output_attentions", self.config.output_attentions):
            logger.warning_once(
                f"Attention weights were asked for: {implementation} does not form them, so they are computed in "
                "plain matrix products, slower and with a memory of batch x heads x tokens^2 in every layer."
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
        self.mlp = (HFViTGatedMLP if config.use_gated_mlp else HFViTMLP)(config, bias=config.mlp_bias)
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


# ----------------------------------------------------------------------------------------------------- pooling


# --------------------------------------------------------------------------------------------------- the model


PUSH_OPTIONS = ("commit_message", "private", "token", "revision", "create_pr", "max_shard_size")


class HFViTPreTrainedModel(PreTrainedModel):
    """What every class of this file shares: its place in transformers, initial weights, and how it is saved."""

    config: HFViTConfig
    config_class = HFViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["HFViTEmbeddings", "HFViTLayer", "HFViTPooler"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HFViTLayer, "attentions": HFViTAttention}
    _input_embed_layer = "patch_embeddings"
    # Reads checkpoints of other libraries; set by the package where it is installed, since it does not travel along.
    _read_foreign: Callable | None = None
    _image_processor: Any = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Self:
        """Load a model as `PreTrainedModel` does; with the package installed, also from other libraries' checkpoints.

        Positions are resampled where `image_size` is given. All arguments are those of `PreTrainedModel`.
        """
        name, read = pretrained_model_name_or_path, cls._read_foreign
        if read is not None and name is not None and kwargs.get("state_dict") is None:
            foreign = read(str(name), cls.__name__, kwargs)
            if foreign is not None:
                config, state_dict, processor, kwargs = foreign
                result = super().from_pretrained(None, *model_args, config=config, state_dict=state_dict, **kwargs)
                model = result[0] if isinstance(result, tuple) else result
                model.config.name_or_path = model.name_or_path = str(name)
                model._image_processor = processor  # of the source; saved with the model
                return result
        return super().from_pretrained(name, *model_args, **kwargs)

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

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | PathLike,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save a folder that stands alone: weights, config, image processors, this code and a card.

        The weights have the names of the modules in memory, so that every `load_state_dict` reads them. A processor
        or card that lies in the folder already is left as it is. Arguments are those of `PreTrainedModel`.
        """
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if self.should_save_on_this_rank(is_main_process):
            complete_repository(save_directory, self.config, self._image_processor)
            if push_to_hub:
                options = {name: value for name, value in kwargs.items() if name in PUSH_OPTIONS}
                self.push_to_hub(repo_id or Path(save_directory).name, **options)  # type: ignore[arg-type]

    @classmethod
    def is_remote_code(cls) -> bool:
        """Keep transformers from copying code: it looks for the class's own module, which FSDP replaces."""
        return False

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # At a push, transformers puts its empty form of a card over ours.
        replace_empty_form(working_dir, self.config, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


class HFViTModel(HFViTPreTrainedModel):
    """The encoder, with the pooling that its head reads.

    Args:
        config: The architecture.
        add_pooling_layer: Whether `pooler_output` is computed.
        use_mask_token: Whether masked patches can be replaced by a learned token.
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

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
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
            pixel_values: `[B, C, H, W]`, normalised by the image processor. Any height and width that the patch
                divides: positions are resampled to the grid at hand. Of a pack, `[rows, C*ph*pw]`.
            bool_masked_pos: `[B, N]`, true where a patch is masked; for a model with a mask token.
            attention_mask: `[B, T]`, 1 for tokens that are attended to, prefix tokens first.
            patch_grids: Integers `[B, 2]`, with a pack: the (rows, columns) of each image, as the image processor
                returns them with `packing`. Tokens are then `[1, T, D]`, all images one behind the other.
            kwargs: As transformers has them: `output_attentions` and `output_hidden_states` give those of all layers.

        Returns:
            `last_hidden_state` `[B, T, D]` behind the final LayerNorm of tokens, ordered class token, distillation
            token, registers, patches row by row; `pooler_output` `[B, pooled_width]` (`[B, representation_size]`
            behind a pre-logits layer).
        """
        if pixel_values is None:
            raise ValueError("pixel_values is missing: pass what the image processor returns, [B, C, H, W].")
        packing, mask = None, None
        if patch_grids is not None or pixel_values.ndim == 2:
            refuse_beside_a_pack(self, bool_masked_pos=bool_masked_pos, attention_mask=attention_mask, **kwargs)
            packing = HFViTPacking(pixel_values, patch_grids, self.config)
        hidden_states, added, bias, rotation = self.embeddings(pixel_values, bool_masked_pos, packing)
        hidden_states = self.pre_layernorm(hidden_states)
        if packing is None:
            mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
        for number, layer in enumerate(self.layers):
            scores = mask if bias is None else with_bias(mask, bias[number])
            hidden_states = hidden_states if added is None else hidden_states + added[number]
            hidden_states = layer(hidden_states, scores, rotation, packing, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        pooled = None if self.pooler is None else self.pooler(hidden_states, packing)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


# --------------------------------------------------------------------------------------------------- the heads


class HFViTDistilledClassifier(nn.Module):
    """Classify by the class and by the distillation token, and average (arXiv:2012.12877)."""

    def __init__(self, width: int, num_labels: int) -> None:
        super().__init__()
        self.cls = nn.Linear(width // 2, num_labels)
        self.distillation = nn.Linear(width // 2, num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        cls, distillation = pooled.chunk(2, dim=-1)
        return (self.cls(cls) + self.distillation(distillation)) / 2


class HFViTForImageClassification(HFViTPreTrainedModel):
    """The encoder with a linear classifier on what the pooling gives.

    Example:
        >>> small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
        >>> model = HFViTForImageClassification(HFViTConfig(**small, image_size=32, patch_size=8)).eval()
        >>> model(torch.rand(2, 3, 32, 32)).logits.shape
        torch.Size([2, 2])
        >>> model(torch.rand(2, 3, 40, 24)).logits.shape  # positions are resampled to the grid of 5x3
        torch.Size([2, 2])
    """

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        self.vit = HFViTModel(config)
        width = config.representation_size or config.pooled_width
        classifier = HFViTDistilledClassifier if config.pooling == "cls_and_distillation" else nn.Linear
        self.classifier = classifier(width, config.num_labels) if config.num_labels else nn.Identity()
        self.loss_function = classification_loss
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # The paper fine-tunes from a head of zeros (appendix B.1.1): so does a new head on an encoder that was loaded.
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
            labels: See `classification_loss`; with labels there is a loss.
            kwargs: As for `HFViTModel`, `patch_grids` among them.

        Returns:
            `logits` `[B, num_labels]` and, with labels, `loss`.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs = self.vit(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, num_items_in_batch=num_items_in_batch)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


register_checkpoint_conversion_mapping(
    HFViTModel.__name__,
    [
        WeightConverter(
            r"position_embeddings\.(table|rows|columns|offsets)\.weight",
            r"position_embeddings.\1.weight",
            [ResamplePositions()],
        )
    ],
    overwrite=True,
)

__all__ = [
    "HFViTForImageClassification",
    "HFViTModel",
    "HFViTPreTrainedModel",
]
