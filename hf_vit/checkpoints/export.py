"""Write a model in the layout of another library: stock transformers, timm, or the npz of the paper's code.

What runs without any library's code, ONNX and torch.export, is in `graphs`.

A target is a table: what fields of the config must be where it has no word for them. Whatever does not fit is an error
that lists it, before anything is written; what a layout cannot carry beside the architecture is said.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..model.configuration_hf_vit import HFViTConfig
from . import Checkpoint, open_checkpoint
from .checkpoint import CLASSIFIER, ENCODER, MASKED
from .families.google_out import _npz_misfits, _npz_notes, _npz_table, _write_npz
from .families.timm_out import (
    TIMM_ACTIVATIONS,
    TIMM_EPSILONS,
    TIMM_POOLINGS,
    _timm_misfits,
    _timm_notes,
    _timm_table,
    _write_timm,
)
from .families.transformers_out import (
    STOCK_FIELDS,
    _transformers_misfits,
    _transformers_notes,
    _transformers_table,
    _write_transformers,
)
from .layouts import Row, Rule, rules_of
from .writing import PLAIN

# What matters in training, or to another class of model, alone.
BESIDE = (
    "drop_path_rate",
    "patch_dropout_prob",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "zero_init_head",
    "problem_type",
    "mim_objective",
    "out_features",
    "apply_layernorm",
    "reshape_hidden_states",
)


class Target(NamedTuple):
    """A layout to write.

    Attributes:
        architectures: Model classes that it has.
        required: What fields must be that it has no word for.
        misfits: Says what else does not fit.
        notes: Says what a user of the layout must know.
        table: The names for a checkpoint.
        write: Writes to a path, given the checkpoint and the rules of its names.
        carries: What it has a word for beside the architecture, and its own way to resample positions.
    """

    architectures: tuple[str, ...]
    required: dict[str, tuple[Any, ...]]
    misfits: Callable[[Checkpoint], list[str]]
    notes: Callable[[Checkpoint], list[str]]
    table: Callable[[Checkpoint], list[Row]]
    write: Callable[[Checkpoint, list[Rule], Path, bool], None]
    carries: tuple[str, ...]


def export(source: str | Path, out: str | Path, to: str, force: bool = False) -> list[str]:
    """Write a model, of this package or of any family that is read, in another library's layout.

    Args:
        source: A file, a folder, or a name on the Hub.
        out: The folder to write; for npz the file.
        to: A key of `TARGETS`.
        force: Replace what lies there.

    Returns:
        Sentences: what was assumed, and what the layout cannot carry beside the architecture.

    Raises:
        ValueError: If the layout has no place for a feature of the model; lists all of them.
    """
    if to not in TARGETS:
        raise ValueError(f"Unknown layout {to!r}: choose one of {', '.join(TARGETS)}.")
    checkpoint, target = open_checkpoint(source), TARGETS[to]
    if misfits := _misfits(checkpoint, target):
        raise ValueError(f"{checkpoint.source.name} does not fit into {to}: {'; '.join(misfits)}.")
    rules = rules_of(target.table(checkpoint), checkpoint.config, checkpoint.shapes)
    target.write(checkpoint, rules, Path(out), force)
    return _left_behind(checkpoint, target)


def _misfits(checkpoint: Checkpoint, target: Target) -> list[str]:
    config = checkpoint.config
    misfits = [
        f"{name}={getattr(config, name)!r} (only {' or '.join(map(repr, values))})"
        for name, values in target.required.items()
        if getattr(config, name) not in values
    ]
    if checkpoint.architecture not in target.architectures:
        misfits.insert(0, f"{checkpoint.architecture} (only {' or '.join(target.architectures)})")
    if config.head_width * config.num_attention_heads != config.hidden_size:
        misfits.append(f"head_dim={config.head_dim} (only hidden_size / num_attention_heads)")
    return misfits + target.misfits(checkpoint)


def _left_behind(checkpoint: Checkpoint, target: Target) -> list[str]:
    """Say what has no place in the layout and does not change what the model computes at its own size."""
    config = checkpoint.config
    plain = HFViTConfig(num_hidden_layers=config.num_hidden_layers)  # stages go by the depth
    said = []
    for name in BESIDE:
        if name not in target.carries and getattr(config, name) != getattr(plain, name):
            said.append(f"{name}={getattr(config, name)!r} has no place there; it does not change the trained model.")
    if config.position_embedding_type == "learned" and config.position_interpolation not in target.carries:
        said.append(f"Positions are resampled there by its own rule, not {config.position_interpolation}.")
    for name in ("labels", "processor"):
        if name not in target.carries and (name == "processor" or checkpoint.architecture == CLASSIFIER):
            said.append(f"The {name} of the model {'have' if name == 'labels' else 'has'} no place there.")
    assumed = [f"Assumed: {sentence}" for sentence in checkpoint.assumed]
    if checkpoint.left_out:
        said.append(
            f"Left out: {', '.join(map(repr, checkpoint.left_out[:3]))}{', ...' * (len(checkpoint.left_out) > 3)}"
        )
    return assumed + said + target.notes(checkpoint)


# ------------------------------------------------------------------------------------------------------ tensors


# ------------------------------------------------------------------------------------------------- transformers


# --------------------------------------------------------------------------------------------------------- timm


# ---------------------------------------------------------------------------------------------------------- npz


def _without(*names: str, **changed: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    return {**{name: values for name, values in PLAIN.items() if name not in names}, **changed}


TARGETS = {
    "transformers": Target(
        (CLASSIFIER, ENCODER, MASKED),
        _without("qkv_bias", "representation_size"),
        _transformers_misfits,
        _transformers_notes,
        _transformers_table,
        _write_transformers,
        (*STOCK_FIELDS, "labels", "processor", "bicubic"),
    ),
    "timm": Target(
        (CLASSIFIER, ENCODER),
        {
            "position_embedding_type": ("learned", "relative", "none"),
            "pooling": tuple(TIMM_POOLINGS),
            "hidden_act": tuple(TIMM_ACTIVATIONS),
            "layer_norm_eps": tuple(TIMM_EPSILONS),
            "stem_layers": (None,),
            "representation_size": (None,),
            "use_patch_layernorm": (False,),
            "use_output_projection": (True,),
        },
        _timm_misfits,
        _timm_notes,
        _timm_table,
        _write_timm,
        ("labels", "processor", "bicubic_antialias"),
    ),
    "npz": Target(
        (CLASSIFIER, ENCODER),
        _without(
            "stem_layers",
            "representation_size",
            position_embedding_type=("learned", "sincos_2d"),
            pooling=("cls", "mean", "attention"),
            hidden_act=("gelu_pytorch_tanh",),
            layer_norm_eps=(1e-6,),
        ),
        _npz_misfits,
        _npz_notes,
        _npz_table,
        _write_npz,
        ("bilinear_corners",),
    ),
}
