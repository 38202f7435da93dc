"""Perception Encoder (arXiv:2504.13181) with the names of its authors: CLIP's, and rotary positions.

Names and forward are those of facebookresearch/perception_models, core/vision_encoder/pe.py. On other grids, rotary
positions use the unscaled indices of rows and columns, and learned positions are resampled bilinearly. timm scales the
rotary positions and resamples the learned ones in another way.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from PIL import Image
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from ...model.configuration_hf_vit import HFViTConfig
from ..checkpoint import Family, Options, Reading
from ..files import Source
from ..layouts import Layout, Row, heads_together, packed, rotated_pairs
from . import open_clip
from .plain import Preprocessing, read
from .timm_facts import FIELDS, PERCEPTION
from .transformers import pooling_attention


def rotated(config: HFViTConfig) -> Layout:
    """Convert concatenated queries, keys and values whose rotary positions rotate adjacent pairs, columns first."""
    return packed(3).then(rotated_pairs(config, columns_first=True)).then(heads_together(config))


QKV, POOLING = "layers.{}.attention.qkv.*", "pooler.pooling."
TABLE = [
    *(row for row in open_clip.TABLE if row.ours not in (QKV, "pooler.layernorm.*")),
    Row(QKV, f"{open_clip.LAYER}attn.in_proj_*", rotated),
    Row(f"{POOLING}probe", "attn_pool.probe"),
    Row((f"{POOLING}query.*", f"{POOLING}key_value.*"), "attn_pool.attn.in_proj_*", pooling_attention),
    Row(f"{POOLING}o_proj.*", "attn_pool.attn.out_proj.*"),
    Row(f"{POOLING}layernorm.*", "attn_pool.layernorm.*"),
    Row(f"{POOLING}mlp.fc1.*", "attn_pool.mlp.c_fc.*"),
    Row(f"{POOLING}mlp.fc2.*", "attn_pool.mlp.c_proj.*"),
]


def preprocessing(fields: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing of `get_image_transform`, core/vision_encoder/transforms.py."""
    pixels = {"image_mean": IMAGENET_STANDARD_MEAN, "image_std": IMAGENET_STANDARD_STD}
    arguments = {"name": "original", "resample": Image.Resampling.BILINEAR, **pixels}
    return arguments, "bilinear, without regard to the aspect ratio, mean and std of 0.5"


LIBRARY = replace(
    open_clip.LIBRARY,
    name="Perception Encoder",
    marks=("positional_embedding", "conv1.weight", f"{open_clip.LAYER.format(0)}mlp.c_fc.weight"),
    table=TABLE,
    preprocessing=preprocessing,
    refused={},
    num_heads=dict.fromkeys(((1536, 47), (1536, 50)), 16),  # gigantic
    fields={
        **{name: PERCEPTION[name] for name in ("position_embedding_type", *FIELDS) if name in PERCEPTION},
        "position_interpolation": "bilinear",
        "hidden_act": "gelu",
    },
)


def _recognises(source: Source) -> bool:
    ends = "attn_pool.probe" in source.tensors or "ln_post.weight" not in source.tensors
    return LIBRARY.recognises(source) and "ln_pre.weight" in source.tensors and ends


def _read(source: Source, options: Options) -> Reading:
    names = source.tensors
    stated: dict[str, Any] = {"rope_offset": float("class_embedding" in names)}
    assumed = ["Rotary positions of the Perception Encoder: the tensors do not determine them."]
    if "attn_pool.probe" in names:
        stated.update(pooling="attention", num_pooling_heads=8)
        if names["attn_pool.mlp.c_fc.weight"].shape != names[f"{open_clip.LAYER.format(0)}mlp.c_fc.weight"].shape:
            raise ValueError(f"{source.name}: an attention pooling with an MLP of another width is not supported.")
    elif options.pooling is None:
        stated["pooling"] = "mean"
        assumed.append("pooling mean, as in timm: the authors use the features of all patches (--pooling).")
    return read(source, options, LIBRARY, stated, assumed=assumed)


FAMILY = Family(LIBRARY.name, _recognises, _read, heads=("head",))
