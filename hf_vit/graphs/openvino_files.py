"""OpenVINO: how its files are written, quantized and run.

A model is read from our ONNX, whose size stays dynamic. The converter of PyTorch programs would do, but it reports
every use to its makers (`openvino_telemetry`), as NNCF does; a graph is nobody's business but the user's.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import local
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..system.extras import need
from ..system.machine import cores
from .onnx_files import write_onnx
from .open_sizes import Model
from .tracing import Graph, Images, Run, graph_of, quiet

SECTION = "model_info"  # of the metadata, as other exporters name it
# Without a hint, CPUs with units for bf16 or fp16 compute in these.
HINTS = {"fp32": "f32", "bf16": "bf16"}


@cache
def core() -> Any:
    """Return OpenVINO's core, which stays alive.

    Its CPU plugin gives the thread that loads it another stack for signals. If the plugin is unloaded in another
    thread, that stack is freed but stays in use, and the next signal ends the process by a segmentation fault.
    """
    import openvino

    return openvino.Core()


def write_openvino(model: Model | Graph, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a model as OpenVINO's XML, with its weights in a second file `.bin`, and `metadata` under `SECTION`.

    In fp16 the weights are stored in half precision, and OpenVINO chooses the precision of its computations.
    """
    import openvino

    graph = graph_of(model)
    with TemporaryDirectory() as folder:
        write_onnx(graph.in_float32(), Path(folder) / "model.onnx")
        network = core().read_model(Path(folder) / "model.onnx")
        for name, value in (metadata or {}).items():
            network.set_rt_info(value, [SECTION, name])
        openvino.save_model(network, path, compress_to_fp16=graph.dtype == torch.float16)


def read_openvino(path: Path, precision: str = "fp32", threads: int | None = None) -> Run:
    """Return a function that runs a file on the CPU, by default with as many threads as torch uses.

    Several threads can call it at once; each has a stream of its own.

    Args:
        path: An XML file of OpenVINO, or an ONNX file.
        precision: `"fp32"`, or `"bf16"` for CPUs with units for it.
        threads: Number of threads of one call.
    """

    threads = threads or torch.get_num_threads()
    streams = max(1, cores() // threads)
    options = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "INFERENCE_NUM_THREADS": streams * threads,
        "NUM_STREAMS": streams,
    }
    compiled = core().compile_model(path, "CPU", options)
    own = local()

    def run(images: np.ndarray) -> Any:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        answers = [each.copy() for each in own.request.infer(images, share_inputs=True).to_tuple()]
        return answers[0] if len(answers) == 1 else tuple(answers)

    return run


def quantize_weights(source: Path, path: Path, images: Images = ()) -> None:
    """Write a file with weights in 8 bits, one scale per output."""
    nncf = import_nncf()
    with redirect_stdout(StringIO()):  # progress bars
        network = nncf.compress_weights(_network(source), mode=nncf.CompressWeightsMode.INT8_SYM)
    _save(network, path)


def quantize_static(source: Path, path: Path, images: Images) -> None:
    """Write a file that multiplies in 8 bits; the range of activations is that of `images`."""
    nncf = import_nncf()
    images, transformer = list(images), nncf.ModelType.TRANSFORMER
    with redirect_stdout(StringIO()):  # progress bars
        network = nncf.quantize(
            _network(source), nncf.Dataset(images), subset_size=len(images), model_type=transformer
        )
    _save(network, path)


def _network(source: Path) -> Any:

    return core().read_model(source)


def _save(network: Any, path: Path) -> None:
    import openvino

    openvino.save_model(network, path, compress_to_fp16=False)


def import_nncf() -> Any:
    """Import NNCF without its reports of use."""
    need("openvino", "nncf")
    with _without("openvino_telemetry"), quiet():
        import nncf

    nncf.set_log_level(40)  # of logging.ERROR
    return nncf


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Let a package look as if it were not installed."""
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    loaded = modules.get(package)
    modules[package] = None
    try:
        yield
    finally:
        if loaded is None:
            del modules[package]
        else:
            modules[package] = loaded


OPENVINO_QUANTIZERS = {"weights": quantize_weights, "static": quantize_static}
