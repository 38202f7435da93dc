"""transformers' ViTs: ViT, DeiT, ViTMAE, ViTMSN, I-JEPA, DINOv2, DINOv3, BEiT, data2vec, SigLIP, SigLIP 2, CLIP.

Names and forwards are those of transformers 5.23, `models/*/modeling_*.py`. Files have the names of two eras, with or
without the prefix of the class that saved them; the table has all of these. Fields that are missing in `config.json`
have the defaults of transformers' config class.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from ...model.configuration_hf_vit import HFViTConfig
from ...model.image_processing_pil_hf_vit import HFViTImageProcessorPil
from ...model.validation_hf_vit import pair
from ...system.texts import counted
from ..checkpoint import CLASSIFIER, ENCODER, MASKED, Family, Options, Reading, processor_beside
from ..files import Source, Stored
from ..layouts import (
    Layout,
    Row,
    channels_first,
    convolution,
    count,
    flat_positions,
    grid_of_table,
    halves,
    heads_first,
    heads_together,
    positions,
    token,
)
from .relative import BIASES, relative_rows

# ----------------------------------------------------------------------------------------------------- the names

PREFIXES = (
    *("vit.", "", "deit.", "dinov2.", "dinov2_with_registers.", "vision_model.", "model."),
    *("beit.", "data2vec_vision.", "ijepa."),
)
LAYERS = ("encoder.layer.{}.", "layers.{}.", "encoder.layers.{}.", "layer.{}.")
OF_A_LAYER = {
    "layernorm_before.*": ("layernorm_before.*", "norm1.*", "layer_norm1.*"),
    "layernorm_after.*": ("layernorm_after.*", "norm2.*", "layer_norm2.*"),
    "attention.o_proj.*": ("attention.output.dense.*", "attention.o_proj.*", "self_attn.out_proj.*"),
    "attention_scale.weight": ("layer_scale1.lambda1", "lambda_1"),
    "mlp_scale.weight": ("layer_scale2.lambda1", "lambda_2"),
    "mlp.fc1.*": ("intermediate.dense.*", "mlp.fc1.*", "mlp.up_proj.*"),
    "mlp.fc2.*": ("output.dense.*", "mlp.fc2.*", "mlp.down_proj.*", "mlp.weights_out.*"),
    "mlp.gate.*": ("mlp.gate_proj.*",),
}
QUERIES_KEYS_VALUES = (
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)
# Modules of a layer and of all layers, in both eras of BEiT.
RELATIVE_POSITIONS = (
    ("encoder.layer.{}.attention.attention.relative_position_bias", "encoder.relative_position_bias"),
    ("layers.{}.relative_position_bias", "shared_position_bias"),
)


# Biases of queries and values only; our biases of keys are zeros.
ZERO_KEY_BIAS = Layout(
    lambda theirs: [theirs[0], torch.zeros_like(theirs[0]), theirs[1]],
    lambda ours: [ours[0], ours[2]],
)


def without_key_bias(config: HFViTConfig) -> Layout:
    """Convert biases of only queries and values to rows ordered (head, part, d)."""
    return ZERO_KEY_BIAS.then(heads_together(config))


def pixel_decoder(config: HFViTConfig) -> Layout:
    """Convert a 1x1 convolution before a pixel shuffle to a matrix; its channels are ordered like a patch's pixels."""
    return Layout(
        lambda theirs: [theirs[0].flatten(1) if theirs[0].ndim == 4 else theirs[0]],
        lambda ours: [ours[0][..., None, None] if ours[0].ndim == 2 else ours[0]],
    )


