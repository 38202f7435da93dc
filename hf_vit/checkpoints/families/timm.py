"""timm's plain Vision Transformers: VisionTransformer, VisionTransformerDistilled (DeiT) and VisionTransformerRelPos.

Names and forwards are those of timm 1.0.31, models/vision_transformer.py, deit.py and vision_transformer_relpos.py.
The authors of DeiT III, MAE and DINOv2 have the same names but for a few, which the table has too.

A file of tensors says most of an architecture. What it cannot say is in the code that timm keeps under the name of an
architecture, which `config.json` has: `FACTS` below, which a test compares with timm. Other forwards of the same
tensors are refused by that name (`OTHERS`).
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from math import log
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...model.configuration_hf_vit import HFViTConfig
from ...model.image_processing_pil_hf_vit import PRESETS, HFViTImageProcessorPil
from ..checkpoint import CLASSIFIER, ENCODER, Family, Options, Reading
from ..files import Source
from ..layouts import Layout, Row, convolution, count, halves, heads_first, is_square, packed, positions

# ----------------------------------------------------------------------------------------------------- the names

POSITIONS = ("embeddings.position_embeddings.prefix", "embeddings.position_embeddings.table.weight")
RELATIVE = ("embeddings.position_embeddings.prefix", "embeddings.position_embeddings.offsets.weight")
OF_A_LAYER = {
    "layernorm_before.*": ("norm1.*",),
    "layernorm_after.*": ("norm2.*",),
    "attention.q_norm.*": ("attn.q_norm.*",),
    "attention.k_norm.*": ("attn.k_norm.*",),
    "attention.o_proj.*": ("attn.proj.*",),
    "attention_scale.weight": ("ls1.gamma", "gamma_1"),  # the second: DeiT III
    "mlp_scale.weight": ("ls2.gamma", "gamma_2"),
    "mlp.fc2.*": ("mlp.fc2.*", "mlp.w3.*"),  # the second: DINOv2
}
OF_THE_POOLING = {
    "probe": "latent",
    "query.*": "q.*",
    "o_proj.*": "proj.*",
    "layernorm.*": "norm.*",
    "mlp.fc1.*": "mlp.fc1.*",
    "mlp.fc2.*": "mlp.fc2.*",
}
# Buffers that older versions saved, and what masked pre-training leaves.
LEFT_OUT = (r".*\.relative_position_index", r".*\.rel_coords_log", r"mask_token", r"decoder_.*")


def table(config: HFViTConfig, is_gate_first: bool = True) -> list[Row]:
    """Return our names and timm's; the first of each are what timm saves today.

    Args:
        config: The architecture, of which positions and MLP have rows of their own.
        is_gate_first: Which half of a packed projection is the gate.
    """
    rows = [
        Row("embeddings.cls_token", "cls_token"),
        Row("embeddings.distillation_token", "dist_token"),
        Row("embeddings.register_tokens", "reg_token"),
        Row("embeddings.register_tokens", "register_tokens"),  # DINOv2
        Row("embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight", convolution),
        Row("embeddings.patch_embeddings.projection.bias", "patch_embed.proj.bias"),
        Row("pre_layernorm.*", "norm_pre.*"),
        Row("layernorm.*", "norm.*"),
        Row("pooler.layernorm.*", "fc_norm.*"),
        Row("classifier.*", "head.*"),
        Row("classifier.cls.*", "head.*"),
        Row("classifier.distillation.*", "head_dist.*"),
        Row("layers.{}.attention.qkv.*", "blocks.{}.attn.qkv.*", heads_first),
        Row("pooler.pooling.key_value.*", "attn_pool.kv.*", partial(heads_first, parts=2)),
    ]
    rows += [Row(f"pooler.pooling.{ours}", f"attn_pool.{theirs}") for ours, theirs in OF_THE_POOLING.items()]
    for ours, names in OF_A_LAYER.items():
        rows += [Row(f"layers.{{}}.{ours}", f"blocks.{{}}.{theirs}") for theirs in names]
    if config.use_gated_mlp:
        both = ("layers.{}.mlp.gate.*", "layers.{}.mlp.fc1.*")
        rows += [
            Row("layers.{}.mlp.gate.*", "blocks.{}.mlp.fc1_g.*"),
            Row("layers.{}.mlp.fc1.*", "blocks.{}.mlp.fc1_x.*"),
            Row(both, "blocks.{}.mlp.fc1.*", halves if is_gate_first else gate_last),
            Row(both, "blocks.{}.mlp.w12.*", halves),  # DINOv2
        ]
    else:
        rows.append(Row("layers.{}.mlp.fc1.*", "blocks.{}.mlp.fc1.*"))
    if config.position_embedding_type == "learned":
        rows.append(Row(POSITIONS, "pos_embed", positions))
    if config.position_embedding_type == "relative":
        of_layers = tuple(f"blocks.{layer}.attn.rel_pos" for layer in range(config.num_hidden_layers))
        rows += _relative_rows(of_layers, offsets) + _relative_rows(("shared_rel_pos",), shared_offsets)
    return rows


def _relative_rows(modules: tuple[str, ...], biases: Callable[[HFViTConfig], Layout]) -> list[Row]:
    """Return the rows of relative positions that lie in `modules`: a table, or one of two MLPs."""
    layouts = {
        ("relative_position_bias_table",): biases,
        ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"): continuous_offsets,
        ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight"): swin_offsets,
    }
    return [
        Row(RELATIVE, tuple(f"{module}.{kind}" for module in modules for kind in kinds), layout)
        for kinds, layout in layouts.items()
    ]


def gate_last(config: HFViTConfig) -> Layout:
    """The hidden layer and the gate of an MLP in one projection."""
    swapped = Layout(lambda theirs: theirs[::-1], lambda ours: ours[::-1])
    return packed(2).then(swapped)


def offsets(config: HFViTConfig) -> Layout:
    """Biases of offsets `[(2h-1)*(2w-1) + 3, A]`, a table a layer or one for all, to `[layers, 2h-1, 2w-1, A]`.

    The last three rows are there with a class token, and in our order: to the patches, from them, to itself.
    """
    rows, columns = config.grid_size
    layers, prefix = config.num_hidden_layers, 3 if config.num_prefix_positions else 0

    def read(theirs: list[Tensor]) -> list[Tensor]:
        tables = torch.stack(theirs).expand(layers, -1, -1)
        number = tables.shape[1] - prefix
        of_grid = tables[:, :number].unflatten(1, (2 * rows - 1, 2 * columns - 1))
        return [tables[:, number:], of_grid] if prefix else [of_grid]

    def write(ours: list[Tensor]) -> list[Tensor]:
        return list(torch.cat([ours[-1].flatten(1, 2), *ours[:-1]], dim=1).unbind(0))

    return Layout(read, write)


def shared_offsets(config: HFViTConfig) -> Layout:
    """Biases of offsets that all layers share.

    Raises:
        ValueError: When writing layers that have come to differ.
    """
    joined = offsets(config)

    def write(ours: list[Tensor]) -> list[Tensor]:
        first, *others = joined.write(ours)
        if any(not torch.equal(first, other) for other in others):
            raise ValueError("Relative positions differ by layer: they are no shared table.")
        return [first]

    return Layout(joined.read, write)


def continuous_offsets(config: HFViTConfig, is_swin: bool = False) -> Layout:
    """An MLP of logarithms of offsets (arXiv:2111.09883), a layer or one for all, evaluated on the configured grid."""
    grid = config.grid_size
    layers, parts = config.num_hidden_layers, 3 if is_swin else 4

    def read(theirs: list[Tensor]) -> list[Tensor]:
        tables = [_evaluate(theirs[start : start + parts], grid) for start in range(0, len(theirs), parts)]
        return [torch.stack(tables).expand(layers, -1, -1, -1)]

    def write(ours: list[Tensor]) -> list[Tensor]:
        raise ValueError("Relative positions are a table here, and cannot become an MLP of offsets again.")

    return Layout(read, write)


def swin_offsets(config: HFViTConfig) -> Layout:
    """The same as Swin V2 has it: offsets relative to the grid, and biases between 0 and 16."""
    return continuous_offsets(config, is_swin=True)


def _evaluate(mlp: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """Return the biases of all offsets, float32 `[2h-1, 2w-1, A]`."""
    weight, bias, out_weight, *out_bias = (tensor.float() for tensor in mlp)
    axes = [torch.arange(1 - size, size, dtype=torch.float32, device=weight.device) for size in grid]
    if not out_bias:
        axes = [8 * axis / (size - 1) for axis, size in zip(axes, grid, strict=True)]
    logarithms = [axis.sign() * (1 + axis.abs()).log() for axis in axes]
    if not out_bias:
        logarithms = [axis / log(8) for axis in logarithms]
    coordinates = torch.stack(torch.meshgrid(*logarithms, indexing="ij"), dim=-1)  # [2h-1, 2w-1, 2]
    biases = (coordinates @ weight.T + bias).relu() @ out_weight.T
    return biases + out_bias[0] if out_bias else 16 * biases.sigmoid()


# ----------------------------------------------------------------------------- what the name of an architecture says

KNOWN = r"(vit|deit3?|flexivit|eva_large|test_vit\d?)_\w+|test_vit\d?"

# Architectures that share names of tensors with the plain ones, and why they are none.
OTHERS = {
    r"_rpn_": "LayerNorm behind attention and MLP (residual post-norm)",
    r"_rope|_dinov3|_pe_|^eva02": "rotary positions of timm's Eva",
    r"^aimv2|_xp_|^test_vit4": "RMSNorm",
    r"^beit3": "LayerNorm inside of attention and MLP",
    r"^beit|^samvit": "a block of its own",
    r"_18x2_|_d?pwee_|_xp_": "attention and MLP side by side",
    r"_dwee_|_dlittle_": "differential attention",
    r"^naflex|_naflex": "NaFlex",
    r"_r\d+_|_resnet\d+|_hybrid": "a convolutional stem",
}

# Fields that the tensors do not have; later lines win. `head_dim` is 64 and the rest timm's default elsewhere.
FACTS: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"_huge_", {"head_dim": 80}),
    (r"_giant_", {"head_dim": 88}),
    (r"_giant_.*(_dinov2|_tipsv2|_radio_)", {"head_dim": 64}),
    (r"_gigantic_", {"head_dim": 104}),
    (r"_giantopt_", {"head_dim": 96}),
    (r"_so400m_", {"head_dim": 72}),
    (r"^vit_base_patch16_gap_", {"head_dim": 48}),
    (r"^test_vit", {"head_dim": 32}),
    (r"^test_vit3", {"pooling": "attention"}),  # of all tokens: its pool_include_prefix is true
    (r"_clip_", {"layer_norm_eps": 1e-5}),
    (r"_clip_quickgelu_", {"hidden_act": "quick_gelu"}),
    (
        r"_(patch32|giantopt_patch16|so400m_patch16)_siglip_|_large_patch16_siglip_(gap_)?512",
        {"hidden_act": "gelu_pytorch_tanh"},
    ),
    (r"_giant_patch14(_reg\d)?_(dinov2|tipsv2)", {"hidden_act": "silu", "mlp_gate": "first"}),
)

# What timm's names mean: an activation of transformers', the epsilon of a norm, a pooling of ours.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu6": "relu6",
    "leaky_relu": "leaky_relu",
    "mish": "mish",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}
EPSILONS = {"layernorm": 1e-6}
POOLINGS = {"token": "cls", "avg": "mean", "map": "attention"}


def _facts(architecture: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"head_dim": 64, "layer_norm_eps": 1e-6}
    for pattern, known in FACTS:
        if re.search(pattern, architecture):
            facts.update(known)
    return facts


class _Stated:
    """What is known of a checkpoint beside its tensors: options first, then `model_args`, then the architecture."""

    def __init__(self, source: Source, options: Options) -> None:
        config = source.config
        # A folder's config.json may be of something else; timm's names the architecture.
        self.config = config if "architecture" in config else {}
        self.architecture = str(self.config.get("architecture", "")).partition(".")[0]
        self.preprocessing = self.config.get("pretrained_cfg") or self.config
        self.arguments = self.config.get("model_args") or {}
        self.is_known = re.fullmatch(KNOWN, self.architecture) is not None
        self.facts = _facts(self.architecture) if self.is_known else _facts("")
        self.options = options
        self.source = source
        self.assumed: list[str] = []
        for pattern, reason in OTHERS.items():
            if re.search(pattern, self.architecture):
                raise ValueError(f"{source.name}: timm's {self.architecture!r} is no plain ViT: it has {reason}.")

    def assume(self, sentence: str) -> None:
        """Note what nothing says; the code of a known architecture does."""
        if not self.is_known:
            self.assumed.append(sentence)

    def named(self, argument: str, names: dict[str, Any], option: str) -> Any:
        """Translate an argument of timm's that is a name.

        Raises:
            ValueError: If the name is not known; `option` is the way out.
        """
        name = self.arguments.get(argument)
        if name is None:
            return None
        if name not in names:
            raise ValueError(f"{self.source.name}: {argument}={name!r} is not known here: pass {option}.")
        return names[name]

    def say_margin(self, size: tuple[int, int], grid: tuple[int, int], patch: tuple[int, int]) -> None:
        """Note that timm leaves out the last pixels of an image which the patch does not divide."""
        height, width = grid[0] * patch[0], grid[1] * patch[1]
        if size != (height, width):
            self.assumed.append(
                f"Images are resized to {height}x{width}: timm takes {size[0]}x{size[1]}, and leaves out what lies "
                "beyond the last patches."
            )

    @property
    def sizes(self) -> Iterable[tuple[int, int]]:
        """Sizes of images that are stated, the likeliest first."""
        size = self.arguments.get("img_size")
        if size is not None:
            yield (size, size) if isinstance(size, int) else (size[0], size[1])
        size = self.preprocessing.get("input_size")
        if size is not None:
            yield (size[-2], size[-1])
        if self.options.image_size is not None and self.options.patch_size is None:
            yield self.options.image_size


# ------------------------------------------------------------------------------------------------------- reading


def _recognises(source: Source) -> bool:
    if "model_type" in source.config:
        return False
    names = source.tensors
    return "architecture" in source.config or (
        "patch_embed.proj.weight" in names and any(name.startswith("blocks.0.") for name in names)
    )


def _read(source: Source, options: Options) -> Reading:
    stated = _Stated(source, options)
    names, shape = source.tensors, source.shape
    projection = shape("patch_embed.proj.weight")
    if len(projection) != 4:
        raise ValueError(f"{source.name}: 'patch_embed.proj.weight' is no convolution: {list(projection)}.")
    width, channels, *patch = projection
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": count(names, "blocks.{}."),
        "num_channels": channels,
        "patch_size": tuple(patch),
        "intermediate_size": shape(_fc2(source), 2)[1],
        "patch_bias": "norm_pre.weight" not in names,  # as timm builds it
        "qkv_bias": "blocks.0.attn.qkv.bias" in names,
        "proj_bias": "blocks.0.attn.proj.bias" in names,
        "mlp_bias": _fc2(source).replace("weight", "bias") in names,
        "use_qk_norm": "blocks.0.attn.q_norm.weight" in names,
        "use_pre_layernorm": "norm_pre.weight" in names,
        "final_layernorm": "tokens" if "norm.weight" in names else "pooled" if "fc_norm.weight" in names else "none",
        "use_cls_token": "cls_token" in names,
        "use_distillation_token": "dist_token" in names,
        "num_register_tokens": next((shape(name)[1] for name in ("reg_token", "register_tokens") if name in names), 0),
        "position_interpolation": "bicubic_antialias",
    }
    if {"blocks.0.ls1.gamma", "blocks.0.gamma_1"} & set(names):
        fields["layer_scale_init_value"] = stated.arguments.get("init_values") or 1e-5
    fields.update(_heads(source, stated))
    fields.update(_mlp(source, stated))
    fields.update(_pooling(source, stated, fields))
    fields.update(_positions(source, stated, fields))
    eps = options.layer_norm_eps
    if eps is None:
        eps = stated.named("norm_layer", EPSILONS, "--layer-norm-eps") or stated.facts["layer_norm_eps"]
        stated.assume(
            f"layer_norm_eps {eps:g}, LayerNorm before attention and MLP, and no rotary positions: the tensors would "
            "be the same (--layer-norm-eps)."
        )
    fields["layer_norm_eps"] = eps
    architecture = ENCODER
    if "head.weight" in names:
        architecture = CLASSIFIER
        fields["num_labels"] = shape("head.weight", 2)[0]
        fields.update(_labels(stated, fields["num_labels"]))
    is_gate_first = (options.mlp_gate or stated.facts.get("mlp_gate")) != "last"
    rows = table(HFViTConfig(**fields), is_gate_first)
    processor = _processor(stated, fields)
    return Reading(fields, architecture, rows, LEFT_OUT, stated.assumed, processor)


def _heads(source: Source, stated: _Stated) -> dict[str, Any]:
    """Return the number of heads, and their width if it does not follow.

    Raises:
        ValueError: If nothing says, and the convention of 64 a head does not fit.
    """
    rows, width = source.shape("blocks.0.attn.qkv.weight", 2)
    inner = rows // 3
    heads = stated.options.num_heads or stated.arguments.get("num_heads")
    if heads is None:
        heads = _heads_in_tensors(source, inner)
    if heads is None:
        head_dim = stated.facts["head_dim"]
        # A width that is not the architecture's own leaves it the number of heads, which we do not know.
        if inner % head_dim or "embed_dim" in stated.arguments:
            raise ValueError(
                f"{source.name}: nothing says how many heads a width of {inner} has, and it is not the usual "
                f"{head_dim} a head: pass --num-heads."
            )
        heads = inner // head_dim
        stated.assume(f"{heads} heads: nothing says, and 64 a head is the convention (--num-heads).")
    if inner % heads:
        raise ValueError(f"{source.name}: {heads} heads do not divide a width of {inner}: pass another --num-heads.")
    return {"num_attention_heads": heads, **({"head_dim": inner // heads} if inner != width else {})}


def _heads_in_tensors(source: Source, inner: int) -> int | None:
    if "blocks.0.attn.q_norm.weight" in source.tensors:
        return inner // source.shape("blocks.0.attn.q_norm.weight")[0]
    for module in ("blocks.0.attn.rel_pos", "shared_rel_pos"):
        for kind, axis in (("relative_position_bias_table", 1), ("mlp.fc2.weight", 0)):
            if f"{module}.{kind}" in source.tensors:
                return source.shape(f"{module}.{kind}")[axis]
    return None


def _fc2(source: Source) -> str:
    return "blocks.0.mlp.w3.weight" if "blocks.0.mlp.w12.weight" in source.tensors else "blocks.0.mlp.fc2.weight"


def _mlp(source: Source, stated: _Stated) -> dict[str, Any]:
    """Return activation and gating of the MLP.

    Raises:
        ValueError: If it is gated and nothing says by what, or by which half.
    """
    options, names = stated.options, source.tensors
    if "blocks.0.mlp.w12.weight" in names:
        return {"hidden_act": options.hidden_act or "silu", "use_gated_mlp": True}
    activation = options.hidden_act or stated.named("act_layer", ACTIVATIONS, "--hidden-act")
    activation = activation or stated.facts.get("hidden_act")
    is_split = "blocks.0.mlp.fc1_g.weight" in names
    hidden = source.shape("blocks.0.mlp.fc2.weight", 2)[1]
    is_packed = not is_split and source.shape("blocks.0.mlp.fc1.weight", 2)[0] == 2 * hidden
    if (is_split or is_packed) and activation is None:
        raise ValueError(
            f"{source.name}: the MLP is gated, and nothing says by which activation: pass --hidden-act, "
            "which is silu for SwiGLU."
        )
    if is_packed and (options.mlp_gate or stated.facts.get("mlp_gate")) is None:
        raise ValueError(
            f"{source.name}: 'blocks.0.mlp.fc1.weight' packs a gate, and nothing says which half it is: pass "
            "--mlp-gate first, as SwiGLUPacked has it, or --mlp-gate last, as GluMlp has it."
        )
    if activation is None:
        activation = "gelu"
        stated.assume("hidden_act gelu, timm's default: nothing says (--hidden-act).")
    return {"hidden_act": activation, "use_gated_mlp": is_split or is_packed}


def _pooling(source: Source, stated: _Stated, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the pooling.

    Raises:
        ValueError: If it is none of ours.
    """
    names, arguments = source.tensors, stated.arguments
    has_prefix = fields["use_cls_token"] or fields["num_register_tokens"]
    if stated.options.pooling is not None:
        return {"pooling": stated.options.pooling}
    if "dist_token" in names and ("head_dist.weight" in names or "head.weight" not in names):
        return {"pooling": "cls_and_distillation"}
    # The empty name is a model without pooling; what its tensors would serve is kept.
    name = arguments.get("global_pool") or stated.config.get("global_pool") or None
    if name is not None and name not in POOLINGS:
        raise ValueError(f"{source.name}: global_pool={name!r} is none of {', '.join(POOLINGS)}.")
    pooling = POOLINGS[name] if name else None
    if pooling is None:
        if "attn_pool.latent" in names:
            pooling = "attention"
        elif not fields["use_cls_token"]:
            pooling = "mean"
        else:
            pooling = "mean" if fields["final_layernorm"] == "pooled" else "cls"
            norm = {"tokens": "norm", "pooled": "fc_norm", "none": "no norm"}[fields["final_layernorm"]]
            stated.assume(f"pooling {pooling}, as timm has it with a class token and {norm} (--pooling).")
    includes_prefix = arguments.get("pool_include_prefix", stated.facts.get("pooling") == "attention")
    if pooling == "mean" and includes_prefix:
        pooling = "mean_all"
    if pooling == "attention" and has_prefix and not includes_prefix:
        pooling = "attention_patches"
        stated.assume("attention pooling of the patches alone, timm's default (--pooling attention: of all tokens).")
    return {"pooling": pooling}


