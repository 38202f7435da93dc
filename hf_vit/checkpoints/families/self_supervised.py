"""Bare files with timm's names: DINO, DINOv2, DINOv3, MAE, MoCo v3, I-JEPA, BEiT; DeiT; rotary positions.

The files hold no config.json. Each model has its own preprocessing and its own way to resample positions, and some
have other heads than timm assumes. `ORIGINS` has these facts, from the original code:
github.com/facebookresearch/{dino,dinov2,dinov3,mae,moco-v3,ijepa,deit}, github.com/bytedance/ibot and
github.com/microsoft/unilm (beit, beit2); those of rotary positions and of BEiT-3 are from timm.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..checkpoint import Family, Options, Reading
from ..files import Source
from . import timm
from .timm_facts import EVA02, PERCEPTION, ROPE_REG, ROPE_VIT

# A block of training code that shards blocks in chunks: blocks.CHUNK.LAYER.rest
CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.(.+)")
# All names in a file of DINO. A file with further names, such as a user's head or a text tower, is another timm model.
OF_DINO = re.compile(r"cls_token|pos_embed|masked_embed|(patch_embed|blocks|norm|head\.(mlp|last_layer))\..*")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.875, "interpolation": "bicubic"}
INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 0.875, "interpolation": "bicubic"}
CLIP = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD, "crop_pct": 0.9, "interpolation": "bicubic"}
SQUASHED = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}  # resized to the size, without a crop
TIPS = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), **SQUASHED}
WORDS = {  # by the first mean
    **{0.0: "pixels in [0, 1]", 0.5: "mean and std of 0.5", 0.485: "ImageNet mean and std"},
    OPENAI_CLIP_MEAN[0]: "OpenAI's mean and std",
}
ROTARY = {"position_embedding_type": "rotary", "layer_norm_eps": 1e-5, "gated_act": "silu"}


class Origin(NamedTuple):
    """The code that a file comes from.

    Attributes:
        name: Name of the family.
        made: Whether the tensors come from this code.
        interpolation: The `position_interpolation` of `HFViTConfig`.
        facts: Facts that names of tensors do not determine, as in `timm_facts.FACTS`, or a function that returns them.
        preprocessing: The preprocessing, with the names of timm's `pretrained_cfg`.
        left_out: Regular expressions for tensors outside of the encoder.
    """

    name: str
    made: Callable[[Source], bool]
    interpolation: str
    facts: dict[str, Any] | Callable[[Source], dict[str, Any]] = {}
    preprocessing: dict[str, Any] = IMAGENET
    left_out: tuple[str, ...] = ()


def without_chunks(source: Source) -> Source:
    """Return the source with `blocks.3.` for `blocks.0.3.`, if its blocks are in chunks."""
    matches = {name: CHUNKED.fullmatch(name) for name in source.tensors if name.startswith("blocks.")}
    if not matches or not all(matches.values()):
        return source
    names = {name: f"blocks.{match[1]}.{match[2]}" for name, match in matches.items() if match}
    return replace(source, tensors={names.get(name, name): tensor for name, tensor in source.tensors.items()})


def _is_dinov2(source: Source) -> bool:
    names = source.tensors
    is_masked = "mask_token" in names and len(names["mask_token"].shape) == 2
    return "pos_embed" in names and (is_masked or "register_tokens" in names or "blocks.0.mlp.w12.weight" in names)


def _is_headless(source: Source) -> bool:
    """Return whether the file holds an encoder that ends in the LayerNorm of all tokens, as after pre-training."""
    others = {
        "head.weight",
        "fc_norm.weight",
        "norm_pre.weight",
        "reg_token",
        "blocks.0.ls1.gamma",
        "blocks.0.gamma_1",
        "blocks.0.attn.q_bias",
    }
    return {"pos_embed", "norm.weight", "blocks.0.attn.qkv.weight"} <= source.tensors.keys() and not (
        others & source.tensors.keys()
    )


def _fixed_positions(source: Source) -> str | None:
    """Return which coordinate the first half of fixed sines and cosines belongs to: "column", "row" or `None`.

    The second patch, in row 0 and column 1, distinguishes them from learned positions.
    """
    shape = source.shape("pos_embed")
    prefix, quarter = int("cls_token" in source.tensors), shape[-1] // 4
    if len(shape) != 3 or shape[1] < prefix + 2 or shape[-1] % 4:
        return None
    *before, _, second = source.tensors["pos_embed"].read()[0, : prefix + 2].float()
    angles = 10_000 ** -(torch.arange(quarter) / quarter)
    of_column, of_row = torch.cat([angles.sin(), angles.cos()]), torch.tensor([0.0, 1.0]).repeat_interleave(quarter)
    orders = {"column": (of_column, of_row), "row": (of_row, of_column)}
    if any(token.any() for token in before):
        return None
    return next((name for name, parts in orders.items() if torch.allclose(second, torch.cat(parts), atol=1e-2)), None)


def _registers(source: Source) -> int:
    return source.shape("register_tokens", 3)[1]


def _has_relative(source: Source) -> bool:
    return any(name.endswith("relative_position_bias_table") for name in source.tensors)


def _has_no_positions(source: Source) -> bool:
    return "pos_embed" not in source.tensors and not _has_relative(source)


def _is_fixed(source: Source, first: str, has_cls_token: bool) -> bool:
    is_alike = _is_headless(source) and ("cls_token" in source.tensors) == has_cls_token
    return is_alike and _fixed_positions(source) == first


def _is_eva02(source: Source) -> bool:
    names = source.tensors
    is_eva = bool({"blocks.0.attn.q_bias", "blocks.0.attn.q_proj.weight"} & names.keys())
    return "pos_embed" in names and is_eva and timm.is_gated(source)


def _is_perception(source: Source) -> bool:
    """Return whether a file is a Perception Encoder; timm's CLIP has the same LayerNorm first but ends differently."""
    names = source.tensors
    ends = "attn_pool.latent" in names or not {"norm.weight", "fc_norm.weight"} & names.keys()
    return {"pos_embed", "norm_pre.weight"} <= names.keys() and ends


