"""Estimate what a run would take on a GPU that is not there, from the operations of one training step.

The step is traced on tensors without values (`FakeTensorMode`), under the autocast of its precision, so the numbers of
operations, FLOPs and bytes are exact. Their times are assumptions: an operation takes as long as its arithmetic or its
memory traffic, whichever is longer, and a step at least as long as the launches of its kernels. Communication between
GPUs and reading of images are not included.
"""

import math
import time
import weakref
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..data.images import Visit
from ..system.gpus import GPU, gpu_of
from ..system.texts import counted
from .recipe import TrainConfig
from .rehearsal import Cost, Measured, Rehearsal, evaluation_length, rehearse, twin_of
from .run import Run

# Shares of the peak rates of a data sheet that large matrix products and copies reach; measured on an H200: 790 of
# 989 TFLOP/s, and 4.1 of 4.8 TB/s.
MATRIX_SHARE, BANDWIDTH_SHARE = 0.80, 0.85
# Shares of that rate that products reach, below a width: the smaller dimension of their second factor.
PRODUCT_SHARES = ((512, 0.60), (900, 0.76), (math.inf, 0.84))
ATTENTION_SHARES = {"forward": 0.28, "backward": 0.19}  # of fused attention with heads of 64 channels
FUSED = 0.6  # share of the traffic of elementwise operations that is left when a compiler fuses them
FP8_SPEEDUP = 1.45  # of a product, the conversion of its operands included
LAUNCH = 5e-6  # seconds in which the CPU starts one kernel
OPTIMIZER_STATES = {"adamw": 2, "lamb": 2, "sgd": 1, "lion": 1, "muon": 1}  # float32 values per parameter
PARAMETER_KERNELS = 32  # launches of clipping, optimizer and averaging, which take many parameters each

PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0}  # position of the first factor among the arguments
NOT_COMPUTED = ("empty", "new_empty", "_unsafe_view", "_reshape_alias", "lift_fresh")
READ_FOR = 1.0  # seconds for which reading of images is measured


class Operation(NamedTuple):
    """An operation of a step.

    Attributes:
        phase: `"forward"` or `"backward"`.
        kind: `"product"`, `"attention"` or `"elementwise"`, which is all the rest.
        flops, traffic: FLOPs, and bytes that are read and written.
        width: Smaller dimension of the second factor of a product.
    """

    phase: str
    kind: str
    flops: int
    traffic: int
    width: int = 0


