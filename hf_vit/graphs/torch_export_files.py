"""Programs of torch.export: how they are written and run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .open_sizes import Model
from .tracing import Graph, Run, graph_of, quiet, trace


def write_torch_export(model: Model | Graph, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a model as a program for `torch.export.load`, with `metadata` in its `metadata.json`."""
    with quiet():
        program = trace(graph_of(model))
        torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata or {})})


def read_torch_export(path: Path) -> Run:
    """Return a function that runs the program in a file."""
    with quiet():
        program = torch.export.load(path).module()

    @torch.no_grad()
    def run(images: np.ndarray) -> Any:
        answers = program(torch.from_numpy(images))
        return tuple(each.numpy() for each in answers) if isinstance(answers, tuple) else answers.numpy()

    return run
