"""Write a checkpoint for timm."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...model.configuration_hf_vit import HFViTConfig
from ...model.image_processing_pil_hf_vit import HFViTImageProcessorPil, Image
from ...system.disk import new_folder
from .. import Checkpoint
from ..checkpoint import CLASSIFIER, ENCODER
from ..layouts import Row, Rule
from ..writing import _write_folder
from . import timm
from .transformers_out import ROUNDED_CROP, _number_if_square, _size_misfits

TIMM_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(timm.ACTIVATIONS.items())}


TIMM_POOLINGS = {
    "cls": "token",
    "mean": "avg",
    "mean_all": "avg",
    "attention": "map",
    "attention_patches": "map",
    "cls_and_distillation": "token",
}


# What must be where, in the classes that timm has for these.
TIMM_SPECIAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "relative positions": {
        "pooling": ("cls", "mean"),
        "num_register_tokens": (0,),
        "final_layernorm": ("tokens", "pooled"),
        "hidden_act": ("gelu",),
        "layer_norm_eps": (1e-6,),
        "proj_bias": (True,),
        "use_pre_layernorm": (False,),
    },
    "a distillation token": {
        "position_embedding_type": ("learned",),
        "num_register_tokens": (0,),
        "final_layernorm": ("tokens", "none"),
        "layer_norm_eps": (1e-6,),
    },
    "a gated MLP": {
        "pooling": ("cls", "mean", "mean_all"),  # it would gate the MLP of the attention pooling, too
        "layer_norm_eps": (1e-6,),
    },
}


# An architecture of timm with each epsilon: config.json can name a norm, but not its epsilon.
TIMM_EPSILONS = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}


def _timm_misfits(checkpoint: Checkpoint) -> list[str]:
    config, misfits = checkpoint.config, []
    positions, prefix = config.num_prefix_positions, config.num_prefix_tokens
    if config.layer_scale_init_value == 0:
        misfits.append("layer_scale_init_value=0 (which there is none)")
    if config.use_distillation_token and config.pooling != "cls_and_distillation":
        misfits.append("a distillation token without its classifier")
    if config.position_embedding_type in ("learned", "relative") and positions not in (0, prefix):
        misfits.append(f"num_prefix_positions={positions} (only 0 or {prefix})")
    if config.patch_bias == config.use_pre_layernorm:
        misfits.append(f"patch_bias={config.patch_bias} with use_pre_layernorm={config.use_pre_layernorm}")
    if config.proj_bias != config.mlp_bias:
        misfits.append(f"proj_bias={config.proj_bias} with mlp_bias={config.mlp_bias}")
    special = [what for what in TIMM_SPECIAL if _is_special(config, what)]
    for what in special:
        misfits += [
            f"{name}={getattr(config, name)!r} with {what} (only {' or '.join(map(repr, values))})"
            for name, values in TIMM_SPECIAL[what].items()
            if getattr(config, name) not in values
        ]
    if len(special) > 1:
        misfits.append(" and ".join(special))
    if "relative positions" in special and positions != prefix:
        misfits.append("relative positions with a class token that has none")
    if "a distillation token" in special and not positions:
        misfits.append("num_prefix_positions=0 with a distillation token (only 2)")
    return misfits + _timm_processor_misfits(checkpoint.processor().to_dict(), config)


def _is_special(config: HFViTConfig, what: str) -> bool:
    return {
        "relative positions": config.position_embedding_type == "relative",
        "a distillation token": config.pooling == "cls_and_distillation",
        "a gated MLP": config.use_gated_mlp,
    }[what]


def _timm_processor_misfits(processor: dict[str, Any], config: HFViTConfig) -> list[str]:
    misfits = _size_misfits(processor, config)
    if not processor["do_resize"]:
        misfits.append("do_resize=False of the processor")
    if not processor["do_rescale"] or processor["rescale_factor"] != 1 / 255:
        misfits.append("a processor's do_rescale or rescale_factor (only 1/255)")
    if not misfits and _timm_crop(processor, config.image_shape) is None:
        misfits.append(f"a crop of {config.image_shape} from {dict(processor['size'])} by the processor")
    return misfits


def _timm_crop(processor: dict[str, Any], image: tuple[int, int]) -> tuple[float, str] | None:
    """Return timm's crop_pct and crop_mode; `None` if they cannot say what the processor does."""
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


