"""The training loop: one function, `train`, from a recipe to a folder that can be pushed.

Every random number of a run follows from the seed and from where the run stands: initial weights from the seed; the
order of images from (seed, epoch); augmentation from (seed, epoch, image); mixing, masks, dropout and the like from
(seed, step). The learning rate follows from the step. So the state of a run is the weights, their average, the
optimizer, the step and what was logged, and a run that was stopped goes on to the very bits of one that was not.
"""

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from ..data.augmentation import AUGREG_MIXUP, build_augmentation
from ..data.images import EvaluationImages, TrainingImages, derive_seed, normalize
from ..data.labelled import RECIPE, ImageData, load_data
from ..data.loaders import evaluation_loader, naming_dead_workers, training_loader
from ..data.orders import BatchDivision, StreamOrder, steps_of, training_order
from ..evaluation.metrics import ImageResults
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..system.disk import writing
from ..system.locking import alone_as_one
from ..system.stopping import EvaluationStopped, Interrupted, StopSignals
from .checkpointing import CheckpointFolder, load_state
from .optim import Schedule, build_optimizer, parameter_groups
from .parallel import (
    build_accelerator,
    data_parts,
    divide_matrices,
    load_optimizer_state,
    load_weights,
    optimizer_state,
    speaks_for_part,
    start_tracker,
    whole_weights,
)
from .recipe import FREE_TO_CHANGE, TrainConfig
from .state import AveragedWeights, BrokenImages, Pace, RunLog
from .tasks import TASKS, build_model

METRICS, TIMING, LOG, CHECKPOINTS = "metrics.json", "timing.json", "log.jsonl", "checkpoints"
# Called with a step and a function that writes the model into a folder.
Publish = Callable[[int, Callable[[Path], None]], None]


# --------------------------------------------------------------------------------------------------- the parts


@dataclass
class Running:
    """What a run works with when its loop begins. Which of `steps` it takes is for its `Course` to say."""

    steps: range
    accelerator: Accelerator
    task: Any
    model: Any
    optimizer: Any
    average: AveragedWeights
    data: ImageData
    loader: Any
    batches: Iterator[Any]
    eval_loader: Any
    to_model: Callable[[Tensor], Tensor]
    pace: Pace
    bar: tqdm
    signals: StopSignals


Course = Callable[[Running], Iterable[int]]


def to_the_end(run: Running) -> Iterable[int]:
    """Take every step that is not done yet."""
    return run.steps


@dataclass
class Run:
    """What a finished run leaves in memory; `metrics`, `timing` and all else is in `output_dir` too.

    `metrics` holds figures that are the same whenever the run is repeated, `timing` those that are not. `predictions`
    are the last evaluation's, for a task with labels.
    """

    config: TrainConfig
    output_dir: Path
    model: Any
    processor: HFViTImageProcessor
    data: ImageData
    log: list[dict[str, Any]]
    metrics: dict[str, Any]
    timing: dict[str, float]
    predictions: ImageResults | None
    is_main_process: bool


# ---------------------------------------------------------------------------------------------------- the loop


def train(
    config: TrainConfig,
    publish: Publish | None = None,
    course: Course = to_the_end,
    build: Callable[[TrainConfig, Any], tuple[Any, HFViTImageProcessor]] = build_model,
) -> Run:
    """Train a model, and resume by itself what was stopped in `config.output_dir`.

    Args:
        config: The recipe.
        publish: Called every `push_every` steps, on the main process, with the step and a function that writes the
            model into a folder; must return soon.
        course: Gives the steps to take; what it does between them is no part of a step.
        build: Makes the model and the processor of its images from the recipe and the task; another than
            `build_model` compares other architectures under the same conditions.

    Raises:
        Interrupted: If SIGINT, SIGTERM or SIGHUP came: behind a checkpoint, or before the first step.
        ValueError: If the recipe does not fit the data, the machine, or the run that `output_dir` holds; or if
            another process is at work there.
        OSError: If something cannot be written, or another process of this run, or one that loads images, has ended.
        FloatingPointError: If the loss is not finite; names the step.
    """
    refuse_to_overwrite(config)
    with StopSignals() as signals:
        accelerator = build_accelerator(config)
        with alone_as_one(accelerator, Path(config.output_dir)), naming_dead_workers():
            return _train(config, publish, course, build, signals, accelerator)