def _of_perception(source: Source) -> dict[str, Any]:
    names = source.tensors
    is_core, offset = "attn_pool.latent" in names, float("cls_token" in names)
    head_dim = 96 if source.shape("pos_embed")[-1] == 1536 else 64
    core = {"pooling": "attention", "num_pooling_heads": 8} if is_core else {"global_pool": "avg"}
    return {
        **PERCEPTION,
        **core,
        "rope_offset": offset,
        "rope_grid": "own",
        "head_dim": head_dim,
        "hidden_act": "gelu",
    }


def _is_rope_vit(source: Source) -> bool:
    has_head_of_deit = {"cls_token", "blocks.0.gamma_1", "blocks.0.attn.qkv.bias"} <= source.tensors.keys()
    return has_head_of_deit and "rope_embed.periods" not in source.tensors


def _has_rope_in_its_name(source: Source) -> bool:
    return "rope" in Path(source.name).name.lower()


# The first match is used. DINO's files have no names of their own, so it follows the others without a head.
ORIGINS = (
    Origin("EVA-02", _is_eva02, "bicubic_antialias", EVA02, CLIP, (r"(.*\.)?rope\.freqs_(cos|sin)", r"lm_head\..*")),
    Origin(
        "BEiT-3",
        lambda source: {f"blocks.0.{part}.norm.weight" for part in ("attn", "mlp")} <= source.tensors.keys(),
        "bicubic_antialias",
        {"layer_norm_eps": 1e-5},
        {**IMAGENET, "crop_pct": 1.0},
    ),
    Origin(
        "Perception Encoder",
        _is_perception,
        "bicubic_antialias",
        _of_perception,
        {**INCEPTION, "crop_pct": 1.0},
    ),
    Origin(
        "RoPE-ViT",
        lambda source: _is_rope_vit(source) and _has_no_positions(source) and "reg_token" not in source.tensors,
        "bicubic_antialias",
        ROPE_VIT,
        {**IMAGENET, "crop_pct": 0.9, "input_size": (3, 224, 224)},
    ),
    Origin(  # the same tensors as DeiT III
        "RoPE-ViT with learned positions",
        lambda source: _is_rope_vit(source) and "pos_embed" in source.tensors and _has_rope_in_its_name(source),
        "bicubic_antialias",
        {**ROPE_VIT, "position_embedding_type": "learned_rotary"},
        {**IMAGENET, "crop_pct": 0.9},
    ),
    Origin(
        "timm's ViT with registers and rotary positions",
        lambda source: (
            {"reg_token", "blocks.0.gamma_1"} <= source.tensors.keys()
            and "cls_token" not in source.tensors
            and _has_no_positions(source)
        ),
        "bicubic_antialias",
        ROPE_REG,
        {**INCEPTION, "crop_pct": 0.95, "input_size": (3, 256, 256)},
    ),
    Origin(  # its second class token is a register in our model
        "TIPS",
        lambda source: _is_dinov2(source) and "register_tokens" in source.tensors and _registers(source) == 1,
        "bicubic_antialias",
        preprocessing=TIPS,
        left_out=(r"text_encoder\..*", "temperature"),
    ),
    Origin(
        "DINOv2 with registers",
        lambda source: _is_dinov2(source) and "register_tokens" in source.tensors,
        "bicubic_antialias",
        {"processed_size": (224, 224)},
        left_out=(r"(dino|ibot)_head\..*",),
    ),
    Origin(
        "DINOv2",
        _is_dinov2,
        "bicubic_offset",
        {"processed_size": (224, 224)},
        left_out=(r"(dino|ibot)_head\..*",),
    ),
    Origin(
        "DINOv3",
        lambda source: (
            "rope_embed.periods" in source.tensors
            or ({"cls_token", "reg_token", "blocks.0.gamma_1"} <= source.tensors.keys() and _has_no_positions(source))
        ),
        "bicubic_antialias",
        ROTARY,
        {**IMAGENET, **SQUASHED, "input_size": (3, 224, 224)},
        (r"rope_embed\.periods", r".*\.qkv\.bias_mask", r"local_cls_norm\..*", r"((dino|ibot)_head|projectors)\..*"),
    ),
    Origin(
        "BEiT",
        lambda source: "blocks.0.attn.q_bias" in source.tensors and _has_relative(source),
        "geometric_bicubic",
        preprocessing=INCEPTION,
        left_out=(r"(lm_head|cls_pt_layers|decoder)\..*",),
    ),
    Origin("MAE", partial(_is_fixed, first="column", has_cls_token=True), "bicubic"),
    Origin(
        "MoCo v3",
        partial(_is_fixed, first="row", has_cls_token=True),
        "bicubic",
        {"num_heads": 12},
        {**IMAGENET, "interpolation": "bilinear"},
        (r"(head|predictor)\.\d+\..*",),
    ),
    Origin("I-JEPA", partial(_is_fixed, first="column", has_cls_token=False), "bicubic"),
    Origin(
        "DINO",
        lambda source: (
            "cls_token" in source.tensors and _is_headless(source) and all(map(OF_DINO.fullmatch, source.tensors))
        ),
        "bicubic_offset",
        left_out=(r"head\.(mlp|last_layer)\..*", "masked_embed"),
    ),
    Origin("DeiT", lambda source: "dist_token" in source.tensors, "bicubic_antialias"),
    Origin(
        "DeiT III",
        lambda source: {"blocks.0.gamma_1", "pos_embed", "head.weight"} <= source.tensors.keys(),
        "bicubic_antialias",
        preprocessing={**IMAGENET, "crop_pct": 1.0},
    ),
)


