"""timm's VisionTransformer, VisionTransformerDistilled (DeiT), VisionTransformerRelPos, Beit and Eva.

Forwards are those of timm 1.0.31. The tensors determine most of an architecture; `Stated` has the rest.
"""

from typing import Any

from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ...model.configuration_hf_vit import HFViTConfig
from ...model.image_processing_pil_hf_vit import PRESETS, HFViTImageProcessorPil
from ...system.texts import counted
from ..checkpoint import CLASSIFIER, ENCODER, Family, Options, Reading
from ..files import Source
from ..layouts import count, is_square
from .plain import HEAD_DIMS
from .timm_facts import ACTIVATIONS, EPSILONS, FIELDS, MIXED, POOLINGS, Stated
from .timm_names import LEFT_OUT, table

REGISTERS = ("reg_token", "register_tokens", "storage_tokens")  # timm, DINOv2, DINOv3
# Modules with relative positions of one layer or of all: timm's VisionTransformerRelPos, then BEiT
RELATIVE = ("blocks.0.attn.rel_pos", "shared_rel_pos", "blocks.0.attn", "rel_pos_bias")
WRAPPER = "timm_wrapper"  # the model type of a model of timm in transformers
DINOV2_SIZE = (518, 518)  # of the positions; its authors evaluate at 224 pixels


def _recognises(source: Source) -> bool:
    if source.config.get("model_type", WRAPPER) != WRAPPER:
        return False
    names = source.tensors
    return "architecture" in source.config or (
        "patch_embed.proj.weight" in names and any(name.startswith("blocks.0.") for name in names)
    )


def _read(source: Source, options: Options) -> Reading:
    return read(Stated(source, options))


def read(stated: Stated) -> Reading:
    """Read a checkpoint with timm's names, given what is known about it."""
    source, options = stated.source, stated.options
    names, shape = source.tensors, source.shape
    projection = shape("patch_embed.proj.weight")
    if len(projection) == 5:
        raise ValueError(
            f"{source.name}: its patches have three dimensions, {list(projection[2:])}: models of videos and volumes "
            "are not supported."
        )
    if len(projection) != 4:
        raise ValueError(
            f"{source.name}: 'patch_embed.proj.weight' has the shape {list(projection)}, expected 4 dimensions."
        )
    width, channels, *patch = projection
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": count(names, "blocks.{}."),
        "num_channels": channels,
        "patch_size": tuple(patch),
        "intermediate_size": shape(_fc2(source), 2)[1],
        "patch_bias": "norm_pre.weight" not in names,  # timm builds it without bias before LayerNorm
        "qkv_bias": any(f"blocks.0.attn.{name}" in names for name in ("qkv.bias", "q_bias", "q_proj.bias")),
        "proj_bias": "blocks.0.attn.proj.bias" in names,
        "mlp_bias": _fc2(source).replace("weight", "bias") in names,
        "use_qk_norm": "blocks.0.attn.q_norm.weight" in names,
        "use_attention_layernorm": any(f"blocks.0.attn.{name}.weight" in names for name in ("norm", "inner_attn_ln")),
        "use_mlp_layernorm": any(f"blocks.0.mlp.{name}.weight" in names for name in ("norm", "ffn_ln")),
        "use_pre_layernorm": "norm_pre.weight" in names,
        "final_layernorm": "tokens" if "norm.weight" in names else "pooled" if "fc_norm.weight" in names else "none",
        "use_cls_token": "cls_token" in names,
        "use_distillation_token": "dist_token" in names,
        "num_register_tokens": next((shape(name)[1] for name in REGISTERS if name in names), 0),
        "position_interpolation": "bicubic_antialias",
    }
    if {"blocks.0.ls1.gamma", "blocks.0.gamma_1"} & set(names):
        fields["layer_scale_init_value"] = stated.arguments.get("init_values") or 1e-5
    fields.update(_heads(source, stated))
    fields.update(_mlp(source, stated))
    fields.update(_pooling(source, stated, fields))
    fields.update(_positions(source, stated, fields))
    fields.update({name: stated.facts[name] for name in FIELDS if name in stated.facts})
    if fields.get("rope_grid") == "own":
        fields["rope_grid"] = _divide(fields["image_size"], fields["patch_size"])
    is_bare_clip = "norm_pre.weight" in names and not stated.config
    eps = options.layer_norm_eps
    if eps is None:
        eps = stated.named("norm_layer", EPSILONS, "--layer-norm-eps")
        eps = eps or (1e-5 if is_bare_clip else stated.facts["layer_norm_eps"])
        rotary = ", and no rotary positions" * ("rope_axes" not in stated.facts)
        stated.assume(
            f"layer_norm_eps {eps:g}, LayerNorm before attention and MLP{rotary}: the tensors do not determine them "
            "(--layer-norm-eps)."
        )
    fields["layer_norm_eps"] = eps
    architecture = ENCODER
    if "head.weight" in names:
        architecture = CLASSIFIER
        fields["num_labels"], width = shape("head.weight", 2)
        if "pre_logits.fc.weight" in names:
            fields["representation_size"] = width
        fields.update(_labels(stated, fields["num_labels"]))
    is_gate_first = (options.mlp_gate or stated.facts.get("mlp_gate")) != "last"
    has_bias_mask = "blocks.0.attn.qkv.bias_mask" in names
    rows = table(HFViTConfig(**fields), is_gate_first, has_bias_mask, stated.facts.get("rope_axes"))
    processor = _processor(stated, fields)
    return Reading(fields, architecture, rows, LEFT_OUT, stated.assumed, processor)


