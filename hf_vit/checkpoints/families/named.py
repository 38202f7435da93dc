"""A user's own Vision Transformer, read through a table of names in a YAML file.

    config:                     # fields of HFViTConfig that shapes do not determine
      num_attention_heads: 6
      pooling: mean
    qkv: part, head, dim        # order of the rows of a fused projection of queries, keys and values
    patch: channel, row, column # order of the numbers of a patch, if a matrix projects it
    tensors:                    # theirs: ours; {} is the number of a layer, * is weight or bias, null leaves out
      blocks.{}.attn.to_qkv.*: layers.{}.attention.qkv.*
      teacher_head.weight: null

Any encoder with LayerNorm before attention and MLP can be described. Our names are those of the parameters of
`HFViTModel`; further names are attention.query, key and value for separate projections, mlp.gate_and_fc1 for both in
one tensor, and embeddings.position_embeddings for all positions in one.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ...model.configuration_hf_vit import HFViTConfig
from ..checkpoint import Family, Options, Reading, parameters_of
from ..files import Source
from ..layouts import (
    Layout,
    Row,
    channels_first,
    convolution,
    each,
    halves,
    heads_together,
    positions,
    rules_of,
    same,
)
from .plain import CLS_TOKEN, POSITIONS, PROJECTION, Library, Shapes, read
from .timm_names import gate_last
from .transformers import without_key_bias

QKV, GATED = "layers.{}.attention.qkv", "layers.{}.mlp.gate_and_fc1"
PARTS = tuple(f"layers.{{}}.attention.{part}" for part in ("query", "key", "value"))
ALL_POSITIONS = "embeddings.position_embeddings"
TOKENS = (CLS_TOKEN, "embeddings.distillation_token", "embeddings.register_tokens")
WITHOUT_KIND = (*TOKENS, ALL_POSITIONS)
SCALES = ("layers.{}.attention_scale", "layers.{}.mlp_scale")
OURS = (
    *TOKENS,
    ALL_POSITIONS,
    *(f"embeddings.patch_embeddings.{name}" for name in ("projection", "layernorm_before", "layernorm_after")),
    "pre_layernorm",
    "layers.{}.layernorm_before",
    QKV,
    *PARTS,
    *(f"layers.{{}}.attention.{name}" for name in ("q_norm", "k_norm", "layernorm", "o_proj")),
    SCALES[0],
    "layers.{}.layernorm_after",
    *(f"layers.{{}}.mlp.{name}" for name in ("fc1", "gate", "gate_and_fc1", "layernorm", "fc2")),
    SCALES[1],
    "layernorm",
    "pooler.layernorm",
    "pooler.pre_logits",
    "classifier",
)
UNKNOWN = "?"  # in a template: not filled in yet
KEYS = {"config": dict, "qkv": str, "patch": str, "tensors": dict}
QKV_ORDER, PATCH_ORDER = "part, head, dim", "channel, row, column"
PATCH_LAYOUTS: dict[str, Callable[[HFViTConfig], Layout]] = {PATCH_ORDER: same, "row, column, channel": channels_first}
LAYER = re.compile(r"(.*?[._]|)(\d+)(\..+)")  # of a tensor of a layer: prefix, number, rest


def collapsed(name: str, prefix: str | None = None) -> str:
    """Return a name with `{}` for its first number, if that follows `prefix`."""
    match = LAYER.fullmatch(name)
    return f"{match[1]}{{}}{match[3]}" if match and prefix in (None, match[1]) else name


def _number(value: Any) -> Any:
    """Return a value of a YAML file as a number. YAML reads 1e-6, without a point, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


