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
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..data.audit import quick_check
from ..data.augmentation import AUGREG_MIXUP, build_augmentation
from ..data.channels import Channels, adapt_processor, channels_of
from ..data.classes import DENSE, DETECTION, TASK_OF
from ..data.dense import kinds_of_images, stop_cropping
from ..data.images import derive_seed, normalize
from ..data.labelled import METRICS, RECIPE, ImageData, load_data
from ..data.loaders import evaluation_loader
from ..data.orders import BatchDivision, steps_of
from ..evaluation.metrics import Results
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..system.disk import check_output_folder, same_place, writing
from ..system.machine import free_memory, precision_name
from ..system.progress import no_bars_of_transformers
from ..system.stopping import EvaluationStopped, Interrupted, StopSignals
from ..system.transfers import has_own_memory
from .best import BestModel
from .checkpointing import CheckpointFolder, load_state
from .defaults import MEMORY_SHARE, describe_choices, resolve
from .facts import facts_of, processes_here
from .fitting.state import FIT, STATE
from .lora import add_low_rank_updates, merge_low_rank_updates, merged
from .optim import Schedule, build_optimizer, parameter_groups
from .parallel import (
    compile_layers,
    counts_in_evaluation,
    data_parts,
    load_weights_of_main,
    shard_matrices,
    start_tracker,
    whole_weights,
)
from .recipe import FREE_TO_CHANGE, TrainConfig, default_values
from .state import AveragedWeights, BrokenImages, RunLog, TrainingState, accepted_broken
from .tasks import TASKS, Classification, build_model
from .views import summary_of_run

TIMING, LOG, CHECKPOINTS, LAST = "timing.json", "log.jsonl", "checkpoints", "last"
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
    """Load the training and evaluation images of a recipe; if the task is `auto`, it is inferred from the labels."""
    names = (
        *("train_split", "eval_split", "image_column", "label_column", "label_separator", "box_format"),
        *("eval_fraction", "train_share", "train_repeats", "split_seed", "streaming", "train_images"),
    )
    options = {name: getattr(config, name) for name in names}
    if "task" not in config.auto:
        options["problem_type"] = {task: kind for kind, task in TASK_OF.items()}.get(config.task)
        options["needs_labels"] = TASKS[config.task].needs_labels
    return load_data(config.data, **options)


def resolved(config: TrainConfig, data: ImageData, accelerator: Accelerator) -> TrainConfig:
    """Return the recipe with values for the fields that are `auto`, the same on all processes; print the reasons."""
    if not config.auto:
        return config
    choices = [resolve(config, facts_of(config, data, accelerator)) if accelerator.is_main_process else None]
    [(config, reasons)] = broadcast_object_list(choices)
    if accelerator.is_main_process and reasons:
        tqdm.write("\n".join(["Chosen from the data, the model and the machine:", *describe_choices(config, reasons)]))
    return config


def with_channels(config: TrainConfig, channels: Channels) -> TrainConfig:
    """Return a recipe whose model takes the images, unless it states a number of channels."""
    if channels.num_channels == 3:
        return config
    return replace(config, model_config={"num_channels": channels.num_channels, **config.model_config})


def with_values_of(config: TrainConfig, identity: dict[str, Any]) -> TrainConfig:
    """Return a recipe whose `auto` fields have the values of an interrupted run, on whatever machine it resumes."""
    values = {name: identity.get(name, default_values()[name]) for name in config.auto}
    patch_size = identity["model_config"].get("patch_size")
    if "image_size" in config.auto and config.model is None and patch_size is not None:
        values["model_config"] = {"patch_size": patch_size, **config.model_config}
    return replace(config, auto=[], **values)


