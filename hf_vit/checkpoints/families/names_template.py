"""Write a table of names for a Vision Transformer of no known library, to be filled in (`families.named`)."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ..files import Source, open_source
from ..opening import is_known
from ..wrappers import unwrapped
from .named import (
    ALL_POSITIONS,
    GATED,
    LAYER,
    OURS,
    PARTS,
    PATCH_ORDER,
    QKV,
    QKV_ORDER,
    SCALES,
    TOKENS,
    UNKNOWN,
    WITHOUT_KIND,
    collapsed,
)
from .plain import CLS_TOKEN, PROJECTION

# By kind of tensor: patterns for a name and our name for it; the first pattern that matches is used.
HINTS: dict[str, tuple[tuple[str, str], ...]] = {
    "square": (
        (r"(^|[._])(to_)?(w?q|query|q_proj|queries)$", PARTS[0]),
        (r"(^|[._])(to_)?(w?k|key|k_proj|keys)$", PARTS[1]),
        (r"(^|[._])(to_)?(w?v|value|v_proj|values)$", PARTS[2]),
        (r"(^|[._])(proj|out|o|wo|o_proj|out_proj|projection|dense|to_out(\.0)?)$", "layers.{}.attention.o_proj"),
    ),
    "norm": (
        (r"(1|before|pre_?norm|attn_?norm|attention_?norm|norm_?attn)$", "layers.{}.layernorm_before"),
        (r"(2|after|mlp_?norm|ffn?_?norm|norm_?mlp|norm_?ffn?)$", "layers.{}.layernorm_after"),
    ),
    "scale": ((r"1(\.\w+)?$", SCALES[0]), (r"2(\.\w+)?$", SCALES[1])),
    "token": ((r"(cls|class)", CLS_TOKEN), (r"dist", "embeddings.distillation_token"), (r"reg", TOKENS[2])),
    "outer norm": ((r"pre", "pre_layernorm"), (r"fc_?norm", "pooler.layernorm"), (r"", "layernorm")),
}
KIND = re.compile(r"(.*[._])(weight|bias)")


def layer_prefix(tensors: Iterable[str]) -> str:
    """Return the beginning of the names of the layers' tensors, before the number of the layer."""
    found: dict[str, set[str]] = {}
    for name in tensors:
        if match := LAYER.fullmatch(name):
            found.setdefault(match[1], set()).add(match[2] + match[3])
    return max(found, key=lambda prefix: len(found[prefix]), default="")


def names_template(source: str | Path | Source, weights: str | None = None) -> str:
    """Return a table of a file's names, with our names where shapes and names determine them, and "?" elsewhere.

    Args:
        source: A file, a folder, a name on the Hub, or an open source.
        weights: Which weights of several in the file, as in `Options`.
    """
    source = unwrapped(source if isinstance(source, Source) else open_source(source), is_known, weights)
    prefix = layer_prefix(source.tensors)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}  # by the name without weight or bias
    for name, stored in source.tensors.items():
        match = KIND.fullmatch(collapsed(name, prefix))
        stem, kind = (match[1], match[2]) if match else (collapsed(name, prefix), "")
        shapes.setdefault(stem, {})[kind] = stored.shape
    guesses = dict(_guesses(shapes))
    lines = [
        f'# Names of the tensors of {Path(source.name).name}. Replace every "?", and check the others.',
        "# Right: our name, or null for a tensor that is left out. {} is a layer's number, * is weight and bias.",
        "# Our names:",
        *(f"#   {name}" for name in OURS),
        "config:                 # fields of HFViTConfig that shapes do not determine",
        "  num_attention_heads:  # required, unless a head is 64 wide",
        "  hidden_act: gelu",
        "  layer_norm_eps: 1.0e-5",
        "  pooling:              # cls, mean, ...",
        f"qkv: {QKV_ORDER}    # rows of a fused projection; this order: all of q, then k, then v",
        f"patch: {PATCH_ORDER}  # numbers of a patch, if a matrix projects it",
        "tensors:",
    ]
    for stem, kinds in shapes.items():
        kind = "*" if len(kinds) == 2 else next(iter(kinds))
        guess = guesses.get(stem, UNKNOWN if main(kinds) else "null")  # a scalar is a counter
        ending = "" if guess in WITHOUT_KIND else f".{kind or 'weight'}"
        ours = {UNKNOWN: f'"{UNKNOWN}"', "null": "null"}.get(guess, guess + ending)
        lines.append(f'  "{stem}{kind}": {ours}  # {list(main(kinds))}')
    return "\n".join(lines) + "\n"


def main(kinds: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of the weight, or of the parameter itself if it has no weight."""
    return kinds["weight"] if "weight" in kinds else next(iter(kinds.values()))


def _guesses(shapes: dict[str, dict[str, tuple[int, ...]]]) -> Iterator[tuple[str, str]]:
    """Yield pairs of a name in the source and our name for it, where shapes and names determine ours."""
    norms = [stem for stem, kinds in shapes.items() if len(kinds) == 2 and len(kinds["weight"]) == 1]
    widths = [shapes[stem]["weight"][0] for stem in norms]
    width = max(set(widths), key=widths.count, default=0)
    by_kind: dict[str, list[str]] = {}
    for stem, kinds in shapes.items():
        shape, is_layer = main(kinds), "{}" in stem
        kind = _kind(stem, shape, width, is_layer, stem in norms)
        by_kind.setdefault(kind, []).append(stem)
    if len(by_kind.get("square", ())) > 1:  # queries, keys and values are separate
        by_kind.setdefault("up", []).extend(by_kind.pop("qkv", ()))
    alone = {
        "projection": PROJECTION,
        "qkv": QKV,
        "down": "layers.{}.mlp.fc2",
        "up": "layers.{}.mlp.fc1",
        "positions": ALL_POSITIONS,
        "head": "classifier",
    }
    if len(by_kind.get("square", ())) == 1:
        alone["square"] = "layers.{}.attention.o_proj"
    up, down = ([main(shapes[stem]) for stem in by_kind.get(kind, ())] for kind in ("up", "down"))
    if len(up) == len(down) == 1 and up[0][0] == 2 * down[0][1]:
        alone["up"] = GATED
    for kind, stems in by_kind.items():
        if kind in alone:
            if len(stems) == 1:
                yield stems[0], alone[kind]
            continue
        taken: dict[str, list[str]] = {}
        for stem in stems:
            name = stem.rstrip("._")
            if guess := next((ours for pattern, ours in HINTS.get(kind, ()) if re.search(pattern, name)), None):
                taken.setdefault(guess, []).append(stem)
        yield from ((stems[0], guess) for guess, stems in taken.items() if len(stems) == 1)


def _kind(stem: str, shape: tuple[int, ...], width: int, is_layer: bool, is_norm: bool) -> str:
    """Return the likely kind of a tensor, judging by its shape."""
    if is_layer and len(shape) == 2:
        rows, columns = shape
        if rows == columns == width:
            return "square"
        if columns == width and rows == 3 * width:
            return "qkv"
        return "up" if columns == width else "down" if rows == width else ""
    if is_layer:
        return "norm" if is_norm else "scale" if shape == (width,) else ""
    if len(shape) == 4:
        return "projection"
    if is_norm:
        return "outer norm" if shape == (width,) else ""
    if "pos" in stem.lower() and shape[-1:] == (width,):
        return "positions"
    if torch.Size(shape).numel() == width or (len(shape) == 3 and shape[-1] == width):
        return "token"
    if len(shape) == 2 and width in shape:
        return "head" if shape[1] == width else "projection"
    return ""
