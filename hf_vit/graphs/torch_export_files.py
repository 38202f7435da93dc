"""Programs of torch.export: how they are written and run."""

import json
from pathlib import Path

import numpy as np
import torch

from .open_sizes import Model
from .tracing import Run, quiet, trace


def write_torch_export(model: Model, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a model as a program for `torch.export.load`, with `metadata` in its `metadata.json`."""
    with quiet():
        torch.export.save(trace(model), path, extra_files={"metadata.json": json.dumps(metadata or {})})


def read_torch_export(path: Path) -> Run:
    """Return a function that runs the program in a file."""
    with quiet():
        program = torch.export.load(path).module()

    @torch.no_grad()
    def run(pixel_values: np.ndarray) -> np.ndarray:
        return program(torch.from_numpy(pixel_values)).numpy()

    return run