def table(
    key_bias: bool = True,
    prefixes: Sequence[str] = PREFIXES,
    layers: int = 0,
    patches: Callable[[HFViTConfig], Layout] = convolution,
) -> list[Row]:
    """Return our names and theirs; if several rows have the same names of ours, transformers' `ViT` saves the first.

    Args:
        key_bias: Whether keys have biases.
        prefixes: Beginnings of the encoder's names.
        layers: Number of layers with relative positions (BEiT).
        patches: Layout of the patch projection.
    """
    tables = ("embeddings.position_embeddings.prefix", "embeddings.position_embeddings.table.weight")
    projection = "embeddings.patch_embeddings.projection"
    gate_and_fc1 = ("layers.{}.mlp.gate.*", "layers.{}.mlp.fc1.*")
    query_key_value = ("pooler.pooling.query.*", "pooler.pooling.key_value.*")
    rows = []
    for prefix in prefixes:
        rows += [
            Row("embeddings.cls_token", f"{prefix}embeddings.cls_token"),
            Row("embeddings.cls_token", f"{prefix}embeddings.class_embedding", token),
            Row("embeddings.distillation_token", f"{prefix}embeddings.distillation_token"),
            Row("embeddings.register_tokens", f"{prefix}embeddings.register_tokens"),
            Row("embeddings.mask_token.weight", f"{prefix}embeddings.mask_token"),
            Row(tables, f"{prefix}embeddings.position_embeddings", positions),
            Row(tables, f"{prefix}embeddings.position_embedding.weight", flat_positions),
            Row("pre_layernorm.*", f"{prefix}pre_layrnorm.*"),
            Row("layernorm.*", f"{prefix}layernorm.*"),
            Row("layernorm.*", f"{prefix}post_layernorm.*"),
            Row("layernorm.*", f"{prefix}norm.*"),
            Row("pooler.layernorm.*", f"{prefix}post_layernorm.*"),
            Row("pooler.layernorm.*", f"{prefix}pooler.layernorm.*"),
            Row("pooler.pre_logits.*", f"{prefix}pooler.dense.*"),
            Row("pooler.pooling.probe", f"{prefix}head.probe"),
            Row(query_key_value, f"{prefix}head.attention.in_proj_*", pooling_attention),
            Row("pooler.pooling.o_proj.*", f"{prefix}head.attention.out_proj.*"),
            Row("pooler.pooling.layernorm.*", f"{prefix}head.layernorm.*"),
            Row("pooler.pooling.mlp.fc1.*", f"{prefix}head.mlp.fc1.*"),
            Row("pooler.pooling.mlp.fc2.*", f"{prefix}head.mlp.fc2.*"),
        ]
        for of_layer, of_all in RELATIVE_POSITIONS if layers else ():
            tables_of_layers = [f"{prefix}{of_layer.format(layer)}.{BIASES}" for layer in range(layers)]
            rows += relative_rows(tables_of_layers, f"{prefix}{of_all}.{BIASES}")
        for theirs in ("patch_embeddings.projection", "patch_embedding", "patch_embeddings"):
            rows.append(Row(f"{projection}.weight", f"{prefix}embeddings.{theirs}.weight", patches))
            rows.append(Row(f"{projection}.bias", f"{prefix}embeddings.{theirs}.bias"))
        for layer in LAYERS:
            for ours, names in OF_A_LAYER.items():
                rows += [Row(f"layers.{{}}.{ours}", f"{prefix}{layer}{theirs}") for theirs in names]
            rows.append(Row(gate_and_fc1, f"{prefix}{layer}mlp.weights_in.*", halves))
            for names in QUERIES_KEYS_VALUES:
                query, key, value = (f"{prefix}{layer}{name}" for name in names)
                if not key_bias:
                    biases = (f"{query}.bias", f"{value}.bias")
                    rows.append(Row("layers.{}.attention.qkv.bias", biases, without_key_bias))
                rows.append(Row("layers.{}.attention.qkv.*", (f"{query}.*", f"{key}.*", f"{value}.*"), heads_together))
    return [
        *rows,
        Row("classifier.*", "classifier.*"),
        Row("classifier.cls.*", "cls_classifier.*"),
        Row("classifier.distillation.*", "distillation_classifier.*"),
        Row("objective.decoder.*", "decoder.0.*", pixel_decoder),
    ]


def pooling_attention(config: HFViTConfig) -> Layout:
    """Split the packed tensor of `torch.nn.MultiheadAttention` into our query and rows ordered (head, k/v, d)."""
    pair = heads_first(config, 2)

    def read(theirs: list[Tensor]) -> list[Tensor]:
        query, *key_value = theirs[0].chunk(3)
        return [query, *pair.read([torch.cat(key_value)])]

    return Layout(read, lambda ours: [torch.cat([ours[0], *pair.write([ours[1]])])])


# ---------------------------------------------------------------------------------------------------- the configs

# Fields that have the same name and meaning in `ViTConfig`, and in all configs of the models below.
STOCK_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "num_channels"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps", "qkv_bias"),
)
SAME_FIELDS = (
    *STOCK_FIELDS,
    *("image_size", "patch_size", "drop_path_rate", "num_register_tokens", "rope_theta", "proj_bias", "mlp_bias"),
    "use_gated_mlp",
)


