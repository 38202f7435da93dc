"""Runtimes that compute a model on a CPU instead of torch, and the choice of the fastest one by a measurement.

The graph of a model is exported once, compared with torch as every export is, and kept in a cache, as is the fastest
runtime for a model, a precision, a machine and the installed versions.
"""

import json
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inference.digest import digest_of
from ..inference.optimize import inference_precision, optimize_for_inference
from ..inference.threads import BATCH_OF_CPU, on_every_core
from ..inference.windows import WindowedSegmenter
from ..model.losses_hf_vit import scaled_logits
from ..model.modeling_hf_vit import HFViTForImageClassification
from ..model.multi_task_hf_vit import HFViTForMultiTask
from ..system.disk import new_file, new_folder
from ..system.extras import need
from ..system.machine import hardware, installed_versions
from ..system.places import cache_folder
from .export import BOUNDS, largest_difference
from .kinds import ONNX_PACKAGES
from .onnx_files import read_onnx, write_onnx
from .openvino_files import read_openvino
from .tracing import Graph, Run

VERSION = 1  # of the cache: another one if graphs change
TURNS, SECONDS = 5, 0.3  # of the measurement of each runtime: number, and duration


class Runtime(NamedTuple):
    """A runtime for graphs on a CPU.

    Attributes:
        extra, packages: The optional dependencies that it needs.
        precisions: Those that it computes in.
        read: Returns a function that runs an ONNX file in a precision, with a number of threads for each call.
    """

    extra: str
    packages: tuple[str, ...]
    precisions: tuple[str, ...]
    read: Callable[[Path, str, int], Run]


RUNTIMES = {
    "onnxruntime": Runtime("onnx", ONNX_PACKAGES, ("fp32",), lambda path, _, threads: read_onnx(path, threads)),
    "openvino": Runtime("openvino", (*ONNX_PACKAGES, "openvino"), ("fp32", "bf16"), read_openvino),
}


class PredictionGraph(Graph):
    """A graph with all outputs that predictions need; for a classifier, also the pooled features."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if isinstance(model, HFViTForImageClassification):
            self.outputs = ("logits", "pooler_output")

    def forward(self, pixel_values: Tensor) -> Any:
        model: Any = self.model
        if not isinstance(model, HFViTForImageClassification):
            return super().forward(pixel_values)
        pooled: Any = model.vit(pixel_values).pooler_output
        return scaled_logits(model.classifier(pooled), model.config), pooled


class RuntimeModel:
    """A model that a runtime computes. Called with `pixel_values`, it returns the model's outputs by name."""

    def __init__(self, run: Run, outputs: tuple[str, ...]) -> None:
        self.run, self.outputs = run, outputs

    def __call__(self, pixel_values: Tensor) -> SimpleNamespace:
        arrays = self.run(pixel_values.numpy())
        arrays = arrays if isinstance(arrays, tuple) else (arrays,)
        tensors = map(torch.from_numpy, arrays)
        return SimpleNamespace(**dict(zip(self.outputs, tensors, strict=True)))


def in_runtime(
    model: Any,
    processor: Any,
    runtime: str,
    precision: str = "auto",
    device: str = "cpu",
    compile: bool = False,
    threads: int = 1,
) -> tuple[Any, str]:
    """Return a copy of a model that a runtime computes, and the name of the runtime.

    Args:
        model, processor: An encoder, or a model for classification, segmentation or detection.
        runtime: `"torch"`, `"onnxruntime"`, `"openvino"`, or `"auto"` for the fastest of those that are installed.
        precision: As for `optimize_for_inference`; `"auto"` is fp32 in a runtime without bf16.
        device: Type of the device. All runtimes but torch are for CPUs.
        compile: As for `optimize_for_inference`.
        threads: Number of threads of each call, in a runtime that is not torch; several threads can call at once.

    Raises:
        ValueError: If a package is missing, if the runtime does not have the precision, or if it computes the graph
            of the model otherwise than torch.
    """
    needs_torch = {
        "--compile is for torch": compile,
        f"the model is on {device}": device != "cpu",
        "windows slide in torch": isinstance(model, WindowedSegmenter),
        "the model has several heads": isinstance(model, HFViTForMultiTask),
    }
    reasons = [reason for reason, holds in needs_torch.items() if holds]
    if runtime == "auto":
        runtime = "torch" if reasons else fastest(model, processor, precision)
    if runtime == "torch":
        return optimize_for_inference(model, precision, compile), runtime
    if reasons:
        raise ValueError(f"{runtime} computes graphs with one head on CPUs, and {reasons[0]}: leave --runtime out.")
    return _computed_by(runtime, model, processor, precision, threads), runtime


