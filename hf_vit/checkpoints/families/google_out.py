"""Write a checkpoint as the npz file of the paper's code and big_vision."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...system.disk import new_file
from ..checkpoint import CLASSIFIER, ENCODER, Checkpoint, Options
from ..layouts import Rule
from ..writing import Target, plain_except, translated, verify
from . import google


def unsupported(checkpoint: Checkpoint) -> list[str]:
    """Return the features that the file cannot hold."""
    config, features = checkpoint.config, []
    if config.pooling in ("mean", "attention") and config.use_cls_token:
        features.append(f"pooling={config.pooling!r} with a class token")
    # Only the paper's code has a stem, and only big_vision has the features in this message.
    is_of_big_vision = google.is_of_big_vision(config)
    if config.stem_layers is not None and (is_of_big_vision or config.position_embedding_type == "sincos_2d"):
        features.append("stem_layers with attention pooling, sincos_2d, or a class token without position")
    return features


def notes(checkpoint: Checkpoint) -> list[str]:
    """Return how to read the file if its tensors do not determine the grid."""
    height, width = checkpoint.config.image_shape
    rows, columns = checkpoint.config.grid_size
    if checkpoint.config.position_embedding_type == "learned" and rows == columns:
        return []
    return [f"The file does not store its grid: read it with --image-size {height}x{width}."]


def write(checkpoint: Checkpoint, rules: list[Rule], out: Path, force: bool) -> None:
    """Write the file and verify it."""
    sums: dict[str, int] = {}
    with new_file(out, force) as unfinished:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            for name, tensor in translated(checkpoint, rules, sums):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, _array(tensor))
        verify(unfinished, Options(image_size=checkpoint.config.image_shape), checkpoint, sums)


def _array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array; bfloat16, which NumPy does not have, is stored as JAX does."""
    tensor = tensor.contiguous()
    return tensor.view(torch.int16).numpy().view("V2") if tensor.dtype == torch.bfloat16 else tensor.numpy()


TARGET = Target(
    architectures=(CLASSIFIER, ENCODER),
    required=plain_except(
        "stem_layers",
        "representation_size",
        position_embedding_type=("learned", "sincos_2d"),
        pooling=("cls", "mean", "attention"),
        hidden_act=("gelu_pytorch_tanh",),
        layer_norm_eps=(1e-6,),
    ),
    unsupported=unsupported,
    notes=notes,
    table=lambda checkpoint: google.table(checkpoint.config),
    write=write,
    carries=("bilinear_corners",),
)