def _vit(config: Any, source: Source) -> dict[str, Any]:
    fields: dict[str, Any] = {"position_interpolation": "bicubic"}
    if "embeddings.distillation_token" in _stems(source):
        fields["use_distillation_token"] = True
    if any(name.startswith("cls_classifier.") for name in source.tensors):
        fields["pooling"] = "cls_and_distillation"
    dense = _pooler(source, "weight")
    if dense is not None:
        if config.pooler_act != "tanh":
            raise ValueError(f"{source.name}: pooler_act={config.pooler_act!r} is not supported, only 'tanh'.")
        fields["representation_size"] = dense.shape[0]
    return fields


def _pooler(source: Source, kind: str) -> Stored | None:
    """Return the weight or bias of the dense layer of `ViTModel`, which computes `pooler_output`."""
    return next((stored for name, stored in source.tensors.items() if name.endswith(f"pooler.dense.{kind}")), None)


def _input_of_the_head(source: Source, fields: dict[str, Any], assumed: list[str]) -> None:
    """Decide whether a classifier in a file with a pooler reads `pooler_output` or the class token, and state it.

    Classifiers of transformers have no pooler, so both belong to a user's own head. A pooler that was never trained
    still has its initial biases, zeros.
    """
    weight, bias = _pooler(source, "weight"), _pooler(source, "bias")
    classifier = source.tensors.get("classifier.weight")
    if weight is None or bias is None or classifier is None:
        return
    other = "the class token of last_hidden_state"
    if classifier.shape[-1] != weight.shape[0] or not bias.read().any():
        del fields["representation_size"]
        assumed.append(f"The classifier reads {other}: the pooler beside it was never trained.")
    else:
        assumed.append(
            "The classifier reads pooler_output, since a trained pooler is beside it: the tensors are the same if it "
            f"reads {other} (--pooling cls)."
        )


def _plain(config: Any, source: Source) -> dict[str, Any]:
    return {"position_interpolation": "bicubic"}


def _dinov2(config: Any, source: Source) -> dict[str, Any]:
    width = config.hidden_size * config.mlp_ratio
    return {
        "position_interpolation": "bicubic_antialias" if hasattr(config, "num_register_tokens") else "bicubic",
        "layer_scale_init_value": config.layerscale_value,
        "use_gated_mlp": config.use_swiglu_ffn,
        # transformers uses two thirds of the width for a gated MLP, rounded up to a multiple of 8
        "intermediate_size": (int(width * 2 / 3) + 7) // 8 * 8 if config.use_swiglu_ffn else int(width),
        **({"hidden_act": "silu"} if config.use_swiglu_ffn else {}),
        **({"pooling": "cls_and_mean"} if _width_of_head(source) == 2 * config.hidden_size else {}),
    }


def _labels(source: Source, config: Any) -> dict[str, Any]:
    """Return the label names, or only their number if the config has no names: an encoder's has two by default."""
    rows = next((stored.shape[0] for name, stored in source.tensors.items() if name.endswith("classifier.weight")), 2)
    is_unnamed = config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    return {"num_labels": rows} if is_unnamed else {"id2label": config.id2label, "label2id": config.label2id}


def _width_of_head(source: Source) -> int | None:
    return source.shape("classifier.weight", 2)[1] if "classifier.weight" in source.tensors else None


def _dinov3(config: Any, source: Source) -> dict[str, Any]:
    if not (config.query_bias == config.value_bias):
        raise ValueError(f"{source.name}: a bias of only queries or only values is not supported.")
    return {
        "position_embedding_type": "rotary",
        "layer_scale_init_value": config.layerscale_value,
        "qkv_bias": config.query_bias,
        "attention_probs_dropout_prob": config.attention_dropout,
    }


def _beit(config: Any, source: Source) -> dict[str, Any]:
    is_relative = config.use_relative_position_bias or config.use_shared_relative_position_bias
    if is_relative and config.use_absolute_position_embeddings:
        raise ValueError(f"{source.name}: it has learned positions and relative ones: only one kind is supported.")
    names = _stems(source)
    kind = "relative" if is_relative else "learned" if config.use_absolute_position_embeddings else "none"
    norms = {"pooled": "pooler.layernorm.weight", "tokens": "layernorm.weight"}
    return {
        "position_embedding_type": kind,
        "position_interpolation": "bilinear" if is_relative else "bicubic",
        **({"num_prefix_positions": 1} if is_relative else {}),
        "use_cls_token": True,
        "pooling": "mean" if config.use_mean_pooling else "cls",
        "final_layernorm": next((where for where, name in norms.items() if name in names), "none"),
        "layer_scale_init_value": config.layer_scale_init_value or None,
    }


