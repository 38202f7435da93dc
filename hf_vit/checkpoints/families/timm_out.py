"""Write a checkpoint for timm."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...model.configuration_hf_vit import HFViTConfig
from ...model.image_processing_pil_hf_vit import HFViTImageProcessorPil, Image
from ...system.disk import new_folder
from ..checkpoint import CLASSIFIER, ENCODER, Checkpoint
from ..layouts import Row, Rule
from ..writing import Target, differing, write_layout
from . import timm_facts, timm_names
from .transformers_out import ROUNDED_CROP, number_if_square, unsupported_size

ACTIVATIONS = {ours: theirs for theirs, ours in reversed(timm_facts.ACTIVATIONS.items())}
POOLINGS = {
    **{ours: theirs for theirs, ours in timm_facts.POOLINGS.items()},
    **{"mean_all": "avg", "attention_patches": "map", "cls_and_distillation": "token"},
}
# Architectures of timm by their epsilon: config.json can name a norm, but not its epsilon.
EPSILONS = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}

# Values that timm's classes for these features require.
SPECIAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "relative positions": {
        "pooling": ("cls", "mean"),
        "num_register_tokens": (0,),
        "final_layernorm": ("tokens", "pooled"),
        "hidden_act": ("gelu",),
        "layer_norm_eps": (1e-6,),
        "proj_bias": (True,),
        "use_pre_layernorm": (False,),
        "use_attention_layernorm": (False,),
        "use_mlp_layernorm": (False,),
    },
    "a distillation token": {
        "position_embedding_type": ("learned",),
        "num_register_tokens": (0,),
        "final_layernorm": ("tokens", "none"),
        "layer_norm_eps": (1e-6,),
    },
    "a gated MLP": {
        "pooling": ("cls", "mean", "mean_all"),  # timm would also gate the MLP of attention pooling
        "layer_norm_eps": (1e-6,),
    },
}


def unsupported(checkpoint: Checkpoint) -> list[str]:
    """Return the features of model and processor that timm's classes do not have."""
    config, features = checkpoint.config, []
    positions, prefix = config.num_prefix_positions, config.num_prefix_tokens
    if config.layer_scale_init_value == 0:
        features.append("layer_scale_init_value=0 (timm has no LayerScale then)")
    if config.use_distillation_token and config.pooling != "cls_and_distillation":
        features.append("a distillation token without its classifier")
    if config.position_embedding_type in ("learned", "relative") and positions not in (0, prefix):
        features.append(f"num_prefix_positions={positions} (only 0 or {prefix})")
    if config.patch_bias == config.use_pre_layernorm:
        features.append(f"patch_bias={config.patch_bias} with use_pre_layernorm={config.use_pre_layernorm}")
    if config.proj_bias != config.mlp_bias:
        features.append(f"proj_bias={config.proj_bias} with mlp_bias={config.mlp_bias}")
    special = special_features(config)
    for feature in special:
        features += differing(config, SPECIAL[feature], f" with {feature}")
    if len(special) > 1:
        features.append(" and ".join(special))
    if "relative positions" in special and positions != prefix:
        features.append("relative positions with a class token that has none")
    if "a distillation token" in special and not positions:
        features.append("num_prefix_positions=0 with a distillation token (only 2)")
    return features + unsupported_preprocessing(checkpoint.processor().to_dict(), config)


def special_features(config: HFViTConfig) -> list[str]:
    """Return the keys of `SPECIAL` that an architecture has."""
    has = {
        "relative positions": config.position_embedding_type == "relative",
        "a distillation token": config.pooling == "cls_and_distillation",
        "a gated MLP": config.use_gated_mlp,
    }
    return [feature for feature in SPECIAL if has[feature]]


