"""The graph formats: how each is written, quantized and run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from .executorch_files import read_executorch, write_executorch
from .onnx_files import ONNX_QUANTIZERS, read_onnx, write_onnx
from .open_sizes import Model
from .openvino_files import OPENVINO_QUANTIZERS, read_openvino, write_openvino
from .torch_export_files import read_torch_export, write_torch_export
from .tracing import INPUT, Graph, Images, Run

Write = Callable[[Model | Graph, Path, dict[str, str]], None]  # a model, and metadata, to a file
Quantize = Callable[[Path, Path, Images], None]  # a file in float32 to one in 8 bits, by the range of images
NONE: Mapping[str, Quantize] = MappingProxyType({})


class Kind(NamedTuple):
    """A graph format.

    Attributes:
        suffix: Suffix of its files.
        packages: The packages that it needs.
        write: Write a model, or a graph in float32 or one of `precisions`.
        read: Return the function that runs a file.
        extra: The optional dependencies of this project that contain the packages.
        quantizers: The ways to write it in 8 bits, by name.
        precisions: The other precisions that it has.
        is_bounded: Whether batch and size have upper bounds.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Write
    read: Callable[[Path], Run]
    extra: str = "onnx"
    quantizers: Mapping[str, Quantize] = NONE
    precisions: tuple[str, ...] = ()
    is_bounded: bool = False


ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
KINDS = {
    "onnx": Kind(".onnx", ONNX_PACKAGES, write_onnx, read_onnx, "onnx", ONNX_QUANTIZERS, ("fp16",)),
    "openvino": Kind(
        ".xml",
        (*ONNX_PACKAGES, "openvino"),
        write_openvino,
        read_openvino,
        "openvino",
        OPENVINO_QUANTIZERS,
        ("fp16",),
    ),
    "executorch": Kind(".pte", ("executorch",), write_executorch, read_executorch, "executorch", is_bounded=True),
    "torch-export": Kind(".pt2", (), write_torch_export, read_torch_export, precisions=("bf16", "fp16")),
}

__all__ = ["INPUT", "KINDS", "Graph", "Kind", "Run", "read_onnx", "write_onnx"]
