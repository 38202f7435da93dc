"""`VisionTransformer` of torchvision, `vit_b_16` to `vit_h_14` (torchvision/models/vision_transformer.py).

Files are bare state dicts. A model has one image size; `interpolate_embeddings` of the library resamples the positions
of a file by a bicubic rule that aligns the corners. This package resamples them with `bicubic_antialias`.
"""

from collections.abc import Mapping
from typing import Any

from ...model.image_processing_pil_hf_vit import BICUBIC, BILINEAR
from ..layouts import Row, convolution, positions
from .plain import CLS_TOKEN, POSITIONS, PROJECTION, Library, Preprocessing, multihead_attention

LAYER = "encoder.layers.encoder_layer_{}."
TABLE = [
    Row(CLS_TOKEN, "class_token"),
    Row(POSITIONS, "encoder.pos_embedding", positions),
    Row(f"{PROJECTION}.weight", "conv_proj.weight", convolution),
    Row(f"{PROJECTION}.bias", "conv_proj.bias"),
    Row("layers.{}.layernorm_before.*", f"{LAYER}ln_1.*"),
    *multihead_attention(f"{LAYER}self_attention"),
    Row("layers.{}.layernorm_after.*", f"{LAYER}ln_2.*"),
    Row("layers.{}.mlp.fc1.*", f"{LAYER}mlp.0.*"),
    Row("layers.{}.mlp.fc2.*", f"{LAYER}mlp.3.*"),
    Row("layers.{}.mlp.fc1.*", f"{LAYER}mlp.linear_1.*"),  # before 0.14
    Row("layers.{}.mlp.fc2.*", f"{LAYER}mlp.linear_2.*"),
    Row("layernorm.*", "encoder.ln.*"),
    Row("pooler.pre_logits.*", "heads.pre_logits.*"),
    Row("classifier.*", "heads.head.*"),
    Row("classifier.*", "heads.0.*"),  # heads that users replace
    Row("classifier.*", "heads.*"),
]


def preprocessing(fields: Mapping[str, Any]) -> Preprocessing:
    """Return the transforms of `ViT_*_Weights`; only models of SWAG have patches of 14 or these larger sizes."""
    if fields["image_size"][0] in (384, 512, 518) or fields["patch_size"][0] == 14:
        return {"name": "center_crop", "crop_pct": 1.0, "resample": BICUBIC}, (
            "bicubic, crop_pct 1, ImageNet's mean and standard deviation"
        )
    return {"name": "center_crop", "resample": BILINEAR}, (
        "bilinear, crop_pct 0.875, ImageNet's mean and standard deviation"
    )


FAMILY = Library(
    name="torchvision",
    marks=("class_token", "encoder.pos_embedding", f"{LAYER.format(0)}ln_1.weight"),
    table=TABLE,
    layer_norm_eps=1e-6,
    preprocessing=preprocessing,
    heads=("heads.head",),
    refused={r"conv_proj\.conv_.*": "a convolutional stem"},
).family