def _positions(source: Source, stated: _Stated, fields: dict[str, Any]) -> dict[str, Any]:
    """Return kind and grid of the positions.

    Raises:
        ValueError: If several grids fit, or none.
    """
    patch, names = fields["patch_size"], source.tensors
    prefix = fields["use_cls_token"] + fields["use_distillation_token"] + fields["num_register_tokens"]
    modules = [module for module in ("blocks.0.attn.rel_pos", "shared_rel_pos") if _has(names, f"{module}.")]
    biases = f"{modules[0]}.relative_position_bias_table" if modules else ""
    if "pos_embed" in names:
        stored = source.shape("pos_embed")
        if len(stored) != 3:
            raise ValueError(f"{source.name}: 'pos_embed' has the shape {list(stored)}, expected [1, positions, D].")
        # DINOv2's registers came later: positions are of patches and class token.
        placed_prefix = 1 if "register_tokens" in names else prefix
        places = {number: stored[1] - number for number in (0, placed_prefix)}
        placed, (rows, columns) = _grid(stated, "pos_embed", places, patch)
        found: dict[str, Any] = {"num_prefix_positions": placed}
    elif biases in names:
        placed = prefix and 3
        rest = source.shape(biases)[0] - placed
        _, (rows, columns) = _grid(stated, biases, {placed: rest}, patch, is_relative=True)
        found = {"position_embedding_type": "relative", "num_prefix_positions": prefix}
    else:
        if not modules and "blocks.0.gamma_1" in names:
            raise ValueError(
                f"{source.name}: without positions, and with LayerScale under the name 'blocks.0.gamma_1', it is "
                "timm's BEiT or Eva, which have positions of another kind."
            )
        if not modules and stated.config and stated.arguments.get("pos_embed") != "none":
            raise ValueError(
                f"{source.name}: the tensor 'pos_embed' is missing, and its config.json does not say pos_embed='none'."
            )
        # Any grid will do, so that what is asked for comes first: an MLP of offsets is evaluated on it.
        asked, divisor = stated.options.image_size, stated.options.patch_size or patch
        grids = [_divide(asked, divisor)] if asked else [_divide(size, patch) for size in stated.sizes]
        if not grids:
            raise ValueError(
                f"{source.name}: there is no 'pos_embed', and neither other tensors nor a config.json say the image "
                "size: pass --image-size HxW."
            )
        rows, columns = grids[0]
        if not asked:
            stated.say_margin(next(iter(stated.sizes)), (rows, columns), patch)
        found = {"position_embedding_type": "relative" if modules else "none", "num_prefix_positions": 0}
    return {**found, "image_size": (rows * patch[0], columns * patch[1])}


