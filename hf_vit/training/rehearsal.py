"""What a run will take, before it starts: parameters, FLOPs, memory, time and money.

A dry run is the run itself, by its own loop, in a folder that goes away: some steps to warm up, some that are
measured, and some batches of an evaluation. Loaders read ahead, and while a model is compiled they read far ahead; so
what is ready when the measuring begins is passed over, and the pace is one that the loader can keep.

FLOPs are those of the model's matrix products and convolutions, a multiply-add counted as two, as torch counts them
(`torch.utils.flop_counter`). What gradient checkpointing and fused attention compute a second time is not counted.
"""

import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..data.labelled import ImageData
from ..data.orders import READ_AHEAD, steps_of
from ..evaluation.flops import count_flops, count_parameters
from ..system.machine import machine, peak_memory, precision_name
from ..system.stopping import Interrupted
from .checkpointing import CheckpointFolder
from .loop import CHECKPOINTS, Running, length_of, refuse_to_overwrite, train
from .parallel import build_accelerator
from .recipe import TrainConfig

WARM_UP, MEASURED = 3, 10  # steps
AHEAD = 2  # batches that a worker loads ahead, as DataLoader has it
LONG_ENOUGH, NEVER = 10_000, 10**9  # steps or epochs


# ---------------------------------------------------------------------------------------------------- the figures