class Trace(TorchDispatchMode):
    """Record the operations that run on tensors without values, and the peak of the bytes that are alive.

    Attributes:
        operations: What ran.
        phase: Phase of what runs next.
        peak: Largest number of bytes that results of operations took at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.phase, self.live, self.peak = "forward", 0, 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # attributes of tensors, such as their device
            return out
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        made = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        known = {id(value.untyped_storage()) for value in given}
        for tensor in made:
            if id(tensor.untyped_storage()) not in known:
                self._hold(tensor.untyped_storage())
        name = func._overloadpacket.__name__
        is_view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if is_view or name.startswith(NOT_COMPUTED):
            return out
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        traffic = sum(_bytes(tensor) for tensor in {id(tensor): tensor for tensor in [*given, *made]}.values())
        kind, width = "elementwise", 0
        if name in PRODUCTS:
            kind, width = "product", min(args[PRODUCTS[name]].shape[-1], args[PRODUCTS[name] + 1].shape[-1])
        elif "attention" in name:
            kind = "attention"
        elif flops:  # convolutions
            kind, width = "product", args[1].shape[0]
        self.operations.append(Operation(self.phase, kind, flops, traffic, width))
        return out

    def _hold(self, storage: Any) -> None:
        if id(storage) in self.storages:
            return
        self.storages.add(id(storage))
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, id(storage), storage.nbytes())

    def _release(self, storage: int, nbytes: int) -> None:
        self.storages.discard(storage)
        self.live -= nbytes


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor in memory; a dimension that was expanded has one element."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(side if stride else 1 for side, stride in sides) * tensor.element_size()


def traced_step(model: Any, model_class: Any, images: int, precision: str, checkpoints: bool = False) -> Trace:
    """Trace the forward and backward pass of a training step.

    Args:
        model: The model; only its config and its learned parameters are used.
        model_class: Class of the model, or a function that builds it from a config.
        images: Number of images.
        precision: `"fp32"`, or another one for autocast to bf16, whose traffic is that of fp16, too.
        checkpoints: Whether activations are recomputed.
    """
    with torch.device("meta"):
        twin = model_class(deepcopy(model.config)).train()
    with FakeTensorMode(allow_non_fake_inputs=True), Trace() as trace:
        twin.to_empty(device="cpu")
        for parameter, own in zip(twin.parameters(), model.parameters(), strict=True):
            parameter.requires_grad_(own.requires_grad)
        if checkpoints:
            getattr(twin, "activation_checkpointing_enable", twin.gradient_checkpointing_enable)()
        held, trace.peak = trace.live, trace.live  # the weights
        trace.operations.clear()
        pixels = torch.empty(images, twin.config.num_channels, *twin.config.image_shape, dtype=torch.uint8)
        pixel_values = pixels.float().sub_(0.5).div_(0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
            outputs = twin(pixel_values=pixel_values)
        loss = outputs["predictions" if "predictions" in outputs else "logits"].float().sum()
        trace.phase = "backward"
        loss.backward()
        trace.peak -= held
    return trace


class Time(NamedTuple):
    """Seconds of the operations of one phase by kind, and of their launches."""

    product: float
    attention: float
    elementwise: float
    launches: float

    @property
    def seconds(self) -> float:
        return max(self.product + self.attention + self.elementwise, self.launches)


def time_of(operations: Iterable[Operation], gpu: GPU, precision: str, is_compiled: bool) -> Time:
    """Return the time that operations take on a GPU."""
    rate = MATRIX_SHARE * 1e12 * (gpu.single if precision == "fp32" else gpu.half)
    bandwidth = BANDWIDTH_SHARE * 1e12 * gpu.bandwidth
    seconds = dict.fromkeys(("product", "attention", "elementwise"), 0.0)
    numbers = dict.fromkeys(seconds, 0)
    for phase, kind, flops, traffic, width in operations:
        if kind == "elementwise":
            seconds[kind] += traffic / bandwidth * (FUSED if is_compiled else 1)
        elif kind == "attention":
            seconds[kind] += max(flops / (rate * ATTENTION_SHARES[phase]), traffic / bandwidth)
        else:
            share = next(share for width_below, share in PRODUCT_SHARES if width < width_below)
            took = max(flops / (rate * share), traffic / bandwidth)
            seconds[kind] += took / FP8_SPEEDUP if precision == "fp8" else took
        numbers[kind] += 1
    if is_compiled:  # about one fused kernel is left beside each product
        numbers["elementwise"] = min(numbers["elementwise"], numbers["product"])
    return Time(**seconds, launches=LAUNCH * sum(numbers.values()))


def step_seconds(forward_and_backward: float, parts: int, learned: int, gpu: GPU, config: TrainConfig) -> float:
    """Return the seconds of a step: of its parts, and of clipping, the optimizer and averaging of the weights."""
    # Clipping reads and scales gradients; the optimizer reads them, and reads and writes weights and states.
    traffic = 4 * (3 + 3 + 2 * OPTIMIZER_STATES[config.optimizer]) + (12 if config.ema_decay else 0)
    once = max(learned * traffic / (BANDWIDTH_SHARE * 1e12 * gpu.bandwidth), PARAMETER_KERNELS * LAUNCH)
    return parts * forward_and_backward + once


class Estimation(Rehearsal):
    """The steps of an estimate: passed to `train`, it takes none, sets `cost`, and raises `Measured`."""

    def __init__(self, config: TrainConfig, data: Any, gpu: GPU, asked: TrainConfig) -> None:
        super().__init__(config, data)
        self.gpu, self.precision, self.is_compiled = gpu, asked.precision, asked.compile
        self.forward = 0.0  # seconds per image

    def __call__(self, run: Run) -> Iterator[int]:
        config, gpu = self.config, self.gpu
        if run.accelerator.num_processes > 1:
            raise ValueError("--for estimates a single GPU: run the command without a launcher.")
        if config.task == "distillation":
            raise ValueError(
                "--for cannot estimate the cost of teachers: remove it to measure the run on this machine."
            )
        run.bar.leave = False
        images = math.ceil(run.task.passes * config.batch_size / config.accumulation_steps)
        trace = traced_step(run.model, partial(twin_of, run), images, self.precision, config.gradient_checkpointing)
        whole, forward = (
            time_of(operations, gpu, self.precision, self.is_compiled)
            for operations in (trace.operations, [each for each in trace.operations if each.phase == "forward"])
        )
        self.forward = run.task.passes * forward.seconds / images
        learned = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
        step = step_seconds(whole.seconds, config.accumulation_steps, learned, gpu, config)
        cost = self._cost(run, 0.0, step, 0.0)
        memory = {**cost.memory, "optimizer state": 4 * learned * OPTIMIZER_STATES[config.optimizer]}
        self.cost = replace(
            cost,
            precision=self.precision + ", compiled" * self.is_compiled,
            memory=memory,
            peak=sum(memory.values()) - memory["gradients"] + trace.peak,  # the trace holds the gradients
            is_peak_of_gpu=True,
            gpu_memory=gpu.memory * 2**30,
            hardware=f"1 x {gpu.name} (estimated)",
            estimated=self._explained(run, cost, whole),
        )
        raise Measured
        yield

    def _evaluate(self, run: Run) -> float | None:
        images = evaluation_length(self.data, self.config.eval_fraction)
        return None if images is None else images * self.forward

    def _explained(self, run: Run, cost: Cost, whole: Time) -> dict[str, str]:
        """Return what the estimate rests on, by name."""
        gpu, parts = self.gpu, self.config.accumulation_steps
        peak = MATRIX_SHARE * (gpu.single if self.precision == "fp32" else gpu.half)
        rate = cost.training_flops * cost.images_per_second / 1e12
        times = {
            "matrix products": whole.product,
            "attention": whole.attention,
            "elementwise operations": whole.elementwise,
            "optimizer": cost.step_seconds / parts - whole.seconds,
        }
        listed = ", ".join(f"{1e3 * parts * seconds:.3g} ms {name}" for name, seconds in times.items())
        if whole.launches == whole.seconds:
            listed = f"{1e3 * cost.step_seconds:.3g} ms, limited by launches of kernels"
        shares = ", ".join(f"{share:.0%}" for _, share in PRODUCT_SHARES)
        explained = {
            "step": listed,
            "share": f"{rate / peak:.0%} of the rate of large matrix products, {peak:,.0f} TFLOP/s",
            "estimated": f"nothing was measured. Matrix products reach {shares} of that rate at widths below 512, "
            f"below 900 and above, attention {ATTENTION_SHARES['forward']:.0%} forward and "
            f"{ATTENTION_SHARES['backward']:.0%} backward, the rest {BANDWIDTH_SHARE * gpu.bandwidth:.2g} TB/s; a "
            f"launch takes {1e6 * LAUNCH:.0f} µs. Communication between GPUs is not included.",
        }
        if (speed := reading_speed(run)) is not None:
            needed = math.ceil(cost.images_per_second / speed)
            explained["images"] = (
                f"a CPU core of this machine prepares {speed:,.0f} images/s: "
                f"{counted(needed, 'such core')} would keep up with the GPU."
            )
        return explained


def reading_speed(run: Run) -> float | None:
    """Return the training images per second that one thread reads and augments; `None` for a stream."""
    if run.data.is_stream:
        return None
    threads, began, number = torch.get_num_threads(), time.perf_counter(), 0
    torch.set_num_threads(1)
    try:
        while number < len(run.images) and time.perf_counter() - began < READ_FOR:
            run.images[Visit(0, number * 7919 % len(run.images))]  # neighbours may be of one class
            number += 1
        return number / (time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)


def estimate(config: TrainConfig, gpu_name: str) -> Cost | None:
    """Estimate what a run would take on one GPU of a kind, without a GPU, and leave no files.

    Args:
        config: The recipe. Fields that are `auto` are chosen as for a run on this machine, but for the precision.
        gpu_name: A name for `gpu_of`.

    Returns:
        The cost of the complete run; `None` on every process but the first.

    Raises:
        ValueError: As for `train`, or if the GPU is unknown or does not compute in the precision.
    """
    gpu = gpu_of(gpu_name)
    if config.precision == "auto":
        config = replace(config, precision="bf16" if gpu.has_bf16 else "fp32")
    if config.precision == "bf16" and not gpu.has_bf16:
        raise ValueError(f"{gpu.name} does not support bf16: set precision to fp16 or fp32.")
    if config.precision == "fp8" and not gpu.has_fp8:
        raise ValueError(f"{gpu.name} does not support FP8: set precision to bf16.")
    # What builds the model and the data here is a run on the CPU, which takes no step.
    here = replace(config, precision="fp32", compile=False, compile_mode="default", deterministic=False)
    return rehearse(here, partial(Estimation, gpu=gpu, asked=config))