class Names:
    """The content of a file of names, checked against the tensors of a source.

    Attributes:
        path: The file, for errors.
        config: Fields of `HFViTConfig`.
        table: Pairs of a tensor's name, with `{}` for the layer, and our name.
        left_out: Regular expressions of the names that are left out.

    Raises:
        ValueError: If the file is not such a table, or does not match the tensors; the message names the entry.
    """

    def __init__(self, path: str | Path, source: Source) -> None:
        self.path, self.source = Path(path), source
        try:
            content = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())}).") from error
        if not isinstance(content, dict) or not isinstance(content.get("tensors"), dict):
            raise ValueError(f"{path}: expected 'tensors:' with pairs of names, theirs: ours. {self._advice}")
        for key, value in content.items():
            if key not in KEYS or not isinstance(value, KEYS[key] | None):
                raise ValueError(f"{path}: {key!r} is not one of {', '.join(KEYS)}, or has the wrong type.")
        stated = content.get("config") or {}
        self.config = {name: _number(value) for name, value in stated.items() if value is not None}
        if unknown := [name for name in self.config if name not in HFViTConfig.__annotations__]:
            near = difflib.get_close_matches(unknown[0], HFViTConfig.__annotations__, 1, 0)
            raise ValueError(f"{path}: {unknown[0]!r} is not a field of HFViTConfig; the nearest is {near[0]!r}.")
        self.qkv = self._order("qkv", content.get("qkv") or QKV_ORDER, QKV_ORDER)
        self.patch = ", ".join(self._order("patch", content.get("patch") or PATCH_ORDER, PATCH_ORDER))
        if self.patch not in PATCH_LAYOUTS:
            raise ValueError(f"{path}: patch must be one of {' or '.join(map(repr, PATCH_LAYOUTS))}.")
        self.table: list[tuple[str, str]] = []
        self.left_out: list[str] = []
        for theirs, ours in content["tensors"].items():
            self._add(str(theirs), ours)

    @property
    def _advice(self) -> str:
        return f"hf-vit inspect {self.source.name} --names-template NEW_FILE writes one to fill in."

    def _order(self, key: str, given: str, default: str) -> list[str]:
        words = re.findall(r"\w+", given)
        if sorted(words) != sorted(default.split(", ")):
            raise ValueError(f"{self.path}: {key} must be the words {default} in some order, got {given!r}.")
        return words

    def _add(self, theirs: str, ours: Any) -> None:
        if ours == UNKNOWN:
            raise ValueError(f"{self.path}: {theirs!r} has no name yet: replace '?' by one of ours, or by null.")
        kinds = ("weight", "bias") if "*" in theirs else ("bias" if theirs.endswith("bias") else "weight",)
        stored = {kind: theirs.replace("*", kind) for kind in kinds}
        present = {kind: name for kind, name in stored.items() if name.replace("{}", "0") in self.source.tensors}
        if not present:
            names = list(dict.fromkeys(collapsed(name) for name in self.source.tensors))
            near = difflib.get_close_matches(theirs, names, 1, 0)
            raise ValueError(f"{self.path}: {self.source.name} has no tensor {theirs!r}; the nearest is {near[0]!r}.")
        if ours is None:
            self.left_out.append(re.escape(theirs).replace(r"\{\}", r"\d+").replace(r"\*", "(weight|bias)"))
            return
        stem = re.sub(r"\.(weight|bias|\*)$", "", str(ours))
        if stem not in OURS:
            near = difflib.get_close_matches(stem, OURS, 1, 0)
            raise ValueError(
                f"{self.path}: {ours!r} for {theirs!r} is not one of our names; the nearest is {near[0]!r}. They are: "
                f"{', '.join(OURS)}."
            )
        for kind, name in present.items():
            exact = str(ours) if str(ours).endswith((".weight", ".bias")) else f"{stem}.{kind}"
            self.table.append((name, stem if stem in WITHOUT_KIND else exact))

    def rows(self, options: Options) -> list[Row]:
        """Return the table of the family."""
        theirs = {ours: name for name, ours in self.table}
        if len(theirs) != len(self.table):
            twice = next(ours for _, ours in self.table if [name for _, name in self.table].count(ours) > 1)
            raise ValueError(f"{self.path}: two tensors have the name {twice!r}.")
        rows = []
        for kind in ("weight", "bias"):
            parts = [theirs.pop(f"{part}.{kind}", None) for part in PARTS]
            given = tuple(part for part in parts if part is not None)
            if given and (len(given) == 3 or (kind == "bias" and parts[1] is None and len(given) == 2)):
                rows.append(Row(f"{QKV}.{kind}", given, heads_together if len(given) == 3 else without_key_bias))
            elif given:
                raise ValueError(f"{self.path}: of query, key and value, only {', '.join(given)} have a {kind}.")
        for ours, name in theirs.items():
            rows.append(self._row(ours, name, options))
        return rows

    def _row(self, ours: str, name: str, options: Options) -> Row:
        stem = ours.rpartition(".")[0]
        if stem == QKV:
            return Row(ours, name, partial(fused, order=self.qkv))
        if stem == GATED:
            both = tuple(ours.replace(".gate_and_fc1.", f".{part}.") for part in ("gate", "fc1"))
            return Row(both, name, gate_last if options.mlp_gate == "last" else halves)
        if ours == ALL_POSITIONS:
            return Row(POSITIONS, name, partial(reshaped_positions, shape=self.source.shape(name)))
        if ours in TOKENS:
            return Row(ours, name, partial(reshaped_token, shape=self.source.shape(name)))
        if ours == f"{PROJECTION}.weight":
            is_matrix = len(self.source.shape(name)) == 2
            return Row(ours, name, PATCH_LAYOUTS[self.patch] if is_matrix else convolution)
        if ours.startswith("embeddings.patch_embeddings.layernorm_before"):
            return Row(ours, name, PATCH_LAYOUTS[self.patch])
        return Row(ours, name)


