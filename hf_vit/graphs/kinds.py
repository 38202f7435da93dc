"""The graph formats: how each is written, quantised and run."""

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

from ..model.modeling_hf_vit import HFViTForImageClassification
from .open_sizes import Model, fixed_size, opened

Answer = Callable[[np.ndarray], np.ndarray]  # from pixel values, float32 [B, C, H, W], to logits or features


OPSET = 20  # the first with GELU as one operation


INPUT = "pixel_values"


# Of a protobuf, 2 GiB; what is not weights is small.
MOST_BYTES_INSIDE = 2**31 - 2**24


BLOCK = 64  # weights that share a scale


class Graph(nn.Module):
    """From pixel values to one tensor: the logits of a classifier, or what an encoder pools."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.output = "logits" if isinstance(model, HFViTForImageClassification) else "pooler_output"

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values)[self.output]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to themselves what exporters say of their own insides; an error still comes through."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def trace(model: Model) -> Any:
    """Return a model, of float32, as a `torch.export.ExportedProgram`; batch and, if it can be, size left open."""
    config, Dim = model.config, torch.export.Dim
    positions: AbstractContextManager[None]
    rows, columns = config.grid_size
    height, width = config.patch_shape
    open_sizes: dict[int, Any] = {0: Dim("batch")}
    example, positions = torch.zeros(2, config.num_channels, *config.image_shape), nullcontext()
    if fixed_size(config) is None:
        # An example with sides of their own: equal ones would be taken for one.
        example = torch.zeros(2, config.num_channels, (rows + 1) * height, (rows + columns + 2) * width)
        open_sizes |= {2: height * Dim("rows", min=2), 3: width * Dim("columns", min=2)}
        positions = opened(model)
    with torch.no_grad(), quiet(), positions:
        program = torch.export.export(Graph(model).eval(), (example,), dynamic_shapes={INPUT: open_sizes})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names of this machine's folders
    return program


def write_onnx(model: Model, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a model as ONNX, weights inside; beyond 2 GB they lie beside, in `path` with `.data`."""
    import onnx_ir

    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # other kinds become the same products, with more around them
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
        node.metadata_props.clear()  # how it was made, longer than the graph
    (given,), (answer,) = graph.inputs, graph.outputs
    sides = zip(given.shape, ["batch", "channels", "height", "width"], strict=True)
    given.shape = onnx_ir.Shape([side if isinstance(side, int) else name for side, name in sides])
    answer.shape = onnx_ir.Shape(["batch", *answer.shape[1:]])
    written.model.metadata_props.update(metadata or {})
    size = sum(parameter.nbytes for parameter in model.parameters())
    written.save(path, external_data=size > MOST_BYTES_INSIDE)


def write_torch_export(model: Model, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a model as a program that `torch.export.load` reads, with `metadata` as JSON in its `metadata.json`."""
    with quiet():
        torch.export.save(trace(model), path, extra_files={"metadata.json": json.dumps(metadata or {})})


def bytes_of(model: Any) -> int:
    """Return the bytes of an ONNX model's weights."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def quantize_dynamic(source: Path, path: Path) -> None:
    """Write an ONNX file with products in 8 bits: of weights, and of activations by the range of every call."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    is_large = bytes_of(model) > MOST_BYTES_INSIDE
    del model.graph.value_info[:]  # it transposes weights, and would take their old shapes for a contradiction
    quantize_dynamic(
        model,
        path,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QUInt8,  # signed, sums overflow in 16 bits on processors without VNNI
        use_external_data_format=is_large,
        extra_options={"MatMulConstBOnly": True},
    )


def quantize_weights(source: Path, path: Path) -> None:
    """Write an ONNX file with the weights of products in 8 bits, `BLOCK` of them with a scale."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=8, block_size=BLOCK, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), bytes_of(quantizer.model.model) > MOST_BYTES_INSIDE)


QUANTIZERS = {"weights": quantize_weights, "dynamic": quantize_dynamic}


def read_onnx(path: Path) -> Answer:
    """Return what answers by onnxruntime, on as many cores as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixel_values: session.run(None, {INPUT: pixel_values})[0]


def read_torch_export(path: Path) -> Answer:
    """Return what answers by the program of a file."""
    with quiet():
        program = torch.export.load(path).module()

    @torch.no_grad()
    def answer(pixel_values: np.ndarray) -> np.ndarray:
        return program(torch.from_numpy(pixel_values)).numpy()

    return answer


class Kind(NamedTuple):
    """A file that a model can be: what its name ends with, packages that it needs, and how it is written and read."""

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[Model, Path, dict[str, str]], None]
    read: Callable[[Path], Answer]


KINDS = {
    "onnx": Kind(".onnx", ("onnx", "onnxruntime", "onnxscript"), write_onnx, read_onnx),
    "torch-export": Kind(".pt2", (), write_torch_export, read_torch_export),
}
