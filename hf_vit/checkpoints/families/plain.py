"""Plain ViTs with LayerNorm before attention and MLP, whose files differ in names only: a table for each library.

`read` derives the config from the shapes of the tensors that a table names. If the tensors do not determine a field,
the library's default is used, and `assumed` names it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt, prod
from typing import Any

from ...system.texts import counted
from ..checkpoint import CLASSIFIER, ENCODER, Family, Options, Reading
from ..files import Source
from ..layouts import Row, count, grid_of_table, heads_first, is_square

CLS_TOKEN = "embeddings.cls_token"
PROJECTION = "embeddings.patch_embeddings.projection"
TABLE = "embeddings.position_embeddings.table.weight"
POSITIONS = ("embeddings.position_embeddings.prefix", TABLE)

# Width of a head in the published models in which it is not 64, by the width of the model: H, g, So400m, G and e.
HEAD_DIMS = {1280: 80, 1408: 88, 1152: 72, 1664: 104, 1792: 112}

POOLINGS = ("cls", "mean", "mean_all", "cls_and_mean")  # those without weights

# Arguments of an image processor, and the same in words.
Preprocessing = tuple[dict[str, Any], str]


def multihead_attention(theirs: str) -> list[Row]:
    """Return the rows of a layer's `torch.nn.MultiheadAttention`."""
    return [
        Row("layers.{}.attention.qkv.*", f"{theirs}.in_proj_*", heads_first),
        Row("layers.{}.attention.o_proj.*", f"{theirs}.out_proj.*"),
    ]


@dataclass(frozen=True)
class Library:
    """Facts about the files of a library.

    Attributes:
        name: Name of the family.
        marks: Names of tensors that a file of the library has.
        table: Our names and theirs. Of several rows for the same names, those of the file are used.
        layer_norm_eps: Epsilon of its LayerNorms.
        preprocessing: The preprocessing of its models, from the fields of the config.
        heads: Module names of its classifiers, as in `Family`.
        left_out: Regular expressions that match the names of tensors outside of the model.
        refused: Features of files that cannot be read, by regular expressions that match the name of one of the
            tensors.
        remarks: What a user must know about a file, by expressions as for `refused`.
        head_dim: Width of a head if `HEAD_DIMS` does not have the model's width.
        num_heads: Number of heads of published models for which this width is wrong, by (width, layers).
        pooling: Pooling of its models with a class token whose final LayerNorm follows the pooling.
        fields: Fields of the config that its models share.
    """

    name: str
    marks: Sequence[str]
    table: Sequence[Row]
    layer_norm_eps: float
    preprocessing: Callable[[Mapping[str, Any]], Preprocessing]
    heads: tuple[str, ...] = ()
    left_out: Sequence[str] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)
    head_dim: int = 64
    num_heads: Mapping[tuple[int, int], int] = field(default_factory=dict)
    pooling: str = "cls"
    fields: Mapping[str, Any] = field(default_factory=dict)

    def recognises(self, source: Source) -> bool:
        """Return whether a file has the library's names."""
        return all(mark in source.tensors for mark in self.marks)

    @property
    def family(self) -> Family:
        """The family of files that only the tensors describe."""
        return Family(self.name, self.recognises, lambda source, options: read(source, options, self), self.heads)


def read(
    source: Source,
    options: Options,
    library: Library,
    stated: Mapping[str, Any] | None = None,
    processor: dict[str, Any] | None = None,
    assumed: Sequence[str] = (),
) -> Reading:
    """Read a file with the names of a library.

    Args:
        stated: Fields of the config that are known from elsewhere, such as a config beside the file.
        processor: Arguments of the image processor that are known from elsewhere.
        assumed: Sentences about further assumptions.

    Raises:
        ValueError: If the file has another architecture, or needs an option that is not given.
    """
    for reason in _matching(source, library.refused):
        raise ValueError(f"{source.name}: {library.name} with {reason}, which is not supported.")
    shapes, sentences = Shapes(source, library.table), [*assumed, *_matching(source, library.remarks)]
    fields = {
        "layer_norm_eps": library.layer_norm_eps,
        **_architecture(shapes, library),
        **library.fields,
        **(stated or {}),
    }
    fields.update(_patches(shapes, options, sentences))
    fields.update(_heads(shapes, library, options, fields, sentences))
    check_pooling(source, options)
    for name in ("hidden_act", "layer_norm_eps", "pooling"):
        if getattr(options, name) is not None:
            fields[name] = getattr(options, name)
    if "hidden_act" not in fields:
        fields["hidden_act"] = "gelu"
        sentences.append(f"hidden_act gelu, that of {library.name}: the file does not store it (--hidden-act).")
    fields.update(_positions(shapes, options, fields))
    if processor is None:
        processor, words = library.preprocessing(fields)
        sentences.append(f"Preprocessing of {library.name} ({words}): the file does not store it.")
    head = next((name for name in ("classifier.weight", "classifier.cls.weight") if name in shapes), None)
    if head is not None:
        fields["num_labels"] = shapes(head, 2)[0]
    architecture = ENCODER if head is None else CLASSIFIER
    return Reading(fields, architecture, library.table, library.left_out, sentences, processor)


