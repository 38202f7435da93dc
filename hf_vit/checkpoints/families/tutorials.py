"""Implementations of the ViT from tutorials and from much copied code, and MONAI's for two dimensions.

- jeonsworld/ViT-pytorch, models/modeling.py, the base of many papers;
- MONAI, monai/networks/nets/vit.py, with patches from a convolution or from a matrix;
- Lightning's tutorial 11, which is the University of Amsterdam's tutorial 15;
- learnpytorch.io, "PyTorch Paper Replicating".
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from ..checkpoint import Family, Options
from ..files import Source
from ..layouts import Row, channels_first, convolution, heads_first, heads_together, positions
from .plain import CLS_TOKEN, POSITIONS, PROJECTION, Library, Preprocessing, multihead_attention

CIFAR10 = {"image_mean": [0.4914, 0.4822, 0.4465], "image_std": [0.2470, 0.2435, 0.2616]}


def _of_the_paper(fields: Mapping[str, Any]) -> Preprocessing:
    return {"name": "original"}, "bilinear, pixels in [-1, 1]"


def _of_cifar10(fields: Mapping[str, Any]) -> Preprocessing:
    return {"name": "original", **CIFAR10}, "bilinear, the mean and standard deviation of CIFAR-10"


def _of_a_tensor(fields: Mapping[str, Any]) -> Preprocessing:
    return {"name": "original", "image_mean": [0.0] * 3, "image_std": [1.0] * 3}, "bilinear, pixels in [0, 1]"


_LAYER = "transformer.encoder.layer.{}."
_QUERY_KEY_VALUE = tuple(f"{_LAYER}attn.{part}.*" for part in ("query", "key", "value"))
JEONSWORLD = Library(
    name="jeonsworld/ViT-pytorch",
    marks=("transformer.embeddings.position_embeddings", f"{_LAYER.format(0)}ffn_norm.weight"),
    table=[
        Row(CLS_TOKEN, "transformer.embeddings.cls_token"),
        Row(POSITIONS, "transformer.embeddings.position_embeddings", positions),
        Row(f"{PROJECTION}.weight", "transformer.embeddings.patch_embeddings.weight", convolution),
        Row(f"{PROJECTION}.bias", "transformer.embeddings.patch_embeddings.bias"),
        Row("layers.{}.layernorm_before.*", f"{_LAYER}attention_norm.*"),
        Row("layers.{}.attention.qkv.*", _QUERY_KEY_VALUE, heads_together),
        Row("layers.{}.attention.o_proj.*", f"{_LAYER}attn.out.*"),
        Row("layers.{}.layernorm_after.*", f"{_LAYER}ffn_norm.*"),
        Row("layers.{}.mlp.fc1.*", f"{_LAYER}ffn.fc1.*"),
        Row("layers.{}.mlp.fc2.*", f"{_LAYER}ffn.fc2.*"),
        Row("layernorm.*", "transformer.encoder.encoder_norm.*"),
        Row("classifier.*", "head.*"),
    ],
    layer_norm_eps=1e-6,
    preprocessing=_of_the_paper,
    heads=("head",),
    refused={
        r"transformer\.embeddings\.hybrid_model\..*": "a ResNet stem",
        r"part_head\..*|transformer\.encoder\.part_.*": "a last layer that reads selected patches (TransFG)",
    },
    fields={"position_interpolation": "bilinear_corners"},
)

MONAI = Library(
    name="MONAI",
    marks=("patch_embedding.position_embeddings", "blocks.0.mlp.linear1.weight", "blocks.0.attn.out_proj.weight"),
    table=[
        Row(CLS_TOKEN, "cls_token"),
        Row(POSITIONS, "patch_embedding.position_embeddings", positions),
        Row(f"{PROJECTION}.weight", "patch_embedding.patch_embeddings.weight", convolution),
        Row(f"{PROJECTION}.bias", "patch_embedding.patch_embeddings.bias"),
        Row(f"{PROJECTION}.weight", "patch_embedding.patch_embeddings.1.weight", channels_first),
        Row(f"{PROJECTION}.bias", "patch_embedding.patch_embeddings.1.bias"),
        Row("layers.{}.layernorm_before.*", "blocks.{}.norm1.*"),
        Row("layers.{}.attention.qkv.*", "blocks.{}.attn.qkv.*", heads_first),
        Row("layers.{}.attention.o_proj.*", "blocks.{}.attn.out_proj.*"),
        Row("layers.{}.layernorm_after.*", "blocks.{}.norm2.*"),
        Row("layers.{}.mlp.fc1.*", "blocks.{}.mlp.linear1.*"),
        Row("layers.{}.mlp.fc2.*", "blocks.{}.mlp.linear2.*"),
        Row("layernorm.*", "norm.*"),
        Row("classifier.*", "classification_head.0.*"),
        Row("classifier.*", "classification_head.*"),
    ],
    layer_norm_eps=1e-5,
    preprocessing=_of_the_paper,
    heads=("classification_head", "classification_head.0"),
    left_out=(r"blocks\.\d+\.(cross_attn|norm_cross_attn)\..*",),  # built, but not used without a context
    remarks={
        r"classification_head\.0\.weight": "The logits are those before MONAI's tanh, which keeps their order: its "
        "head ends with it by default (post_activation)."
    },
)

LIGHTNING = Library(
    name="Lightning's tutorial",
    marks=("input_layer.weight", "pos_embedding", "transformer.0.layer_norm_1.weight"),
    table=[
        Row(CLS_TOKEN, "cls_token"),
        Row(POSITIONS, "pos_embedding", positions),
        Row(f"{PROJECTION}.*", "input_layer.*"),
        Row("layers.{}.layernorm_before.*", "transformer.{}.layer_norm_1.*"),
        *multihead_attention("transformer.{}.attn"),
        Row("layers.{}.layernorm_after.*", "transformer.{}.layer_norm_2.*"),
        Row("layers.{}.mlp.fc1.*", "transformer.{}.linear.0.*"),
        Row("layers.{}.mlp.fc2.*", "transformer.{}.linear.3.*"),
        Row("pooler.layernorm.*", "mlp_head.0.*"),
        Row("classifier.*", "mlp_head.1.*"),
    ],
    layer_norm_eps=1e-5,
    preprocessing=_of_cifar10,
    head_dim=32,
)

LEARNPYTORCH = Library(
    name="learnpytorch.io",
    marks=("class_embedding", "patch_embedding.patcher.weight", "transformer_encoder.0.msa_block.layer_norm.weight"),
    table=[
        Row(CLS_TOKEN, "class_embedding"),
        Row(POSITIONS, "position_embedding", positions),
        Row(f"{PROJECTION}.weight", "patch_embedding.patcher.weight", convolution),
        Row(f"{PROJECTION}.bias", "patch_embedding.patcher.bias"),
        Row("layers.{}.layernorm_before.*", "transformer_encoder.{}.msa_block.layer_norm.*"),
        *multihead_attention("transformer_encoder.{}.msa_block.multihead_attn"),
        Row("layers.{}.layernorm_after.*", "transformer_encoder.{}.mlp_block.layer_norm.*"),
        Row("layers.{}.mlp.fc1.*", "transformer_encoder.{}.mlp_block.mlp.0.*"),
        Row("layers.{}.mlp.fc2.*", "transformer_encoder.{}.mlp_block.mlp.3.*"),
        Row("pooler.layernorm.*", "classifier.0.*"),
        Row("classifier.*", "classifier.1.*"),
    ],
    layer_norm_eps=1e-5,
    preprocessing=_of_a_tensor,
)

FAMILIES = tuple(library.family for library in (JEONSWORLD, MONAI, LIGHTNING, LEARNPYTORCH))

# Prefixes of the `torch.nn.TransformerEncoder` of a model.
_ENCODERS = ("", "encoder.", "transformer.", "transformer_encoder.")


def _has_torch_s_layers(source: Source) -> bool:
    names = ("self_attn.in_proj_weight", "linear1.weight", "norm1.weight")
    return any(all(f"{place}layers.0.{name}" in source.tensors for name in names) for place in _ENCODERS)


def _refuse_torch_s_layers(source: Source, options: Options) -> NoReturn:
    raise ValueError(
        f"{source.name}: a torch.nn.TransformerEncoder is not supported. It applies LayerNorm after attention and MLP "
        "unless it was built with norm_first=True, and the file does not store that. If it was, pass a table of its "
        "names (--names)."
    )


TRANSFORMER_ENCODER = Family("torch.nn.TransformerEncoder", _has_torch_s_layers, _refuse_torch_s_layers)
