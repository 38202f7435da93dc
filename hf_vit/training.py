"""The training loop: one function, `train`, from a recipe to a folder that can be pushed.

Every random number of a run follows from the seed and from where the run stands: initial weights from the seed; the
order of images from (seed, epoch); augmentation from (seed, epoch, image); mixing, dropout and the like from
(seed, step). The learning rate follows from the step. So the state of a run is the weights, the optimizer, the step
and what was logged, and a run that was stopped goes on to the very bits of one that was not.
"""

import difflib
import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import Any, Self, get_args

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, send_to_device
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from .augmentation import BatchMixer
from .checkpointing import CheckpointFolder, load_state
from .data import (
    EvaluationImages,
    ImageData,
    TrainingImages,
    TrainingOrder,
    build_augmentation,
    evaluation_loader,
    load_data,
    normalize,
    seed_of,
    steps_of,
    training_loader,
)
from .evaluation import evaluate
from .finetuning import fields_of_labels, load_classifier
from .model.configuration_hf_vit import HFViTConfig
from .model.image_processing_hf_vit import HFViTImageProcessor
from .model.modeling_hf_vit import HFViTForImageClassification
from .optim import Schedule, build_optimizer, parameter_groups
from .variants import VARIANTS, config_of

RECIPE, METRICS, LOG, CHECKPOINTS = "recipe.yaml", "metrics.json", "log.jsonl", "checkpoints"
# By what Accelerate calls them.
PRECISIONS = {"auto": "auto", "fp32": "no", "bf16": "bf16", "fp16": "fp16"}


# -------------------------------------------------------------------------------------------------- the recipe