def _matching(source: Source, sentences: Mapping[str, str]) -> list[str]:
    """Return the sentences whose pattern matches the name of a tensor."""
    return [
        sentence
        for pattern, sentence in sentences.items()
        if any(re.fullmatch(pattern, name) for name in source.tensors)
    ]


class Shapes:
    """The shapes of a file's tensors by our names, those of the first layer with `{}` for its number."""

    def __init__(self, source: Source, table: Sequence[Row]) -> None:
        self.source = source
        self.theirs: dict[str, str] = {}  # the first tensor that a tensor of ours is made of
        for row in table:
            ours, theirs = ((names,) if isinstance(names, str) else names for names in (row.ours, row.theirs))
            for kind in ("weight", "bias"):
                stored = [name.replace("*", kind) for name in theirs]
                if all(name.replace("{}", "0") in source.tensors for name in stored):
                    for name in ours:
                        self.theirs.setdefault(name.replace("*", kind), stored[0])

    def __contains__(self, ours: str) -> bool:
        return ours in self.theirs

    def __call__(self, ours: str, dimensions: int | None = None) -> tuple[int, ...]:
        """Return the shape of the tensor in the file.

        Raises:
            ValueError: If it is missing, or does not have `dimensions`.
        """
        if ours not in self.theirs:
            raise ValueError(f"{self.source.name}: there is no tensor for {ours.replace('{}', '0')!r}.")
        return self.source.shape(self.theirs[ours].replace("{}", "0"), dimensions)


def _architecture(shapes: Shapes, library: Library) -> dict[str, Any]:
    """Return the fields that the tensors determine, apart from sizes and heads."""
    width, intermediate = shapes("layers.{}.mlp.fc2.weight", 2)
    layer = shapes.theirs["layers.{}.mlp.fc2.weight"].partition("{}")[0]
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": count(shapes.source.tensors, layer + "{}."),
        "intermediate_size": intermediate,
        "patch_bias": f"{PROJECTION}.bias" in shapes,
        "qkv_bias": "layers.{}.attention.qkv.bias" in shapes,
        "proj_bias": "layers.{}.attention.o_proj.bias" in shapes,
        "mlp_bias": "layers.{}.mlp.fc2.bias" in shapes,
        "use_pre_layernorm": "pre_layernorm.weight" in shapes,
        "use_cls_token": CLS_TOKEN in shapes,
        "use_distillation_token": "embeddings.distillation_token" in shapes,
        "final_layernorm": "none",
        "pooling": "cls" if CLS_TOKEN in shapes else "mean",
    }
    if "layernorm.weight" in shapes:
        fields["final_layernorm"] = "tokens"
    elif "pooler.layernorm.weight" in shapes:
        fields["final_layernorm"] = "pooled"
        fields["pooling"] = library.pooling if CLS_TOKEN in shapes else "mean"
    if "classifier.distillation.weight" in shapes:
        fields["pooling"] = "cls_and_distillation"
    if "layers.{}.attention_scale.weight" in shapes:
        fields["layer_scale_init_value"] = 1e-5
    if "pooler.pre_logits.weight" in shapes:
        fields["representation_size"] = shapes("pooler.pre_logits.weight", 2)[0]
    return fields