def _timm_notes(checkpoint: Checkpoint) -> list[str]:
    said, processor = [], checkpoint.processor()
    if processor.do_grayscale:
        said.append("Images must be gray (Pillow's mode L) before they come to its transforms.")
    if processor.do_center_crop:
        said.append(ROUNDED_CROP.replace("up or left", "down or right"))
    if checkpoint.architecture == ENCODER and checkpoint.config.pooling == "cls_and_distillation":
        said.append("Without classifiers it gives the average of both tokens, not one behind the other.")
    return said


def _timm_architecture(config: HFViTConfig) -> str:
    """Return a name that timm's code has what arguments cannot say under."""
    if config.position_embedding_type == "relative":
        return "vit_relpos_base_patch16_224"
    if config.pooling == "cls_and_distillation":
        return "deit_base_distilled_patch16_224"
    return "vit_giant_patch14_dinov2" if config.use_gated_mlp else TIMM_EPSILONS[config.layer_norm_eps]


def _timm_arguments(config: HFViTConfig) -> dict[str, Any]:
    """Return the arguments of timm's constructor."""
    hidden = config.intermediate_size * (2 if config.use_gated_mlp else 1)  # timm counts the gate
    ratio = hidden / config.hidden_size
    if int(config.hidden_size * ratio) != hidden:  # timm rounds down
        ratio = float(np.nextafter(ratio, np.inf))
    arguments: dict[str, Any] = {
        "img_size": list(config.image_shape),
        "patch_size": _number_if_square(config.patch_shape),
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": ratio,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.use_qk_norm,
        "init_values": config.layer_scale_init_value,
        "class_token": config.use_cls_token,
        "global_pool": TIMM_POOLINGS[config.pooling],
        "fc_norm": config.final_layernorm == "pooled",
    }
    if config.position_embedding_type == "relative":
        return {**arguments, "rel_pos_type": "bias", "shared_rel_pos": False}
    return {
        **arguments,
        "act_layer": TIMM_ACTIVATIONS[config.hidden_act],
        "proj_bias": config.proj_bias,
        "pos_embed": "learn" if config.position_embedding_type == "learned" else "none",
        "no_embed_class": not config.num_prefix_positions,
        "reg_tokens": config.num_register_tokens,
        "pre_norm": config.use_pre_layernorm,
        "final_norm": config.final_layernorm != "none",
        "pool_include_prefix": config.pooling in ("mean_all", "attention"),
    }


def _timm_preprocessing(processor: HFViTImageProcessorPil, config: HFViTConfig) -> dict[str, Any]:
    described, channels = processor.to_dict(), config.num_channels
    crop = _timm_crop(described, config.image_shape)
    assert crop is not None
    mean, std = (described["image_mean"], described["image_std"]) if described["do_normalize"] else (0.0, 1.0)
    return {
        "input_size": [channels, *config.image_shape],
        "fixed_input_size": True,
        "interpolation": Image.Resampling(described["resample"]).name.lower(),
        "crop_pct": crop[0],
        "crop_mode": crop[1],
        "mean": _for_each_channel(mean, channels),
        "std": _for_each_channel(std, channels),
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if config.pooling == "cls_and_distillation" else "head",
    }


def _for_each_channel(values: float | Sequence[float], channels: int) -> list[float]:
    values = [values] if isinstance(values, int | float) else list(values)
    return values[:1] * channels if len(set(values)) == 1 else values


def _write_timm(checkpoint: Checkpoint, rules: list[Rule], out: Path, force: bool) -> None:
    config = checkpoint.config
    preprocessing = _timm_preprocessing(checkpoint.processor(), config)
    number = preprocessing["num_classes"] = config.num_labels if checkpoint.architecture == CLASSIFIER else 0
    if number:
        preprocessing["label_names"] = [name for _, name in sorted((config.id2label or {}).items())]
    described = {
        "architecture": _timm_architecture(config),
        "num_classes": number,
        "num_features": config.hidden_size,
        "global_pool": TIMM_POOLINGS[config.pooling],
        "model_args": _timm_arguments(config),
        "pretrained_cfg": preprocessing,
    }
    with new_folder(out, force) as folder:
        _write_folder(checkpoint, rules, folder, described)


def _timm_table(checkpoint: Checkpoint) -> list[Row]:
    # timm's named architectures pack the gate and the hidden layer, the gate first.
    split = ("blocks.{}.mlp.fc1_g.*", "blocks.{}.mlp.fc1_x.*")
    return [row for row in timm.table(checkpoint.config) if row.theirs not in split]
