"""Self-supervised models with timm's names: DINO, iBOT, DINOv2, DINOv3, MAE, MoCo v3, I-JEPA, BEiT; and DeiT.

The files hold timm's names, and no config.json. Each model has its own preprocessing and its own way to resample
positions, and some have other heads than timm assumes. `ORIGINS` has these facts, from the original code:
github.com/facebookresearch/{dino,dinov2,dinov3,mae,moco-v3,ijepa,deit}, github.com/bytedance/ibot and
github.com/microsoft/unilm (beit, beit2).
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from ..checkpoint import Family, Options, Reading
from ..files import Source
from . import timm

# A block of training code that shards blocks in chunks: blocks.CHUNK.LAYER.rest
CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.(.+)")
# All names in a file of DINO. With others, such as a user's head or a text tower, it is another model of timm.
OF_DINO = re.compile(r"cls_token|pos_embed|masked_embed|(patch_embed|blocks|norm|head\.(mlp|last_layer))\..*")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.875, "interpolation": "bicubic"}
INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 0.875, "interpolation": "bicubic"}
SQUASHED = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}  # resized to the size, without a crop
TIPS = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), **SQUASHED}
WORDS = {0.0: "pixels in [0, 1]", 0.5: "mean and std of 0.5", 0.485: "ImageNet mean and std"}  # by the first mean
ROTARY = {"position_embedding_type": "rotary", "layer_norm_eps": 1e-5, "gated_act": "silu"}


class Origin(NamedTuple):
    """The code that a file comes from.

    Attributes:
        name: Name of the family.
        made: Whether the tensors come from this code.
        interpolation: The `position_interpolation` of `HFViTConfig`.
        facts: Facts that the tensors do not determine, as in `timm_facts.FACTS`.
        preprocessing: The preprocessing, with the names of timm's `pretrained_cfg`.
        left_out: Regular expressions for tensors outside of the encoder.
    """

    name: str
    made: Callable[[Source], bool]
    interpolation: str
    facts: dict[str, Any] = {}
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
    }
    return {"pos_embed", "norm.weight", "blocks.0.attn.qkv.weight"} <= source.tensors.keys() and not (
        others & source.tensors.keys()
    )


def _fixed_positions(source: Source) -> str | None:
    """Return which coordinate the first half of fixed sines and cosines belongs to: "column", "row" or `None`.

    The second patch, in row 0 and column 1, tells them from learned positions.
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


# The first that fits is used. DINO's files hold nothing of its own, so it is the last.
ORIGINS = (
    Origin(  # its second class token is a register to our model
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
    stated.facts.update(origin.facts)
    stated.preprocessing = origin.preprocessing
    reading = timm.read(stated)
    reading.fields["position_interpolation"] = origin.interpolation
    reading.left_out = (*reading.left_out, *origin.left_out)
    if "rope_embed.periods" in plain.tensors:
        reading.fields["rope_theta"] = _base_of_periods(plain, reading.assumed)
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
        raise ValueError(f"{source.name}: 'rope_embed.periods' are no powers of one base, which is not supported.")
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
