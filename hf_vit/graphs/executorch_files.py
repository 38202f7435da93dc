"""ExecuTorch: how its programs for phones and small devices are written, for XNNPACK on CPUs, and run.

The memory of a program is planned when it is written, so that batch and size have an upper bound.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .open_sizes import Model
from .tracing import Graph, Run, graph_of, quiet, trace


def write_executorch(model: Model | Graph, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a model as a program, for batches and sizes within bounds; `metadata` are methods without inputs."""
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = trace(graph_of(model, is_bounded=True))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=metadata)
        path.write_bytes(lowered.to_executorch().buffer)


def read_executorch(path: Path) -> Run:
    """Return a function that runs a program."""
    with quiet():
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(path).load_method("forward")

    def run(images: np.ndarray) -> Any:
        answers = tuple(each.numpy().copy() for each in method.execute([torch.from_numpy(images)]))
        return answers if len(answers) > 1 else answers[0]

    return run