def unsupported_preprocessing(processor: dict[str, Any], config: HFViTConfig) -> list[str]:
    """Return the features of the preprocessing that timm's transforms do not have."""
    size = input_size(processor, config)
    features = unsupported_size(processor, config) if size == config.image_shape else []
    if not processor["do_resize"]:
        features.append("do_resize=False of the processor")
    if not processor["do_rescale"] or processor["rescale_factor"] != 1 / 255:
        features.append("a processor's do_rescale or rescale_factor (only 1/255)")
    if not features and crop(processor, size) is None:
        features.append(f"a crop of {size} from {dict(processor['size'])} by the processor")
    return features


def input_size(processor: dict[str, Any], config: HFViTConfig) -> tuple[int, int]:
    """Return the (height, width) of timm's transforms: the processor's, if timm resamples the positions for it.

    DINOv2, for example, has positions for 518x518 pixels and a processor that gives 224x224.
    """
    size = dict(processor["crop_size"] if processor.get("do_center_crop") else processor["size"])
    is_fitted = processor["do_resize"] or processor.get("do_center_crop")
    sides: Any = (size.get("height"), size.get("width"))
    can_resample = config.position_embedding_type == "learned" and config.pooling != "cls_and_distillation"
    is_whole = None not in sides and not any(
        side % patch for side, patch in zip(sides, config.patch_shape, strict=True)
    )
    return sides if is_fitted and can_resample and is_whole else config.image_shape


def crop(processor: dict[str, Any], image: tuple[int, int]) -> tuple[float, str] | None:
    """Return timm's crop_pct and crop_mode; `None` if they cannot express what the processor does."""
    if processor.get("crop_pct") is not None:
        return processor["crop_pct"], "center"
    if not processor.get("do_center_crop"):
        return 1.0, "squash"
    size = processor["size"]
    mode = "squash" if size.get("height") else "center"
    edges = (size["height"], size["width"]) if mode == "squash" else (size["shortest_edge"],) * 2
    share = min(side / edge for side, edge in zip(image, edges, strict=True))
    if any(math.floor(side / share) < edge for side, edge in zip(image, edges, strict=True)):  # timm rounds down
        share = math.nextafter(share, 0)
    if mode == "center" and (image[0] != image[1] or size.get("longest_edge")):
        return None
    return (share, mode) if share <= 1 and tuple(math.floor(side / share) for side in image) == edges else None


def notes(checkpoint: Checkpoint) -> list[str]:
    """Return what a user of timm must know."""
    sentences, processor = [], checkpoint.processor()
    size, own = input_size(processor.to_dict(), checkpoint.config), checkpoint.config.image_shape
    if size != own:
        sentences.append(
            f"timm's transforms give images of {size[0]}x{size[1]} pixels, as the processor does, and the model of "
            f"{own[0]}x{own[1]} pixels resamples its positions for them (dynamic_img_size)."
        )
    if processor.do_grayscale:
        sentences.append("timm's transforms need grayscale images (Pillow's mode L).")
    if processor.do_center_crop:
        sentences.append(ROUNDED_CROP.replace("up or left", "down or right"))
    if checkpoint.architecture == ENCODER and checkpoint.config.pooling == "cls_and_distillation":
        sentences.append("Without classifiers timm returns the average of both tokens, not their concatenation.")
    return sentences


def table(checkpoint: Checkpoint) -> list[Row]:
    """Return our names and timm's; its named architectures pack gate and hidden layer, the gate first."""
    split = ("blocks.{}.mlp.fc1_g.*", "blocks.{}.mlp.fc1_x.*")
    return [row for row in timm_names.table(checkpoint.config) if row.theirs not in split]


def write(checkpoint: Checkpoint, rules: list[Rule], out: Path, force: bool) -> None:
    """Write weights and config, and verify them."""
    config = checkpoint.config
    stated = preprocessing(checkpoint.processor(), config)
    number = stated["num_classes"] = config.num_labels if checkpoint.architecture == CLASSIFIER else 0
    if number:
        stated["label_names"] = [name for _, name in sorted((config.id2label or {}).items())]
    described = {
        "architecture": architecture(config),
        "num_classes": number,
        "num_features": config.hidden_size,
        "global_pool": POOLINGS[config.pooling],
        "model_args": arguments(config) | ({} if stated["fixed_input_size"] else {"dynamic_img_size": True}),
        "pretrained_cfg": stated,
    }
    with new_folder(out, force) as folder:
        write_layout(checkpoint, rules, folder, described)