def fastest(model: Any, processor: Any, precision: str = "auto") -> str:
    """Return the name of the runtime with the highest throughput, which is measured once for some seconds.

    Arguments are those of `in_runtime`. A runtime does not take part if it is not installed, or lacks the precision or
    something that the model needs.
    """
    machine = {name: value for name, value in hardware().items() if name != "load"}
    facts = [VERSION, precision, machine, installed_versions()]
    known = cache_folder() / "runtimes" / f"{digest_of(model, model.config, facts)}.json"
    if known.exists():
        return json.loads(known.read_text(encoding="utf-8"))["runtime"]
    models: dict[str, Any] = {"torch": optimize_for_inference(model, precision)}
    for name in RUNTIMES:
        try:
            models[name] = _computed_by(name, model, processor, precision)
        except ValueError:
            continue
    speeds = throughputs(models, torch.zeros(BATCH_OF_CPU, model.config.num_channels, *model.config.image_shape))
    best = max(speeds, key=speeds.__getitem__)
    with new_file(known, force=True) as unfinished:
        unfinished.write_text(json.dumps({"runtime": best, "images_per_second": speeds}), encoding="utf-8")
    return best


def throughputs(models: dict[str, Any], pixel_values: Tensor) -> dict[str, float]:
    """Return images/s of models that compute a batch on each core at a time: medians of turns that alternate."""
    speeds: dict[str, list[float]] = {name: [] for name in models}
    if len(models) == 1:
        return dict.fromkeys(models, 0.0)
    for turn in range(TURNS + 1):
        for name, model in models.items():
            speed = _throughput(model, pixel_values)
            if turn:  # the first one warms up
                speeds[name].append(speed)
    return {name: round(median(values), 1) for name, values in speeds.items()}


def _throughput(model: Any, pixel_values: Tensor) -> float:
    began = time.perf_counter()

    def batches() -> Iterator[Tensor]:
        while time.perf_counter() - began < SECONDS:
            yield pixel_values

    @torch.inference_mode()
    def compute(batch: Tensor) -> int:
        model(batch)
        return len(batch)

    images = sum(on_every_core(compute, batches()))
    return images / (time.perf_counter() - began)


def _computed_by(name: str, model: Any, processor: Any, precision: str, threads: int = 1) -> RuntimeModel:
    """Return a model that a runtime computes; raise `ValueError` as `in_runtime` does."""
    runtime = RUNTIMES[name]
    need(runtime.extra, *runtime.packages)
    wanted = inference_precision(precision)
    if wanted not in runtime.precisions:
        if precision != "auto":
            able = " or ".join(runtime.precisions)
            raise ValueError(f"{name} computes in {able}, not in {precision}: change --precision or --runtime.")
        wanted = "fp32"
    graph = PredictionGraph(deepcopy(model).float().eval())
    return RuntimeModel(runtime.read(_file_of(graph, processor, name), wanted, threads), graph.outputs)


def _file_of(graph: PredictionGraph, processor: Any, name: str) -> Path:
    """Return the ONNX file of a graph that a runtime computes as torch does, from the cache if it is there."""
    runtime, bound = RUNTIMES[name], BOUNDS["fp32"]
    facts = [VERSION, name, installed_versions(("hf-vit", "torch", "transformers", *runtime.packages))]
    folder = cache_folder() / "graphs" / digest_of(graph.model, graph.config, facts)
    path = folder / "model.onnx"
    if path.exists():
        return path
    with new_folder(folder, force=True) as unfinished:
        write_onnx(graph, unfinished / path.name)
        run = runtime.read(unfinished / path.name, "fp32", torch.get_num_threads())
        difference = largest_difference(run, graph, processor)
        if not difference <= bound:
            raise ValueError(
                f"The outputs of {name} differ from torch's by {difference:.1e}; the bound is {bound:g}. Leave "
                "--runtime out, and please report the model."
            )
    return path