def _patches(shapes: Shapes, options: Options, assumed: list[str]) -> dict[str, Any]:
    """Return size and channels of a patch, whose projection is a convolution or a matrix."""
    shape = shapes(f"{PROJECTION}.weight")
    if len(shape) == 4:
        return {"num_channels": shape[1], "patch_size": shape[2:]}
    if len(shape) != 2:
        raise ValueError(
            f"{shapes.source.name}: the patch projection has the shape {list(shape)}: expected a matrix, or a "
            "convolution over images of two dimensions."
        )
    patch_size, channels = patch_of(shapes.source, shape[1], options, assumed)
    return {"num_channels": channels, "patch_size": patch_size}


def patch_of(source: Source, pixels: int, options: Options, assumed: list[str]) -> tuple[tuple[int, int], int]:
    """Return the size and the number of channels of a patch; a weight matrix states only their product.

    Raises:
        ValueError: If the patch is no square with 3 channels or one, and no option states its size.
    """
    stated, side = options.patch_size, isqrt(pixels // 3)
    if stated is not None and 3 * prod(stated) == pixels:
        return stated, 3
    if 3 * side * side == pixels:
        return (side, side), 3
    if stated is not None and pixels % prod(stated) == 0:
        return stated, pixels // prod(stated)
    for channels in (options.num_channels or 1, 1):
        side = isqrt(pixels // channels)
        if channels * side * side == pixels:
            if channels != options.num_channels:
                assumed.append(
                    f"Patches of {side}x{side} pixels with {counted(channels, 'channel')}: the file only stores their "
                    f"{pixels} values (--patch-size)."
                )
            return (side, side), channels
    raise ValueError(
        f"{source.name}: a patch of {pixels} values is not a square with 1 or 3 channels: pass --patch-size HxW."
    )


def check_pooling(source: Source, options: Options) -> None:
    """Raise `ValueError` for a pooling with weights, which the files of these libraries do not have."""
    if options.pooling not in (None, *POOLINGS):
        raise ValueError(
            f"{source.name}: pooling {options.pooling!r} needs weights that the file does not have: choose one of "
            f"{', '.join(POOLINGS)} for --pooling."
        )


def _heads(
    shapes: Shapes, library: Library, options: Options, fields: Mapping[str, Any], assumed: list[str]
) -> dict[str, Any]:
    """Return the number of heads, and their width if it is not the model's width divided by it."""
    width, o_proj = fields["hidden_size"], "layers.{}.attention.o_proj.weight"
    inner = shapes(o_proj, 2)[1] if o_proj in shapes else width
    heads = options.num_heads or fields.get("num_attention_heads")
    if heads is None:
        known = library.num_heads.get((width, fields["num_hidden_layers"]))
        head_dim = inner // known if known else HEAD_DIMS.get(width, library.head_dim)
        if inner % head_dim:
            raise ValueError(
                f"{shapes.source.name}: the file does not store the number of heads, and {head_dim}, the usual width "
                f"of a head, does not divide the attention's width of {inner}: pass --num-heads."
            )
        heads = inner // head_dim
        assumed.append(
            f"{counted(heads, 'head')}: the file does not store the number, and {head_dim} dimensions per head are "
            "usual (--num-heads)."
        )
    if inner % heads:
        raise ValueError(
            f"{shapes.source.name}: {counted(heads, 'head')} cannot divide the attention's width of {inner}: pass "
            "another --num-heads."
        )
    return {"num_attention_heads": heads, "head_dim": None if inner == width else inner // heads}


def _positions(shapes: Shapes, options: Options, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the grid of a table, `[1, P+N, D]` or `[P+N, D]`, and how many tokens before the patches it has."""
    patch = fields["patch_size"]
    asked = options.image_size if options.patch_size in (None, patch) else None
    size = asked or fields.get("image_size")
    if not fields.get("position_embedding_type", "learned").startswith("learned"):
        if size is None:
            raise ValueError(f"{shapes.source.name}: no tensor states the image size: pass --image-size HxW.")
        return {"image_size": size}
    number = shapes(TABLE)[-2]
    tokens = fields["use_cls_token"] + fields["use_distillation_token"]
    cells = size and (size[0] // patch[0]) * (size[1] // patch[1])
    fits = [number - placed == cells or is_square(number - placed) for placed in (tokens, 0)]
    placed = tokens if fits != [False, True] else 0  # in some models only the patches have positions
    grid = grid_of_table(number - placed, patch, size, f"{shapes.source.name}: the table of positions")
    return {"num_prefix_positions": placed, "image_size": (grid[0] * patch[0], grid[1] * patch[1])}