def _ijepa(config: Any, source: Source) -> dict[str, Any]:
    return {"position_interpolation": "bicubic", "pooling": "mean"}


def _siglip(config: Any, source: Source) -> dict[str, Any]:
    has_head = (
        any(".head.probe" in f".{name}" for name in source.tensors) and "classifier.weight" not in source.tensors
    )
    return {
        "position_interpolation": "bicubic",
        "use_cls_token": False,
        "pooling": "attention" if has_head else "mean",
        "attention_probs_dropout_prob": config.attention_dropout,
    }


def _siglip2(config: Any, source: Source) -> dict[str, Any]:
    rows, columns = pair("patch_size", config.patch_size)
    side, _ = grid_of_table(config.num_patches, (rows, columns), None, f"{source.name}: num_patches of config.json")
    sizes = {"image_size": (side * rows, side * columns)}
    return {**_siglip(config, source), **sizes, "position_interpolation": "bilinear_antialias"}


def _processor_of_packs(source: Source, fields: dict[str, Any], assumed: list[str]) -> HFViTImageProcessorPil | None:
    """Return SigLIP 2's processor, but with images of one size instead of packs, which few commands accept."""
    processor = processor_beside(source)
    if processor is not None:
        number = vars(processor).pop("max_num_patches", 256)
        processor.patch_size = fields["patch_size"]
        processor.set_output_size(fields["image_size"])
        assumed.append(
            "Preprocessing to one size, without regard to the aspect ratio. SigLIP 2 keeps it, in grids of at most "
            f"{number} patches: set packing={number} of the image processor for that."
        )
    return processor


def _clip(config: Any, source: Source) -> dict[str, Any]:
    is_classifier = "classifier.weight" in source.tensors
    return {
        "position_interpolation": "bicubic",
        "use_cls_token": True,
        "pooling": "mean" if is_classifier else "cls",
        "final_layernorm": "none" if is_classifier else "pooled",
        "use_pre_layernorm": True,
        "patch_bias": False,
        "attention_probs_dropout_prob": config.attention_dropout,
    }


TEXT = (
    r"(model\.)?text_model\..*",
    r"text_projection\..*",
    r"visual_projection\..*",
    r"logit_(scale|bias)",
    r".*position_ids",
)
MODELS: dict[str, tuple[Callable[[Any, Source], dict[str, Any]], tuple[str, ...]]] = {
    # By model type: a function that reads the config, and names of tensors that do not belong to the encoder.
    "vit": (_vit, (r".*pooler\.dense\..*",)),
    "deit": (_vit, (r".*pooler\.dense\..*",)),
    "vit_mae": (_plain, (r"decoder\..*", r"mask_token")),
    "vit_msn": (_plain, ()),
    "dinov2": (_dinov2, (r".*embeddings\.mask_token",)),
    "dinov2_with_registers": (_dinov2, (r".*embeddings\.mask_token",)),
    "dinov3_vit": (_dinov3, (r".*embeddings\.mask_token", r".*rope_embeddings\.inv_freq")),
    "beit": (_beit, (r"lm_head\..*", r".*embeddings\.mask_token", r".*relative_position_index")),
    "data2vec-vision": (_beit, (r".*embeddings\.mask_token", r".*relative_position_index")),
    "ijepa": (_ijepa, (r".*embeddings\.mask_token", r".*pooler\.dense\..*")),
    "siglip": (_siglip, (*TEXT, r".*head\..*")),
    "siglip_vision_model": (_siglip, (*TEXT, r".*head\..*")),
    "siglip2": (_siglip2, (*TEXT, r".*head\..*")),
    "siglip2_vision_model": (_siglip2, (*TEXT, r".*head\..*")),
    **{
        f"{name}{part}": (_clip, (*TEXT, r".*post_layernorm\..*"))
        for name in ("clip", "metaclip_2", "chinese_clip", "altclip", "clipseg")
        for part in ("", "_vision_model")
    },
}


def _recognises(source: Source) -> bool:
    if source.config.get("model_type") in MODELS:
        # Repositories of CLIP hold its weights under the names of open_clip, too.
        return any("embeddings." in name for name in source.tensors)
    return "model_type" not in source.config and _type_of_bare(source) is not None


def _stems(source: Source) -> set[str]:
    """Return the names of the tensors without the prefix of a class."""
    return {name.removeprefix(prefix) for name in source.tensors for prefix in PREFIXES if name.startswith(prefix)}