class Run:
    """A run of a recipe, from its start to its end; when it has finished, `output_dir` holds the same as files.

    Attributes:
        config: The recipe, with a value for every field.
        data, task, processor: What the run learns from, its objective, and the image processor.
        model: The model, without what Accelerate wraps around it.
        plan: When to do what, in steps.
        division: How a batch is divided over accumulated parts and processes.
        to_model: Normalizes uint8 pixels for the model.
        state: Everything that checkpoints save.
        loader, batches, bar: Training batches and the progress bar, set by the loop.
        predictions: Results of the best evaluation, or without a best metric of the last one, for a task with labels.
        metrics: Results that are the same whenever the run is repeated, once it has finished.
        timing: Results that are not.
    """

    loader: Any
    batches: Iterator[Any]
    bar: tqdm
    metrics: dict[str, Any]
    timing: dict[str, float]
    measured_on = thresholds_from = "evaluation images"

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        signals: StopSignals,
        build: Callable[..., Any] = build_model,
        data: ImageData | None = None,
    ) -> None:
        """Build data, task, model, optimizer, loaders and an empty state, at step 0."""
        self.accelerator, self.signals = accelerator, signals
        self.say: Callable[[str], None] = tqdm.write if accelerator.is_main_process else lambda message: None
        self.is_main_process, self.output_dir = accelerator.is_main_process, Path(config.output_dir)
        self.predictions: Results | None = None
        self.shown: dict[str, str] = {}  # by the progress bar
        self.is_tried = False  # whether all processes have computed a part of a batch
        self.checkpoints = CheckpointFolder(self.output_dir / CHECKPOINTS, config.keep_checkpoints)
        self.checkpoint, self.saved = self._newest_checkpoint()
        if self.saved is not None:
            config = with_values_of(config, self.saved["identity"])
        is_to_check = data is None and self.is_main_process and self.checkpoint is None
        with accelerator.main_process_first():  # the other processes read what the first one has cached
            self.data = data = data or data_of(config)
        channels = channels_of(data.train, data.columns)
        config = with_channels(config, channels)  # written to the recipe
        for note in data.notes:
            self.say(note)
        if is_to_check and (found := quick_check(data, config.train_repeats)):
            self.say(found)
        config = resolved(config, data, accelerator)
        if config.mixup is None:  # the saved recipe states the value that the augmentation implies
            config = replace(config, mixup=AUGREG_MIXUP.get(config.augmentation, 0.0))
        self.config = config
        self.plan = Plan.of(config, data.train_length)

        # All processes draw the same initial weights: the seed does not depend on the rank.
        torch.manual_seed(derive_seed(config.seed, "weights"))
        self.task = TASKS[config.task](config, data)
        if config.best_metric not in (None, *self.task.metric_names):
            raise ValueError(
                f"There is no metric {config.best_metric!r}: set best_metric to one of "
                f"{', '.join(self.task.metric_names)}."
            )
        model, self.processor = build(config, self.task)
        adapt_processor(self.processor, channels, model.config.num_channels)
        if data.problem_type in DENSE:
            stop_cropping(self.processor)
        # FSDP2 changes the class of the model itself.
        self.model_class, self.published_class = type(model), type(self.task.published(model, {})[0])
        if config.trained == "lora":
            add_low_rank_updates(model, config.lora_rank)
        model = shard_matrices(model, accelerator)
        if config.gradient_checkpointing:
            # transformers renamed the method; the oldest version that we support has the old name only.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        if config.compile:
            compile_layers(model, accelerator.device, config.compile_mode)
        groups = parameter_groups(model, config.weight_decay, config.layer_decay, config.position_lr_scale)
        optimizer = build_optimizer(config.optimizer, groups, config.learning_rate, config.betas, config.momentum)

        self._build_images(model.config)
        self.task.begin(self, model)
        model, optimizer = accelerator.prepare(model, optimizer)
        self.model = accelerator.unwrap_model(model)
        self.say("\n".join(summary_of_run(self)))
        start_tracker(accelerator, config)
        # A stream does not tell how many evaluation images it has.
        eval_length = len(data.evaluation) if hasattr(data.evaluation, "__len__") else data.train_length
        lengths = {"training": data.train_length, "evaluation": eval_length}
        limits = {split: accepted_broken(config.max_broken, length) for split, length in lengths.items()}
        self.state = TrainingState(
            accelerator=accelerator,
            model=model,
            optimizer=optimizer,
            average=AveragedWeights(self.model, config.ema_decay),
            log=RunLog(self.output_dir / LOG, accelerator),
            broken=BrokenImages(limits, self.say),
            identity={**asdict(config), "training images": data.train_length},
            best=None if config.best_metric is None else BestModel(config.best_metric, config.early_stopping),
        )

    def _build_images(self, model_config: Any) -> None:
        """Build the training images and the loader of evaluation images, which are cached if the recipe says so."""
        config, data, accelerator = self.config, self.data, self.accelerator
        augmentation = build_augmentation(
            config.augmentation,
            model_config.image_shape,
            config.smallest_crop,
            color_jitter=config.color_jitter,
            erasing=config.erasing,
            fill=self.processor.image_mean,
            num_channels=model_config.num_channels,
            has_masks=data.masks is not None,
            has_boxes=data.problem_type == DETECTION,
        )
        self.to_model = partial(normalize, processor=self.processor)
        cache = accelerator.device if config.cache == "device" else config.cache
        limit = cache_limit(accelerator, config)
        training_images, evaluation_images = kinds_of_images(data)
        self.images = training_images(
            data.train, data.columns, self.processor, augmentation, config.seed, cache, config.shorter_side, limit
        )
        limit -= self.images.cached_bytes
        eval_images = evaluation_images(data.evaluation, data.columns, self.processor, cache, limit)
        if cache != "none" and (self.images.cached is None or eval_images.cached is None):
            self.say(f"Not all images are cached: they need more than {MEMORY_SHARE:.0%} of the free memory.")
        self.division = BatchDivision(config.accumulation_steps, *data_parts(accelerator))
        eval_batch = max(1, config.batch_size // (self.division.accumulation_steps * self.division.processes))
        self.eval_loader = evaluation_loader(
            eval_images,
            eval_batch,
            config.num_workers,
            *self.division[1:],
            is_counted=counts_in_evaluation(accelerator),
            has_one_size=config.compile,
        )

    def _newest_checkpoint(self) -> tuple[Path | None, dict[str, Any] | None]:
        """Return the newest complete checkpoint and its state, the same on all processes, if there is one."""
        newest = self.checkpoints.newest(self.say) if self.is_main_process else None
        [checkpoint] = broadcast_object_list([newest])  # a damaged file must not make processes disagree
        if checkpoint is not None and not checkpoint.is_dir():
            raise ValueError(f"{checkpoint} does not exist here: output_dir must be on a disk shared by all machines.")
        return checkpoint, None if checkpoint is None else load_state(checkpoint, self.accelerator.device)

    @property
    def is_evaluated(self) -> bool:
        """Whether the model of this step was evaluated."""
        return any(row["step"] == self.state.step for row in self._evaluations())

    def _evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.state.log.rows if any(name.startswith("eval_") for name in row)]

    @property
    def is_over(self) -> bool:
        """Whether the run ends before its last step, since it does not improve any more."""
        return self.state.best is not None and self.state.best.is_over

    def resume(self) -> None:
        """Load the newest complete checkpoint if there is one; then write the recipe and the log of this run."""
        output_dir, accelerator, checkpoint, saved = self.output_dir, self.accelerator, self.checkpoint, self.saved
        if saved is None:
            self.say(f"All fields of the recipe are in {output_dir / RECIPE}.")
        else:
            _check_same_run(self.state.identity, saved["identity"], output_dir)
            if self.config.trained == "lora":  # the other weights are those of the model already
                saved["model"] = saved["trained"]
            else:
                with no_bars_of_transformers():
                    saved["model"] = self.model_class.from_pretrained(checkpoint).state_dict()
            self.state.load_state_dict(saved)
            self.saved = None  # frees memory
            if saved["identity"]["accumulation_steps"] != self.config.accumulation_steps:
                self.say("Resuming with different accumulation_steps. The result differs by rounding.")
            if saved["processes"] != accelerator.num_processes:
                self.say(
                    f"Resuming on {accelerator.num_processes} processes a run that used {saved['processes']}. The "
                    "result will not be bit for bit that of an uninterrupted run: sums are rounded in another "
                    "order, dropout, mixing and masks draw other numbers, and a stream is divided differently."
                )
            done = f"{self.state.step} of {self.plan.total_steps} steps are done."
            if self.state.step >= self.plan.total_steps:
                done += " Only the model and its card are written again."
            self.say(f"Resuming from {checkpoint}: {done}")
        self.state.log.rewrite()  # first: a folder with a log is known as that of a run
        if accelerator.is_main_process:
            with writing("the recipe", output_dir / RECIPE):
                (output_dir / RECIPE).write_text(self.config.to_yaml(), encoding="utf-8")
        accelerator.wait_for_everyone()

    def evaluate(self) -> None:
        """Evaluate the averaged weights. On a signal, save first: the resumed run starts with this evaluation."""
        state = self.state
        try:
            with state.throughput.paused(), state.average.in_place():
                metrics, predictions = self._measure()
                # Only the best weights and their predictions are kept.
                if state.best is None or state.best.update(state.step, metrics, partial(whole_weights, state.model)):
                    self.predictions = predictions
        except EvaluationStopped as stopped:
            state.is_evaluation_due = True
            self.save()
            self.interrupt(stopped.args[0])
        state.is_evaluation_due = False
        epoch = state.step / self.plan.steps_per_epoch
        state.log.add(state.step, epoch=epoch, **{f"eval_{name}": value for name, value in metrics.items()})
        name = "accuracy" if state.best is None else state.best.metric
        if name in metrics and metrics["count"] > 1:  # for one image it says nothing
            value = f"{metrics[name]:.1%}" if name == "accuracy" else f"{metrics[name]:.4g}"
            self.shown.pop(name, None)
            self.shown = {name: value, **self.shown}  # first, since a narrow terminal cuts the others
        if state.best is not None and state.best.is_over:
            self.say(f"Stopping after step {state.step}: {name} has not improved since step {state.best.step}.")

    def _measure(self) -> tuple[dict[str, Any], Results | None]:
        """Return the metrics and predictions of the weights that the model holds."""
        batches = self.signals.heeded(self.eval_loader, self.accelerator)
        metrics, unreadable, predictions = self.task.evaluate(
            self.state.model, batches, self.accelerator, self.to_model
        )
        self.state.broken.add("evaluation", unreadable)
        return metrics, predictions

    def save(self) -> None:
        """Save a checkpoint; all processes take part. A thread of the main one writes while the run goes on."""
        saved = self.state.state_dict()
        weights = saved.pop("model")
        if self.config.trained == "lora":  # the model files hold the merged weights
            trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            saved["trained"] = {name: tensor for name, tensor in weights.items() if name in trained}
        if self.is_main_process:
            self.checkpoints.save_later(self.state.step, saved, self._writer(weights))

    def _writer(self, weights: dict[str, Tensor]) -> Callable[[Path], None]:
        """Return a function that writes a model with these weights, and its image processor, into a folder."""
        return partial(save_model, self.model, merged(weights), self.processor)

    def _publisher(self, weights: dict[str, Tensor]) -> Callable[[Path], None]:
        """Return a function that writes the model for its users, without what only the training needs."""
        model, weights = self.task.published(self.model, merged(weights))
        return partial(save_model, model, weights, self.processor)

    def publish(self, publish: Publish) -> None:
        """Hand the averaged weights to `publish`, on the main process."""
        with self.state.average.in_place():
            weights = whole_weights(self.state.model)
            if self.accelerator.is_main_process:
                publish(self.state.step, self._publisher(weights))

    def interrupt(self, signum: int) -> NoReturn:
        self.checkpoints.wait()
        self.accelerator.wait_for_everyone()  # a process that ends would end the others
        steps = f"step {self.state.step} of {self.plan.total_steps}"
        name = signal.Signals(signum).name
        raise Interrupted(signum, f"Stopped by {name} after {steps}; saved in {self.checkpoints.folder}.")

    def finish(self) -> None:
        """Write the final model and the metrics.

        It is the best model if a metric chooses it, else the last one; averaged if there is an average.
        """
        state, output_dir, best = self.state, self.output_dir, self.state.best
        state.throughput.lap()
        self.timing = state.throughput.summary()
        state.average.swap()
        if self.config.keep_last:
            self._write_model(output_dir / LAST)
            self.say(f"The last model, of step {state.step}, is in {output_dir / LAST}.")
        if best is not None and best.step != state.step:
            load_weights_of_main(state.model, best.weights)
            self.say(f"The saved model is the one of step {best.step}, which has the best {best.metric}.")
        if self.predictions is None and self.task.needs_labels:  # the log of an earlier part has the metrics only
            try:
                _, self.predictions = self._measure()
            except EvaluationStopped as stopped:
                self.interrupt(stopped.args[0])
        if self.predictions is not None and isinstance(self.task, Classification):
            self.task.adopt(self.model, self.predictions)
        self.metrics = self._final_metrics()
        self._write_model(output_dir)
        if self.is_main_process:
            with writing("the metrics; the checkpoints are intact", output_dir):
                for name, values in ((METRICS, self.metrics), (TIMING, self.timing)):
                    (output_dir / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        self.accelerator.wait_for_everyone()
        if any(isinstance(parameter, DTensor) for parameter in self.model.parameters()):
            # The group of processes that holds the shards ends with the run.
            with no_bars_of_transformers():
                self.model = self.published_class.from_pretrained(output_dir).to(self.accelerator.device)
        else:
            merge_low_rank_updates(self.model)
            self.model, _ = self.task.published(self.model, {})
        self.model.eval()

    def _write_model(self, folder: Path) -> None:
        weights = whole_weights(self.state.model)
        if self.is_main_process:
            with writing("the trained model; the checkpoints are intact", folder):
                self._publisher(weights)(folder)

    def _final_metrics(self) -> dict[str, Any]:
        """Return the metrics of the final model, and facts of the run."""
        state, best = self.state, self.state.best
        _, weights = self.task.published(self.model, merged(dict(self.model.named_parameters())))
        row = next(row for row in reversed(self._evaluations()) if best is None or row["step"] == best.step)
        chosen = (
            {}
            if best is None
            else {
                "best_metric": best.metric,
                "best_step": best.step,
                "best_value": best.value,
                "last_value": best.last_value,
            }
        )
        return {
            **{name: value for name, value in row.items() if name.startswith("eval_")},
            **chosen,
            "train_images": self.data.train_length,
            "steps": state.step,
            "parameters": sum(tensor.numel() for tensor in weights.values()),
            "precision": precision_name(self.accelerator.mixed_precision),
            "processes": self.accelerator.num_processes,
            "broken_images": sorted({name for names in state.broken.names.values() for name in names}),
        }

    @property
    def log(self) -> list[dict[str, Any]]:
        """The rows of the log."""
        return self.state.log.rows


def check_output_dir(config: TrainConfig) -> None:
    """Raise `ValueError` if the run would overwrite files that no run wrote, or the model that it starts from."""
    folder = Path(config.output_dir)
    if config.model is not None and Path(config.model).resolve() == folder.resolve():
        raise ValueError(f"{folder} holds the model to start from: choose another --output-dir.")
    if (folder / FIT / STATE).exists():
        raise ValueError(f"{folder} holds a model that hf-vit fit wrote: choose another --output-dir.")
    is_of_a_run = (folder / LOG).is_file() or (folder / CHECKPOINTS).is_dir()
    check_output_folder(folder, is_of_a_run, config.data)


def cache_limit(accelerator: Accelerator, config: TrainConfig) -> float:
    """Return the bytes that cached images may take in this process."""
    device = accelerator.device
    if config.cache == "device" and has_own_memory(device):
        return MEMORY_SHARE * torch.get_device_module(device).mem_get_info(device)[0]
    return MEMORY_SHARE * free_memory() / processes_here(accelerator)


def _check_same_run(asked: dict[str, Any], saved: dict[str, Any], output_dir: Path) -> None:
    before = {**default_values(), **saved}  # an older version has fewer fields
    different = [
        f"{name} {before.get(name)!r} -> {value!r}"
        for name, value in asked.items()
        if name not in FREE_TO_CHANGE and not same_place(before.get(name), value)
    ]
    if different:
        raise ValueError(
            f"{output_dir} holds a run with another recipe or other data ({'; '.join(different)}): choose another "
            f"--output-dir for a new run, or resume that run with its values, which are in {output_dir / RECIPE}."
        )


def save_model(model: Any, weights: dict[str, Tensor], processor: HFViTImageProcessor, folder: Path) -> None:
    """Write a model and its image processor into a folder."""
    with no_bars_of_transformers():
        processor.save_pretrained(folder)  # before the model, which adds a default processor where there is none
        model.save_pretrained(folder, state_dict=weights)


def clear_output(output_dir: Path) -> None:
    """Remove the files of an earlier run, and nothing else; an empty log stays, by which the folder is known."""
    if (output_dir / LOG).is_file():
        (output_dir / LOG).write_text("", encoding="utf-8")
    for folder in (CHECKPOINTS, LAST):
        shutil.rmtree(output_dir / folder, ignore_errors=True)
    for name in (METRICS, TIMING, RECIPE):
        (output_dir / name).unlink(missing_ok=True)
