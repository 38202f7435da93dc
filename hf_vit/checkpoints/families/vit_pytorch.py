"""`ViT` and `SimpleViT` of vit-pytorch (github.com/lucidrains/vit-pytorch), releases 0.7 to 1.26.

Files are bare state dicts. They do not determine the heads, the pooling of older files, and the grid of `SimpleViT`.
An option states these; otherwise the library's default is used, and `assumed` names it.
"""

from typing import Any, NamedTuple

from ...model.configuration_hf_vit import HFViTConfig
from ...system.texts import counted
from ..checkpoint import CLASSIFIER, ENCODER, Family, Options, Reading
from ..files import Source
from ..layouts import Layout, Row, channels_first, count, grid_of_table, heads_first, positions, reshaped
from .plain import check_pooling, patch_of

HEAD_DIM = 64  # the library's default `dim_head`

# ----------------------------------------------------------------------------------------------------- the names


class Era(NamedTuple):
    """Names of the parts of a layer, of the final LayerNorm and of the head in a range of releases."""

    layernorm_before: str
    qkv: str
    o_proj: str
    layernorm_after: str
    fc1: str
    fc2: str
    final_layernorm: str
    head: str


ERAS = (
    # ViT since 1.4, since 0.10 (`PreNorm`), since 0.7 (`Residual(PreNorm)`)
    Era("0.norm", "0.to_qkv", "0.to_out.0", "1.net.0", "1.net.1", "1.net.4", "transformer.norm", "mlp_head"),
    Era("0.norm", "0.fn.to_qkv", "0.fn.to_out.0", "1.norm", "1.fn.net.0", "1.fn.net.3", "mlp_head.0", "mlp_head.1"),
    Era(
        *("0.fn.norm", "0.fn.fn.to_qkv", "0.fn.fn.to_out.0", "1.fn.norm", "1.fn.fn.net.0", "1.fn.fn.net.3"),
        *("mlp_head.0", "mlp_head.1"),
    ),
    # SimpleViT since 1.4, and before
    Era("0.norm", "0.to_qkv", "0.to_out", "1.net.0", "1.net.1", "1.net.3", "transformer.norm", "linear_head"),
    Era("0.norm", "0.to_qkv", "0.to_out", "1.net.0", "1.net.1", "1.net.3", "linear_head.0", "linear_head.1"),
)
LAYER = "transformer.layers.{}."
FIRST_LAYER = LAYER.format(0)


def table(era: Era, is_pooled: bool, has_patch_layernorm: bool, leading: tuple[int, ...]) -> list[Row]:
    """Return our names and theirs.

    Args:
        era: Names of the release.
        is_pooled: Whether the final LayerNorm follows the pooling.
        has_patch_layernorm: Whether the patch projection is between two LayerNorms.
        leading: Dimensions before `[N, D]` of positions and class token: `(1,)` up to 1.16.0.
    """

    def token(config: HFViTConfig) -> Layout:
        return reshaped((1, 1, config.hidden_size), (*leading, 1, config.hidden_size))

    def all_positions(config: HFViTConfig) -> Layout:
        return reshaped((1, -1, config.hidden_size), (*leading, -1, config.hidden_size)).then(positions(config))

    tables = ("embeddings.position_embeddings.prefix", "embeddings.position_embeddings.table.weight")
    patches = "embeddings.patch_embeddings"
    projection = f"to_patch_embedding.{2 if has_patch_layernorm else 1}"
    return [
        Row("embeddings.cls_token", "cls_token", token),
        Row(tables, "pos_embedding", all_positions),
        Row(f"{patches}.layernorm_before.*", "to_patch_embedding.1.*", channels_first),
        Row(f"{patches}.projection.weight", f"{projection}.weight", channels_first),
        Row(f"{patches}.projection.bias", f"{projection}.bias"),
        Row(f"{patches}.layernorm_after.*", "to_patch_embedding.3.*"),
        Row("layers.{}.layernorm_before.*", f"{LAYER}{era.layernorm_before}.*"),
        Row("layers.{}.attention.qkv.weight", f"{LAYER}{era.qkv}.weight", heads_first),
        Row("layers.{}.attention.o_proj.*", f"{LAYER}{era.o_proj}.*"),
        Row("layers.{}.layernorm_after.*", f"{LAYER}{era.layernorm_after}.*"),
        Row("layers.{}.mlp.fc1.*", f"{LAYER}{era.fc1}.*"),
        Row("layers.{}.mlp.fc2.*", f"{LAYER}{era.fc2}.*"),
        Row("pooler.layernorm.*" if is_pooled else "layernorm.*", f"{era.final_layernorm}.*"),
        Row("classifier.*", f"{era.head}.*"),
    ]


# ----------------------------------------------------------------------------------------------------- the config


def _recognises(source: Source) -> bool:
    is_embedded = {"to_patch_embedding.1.weight", "patch_to_embedding.weight"} & set(source.tensors)
    return bool(is_embedded) and any(name.startswith(FIRST_LAYER) for name in source.tensors)


