"""Write a checkpoint as the npz file of the paper's code and big_vision."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...system.disk import new_file
from .. import Checkpoint, Options
from ..layouts import Row, Rule
from ..writing import translated, verify
from . import google


def _npz_misfits(checkpoint: Checkpoint) -> list[str]:
    config = checkpoint.config
    misfits = []
    if config.pooling in ("mean", "attention") and config.use_cls_token:
        misfits.append(f"pooling={config.pooling!r} beside a class token")
    # Stems are of one of the two codes, these of the other.
    is_of_big_vision = google.is_of_big_vision(config)
    if config.stem_layers is not None and (is_of_big_vision or config.position_embedding_type == "sincos_2d"):
        misfits.append("stem_layers with attention pooling, sincos_2d, or a class token without position")
    return misfits


def _npz_notes(checkpoint: Checkpoint) -> list[str]:
    height, width = checkpoint.config.image_shape
    rows, columns = checkpoint.config.grid_size
    if checkpoint.config.position_embedding_type == "learned" and rows == columns:
        return []
    return [f"The file does not say its grid: read it with --image-size {height}x{width}."]


def _npz_table(checkpoint: Checkpoint) -> list[Row]:
    return google.table(checkpoint.config)


def _write_npz(checkpoint: Checkpoint, rules: list[Rule], out: Path, force: bool) -> None:
    sums: dict[str, int] = {}
    with new_file(out, force) as unfinished:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            for name, tensor in translated(checkpoint, rules, sums):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, _array(tensor))
        verify(unfinished, Options(image_size=checkpoint.config.image_shape), checkpoint, sums)


def _array(tensor: Tensor) -> np.ndarray:
    """Return an array; bfloat16, which numpy does not have, as JAX writes it."""
    tensor = tensor.contiguous()
    return tensor.view(torch.int16).numpy().view("V2") if tensor.dtype == torch.bfloat16 else tensor.numpy()
