"""Checks of `HFViTConfig`: the values that each field accepts, and the combinations that do not work.

`configuration_hf_vit` imports this file, so the functions below receive the config or its class as an argument.
"""

import difflib
import inspect
from collections.abc import Collection, Iterator
from typing import Any, Literal, TypedDict

from huggingface_hub.dataclasses import validate_typed_dict
from transformers.activations import ACT2FN

POSITION_EMBEDDINGS = ("learned", "learned_2d", "sincos_2d", "relative", "rotary", "learned_rotary", "none")
ROTARY = ("rotary", "learned_rotary")
ROPE_COORDINATES = ("centered", "index")
POSITION_PLACEMENTS = ("input", "every_layer", "every_layer_shared")
POOLINGS = ("cls", "mean", "mean_all", "attention", "attention_patches", "cls_and_mean", "cls_and_distillation")
POOLINGS_OF_CLS = ("cls", "cls_and_mean", "cls_and_distillation")
FINAL_LAYERNORMS = ("tokens", "pooled", "none")
MIM_OBJECTIVES = ("pixels", "mean_color", "autoencoder")
# Activations with weights are excluded: no checkpoint layout stores them.
ACTIVATIONS = sorted(set(ACT2FN) - {"prelu", "xielu"})
DTYPES = ("float64", "float32", "float16", "bfloat16")

# Arguments of `torch.nn.functional.interpolate` that resample a position table to another grid. An "offset" is added
# to the size of the new grid to get the scale: DINO's way to avoid a grid that is one patch too small.
POSITION_INTERPOLATIONS: dict[str, dict[str, Any]] = {
    "bicubic_antialias": {"mode": "bicubic", "antialias": True},  # timm; the default here
    "bicubic": {"mode": "bicubic"},  # transformers' ViT, DeiT, DINOv2; MAE
    "bicubic_offset": {"mode": "bicubic", "offset": 0.1},  # the original code of DINO and DINOv2
    "bilinear_antialias": {"mode": "bilinear", "antialias": True},  # big_vision
    "bilinear": {"mode": "bilinear"},
    "bilinear_corners": {"mode": "bilinear", "align_corners": True},  # the paper's code: scipy.ndimage.zoom, order 1
}
# Degrees of the splines over geometric offsets (splines_hf_vit.py) that resample relative positions instead.
GEOMETRIC_SPLINES = {
    "geometric_bilinear": 1,  # timm's BEiT and VisionTransformerRelPos
    "geometric_bicubic": 3,  # the original code of BEiT, BEiT v2 and data2vec
}

CHOICES: dict[str, Collection[str]] = {
    "position_embedding_type": POSITION_EMBEDDINGS,
    "position_placement": POSITION_PLACEMENTS,
    "position_interpolation": (*POSITION_INTERPOLATIONS, *GEOMETRIC_SPLINES),
    "rope_coordinates": ROPE_COORDINATES,
    "pooling": POOLINGS,
    "final_layernorm": FINAL_LAYERNORMS,
    "mim_objective": MIM_OBJECTIVES,
    "hidden_act": ACTIVATIONS,
}

# Minimum and maximum values. The maximums are above those of every published model and within the range of float32.
# They prevent an untrusted config from allocating an arbitrary amount of memory. The largest published models have
# width 6,144 with 24,576 hidden units (arXiv:2302.05442), 1,000 layers (arXiv:2203.00555), 2^20 patches
# (arXiv:2312.03558).
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("hidden_size", "num_attention_heads", "intermediate_size", "num_channels"), (1, 2**16)),
    **dict.fromkeys(("head_dim", "representation_size", "num_pooling_heads"), (1, 2**16)),
    **dict.fromkeys(("decoder_hidden_size", "decoder_num_attention_heads"), (1, 2**16)),
    **dict.fromkeys(("num_hidden_layers", "decoder_num_hidden_layers"), (1, 2**10)),
    "num_register_tokens": (0, 2**16),
    "stem_width": (1, 2**12),
    "num_labels": (0, 2**20),
    "initializer_range": (1e-12, 1e3),  # at 0 nothing would be learned
    "layer_norm_eps": (1e-30, 1e3),  # at 0 a constant token would be divided by zero
    "layer_scale_init_value": (-1e3, 1e3),
    "rope_theta": (1, 1e12),
    "rope_offset": (-(2**16), 2**16),
    "temperature": (1e-3, 1e3),
    **dict.fromkeys(("abstention_threshold", "label_set_threshold", "label_set_coverage"), (0, 1)),
    "patch_subdivision": (1, 64),
    "decoder_kernel_size": (1, 31),
}
PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "patch_dropout_prob")
# Fields that describe a trained head, with their values for a new head: the scale of its outputs, and thresholds.
# The thresholds of certainty are valid only for the probabilities they were fitted to; further training resets them.
OF_SCALE: dict[str, Any] = {"temperature": 1.0, "target_mean": None, "target_scale": None}
OF_CERTAINTY: dict[str, Any] = {"abstention_threshold": None, "label_set_threshold": None, "label_set_coverage": None}
OF_HEAD: dict[str, Any] = {**OF_SCALE, **OF_CERTAINTY, "thresholds": None}
MAX_TARGET = 1e30
MAX_SIDE = 2**16
MAX_PATCHES = 2**20
MAX_STEM_STAGES = 8
MAX_DOUBLINGS = 5  # of the patch grid in a pyramid, and as many halvings
MAX_COLOR_CHANNELS = 6  # 8^6 = 262,144 colors