def architecture(config: HFViTConfig) -> str:
    """Return the name of a timm architecture whose code has the features that timm's arguments cannot state."""
    if config.position_embedding_type == "relative":
        return "vit_relpos_base_patch16_224"
    if config.pooling == "cls_and_distillation":
        return "deit_base_distilled_patch16_224"
    return "vit_giant_patch14_dinov2" if config.use_gated_mlp else EPSILONS[config.layer_norm_eps]


def arguments(config: HFViTConfig) -> dict[str, Any]:
    """Return the arguments of timm's constructor."""
    hidden = config.intermediate_size * (2 if config.use_gated_mlp else 1)  # timm counts the gate
    ratio = hidden / config.hidden_size
    if int(config.hidden_size * ratio) != hidden:  # timm rounds down
        ratio = float(np.nextafter(ratio, np.inf))
    common: dict[str, Any] = {
        "img_size": list(config.image_shape),
        "patch_size": number_if_square(config.patch_shape),
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": ratio,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.use_qk_norm,
        "init_values": config.layer_scale_init_value,
        "class_token": config.use_cls_token,
        "global_pool": POOLINGS[config.pooling],
        "fc_norm": config.final_layernorm == "pooled",
    }
    if config.position_embedding_type == "relative":
        return {**common, "rel_pos_type": "bias", "shared_rel_pos": False}
    return {
        **common,
        "act_layer": ACTIVATIONS[config.hidden_act],
        "proj_bias": config.proj_bias,
        "pos_embed": "learn" if config.position_embedding_type == "learned" else "none",
        "no_embed_class": not config.num_prefix_positions,
        "reg_tokens": config.num_register_tokens,
        "pre_norm": config.use_pre_layernorm,
        "final_norm": config.final_layernorm != "none",
        "scale_attn_norm": config.use_attention_layernorm,
        "scale_mlp_norm": config.use_mlp_layernorm,
        "pool_include_prefix": config.pooling in ("mean_all", "attention"),
    }


def preprocessing(processor: HFViTImageProcessorPil, config: HFViTConfig) -> dict[str, Any]:
    """Return timm's `pretrained_cfg`."""
    ours, channels = processor.to_dict(), config.num_channels
    size = input_size(ours, config)
    found = crop(ours, size)
    assert found is not None
    mean, std = (ours["image_mean"], ours["image_std"]) if ours["do_normalize"] else (0.0, 1.0)
    return {
        "input_size": [channels, *size],
        "fixed_input_size": size == config.image_shape,
        "interpolation": Image.Resampling(ours["resample"]).name.lower(),
        "crop_pct": found[0],
        "crop_mode": found[1],
        "mean": _for_each_channel(mean, channels),
        "std": _for_each_channel(std, channels),
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if config.pooling == "cls_and_distillation" else "head",
    }


def _for_each_channel(values: float | Sequence[float], channels: int) -> list[float]:
    values = [values] if isinstance(values, int | float) else list(values)
    return values[:1] * channels if len(set(values)) == 1 else values


TARGET = Target(
    architectures=(CLASSIFIER, ENCODER),
    required={
        "position_embedding_type": ("learned", "relative", "none"),
        "pooling": tuple(POOLINGS),
        "hidden_act": tuple(ACTIVATIONS),
        "layer_norm_eps": tuple(EPSILONS),
        "stem_layers": (None,),
        "representation_size": (None,),
        "num_pooling_heads": (None,),
        "use_patch_layernorm": (False,),
        "use_output_projection": (True,),
    },
    unsupported=unsupported,
    notes=notes,
    table=table,
    write=write,
    carries=("labels", "processor", "bicubic_antialias", "geometric_bilinear"),
)