def data_of(config: TrainConfig) -> ImageData:
    """Return the images of a recipe, to learn from and held out."""
    return load_data(
        config.data,
        train_split=config.train_split,
        eval_split=config.eval_split,
        image_column=config.image_column,
        label_column=config.label_column,
        eval_fraction=config.eval_fraction,
        train_share=config.train_share,
        train_repeats=config.train_repeats,
        split_seed=config.split_seed,
        streaming=config.streaming,
        train_images=config.train_images,
        needs_labels=TASKS[config.task].needs_labels,
    )


def _train(
    config: TrainConfig,
    publish: Publish | None,
    course: Course,
    build: Callable[..., Any],
    signals: StopSignals,
    accelerator: Accelerator,
) -> Run:
    # ---- build
    if config.mixup is None:
        config = replace(config, mixup=AUGREG_MIXUP.get(config.augmentation, 0.0))
    output_dir = Path(config.output_dir)
    parts = BatchDivision(config.accumulation_steps, *data_parts(accelerator))
    say: Callable[[str], None] = tqdm.write if accelerator.is_main_process else lambda message: None
    if config.resume == "never" and accelerator.is_main_process:
        _clear(output_dir)
    accelerator.wait_for_everyone()

    task_class = TASKS[config.task]
    with accelerator.main_process_first():  # the others read what the first one has cached
        data = data_of(config)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    task = task_class(config, data)
    model, processor = build(config, task)
    model_class = type(model)
    model = divide_matrices(model, accelerator)
    if config.gradient_checkpointing:
        # transformers has renamed it; its floor here knows the old name alone.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if config.compile:
        model.compile()
    groups = parameter_groups(model, config.weight_decay, config.layer_decay, config.position_lr_scale)
    optimizer = build_optimizer(config.optimizer, groups, config.learning_rate, config.betas, config.momentum)

    augmentation = build_augmentation(
        config.augmentation,
        model.config.image_shape,
        config.smallest_crop,
        color_jitter=config.color_jitter,
        erasing=config.erasing,
        fill=processor.image_mean,
    )
    cache = accelerator.device if config.cache == "device" else config.cache
    images = TrainingImages(data.train, data.columns, processor, augmentation, config.seed, cache, config.shorter_side)
    held_out = EvaluationImages(data.evaluation, data.columns, processor, cache)
    eval_batch = max(1, config.batch_size // (parts.accumulation_steps * parts.processes))
    eval_loader = evaluation_loader(
        held_out, eval_batch, config.num_workers, *parts[1:], is_counted=speaks_for_part(accelerator)
    )
    to_model = partial(normalize, processor=processor)

    steps_in = partial(steps_of, length=data.train_length, batch_size=config.batch_size)
    total_steps = length_of(config, data.train_length)
    eval_every = steps_in(config.eval_every)
    save_every = config.save_every or steps_in(1)
    push_every = config.push_every or steps_in(1)
    warmup, cooldown = (steps_in(n) if n else 0 for n in (config.warmup_epochs, config.cooldown_epochs))
    warmup = warmup if config.warmup_steps is None else config.warmup_steps
    schedule = Schedule(config.schedule, total_steps, min(warmup, total_steps), cooldown)

    # ---- prepare
    model, optimizer = accelerator.prepare(model, optimizer)
    trained = accelerator.unwrap_model(model)
    average = AveragedWeights(trained, config.ema_decay)

    # ---- resume
    checkpoints = CheckpointFolder(output_dir / CHECKPOINTS, config.keep_checkpoints)
    start_tracker(accelerator, config)
    log = RunLog(output_dir / LOG, accelerator)
    broken = BrokenImages(_limits(config.max_broken, data), say)
    done, pace = 0, Pace()
    pending: list[Tensor] = []  # losses that no line of the log holds yet
    unread: list[str] = []  # names of broken images that are not noted yet
    images_an_epoch: list[int] | None = None
    [checkpoint] = broadcast_object_list([checkpoints.newest(say) if accelerator.is_main_process else None])
    if checkpoint is not None and not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is not there: output_dir must be on a disk that all machines share.")
    state = {} if checkpoint is None else load_state(checkpoint)
    identity = {**asdict(config), "training images": data.train_length}
    if checkpoint is not None:
        _refuse_other_run(identity, state["identity"], output_dir)
        if state["average"] is not None:
            with average.in_place():
                load_weights(model, state["average"])
        load_weights(model, model_class.from_pretrained(checkpoint).state_dict())
        load_optimizer_state(model, optimizer, state["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        done, pace = state["step"], Pace(**state["pace"])
        pending.extend(state["pending"].to(accelerator.device))
        broken.names = state["broken"]
        if state["processes"] == accelerator.num_processes:
            images_an_epoch = state["images_an_epoch"][accelerator.process_index]
        else:
            say(
                f"Resuming with {accelerator.num_processes} processes what {state['processes']} began. What follows "
                "is no longer bit for bit the run that was stopped: sums are rounded in another order, dropout, "
                "mixing and masks draw other numbers, and a stream is divided in another way."
            )
        say(f"Resuming from {checkpoint}: {done} of {total_steps} steps are done.")
    else:
        say(config.to_yaml())
    if accelerator.is_main_process:
        with writing("the recipe", output_dir / RECIPE):
            (output_dir / RECIPE).write_text(config.to_yaml(), encoding="utf-8")
    log.restore(state.get("log", []))
    accelerator.wait_for_everyone()

    order = training_order(
        data,
        images,
        config.batch_size,
        config.seed,
        (done, total_steps),
        parts,
        config.shuffle_buffer,
        images_an_epoch,
    )

    def note_broken() -> None:
        broken.add("training", gather_object(unread))
        unread.clear()

    def save(step: int, is_evaluation_due: bool = False) -> None:
        # One dictionary holds all that is not the model: what is added here is resumed above.
        losses = _mean_over_processes(pending, accelerator)
        _refuse_nonfinite(losses, last_step=step)
        note_broken()
        weights, of_optimizer = whole_weights(model), optimizer_state(model, optimizer)
        averaged = None
        if config.ema_decay is not None:
            with average.in_place():
                averaged = whole_weights(model)
        read = list(order.images_per_epoch) if isinstance(order, StreamOrder) else None
        of_processes = gather_object([read])
        if accelerator.is_main_process:
            state = {
                "step": step,
                "is_evaluation_due": is_evaluation_due,
                "optimizer": of_optimizer,
                "average": averaged,
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "pending": losses.cpu(),
                "log": log.rows,
                "broken": broken.names,
                "images_an_epoch": of_processes,
                "identity": identity,
                "pace": asdict(pace),
                "processes": accelerator.num_processes,
            }
            checkpoints.save(step, state, partial(_save_model, trained, weights, processor))
        accelerator.wait_for_everyone()

    def interrupt(signum: int, step: int) -> NoReturn:
        name = signal.Signals(signum).name
        message = f"Stopped by {name} behind step {step} of {total_steps}; saved in {checkpoints.folder}."
        raise Interrupted(signum, message)

    def evaluate(step: int, is_logged: bool = True) -> ImageResults | None:
        """Evaluate behind `step`. If a signal comes meanwhile, save, so that the next run begins with that."""
        try:
            with pace.paused(), average.in_place():
                batches = signals.heeded(eval_loader, accelerator)
                figures, unreadable, predictions = task.evaluate(model, batches, accelerator, to_model)
        except EvaluationStopped as stopped:
            if is_logged:
                save(step, is_evaluation_due=True)
            interrupt(stopped.args[0], step)
        broken.add("evaluation", unreadable)
        if is_logged:
            log.add(step, epoch=step / steps_in(1), **{f"eval_{name}": value for name, value in figures.items()})
            shown.update({n: f"{figures[n]:.1%}" for n in ("accuracy",) if n in figures})
        return predictions

    # ---- loop
    signals.has_begun = True
    shown: dict[str, str] = {}
    predictions = evaluate(done) if state.get("is_evaluation_due") else None
    loader = training_loader(images, order, config.num_workers)
    batches = iter(loader)
    bar = tqdm(total=total_steps, initial=done, unit="step", disable=not accelerator.is_main_process)
    model.train()
    running = Running(
        range(done, total_steps),
        accelerator,
        task,
        model,
        optimizer,
        average,
        data,
        loader,
        batches,
        eval_loader,
        to_model,
        pace,
        bar,
        signals,
    )
    with bar:
        for step in course(running):
            is_last = step + 1 == total_steps
            epoch = (step + 1) / steps_in(1)

            # step
            seed = derive_seed(config.seed, "step", step, parts.process)
            torch.manual_seed(seed)  # of dropout and the like
            generator = torch.Generator().manual_seed(seed)  # of mixing and masks
            learning_rate = schedule.apply(optimizer, config.learning_rate, step)
            step_loss = torch.zeros((), device=accelerator.device)
            for _ in range(config.accumulation_steps):
                batch = pace.waiting(batches)
                unread += batch.pop("broken")
                batch = send_to_device(batch, accelerator.device, non_blocking=True)
                with accelerator.accumulate(model):
                    loss = task.loss(model, to_model(batch["pixel_values"]), batch["labels"], generator)
                    accelerator.backward(loss)
                step_loss += loss.detach() / config.accumulation_steps
            norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
            if accelerator.scaler is None:  # which passes over steps that overflow
                step_loss += 0 * _whole(norm)  # a gradient that is not finite shows in the loss of its step
            if config.on_nonfinite == "skip" and not accelerator.reduce(step_loss.clone()).isfinite():
                say(f"Skipped step {step + 1}: its loss or gradient is not finite.")
                log.add(step + 1, epoch=epoch, skipped=True)
                if accelerator.scaler is not None:  # it passes over the step, too, and scales less from now on
                    optimizer.step()
            else:
                optimizer.step()
                average.update()
                pending.append(step_loss)  # not read yet: to read a loss is to wait for the device
            optimizer.zero_grad()
            pace.images += config.batch_size
            bar.update()

            # log
            if (step + 1) % config.log_every == 0 or is_last:
                losses = _mean_over_processes(pending, accelerator)
                _refuse_nonfinite(losses, last_step=step + 1)
                pending.clear()
                pace.lap()
                if len(losses):
                    log.add(step + 1, epoch=epoch, loss=losses.mean().item(), learning_rate=learning_rate)
                    shown["loss"] = f"{losses.mean().item():.3f}"
                note_broken()
                speed = pace.figures()
                shown["lr"] = f"{learning_rate:.1e}"
                shown["images/s"] = f"{speed['images_per_second']:,.0f}"
                shown["data wait"] = f"{speed['data_wait_share']:.0%}"
                bar.set_postfix(shown, refresh=False)

            # evaluate
            if (step + 1) % eval_every == 0 or is_last:
                predictions = evaluate(step + 1)
                bar.set_postfix(shown)

            # save
            stop = 0 if is_last else signals.agreed(accelerator, step + 1)
            if (step + 1) % save_every == 0 or is_last or stop:
                with pace.paused():
                    save(step + 1)
            if publish is not None and (step + 1) % push_every == 0 and not is_last:
                with pace.paused(), average.in_place():
                    weights = whole_weights(model)
                    if accelerator.is_main_process:
                        publish(step + 1, partial(_save_model, trained, weights, processor))
            if stop:
                interrupt(stop, step + 1)

    # ---- finish
    if predictions is None and TASKS[config.task].needs_labels:  # every step was done before
        predictions = evaluate(total_steps, is_logged=False)
    pace.lap()
    metrics = {
        **{name: value for name, value in log.rows[-1].items() if name.startswith("eval_")},
        "train_images": data.train_length,
        "steps": total_steps,
        "parameters": sum(parameter.numel() for parameter in trained.parameters()),
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "broken_images": sorted({name for names in broken.names.values() for name in names}),
    }
    average.swap()  # what was measured is what is saved
    weights = whole_weights(model)
    if accelerator.is_main_process:
        with writing("the trained model; the checkpoints are intact", output_dir):
            _save_model(trained, weights, processor, output_dir)
            (output_dir / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
            (output_dir / TIMING).write_text(json.dumps(pace.figures(), indent=2) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    return Run(
        config,
        output_dir,
        trained.eval(),
        processor,
        data,
        log.rows,
        metrics,
        pace.figures(),
        predictions,
        accelerator.is_main_process,
    )


def length_of(config: TrainConfig, train_length: int) -> int:
    """Return the number of steps of a run with so many training images."""
    return config.max_steps or steps_of(config.epochs, train_length, config.batch_size)


def refuse_to_overwrite(config: TrainConfig) -> None:
    """Raise `ValueError` for a run that would write over the model that it begins from."""
    if config.model is not None and Path(config.model).resolve() == Path(config.output_dir).resolve():
        raise ValueError(f"{config.output_dir} holds the model to begin from: choose another --output-dir.")


def _mean_over_processes(losses: list[Tensor], accelerator: Accelerator) -> Tensor:
    """Return the losses of some steps as one float32 tensor, each the mean over the processes."""
    stacked = torch.stack(losses) if losses else torch.zeros(0, device=accelerator.device)
    if not losses or accelerator.num_processes == 1:
        return stacked
    # In float64 the mean of what is a mean already, from a checkpoint, is the same to the bit.
    return accelerator.reduce(stacked.double(), "mean").float()


def _whole(norm: Tensor) -> Tensor:
    """Return a norm as a plain tensor; of sharded gradients it is distributed."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _refuse_nonfinite(losses: Tensor, last_step: int) -> None:
    broken = (~losses.isfinite()).nonzero().flatten().tolist()
    if broken:
        step = last_step - len(losses) + 1 + broken[0]
        raise FloatingPointError(
            f"Step {step} is not finite, its loss or its gradient: the run stops, the checkpoints before it are "
            "good. Try a lower learning_rate, a longer warmup_epochs, precision: fp32, or on_nonfinite: skip."
        )


def _limits(share: float, data: ImageData) -> dict[str, float]:
    """Return how many images of each split may be broken; of a stream that is held out nobody knows the length."""
    evaluation = len(data.evaluation) if hasattr(data.evaluation, "__len__") else data.train_length
    return {"training": share * data.train_length, "evaluation": share * evaluation}


def _refuse_other_run(asked: dict[str, Any], saved: dict[str, Any], output_dir: Path) -> None:
    different = [
        f"{name} {saved.get(name)!r} -> {value!r}"
        for name, value in asked.items()
        if name not in FREE_TO_CHANGE and saved.get(name) != value
    ]
    if different:
        raise ValueError(
            f"{output_dir} holds a run of another recipe or other data ({'; '.join(different)}): choose another "
            "--output-dir, or start anew there with --resume never."
        )


def _save_model(model: Any, weights: dict[str, Tensor], processor: HFViTImageProcessor, folder: Path) -> None:
    has_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # a bar for the shards of every checkpoint would break up ours
    processor.save_pretrained(folder)  # before the model, which adds a processor where there is none
    model.save_pretrained(folder, state_dict=weights)
    if has_bar:
        transformers_logging.enable_progress_bar()


def _clear(output_dir: Path) -> None:
    """Remove what a run left, and nothing else that may lie there."""
    shutil.rmtree(output_dir / CHECKPOINTS, ignore_errors=True)
    for name in (LOG, METRICS, TIMING, RECIPE):
        (output_dir / name).unlink(missing_ok=True)