def _type_of_bare(source: Source) -> str | None:
    """Recognize a ViT or DeiT without config.json; the tensors of other models do not determine enough."""
    names = _stems(source)
    if not {"embeddings.cls_token", "embeddings.position_embeddings", "layernorm.weight"} <= names:
        return None
    return "deit" if "embeddings.distillation_token" in names else "vit"


def _bare_config(source: Source, options: Options, assumed: list[str]) -> dict[str, Any]:
    """Derive the content of a missing config.json from the tensors."""
    sizes = {
        name.removeprefix(prefix): source.shape(name)
        for prefix in PREFIXES[::-1]
        for name in source.tensors
        if name.startswith(prefix)
    }
    projection = sizes["embeddings.patch_embeddings.projection.weight"]
    if len(projection) != 4:
        raise ValueError(
            f"{source.name}: the patch projection has the shape {list(projection)}, expected a 2-D "
            "convolution: video and volumetric models are not supported."
        )
    width, channels, height, patch_width = projection
    style = next(style for style in LAYERS if count(sizes, style))
    fc1 = next(
        sizes[f"{style.format(0)}{name[:-1]}weight"]
        for name in OF_A_LAYER["mlp.fc1.*"]
        if f"{style.format(0)}{name[:-1]}weight" in sizes
    )
    prefix = 2 if "embeddings.distillation_token" in sizes else 1
    number = sizes["embeddings.position_embeddings"][1] - prefix
    stated = options.image_size if options.patch_size in (None, (height, patch_width)) else None
    rows, columns = grid_of_table(number, (height, patch_width), stated, f"{source.name}: position_embeddings")
    heads = options.num_heads
    if heads is None:
        if width % 64:
            raise ValueError(f"{source.name}: there is no config.json with the number of heads: pass --num-heads.")
        heads = width // 64
        assumed.append(
            f"{counted(heads, 'head')}: there is no config.json, and 64 dimensions per head are usual (--num-heads)."
        )
    assumed.append("hidden_act gelu and layer_norm_eps 1e-12, transformers' defaults: there is no config.json.")
    label = next(
        (stored.shape[0] for name, stored in source.tensors.items() if name.endswith("classifier.weight")), None
    )
    return {
        "hidden_size": width,
        "num_hidden_layers": count(sizes, style),
        "num_attention_heads": heads,
        "intermediate_size": fc1[0],
        "num_channels": channels,
        "patch_size": (height, patch_width),
        "image_size": (rows * height, columns * patch_width),
        "qkv_bias": any(name.endswith((".query.bias", ".q_proj.bias")) for name in sizes),
        **({"num_labels": label} if label is not None else {}),
    }


def _read(source: Source, options: Options) -> Reading:
    assumed: list[str] = []
    stored = source.config or _bare_config(source, options, assumed)
    model_type = stored.get("model_type") or _type_of_bare(source)
    assert model_type is not None
    outer = CONFIG_MAPPING[model_type](**{name: value for name, value in stored.items() if name != "model_type"})
    config = getattr(outer, "vision_config", outer)
    specific, left_out = MODELS[model_type]
    fields = {name: getattr(config, name) for name in SAME_FIELDS if hasattr(config, name)}
    fields.update(specific(config, source))
    for name in ("hidden_act", "layer_norm_eps"):
        if getattr(options, name) is not None:
            fields[name] = getattr(options, name)
    if options.pooling is not None:
        fields["pooling"] = options.pooling
    architecture = ENCODER
    if any(name.startswith(("classifier.", "cls_classifier.")) for name in source.tensors):
        architecture = CLASSIFIER
        if options.pooling is None:
            _input_of_the_head(source, fields, assumed)
        else:
            fields.pop("representation_size", None)
        fields.update(problem_type=outer.problem_type, **_labels(source, outer))
    elif "decoder.0.weight" in source.tensors:
        architecture = MASKED
        fields["use_cls_token"] = True
    key_bias = any(name.endswith((".key.bias", ".k_proj.bias")) for name in source.tensors)
    is_relative = fields.get("position_embedding_type") == "relative"
    is_packed = model_type.startswith("siglip2")
    patches = channels_first if is_packed else convolution
    rows = table(key_bias, layers=config.num_hidden_layers if is_relative else 0, patches=patches)
    processor = _processor_of_packs(source, fields, assumed) if is_packed else processor_beside(source)
    return Reading(fields, architecture, rows, left_out, assumed, processor)


FAMILY = Family("transformers", _recognises, _read, heads=("classifier", "cls_classifier"))
