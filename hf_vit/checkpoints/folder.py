"""Write a checkpoint that was understood as a folder of this package, one tensor in memory at a time."""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.configuration_hf_vit import HFViTConfig
from ..model.image_processing_pil_hf_vit import HFViTImageProcessorPil
from ..model.repository_hf_vit import complete_repository
from ..system.disk import new_folder
from .checkpoint import ENCODER, Checkpoint, parameters_of
from .files import SAFETENSORS_DTYPES, read_safetensor

WEIGHTS = "model.safetensors"


def write_checkpoint(checkpoint: Checkpoint, folder: str | Path, force: bool = False) -> None:
    """Write weights, config, processor, code and card, and read all of it again before the folder gets its name.

    Args:
        checkpoint: What to write.
        folder: Where to; nothing is left there if anything fails.
        force: Replace a model that lies there.

    Raises:
        ValueError: If something lies there already, or a tensor contradicts the others.
    """
    with new_folder(folder, force) as unfinished:
        sums = write_safetensors(unfinished / WEIGHTS, checkpoint.shapes, checkpoint.dtype, checkpoint.weights())
        checkpoint.config.dtype = checkpoint.dtype
        checkpoint.config.save_pretrained(unfinished)
        checkpoint.processor().save_pretrained(unfinished)
        complete_repository(unfinished, checkpoint.config)
        verify(unfinished, sums)


def write_safetensors(
    path: Path,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    weights: Iterable[tuple[str, Tensor]],
) -> dict[str, int]:
    """Write tensors to their places in a file as they come, in any order; return a checksum of each.

    The library's own writer takes all tensors at once. The format is eight bytes of length, a header of JSON, and the
    tensors' bytes (https://huggingface.co/docs/safetensors).
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
            data = _bytes(tensor)
            file.seek(8 + len(encoded) + starts[name])
            file.write(data)
            sums[name] = zlib.crc32(data)
    assert sums.keys() == shapes.keys(), sorted(shapes.keys() ^ sums.keys())
    return sums


def checksum(tensor: Tensor) -> int:
    """Return a number that tells a tensor's bytes from others."""
    return zlib.crc32(_bytes(tensor))


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def verify(folder: Path, sums: Mapping[str, int]) -> None:
    """Load what was written: config, processor, and every tensor by the name and shape that the model has it.

    Raises:
        AssertionError: If it is not what was converted.
    """
    config = HFViTConfig.from_pretrained(folder)
    HFViTImageProcessorPil.from_pretrained(folder)
    architecture = (config.architectures or [ENCODER])[0]
    for name, shape in parameters_of(architecture, config).items():
        tensor = read_safetensor(folder / WEIGHTS, name)
        assert tensor.shape == shape and checksum(tensor) == sums[name], name
