"""Configuration of the Vision Transformer.

Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", ICLR 2021
(arXiv:2010.11929). Fields that transformers' own `ViTConfig` has keep its names; defaults are ViT-B/16, with the
LayerNorm epsilon of the paper's code (1e-6).

Every size is `(height, width)` and is resolved here, once: nobody else divides an image by a patch.
"""

import difflib
import inspect
from typing import Any, Literal, TypedDict

from huggingface_hub.dataclasses import strict, validate_typed_dict
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

POSITION_EMBEDDINGS = ("learned", "learned_2d", "sincos_2d", "relative", "rotary", "none")
POSITION_PLACEMENTS = ("input", "every_layer", "every_layer_shared")
POOLINGS = (
    "cls",
    "mean",
    "mean_all",
    "attention",
    "attention_patches",
    "cls_and_mean",
    "cls_and_distillation",
)
POOLINGS_OF_CLS = ("cls", "cls_and_mean", "cls_and_distillation")
FINAL_LAYERNORMS = ("tokens", "pooled", "none")
MIM_OBJECTIVES = ("pixels", "mean_color")

# Activations without weights of their own, for which neither checkpoints nor `intermediate_size` have a place.
ACTIVATIONS = sorted(set(ACT2FN) - {"prelu", "xielu"})
DTYPES = ("float64", "float32", "float16", "bfloat16")

# What numbers may be, both ends included. Below, they mean nothing; above, they are beyond every known model and what
# float32 holds, and a config from elsewhere could take any memory. Known are a width of 6,144 with 24,576 hidden units
# (arXiv:2302.05442), 1,000 layers (arXiv:2203.00555) and 2^20 patches (arXiv:2312.03558).
RANGES: dict[str, tuple[float, float]] = {
    "hidden_size": (1, 2**16),
    "num_hidden_layers": (1, 2**10),
    "num_attention_heads": (1, 2**16),
    "intermediate_size": (1, 2**16),
    "num_channels": (1, 2**16),
    "num_register_tokens": (0, 2**16),
    "head_dim": (1, 2**16),
    "representation_size": (1, 2**16),
    "stem_width": (1, 2**12),
    "num_labels": (0, 2**20),
    "initializer_range": (1e-12, 1e3),  # none: nothing would be learned
    "layer_norm_eps": (1e-30, 1e3),  # none: a token of equal numbers would be divided by zero
    "layer_scale_init_value": (-1e3, 1e3),
    "rope_theta": (1, 1e12),
}
PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "patch_dropout_prob")
LONGEST_SIDE = 2**16
MOST_PATCHES = 2**20
MOST_STAGES_OF_STEM = 8
MOST_CHANNELS_OF_COLORS = 6  # 262,144 colours

# How a table of positions is brought to another grid: arguments of `torch.nn.functional.interpolate`.
POSITION_INTERPOLATIONS: dict[str, dict[str, Any]] = {
    "bicubic_antialias": {"mode": "bicubic", "antialias": True},  # timm; the default here
    "bicubic": {"mode": "bicubic"},  # transformers' ViT, DeiT, DINO
    "bilinear_antialias": {"mode": "bilinear", "antialias": True},  # big_vision
    "bilinear": {"mode": "bilinear"},
    "bilinear_corners": {"mode": "bilinear", "align_corners": True},  # the paper's code: scipy.ndimage.zoom, order 1
}

# What other libraries call a field; kept as an unknown attribute, such a keyword would change nothing in silence.
OTHER_NAMES = {
    "depth": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "mlp_ratio": "intermediate_size",
    "mlp_dim": "intermediate_size",
    "num_classes": "num_labels",
    "in_chans": "num_channels",
    "dropout": "hidden_dropout_prob",
    "drop_rate": "hidden_dropout_prob",
    "attn_drop_rate": "attention_probs_dropout_prob",
    "layer_scale": "layer_scale_init_value",
    "init_values": "layer_scale_init_value",
    "reg_tokens": "num_register_tokens",
    "pos_embed": "position_embedding_type",
    "global_pool": "pooling",
    "pool": "pooling",
    "pre_norm": "use_pre_layernorm",
    "distilled": "use_distillation_token",
    "use_swiglu_ffn": "use_gated_mlp",
    "layerscale_value": "layer_scale_init_value",
    "base": "rope_theta",
}

