"""The dry run: measure what a run needs before it starts, in parameters, FLOPs, memory, time and money.

A dry run is the run itself, with the same loop, in a temporary folder: a few warm-up steps, some measured steps, and
some batches of an evaluation, fewer of them if they are slow. If data is cached in memory, only a part is read.
Loaders prefetch batches, and many of them while a model is compiled. The prefetched batches are discarded before the
measurement, so that the measured speed is one that the loader can sustain.

FLOPs are those of the model's matrix products and convolutions as torch counts them (`torch.utils.flop_counter`), two
per multiply-add. Recomputation by gradient checkpointing and fused attention is not counted.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..data.labelled import ImageData
from ..data.orders import READ_AHEAD
from ..evaluation.flops import count_flops, count_parameters
from ..system.machine import machine, peak_memory, precision_name
from ..system.stopping import Interrupted
from ..system.texts import counted, shortened
from .checkpointing import CheckpointFolder, load_state
from .loop import train
from .lora import add_low_rank_updates
from .parallel import build_accelerator
from .recipe import TrainConfig
from .run import CHECKPOINTS, Plan, Run, check_output_dir, data_of, resolved, with_values_of

WARM_UP, MEASURED = 3, 10  # steps
AHEAD = 2  # batches that a worker prefetches, DataLoader's default
SECONDS = 20.0  # to measure steps, and again to measure an evaluation; at least two of each are measured
CACHED = 256  # images of a split that are cached
LONG_ENOUGH, NEVER = 10_000, 10**9  # steps or epochs
BYTES = ("B", "KiB", "MiB", "GiB")
FLOP = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")


# ------------------------------------------------------------------------------------------------- the measurements


@dataclass(frozen=True)
class Cost:
    """What a run needs.

    Attributes:
        source: Name of the data.
        image_shape: (height, width) in pixels.
        precision: As in a recipe.
        learned, frozen: Numbers of parameters.
        forward_flops: FLOPs per image in evaluation.
        training_flops: FLOPs per image in training, forward and backward.
        memory: Bytes that stay allocated between steps in one process, by use.
        peak: Peak memory in bytes, of the process that needed most; 0 if unknown.
        is_peak_of_gpu: Whether `peak` is torch's memory on a GPU, not resident memory.
        gpu_memory: Bytes of memory of a GPU; 0 without one.
        measured_steps: Number of steps over which the speed was measured.
        step_seconds: Seconds per step, including waiting for images.
        data_wait_share: Share of this time spent waiting, in the process that waited longest.
        start_seconds: Seconds until the first step, for reading data, building and compiling.
        evaluation_seconds: Seconds per evaluation; `None` if the number of images is unknown.
        total_steps, done_steps: Steps of the run, and steps that a run in `output_dir` has done already.
        eval_every: Steps between evaluations.
        train_images: Images per epoch.
        batch_size: Images per step, over all processes.
        processes, num_workers: Training processes, and data loader processes for each.
        hardware: Description of the machine.
        unreadable: Names of images that were read and are broken.
        estimated: What the cost rests on, by name, if it was estimated for a GPU and not measured.
    """

    source: str
    image_shape: tuple[int, int]
    precision: str
    learned: int
    frozen: int
    forward_flops: int
    training_flops: int
    memory: dict[str, int]
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
    unreadable: list[str] = field(default_factory=list)
    estimated: dict[str, str] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.step_seconds

    @property
    def evaluations(self) -> int:
        return self.evaluations_from(0)

    @property
    def seconds(self) -> float:
        """Duration of the complete run."""
        return self.seconds_from(0)

    def evaluations_from(self, done: int) -> int:
        """Return the number of evaluations after step `done`; a run always ends with one."""
        return math.ceil(self.total_steps / self.eval_every) - min(done, self.total_steps - 1) // self.eval_every

    def seconds_from(self, done: int) -> float:
        """Return the duration of a run that resumes after step `done`, without saving."""
        evaluating = self.evaluations_from(done) * (self.evaluation_seconds or 0.0)
        return self.start_seconds + (self.total_steps - done) * self.step_seconds + evaluating


def count_memory(run: Run) -> dict[str, int]:
    """Return the bytes that stay allocated in this process; for a sharded model, the bytes of its shards."""
    state, parameters = run.state, list(run.state.model.parameters())
    optimizer = [value for values in state.optimizer.state.values() for value in values.values()]
    return {
        "weights": _bytes_of([*parameters, *state.model.buffers()]),
        "gradients": _bytes_of(parameter for parameter in parameters if parameter.requires_grad),
        "optimizer state": _bytes_of(value for value in optimizer if isinstance(value, Tensor)),
        "averaged weights": _bytes_of(average for _, average in state.average.pairs),
    }


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def evaluation_length(data: ImageData, eval_fraction: float) -> int | None:
    """Return the number of evaluation images, estimated if they are held out from a stream; `None` if unknown."""
    if hasattr(data.evaluation, "__len__"):
        return len(data.evaluation)
    if data.eval_split == "held out":
        return round(data.train_length * eval_fraction / (1 - eval_fraction))
    stated = (data.evaluation.info.splits or {}).get(str(data.evaluation.split))
    return stated.num_examples or None if stated else None


# ------------------------------------------------------------------------------------------------------ the dry run


class Measured(Exception):
    """Ends a dry run when everything is measured."""


class Rehearsal:
    """The steps of a dry run: passed to `train`, it measures some steps and an evaluation, then raises `Measured`.

    Attributes:
        measured_steps: `MEASURED` or more, a number for which every worker loads equally often: workers start
            together, so their batches come in bursts. Fewer if they took more than `SECONDS`.
        cost: The cost of the run, once it is measured.
    """

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        self.config, self.data = config, data
        workers, parts = config.num_workers, config.accumulation_steps
        batches = max(MEASURED * parts, AHEAD * workers)
        if workers:
            batches = math.ceil(batches / workers) * workers
        self.measured_steps = math.ceil(batches / parts)
        self.cost: Cost | None = None
        self.began = time.perf_counter()

    def changed(self, folder: str) -> TrainConfig:
        """Return the recipe of the dry run: that of the run, except for its output files and their folder."""
        config = self.config
        return replace(
            config,
            output_dir=folder,
            resume="auto",
            tracker="none",
            push_to_hub=None,
            # The dry run must not reach its end, and a longer schedule starts in the same way.
            epochs=max(config.epochs, LONG_ENOUGH),
            max_steps=config.max_steps and max(config.max_steps, LONG_ENOUGH),
            eval_every=NEVER,
            save_every=NEVER,
            log_every=NEVER,
            sampling="shuffled",
            teacher_cache=None,
            class_weights="none",  # a part of the data may lack classes
        )

    def sample(self) -> ImageData:
        """Return the data, or of data that is cached in memory a part, since filling the cache may take minutes."""
        data, most = self.data, max(CACHED, self.config.batch_size)
        if data.is_stream or self.config.cache == "none":
            return data
        train, evaluation = (
            split.select([index * len(split) // most for index in range(most)]) if len(split) > most else split
            for split in (data.train, data.evaluation)
        )
        return replace(data, train=train, evaluation=evaluation, train_length=len(train))

    def __call__(self, run: Run) -> Iterator[int]:
        run.signals.has_begun = False  # there is nothing to save: a signal ends the dry run at once
        steps, throughput = iter(range(run.plan.total_steps)), run.state.throughput
        batches = self._eval_batches(run)
        run.bar.total = WARM_UP + self.measured_steps + 1 + batches
        run.bar.refresh()
        yield next(steps)  # allocates memory, and may compile
        _synchronize(run)
        started = time.perf_counter()
        yield next(steps)
        _synchronize(run)
        affordable = max(2, int(SECONDS / _slowest(run, time.perf_counter() - started)))
        warm_up = WARM_UP if affordable > self.measured_steps else 2
        self.measured_steps = min(self.measured_steps, affordable)
        run.bar.total = warm_up + self.measured_steps + 1 + batches
        yield from islice(steps, warm_up - 2)
        _synchronize(run)
        started = time.perf_counter() - self.began

        prefetched = run.loader.num_workers * AHEAD
        if run.data.is_stream:
            prefetched += math.ceil(READ_AHEAD / run.loader.batch_sampler.batch_size)
        for _ in range(prefetched):
            next(run.batches)
        throughput.lap()
        before = replace(throughput)
        yield from islice(steps, self.measured_steps)
        _synchronize(run)
        throughput.lap()
        run.state.mean_losses()  # raises an error if one is not finite
        run.state.broken.gather()
        seconds = throughput.training_seconds - before.training_seconds
        wait_share = (throughput.waited_seconds - before.waited_seconds) / seconds
        step_seconds = seconds / self.measured_steps
        starting = max(0.0, started - warm_up * step_seconds) + self._rest_of_cache(run)
        self.cost = self._cost(run, starting, step_seconds, wait_share)
        raise Measured

    def _rest_of_cache(self, run: Run) -> float:
        """Return the seconds that it takes to cache the images that the dry run does not read."""
        seconds = run.images.cache_seconds
        return seconds * (self.data.train_length / run.data.train_length - 1) if seconds else 0.0

    def _cost(self, run: Run, starting: float, step_seconds: float, wait_share: float) -> Cost:
        config, accelerator, device = self.config, run.accelerator, run.accelerator.device
        evaluation_seconds = self._evaluate(run)
        own = torch.tensor([peak_memory(device), wait_share], device=device)
        peak, wait_share = accelerator.gather(own).view(-1, 2).amax(dim=0).tolist()
        learned, frozen = count_parameters(run.model)
        forward_flops, training_flops = count_flops(run.model, partial(twin_of, run))
        plan, is_gpu = Plan.of(config, self.data.train_length), device.type == "cuda"
        return Cost(
            source=run.data.name,
            image_shape=run.model.config.image_shape,
            precision=precision_name(accelerator.mixed_precision),
            learned=learned,
            frozen=frozen,
            forward_flops=forward_flops,
            training_flops=round(run.task.passes * training_flops),
            memory=count_memory(run),
            peak=round(peak),
            is_peak_of_gpu=is_gpu,
            gpu_memory=torch.cuda.get_device_properties(device).total_memory if is_gpu else 0,
            measured_steps=self.measured_steps,
            step_seconds=step_seconds,
            data_wait_share=wait_share,
            start_seconds=starting,
            evaluation_seconds=evaluation_seconds,
            total_steps=plan.total_steps,
            done_steps=_done_steps(config) if accelerator.is_main_process else 0,
            eval_every=plan.eval_every,
            train_images=self.data.train_length,
            batch_size=config.batch_size,
            processes=accelerator.num_processes,
            num_workers=run.loader.num_workers,
            hardware=machine(),
            unreadable=sorted({name for names in run.state.broken.names.values() for name in names}),
        )

    def _eval_batches(self, run: Run) -> int:
        """Return the number of evaluation batches to measure."""
        return max(MEASURED, 3 * max(1, run.eval_loader.num_workers))

    def _evaluate(self, run: Run) -> float | None:
        """Return the seconds of one evaluation, extrapolated from some batches."""
        marks: list[float] = []

        def evaluate(number: int) -> float:
            began = time.perf_counter()
            marks.clear()
            _, unreadable, _ = run.task.evaluate(run.state.model, batches(number), run.accelerator, run.to_model)
            run.state.broken.add("evaluation", unreadable)
            return time.perf_counter() - began

        def batches(number: int) -> Iterator[Any]:
            for batch in islice(run.eval_loader, number):
                yield batch
                marks.append(time.perf_counter())
                run.bar.update()

        with run.state.average.in_place():
            first = evaluate(1)  # may compile the model
            number = min(self._eval_batches(run), max(2, int(SECONDS / _slowest(run, first))))
            seconds = evaluate(number)
        run.bar.total = run.bar.n  # there may be fewer batches
        run.bar.refresh()
        images = evaluation_length(self.data, self.config.eval_fraction)
        if images is None:
            return seconds if len(marks) < number else None
        order: Any = run.eval_loader.batch_sampler
        left = math.ceil(images / (order.batch_size * order.processes)) - len(marks)
        if left <= 0:
            return seconds
        # The first batches of all workers come together, after the time it takes to start the workers.
        workers = max(1, run.eval_loader.num_workers)
        known = len(marks) > workers
        each = (marks[-1] - marks[workers - 1]) / (len(marks) - workers) if known else seconds / len(marks)
        return seconds + left * each


def _slowest(run: Run, seconds: float) -> float:
    """Return the largest of the seconds that processes measured, by which all of them decide alike."""
    return max(1e-6, float(run.accelerator.gather(torch.tensor([seconds], device=run.accelerator.device)).max()))


def twin_of(run: Run, model_config: Any) -> Any:
    """Return a model with the parameters of the run's."""
    model = run.task.model_class(model_config)
    return add_low_rank_updates(model, run.config.lora_rank) if run.config.trained == "lora" else model