def _heads(source: Source, stated: Stated) -> dict[str, Any]:
    """Return the number of heads, and their width if it is not the model's width divided by it.

    Raises:
        ValueError: If nothing states the number, and the usual width per head does not divide the attention's width.
    """
    if "blocks.0.attn.q_proj.weight" in source.tensors:
        inner, width = source.shape("blocks.0.attn.q_proj.weight", 2)
    else:
        rows, width = source.shape("blocks.0.attn.qkv.weight", 2)
        inner = rows // 3
    heads = stated.options.num_heads or stated.arguments.get("num_heads")
    if heads is None:
        heads = _heads_in_tensors(source, inner)
    if heads is None:
        head_dim = stated.facts.get("head_dim") or HEAD_DIMS.get(inner, 64)
        heads = stated.facts.get("num_heads", inner // head_dim)
        # With another width the architecture keeps its number of heads, which is unknown here.
        if inner % head_dim or "embed_dim" in stated.arguments:
            raise ValueError(
                f"{source.name}: the number of heads is not stated for a width of {inner}, and the usual width of "
                f"{head_dim} per head cannot be assumed: pass --num-heads."
            )
        stated.assume(
            f"{counted(heads, 'head')}: nothing states the number, and {inner // heads} dimensions per head are usual "
            "(--num-heads)."
        )
    if inner % heads:
        raise ValueError(f"{source.name}: {heads} heads do not divide a width of {inner}: pass another --num-heads.")
    return {"num_attention_heads": heads, **({"head_dim": inner // heads} if inner != width else {})}


def _heads_in_tensors(source: Source, inner: int) -> int | None:
    if "blocks.0.attn.q_norm.weight" in source.tensors:
        return inner // source.shape("blocks.0.attn.q_norm.weight")[0]
    if "rope_embed.periods" in source.tensors:
        return inner // (4 * source.shape("rope_embed.periods")[0])
    for module in RELATIVE:
        for kind, axis in (("relative_position_bias_table", 1), ("mlp.fc2.weight", 0)):
            if f"{module}.{kind}" in source.tensors:
                return source.shape(f"{module}.{kind}")[axis]
    return None


def _fc2(source: Source) -> str:
    return "blocks.0.mlp.w3.weight" if "blocks.0.mlp.w3.weight" in source.tensors else "blocks.0.mlp.fc2.weight"


def is_gated(source: Source) -> bool:
    """Return whether the MLP has a gate, with weights of its own or packed with those of the hidden layer."""
    names = source.tensors
    if {"blocks.0.mlp.w3.weight", "blocks.0.mlp.fc1_g.weight"} & names.keys():
        return True
    fc1, fc2 = names.get("blocks.0.mlp.fc1.weight"), names.get("blocks.0.mlp.fc2.weight")
    return fc1 is not None and fc2 is not None and fc1.shape[0] == 2 * fc2.shape[-1]


def _mlp(source: Source, stated: Stated) -> dict[str, Any]:
    """Return activation and gating of the MLP.

    Raises:
        ValueError: If it is gated and nothing states the activation, or which half is the gate.
    """
    options, names = stated.options, source.tensors
    if "blocks.0.mlp.w3.weight" in names:
        return {"hidden_act": options.hidden_act or "silu", "use_gated_mlp": True}
    activation = options.hidden_act or stated.named("act_layer", ACTIVATIONS, "--hidden-act")
    activation = activation or stated.facts.get("hidden_act")
    is_split = "blocks.0.mlp.fc1_g.weight" in names
    is_packed = not is_split and is_gated(source)
    if is_split:
        activation = activation or stated.facts.get("gated_act")
    if (is_split or is_packed) and activation is None:
        raise ValueError(
            f"{source.name}: the MLP is gated, but its activation is not stated anywhere: pass --hidden-act (silu for "
            "SwiGLU)."
        )
    if is_packed and (options.mlp_gate or stated.facts.get("mlp_gate")) is None:
        raise ValueError(
            f"{source.name}: 'blocks.0.mlp.fc1.weight' packs a gate, and it is not stated in which half: "
            "pass --mlp-gate first, as in SwiGLUPacked, or --mlp-gate last, as in GluMlp."
        )
    if activation is None:
        activation = "gelu"
        quick = "; CLIP models of OpenAI, Meta and Apple have quick_gelu" if "norm_pre.weight" in names else ""
        stated.assume(f"hidden_act gelu, timm's default: nothing states it{quick} (--hidden-act).")
    return {"hidden_act": activation, "use_gated_mlp": is_split or is_packed}


def _pooling(source: Source, stated: Stated, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the pooling.

    Raises:
        ValueError: If it has no equivalent here.
    """
    names, arguments = source.tensors, stated.arguments
    has_prefix = fields["use_cls_token"] or fields["num_register_tokens"]
    if stated.options.pooling is not None:
        return {"pooling": stated.options.pooling}
    if "dist_token" in names and ("head_dist.weight" in names or "head.weight" not in names):
        return {"pooling": "cls_and_distillation"}
    # An empty name means no pooling; the pooling that the tensors allow is used.
    name = arguments.get("global_pool") or stated.config.get("global_pool") or stated.facts.get("global_pool")
    if name is not None and name not in POOLINGS:
        raise ValueError(f"{source.name}: global_pool={name!r}, expected one of {', '.join(POOLINGS)}.")
    pooling = POOLINGS[name] if name else None
    if pooling is None:
        if "attn_pool.latent" in names:
            pooling = "attention"
        elif not fields["use_cls_token"]:
            pooling = "mean"
        else:
            pooling = "mean" if fields["final_layernorm"] == "pooled" else "cls"
            norm = {"tokens": "norm", "pooled": "fc_norm", "none": "no norm"}[fields["final_layernorm"]]
            stated.assume(f"pooling {pooling}, timm's default with a class token and {norm} (--pooling).")
    includes_prefix = arguments.get("pool_include_prefix", stated.facts.get("pooling") == "attention")
    if pooling == "mean" and includes_prefix:
        pooling = "mean_all"
    if pooling == "attention" and has_prefix and not includes_prefix:
        pooling = "attention_patches"
        stated.assume("attention pooling over patches only, timm's default (--pooling attention: over all tokens).")
    return {"pooling": pooling}


def _positions(source: Source, stated: Stated, fields: dict[str, Any]) -> dict[str, Any]:
    """Return type and grid of the positions.

    Raises:
        ValueError: If no grid fits, or more than one.
    """
    patch, names = fields["patch_size"], source.tensors
    prefix = fields["use_cls_token"] + fields["use_distillation_token"] + fields["num_register_tokens"]
    kinds = ("relative_position_bias_table", "mlp.fc1.weight")
    modules = [module for module in RELATIVE if any(f"{module}.{kind}" in names for kind in kinds)]
    kind = stated.facts.get("position_embedding_type", "learned" if "pos_embed" in names else "none")
    if "rope.freqs" in names:
        raise ValueError(f"{source.name}: 'rope.freqs' belongs to {MIXED}, which are not supported.")
    if "pos_embed" in names and (modules or not kind.startswith("learned")):
        others = "relative" if modules else kind
        raise ValueError(
            f"{source.name}: it has learned positions, 'pos_embed', and {others} ones: one model cannot have both."
        )
    biases = f"{modules[0]}.relative_position_bias_table" if modules else ""
    if "pos_embed" in names:
        stored = source.shape("pos_embed")
        if len(stored) != 3:
            raise ValueError(f"{source.name}: 'pos_embed' has the shape {list(stored)}, expected [1, positions, D].")
        # DINOv2 added registers later: only patches and class token have positions.
        placed_prefix = 1 if "register_tokens" in names else prefix
        numbers = {number: stored[1] - number for number in (0, placed_prefix)}
        placed, (rows, columns) = _grid(stated, "pos_embed", numbers, patch)
        found: dict[str, Any] = {"position_embedding_type": kind, "num_prefix_positions": placed}
    elif biases in names:
        placed = prefix and 3
        rest = source.shape(biases)[0] - placed
        _, (rows, columns) = _grid(stated, biases, {placed: rest}, patch, is_relative=True)
        found = {"position_embedding_type": "relative", "num_prefix_positions": prefix}
    else:
        if not modules and kind == "none" and "blocks.0.gamma_1" in names:
            raise ValueError(
                f"{source.name}: it has no positions, and a LayerScale named 'blocks.0.gamma_1': it is timm's Eva "
                "with rotary positions of an unknown kind."
            )
        if not modules and kind != "rotary" and stated.config and stated.arguments.get("pos_embed") != "none":
            raise ValueError(
                f"{source.name}: the tensor 'pos_embed' is missing, and config.json does not have pos_embed='none'."
            )
        # Any grid fits, so the requested one comes first: an MLP of offsets is evaluated on it.
        asked, divisor = stated.options.image_size, stated.options.patch_size or patch
        grids = [_divide(asked, divisor)] if asked else [_divide(size, patch) for size in stated.sizes]
        if not grids:
            raise ValueError(
                f"{source.name}: there is no 'pos_embed', and neither tensors nor config.json state the image size: "
                "pass --image-size HxW."
            )
        rows, columns = grids[0]
        if not asked:
            stated.note_margin(next(iter(stated.sizes)), (rows, columns), patch)
        found = {"position_embedding_type": "relative" if modules else kind, "num_prefix_positions": 0}
    if found.get("position_embedding_type") == "relative":
        found["position_interpolation"] = "geometric_bilinear"
    return {**found, "image_size": (rows * patch[0], columns * patch[1])}


def _divide(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    return size[0] // patch[0], size[1] // patch[1]


def _grid(
    stated: Stated, name: str, numbers: dict[int, int], patch: tuple[int, int], is_relative: bool = False
) -> tuple[int, tuple[int, int]]:
    """Find the grid of a table: a stated one that fits, or else a square.

    Args:
        name: The table's name, for errors.
        numbers: Number of rows for the grid, by the number of rows that may be for the tokens before it.
        is_relative: Whether a row is an offset instead of a position.

    Returns:
        A key of `numbers`, and the grid.
    """

    def table_size(rows: int, columns: int) -> int:
        return (2 * rows - 1) * (2 * columns - 1) if is_relative else rows * columns

    for size in stated.sizes:
        grid = _divide(size, patch)
        for placed, number in numbers.items():
            if table_size(*grid) == number:
                stated.note_margin(size, grid, patch)
                return placed, grid
    squares = {placed: round(number**0.5) for placed, number in numbers.items() if number > 0 and is_square(number)}
    if is_relative:
        squares = {placed: (side + 1) // 2 for placed, side in squares.items() if side % 2}
    if len(squares) != 1:
        fits = " or ".join(f"{side}x{side}" for side in squares.values()) or "no square"
        number, has_cls_token = max(numbers.values()), "cls_token" in stated.source.tensors
        raise ValueError(
            f"{stated.source.name}: {name!r} has {number} positions, which fit {fits}: pass --image-size HxW"
            + ("." if has_cls_token or not is_square(number - 1) else ", unless 'cls_token' is missing.")
        )
    ((placed, side),) = squares.items()
    stated.assumed.append(
        f"A square grid of {side}x{side} patches after {counted(placed, 'other position')}: nothing states it "
        "(--image-size)."
    )
    return placed, (side, side)


# --------------------------------------------------------------------------------------- labels and preprocessing


def _labels(stated: Stated, number: int) -> dict[str, Any]:
    names = stated.config.get("label_names") or stated.preprocessing.get("label_names") or ()
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    labels = {int(label): str(name) for label, name in pairs}
    if sorted(labels) != list(range(number)):
        return {}  # names for another head, or incomplete
    return {"id2label": labels, "label2id": {name: label for label, name in labels.items()}}


def _processor(stated: Stated, fields: dict[str, Any]) -> HFViTImageProcessorPil:
    """Return the preprocessing of `timm.data.create_transform` in evaluation."""
    size, config = fields["image_size"], stated.preprocessing
    if not config:
        if fields["use_pre_layernorm"]:
            stated.assumed.append(
                "Preprocessing of CLIP: bicubic, crop_pct 0.9, OpenAI's mean and standard deviation."
            )
            clip = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
            return HFViTImageProcessorPil.from_preset("timm", size, fields["num_channels"], **clip)
        stated.assumed.append("Preprocessing of timm's first ViTs: bicubic, crop_pct 0.9, pixels in [-1, 1].")
        return HFViTImageProcessorPil.from_preset("timm", size, fields["num_channels"])
    if stated.arguments.get("dynamic_img_size") and len(config.get("input_size", ())) == 3:
        size = (config["input_size"][1], config["input_size"][2])  # the model resamples its positions
    if size == DINOV2_SIZE:
        size = stated.facts.get("processed_size", size)
    names = {"image_mean": "mean", "image_std": "std", "crop_pct": "crop_pct"}
    arguments = {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs)}
    if interpolation := config.get("interpolation"):
        if interpolation.upper() not in Image.Resampling.__members__:
            raise ValueError(f"{stated.source.name}: interpolation={interpolation!r} is not a filter of Pillow.")
        arguments["resample"] = Image.Resampling[interpolation.upper()]
    if config.get("crop_mode") == "squash":
        share = arguments.get("crop_pct", PRESETS["center_crop"]["crop_pct"])
        arguments["crop_pct"] = None
        if share != 1:
            arguments.update(do_center_crop=True, crop_size={"height": size[0], "width": size[1]})
        size = (int(size[0] / share), int(size[1] / share))
    elif config.get("crop_mode") == "border":
        stated.assumed.append("Images are centre-cropped; timm would add borders instead (crop_mode='border').")
    # The preset has timm's defaults for missing entries (timm/data/config.py).
    return HFViTImageProcessorPil.from_preset("center_crop", size, fields["num_channels"], **arguments)


FAMILY = Family("timm", _recognises, _read, heads=("head",))