@dataclass(frozen=True)
class Memory:
    """Bytes of one process; those of a sharded model are its shards."""

    weights: int
    gradients: int
    optimizer: int
    average: int


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Attributes:
        source: Name of the data.
        image_shape: Pixels, (height, width).
        precision: As a recipe calls it.
        learned, frozen: Numbers of parameters.
        forward_flops: Of one image in evaluation.
        training_flops: Of one image in training, forward and backward.
        memory: What stays from step to step.
        peak: Bytes, of the process that needed most; 0 where the system does not tell.
        is_peak_of_gpu: Whether `peak` is what torch has taken of a GPU, else the resident memory of a process.
        gpu_memory: Bytes that a GPU has, 0 without one.
        measured_steps: Number of steps that the pace was measured on.
        step_seconds: Of one step, waiting for images included.
        data_wait_share: Share of it that waiting takes, of the process that waited longest.
        start_seconds: Until the first step: reading data, building, compiling.
        evaluation_seconds: Of one evaluation; `None` where nobody knows how many images there are.
        total_steps, done_steps: Of the run, and of those the ones that a run in `output_dir` has done.
        eval_every: Steps between evaluations.
        train_images: Number of images in an epoch.
        batch_size: Images of a step, over all processes.
        processes, num_workers: Processes that train, and for each the processes that load.
        hardware: In words.
    """

    source: str
    image_shape: tuple[int, int]
    precision: str
    learned: int
    frozen: int
    forward_flops: int
    training_flops: int
    memory: Memory
    peak: int
    is_peak_of_gpu: bool
    gpu_memory: int
    measured_steps: int
    step_seconds: float
    data_wait_share: float
    start_seconds: float
    evaluation_seconds: float | None
    total_steps: int
    done_steps: int
    eval_every: int
    train_images: int
    batch_size: int
    processes: int
    num_workers: int
    hardware: str

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.step_seconds

    @property
    def evaluations(self) -> int:
        return self.evaluations_from(0)

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.seconds_from(0)

    def evaluations_from(self, done: int) -> int:
        """Return the number of evaluations behind step `done`; the end of a run always has one."""
        return math.ceil(self.total_steps / self.eval_every) - min(done, self.total_steps - 1) // self.eval_every

    def seconds_from(self, done: int) -> float:
        """Return how long it takes to go on behind step `done`. Saving is not in it."""
        evaluating = self.evaluations_from(done) * (self.evaluation_seconds or 0.0)
        return self.start_seconds + (self.total_steps - done) * self.step_seconds + evaluating


def count_memory(run: Running) -> Memory:
    """Return what weights, gradients, optimizer and average take once there has been a step."""
    parameters = list(run.model.parameters())
    states = [state.values() for state in run.optimizer.state.values()]
    return Memory(
        weights=_bytes_of([*parameters, *run.model.buffers()]),
        gradients=_bytes_of(parameter for parameter in parameters if parameter.requires_grad),
        optimizer=_bytes_of(value for values in states for value in values if isinstance(value, Tensor)),
        average=_bytes_of(average for _, average in run.average.pairs),
    )


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def evaluation_length(data: ImageData, eval_fraction: float) -> int | None:
    """Return the number of held-out images, about that of a stream that was cut; `None` if nothing tells."""
    if hasattr(data.evaluation, "__len__"):
        return len(data.evaluation)
    if data.eval_split == "held out":
        return round(data.train_length * eval_fraction / (1 - eval_fraction))
    stated = (data.evaluation.info.splits or {}).get(str(data.evaluation.split))
    return stated.num_examples or None if stated else None


# -------------------------------------------------------------------------------------------------- the measuring


class Over(Exception):
    """A rehearsal has measured all that it wants to know."""


class Rehearsal:
    """The course of a dry run: take and measure some steps of a run, then some of an evaluation, and leave it.

    Args:
        config: The recipe of the run that is rehearsed.

    Attributes:
        measured_steps: At least `MEASURED`, and so many that every worker loads as often as any other: they begin
            together, so that their batches come in bursts.
        cost: Of that run, once the rehearsal is over.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        workers, parts = config.num_workers, config.accumulation_steps
        batches = max(MEASURED * parts, AHEAD * workers)
        if workers:
            batches = math.ceil(batches / workers) * workers
        self.measured_steps = math.ceil(batches / parts)
        self.cost: Cost | None = None
        self.began = time.perf_counter()

    def changed(self, folder: str) -> TrainConfig:
        """Return the recipe of the rehearsal: that of the run, but for what it would leave behind and where."""
        config = self.config
        return replace(
            config,
            output_dir=folder,
            resume="auto",
            tracker="none",
            push_to_hub=None,
            # The end never comes, and the beginning of a longer schedule is the same.
            epochs=max(config.epochs, LONG_ENOUGH),
            max_steps=config.max_steps and max(config.max_steps, LONG_ENOUGH),
            eval_every=NEVER,
            save_every=NEVER,
            log_every=WARM_UP + self.measured_steps,  # where the loop looks whether losses are finite
        )

    def __call__(self, run: Running) -> Iterator[int]:
        run.signals.has_begun = False  # there is nothing to save: a signal ends it at once
        run.bar.total = WARM_UP + self.measured_steps
        steps = iter(run.steps)
        yield from islice(steps, WARM_UP)
        _synchronize(run)
        started = time.perf_counter() - self.began

        for _ in range(_batches_ahead(run)):
            next(run.batches)
        run.pace.lap()
        before = replace(run.pace)
        yield from islice(steps, self.measured_steps)
        _synchronize(run)
        run.pace.lap()
        seconds = run.pace.training_seconds - before.training_seconds
        share = (run.pace.waited_seconds - before.waited_seconds) / seconds
        step_seconds = seconds / self.measured_steps
        start_seconds = max(0.0, started - WARM_UP * step_seconds)
        self.cost = self._add_up(run, step_seconds, share, start_seconds, self._evaluate(run))
        raise Over

    def _evaluate(self, run: Running) -> float | None:
        """Return the seconds of one evaluation, from that of some batches."""
        workers = max(1, run.eval_loader.num_workers)
        number = max(MEASURED, 3 * workers)
        marks: list[float] = []

        def batches(number: int) -> Iterator[Any]:
            marks.clear()
            for batch in islice(run.eval_loader, number):
                yield batch
                marks.append(time.perf_counter())

        with run.average.in_place():
            run.task.evaluate(run.model, batches(1), run.accelerator, run.to_model)  # which may compile it
            began = time.perf_counter()
            run.task.evaluate(run.model, batches(number), run.accelerator, run.to_model)
            seconds = time.perf_counter() - began
        if len(marks) < number:  # these were all
            return seconds
        images = evaluation_length(run.data, self.config.eval_fraction)
        if images is None:
            return None
        order = run.eval_loader.batch_sampler
        left = max(0, math.ceil(images / (order.batch_size * order.processes)) - number)
        # The first batches of all workers come at the same time, and take what starting them takes.
        return seconds + left * (marks[-1] - marks[workers - 1]) / (number - workers)

    def _add_up(
        self,
        run: Running,
        step_seconds: float,
        data_wait_share: float,
        start_seconds: float,
        evaluation_seconds: float | None,
    ) -> Cost:
        config, accelerator, device = self.config, run.accelerator, run.accelerator.device
        own = torch.tensor([peak_memory(device), data_wait_share], device=device)
        peak, data_wait_share = accelerator.gather(own).view(-1, 2).amax(dim=0).tolist()
        model = accelerator.unwrap_model(run.model)
        learned, frozen = count_parameters(model)
        forward_flops, training_flops = count_flops(model, run.task.model_class)
        is_gpu = device.type == "cuda"
        return Cost(
            source=run.data.name,
            image_shape=model.config.image_shape,
            precision=precision_name(accelerator.mixed_precision),
            learned=learned,
            frozen=frozen,
            forward_flops=forward_flops,
            training_flops=training_flops,
            memory=count_memory(run),
            peak=round(peak),
            is_peak_of_gpu=is_gpu,
            gpu_memory=torch.cuda.get_device_properties(device).total_memory if is_gpu else 0,
            measured_steps=self.measured_steps,
            step_seconds=step_seconds,
            data_wait_share=data_wait_share,
            start_seconds=start_seconds,
            evaluation_seconds=evaluation_seconds,
            total_steps=length_of(config, run.data.train_length),
            done_steps=_done_steps(config) if accelerator.is_main_process else 0,
            eval_every=steps_of(config.eval_every, run.data.train_length, config.batch_size),
            train_images=run.data.train_length,
            batch_size=config.batch_size,
            processes=accelerator.num_processes,
            num_workers=run.loader.num_workers,
            hardware=machine(),
        )