def _synchronize(run: Run) -> None:
    if run.accelerator.device.type != "cpu":
        torch.accelerator.synchronize()


def _done_steps(config: TrainConfig) -> int:
    """Return the number of steps of the run in `output_dir` that would be resumed."""
    newest = _newest(config)
    return int(newest.name.removeprefix("step-")) if newest is not None else 0


def _newest(config: TrainConfig) -> Path | None:
    checkpoints = CheckpointFolder(Path(config.output_dir) / CHECKPOINTS, config.keep_checkpoints)
    return checkpoints.newest(lambda message: None) if config.resume == "auto" else None


def rehearse(config: TrainConfig, steps_of: Callable[..., Rehearsal] = Rehearsal) -> Cost | None:
    """Measure what a run needs, on all processes that a launcher started, and leave no files.

    Args:
        config: The recipe.
        steps_of: Returns the steps of the dry run, from the recipe and its data.

    Returns:
        The cost of the complete run; `None` on every process but the first.

    Raises:
        Interrupted: If SIGINT, SIGTERM or SIGHUP came.
        ValueError, FloatingPointError: As for `train`.
    """
    check_output_dir(config)
    accelerator = build_accelerator(config)  # checks the tracker, which the dry run does not start
    if config.auto and (newest := _newest(config)) is not None:
        config = with_values_of(config, load_state(newest)["identity"])
    with accelerator.main_process_first():  # the other processes read what the first one has cached
        data = data_of(config)
    if accelerator.is_main_process:
        for note in data.notes:
            tqdm.write(note)
    config = resolved(config, data, accelerator)
    rehearsal = steps_of(config, data)
    # The run prints what it learns from, which is not all of the user's data.
    with tempfile.TemporaryDirectory(prefix="hf-vit-") as folder, redirect_stdout(StringIO()):
        try:
            with suppress(Measured):
                train(rehearsal.changed(folder), steps=rehearsal, data=rehearsal.sample())
        except Interrupted as stop:
            raise Interrupted(stop.exit_code - 128, "Stopped; a dry run leaves no files.", can_resume=False) from None
    accelerator.end_training()
    return rehearsal.cost if accelerator.is_main_process else None