def _recognises(origin: Origin, source: Source) -> bool:
    if not timm.FAMILY.recognises(source) or "architecture" in source.config:
        return False
    plain = without_chunks(source)
    return next((other for other in ORIGINS if other.made(plain)), None) is origin


def _read(origin: Origin, source: Source, options: Options) -> Reading:
    plain = without_chunks(source)
    stated = timm.Stated(plain, options)
    stated.facts.update(origin.facts(plain) if callable(origin.facts) else origin.facts)
    stated.preprocessing = origin.preprocessing
    reading = timm.read(stated)
    reading.fields["position_interpolation"] = origin.interpolation
    reading.left_out = (*reading.left_out, *origin.left_out)
    if "rope_embed.periods" in plain.tensors:
        reading.fields["rope_theta"] = _base_of_periods(plain, reading.assumed)
    if "rope_axes" in stated.facts:
        names = ("rope_theta", "rope_offset", "rope_grid")
        values = ", ".join(f"{name}={reading.fields[name]}" for name in names if name in reading.fields)
        reading.assumed.append(f"Rotary positions of {origin.name} ({values}): the tensors do not determine them.")
    if "head.weight" in plain.tensors and plain.shape("head.weight", 2)[1] == 2 * reading.fields["hidden_size"]:
        reading.fields["pooling"] = "cls_and_mean"
        reading.assumed.append("The head reads the class token and the mean of the patches, as DINOv2's classifiers.")
    facts = origin.preprocessing
    whose = WORDS[facts["mean"][0]]
    has_table = reading.fields.get("position_embedding_type") != "rotary"
    reading.assumed.append(
        f"Preprocessing of {origin.name}: {facts['interpolation']}, crop_pct {facts['crop_pct']:g}, {whose}."
        + f" Other image sizes resample the positions ({origin.interpolation})." * has_table
    )
    reading.source = plain
    return reading


def _base_of_periods(source: Source, assumed: list[str]) -> float:
    """Return the base of the wavelengths of DINOv3: period number i of n is base^(i/n).

    Raises:
        ValueError: If the periods follow another rule.
    """
    periods = source.tensors["rope_embed.periods"].read().double()
    exponents = torch.arange(len(periods), dtype=torch.float64) / len(periods)
    base = periods[-1] ** (1 / exponents[-1]) if len(periods) > 1 else torch.tensor(100.0)
    base = torch.tensor(100.0) if (base - 100).abs() < 1 else base  # the file may hold bfloat16
    difference = (periods / base**exponents - 1).abs().max()
    if difference > 0.01:
        raise ValueError(f"{source.name}: 'rope_embed.periods' are not powers of one base, which is not supported.")
    if difference > 1e-6:
        assumed.append(f"rope_theta {base:g}, in float32 as in transformers and timm: the file's periods are rounded.")
    return float(base)


FAMILIES = tuple(
    Family(
        origin.name,
        partial(_recognises, origin),
        partial(_read, origin),
        heads=("head",),
        head_inputs=(1, 2) if origin.name.startswith("DINOv2") else (1,),
    )
    for origin in ORIGINS
)