def _has(names: Iterable[str], beginning: str) -> bool:
    return any(name.startswith(beginning) for name in names)


def _divide(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    return size[0] // patch[0], size[1] // patch[1]


def _grid(
    stated: _Stated, name: str, places: dict[int, int], patch: tuple[int, int], is_relative: bool = False
) -> tuple[int, tuple[int, int]]:
    """Find the grid of a table: a stated one that fits, else the square.

    Args:
        name: The table, for messages.
        places: How many places there are for the grid, by how many there may be for the tokens before it.
        is_relative: Whether a place is an offset.

    Returns:
        A key of `places`, and the grid.
    """

    def cells(rows: int, columns: int) -> int:
        return (2 * rows - 1) * (2 * columns - 1) if is_relative else rows * columns

    for size in stated.sizes:
        grid = _divide(size, patch)
        for placed, number in places.items():
            if cells(*grid) == number:
                stated.say_margin(size, grid, patch)
                return placed, grid
    squares = {placed: round(number**0.5) for placed, number in places.items() if number > 0 and is_square(number)}
    if is_relative:
        squares = {placed: (side + 1) // 2 for placed, side in squares.items() if side % 2}
    if len(squares) != 1:
        fits = " or ".join(f"{side}x{side}" for side in squares.values()) or "no square"
        number, is_headed = max(places.values()), "cls_token" in stated.source.tensors
        raise ValueError(
            f"{stated.source.name}: {name!r} has {number} places, which fit {fits}: pass --image-size HxW"
            + ("." if is_headed or not is_square(number - 1) else ", unless 'cls_token' is missing.")
        )
    ((placed, side),) = squares.items()
    stated.assumed.append(
        f"A square grid of {side}x{side} patches behind {placed} other positions: nothing says (--image-size)."
    )
    return placed, (side, side)


# --------------------------------------------------------------------------------------- labels and preprocessing


def _labels(stated: _Stated, number: int) -> dict[str, Any]:
    names = stated.config.get("label_names") or stated.preprocessing.get("label_names") or ()
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    labels = {int(label): str(name) for label, name in pairs}
    if sorted(labels) != list(range(number)):
        return {}  # for another head, or with gaps
    return {"id2label": labels, "label2id": {name: label for label, name in labels.items()}}


def _processor(stated: _Stated, fields: dict[str, Any]) -> HFViTImageProcessorPil:
    """Return what `timm.data.create_transform` does in evaluation."""
    size, config = fields["image_size"], stated.preprocessing
    if not config:
        stated.assumed.append("Preprocessing of timm's first ViTs: bicubic, 0.9 of the image, pixels in [-1, 1].")
        return HFViTImageProcessorPil.from_preset("timm", size, fields["num_channels"])
    names = {"image_mean": "mean", "image_std": "std", "crop_pct": "crop_pct"}
    arguments = {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs)}
    if interpolation := config.get("interpolation"):
        if interpolation.upper() not in Image.Resampling.__members__:
            raise ValueError(f"{stated.source.name}: interpolation={interpolation!r} is not one of Pillow's.")
        arguments["resample"] = Image.Resampling[interpolation.upper()]
    if config.get("crop_mode") == "squash":
        share = arguments.get("crop_pct", PRESETS["center_crop"]["crop_pct"])
        arguments["crop_pct"] = None
        if share != 1:
            arguments.update(do_center_crop=True, crop_size={"height": size[0], "width": size[1]})
        size = (int(size[0] / share), int(size[1] / share))
    elif config.get("crop_mode") == "border":
        stated.assumed.append("The image's centre is cut out; timm would add borders instead (crop_mode='border').")
    # The preset has timm's defaults of what its config leaves out (timm/data/config.py).
    return HFViTImageProcessorPil.from_preset("center_crop", size, fields["num_channels"], **arguments)


FAMILY = Family("timm", _recognises, _read)