def _read(source: Source, options: Options) -> Reading:
    assumed = ["The images' mean and standard deviation are 0.5: the file does not store them (processor 'original')."]
    check_pooling(source, options)
    era = _era(source)
    is_simple = era.head.startswith("linear_head")
    is_pooled = era.final_layernorm != "transformer.norm"
    has_patch_layernorm = "to_patch_embedding.2.weight" in source.tensors
    projection = source.shape(f"to_patch_embedding.{2 if has_patch_layernorm else 1}.weight")
    if len(projection) != 2:
        raise ValueError(f"{source.name}: the patch projection has the shape {list(projection)}, expected a matrix.")
    width, pixels = projection
    patch_size, channels = patch_of(source, pixels, options, assumed)
    leading: tuple[int, ...] = ()
    use_cls_token = False
    if not is_simple:
        table_shape, token = source.shape("pos_embedding"), source.shape("cls_token")
        if len(table_shape) != len(token) or len(table_shape) < 2:  # ViTDetPool, which has all names of ViT
            raise ValueError(
                f"{source.name}: 'pos_embedding' {list(table_shape)} and 'cls_token' {list(token)}: no ViT."
            )
        # Recent models without a class token store an empty one; older models all have one.
        leading, use_cls_token = table_shape[:-2], 0 not in token
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": count(source.tensors, LAYER),
        "intermediate_size": source.shape(f"{FIRST_LAYER}{era.fc1}.weight", 2)[0],
        "hidden_act": options.hidden_act or "gelu",
        "layer_norm_eps": options.layer_norm_eps or 1e-5,
        "patch_size": patch_size,
        "num_channels": channels,
        "image_size": _image_size(source, patch_size, use_cls_token, options),
        "qkv_bias": False,
        "proj_bias": not is_simple,
        "use_patch_layernorm": has_patch_layernorm,
        "final_layernorm": "pooled" if is_pooled else "tokens",
        "position_embedding_type": "sincos_2d" if is_simple else "learned",
        "use_cls_token": use_cls_token,
        "pooling": options.pooling or ("cls" if use_cls_token else "mean"),
        **_heads(source, era, width, options, assumed),
    }
    if options.hidden_act is None:
        assumed.append(
            "hidden_act gelu, the library's: copies with another activation have the same tensors (--hidden-act)."
        )
    if use_cls_token and leading and options.pooling is None:
        assumed.append(
            "pooling cls: in older releases, models that average all tokens have the same tensors "
            "(--pooling mean_all)."
        )
    architecture = ENCODER
    if f"{era.head}.weight" in source.tensors:
        architecture = CLASSIFIER
        fields["num_labels"] = source.shape(f"{era.head}.weight")[0]
    return Reading(fields, architecture, table(era, is_pooled, has_patch_layernorm, leading), assumed=assumed)


def _era(source: Source) -> Era:
    if "patch_to_embedding.weight" in source.tensors:
        raise ValueError(
            f"{source.name}: vit-pytorch before 0.7 is not supported. Up to 0.6.6 attention is scaled by the model's "
            "width, since 0.6.7 by a head's, and the file does not determine which."
        )
    for era in ERAS:
        marks = (f"{FIRST_LAYER}{era.qkv}.weight", f"{FIRST_LAYER}{era.fc2}.weight", f"{era.final_layernorm}.weight")
        if all(mark in source.tensors for mark in marks):
            return era
    raise ValueError(f"{source.name}: neither ViT nor SimpleViT of a known release of vit-pytorch.")


def _heads(source: Source, era: Era, width: int, options: Options, assumed: list[str]) -> dict[str, Any]:
    """Return the number of heads, their width, and whether there is an output projection."""
    inner = source.shape(f"{FIRST_LAYER}{era.qkv}.weight", 2)[0] // 3
    if f"{FIRST_LAYER}{era.o_proj}.weight" not in source.tensors:
        # The library has no output projection for a single head as wide as the model.
        if options.num_heads not in (None, 1):
            raise ValueError(f"{source.name}: attention without output projection has 1 head: remove --num-heads.")
        return {"num_attention_heads": 1, "use_output_projection": False}
    heads = options.num_heads
    if heads is None and inner % HEAD_DIM == 0:
        heads = inner // HEAD_DIM
        assumed.append(
            f"{counted(heads, 'head')}: the file does not store the number, and {HEAD_DIM} dimensions per head are "
            "the default (--num-heads)."
        )
    if heads is None or inner % heads:
        divisor = f"{HEAD_DIM}, the default width of a head" if heads is None else f"{heads}, the heads given"
        raise ValueError(
            f"{source.name}: the attention width {inner} is not a multiple of {divisor}: pass another --num-heads."
        )
    return {"num_attention_heads": heads, "head_dim": None if inner == width else inner // heads}


def _image_size(source: Source, patch_size: tuple[int, int], use_cls_token: bool, options: Options) -> tuple[int, int]:
    stated = options.image_size if options.patch_size in (None, patch_size) else None
    if "pos_embedding" in source.tensors:
        number = source.shape("pos_embedding")[-2] - use_cls_token
        grid = grid_of_table(number, patch_size, stated, f"{source.name}: 'pos_embedding'")
        return grid[0] * patch_size[0], grid[1] * patch_size[1]
    if options.image_size is None:
        raise ValueError(
            f"{source.name}: the positions of SimpleViT are sines and cosines, and the file does not store "
            "their grid: pass --image-size HxW."
        )
    if stated is None:
        raise ValueError(f"{source.name}: --patch-size resamples learned positions; these are fixed (sin-cos).")
    return stated


FAMILY = Family("vit-pytorch", _recognises, _read)