# Names of the fields in other libraries. Without this table, such a keyword would be stored and have no effect.
OTHER_NAMES = {
    name: field
    for field, names in {
        "num_hidden_layers": ("depth", "num_layers"),
        "hidden_size": ("embed_dim", "dim"),
        "num_attention_heads": ("num_heads",),
        "intermediate_size": ("mlp_ratio", "mlp_dim"),
        "num_labels": ("num_classes",),
        "num_channels": ("in_chans",),
        "hidden_dropout_prob": ("dropout", "drop_rate"),
        "attention_probs_dropout_prob": ("attn_drop_rate",),
        "layer_scale_init_value": ("layer_scale", "init_values", "layerscale_value"),
        "num_register_tokens": ("reg_tokens",),
        "position_embedding_type": ("pos_embed",),
        "pooling": ("global_pool", "pool"),
        "use_pre_layernorm": ("pre_norm",),
        "use_distillation_token": ("distilled",),
        "use_gated_mlp": ("use_swiglu_ffn",),
        "rope_theta": ("base", "rope_temperature"),
        "rope_grid": ("ref_feat_shape",),
        "rope_offset": ("rope_grid_offset",),
        "use_attention_layernorm": ("scale_attn_norm", "scale_attn_inner"),
        "use_mlp_layernorm": ("scale_mlp_norm", "scale_mlp"),
    }.items()
    for name in names
}

# Keys that transformers stores in a config although they are not fields of it.
STORED_BY_TRANSFORMERS = {
    *("auto_map", "custom_pipelines", "stage_names", "attn_implementation", "quantization_config", "use_cache")
}


class Inherited(TypedDict, total=False):
    """Types of the fields that all configs and backbones have; transformers itself does not check them."""

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
    per_layer_config: None  # all layers share one configuration
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None
    return_dict: bool | None
    transformers_version: str | None


def field_meant_by(config_class: Any, name: str) -> str | None:
    """Return the field that an unknown `name` probably stands for, or `None`."""
    if is_known(config_class, name):
        return None
    fields = [*config_class.__dataclass_fields__, "out_features", "out_indices"]
    near = [OTHER_NAMES[name]] if name in OTHER_NAMES else difflib.get_close_matches(name, fields, 1, cutoff=0.75)
    return near[0] if near else None


def is_known(config_class: Any, name: str) -> bool:
    """Return whether a stored key is a field, or a key that transformers adds."""
    names = {*config_class.__dataclass_fields__, *Inherited.__annotations__, *STORED_BY_TRANSFORMERS}
    return name in names or name.startswith("_") or hasattr(config_class, name)


def is_taken(config_class: Any, name: str) -> bool:
    """Return whether an attribute called `name` would hide a method or property of the class."""
    known = inspect.getattr_static(config_class, name, None)
    return (
        known is not None and name not in ("model_type", "custom_pipelines") and getattr(known, "fset", None) is None
    )


def check_fields(given: dict[str, Any]) -> None:
    """Check each value on its own, before anything is derived from it.

    Raises:
        ValueError: For a value out of its range, an unknown dtype, or a `num_labels` that contradicts `id2label`.
    """
    inherited = {name: given[name] for name in Inherited.__annotations__ if name in given}
    validate_typed_dict(Inherited, inherited)  # type: ignore[type-var]  # its annotation excludes TypedDict
    for name, (least, most) in RANGES.items():
        value = given.get(name)
        if value is not None and not least <= value <= most:  # also true for NaN
            raise ValueError(f"{name} must be at least {least} and at most {most}, got {value}.")
    for name in PROBABILITIES:
        if not 0 <= given[name] < 1:
            raise ValueError(f"{name} must be a probability in [0, 1), got {given[name]}.")
    for name in ("dtype", "torch_dtype"):
        dtype = given.get(name)
        if dtype is not None and (dtype if isinstance(dtype, str) else str(dtype)[len("torch.") :]) not in DTYPES:
            raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    strides = given["feature_strides"]
    if strides is not None and not (strides and list(strides) == sorted({*strides}) and strides[0] >= 1):
        raise ValueError(f"feature_strides must be positive numbers of pixels in increasing order, got {strides}.")
    labels = given.get("id2label")
    number = given.get("num_labels")
    if labels is not None and number not in (None, len(labels)):
        raise ValueError(f"num_labels={number} contradicts id2label, which has {len(labels)} names: pass only one.")


