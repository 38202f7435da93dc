"""Write a checkpoint tensor by tensor, under our names or another library's, and verify it by reading it back."""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint import Checkpoint, Options
from .formats import SAFETENSORS_DTYPES
from .layouts import Row, Rule
from .opening import open_checkpoint

WEIGHTS = "model.safetensors"

# Values of a plain ViT. A layout that has an equivalent for a field leaves it out of its requirements.
PLAIN: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("learned",),
    "position_placement": ("input",),
    "pooling": ("cls",),
    "final_layernorm": ("tokens",),
    "num_register_tokens": (0,),
    **dict.fromkeys(("stem_layers", "representation_size", "layer_scale_init_value", "num_pooling_heads"), (None,)),
    **dict.fromkeys(("use_distillation_token", "use_qk_norm", "use_gated_mlp"), (False,)),
    **dict.fromkeys(("use_pre_layernorm", "use_patch_layernorm"), (False,)),
    **dict.fromkeys(("use_attention_layernorm", "use_mlp_layernorm"), (False,)),
    **dict.fromkeys(("use_output_projection", "patch_bias", "qkv_bias", "proj_bias", "mlp_bias"), (True,)),
}
# Further fields that must be the same when a written checkpoint is read back.
COMPARED = (
    *("hidden_act", "layer_norm_eps", "num_attention_heads", "num_prefix_positions", "use_cls_token"),
    *("image_shape", "patch_shape"),
)


class Target(NamedTuple):
    """A layout of another library to write.

    Attributes:
        architectures: Model classes that the library has.
        required: Values of the config fields for which the library has no equivalent.
        unsupported: Returns the other features of a checkpoint that the library does not have.
        notes: Returns sentences that a user of the written model must know.
        table: Returns the names of a checkpoint's tensors in the layout.
        write: Writes a checkpoint to a path, given the rules of its names and whether to replace existing files.
        carries: Config fields outside of the architecture that the library stores, "labels" and "processor" if it
            stores these, and the name of its rule for resampling positions.
    """

    architectures: tuple[str, ...]
    required: dict[str, tuple[Any, ...]]
    unsupported: Callable[[Checkpoint], list[str]]
    notes: Callable[[Checkpoint], list[str]]
    table: Callable[[Checkpoint], list[Row]]
    write: Callable[[Checkpoint, list[Rule], Path, bool], None]
    carries: tuple[str, ...]


def plain_except(*names: str, **changed: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """Return `PLAIN` without some fields and with other values for `changed`."""
    return {**{name: values for name, values in PLAIN.items() if name not in names}, **changed}


def differing(config: Any, required: Mapping[str, tuple[Any, ...]], where: str = "") -> list[str]:
    """Describe each config field whose value is not one of those required."""
    return [
        f"{name}={getattr(config, name)!r}{where} (only {' or '.join(map(repr, values))})"
        for name, values in required.items()
        if getattr(config, name) not in values
    ]


def write_layout(checkpoint: Checkpoint, rules: list[Rule], folder: Path, config: dict[str, Any]) -> None:
    """Write `config.json` and `model.safetensors` in another library's layout, and verify them."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shapes: dict[str, torch.Size] = {}
    for rule in rules:
        parts = [torch.empty(checkpoint.shapes[name], device="meta") for name in rule.ours]
        shapes.update(zip(rule.theirs, (part.shape for part in rule.layout.write(parts)), strict=True))
    sums: dict[str, int] = {}
    write_safetensors(folder / WEIGHTS, shapes, checkpoint.dtype, translated(checkpoint, rules, sums))
    verify(folder, Options(), checkpoint, sums)


def translated(checkpoint: Checkpoint, rules: list[Rule], sums: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors by their names in the layout, each as soon as all tensors that it is made of are read.

    Stores the checksum of every tensor of ours in `sums`.
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


def write_safetensors(
    path: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, weights: Iterable[tuple[str, Tensor]]
) -> dict[str, int]:
    """Write tensors to a file as they come, in any order, and return a checksum of each.

    The writer of safetensors needs all tensors at once. The format is the length of the header in eight bytes, the
    header as JSON, and the tensors' bytes (https://huggingface.co/docs/safetensors).
    """
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name], end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    sums = {}
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in weights:
            file.seek(8 + len(encoded) + starts[name])
            file.write(_bytes(tensor))
            sums[name] = checksum(tensor)
    assert sums.keys() == shapes.keys(), sorted(shapes.keys() ^ sums.keys())
    return sums


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    return zlib.crc32(_bytes(tensor))


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def verify(written: Path, options: Options, checkpoint: Checkpoint, sums: Mapping[str, int]) -> None:
    """Read a written checkpoint back and compare its architecture, and its tensors bit for bit.

    Raises:
        AssertionError: If something differs.
    """
    again = open_checkpoint(written, options)
    assert again.architecture == checkpoint.architecture
    for name in (*PLAIN, *COMPARED):
        ours, theirs = getattr(checkpoint.config, name), getattr(again.config, name)
        assert (ours is None) == (theirs is None) if name == "layer_scale_init_value" else ours == theirs, name
    assert {name: checksum(tensor) for name, tensor in again.weights()} == sums
