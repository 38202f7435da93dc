"""Configuration of the Vision Transformer.

Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", ICLR 2021
(arXiv:2010.11929). Fields of transformers' own `ViTConfig` keep their names. The defaults describe ViT-B/16 with the
LayerNorm epsilon of the paper's code (1e-6).

Sizes are `(height, width)`. Only this file divides image sizes by patch sizes.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .heads_hf_vit import checked_heads
from .labels_hf_vit import LABELS, label_pair, merge_labels, normalizes_values, plain
from .validation_hf_vit import (
    POOLINGS_OF_CLS,
    POSITION_INTERPOLATIONS,
    check_config,
    check_fields,
    field_meant_by,
    is_known,
    is_taken,
    multiples_around,
    pair,
)

logger = logging.get_logger(__name__)

CLASSES = {
    "AutoConfig": "configuration_hf_vit.HFViTConfig",
    "AutoModel": "modeling_hf_vit.HFViTModel",
    "AutoModelForImageClassification": "modeling_hf_vit.HFViTForImageClassification",
    "AutoModelForMaskedImageModeling": "dense_hf_vit.HFViTForMaskedImageModeling",
    "AutoModelForSemanticSegmentation": "segmentation_hf_vit.HFViTForSemanticSegmentation",
    "AutoModelForObjectDetection": "detection_hf_vit.HFViTForObjectDetection",
    "AutoBackbone": "dense_hf_vit.HFViTBackbone",
}
MULTI_TASK = "multi_task_hf_vit.HFViTForMultiTask"
# By task: the pipeline in a repository's code, and the Auto class of its model; the last one is for all other models.
PIPELINES = {
    "image-classification": ("HFViTImageClassificationPipeline", "AutoModelForImageClassification"),
    "image-segmentation": ("HFViTImageSegmentationPipeline", "AutoModelForSemanticSegmentation"),
    "multi-task": ("HFViTMultiTaskPipeline", "AutoModel"),
    "object-detection": ("HFViTObjectDetectionPipeline", "AutoModelForObjectDetection"),
    "image-feature-extraction": ("HFViTImageFeatureExtractionPipeline", "AutoModel"),
}


def task_of(config: PreTrainedConfig) -> str:
    """Return the task, as named by pipelines, of the model that a config was saved with."""
    endings = {task: auto_class.removeprefix("AutoModel") for task, (_, auto_class) in PIPELINES.items()}
    endings["multi-task"] = MULTI_TASK.rpartition(".")[2]
    names = config.architectures or [""]
    return next(task for task, ending in endings.items() if any(name.endswith(ending) for name in names))


def classes_for(config: PreTrainedConfig) -> dict[str, str]:
    """Return the class that each Auto class loads for a config; `AutoModel` also loads multi-task models."""
    return {**CLASSES, "AutoModel": MULTI_TASK} if task_of(config) == "multi-task" else dict(CLASSES)


class PipelineOfRepository:
    """The pipeline of a model's task, in the format in which transformers' `pipeline` finds remote code in a config.

    An attribute of an instance overrides it. The installed package registers its pipelines and overrides it for all
    configs.
    """

    def __get__(self, config: "HFViTConfig | None", owner: type) -> dict[str, dict[str, Any]]:
        if config is None:
            return {}
        name, auto_class = PIPELINES[task_of(config)]
        return {task_of(config): {"impl": f"pipeline_hf_vit.{name}", "pt": [auto_class]}}


@normalizes_values
@strict
class HFViTConfig(BackboneConfigMixin, PreTrainedConfig):
    """Describe the architecture of a Vision Transformer.

    Args:
        hidden_size (`int`, *optional*, defaults to 768): Width D of the tokens.
        num_hidden_layers (`int`, *optional*, defaults to 12): Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 12): Number of attention heads; divides `hidden_size`
            unless `head_dim` is given.
        intermediate_size (`int`, *optional*, defaults to 3072): Width of the hidden layer of the MLP.
        hidden_act (`str`, *optional*, defaults to `"gelu"`): Activation of the MLP, a key of transformers' `ACT2FN`.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0): Dropout after every dense layer except qkv, and
            after the position embeddings (appendix B.1).
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0): Dropout of the attention weights.
        drop_path_rate (`float`, *optional*, defaults to 0.0): Stochastic depth (arXiv:1603.09382) of the last layer;
            the rate grows linearly from 0.
        patch_dropout_prob (`float`, *optional*, defaults to 0.0): Deprecated. Share of patches dropped in training
            (arXiv:2212.00794).
        layer_scale_init_value (`float`, *optional*): Initial value of LayerScale (arXiv:2103.17239); `None` for none.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of the initial weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6): Epsilon of all LayerNorms.
        image_size (`int` or `(height, width)`, *optional*, defaults to 224): Size in pixels that position embeddings
            are learned for. The model accepts any size that is a multiple of the patch size.
        patch_size (`int` or `(height, width)`, *optional*, defaults to 16): Size of a patch in pixels.
        num_channels (`int`, *optional*, defaults to 3): Number of color channels.
        patch_bias (`bool`, *optional*, defaults to `True`): Whether the patch projection has a bias.
        qkv_bias (`bool`, *optional*, defaults to `True`): Whether queries, keys and values have a bias.
        proj_bias (`bool`, *optional*, defaults to `True`): Whether the attention's output projection has a bias.
        mlp_bias (`bool`, *optional*, defaults to `True`): Whether the MLP has biases.
        head_dim (`int`, *optional*): Width of a head; `None` for `hidden_size / num_attention_heads`.
        use_qk_norm (`bool`, *optional*, defaults to `False`): Whether a LayerNorm is applied to queries and to keys
            (arXiv:2302.05442).
        use_output_projection (`bool`, *optional*, defaults to `True`): Whether the attention has an output projection.
        use_attention_layernorm (`bool`, *optional*, defaults to `False`): Whether a LayerNorm precedes the output
            projection of the attention (Sub-LN, arXiv:2210.06423).
        use_mlp_layernorm (`bool`, *optional*, defaults to `False`): Whether a LayerNorm precedes the second projection
            of the MLP (NormFormer, arXiv:2110.09456).
        use_gated_mlp (`bool`, *optional*, defaults to `False`): Whether a second projection gates the hidden layer of
            the MLP (GLU, arXiv:2002.05202); SwiGLU with `hidden_act="silu"`. `intermediate_size` excludes the gates.
        use_patch_layernorm (`bool`, *optional*, defaults to `False`): Whether a LayerNorm precedes and another follows
            the patch projection.
        use_pre_layernorm (`bool`, *optional*, defaults to `False`): Whether a LayerNorm precedes the first layer
            (CLIP, arXiv:2103.00020).
        final_layernorm (`str`, *optional*, defaults to `"tokens"`): Position of the final LayerNorm: `"tokens"` (on
            all tokens, as in the paper), `"pooled"` (after pooling) or `"none"`.
        num_register_tokens (`int`, *optional*, defaults to 0): Number of register tokens, which have no position
            (arXiv:2309.16588).
        use_cls_token (`bool`, *optional*): Whether there is a class token; `None` adds it if the pooling needs it.
        use_distillation_token (`bool`, *optional*): Whether a distillation token follows the class token (DeiT,
            arXiv:2012.12877); `None` adds it if the pooling needs it.
        stem_layers (`list[int]`, *optional*): Residual units per stage of a ResNet before the patch projection, the
            paper's hybrid; `[]` for only its root, `None` for no stem. `patch_size` is still in pixels of the image.
        stem_width (`int`, *optional*, defaults to 64): Number of channels of the root of that ResNet.
        position_embedding_type (`str`, *optional*, defaults to `"learned"`): `"learned"` (the paper's), `"learned_2d"`
            (rows and columns, D/2 each), `"sincos_2d"` (arXiv:2205.01580), `"relative"` (a bias per head and offset in
            every layer), `"rotary"` (rotated queries and keys, arXiv:2508.10104), `"learned_rotary"` (learned and
            rotary ones, EVA-02, arXiv:2303.11331) or `"none"`.
        position_placement (`str`, *optional*, defaults to `"input"`): Where learned positions are added: `"input"`
            (once, as in the paper), `"every_layer"` (a table per layer) or `"every_layer_shared"` (one table for all
            layers; the paper's appendix D.4).
        num_prefix_positions (`int`, *optional*): Number of tokens before the patches that have a position. `None`
            counts the class and distillation tokens for learned positions, and is 0 otherwise. Relative positions
            allow 0 or all.
        rope_theta (`float`, *optional*, defaults to 100.0): Base of the wavelengths of rotary positions.
        rope_coordinates (`str`, *optional*, defaults to `"centered"`): Coordinates of rotary positions: `"centered"`
            (centers of the patches, from -1 to 1 along each side of the image, arXiv:2508.10104) or `"index"` (row and
            column indices, arXiv:2403.13298).
        rope_grid (`int` or `(rows, columns)`, *optional*): Grid of the pre-training, to which `"index"` coordinates on
            other grids are scaled; `None` for no scaling.
        rope_offset (`float`, *optional*, defaults to 0.0): Index of the first row and column; the tokens before the
            patches have index 0.
        position_interpolation (`str`, *optional*, defaults to `"bicubic_antialias"`): Resampling of positions to
            another grid, a key of `POSITION_INTERPOLATIONS`; for `"relative"`, also `"geometric_bilinear"` (timm's
            BEiT) or `"geometric_bicubic"` (the authors' BEiT).
        pooling (`str`, *optional*, defaults to `"cls"`): Input of the head: `"cls"` (the class token), `"mean"` (mean
            of the patches), `"mean_all"` (mean of all tokens), `"attention"` (multi-head attention pooling of all
            tokens, arXiv:2106.04560), `"attention_patches"` (of the patches), `"cls_and_mean"` (concatenated: DINOv2)
            or `"cls_and_distillation"` (one classifier for each token, averaged: DeiT).
        num_pooling_heads (`int`, *optional*): Number of heads of attention pooling; `None` for `num_attention_heads`.
        representation_size (`int`, *optional*): Width of the pre-logits layer with tanh of the paper's pre-training
            head; `None` for none.
        zero_init_head (`bool`, *optional*, defaults to `False`): Whether a new classifier starts at zero, as in the
            paper's fine-tuning.
        temperature (`float`, *optional*, defaults to 1.0): Divisor of the logits of a classifier, which calibrates its
            probabilities (arXiv:1706.04599).
        thresholds (`list[float]`, *optional*): Minimum probability at which each label counts as present, for a
            classifier with several labels per image; `None` for 0.5. The logits do not depend on it.
        abstention_threshold (`float`, *optional*): Minimum probability of the most likely label at which a classifier
            with one label per image answers; below it, the answer is "unknown". `None` if it always answers.
        label_set_threshold (`float`, *optional*): Minimum probability of the labels in the label set of an image,
            which also contains the most likely label; `None` for no label sets.
        label_set_coverage (`float`, *optional*): Coverage that `label_set_threshold` was fitted for: the share of
            images of the same kind whose label set contains the true label.
        target_mean, target_scale (`list[float]`, *optional*): Mean and standard deviation of each target of a
            regression. The head predicts standardized targets, and the logits are in the targets' own units; `None`
            if the head predicts in these units directly.
        mim_objective (`str`, *optional*, defaults to `"pixels"`): Target of `HFViTForMaskedImageModeling`: `"pixels"`
            (SimMIM, arXiv:2111.09886), `"mean_color"` (the paper's appendix B.1.2: 3 bits per channel) or
            `"autoencoder"` (MAE, arXiv:2111.06377: normalized pixels, from only the visible patches).
        decoder_hidden_size (`int`, *optional*, defaults to 512): Width of the decoder of an autoencoder
            (`mim_objective`), whose MLPs are four times as wide.
        decoder_num_hidden_layers (`int`, *optional*, defaults to 8): Number of layers of that decoder.
        decoder_num_attention_heads (`int`, *optional*, defaults to 16): Number of attention heads of that decoder.
        patch_subdivision (`int`, *optional*, defaults to 4): Number of parts along each side of a patch for which
            `HFViTForSemanticSegmentation` predicts classes, and `HFViTForObjectDetection` objects (a power of two).
        decoder_kernel_size (`int`, *optional*, defaults to 1): Side in patches, odd, of a convolution before the
            classifier of `HFViTForSemanticSegmentation`; 1 for a linear head. Training a new head sets 3.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255): Class index of pixels that are ignored in the
            loss of `HFViTForSemanticSegmentation`.
        task_heads (`dict`, *optional*): Heads of `HFViTForMultiTask` by name: dictionaries with a `task`
            (`"classification"`, `"multi_label"`, `"regression"`, `"segmentation"`, `"detection"` or `"anomaly"`),
            `id2label`, and other fields of that head.
        apply_layernorm (`bool`, *optional*, defaults to `True`): Whether the final LayerNorm is applied to the feature
            maps of a backbone.
        reshape_hidden_states (`bool`, *optional*, defaults to `True`): Whether the feature maps of a backbone are
            `[B, D, h, w]` instead of tokens.
        feature_strides (`list[int]`, *optional*): Strides in pixels of the maps of a pyramid on the last layer
            (arXiv:2203.16527), which a backbone returns instead of layers, such as `[4, 8, 16, 32]`.
        out_features, out_indices (`list`, *optional*): Stages that a backbone returns and that the head of
            `HFViTForSemanticSegmentation` reads: `"stem"`, `"stage1"`, ...; the last one by default. With
            `feature_strides`: `"stride4"`, `"stride8"`, ...; all by default.

    Raises:
        ValueError: For invalid or incompatible values, and for a keyword that nearly matches a field.

    Example:
        >>> config = HFViTConfig(image_size=(128, 256), patch_size=16, pooling="mean", num_labels=10)
        >>> config.image_shape, config.patch_shape
        ((128, 256), (16, 16))
    """

    model_type = "hf_vit"
    _auto_class = "AutoConfig"
    custom_pipelines: ClassVar[Any] = PipelineOfRepository()
    keys_to_ignore_at_inference = ["heatmap"]  # an input of the loss, which Trainer would keep for all images
    base_model_tp_plan = {
        "layers.*.attention.qkv": "colwise",  # rows are ordered (head, q/k/v, head_dim): a shard is whole heads
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    }
    base_model_fsdp_plan = {"layers.*": "free_full_weight"}

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    patch_dropout_prob: float | int = 0.0
    layer_scale_init_value: float | int | None = None
    initializer_range: float | int = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    patch_bias: bool = True
    qkv_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    head_dim: int | None = None
    use_qk_norm: bool = False
    use_output_projection: bool = True
    use_attention_layernorm: bool = False
    use_mlp_layernorm: bool = False
    use_gated_mlp: bool = False
    use_patch_layernorm: bool = False
    use_pre_layernorm: bool = False
    final_layernorm: str = "tokens"
    num_register_tokens: int = 0
    use_cls_token: bool | None = None
    use_distillation_token: bool | None = None
    stem_layers: list[int] | tuple[int, ...] | None = None
    stem_width: int = 64
    position_embedding_type: str = "learned"
    position_placement: str = "input"
    num_prefix_positions: int | None = None
    rope_theta: float | int = 100.0
    rope_coordinates: str = "centered"
    rope_grid: int | list[int] | tuple[int, int] | None = None
    rope_offset: float | int = 0.0
    position_interpolation: str = "bicubic_antialias"
    pooling: str = "cls"
    num_pooling_heads: int | None = None
    representation_size: int | None = None
    zero_init_head: bool = False
    temperature: float | int = 1.0
    thresholds: list[float | int] | None = None
    abstention_threshold: float | int | None = None
    label_set_threshold: float | int | None = None
    label_set_coverage: float | int | None = None
    target_mean: list[float | int] | None = None
    target_scale: list[float | int] | None = None
    mim_objective: str = "pixels"
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    patch_subdivision: int = 4
    decoder_kernel_size: int = 1
    semantic_loss_ignore_index: int = 255
    task_heads: dict[str, dict[str, Any]] | None = None
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    feature_strides: list[int] | tuple[int, ...] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs = {name: plain(value) for name, value in kwargs.items()}
        for name in kwargs:
            if meant := field_meant_by(type(self), name):
                raise ValueError(f"Unknown field {name!r} of {type(self).__name__}: did you mean {meant!r}?")
            if is_taken(type(self), name):
                raise ValueError(f"{name!r} is a part of {type(self).__name__}, not a field: remove it.")
        check_fields({**vars(self), **kwargs})
        if self.id2label is not None or self.label2id is not None:
            self.id2label, self.label2id = label_pair(self.id2label, self.label2id)
        if self.patch_dropout_prob:
            logger.warning_once("patch_dropout_prob is deprecated: no checkpoint or recipe uses it. Set it to 0.")
        if self.use_cls_token is None:
            self.use_cls_token = self.pooling in POOLINGS_OF_CLS
        if self.use_distillation_token is None:
            self.use_distillation_token = self.pooling == "cls_and_distillation"
        if self.num_prefix_positions is None:
            embedded = self.use_cls_token + self.use_distillation_token
            self.num_prefix_positions = embedded if self.position_embedding_type.startswith("learned") else 0
        if (plan := self._tensor_parallel_plan()) != self.base_model_tp_plan:
            self.base_model_tp_plan = plan  # type: ignore[misc]
        self._set_stages(kwargs.pop("out_features", None), kwargs.pop("out_indices", None))
        kwargs.pop("stage_names", None)  # derived from the depth; a stored value may not match it
        super().__post_init__(**kwargs)
        if self.architectures is None:  # `AutoModel` chooses the class by it
            self.architectures = [] if self.task_heads is None else [MULTI_TASK.rpartition(".")[2]]
        self.auto_map = classes_for(self)
        self.check()
        self.task_heads = checked_heads(self)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the config as `PreTrainedConfig` does, after checking label names that were changed in place."""
        self.id2label = self.id2label
        self.auto_map = classes_for(self)  # for the architecture that a model sets when it is saved
        super().save_pretrained(*args, **kwargs)

    def check(self) -> None:
        """Raise `ValueError` for incompatible values; the message suggests a fix."""
        check_config(self)

    def _tensor_parallel_plan(self) -> dict[str, str]:
        plan = dict(self.base_model_tp_plan)
        if self.use_gated_mlp:
            plan["layers.*.mlp.gate"] = "colwise"
        if self.use_qk_norm:
            plan |= {f"layers.*.attention.{name}": "replicated_with_grad_allreduce" for name in ("q_norm", "k_norm")}
        # Relative biases cover all heads, and a LayerNorm before the second projection covers all of its inputs. Every
        # rank therefore computes that whole part of the layer.
        whole = {
            ".attention.": self.position_embedding_type == "relative" or self.use_attention_layernorm,
            ".mlp.": self.use_mlp_layernorm,
        }
        parts = [part for part, is_whole in whole.items() if is_whole]
        return {name: style for name, style in plan.items() if not any(part in name for part in parts)}

    def _set_stages(self, out_features: list[str] | None, out_indices: list[int] | None) -> None:
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        if self.feature_strides is not None:
            self.stage_names = [f"stride{stride}" for stride in self.feature_strides]
            if out_features is None and out_indices is None:
                out_features = list(self.stage_names)
        stages = len(self.stage_names)
        for name, value in (("out_features", out_features), ("out_indices", out_indices)):
            if value is not None and not value:
                raise ValueError(f"{name} must name a stage, got {value}: omit it to get the last stage.")
        if not all(-stages <= index < stages for index in out_indices or ()):
            raise ValueError(f"out_indices must be from {-stages} to {stages - 1}, the stages, got {out_indices}.")
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "HFViTConfig":
        """Build a config from a stored dictionary; fields in `kwargs` override stored ones before validation.

        Unknown stored keys, which another version may have written, are kept but have no effect; a warning names them.
        """
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.__annotations__}
        unknown = {name: field_meant_by(cls, name) for name in config_dict if not is_known(cls, name)}
        for name, meant in unknown.items():
            if meant:
                logger.warning(f"The stored config has {name!r}, which is not a field: did you mean {meant!r}?")
        if newer := [name for name, meant in unknown.items() if not meant]:
            logger.warning_once(
                f"The stored config has {', '.join(map(repr, newer))}, without effect: no field of this version. If a "
                "newer version of hf-vit wrote the config, install that version."
            )
        misspelt = {name: config_dict[name] for name, meant in unknown.items() if meant}
        config_dict = {name: value for name, value in config_dict.items() if name not in misspelt}
        of_stages = [name for name in ("num_hidden_layers", "feature_strides") if name in overrides]
        changed = any(overrides[name] != config_dict.get(name) for name in of_stages)
        labels = {name: kwargs.pop(name, None) for name in (*LABELS, "num_labels")}
        labels = {name: value for name, value in labels.items() if value is not None}
        config_dict = {**merge_labels(config_dict, labels), **labels, **overrides}
        if changed:  # stored stages belong to the stored values
            config_dict.pop("out_features", None)
            config_dict.pop("out_indices", None)
        built = super().from_dict(config_dict, **kwargs)
        for name, value in misspelt.items():
            setattr(built[0] if isinstance(built, tuple) else built, name, value)
        return built

    @property
    def image_shape(self) -> tuple[int, int]:
        """`(height, width)` of the configured image in pixels."""
        return pair("image_size", self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """`(height, width)` of a patch in pixels."""
        return pair("patch_size", self.patch_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """`(rows, columns)` of patches in the configured image."""
        return self.grid_of(*self.image_shape)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Return `(rows, columns)` of patches in an image of `height` x `width` pixels.

        Raises:
            ValueError: If the patch does not divide the image; the message lists the nearest sizes that work.
        """
        patch_height, patch_width = self.patch_shape
        if height > 0 and width > 0:  # a stem pads sides that its stride does not divide
            height, width = (-(-size // self.stem_stride) * self.stem_stride for size in (height, width))
        if height % patch_height or width % patch_width or not (height and width):
            heights, widths = multiples_around(height, patch_height), multiples_around(width, patch_width)
            fits = sorted({f"{fit_height}x{fit_width}" for fit_height in heights for fit_width in widths})
            raise ValueError(
                f"An image of {height}x{width} pixels (height x width) does not divide into patches of "
                f"{patch_height}x{patch_width}: the nearest sizes that work are {', '.join(fits)}."
            )
        return height // patch_height, width // patch_width

    @property
    def head_width(self) -> int:
        """Width of an attention head, given or derived."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    @property
    def pooling_heads(self) -> int:
        """Number of heads of attention pooling, given or derived."""
        return self.num_attention_heads if self.num_pooling_heads is None else self.num_pooling_heads

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class, distillation and register tokens before the patches."""
        return bool(self.use_cls_token) + bool(self.use_distillation_token) + self.num_register_tokens

    @property
    def pooled_width(self) -> int:
        """Width of the pooled output, before any pre-logits layer."""
        return self.hidden_size * (2 if self.pooling in ("cls_and_mean", "cls_and_distillation") else 1)

    @property
    def stem_stride(self) -> int:
        """Stride of the stem in image pixels; 1 without a stem."""
        return 1 if self.stem_layers is None else 4 * 2 ** max(len(self.stem_layers) - 1, 0)

    # transformers accepts `output_attentions` with eager attention only. This model computes the weights on demand
    # with every implementation, so the setter and the validator accept any value.
    @property
    def output_attentions(self) -> bool | None:
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool | None) -> None:
        self._output_attentions = value

    def validate_output_attentions(self) -> None:
        """Accept `output_attentions` with every attention implementation."""


__all__ = ["CLASSES", "POSITION_INTERPOLATIONS", "HFViTConfig"]
