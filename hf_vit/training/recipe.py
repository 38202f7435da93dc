"""What decides a run: `TrainConfig`, and the YAML files that state it."""

import difflib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any, Self, get_args

import yaml

from ..system.machine import PRECISIONS
from ..system.texts import has_token, without_tokens

CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("classification", "masked_patches"),
    "trained": ("all", "head"),
    "cache": ("none", "ram", "device"),
    "loss": ("cross_entropy", "binary_cross_entropy"),
    "on_nonfinite": ("stop", "skip"),
    "precision": tuple(PRECISIONS),
    "resume": ("auto", "never"),
    "tracker": ("none", "tensorboard", "trackio", "wandb"),
}
POSITIVE = (
    "batch_size",
    "accumulation_steps",
    "log_every",
    "save_every",
    "push_every",
    "max_steps",
    "shuffle_buffer",
    "train_images",
)
# What may differ between a run and its resumption: none of it changes the weights.
FREE_TO_CHANGE = {
    "output_dir", "resume", "num_workers", "cache", "save_every", "keep_checkpoints", "tracker", "push_to_hub",
    "push_every", "private",
}  # fmt: skip


def option(default: Any, text: str) -> Any:
    """Return a field with a default, and with what it means."""
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig:
    """All that decides a run; a recipe is a YAML file of these fields. Each says in its metadata what it means."""

    # data: what `load_data` takes
    data: str = option("", "Folder of images (a subfolder a class), parquet, webdataset shards, or a name on the Hub.")
    train_split: str | None = option(None, "Split to learn from; found by its usual name if not given.")
    eval_split: str | None = option(None, "Split to hold out; cut from the training split where there is none.")
    image_column: str | None = option(None, "Column of images; found if not given.")
    label_column: str | None = option(None, "Column of labels; found if not given.")
    eval_fraction: float = option(0.2, "Share of every class that is held out where there is no split for it.")
    train_share: float = option(1.0, "Share of every class of the training images that is learned from.")
    train_repeats: float = option(1.0, "Times that an epoch goes through these, at least 1.")
    split_seed: int = option(0, "Of these choices: all seeds of a run are measured on the same images.")
    streaming: bool = option(False, "Read the data as it comes instead of preparing it on the disk first.")
    train_images: int | None = option(None, "Number of training images of a stream; counted if nothing states it.")
    shuffle_buffer: int = option(2048, "Images of a stream, as files, that the next is drawn from.")
    max_broken: float = option(0.01, "Share of images that may be unreadable; the run ends beyond it.")

    # model
    task: str = option("classification", "classification, or masked_patches: pre-training without labels.")
    model: str | None = option(
        "ViT-Ti/16", "A variant to train from scratch, a checkpoint to fine-tune, or null: model_config alone."
    )
    model_config: dict[str, Any] = option({}, "Fields of HFViTConfig; they win over the variant's or checkpoint's.")
    image_size: int | list[int] = option(224, "Pixels that the model gets, one number or [height, width].")
    preprocessing: str = option("original", "Preset of the image processor, for a model from scratch.")
    position_std: float | None = option(None, "Of initial position embeddings, from scratch; null: as all weights.")
    resample_positions: bool = option(True, "Bring a checkpoint's positions to the image size; false draws them anew.")
    trained: str = option("all", "all, or head: a linear probe on a frozen encoder.")

    # images
    cache: str = option("none", "ram or device keep decoded images there; none decodes them at every visit.")
    shorter_side: int | None = option(None, "Larger training images are reduced to this first, pixels.")
    num_workers: int = option(0, "Processes that load images, beside each process that trains.")
    augmentation: str = option("crop_flip", "What happens to a training image; see hf_vit/augmentation.py.")
    smallest_crop: float = option(0.25, "Smallest share of an image that a random crop keeps.")
    color_jitter: float = option(0.0, "Strength of random brightness, contrast and saturation.")
    erasing: float = option(0.0, "Probability that a random rectangle of an image is erased.")
    mixup: float | None = option(None, "Alpha of mixup; null: that of the augmentation's set, or 0.")
    cutmix: float = option(0.0, "Alpha of CutMix.")
    label_smoothing: float = option(0.0, "Share of every label that is spread over all classes.")
    mask_ratio: float = option(0.5, "Share of patches that masked_patches hides.")
    mask_block: int = option(1, "Side of the squares, in patches, that are hidden together.")

    # optimization
    epochs: float = option(100, "Passes over the training images.")
    max_steps: int | None = option(None, "Length of the run in steps, instead of its epochs.")
    batch_size: int = option(128, "Images a step, over all processes and accumulated parts.")
    accumulation_steps: int = option(1, "Parts in which a process works through its share of a batch.")
    loss: str = option("cross_entropy", "cross_entropy, or binary_cross_entropy: each class by itself (DeiT III).")
    optimizer: str = option("adamw", "adamw, sgd; with timm installed also lion, lamb and muon.")
    learning_rate: float = option(1e-3, "At its height.")
    betas: list[float] = option([0.9, 0.999], "Of optimizers with two moments.")
    momentum: float = option(0.9, "Of sgd and muon.")
    weight_decay: float = option(0.05, "Of weight matrices; biases, norms, tokens and positions have none.")
    layer_decay: float = option(1.0, "Factor on the learning rate for each layer further from the head.")
    position_lr_scale: float = option(1.0, "Factor on the learning rate of learned positions.")
    schedule: str = option("cosine", "cosine, linear or constant, behind the warm-up.")
    warmup_epochs: float = option(5, "In which the learning rate rises linearly.")
    warmup_steps: int | None = option(None, "The same in steps, instead of epochs.")
    cooldown_epochs: float = option(0, "At the end, in which it falls linearly to 0.")
    max_grad_norm: float | None = option(1.0, "Gradients are scaled down to this norm; null leaves them.")
    on_nonfinite: str = option("stop", "What a loss that is not finite does: stop the run, or skip the step.")
    ema_decay: float | None = option(None, "Of an average of the weights, which is then evaluated and saved.")

    # hardware
    precision: str = option("auto", "fp32, bf16, fp16, or auto: bf16 where the hardware is fast at it.")
    compile: bool = option(False, "Compile the model with torch.compile.")
    gradient_checkpointing: bool = option(False, "Compute activations twice instead of keeping them.")

    # run
    seed: int = option(0, "Of all that is random but the choice of held-out images.")
    output_dir: str = option("hf-vit-run", "Where the model ends up; checkpoints lie below it.")
    resume: str = option("auto", "auto goes on from the newest checkpoint; never removes it and starts anew.")
    save_every: int | None = option(None, "Steps between checkpoints; null saves at the end of every epoch.")
    keep_checkpoints: int = option(2, "How many checkpoints to keep.")
    eval_every: float = option(1, "Epochs between evaluations; there is always one at the end.")
    log_every: int = option(10, "Steps that a line of the log sums up.")
    tracker: str = option("none", "Where the log goes besides log.jsonl: tensorboard, trackio or wandb.")
    push_to_hub: str | None = option(None, "USER/NAME on the Hub to push to, while training and at the end.")
    push_every: int | None = option(None, "Steps between pushes; null pushes at the end of every epoch.")
    private: bool = option(False, "Whether a new repository there is private.")

    def __post_init__(self) -> None:
        texts = {name: str(value) for name, value in vars(self).items() if isinstance(value, str | dict)}
        if leaking := [name for name, text in texts.items() if has_token(text)]:
            raise ValueError(
                f"There is a token or a password in {', '.join(leaking)}, and a recipe is written, printed and "
                "published: leave it out there. Log in by `hf auth login`, or set HF_TOKEN."
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in POSITIVE:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("epochs", "learning_rate", "weight_decay", "eval_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, such as 0.999, got {self.ema_decay}.")
        if self.loss == "binary_cross_entropy" and self.label_smoothing:
            raise ValueError(
                "binary_cross_entropy takes every class with a share of the label for one that is there, and "
                f"label_smoothing={self.label_smoothing} gives all classes one: set it to 0."
            )
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {self.mask_ratio}.")

    @classmethod
    def from_recipe(cls, recipe: str | Path, **overrides: Any) -> Self:
        """Read a recipe, a name of those that come with the package or a YAML file; `overrides` win over it.

        A field of the architecture alone is overridden as `model_config.NAME`. A recipe that describes a model of its
        own describes no other: with another `model`, its `model_config` and `position_std` are left out.

        Raises:
            ValueError: If there is no such recipe, or a name that is no field, with the nearest that is.
        """
        try:
            values = yaml.safe_load(recipe_path(recipe).read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            place = getattr(error, "problem_mark", None)
            line = "" if place is None else f", line {place.line + 1}"
            raise ValueError(f"{recipe} is no recipe: it must be a YAML file of fields and values{line}.") from None
        if not isinstance(values, dict):
            raise ValueError(f"{recipe} is no recipe: it must be a YAML file of fields and values.")
        _refuse_unknown(values)
        if overrides.get("model") and values.get("model") is None:  # the recipe describes a model of its own
            values.pop("model_config", None)
            values.pop("position_std", None)
        for name, value in overrides.items():
            if name.startswith("model_config."):
                value = value if (number := _float(value)) is None or not isinstance(value, str) else number
                architecture = {**(values.get("model_config") or {}), name.removeprefix("model_config."): value}
                values["model_config"] = architecture
            else:
                values[name] = value
        _refuse_unknown(values)
        return cls(**{name: _typed(name, value) for name, value in values.items()})

    def to_yaml(self) -> str:
        """Return the recipe as a file would state it."""
        return yaml.safe_dump(asdict(self), sort_keys=False)

    def explain(self) -> str:
        """Return the recipe with what each field means."""
        meanings = {item.name: item.metadata["help"] for item in fields(self)}
        # JSON is YAML, on one line.
        return "".join(f"# {meanings[name]}\n{name}: {json.dumps(value)}\n" for name, value in asdict(self).items())


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    folder = Path(str(files(__package__) / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_path(recipe: str | Path) -> Path:
    """Return the file of a recipe, by name or path."""
    shipped = shipped_recipes()
    path = shipped.get(str(recipe), Path(recipe))
    if not path.is_file():
        named = without_tokens(str(recipe))
        raise ValueError(f"There is no recipe {named!r}: give a YAML file or one of {', '.join(shipped)}.")
    return path


def recipe_header(recipe: str | Path) -> str:
    """Return the comment at the head of a recipe: source, command, hardware, time and result."""
    lines = recipe_path(recipe).read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(takewhile(lambda line: line.startswith("#"), lines))


def _refuse_unknown(values: dict[str, Any]) -> None:
    names = [item.name for item in fields(TrainConfig)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0)
            raise ValueError(f"Unknown field {without_tokens(str(key))!r} of a recipe: the nearest is {near[0]!r}.")


def _typed(name: str, value: Any) -> Any:
    """Return a value as the type of its field; YAML takes 1e-3, without a dot, for a text, and 5 for no float."""
    declared = next(item.type for item in fields(TrainConfig) if item.name == name)
    kinds = get_args(declared) if get_args(declared) and not hasattr(declared, "__origin__") else (declared,)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if (reader := READERS.get(kind)) is not None and (read := reader(value)) is not None:
            return read
    expected = " or ".join(WORDS[kind] for kind in kinds if kind in WORDS)
    raise ValueError(f"{name} must be {expected}, got {without_tokens(repr(value))}.")


def _float(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) or not math.isfinite(float(value)) else float(value)
    except (TypeError, ValueError):
        return None


def _int(value: Any) -> int | None:
    number = _float(value)
    return int(number) if number is not None and number == int(number) else None


def _text(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def _list_of(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read_all(values: Any) -> list[Any] | None:
        items = [read(value) for value in values] if isinstance(values, list | tuple) else [None]
        return None if None in items else items

    return read_all


def _instance_of(kind: type) -> Callable[[Any], Any]:
    return lambda value: value if isinstance(value, kind) else None


# Each returns a value as its type, or None if it is none.
READERS: dict[Any, Callable[[Any], Any]] = {
    bool: _instance_of(bool),
    int: _int,
    float: _float,
    str: _text,
    list[float]: _list_of(_float),
    list[int]: _list_of(_int),
    dict[str, Any]: _instance_of(dict),
}
WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list[float]: "a list of numbers",
    list[int]: "a list of whole numbers",
    dict[str, Any]: "a mapping",
    type(None): "null",
}
