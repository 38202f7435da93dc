"""The graph formats, ONNX and torch.export: how each is written, quantized and run."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..model.modeling_hf_vit import HFViTModel
from .open_sizes import Model, fixed_size, opened

Run = Callable[[np.ndarray], np.ndarray]  # from pixel values, float32 [B, C, H, W], to logits or features

OPSET = 20  # the first with GELU as one operation
INPUT = "pixel_values"
MOST_BYTES_INSIDE = 2**31 - 2**24  # a protobuf is limited to 2 GiB; everything except weights is small
BLOCK = 64  # weights that share a scale


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


def write_onnx(model: Model, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a model as ONNX with its weights inside; above 2 GB they are in a second file, `path` with `.data`."""
    import onnx_ir

    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the others export the same products with more operations
    program = trace(model)
    model.set_attn_implementation(attention)
    with quiet():
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[Graph(model).output],
            verbose=False,
        )
    assert written is not None
    graph: Any = written.model.graph
    for node in graph:
        node.metadata_props.clear()  # records of the export, longer than the graph
    sides_of_input, sides_of_output = ("batch", "channels", "height", "width"), ("batch", "labels", "rows", "columns")
    for value, names in ((graph.inputs[0], sides_of_input), (graph.outputs[0], sides_of_output)):
        sides = zip(value.shape, names, strict=False)  # an output may have two dimensions
        value.shape = onnx_ir.Shape([side if isinstance(side, int) else name for side, name in sides])
    written.model.metadata_props.update(metadata or {})
    size = sum(parameter.nbytes for parameter in model.parameters())
    written.save(path, external_data=size > MOST_BYTES_INSIDE)


def write_torch_export(model: Model, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a model as a program for `torch.export.load`, with `metadata` in its `metadata.json`."""
    with quiet():
        torch.export.save(trace(model), path, extra_files={"metadata.json": json.dumps(metadata or {})})


def bytes_of(model: Any) -> int:
    """Return the size of an ONNX model's weights in bytes."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def quantize_dynamic(source: Path, path: Path) -> None:
    """Write an ONNX file that multiplies in 8 bits; the range of activations is measured at every call."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    is_large = bytes_of(model) > MOST_BYTES_INSIDE
    del model.graph.value_info[:]  # the quantizer transposes weights, and their old shapes would contradict it
    quantize_dynamic(
        model,
        path,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QUInt8,  # signed sums overflow 16 bits on CPUs without VNNI
        use_external_data_format=is_large,
        extra_options={"MatMulConstBOnly": True},
    )


def quantize_weights(source: Path, path: Path) -> None:
    """Write an ONNX file with the weights of products in 8 bits, one scale for each `BLOCK` of them."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=8, block_size=BLOCK, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), bytes_of(quantizer.model.model) > MOST_BYTES_INSIDE)


QUANTIZERS = {"weights": quantize_weights, "dynamic": quantize_dynamic}


def read_onnx(path: Path) -> Run:
    """Return a function that runs a file in onnxruntime, with as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixel_values: session.run(None, {INPUT: pixel_values})[0]


def read_torch_export(path: Path) -> Run:
    """Return a function that runs the program in a file."""
    with quiet():
        program = torch.export.load(path).module()

    @torch.no_grad()
    def run(pixel_values: np.ndarray) -> np.ndarray:
        return program(torch.from_numpy(pixel_values)).numpy()

    return run


class Kind(NamedTuple):
    """A graph format: the suffix of its files, the packages it needs, and how it is written and read."""

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[Model, Path, dict[str, str]], None]
    read: Callable[[Path], Run]


KINDS = {
    "onnx": Kind(".onnx", ("onnx", "onnxruntime", "onnxscript"), write_onnx, read_onnx),
    "torch-export": Kind(".pt2", (), write_torch_export, read_torch_export),
}
