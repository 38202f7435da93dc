"""A training run: how it is built from a recipe, and what it does between steps."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from ..data.augmentation import AUGREG_MIXUP, build_augmentation
from ..data.images import EvaluationImages, TrainingImages, derive_seed, normalize
from ..data.labelled import RECIPE, ImageData, load_data
from ..data.loaders import evaluation_loader
from ..data.orders import BatchDivision, steps_of
from ..evaluation.metrics import ImageResults
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..system.disk import writing
from ..system.stopping import EvaluationStopped, Interrupted, StopSignals
from .checkpointing import CheckpointFolder, load_state
from .optim import Schedule, build_optimizer, parameter_groups
from .parallel import counts_in_evaluation, data_parts, shard_matrices, start_tracker, whole_weights
from .recipe import FREE_TO_CHANGE, TrainConfig
from .state import AveragedWeights, BrokenImages, RunLog, TrainingState
from .tasks import TASKS, build_model

METRICS, TIMING, LOG, CHECKPOINTS = "metrics.json", "timing.json", "log.jsonl", "checkpoints"
# Called with the number of completed steps and a function that writes the model into a folder.
Publish = Callable[[int, Callable[[Path], None]], None]


@dataclass(frozen=True)
class Plan:
    """When a run does what, in steps."""

    total_steps: int
    steps_per_epoch: int
    eval_every: int
    save_every: int
    push_every: int
    schedule: Schedule

    @classmethod
    def of(cls, config: TrainConfig, train_length: int) -> "Plan":
        """Return the plan of a recipe for a number of training images."""
        steps_in = partial(steps_of, length=train_length, batch_size=config.batch_size)
        total_steps, epoch = config.max_steps or steps_in(config.epochs), steps_in(1)
        warmup, cooldown = (
            steps_in(epochs) if epochs else 0 for epochs in (config.warmup_epochs, config.cooldown_epochs)
        )
        warmup = warmup if config.warmup_steps is None else config.warmup_steps
        schedule = Schedule(config.schedule, total_steps, min(warmup, total_steps), cooldown)
        save_every, push_every = config.save_every or epoch, config.push_every or epoch
        return cls(total_steps, epoch, steps_in(config.eval_every), save_every, push_every, schedule)


def data_of(config: TrainConfig) -> ImageData:
    """Load the training and evaluation images of a recipe."""
    names = (
        *("train_split", "eval_split", "image_column", "label_column", "eval_fraction", "train_share"),
        *("train_repeats", "split_seed", "streaming", "train_images"),
    )
    options = {name: getattr(config, name) for name in names}
    return load_data(config.data, needs_labels=TASKS[config.task].needs_labels, **options)


class Run:
    """A run of a recipe, from its start to its end; when it has finished, `output_dir` holds the same as files.

    Attributes:
        config: The recipe.
        data, task, processor: What the run learns from, its objective, and the image processor.
        model: The model, without what Accelerate wraps around it.
        plan: When to do what, in steps.
        division: How a batch is divided over accumulated parts and processes.
        to_model: Normalizes uint8 pixels for the model.
        state: Everything that checkpoints save.
        loader, batches, bar: Training batches and the progress bar, set by the loop.
        predictions: Results of the last evaluation, for a task with labels.
        metrics: Results that are the same whenever the run is repeated, once it has finished.
        timing: Results that are not.
    """

    loader: Any
    batches: Iterator[Any]
    bar: tqdm
    metrics: dict[str, Any]
    timing: dict[str, float]

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        signals: StopSignals,
        build: Callable[..., Any] = build_model,
        data: ImageData | None = None,
    ) -> None:
        """Build data, task, model, optimizer, loaders and an empty state, at step 0."""
        if config.mixup is None:  # the saved recipe states the value that the augmentation implies
            config = replace(config, mixup=AUGREG_MIXUP.get(config.augmentation, 0.0))
        self.config, self.accelerator, self.signals = config, accelerator, signals
        self.say: Callable[[str], None] = tqdm.write if accelerator.is_main_process else lambda message: None
        self.is_main_process, self.output_dir = accelerator.is_main_process, Path(config.output_dir)
        self.predictions: ImageResults | None = None
        self.shown: dict[str, str] = {}  # by the progress bar
        with accelerator.main_process_first():  # the other processes read what the first one has cached
            self.data = data = data or data_of(config)
        self.plan = Plan.of(config, data.train_length)

        # All processes draw the same initial weights: the seed does not depend on the rank.
        torch.manual_seed(derive_seed(config.seed, "weights"))
        self.task = TASKS[config.task](config, data)
        model, self.processor = build(config, self.task)
        self.model_class = type(model)  # FSDP2 changes the class of the model itself
        model = shard_matrices(model, accelerator)
        if config.gradient_checkpointing:
            # transformers renamed the method; the oldest version that we support has the old name only.
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
            fill=self.processor.image_mean,
        )
        cache = accelerator.device if config.cache == "device" else config.cache
        self.to_model = partial(normalize, processor=self.processor)
        self.images = TrainingImages(
            data.train, data.columns, self.processor, augmentation, config.seed, cache, config.shorter_side
        )
        eval_images = EvaluationImages(data.evaluation, data.columns, self.processor, cache)
        self.division = BatchDivision(config.accumulation_steps, *data_parts(accelerator))
        eval_batch = max(1, config.batch_size // (self.division.accumulation_steps * self.division.processes))
        self.eval_loader = evaluation_loader(
            eval_images,
            eval_batch,
            config.num_workers,
            *self.division[1:],
            is_counted=counts_in_evaluation(accelerator),
        )

        model, optimizer = accelerator.prepare(model, optimizer)
        self.model = accelerator.unwrap_model(model)
        start_tracker(accelerator, config)
        self.checkpoints = CheckpointFolder(self.output_dir / CHECKPOINTS, config.keep_checkpoints)
        # A stream does not tell how many evaluation images it has.
        eval_length = len(data.evaluation) if hasattr(data.evaluation, "__len__") else data.train_length
        limits = {"training": config.max_broken * data.train_length, "evaluation": config.max_broken * eval_length}
        self.state = TrainingState(
            accelerator=accelerator,
            model=model,
            optimizer=optimizer,
            average=AveragedWeights(self.model, config.ema_decay),
            log=RunLog(self.output_dir / LOG, accelerator),
            broken=BrokenImages(limits, self.say),
            identity={**asdict(config), "training images": data.train_length},
        )

    def resume(self) -> None:
        """Load the newest complete checkpoint if there is one; then write the recipe and the log of this run."""
        output_dir, accelerator = self.output_dir, self.accelerator
        newest = self.checkpoints.newest(self.say) if accelerator.is_main_process else None
        [checkpoint] = broadcast_object_list([newest])  # a damaged file must not make processes disagree
        if checkpoint is None:
            self.say(self.config.to_yaml())
        elif not checkpoint.is_dir():
            raise ValueError(f"{checkpoint} does not exist here: output_dir must be on a disk shared by all machines.")
        else:
            saved = load_state(checkpoint)
            _check_same_run(self.state.identity, saved["identity"], output_dir)
            saved["model"] = self.model_class.from_pretrained(checkpoint).state_dict()
            self.state.load_state_dict(saved)
            if saved["processes"] != accelerator.num_processes:
                self.say(
                    f"Resuming on {accelerator.num_processes} processes a run that used {saved['processes']}. The "
                    "result will not be bit for bit that of the uninterrupted run: sums are rounded in another order, "
                    "dropout, mixing and masks draw other numbers, and a stream is divided differently."
                )
            self.say(f"Resuming from {checkpoint}: {self.state.step} of {self.plan.total_steps} steps are done.")
        if accelerator.is_main_process:
            with writing("the recipe", output_dir / RECIPE):
                (output_dir / RECIPE).write_text(self.config.to_yaml(), encoding="utf-8")
        self.state.log.rewrite()
        accelerator.wait_for_everyone()

    def evaluate(self, is_logged: bool = True) -> None:
        """Evaluate the averaged weights. If a signal comes, save first, so that the next run starts with this."""
        state = self.state
        try:
            with state.throughput.paused(), state.average.in_place():
                batches = self.signals.heeded(self.eval_loader, self.accelerator)
                results = self.task.evaluate(state.model, batches, self.accelerator, self.to_model)
        except EvaluationStopped as stopped:
            if is_logged:
                state.is_evaluation_due = True
                self.save()
            self.interrupt(stopped.args[0])
        metrics, unreadable, self.predictions = results
        state.is_evaluation_due = False
        state.broken.add("evaluation", unreadable)
        if is_logged:
            epoch = state.step / self.plan.steps_per_epoch
            state.log.add(state.step, epoch=epoch, **{f"eval_{name}": value for name, value in metrics.items()})
            if "accuracy" in metrics:
                self.shown["accuracy"] = f"{metrics['accuracy']:.1%}"

    def save(self) -> None:
        """Write a checkpoint; all processes take part, the main one writes."""
        saved = self.state.state_dict()
        weights = saved.pop("model")
        if self.accelerator.is_main_process:
            self.checkpoints.save(self.state.step, saved, partial(save_model, self.model, weights, self.processor))
        self.accelerator.wait_for_everyone()

    def publish(self, publish: Publish) -> None:
        """Hand the averaged weights to `publish`, on the main process."""
        with self.state.average.in_place():
            weights = whole_weights(self.state.model)
            if self.accelerator.is_main_process:
                publish(self.state.step, partial(save_model, self.model, weights, self.processor))

    def interrupt(self, signum: int) -> NoReturn:
        steps = f"step {self.state.step} of {self.plan.total_steps}"
        name = signal.Signals(signum).name
        raise Interrupted(signum, f"Stopped by {name} after {steps}; saved in {self.checkpoints.folder}.")

    def finish(self) -> None:
        """Write the final model, which is the averaged one if there is an average, and the metrics."""
        state, output_dir = self.state, self.output_dir
        state.throughput.lap()
        self.timing = state.throughput.summary()
        self.metrics = {
            **{name: value for name, value in state.log.rows[-1].items() if name.startswith("eval_")},
            "train_images": self.data.train_length,
            "steps": self.plan.total_steps,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "precision": self.accelerator.mixed_precision,
            "processes": self.accelerator.num_processes,
            "broken_images": sorted({name for names in state.broken.names.values() for name in names}),
        }
        state.average.swap()
        weights = whole_weights(state.model)
        if self.is_main_process:
            with writing("the trained model; the checkpoints are intact", output_dir):
                save_model(self.model, weights, self.processor, output_dir)
                for name, values in ((METRICS, self.metrics), (TIMING, self.timing)):
                    (output_dir / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        self.accelerator.wait_for_everyone()
        self.model.eval()

    @property
    def log(self) -> list[dict[str, Any]]:
        """The rows of the log."""
        return self.state.log.rows


def check_output_dir(config: TrainConfig) -> None:
    """Raise `ValueError` if the run would overwrite the model that it starts from."""
    if config.model is not None and Path(config.model).resolve() == Path(config.output_dir).resolve():
        raise ValueError(f"{config.output_dir} holds the model to start from: choose another --output-dir.")


def _check_same_run(asked: dict[str, Any], saved: dict[str, Any], output_dir: Path) -> None:
    different = [
        f"{name} {saved.get(name)!r} -> {value!r}"
        for name, value in asked.items()
        if name not in FREE_TO_CHANGE and saved.get(name) != value
    ]
    if different:
        raise ValueError(
            f"{output_dir} holds a run with another recipe or other data ({'; '.join(different)}): choose another "
            "--output-dir, or start again there with --resume never."
        )


def save_model(model: Any, weights: dict[str, Tensor], processor: HFViTImageProcessor, folder: Path) -> None:
    """Write a model and its image processor into a folder."""
    has_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # a bar per checkpoint would interrupt the bar of the run
    processor.save_pretrained(folder)  # before the model, which adds a default processor where there is none
    model.save_pretrained(folder, state_dict=weights)
    if has_bar:
        transformers_logging.enable_progress_bar()


def clear_output(output_dir: Path) -> None:
    """Remove the files of an earlier run, and nothing else."""
    shutil.rmtree(output_dir / CHECKPOINTS, ignore_errors=True)
    for name in (LOG, METRICS, TIMING, RECIPE):
        (output_dir / name).unlink(missing_ok=True)
