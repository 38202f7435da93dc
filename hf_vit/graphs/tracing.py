"""A model as a program of torch.export with dynamic sizes, which every format is made from."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..inference.optimize import DTYPES
from ..model.configuration_hf_vit import HFViTConfig
from ..model.dense_hf_vit import HFViTBackbone
from ..model.detection_hf_vit import HFViTForObjectDetection
from ..model.modeling_hf_vit import HFViTModel
from .open_sizes import Model, fixed_size, opened

# From pixel values, float32 [B, C, H, W], to logits or features; a tuple if a graph has several outputs.
Run = Callable[[np.ndarray], Any]
Images = Iterable[np.ndarray]  # pixel values, float32 [B, C, H, W], that show the range of activations

INPUT, IMAGES = "pixel_values", "images"  # names of inputs: preprocessed, and uint8 [B, H, W, C]
MOST_IMAGES = 16  # of a batch, where batch and size have bounds


def most_patches(config: HFViTConfig) -> int:
    """Return the most rows and columns of patches where batch and size have bounds."""
    return 2 * max(config.grid_size) + 2


class Graph(nn.Module):
    """A model with tensors as outputs, which are those named in `outputs`.

    These are the logits of a classifier, the logits and `pred_boxes` of a detector, the pooled output of an encoder,
    or the feature maps of a backbone. Input and outputs are float32 in every precision.
    """

    input = INPUT

    def __init__(self, model: Model, precision: str = "fp32") -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        self.kept = (model,)  # in a tuple, so that it is no part of this module
        used: Any = model if self.dtype == torch.float32 else copy.deepcopy(model)
        self.model = used.to(self.dtype)
        self.config: HFViTConfig = model.config
        self.names: tuple[str, ...] = ("logits",)  # of the model's outputs
        if isinstance(model, HFViTModel):
            self.names = ("pooler_output",)
        elif isinstance(model, HFViTForObjectDetection):
            self.names = ("logits", "pred_boxes")
        elif isinstance(model, HFViTBackbone):
            self.names = tuple(model.out_features)
        self.outputs = self.names

    @property
    def original(self) -> Model:
        """The model in its own precision."""
        return self.kept[0]

    @property
    def output(self) -> str:
        """Name of the first output."""
        return self.outputs[0]

    def in_float32(self) -> "Graph":
        """Return the same graph in float32."""
        return Graph(self.original)

    def preprocessed(self, images: Tensor) -> Tensor:
        """Return the pixel values for the input of the graph, which they are."""
        return images

    def forward(self, images: Tensor) -> Any:
        pixel_values = self.preprocessed(images)
        answer = self.model(pixel_values if self.dtype == torch.float32 else pixel_values.to(self.dtype))
        values = answer.feature_maps if "feature_maps" in answer else [answer[name] for name in self.names]
        values = tuple(value if value.dtype == torch.float32 else value.float() for value in values)
        return values if len(values) > 1 else values[0]

    def example(self, is_bounded: bool = False) -> tuple[Tensor, dict[int, Any]]:
        """Return an input to trace with, and its dynamic dimensions, with or without upper bounds."""
        config, Dim = self.config, torch.export.Dim
        most_images = MOST_IMAGES if is_bounded else None
        if fixed_size(config) is not None:
            return torch.zeros(2, config.num_channels, *config.image_shape), {0: Dim("batch", max=most_images)}
        rows, columns = config.grid_size
        height, width = config.patch_shape
        most = most_patches(config) if is_bounded else None
        # The sides of the example differ: torch.export would treat equal sides as one.
        example = torch.zeros(2, config.num_channels, (rows + 1) * height, (rows + columns + 2) * width)
        sides = {2: height * Dim("rows", min=2, max=most), 3: width * Dim("columns", min=2, max=most)}
        return example, {0: Dim("batch", max=most_images), **sides}

    def positions(self) -> AbstractContextManager[None]:
        """Return a context in which the positions are those of dynamic sizes, if sizes are dynamic."""
        return nullcontext() if fixed_size(self.config) is not None else opened(self.model)


def graph_of(model: Model | Graph) -> Graph:
    """Return a model as a graph; a graph is one already."""
    return model if isinstance(model, Graph) else Graph(model)


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


def trace(model: Model | Graph, is_bounded: bool = False) -> Any:
    """Return a model as a `torch.export.ExportedProgram` with dynamic batch and, if possible, image size.

    With `is_bounded` these have the upper bounds `MOST_IMAGES` and `most_patches`.
    """
    graph = graph_of(model).eval()
    example, dynamic = graph.example(is_bounded)
    with torch.no_grad(), quiet(), graph.positions():
        program = torch.export.export(graph, (example,), dynamic_shapes=(dynamic,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains paths of this machine
    return program