@dataclass
class TrainConfig:
    """All that decides a run; a recipe is a YAML file of these fields.

    Args:
        data: What `load_data` takes; the fields behind it are its arguments.
        model: A folder or a name on the Hub to fine-tune, a variant such as `"ViT-Ti/16"` to train from scratch, or
            `None` for the dimensions in `model_config`.
        model_config: Fields of `HFViTConfig`; they win over the variant's or the checkpoint's.
        image_size: Pixels that the model gets, one number or [height, width].
        preprocessing: Preset of the image processor, for a model from scratch.
        position_std: Standard deviation of initial position embeddings, for a model from scratch; `None` is the
            model's own for all weights.
        cache: `"ram"` keeps decoded images in memory, `"none"` decodes them at every visit.
        shorter_side: Larger training images are reduced to this first, pixels.
        num_workers: Processes that load training images, beside each process that trains.
        augmentation: A key of `AUGMENTATIONS`.
        smallest_crop: Smallest share of an image that a random crop keeps.
        mixup, cutmix, label_smoothing: See `BatchMixer`.
        epochs: Passes over the training images; not used if `max_steps` is given.
        max_steps: Length of the run in steps.
        batch_size: Images a step, over all processes and accumulated parts.
        accumulation_steps: Parts in which a process works through its share of a batch.
        optimizer, betas, momentum: See `build_optimizer`.
        weight_decay, layer_decay, position_lr_scale: See `parameter_groups`.
        schedule: A key of `SCHEDULES`.
        warmup_epochs, cooldown_epochs: Length of the rise and of the fall of the learning rate.
        max_grad_norm: Gradients are scaled down to this norm; `None` leaves them.
        precision: `"fp32"`, `"bf16"`, `"fp16"`, or `"auto"`: bf16 where the hardware is fast at it.
        seed: Of all that is random but the choice of held-out images.
        output_dir: Where the model ends up; checkpoints lie below it.
        resume: `"auto"` goes on from the newest checkpoint, `"never"` removes what is there and starts anew.
        save_every: Steps between checkpoints; `None` saves at the end of every epoch.
        keep_checkpoints: How many checkpoints to keep.
        eval_every: Epochs between evaluations; there is always one at the end.
        log_every: Steps that a line of the log sums up.
    """

    data: str = ""
    train_split: str | None = None
    eval_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    eval_fraction: float = 0.2
    split_seed: int = 0

    model: str | None = "ViT-Ti/16"
    model_config: dict[str, Any] = field(default_factory=dict)
    image_size: int | list[int] = 224
    preprocessing: str = "original"
    position_std: float | None = None

    cache: str = "none"
    shorter_side: int | None = None
    num_workers: int = 0
    augmentation: str = "crop_flip"
    smallest_crop: float = 0.25
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    epochs: float = 100
    max_steps: int | None = None
    batch_size: int = 128
    accumulation_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    momentum: float = 0.9
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    position_lr_scale: float = 1.0
    schedule: str = "cosine"
    warmup_epochs: float = 5
    cooldown_epochs: float = 0
    max_grad_norm: float | None = 1.0
    precision: str = "auto"

    seed: int = 0
    output_dir: str = "hf-vit-run"
    resume: str = "auto"
    save_every: int | None = None
    keep_checkpoints: int = 2
    eval_every: float = 1
    log_every: int = 10

    def __post_init__(self) -> None:
        for name, choices in {"cache": ("none", "ram"), "resume": ("auto", "never"), "precision": PRECISIONS}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in ("batch_size", "accumulation_steps", "log_every", "save_every", "max_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @classmethod
    def from_recipe(cls, recipe: str | Path, **overrides: Any) -> Self:
        """Read a recipe, a name of those that come with the package or a YAML file; `overrides` win over it.

        A field of the architecture alone is overridden as `model_config.NAME`.

        Raises:
            ValueError: If there is no such recipe, or a name that is no field, with the nearest that is.
        """
        shipped = {path.name.removesuffix(".yaml"): path for path in (files(__package__) / "recipes").iterdir()}
        shipped = {name: path for name, path in sorted(shipped.items()) if path.name.endswith(".yaml")}
        path = shipped.get(str(recipe), Path(recipe))
        if not path.is_file():
            raise ValueError(f"There is no recipe {str(recipe)!r}: give a YAML file or one of {', '.join(shipped)}.")
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        _refuse_unknown(values)
        for name, value in overrides.items():
            if name.startswith("model_config."):
                values.setdefault("model_config", {})[name.removeprefix("model_config.")] = value
            else:
                values[name] = value
        _refuse_unknown(values)
        return cls(**{name: _as_number(name, value) for name, value in values.items()})

    def to_yaml(self) -> str:
        """Return the recipe as a file would state it."""
        return yaml.safe_dump(asdict(self), sort_keys=False)


# What may differ between a run and its resumption: none of it changes the weights.
FREE_TO_CHANGE = {"output_dir", "resume", "num_workers", "cache", "save_every", "keep_checkpoints"}


def _refuse_unknown(values: dict[str, Any]) -> None:
    names = [item.name for item in fields(TrainConfig)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0)
            raise ValueError(f"Unknown field {key!r} of a recipe: the nearest is {near[0]!r}.")


def _as_number(name: str, value: Any) -> Any:
    """Read a text as a number where the field is one: YAML takes 1e-3, without a dot, for a text."""
    kinds = next((item.type, *get_args(item.type)) for item in fields(TrainConfig) if item.name == name)
    kind = next((kind for kind in (int, float) if kind in kinds), None)
    if kind is None or str in kinds or not isinstance(value, str):
        return value
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{name} is a number, got {value!r}.") from None


def resolve_precision(precision: str) -> str:
    """Return what Accelerate calls a precision; `"auto"` is bf16 on hardware with matrix units for it."""
    if precision != "auto":
        return PRECISIONS[precision]
    is_fast = torch.cuda.is_bf16_supported(False) if torch.cuda.is_available() else torch.cpu._is_amx_tile_supported()
    return "bf16" if is_fast else "no"


# --------------------------------------------------------------------------------------------------- the parts


def build_model(
    config: TrainConfig, label_names: list[str]
) -> tuple[HFViTForImageClassification, HFViTImageProcessor]:
    """Return the model that a recipe describes, and the processor of its images."""
    labels = fields_of_labels(label_names)
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    architecture = {"image_size": (height, width), **config.model_config}
    if config.model is not None and config.model not in VARIANTS:
        return load_classifier(config.model, label_names, **architecture)

    settings = {**architecture, **labels}
    model_config = HFViTConfig(**settings) if config.model is None else config_of(config.model, **settings)
    model = HFViTForImageClassification(model_config)
    if config.position_std is not None:
        for table in model.vit.embeddings.position_embeddings.parameters():
            torch.nn.init.trunc_normal_(table, std=config.position_std)
    processor = HFViTImageProcessor.from_preset(
        config.preprocessing, model_config.image_shape, num_channels=model_config.num_channels
    )
    return model, processor


class Interrupted(Exception):
    """A run was asked to stop, has saved where it stands, and can go on from there."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopSignals:
    """Note SIGINT and SIGTERM instead of dying of them; a second SIGINT interrupts at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    STEPS_BETWEEN_AGREEMENTS = 10

    def __enter__(self) -> Self:
        self.received = 0
        self.before = {signum: signal.signal(signum, self._note) for signum in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def agreed(self, accelerator: Accelerator, step: int) -> int:
        """Return the signal that any process got, the same on all of them; asked for by all at the same steps."""
        if accelerator.num_processes == 1:
            return self.received
        if step % self.STEPS_BETWEEN_AGREEMENTS:
            return 0
        received = torch.tensor([self.received], device=accelerator.device)
        return int(accelerator.gather(received).max())


class RunLog:
    """The log of a run: rows of a list, and lines of a file that follows it."""

    def __init__(self, path: Path, is_writing: bool) -> None:
        self.path, self.is_writing = path, is_writing
        self.rows: list[dict[str, Any]] = []

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Go back to `rows`: lines behind the checkpoint that a run resumes from will be written again."""
        self.rows = rows
        if self.is_writing:
            self.path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        if self.is_writing:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


@dataclass
class Run:
    """What a finished run leaves in memory; `metrics` and all else is in `output_dir` too."""

    config: TrainConfig
    output_dir: Path
    model: HFViTForImageClassification
    processor: HFViTImageProcessor
    data: ImageData
    log: list[dict[str, Any]]
    metrics: dict[str, Any]
    is_main_process: bool


# ---------------------------------------------------------------------------------------------------- the loop


def train(config: TrainConfig) -> Run:
    """Train a classifier, and resume by itself what was stopped in `config.output_dir`.

    Raises:
        Interrupted: Behind a checkpoint, if SIGINT or SIGTERM came.
        ValueError: If the recipe does not fit the data, the machine, or the run that `output_dir` holds.
        FloatingPointError: If the loss is not finite; names the step.
    """
    # ---- build
    accelerator = Accelerator(
        mixed_precision=resolve_precision(config.precision),
        gradient_accumulation_steps=config.accumulation_steps,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        # The learning rate is set by the step; Accelerate must not scale it.
        step_scheduler_with_optimizer=False,
    )
    say: Callable[[str], None] = tqdm.write if accelerator.is_main_process else lambda message: None
    output_dir = Path(config.output_dir)
    if config.resume == "never" and accelerator.is_main_process:
        _clear(output_dir)
    accelerator.wait_for_everyone()

    with accelerator.main_process_first():  # the others read what the first one has cached
        data = load_data(
            config.data,
            train_split=config.train_split,
            eval_split=config.eval_split,
            image_column=config.image_column,
            label_column=config.label_column,
            eval_fraction=config.eval_fraction,
            split_seed=config.split_seed,
        )
    torch.manual_seed(seed_of(config.seed, "weights"))
    model, processor = build_model(config, data.label_names)
    groups = parameter_groups(model, config.weight_decay, config.layer_decay, config.position_lr_scale)
    optimizer = build_optimizer(config.optimizer, groups, config.learning_rate, config.betas, config.momentum)

    size = model.config.image_shape
    in_memory = config.cache == "ram"
    augmentation = build_augmentation(config.augmentation, size, config.smallest_crop)
    images = TrainingImages(
        data.train, data.columns, processor, in_memory, augmentation, config.seed, config.shorter_side
    )
    held_out = EvaluationImages(data.evaluation, data.columns, processor, in_memory)
    mixer = BatchMixer(len(data.label_names), config.mixup, config.cutmix, config.label_smoothing)
    to_model = partial(normalize, processor=processor)

    steps_in = partial(steps_of, length=len(images), batch_size=config.batch_size)
    total_steps = config.max_steps or steps_in(config.epochs)
    eval_every = steps_in(config.eval_every)
    save_every = config.save_every or steps_in(1)
    warmup, cooldown = (steps_in(n) if n else 0 for n in (config.warmup_epochs, config.cooldown_epochs))
    schedule = Schedule(config.schedule, total_steps, min(warmup, total_steps), cooldown)

    # ---- prepare
    eval_batch = max(1, config.batch_size // accelerator.num_processes)
    model, optimizer, eval_loader = accelerator.prepare(
        model, optimizer, evaluation_loader(held_out, eval_batch, config.num_workers)
    )
    trained = accelerator.unwrap_model(model)

    # ---- resume
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
    checkpoints = CheckpointFolder(output_dir / CHECKPOINTS, config.keep_checkpoints)
    log = RunLog(output_dir / LOG, accelerator.is_main_process)
    done, seconds_before = 0, 0.0
    pending: list[Tensor] = []  # losses that no line of the log holds yet
    checkpoint = checkpoints.newest(say)
    if checkpoint is not None:
        state = load_state(checkpoint)
        _refuse_other_run(config, state["config"], output_dir)
        trained.load_state_dict(type(trained).from_pretrained(checkpoint).state_dict())
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        done, seconds_before = state["step"], state["seconds"]
        pending.extend(state["pending"].to(accelerator.device))
        if state["processes"] != accelerator.num_processes:
            say(
                f"Resuming with {accelerator.num_processes} processes what {state['processes']} began: sums are "
                "rounded in another order from here on, and dropout and mixing draw other numbers."
            )
        say(f"Resuming from {checkpoint}: {done} of {total_steps} steps are done.")
    log.restore([] if checkpoint is None else state["log"])
    accelerator.wait_for_everyone()
    started = time.perf_counter() - seconds_before

    def save(step: int) -> None:
        # One dictionary holds all that is not the model: what is added here is resumed above.
        losses = _mean_over_processes(pending, accelerator)
        _refuse_nonfinite(losses, last_step=step)
        if accelerator.is_main_process:
            state = {
                "step": step,
                "optimizer": optimizer.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "pending": losses.cpu(),
                "log": log.rows,
                "config": asdict(config),
                "seconds": time.perf_counter() - started,
                "processes": accelerator.num_processes,
            }
            checkpoints.save(step, state, partial(_save_model, trained, processor))
        accelerator.wait_for_everyone()

    # ---- loop
    parts = (config.accumulation_steps, accelerator.num_processes, accelerator.process_index)
    order = TrainingOrder(len(images), config.batch_size, config.seed, done, total_steps, parts)
    batches = iter(training_loader(images, order, config.num_workers))
    bar = tqdm(total=total_steps, initial=done, unit="step", disable=not accelerator.is_main_process)
    shown: dict[str, str] = {}
    model.train()
    with StopSignals() as signals, bar:
        for step in range(done, total_steps):
            is_last = step + 1 == total_steps
            epoch = (step + 1) / order.steps_per_epoch

            # step
            seed = seed_of(config.seed, "step", step, accelerator.process_index)
            torch.manual_seed(seed)  # of dropout and the like
            generator = torch.Generator().manual_seed(seed)  # of mixing
            learning_rate = schedule.apply(optimizer, config.learning_rate, step)
            step_loss = torch.zeros((), device=accelerator.device)
            for _ in range(config.accumulation_steps):
                batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
                pixel_values, labels = mixer(to_model(batch["pixel_values"]), batch["labels"], generator)
                with accelerator.accumulate(model):
                    loss = model(pixel_values=pixel_values, labels=labels).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and config.max_grad_norm is not None:
                        accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                step_loss += loss.detach() / config.accumulation_steps
            pending.append(step_loss)  # not read yet: to read a loss is to wait for the device
            bar.update()

            # log
            if (step + 1) % config.log_every == 0 or is_last:
                losses = _mean_over_processes(pending, accelerator)
                _refuse_nonfinite(losses, last_step=step + 1)
                pending.clear()
                mean_loss = losses.mean().item()
                log.add(step=step + 1, epoch=epoch, loss=mean_loss, learning_rate=learning_rate)
                shown["loss"] = f"{mean_loss:.3f}"
                bar.set_postfix(shown, refresh=False)

            # evaluate
            if (step + 1) % eval_every == 0 or is_last:
                figures = evaluate(model, eval_loader, accelerator, to_model)
                log.add(step=step + 1, epoch=epoch, **{f"eval_{name}": value for name, value in figures.items()})
                shown["accuracy"] = f"{figures['accuracy']:.1%}"
                bar.set_postfix(shown)

            # save
            stop = 0 if is_last else signals.agreed(accelerator, step + 1)
            if (step + 1) % save_every == 0 or is_last or stop:
                save(step + 1)
            if stop:
                name = signal.Signals(stop).name
                raise Interrupted(
                    stop, f"Stopped by {name} behind step {step + 1} of {total_steps}; saved in {checkpoints.folder}."
                )

    # ---- finish
    metrics = {
        **{name: value for name, value in log.rows[-1].items() if name.startswith("eval_")},
        "train_images": len(images),
        "steps": total_steps,
        "seconds": round(time.perf_counter() - started, 1),
        "parameters": sum(parameter.numel() for parameter in trained.parameters()),
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
    }
    if accelerator.is_main_process:
        _save_model(trained, processor, output_dir)
        (output_dir / RECIPE).write_text(config.to_yaml(), encoding="utf-8")
        (output_dir / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    return Run(config, output_dir, trained.eval(), processor, data, log.rows, metrics, accelerator.is_main_process)


def _mean_over_processes(losses: list[Tensor], accelerator: Accelerator) -> Tensor:
    """Return the losses of some steps as one float32 tensor, each the mean over the processes."""
    stacked = torch.stack(losses) if losses else torch.zeros(0, device=accelerator.device)
    return accelerator.reduce(stacked, "mean") if len(losses) else stacked


def _refuse_nonfinite(losses: Tensor, last_step: int) -> None:
    broken = (~losses.isfinite()).nonzero().flatten().tolist()
    if broken:
        step = last_step - len(losses) + 1 + broken[0]
        raise FloatingPointError(
            f"The loss of step {step} is {losses[broken[0]].item()}: the run stops, the checkpoints before it are "
            "good. Try a lower learning_rate, a longer warmup_epochs, or precision: fp32."
        )


def _refuse_other_run(config: TrainConfig, saved: dict[str, Any], output_dir: Path) -> None:
    asked = asdict(config)
    different = [
        f"{name} {saved.get(name)!r} -> {value!r}"
        for name, value in asked.items()
        if name not in FREE_TO_CHANGE and saved.get(name) != value
    ]
    if different:
        raise ValueError(
            f"{output_dir} holds a run of another recipe ({'; '.join(different)}): choose another --output-dir, "
            "or start anew there with --resume never."
        )


def _save_model(model: HFViTForImageClassification, processor: HFViTImageProcessor, folder: Path) -> None:
    has_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # a bar for the shards of every checkpoint would break up ours
    processor.save_pretrained(folder)  # before the model, which adds a processor where there is none
    model.save_pretrained(folder)
    if has_bar:
        transformers_logging.enable_progress_bar()


def _clear(output_dir: Path) -> None:
    """Remove what a run left, and nothing else that may lie there."""
    shutil.rmtree(output_dir / CHECKPOINTS, ignore_errors=True)
    for name in (LOG, METRICS, RECIPE):
        (output_dir / name).unlink(missing_ok=True)