def _batches_ahead(run: Running) -> int:
    """Return how many batches are ready at most that were loaded while nothing was trained."""
    batches = run.loader.num_workers * AHEAD
    if run.data.is_stream:
        batches += math.ceil(READ_AHEAD / run.loader.batch_sampler.batch_size)
    return batches


def _synchronize(run: Running) -> None:
    if run.accelerator.device.type != "cpu":
        torch.accelerator.synchronize()


def _done_steps(config: TrainConfig) -> int:
    """Return how far a run in `output_dir` is that would be resumed."""
    checkpoints = CheckpointFolder(Path(config.output_dir) / CHECKPOINTS, config.keep_checkpoints)
    newest = checkpoints.newest(lambda message: None) if config.resume == "auto" else None
    return int(newest.name.removeprefix("step-")) if newest is not None else 0


def rehearse(config: TrainConfig) -> Cost | None:
    """Measure what a run takes; on one process or on those that a launcher started. Nothing of it is left.

    Returns:
        The whole run's cost; `None` on every process but the first.

    Raises:
        Interrupted: If SIGINT, SIGTERM or SIGHUP came.
        ValueError, FloatingPointError: As for `train`.
    """
    refuse_to_overwrite(config)
    accelerator = build_accelerator(config)  # which refuses a tracker that is not installed
    rehearsal = Rehearsal(config)
    # What the loop prints is the recipe as it is changed here.
    with tempfile.TemporaryDirectory(prefix="hf-vit-") as folder, redirect_stdout(StringIO()):
        try:
            train(rehearsal.changed(folder), course=rehearsal)
        except Over:
            pass
        except Interrupted as stop:
            raise Interrupted(stop.exit_code - 128, "Stopped; a dry run leaves nothing behind.") from None
    accelerator.end_training()
    return rehearsal.cost if accelerator.is_main_process else None


# ------------------------------------------------------------------------------------------------------- in words


