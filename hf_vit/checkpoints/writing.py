"""Write a checkpoint under another library's names, and verify it by reading it back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import Checkpoint, Options, open_checkpoint
from .folder import checksum, write_safetensors
from .layouts import Rule

# What a plain ViT has. A layout that can say more leaves the field out.
PLAIN: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("learned",),
    "position_placement": ("input",),
    "pooling": ("cls",),
    "final_layernorm": ("tokens",),
    "use_distillation_token": (False,),
    "num_register_tokens": (0,),
    "stem_layers": (None,),
    "representation_size": (None,),
    "layer_scale_init_value": (None,),
    "use_qk_norm": (False,),
    "use_gated_mlp": (False,),
    "use_pre_layernorm": (False,),
    "use_patch_layernorm": (False,),
    "use_output_projection": (True,),
    "patch_bias": (True,),
    "qkv_bias": (True,),
    "proj_bias": (True,),
    "mlp_bias": (True,),
}


def translated(checkpoint: Checkpoint, rules: list[Rule], sums: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors by their names in the layout, as soon as all that they are made of has come.

    Notes a checksum of every tensor of ours in `sums`.
    """
    rule_of = {name: rule for rule in rules for name in rule.ours}
    waiting: dict[str, Tensor] = {}
    for name, tensor in checkpoint.weights():
        sums[name] = checksum(tensor)
        waiting[name] = tensor
        rule = rule_of[name]
        if all(part in waiting for part in rule.ours):
            parts = [waiting.pop(part) for part in rule.ours]
            yield from zip(rule.theirs, rule.layout.write(parts), strict=True)


COMPARED = (
    "hidden_act",
    "layer_norm_eps",
    "num_attention_heads",
    "num_prefix_positions",
    "use_cls_token",
    "image_shape",
    "patch_shape",
)


def verify(written: Path, options: Options, checkpoint: Checkpoint, sums: dict[str, int]) -> None:
    """Read what was written as a stranger would, and compare it with the model: bit for bit, and the architecture.

    Raises:
        AssertionError: If something differs.
    """
    again = open_checkpoint(written, options)
    assert again.architecture == checkpoint.architecture
    for name in (*PLAIN, *COMPARED):
        ours, theirs = getattr(checkpoint.config, name), getattr(again.config, name)
        assert (ours is None) == (theirs is None) if name == "layer_scale_init_value" else ours == theirs, name
    assert {name: checksum(tensor) for name, tensor in again.weights()} == sums


def _write_folder(checkpoint: Checkpoint, rules: list[Rule], folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shapes: dict[str, torch.Size] = {}
    for rule in rules:
        parts = [torch.empty(checkpoint.shapes[name], device="meta") for name in rule.ours]
        shapes.update(zip(rule.theirs, (part.shape for part in rule.layout.write(parts)), strict=True))
    sums: dict[str, int] = {}
    weights = translated(checkpoint, rules, sums)
    write_safetensors(folder / "model.safetensors", shapes, checkpoint.dtype, weights)
    verify(folder, Options(), checkpoint, sums)
