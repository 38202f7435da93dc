"""`VisionTransformer` and DeiT of mmpretrain and its predecessor mmcls (models/backbones/vision_transformer.py).

The table has the names below `backbone.`, and those of the head. Backbones of mmsegmentation differ in the names of
the attention. The library resamples positions bicubically without antialiasing.
"""

from collections.abc import Mapping
from typing import Any

from ...model.image_processing_pil_hf_vit import BICUBIC
from ..layouts import Row, convolution, heads_first, positions
from .plain import CLS_TOKEN, POSITIONS, PROJECTION, Library, Preprocessing, multihead_attention

LAYER = "layers.{}."
TABLE = [
    Row(CLS_TOKEN, "cls_token"),
    Row("embeddings.distillation_token", "dist_token"),
    Row(POSITIONS, "pos_embed", positions),
    Row(f"{PROJECTION}.weight", "patch_embed.projection.weight", convolution),
    Row(f"{PROJECTION}.bias", "patch_embed.projection.bias"),
    Row("pre_layernorm.*", "pre_norm.*"),
    Row("layers.{}.layernorm_before.*", f"{LAYER}ln1.*"),
    Row("layers.{}.attention.qkv.*", f"{LAYER}attn.qkv.*", heads_first),
    Row("layers.{}.attention.o_proj.*", f"{LAYER}attn.proj.*"),
    *multihead_attention(f"{LAYER}attn.attn"),  # mmsegmentation
    Row("layers.{}.layernorm_after.*", f"{LAYER}ln2.*"),
    Row("layers.{}.mlp.fc1.*", f"{LAYER}ffn.layers.0.0.*"),
    Row("layers.{}.mlp.fc2.*", f"{LAYER}ffn.layers.1.*"),
    Row("layernorm.*", "ln1.*"),
    Row("pooler.layernorm.*", "ln2.*"),
    Row("pooler.pre_logits.*", "head.layers.pre_logits.*"),
    Row("classifier.*", "head.layers.head.*"),
    Row("classifier.*", "head.fc.*"),
    Row("classifier.cls.*", "head.layers.head.*"),
    Row("classifier.distillation.*", "head.layers.head_dist.*"),
    # LayerScale has `scale` in mmcv, and `weight` in mmpretrain.
    *(Row("layers.{}.attention_scale.weight", f"{LAYER}attn.gamma1.{kind}") for kind in ("weight", "scale")),
    *(Row("layers.{}.mlp_scale.weight", f"{LAYER}ffn.gamma2.{kind}") for kind in ("weight", "scale")),
]


def preprocessing(fields: Mapping[str, Any]) -> Preprocessing:
    """Return the test pipeline of configs/vision_transformer, or of configs/deit and configs/mae."""
    share = 0.875 if fields["image_size"][0] <= 224 else 1.0
    is_mae = fields["final_layernorm"] == "pooled"
    if is_mae or fields["use_distillation_token"] or fields["hidden_size"] < 768:
        words = f"bicubic, crop_pct {share:g}, ImageNet's mean and standard deviation"
        return {"name": "center_crop", "crop_pct": share, "resample": BICUBIC}, words
    return {"name": "timm", "crop_pct": share}, f"bicubic, crop_pct {share:g}, pixels in [-1, 1], as for its ViT-B"


FAMILY = Library(
    name="mmpretrain",
    marks=("patch_embed.projection.weight", "pos_embed", f"{LAYER.format(0)}ffn.layers.0.0.weight"),
    table=TABLE,
    layer_norm_eps=1e-6,
    preprocessing=preprocessing,
    heads=("head.layers.head", "head.fc"),
    num_heads={(768, 8): 8},  # its ViT-S
    pooling="mean",
    fields={"position_interpolation": "bicubic"},
).family