def describe(cost: Cost, price_per_hour: float | None = None) -> list[str]:
    """Return a cost as lines for a terminal.

    Args:
        price_per_hour: Of all machines of the run together, in any currency.
    """
    height, width = cost.image_shape
    processes = f", {cost.processes} processes" if cost.processes > 1 else ""
    heading = (
        f"{cost.source}: {cost.train_images:,} training images at {height}x{width} pixels, batches of "
        f"{cost.batch_size:,}, {cost.precision}, {cost.hardware}{processes}"
    )
    return [heading, *(f"{name:>12}  {value}" for name, value in _rows(cost, price_per_hour))]


def _rows(cost: Cost, price_per_hour: float | None) -> list[tuple[str, str]]:
    frozen = f", {cost.frozen:,} frozen" if cost.frozen else ""
    held = [(cost.memory.weights, "weights"), (cost.memory.gradients, "gradients")]
    held += [(cost.memory.optimizer, "optimizer state"), (cost.memory.average, "averaged weights")]
    rows = [
        ("parameters", f"{cost.learned:,} learned{frozen}"),
        (
            "an image",
            f"{_flops(cost.forward_flops)} in evaluation, {_flops(cost.training_flops)} in training "
            "(a multiply-add is two)",
        ),
        ("memory", ", ".join(f"{_memory(number)} {name}" for number, name in held if number)),
    ]
    if cost.is_peak_of_gpu:
        rows.append(("peak memory", f"{_memory(cost.peak)} of a GPU's {_memory(cost.gpu_memory)}"))
    elif cost.peak:
        loading = f", without the {cost.num_workers} that load images" if cost.num_workers else ""
        rows.append(("peak memory", f"{_memory(cost.peak)} resident in a process{loading}"))
    evaluations = f"{cost.evaluations:,} evaluations of " if cost.evaluations > 1 else "an evaluation of "
    evaluations += "a length that nothing tells" if cost.evaluation_seconds is None else _time(cost.evaluation_seconds)
    epochs = cost.total_steps / steps_of(1, cost.train_images, cost.batch_size)
    rows += [
        (
            "images/s",
            f"{cost.images_per_second:,.0f} in {cost.measured_steps} steps of {cost.step_seconds:.3g} s, "
            f"{cost.data_wait_share:.0%} of it waiting for images; "
            f"{_flops(cost.training_flops * cost.images_per_second)}/s",
        ),
        ("run", f"{cost.total_steps:,} steps ({epochs:.3g} epochs), {evaluations}"),
        ("time", f"{_time(cost.seconds)}: {_share_of_time(cost)}"),
    ]
    left = cost.seconds_from(cost.done_steps)
    if cost.done_steps:
        rows.append(("time left", f"{_time(left)}: the run in output_dir has done {cost.done_steps:,} steps"))
    if price_per_hour is not None:
        of_left = f", {left / 3600 * price_per_hour:,.2f} for what is left" if cost.done_steps else ""
        rows.append(("price", f"{cost.seconds / 3600 * price_per_hour:,.2f}{of_left} (at {price_per_hour:g} an hour)"))
    return rows


def _share_of_time(cost: Cost) -> str:
    parts = [f"{_time(cost.start_seconds)} to start", f"{_time(cost.total_steps * cost.step_seconds)} training"]
    if cost.evaluation_seconds is None:
        return ", ".join([*parts, "evaluating and saving come on top"])
    return ", ".join([*parts, f"{_time(cost.evaluations * cost.evaluation_seconds)} evaluating; saving comes on top"])


def _time(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.3g} s"


def _memory(number: int) -> str:
    for power, name in ((3, "GiB"), (2, "MiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:,.1f} {name}"
    return f"{number / 1024:.1f} KiB"


def _flops(number: float) -> str:
    for power, name in ((5, "P"), (4, "T"), (3, "G")):
        if number >= 1000**power:
            return f"{number / 1000**power:.3g} {name}FLOP"
    return f"{number / 1e6:.3g} MFLOP"
