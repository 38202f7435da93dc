"""A model as a program of torch.export with dynamic sizes, which every format is made from."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..model.modeling_hf_vit import HFViTModel
from .open_sizes import Model, fixed_size, opened

Run = Callable[[np.ndarray], np.ndarray]  # from pixel values, float32 [B, C, H, W], to logits or features
Images = Iterable[np.ndarray]  # pixel values, float32 [B, C, H, W], that show the range of activations

INPUT = "pixel_values"


class Graph(nn.Module):
    """A model with one output tensor: the logits of a classifier, or the pooled output of an encoder."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.output = "pooler_output" if isinstance(model, HFViTModel) else "logits"

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values)[self.output]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and logs of exporters; errors are still raised."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def trace(model: Model) -> Any:
    """Return a float32 model as a `torch.export.ExportedProgram` with dynamic batch and, if possible, image size."""
    config, Dim = model.config, torch.export.Dim
    positions: AbstractContextManager[None]
    rows, columns = config.grid_size
    height, width = config.patch_shape
    open_sizes: dict[int, Any] = {0: Dim("batch")}
    example, positions = torch.zeros(2, config.num_channels, *config.image_shape), nullcontext()
    if fixed_size(config) is None:
        # The sides of the example differ: torch.export would treat equal sides as one.
        example = torch.zeros(2, config.num_channels, (rows + 1) * height, (rows + columns + 2) * width)
        open_sizes |= {2: height * Dim("rows", min=2), 3: width * Dim("columns", min=2)}
        positions = opened(model)
    with torch.no_grad(), quiet(), positions:
        program = torch.export.export(Graph(model).eval(), (example,), dynamic_shapes={INPUT: open_sizes})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains paths of this machine
    return program