CLASSES = {
    "AutoConfig": "configuration_hf_vit.HFViTConfig",
    "AutoModel": "modeling_hf_vit.HFViTModel",
    "AutoModelForImageClassification": "modeling_hf_vit.HFViTForImageClassification",
    "AutoModelForMaskedImageModeling": "dense_hf_vit.HFViTForMaskedImageModeling",
    "AutoBackbone": "dense_hf_vit.HFViTBackbone",
}


class Inherited(TypedDict, total=False):
    """Types of the fields of all configs, and of backbones; transformers takes these as they come."""

    architectures: list[str] | None
    chunk_size_feed_forward: int
    id2label: dict[int, str] | dict[str, str] | None
    is_encoder_decoder: bool
    label2id: dict[str, int] | dict[str, str] | None
    num_labels: int
    out_features: list[str] | None
    out_indices: list[int] | tuple[int, ...] | None
    output_attentions: bool | None
    output_hidden_states: bool | None
    per_layer_config: None  # one description serves all layers
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None
    return_dict: bool | None
    transformers_version: str | None


@strict
class HFViTConfig(BackboneConfigMixin, PreTrainedConfig):
    """Describe a Vision Transformer; every architecture of this package is one such description.

    Args:
        hidden_size: Width D of a token.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Heads of the attention; divides `hidden_size` unless `head_dim` is given.
        intermediate_size: Width of the MLP's hidden layer.
        hidden_act: Name of the MLP's activation in transformers' `ACT2FN`; `"gelu"` is the exact one.
        hidden_dropout_prob: Dropout after every dense layer but qkv, and after the position embeddings (appendix B.1).
        attention_probs_dropout_prob: Dropout on the attention weights.
        drop_path_rate: Stochastic depth (arXiv:1603.09382) of the last block; the rate grows linearly from 0.
        patch_dropout_prob: Deprecated. Share of patches dropped in training (arXiv:2212.00794).
        layer_scale_init_value: Start of LayerScale (arXiv:2103.17239); `None` leaves it out.
        initializer_range: Standard deviation of the initial weights.
        layer_norm_eps: Epsilon of every LayerNorm.
        image_size: Pixels, one number or `(height, width)`. The grid that position embeddings are learned on; a
            forward takes any size that the patch divides.
        patch_size: Pixels, one number or `(height, width)`.
        num_channels: Colour channels of the input.
        patch_bias: Whether the projection of patches has a bias.
        qkv_bias: Whether queries, keys and values have a bias.
        proj_bias: Whether the output projection of the attention has a bias.
        mlp_bias: Whether the MLP has biases.
        use_output_projection: Whether there is an output projection of the attention at all.
        use_gated_mlp: Whether a second projection of the MLP's input gates its hidden layer (GLU, arXiv:2002.05202),
            SwiGLU with `hidden_act="silu"`; `intermediate_size` counts hidden units, gates not included.
        use_patch_layernorm: Whether a LayerNorm stands on both sides of the projection of patches.
        use_pre_layernorm: Whether a LayerNorm stands before the first block (CLIP, arXiv:2103.00020).
        final_layernorm: Where the final LayerNorm stands: `"tokens"` (on all of them, the paper's), `"pooled"` (behind
            the pooling) or `"none"`.
        head_dim: Width of a head; `None` is `hidden_size / num_attention_heads`.
        use_qk_norm: Whether queries and keys pass a LayerNorm of their own (arXiv:2302.05442).
        num_register_tokens: Additional tokens without position (arXiv:2309.16588).
        use_cls_token: Whether there is a class token; `None` is "if the pooling needs it".
        use_distillation_token: Whether a distillation token follows the class token (DeiT, arXiv:2012.12877); `None`
            is "if the pooling needs it".
        stem_layers: Residual units of each stage of a ResNet in front of the patches, the paper's hybrid; `[]` is its
            root alone, `None` no stem. `patch_size` stays what one token covers, in pixels of the image.
        stem_width: Channels of that ResNet's root.
        position_embedding_type: `"learned"` (the paper's), `"learned_2d"` (rows and columns, D/2 each),
            `"sincos_2d"` (arXiv:2205.01580), `"relative"` (a bias a head and offset, in every block), `"rotary"`
            (queries and keys turned by their place, arXiv:2508.10104) or `"none"`.
        position_placement: Where learned positions are added: `"input"` (once, the paper's), `"every_layer"` (each
            block has its own, added to what enters it) or `"every_layer_shared"` (the same in all); its appendix D.4.
        num_prefix_positions: How many of the tokens before the patches have a position too; `None` is the class and
            distillation token for learned positions and none for others. Relative: 0, or all of them.
        rope_theta: Base of the wavelengths of `"rotary"`.
        position_interpolation: How positions are resampled to another grid; a key of `POSITION_INTERPOLATIONS`.
        pooling: What the head reads: `"cls"` (the class token), `"mean"` (of the patches), `"mean_all"` (of all
            tokens), `"attention"` (multi-head attention pooling of all tokens, arXiv:2106.04560),
            `"attention_patches"` (of the patches), `"cls_and_mean"` (both, one behind the other: DINOv2) or
            `"cls_and_distillation"` (a classifier for each, averaged: DeiT).
        representation_size: Width of the pre-logits layer with tanh of the paper's pre-training head; `None`: none.
        zero_init_head: Whether a new classifier starts at zero, as in the paper's fine-tuning.
        mim_objective: What `HFViTForMaskedImageModeling` predicts: `"pixels"` (SimMIM, arXiv:2111.09886) or
            `"mean_color"` (the paper's appendix B.1.2: 3 bits a channel).
        apply_layernorm: Whether a backbone's feature maps pass the final LayerNorm.
        reshape_hidden_states: Whether a backbone's feature maps are `[B, D, h, w]` instead of tokens.
        out_features, out_indices: Stages that a backbone returns: `"stem"`, `"stage1"`, ...

    Example:
        >>> config = HFViTConfig(image_size=(128, 256), patch_size=16, pooling="mean", num_labels=10)
        >>> config.image_shape, config.patch_shape
        ((128, 256), (16, 16))

    Raises:
        ValueError: For values that cannot work together, and for a keyword that nearly matches a field.
    """

    model_type = "hf_vit"
    _auto_class = "AutoConfig"
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
    position_interpolation: str = "bicubic_antialias"
    pooling: str = "cls"
    representation_size: int | None = None
    zero_init_head: bool = False
    mim_objective: str = "pixels"
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:
            if meant := self._field_meant_by(name):
                raise ValueError(f"Unknown field {name!r} of {type(self).__name__}: did you mean {meant!r}?")
            if self._is_taken(name):
                raise ValueError(f"{name!r} is a part of {type(self).__name__}, not a field: leave it out.")
        self._check_each({**vars(self), **kwargs})  # before anything is made of them
        if self.patch_dropout_prob:
            logger.warning_once("patch_dropout_prob is deprecated: no checkpoint or recipe uses it. Set it to 0.")
        if self.use_cls_token is None:
            self.use_cls_token = self.pooling in POOLINGS_OF_CLS
        if self.use_distillation_token is None:
            self.use_distillation_token = self.pooling == "cls_and_distillation"
        if self.num_prefix_positions is None:
            embedded = self.use_cls_token + self.use_distillation_token
            self.num_prefix_positions = embedded if self.position_embedding_type.startswith("learned") else 0
        if self.use_gated_mlp:
            self.base_model_tp_plan = {**self.base_model_tp_plan, "layers.*.mlp.gate": "colwise"}  # type: ignore[misc]
        if self.use_qk_norm:
            norms = {f"layers.*.attention.{name}": "replicated_with_grad_allreduce" for name in ("q_norm", "k_norm")}
            self.base_model_tp_plan = {**self.base_model_tp_plan, **norms}  # type: ignore[misc]
        if self.position_embedding_type == "relative":
            # Its biases are of all heads: every rank attends with all of them, and the MLPs alone are shared out.
            mlp = {name: style for name, style in self.base_model_tp_plan.items() if ".mlp." in name}
            self.base_model_tp_plan = mlp  # type: ignore[misc]
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        stages = len(self.stage_names)
        for name, value in (("out_features", out_features), ("out_indices", out_indices)):
            if value is not None and not value:
                raise ValueError(f"{name} must name a stage, got {value}: leave it out for the last one.")
        if not all(-stages <= index < stages for index in out_indices or ()):
            raise ValueError(f"out_indices must be from {-stages} to {stages - 1}, the stages, got {out_indices}.")
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        # The stage names follow from the depth; in a file from elsewhere they may be stale.
        kwargs.pop("stage_names", None)
        super().__post_init__(**kwargs)
        self.auto_map = dict(CLASSES)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "HFViTConfig":
        """Build from a stored dictionary; fields among `kwargs` win, and the whole is validated as one.

        Stored keys that are no fields may be another version's: they are kept, have no effect, and it is said.
        """
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.__annotations__}
        strangers = {name: value for name, value in config_dict.items() if cls._field_meant_by(name)}
        for name in strangers:
            logger.warning(f"The stored config has {name!r}, not a field; {cls._field_meant_by(name)!r} is one.")
        if unknown := [name for name in config_dict if name not in strangers and not cls._is_known(name)]:
            logger.warning_once(
                f"The stored config has {', '.join(map(repr, unknown))}, without effect: no field of this version. If "
                "a newer version of hf-vit wrote it, install that one."
            )
        config_dict = {name: value for name, value in {**config_dict, **overrides}.items() if name not in strangers}
        if "num_hidden_layers" in overrides:  # stored stages belong to the stored depth
            config_dict.pop("out_features", None)
            config_dict.pop("out_indices", None)
        if kwargs.get("num_labels") not in (None, len(config_dict.get("id2label") or ())):
            config_dict.pop("id2label", None)  # stored names belong to the stored number of labels
            config_dict.pop("label2id", None)
        built = super().from_dict(config_dict, **kwargs)
        for name, value in strangers.items():
            setattr(built[0] if isinstance(built, tuple) else built, name, value)
        return built

    def check(self) -> None:
        """Raise `ValueError` for values that cannot work, saying what would."""
        for name, kinds in {
            "position_embedding_type": POSITION_EMBEDDINGS,
            "position_placement": POSITION_PLACEMENTS,
            "position_interpolation": POSITION_INTERPOLATIONS,
            "pooling": POOLINGS,
            "final_layernorm": FINAL_LAYERNORMS,
            "mim_objective": MIM_OBJECTIVES,
            "hidden_act": ACTIVATIONS,
        }.items():
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} must be one of {sorted(kinds)}, got {getattr(self, name)!r}.")
        self._check_width()
        self._check_tokens()
        self._check_stem()
        self._check_sizes()
        if self.mim_objective == "mean_color" and self.num_channels > MOST_CHANNELS_OF_COLORS:
            raise ValueError(
                f"mim_objective='mean_color' tells 8^num_channels colours apart, for num_channels of at most "
                f"{MOST_CHANNELS_OF_COLORS}, got {self.num_channels}: set mim_objective='pixels'."
            )

    def _check_sizes(self) -> None:
        sizes = f"image_size={self.image_size!r} and patch_size={self.patch_size!r}"
        try:
            rows, columns = self.grid_size
        except ValueError as error:
            raise ValueError(f"{sizes}: {error}") from None
        if rows * columns > MOST_PATCHES:
            raise ValueError(f"{sizes} give {rows}x{columns} patches, more than {MOST_PATCHES}.")

    @staticmethod
    def _check_each(given: dict[str, Any]) -> None:
        """Check values that are wrong whatever the others are."""
        inherited = {name: given[name] for name in Inherited.__annotations__ if name in given}
        validate_typed_dict(Inherited, inherited)  # type: ignore[type-var]  # which takes no TypedDict for a dict
        for name, (least, most) in RANGES.items():
            value = given.get(name)
            if value is not None and not least <= value <= most:  # nor is NaN
                raise ValueError(f"{name} must be at least {least} and at most {most}, got {value}.")
        for name in PROBABILITIES:
            if not 0 <= given[name] < 1:
                raise ValueError(f"{name} is a probability in [0, 1), got {given[name]}.")
        for name in ("dtype", "torch_dtype"):
            dtype = given.get(name)
            if dtype is not None and (dtype if isinstance(dtype, str) else str(dtype)[len("torch.") :]) not in DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        labels = given.get("id2label")
        if labels is not None:
            number = given.get("num_labels", len(labels))
            if number != len(labels):
                raise ValueError(
                    f"num_labels={number} contradicts id2label, which names {len(labels)}: leave out one."
                )
            if {str(label) for label in labels} != {str(label) for label in range(number)}:
                raise ValueError(
                    f"id2label must name the classes 0 to {number - 1}, got {', '.join(map(str, labels))}."
                )

    def _check_tokens(self) -> None:
        if self.pooling in POOLINGS_OF_CLS and not self.use_cls_token:
            raise ValueError(
                f"pooling={self.pooling!r} reads the class token: set use_cls_token=True or pooling='mean'."
            )
        if self.pooling == "cls_and_distillation":
            if not self.use_distillation_token:
                raise ValueError("pooling='cls_and_distillation' needs use_distillation_token=True.")
            if self.representation_size is not None:
                raise ValueError("pooling='cls_and_distillation' has no pre-logits: set representation_size=None.")
        if self.use_distillation_token and not self.use_cls_token:
            raise ValueError("use_distillation_token=True needs a class token before it: set use_cls_token=True.")
        placed, prefix = self.num_prefix_positions, self.num_prefix_tokens
        kind = self.position_embedding_type
        if self.position_placement != "input" and not kind.startswith("learned"):
            raise ValueError(
                f"position_placement={self.position_placement!r} is for positions that are learned and added, got "
                f"position_embedding_type={kind!r}: set it to 'learned' or 'learned_2d', or the placement to 'input'."
            )
        allowed = set(range(prefix + 1)) if kind.startswith("learned") else {0, prefix} if kind == "relative" else {0}
        if placed not in allowed:
            raise ValueError(
                f"num_prefix_positions must be one of {sorted(allowed)} for {kind!r} positions and {prefix} tokens "
                f"before the patches, got {placed}."
            )

    def _check_stem(self) -> None:
        if self.stem_layers is None:
            return
        most = RANGES["num_hidden_layers"][1]
        if len(self.stem_layers) > MOST_STAGES_OF_STEM or not all(1 <= units <= most for units in self.stem_layers):
            raise ValueError(
                f"stem_layers are up to {MOST_STAGES_OF_STEM} numbers from 1 to {most}, got {list(self.stem_layers)}."
            )
        if self.stem_width % 32:
            raise ValueError(
                f"stem_width must be a multiple of 32, the groups of the stem's GroupNorm, got {self.stem_width}."
            )
        if any(size % self.stem_stride for size in self.patch_shape):
            raise ValueError(
                f"stem_layers={list(self.stem_layers)} reduce an image by {self.stem_stride}: patch_size, in pixels "
                f"of the image, must be a multiple of that, got {self.patch_size}."
            )

    def _check_width(self) -> None:
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads and (self.head_dim is None or self.pooling.startswith("attention")):
            fits = _multiples_around(width, heads)
            raise ValueError(
                f"hidden_size={width} is not divisible by num_attention_heads={heads}: "
                f"use hidden_size={' or '.join(map(str, fits))}, another number of heads, or set head_dim."
            )
        if self.position_embedding_type == "rotary" and self.head_width % 4:
            raise ValueError(
                "position_embedding_type='rotary' needs heads of a width divisible by 4, got "
                f"{self.head_width}: set head_dim."
            )
        if not self.use_output_projection and heads * self.head_width != width:
            raise ValueError(
                "use_output_projection=False needs heads that give back the width: num_attention_heads="
                f"{heads} of {self.head_width} are not hidden_size={width}."
            )
        divisor = {"learned_2d": 2, "sincos_2d": 4}.get(self.position_embedding_type, 1)
        if width % divisor:
            raise ValueError(
                f"position_embedding_type={self.position_embedding_type!r} needs hidden_size divisible by {divisor}, "
                f"got {width}: use {' or '.join(map(str, _multiples_around(width, divisor)))}."
            )

    @classmethod
    def _field_meant_by(cls, name: str) -> str | None:
        """Return the field that an unknown `name` nearly matches, if any."""
        if cls._is_known(name):
            return None
        fields = [*cls.__dataclass_fields__, "out_features", "out_indices"]
        near = [OTHER_NAMES[name]] if name in OTHER_NAMES else difflib.get_close_matches(name, fields, 1, cutoff=0.75)
        return near[0] if near else None

    @classmethod
    def _is_known(cls, name: str) -> bool:
        """Say whether a stored key is a field, or one of those that transformers writes beside them."""
        beside = ("auto_map", "stage_names", "attn_implementation", "quantization_config", "use_cache")
        names = {*cls.__dataclass_fields__, *Inherited.__annotations__, *beside}
        return name in names or name.startswith("_") or hasattr(cls, name)

    @classmethod
    def _is_taken(cls, name: str) -> bool:
        """Say whether an attribute of this `name` would hide what the class needs."""
        known = inspect.getattr_static(cls, name, None)
        return known is not None and name != "model_type" and getattr(known, "fset", None) is None

    @property
    def image_shape(self) -> tuple[int, int]:
        """`(height, width)` of the configured image, pixels."""
        return _pair("image_size", self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """`(height, width)` of a patch, pixels."""
        return _pair("patch_size", self.patch_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """`(rows, columns)` of patches in the configured image."""
        return self.grid_of(*self.image_shape)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Return `(rows, columns)` of patches in an image of `height` x `width` pixels.

        Raises:
            ValueError: If the patch does not divide the image; names the nearest sizes that fit.
        """
        patch_height, patch_width = self.patch_shape
        if height > 0 and width > 0:  # a stem pads what its stride does not divide
            height, width = (-(-size // self.stem_stride) * self.stem_stride for size in (height, width))
        if height % patch_height or width % patch_width or not (height and width):
            heights, widths = _multiples_around(height, patch_height), _multiples_around(width, patch_width)
            fits = sorted({f"{fit_height}x{fit_width}" for fit_height in heights for fit_width in widths})
            raise ValueError(
                f"An image of {height}x{width} pixels (height x width) does not divide into patches of "
                f"{patch_height}x{patch_width}: the nearest sizes that do are {', '.join(fits)}."
            )
        return height // patch_height, width // patch_width

    @property
    def head_width(self) -> int:
        """Width of one attention head, given or derived."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens that stand before the patches: class, distillation, registers."""
        return bool(self.use_cls_token) + bool(self.use_distillation_token) + self.num_register_tokens

    @property
    def pooled_width(self) -> int:
        """Width of what the pooling gives, before any pre-logits layer."""
        return self.hidden_size * (2 if self.pooling in ("cls_and_mean", "cls_and_distillation") else 1)

    @property
    def stem_stride(self) -> int:
        """Pixels of the image that one place of the stem's output covers, along each side; 1 without a stem."""
        return 1 if self.stem_layers is None else 4 * 2 ** max(len(self.stem_layers) - 1, 0)

    # transformers refuses `output_attentions` beside any attention but the eager one. This model computes the
    # weights when they are asked for, so the wish is simply kept.
    @property
    def output_attentions(self) -> bool | None:
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool | None) -> None:
        self._output_attentions = value

    def validate_output_attentions(self) -> None:
        """Accept attention weights with every attention implementation."""


def _pair(name: str, size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(1 <= side <= LONGEST_SIDE for side in pair):
        raise ValueError(
            f"{name} must be a positive number of pixels, at most {LONGEST_SIDE}, or (height, width), got {size!r}."
        )
    return pair


def _multiples_around(value: int, divisor: int) -> list[int]:
    """Return the positive multiples of `divisor` next to `value`, or `value` itself where it is one."""
    below = value // divisor * divisor
    return [size for size in dict.fromkeys((below, -(-value // divisor) * divisor)) if size > 0] or [divisor]