def pair(name: str, size: int | list[int] | tuple[int, int], unit: str = "pixels") -> tuple[int, int]:
    """Return a size in pixels or patches as `(height, width)`; raise `ValueError` if it is not a valid size."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(1 <= side <= MAX_SIDE for side in sides):
        raise ValueError(f"{name} must be 1 to {MAX_SIDE} {unit}, one number or (height, width), got {size!r}.")
    return sides


def multiples_around(value: int, divisor: int) -> list[int]:
    """Return the positive multiples of `divisor` next to `value`, or `[value]` if it is a multiple."""
    below = value // divisor * divisor
    return [size for size in dict.fromkeys((below, -(-value // divisor) * divisor)) if size > 0] or [divisor]


def check_config(config: Any) -> None:
    """Raise `ValueError` for the first invalid combination of values; the message suggests a fix."""
    for problems in (_choices, _decoder, _head, _width, _tokens, _stem, _sizes, _strides):
        for problem in problems(config):
            raise ValueError(problem)


def _choices(config: Any) -> Iterator[str]:
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            yield f"{name} must be one of {', '.join(sorted(choices))}, got {getattr(config, name)!r}."
    if config.decoder_kernel_size % 2 == 0:
        yield f"decoder_kernel_size must be odd, got {config.decoder_kernel_size}: set 3, or 1 for a linear head."
    if config.mim_objective == "mean_color" and config.num_channels > MAX_COLOR_CHANNELS:
        yield (
            "mim_objective='mean_color' predicts one of 8^num_channels colours and needs num_channels of at most "
            f"{MAX_COLOR_CHANNELS}, got {config.num_channels}: set mim_objective='pixels'."
        )


def _decoder(config: Any) -> Iterator[str]:
    if config.mim_objective != "autoencoder":
        return
    width, heads = config.decoder_hidden_size, config.decoder_num_attention_heads
    for divisor, whose in ((heads, f"decoder_num_attention_heads={heads}"), (4, "4, for its positions")):
        if width % divisor:
            yield (
                f"decoder_hidden_size={width} is not divisible by {whose}: use "
                f"{' or '.join(map(str, multiples_around(width, divisor)))}."
            )
    if config.num_channels == 1 and config.patch_shape == (1, 1):
        yield (
            "mim_objective='autoencoder' normalizes the pixels of each patch, and a patch of 1x1 pixels with "
            "num_channels=1 has one: use a larger patch_size."
        )


def _head(config: Any) -> Iterator[str]:
    for name in ("thresholds", "target_mean", "target_scale"):
        values = getattr(config, name)
        if values is not None and len(values) != config.num_labels:
            yield f"{name} must have a number for each of {config.num_labels} labels, got {len(values)}."
        if not all(abs(value) <= MAX_TARGET for value in values or ()):  # also true for NaN
            yield f"{name} must be numbers between -{MAX_TARGET:g} and {MAX_TARGET:g}, got {values}."
    if not all(0 <= threshold <= 1 for threshold in config.thresholds or ()):
        yield f"thresholds must be probabilities in [0, 1], got {config.thresholds}."
    if not all(std >= 1 / MAX_TARGET for std in config.target_scale or ()):
        yield f"target_scale must be positive, at least {1 / MAX_TARGET:g}, got {config.target_scale}."
    if (config.target_mean is None) != (config.target_scale is None):
        yield "target_mean and target_scale belong together: set both, or neither."
    if (config.label_set_threshold is None) != (config.label_set_coverage is None):
        yield "label_set_threshold and label_set_coverage belong together: set both, or neither."
    if config.problem_type in ("regression", "multi_label_classification"):
        for name in OF_CERTAINTY:
            if getattr(config, name) is not None:
                yield f"{name} is for one label per image, got problem_type={config.problem_type!r}: set it to None."


def _width(config: Any) -> Iterator[str]:
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads and config.head_dim is None:
        yield (
            f"hidden_size={width} is not divisible by num_attention_heads={heads}: use hidden_size="
            f"{' or '.join(map(str, multiples_around(width, heads)))}, another number of heads, or set head_dim."
        )
    heads = config.pooling_heads
    if width % heads and config.pooling.startswith("attention"):
        yield (
            f"pooling={config.pooling!r} needs hidden_size divisible by its {heads} heads, got {width}: use "
            f"{' or '.join(map(str, multiples_around(width, heads)))}, or another num_pooling_heads."
        )
    kind = config.position_embedding_type
    if kind in ROTARY and config.head_width % 4:
        yield f"position_embedding_type={kind!r} needs head_dim divisible by 4, got {config.head_width}: set head_dim."
    if config.rope_coordinates == "centered" and (config.rope_grid is not None or config.rope_offset):
        yield "rope_grid and rope_offset have no effect on centered coordinates: set rope_coordinates='index'."
    if config.rope_grid is not None:
        pair("rope_grid", config.rope_grid, "patches")
    if not config.use_output_projection and config.num_attention_heads * config.head_width != width:
        yield (
            f"use_output_projection=False needs num_attention_heads * head_dim = hidden_size, got "
            f"{config.num_attention_heads} * {config.head_width} and {width}: set head_dim=None."
        )
    divisor = {"learned_2d": 2, "sincos_2d": 4}.get(kind, 1)
    if width % divisor:
        yield (
            f"position_embedding_type={kind!r} needs hidden_size divisible by {divisor}, got {width}: use "
            f"{' or '.join(map(str, multiples_around(width, divisor)))}."
        )


def _tokens(config: Any) -> Iterator[str]:
    if config.pooling in POOLINGS_OF_CLS and not config.use_cls_token:
        yield f"pooling={config.pooling!r} reads the class token: set use_cls_token=True or pooling='mean'."
    if config.pooling == "cls_and_distillation":
        if not config.use_distillation_token:
            yield "pooling='cls_and_distillation' reads the distillation token: set use_distillation_token=True."
        if config.representation_size is not None:
            yield "pooling='cls_and_distillation' has no pre-logits layer: set representation_size=None."
    if config.use_distillation_token and not config.use_cls_token:
        yield "use_distillation_token=True needs a class token before it: set use_cls_token=True."
    kind, prefix = config.position_embedding_type, config.num_prefix_tokens
    if config.position_placement != "input" and kind not in ("learned", "learned_2d"):
        yield (
            f"position_placement={config.position_placement!r} needs positions that are learned and added, got "
            f"position_embedding_type={kind!r}: use 'learned' or 'learned_2d', or position_placement='input'."
        )
    if config.position_interpolation in GEOMETRIC_SPLINES and kind != "relative":
        yield (
            f"position_interpolation={config.position_interpolation!r} resamples offsets between patches, got "
            f"position_embedding_type={kind!r}: use 'relative', or position_interpolation='bicubic_antialias'."
        )
    allowed = set(range(prefix + 1)) if kind.startswith("learned") else {0, prefix} if kind == "relative" else {0}
    if config.num_prefix_positions not in allowed:
        yield (
            f"num_prefix_positions must be one of {sorted(allowed)} for {kind!r} positions and {prefix} tokens before "
            f"the patches, got {config.num_prefix_positions}."
        )


def _stem(config: Any) -> Iterator[str]:
    if config.stem_layers is None:
        return
    layers, most = list(config.stem_layers), RANGES["num_hidden_layers"][1]
    if len(layers) > MAX_STEM_STAGES or not all(1 <= units <= most for units in layers):
        yield f"stem_layers must be at most {MAX_STEM_STAGES} numbers from 1 to {most}, got {layers}."
    if config.stem_width % 32:
        yield f"stem_width must be a multiple of 32, the groups of its GroupNorm, got {config.stem_width}."
    if any(size % config.stem_stride for size in config.patch_shape):
        yield (
            f"stem_layers={layers} reduce an image by {config.stem_stride}: patch_size, in pixels of the image, must "
            f"be a multiple of that, got {config.patch_size}."
        )


def _sizes(config: Any) -> Iterator[str]:
    sizes = f"image_size={config.image_size!r} and patch_size={config.patch_size!r}"
    try:
        rows, columns = config.grid_size
    except ValueError as error:
        raise ValueError(f"{sizes}: {error}") from None
    if rows * columns > MAX_PATCHES:
        yield f"{sizes} give {rows}x{columns} patches, more than {MAX_PATCHES}: use a larger patch_size."


def _strides(config: Any) -> Iterator[str]:
    if config.feature_strides is None:
        return
    patch, strides = config.patch_shape[0], list(config.feature_strides)
    known = sorted({patch >> step for step in range(MAX_DOUBLINGS + 1) if not patch % 2**step}) + [
        patch << step for step in range(1, MAX_DOUBLINGS + 1)
    ]
    if config.patch_shape != (patch, patch):
        yield f"feature_strides need a square patch, got patch_size={config.patch_size!r}: set feature_strides=None."
    if not {*strides} <= {*known}:
        yield f"feature_strides must be among {known} for patches of {patch} pixels, got {strides}."
    if not config.reshape_hidden_states:
        yield "feature_strides are maps, not tokens: set reshape_hidden_states=True."
