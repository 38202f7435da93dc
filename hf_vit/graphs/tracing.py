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
# Where memory is planned for the largest batch of the largest images: these, and the attention weights of one layer.
MOST_IMAGES, MOST_WEIGHTS = 16, 2**28  # 1 GiB in float32


def most_patches(config: HFViTConfig) -> int:
    """Return the most rows and columns of patches where batch and size have bounds."""
    return 2 * max(config.grid_size) + 2


def largest_batch(config: HFViTConfig, patches: int) -> int:
    """Return the largest batch of images with so many patches whose attention weights are at most `MOST_WEIGHTS`."""
    return MOST_WEIGHTS // (config.num_attention_heads * (config.num_prefix_tokens + patches) ** 2)


class Graph(nn.Module):
    """A model with tensors as outputs, which are those named in `outputs`.

    These are the logits of a classifier, the logits and `pred_boxes` of a detector, the pooled output of an encoder,
    or the feature maps of a backbone. Input and outputs are float32 in every precision.

    Attributes:
        fixed: Why the image size is fixed; `None` if it is dynamic.
        most_images: The largest batch; `None` if it has no bound.
    """

    input = INPUT

    def __init__(self, model: Model, precision: str = "fp32", is_bounded: bool = False) -> None:
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
        self.is_bounded, self.fixed, self.most_images = is_bounded, fixed_size(self.config), None
        if is_bounded:
            height, width = self.config.image_shape
            if self.fixed is None and largest_batch(self.config, most_patches(self.config) ** 2) < MOST_IMAGES:
                self.fixed = f"Larger images would take gigabytes of memory: the graph accepts {height}x{width} only."
            most = largest_batch(self.config, self.config.grid_size[0] * self.config.grid_size[1])
            self.most_images = min(MOST_IMAGES, max(2, most))

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
        return Graph(self.original, is_bounded=self.is_bounded)

    def preprocessed(self, images: Tensor) -> Tensor:
        """Return the pixel values for the input of the graph, which they are."""
        return images

    def forward(self, images: Tensor) -> Any:
        pixel_values = self.preprocessed(images)
        answer = self.model(pixel_values if self.dtype == torch.float32 else pixel_values.to(self.dtype))
        values = answer.feature_maps if "feature_maps" in answer else [answer[name] for name in self.names]
        values = tuple(value if value.dtype == torch.float32 else value.float() for value in values)
        return values if len(values) > 1 else values[0]

    def example(self) -> tuple[Tensor, dict[int, Any]]:
        """Return an input to trace with, and its dynamic dimensions."""
        config, Dim = self.config, torch.export.Dim
        batch = Dim("batch", max=self.most_images)
        if self.fixed is not None:
            return torch.zeros(2, config.num_channels, *config.image_shape), {0: batch}
        rows, columns = config.grid_size
        height, width = config.patch_shape
        most = most_patches(config) if self.is_bounded else None
        # The sides of the example differ: torch.export would treat equal sides as one.
        example = torch.zeros(2, config.num_channels, (rows + 1) * height, (rows + columns + 2) * width)
        sides = {2: height * Dim("rows", min=2, max=most), 3: width * Dim("columns", min=2, max=most)}
        return example, {0: batch, **sides}

    def positions(self) -> AbstractContextManager[None]:
        """Return a context in which position embeddings are computed for dynamic sizes, if sizes are dynamic."""
        return nullcontext() if self.fixed is not None else opened(self.model)


def graph_of(model: Model | Graph, is_bounded: bool = False) -> Graph:
    """Return a model as a graph; a graph is one already."""
    return model if isinstance(model, Graph) else Graph(model, is_bounded=is_bounded)


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


def trace(graph: Graph) -> Any:
    """Return a graph as a `torch.export.ExportedProgram` with dynamic batch and, if possible, image size."""
    example, dynamic = graph.eval().example()
    with torch.no_grad(), quiet(), graph.positions():
        program = torch.export.export(graph, (example,), dynamic_shapes=(dynamic,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains paths of this machine
    return program