# ------------------------------------------------------------------------------------------------------- the report


def describe(cost: Cost, price_per_hour: float | None = None) -> list[str]:
    """Return a cost as lines for a terminal.

    Args:
        price_per_hour: Price of all machines of the run together, in any currency.
    """
    height, width = cost.image_shape
    processes = f", {cost.processes} processes" if cost.processes > 1 else ""
    heading = (
        f"{cost.source}: {cost.train_images:,} training images at {height}x{width} pixels, batch size "
        f"{cost.batch_size:,}, {cost.precision}, {cost.hardware}{processes}"
    )
    return [heading, *(f"{name:>12}  {value}" for name, value in _rows(cost, price_per_hour))]


def _rows(cost: Cost, price_per_hour: float | None) -> Iterator[tuple[str, str]]:
    training_flops, left = cost.training_flops, cost.seconds_from(cost.done_steps)
    yield "parameters", f"{cost.learned:,} trainable" + (f", {cost.frozen:,} frozen" if cost.frozen else "")
    flops = f"{_amount(cost.forward_flops, FLOP)} in evaluation, {_amount(training_flops, FLOP)} in training"
    yield "per image", f"{flops} (a multiply-add counts as two)"
    held = (f"{_amount(number, BYTES)} {use}" for use, number in cost.memory.items() if number)
    yield "memory", ", ".join(held)
    if cost.is_peak_of_gpu:
        yield "peak memory", f"{_amount(cost.peak, BYTES)} of {_amount(cost.gpu_memory, BYTES)} on a GPU"
    elif cost.peak:
        loaders = f", without its {cost.num_workers} data loader processes" if cost.num_workers else ""
        yield "peak memory", f"{_amount(cost.peak, BYTES)} resident per process{loaders}"
    speed = f"{_amount(training_flops * cost.images_per_second, FLOP)}/s"
    if cost.estimated:
        yield "images/s", f"{cost.images_per_second:,.0f} in steps of {cost.step_seconds:.3g} s; {speed}"
    else:
        yield (
            "images/s",
            f"{cost.images_per_second:,.0f} over {cost.measured_steps} steps of {cost.step_seconds:.3g} s, "
            f"{cost.data_wait_share:.0%} of it waiting for images; {speed}",
        )
    epochs = cost.total_steps / max(1, cost.train_images // cost.batch_size)
    unknown = cost.evaluation_seconds is None
    evaluation = "unknown duration" if unknown else _duration(cost.evaluation_seconds or 0.0)
    evaluations = f"{counted(cost.evaluations, 'evaluation')} of {evaluation}"
    yield "run", f"{cost.total_steps:,} steps ({epochs:.3g} epochs), {evaluations}"
    parts = f"{_duration(cost.total_steps * cost.step_seconds)} training"
    parts = parts if cost.estimated else f"{_duration(cost.start_seconds)} start, {parts}"
    if unknown:
        parts += ", plus evaluating and saving"
    else:
        parts += f", {_duration(cost.evaluations * (cost.evaluation_seconds or 0.0))} evaluating, plus saving"
    yield "time", f"{_duration(cost.seconds)}: {parts}"
    if cost.unreadable:
        yield "unreadable", f"{counted(len(cost.unreadable), 'image')}: {shortened(cost.unreadable)}"
    if cost.done_steps:
        yield "time left", f"{_duration(left)}: the run in output_dir has done {cost.done_steps:,} steps"
    if price_per_hour is not None:
        rest = f", {left / 3600 * price_per_hour:,.2f} for the rest" if cost.done_steps else ""
        yield "price", f"{cost.seconds / 3600 * price_per_hour:,.2f}{rest} (at {price_per_hour:g} per hour)"
    yield from cost.estimated.items()


def _duration(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.3g} s"


def _amount(number: float, units: tuple[str, ...]) -> str:
    base, power = (1024 if units is BYTES else 1000), 0
    while number >= base and power < len(units) - 1:
        number, power = number / base, power + 1
    return f"{number:{',.1f' if units is BYTES else '.3g'}} {units[power]}"
