"""ONNX: how it is written, quantized, and run by onnxruntime."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .open_sizes import Model
from .tracing import IMAGES, INPUT, Graph, Images, Run, graph_of, quiet, trace

OPSET = 20  # the first with GELU as one operation
MOST_BYTES_INSIDE = 2**31 - 2**24  # a protobuf is limited to 2 GiB; everything except weights is small
BLOCK = 64  # weights that share a scale
# Names of dynamic sides, by rank: of one output per image, per point, and per cell of a map.
SIDES_OF_INPUT = {INPUT: ("batch", "channels", "height", "width"), IMAGES: ("batch", "height", "width", "channels")}
SIDES_OF_OUTPUT = {
    1: ("values",), 2: ("batch", "labels"), 3: ("batch", "points", "values"),
    4: ("batch", "labels", "rows", "columns"),
}  # fmt: skip


def write_onnx(model: Model | Graph, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a model as ONNX with its weights inside; above 2 GB they are in a second file, `path` with `.data`."""
    import onnx_ir

    graph = graph_of(model)
    attention = graph.model.config._attn_implementation
    graph.model.set_attn_implementation("eager")  # the others export the same products with more operations
    program = trace(graph)
    graph.model.set_attn_implementation(attention)
    with quiet():
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[graph.input],
            output_names=list(graph.outputs),
            verbose=False,
        )
    assert written is not None
    network: Any = written.model.graph
    for node in network:
        node.metadata_props.clear()  # records of the export, longer than the graph
    for value in (*network.inputs, *network.outputs):
        sides = zip(value.shape, SIDES_OF_INPUT.get(value.name) or SIDES_OF_OUTPUT[len(value.shape)], strict=True)
        value.shape = onnx_ir.Shape([side if isinstance(side, int) else name for side, name in sides])
    written.model.metadata_props.update(metadata or {})
    size = sum(parameter.nbytes for parameter in graph.model.parameters())
    written.save(path, external_data=size > MOST_BYTES_INSIDE)


def read_onnx(path: Path, threads: int | None = None) -> Run:
    """Return a function that runs a file in onnxruntime, by default with as many threads as torch uses.

    Several threads can call it at once.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    [given] = session.get_inputs()

    def run(images: np.ndarray) -> Any:
        answers = session.run(None, {given.name: images})
        return answers[0] if len(answers) == 1 else tuple(answers)

    return run


def bytes_of(model: Any) -> int:
    """Return the size of an ONNX model's weights in bytes."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def quantize_dynamic(source: Path, path: Path, images: Images = ()) -> None:
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


def quantize_static(source: Path, path: Path, images: Images) -> None:
    """Write an ONNX file that multiplies in 8 bits; the range of activations is that of `images`."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.images, None)
            return None if batch is None else {INPUT: batch}

    model = onnx.load(source)
    is_large = bytes_of(model) > MOST_BYTES_INSIDE
    quantize_static(
        model,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QUInt8,  # as above
        use_external_data_format=is_large,
        extra_options={"MatMulConstBOnly": True},
    )


def quantize_weights(source: Path, path: Path, images: Images = ()) -> None:
    """Write an ONNX file with the weights of products in 8 bits, one scale for each `BLOCK` of them."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=8, block_size=BLOCK, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), bytes_of(quantizer.model.model) > MOST_BYTES_INSIDE)


ONNX_QUANTIZERS = {"weights": quantize_weights, "dynamic": quantize_dynamic, "static": quantize_static}