# ------------------------------------------------------------------------------------------------------- layouts


def fused(config: HFViTConfig, order: list[str]) -> Layout:
    """Convert queries, keys and values in one tensor `[3*A*d, ...]`, with rows in any order, to (head, part, d)."""
    sizes = {"part": 3, "head": config.num_attention_heads, "dim": config.head_width}
    ours = ["head", "part", "dim"]
    to_ours, to_theirs = [order.index(word) for word in ours], [ours.index(word) for word in order]

    def permuted(tensor: Tensor, names: list[str], axes: list[int]) -> Tensor:
        split = tensor.unflatten(0, [sizes[word] for word in names])
        return split.permute(*axes, *range(3, split.ndim)).flatten(0, 2)

    return each(lambda theirs: permuted(theirs, order, to_ours), lambda mine: permuted(mine, ours, to_theirs))


def reshaped_token(config: HFViTConfig, shape: tuple[int, ...]) -> Layout:
    """Convert one or several tokens that are stored in any shape."""
    return each(lambda theirs: theirs.reshape(1, -1, config.hidden_size), lambda ours: ours.reshape(shape))


def reshaped_positions(config: HFViTConfig, shape: tuple[int, ...]) -> Layout:
    """Convert a table of all positions that is stored in any shape."""
    return reshaped_token(config, shape).then(positions(config))


# ------------------------------------------------------------------------------------------------------ the config


def _read(source: Source, options: Options) -> Reading:
    assert options.names is not None
    names = Names(options.names, source)
    rows = names.rows(options)
    shapes = Shapes(source, rows)
    required = (f"{PROJECTION}.weight", f"{QKV}.weight", "layers.{}.mlp.fc1.weight", "layers.{}.mlp.fc2.weight")
    if absent := [name for name in required if name not in shapes]:
        raise ValueError(f"{names.path}: no tensor is named {', '.join(map(repr, absent))}.")
    pooling = "cls" if CLS_TOKEN in shapes else "mean"
    usual: dict[str, Any] = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "pooling": pooling}
    assumed = [
        f"{name} {value}: neither {names.path.name} nor an option states it (--{name.replace('_', '-')})."
        for name, value in usual.items()
        if name not in names.config and getattr(options, name) is None
    ]
    assumed.append("Preprocessing: bicubic, crop_pct 0.875, ImageNet mean and std.")
    library = Library(
        name=str(names.path),
        marks=(),
        table=rows,
        layer_norm_eps=usual["layer_norm_eps"],
        preprocessing=lambda fields: ({}, ""),
        left_out=names.left_out,
    )
    stated = {**usual, **_features(source, shapes), **names.config}
    options = replace(options, patch_size=options.patch_size or names.config.get("patch_size"))
    reading = read(source, options, library, stated, {"name": "center_crop"}, assumed)
    _check_complete(names, reading)
    return reading


def _features(source: Source, shapes: Shapes) -> dict[str, Any]:
    """Return the config fields for the optional tensors of a table."""
    fields: dict[str, Any] = {
        "use_qk_norm": "layers.{}.attention.q_norm.weight" in shapes,
        "use_attention_layernorm": "layers.{}.attention.layernorm.weight" in shapes,
        "use_mlp_layernorm": "layers.{}.mlp.layernorm.weight" in shapes,
        "use_gated_mlp": "layers.{}.mlp.gate.weight" in shapes,
        "use_output_projection": "layers.{}.attention.o_proj.weight" in shapes,
        "use_patch_layernorm": "embeddings.patch_embeddings.layernorm_before.weight" in shapes,
    }
    if "embeddings.register_tokens" in shapes:
        width = shapes("layers.{}.mlp.fc2.weight", 2)[0]
        fields["num_register_tokens"] = torch.Size(shapes("embeddings.register_tokens")).numel() // width
    if fields["use_qk_norm"]:
        inner = shapes("layers.{}.attention.o_proj.weight", 2)[1]
        fields["num_attention_heads"] = inner // shapes("layers.{}.attention.q_norm.weight", 1)[0]
    if f"{SCALES[0]}.weight" in shapes:
        fields["layer_scale_init_value"] = 1e-5
    return fields


def _check_complete(names: Names, reading: Reading) -> None:
    """Raise `ValueError` if a parameter of the model has no tensor."""
    config = HFViTConfig.from_dict(dict(reading.fields))
    parameters = parameters_of(reading.architecture, config)
    try:
        rules_of(reading.table, config, parameters, names.source.tensors)
    except AssertionError as error:
        raise ValueError(
            f"{names.path}: {error} Add it under 'tensors:', or set the field of 'config:' that removes it."
        ) from None


FAMILY = Family("names", lambda source: False, _read)
