"""Recipes: `TrainConfig`, which decides a run, and the YAML files that set its fields.

This module imports nothing heavy, since `hf-vit --help` and `hf-vit recipes` read it. So the types of fields are
checked here: `@strict` of huggingface_hub imports an HTTP client, and takes no `5` for a float and no `1e-3`, which is
text in YAML.
"""

import json
import math
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

import yaml

from ..system.texts import has_token, nearest, read_size, without_tokens
from ..variants import is_from_scratch, variant_name

RECIPES = Path(__file__).with_name("recipes")
# Fields that may differ when a run resumes: none of them changes the weights, but for rounding.
FREE_TO_CHANGE = {
    "output_dir", "resume", "num_workers", "cache", "save_every", "keep_checkpoints", "tracker", "push_to_hub",
    "push_every", "private", "auto", "keep_last", "accumulation_steps", "deterministic", "compile_mode",
}  # fmt: skip
# Fields that may be `auto`: they are chosen from the data, the model and the machine when a run starts.
AUTO = (
    "task", "image_size", "cache", "shorter_side", "num_workers", "epochs", "batch_size", "accumulation_steps",
    "learning_rate", "layer_decay", "warmup_epochs", "eval_every", "best_metric",
)  # fmt: skip

SIZES = ("image_size", "patch_size")  # fields, here or in `model_config`, that may be written as 224x160


def option(default: Any, text: str, least: float | None = None) -> Any:
    """Return a field with a default, a help text, and the least value that it takes."""
    metadata = {"help": text, "least": least}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Everything that decides a run. A recipe is a YAML file of these fields; their metadata holds help texts.

    Values are converted to the types of their fields; others raise `ValueError`.
    """

    # data: arguments of `load_data`
    data: str | list[str] = option(
        "",
        "Folder of images, table of paths and labels, archive, parquet, webdataset, Hub dataset, or a list of these.",
    )
    train_split: str | None = option(None, "Name of the training split; null: detected by name.")
    eval_split: str | None = option(None, "Name of the evaluation split; null: detected by name, or held out.")
    image_column: str | None = option(None, "Name of the image column; null: detected by type.")
    label_column: str | list[str] | None = option(
        None, "Name of the label column, or a list of 0/1 or number columns; null: detected by name and type."
    )
    label_separator: str | None = option(None, "Text between several labels of one image; null: found.")
    box_format: Literal["coco", "voc", "yolo"] | None = option(
        None, "Format of boxes in columns: coco (x, y, width, height), voc (corners), yolo; null: detected."
    )
    eval_fraction: float = option(0.2, "Share of each class to hold out if the data has no evaluation split.")
    train_share: float = option(1.0, "Share of each class of the training images to use.")
    train_repeats: float = option(1.0, "Number of times that each image is used per epoch, at least 1.")
    split_seed: int = option(
        0, "Random seed of the images that are held out or, with train_share, used; independent of seed."
    )
    streaming: bool = option(False, "Whether to read the data as a stream instead of preparing it on disk first.")
    train_images: int | None = option(
        None, "Number of training images in a stream; null: read from its metadata, or counted.", 1
    )
    shuffle_buffer: int = option(2048, "Number of undecoded images in the shuffle buffer of a stream.", 1)
    max_broken: float = option(
        0.01, "Largest acceptable share of images that cannot be read; unless it is 0, three are always accepted."
    )

    # model
    task: Literal[
        "classification",
        "multi_label",
        "regression",
        "segmentation",
        "detection",
        "masked_patches",
        "distillation",
        "lejepa",
    ] = option(
        "classification",
        "Training objective: classification, multi_label, regression, segmentation (images and masks), detection "
        "(boxes of objects), masked_patches, distillation or lejepa (without labels), or auto to infer it from the "
        "labels.",
    )
    model: str | None = option(
        "ViT-Ti/16", "Variant to train from scratch, or checkpoint to fine-tune; null: a model of model_config alone."
    )
    model_config: dict[str, Any] = option({}, "Fields of HFViTConfig; they override the variant or checkpoint.")
    image_size: int | list[int] = option(224, "Image size in pixels: one number, HxW, or [height, width].")
    preprocessing: str = option("original", "Preset of the image processor for a model from scratch.")
    position_std: float | None = option(
        None, "Standard deviation of initial position embeddings; null: initializer_range of the model."
    )
    resample_positions: bool = option(True, "Whether to resample a checkpoint's positions; false: new random ones.")
    trained: Literal["all", "head", "lora"] = option(
        "all", "Trained parameters: all, head for a linear probe, or lora for the head and low-rank updates."
    )
    lora_rank: int = option(8, "Rank of the LoRA updates.", 1)

    # images
    cache: Literal["none", "ram", "device"] = option("none", "Memory for decoded images: none, ram or device.")
    shorter_side: int | None = option(None, "Length in pixels to which the shorter side of larger images is reduced.")
    num_workers: int = option(0, "Number of data loader processes per training process.")
    augmentation: str = option("crop_flip", "Augmentation of training images: a name in hf_vit.data.augmentation.")
    smallest_crop: float = option(0.25, "Smallest share of an image's area in a random crop.")
    color_jitter: float = option(0.0, "Strength of random brightness, contrast and saturation.")
    erasing: float = option(0.0, "Probability of erasing a random rectangle of an image.")
    mixup: float | None = option(None, "Alpha of mixup; null: the default of the augmentation, or 0.")
    cutmix: float = option(0.0, "Alpha of CutMix.")
    label_smoothing: float = option(0.0, "Share of each label that is spread over all classes.")
    mask_ratio: float = option(0.5, "Share of masked patches in masked_patches.")
    mask_block: int = option(1, "Side of the squares that are masked together, in patches.")

    # lejepa
    global_views: int = option(2, "Number of global views per image in lejepa: crops of 30 % to 100 % of its area.", 1)
    local_views: int = option(
        6, "Number of local views per image in lejepa: smaller crops of 5 % to 30 % of its area.", 0
    )
    view_jitter: float = option(
        0.4, "Strength of random brightness, contrast and saturation of the views in lejepa; 0: none.", 0
    )
    sigreg_weight: float = option(0.05, "Weight of SIGReg, the regularization in lejepa, from 0 to 1.", 0)

    # distillation
    teacher: str | list[str] | None = option(None, "Checkpoint of a teacher for distillation, or a list of these.")
    distill: Literal["features", "labels", "both"] | None = option(
        None,
        "Teacher outputs to learn: features, labels or both; null: both if all teachers are classifiers with the same "
        "labels, else features.",
    )
    teacher_image_size: int | None = option(
        None,
        "Side in pixels of the images that the teachers see; null: the size of each teacher's image processor.",
        1,
    )
    teacher_channels: list[int] = option(
        [], "Indices, from 0, of the image channels that the teachers see; empty: all, or a single channel repeated."
    )
    temperature: float = option(3.0, "Temperature of the soft labels of a teacher.", 0.01)
    teacher_cache: str | None = option(None, "Folder to cache the teachers' outputs in; null: none.")
    teacher_views: int = option(4, "Number of augmented views per image for which teacher_cache stores outputs.", 1)

    # optimization
    epochs: float = option(100, "Number of passes over the training images.", 0)
    max_steps: int | None = option(None, "Number of steps; null: given by epochs.", 1)
    batch_size: int = option(128, "Batch size per optimizer step, over all devices.", 1)
    accumulation_steps: int = option(1, "Number of parts into which each device divides its share of a batch.", 1)
    sampling: Literal["shuffled", "balanced"] = option(
        "shuffled", "Sampling of training images: shuffled, or balanced to draw every class equally often."
    )
    class_weights: Literal["none", "balanced", "effective"] = option(
        "none", "Weights of classes in the loss: none, balanced (inverse class frequency), or effective (1901.05555)."
    )
    loss: Literal["cross_entropy", "binary_cross_entropy"] = option(
        "cross_entropy", "Loss function: cross_entropy, or binary_cross_entropy, one decision per class (DeiT III)."
    )
    optimizer: Literal["adamw", "sgd", "lion", "lamb", "muon"] = option(
        "adamw", "Optimizer: adamw, sgd, or, with timm installed, lion, lamb or muon."
    )
    learning_rate: float = option(1e-3, "Peak learning rate.", 0)
    betas: list[float] = option([0.9, 0.999], "Decay rates of the two moments of adamw, lion, lamb and muon.")
    momentum: float = option(0.9, "Momentum of sgd and muon.")
    weight_decay: float = option(0.05, "Weight decay of matrices; biases, norms, tokens and positions have none.", 0)
    layer_decay: float = option(1.0, "Factor on the learning rate per layer, counted from the head.")
    position_lr_scale: float = option(1.0, "Factor on the learning rate of learned positions.")
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", "Learning rate schedule after warm-up: cosine, linear or constant."
    )
    warmup_epochs: float = option(5, "Length of the linear warm-up in epochs.")
    warmup_steps: int | None = option(None, "Length of the linear warm-up in steps; overrides warmup_epochs.")
    cooldown_epochs: float = option(0, "Length of the final linear decay to 0 in epochs.")
    max_grad_norm: float | None = option(1.0, "Norm to which gradients are clipped; null: no clipping.")
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "Reaction to a loss that is not finite: stop the run, or skip the step."
    )
    ema_decay: float | None = option(None, "Decay of the averaged weights, which are evaluated and saved; null: none.")

    # hardware
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = option(
        "auto",
        "Precision: fp32, bf16, fp16, fp8 for products in FP8 and the rest in bf16, or auto for bf16 on hardware "
        "with fast bf16.",
    )
    compile: bool = option(False, "Whether to compile the layers with torch.compile.")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = option(
        "default", "Mode of torch.compile: default, or reduce-overhead or max-autotune, with CUDA graphs."
    )
    deterministic: bool = option(
        False, "Whether to use algorithms that give the same bits in every run, which is slower on GPUs."
    )
    gradient_checkpointing: bool = option(False, "Whether to recompute activations instead of storing them.")

    # run
    seed: int = option(0, "Random seed for everything except the choice of images, which split_seed determines.")
    output_dir: str = option("hf-vit-run", "Folder for the trained model and its checkpoints.")
    resume: Literal["auto", "never"] = option(
        "auto", "What to do with an earlier run in output_dir: 'auto' resumes it, 'never' discards it."
    )
    save_every: int | None = option(None, "Number of steps between checkpoints; null: one epoch.", 1)
    keep_checkpoints: int = option(2, "Number of checkpoints to keep.")
    eval_every: float = option(1, "Number of epochs between evaluations; the last step always has one.", 0)
    best_metric: str | None = option(
        None, "Metric by which the saved model is chosen, such as accuracy; null: the last model is saved."
    )
    early_stopping: int | None = option(
        None, "Number of evaluations without improvement of best_metric after which a run ends; null: never.", 1
    )
    keep_last: bool = option(False, "Whether to also save the last model, in a subfolder named last.")
    log_every: int = option(10, "Number of steps per line of the log.", 1)
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = option(
        "none", "Experiment tracker in addition to log.jsonl: none, tensorboard, trackio or wandb."
    )
    push_to_hub: str | None = option(None, "Hub repository (USER/NAME) to push to during and after training.")
    push_every: int | None = option(None, "Number of steps between pushes; null: one epoch.", 1)
    private: bool = option(False, "Whether a new Hub repository is private.")
    auto: list[str] = option([], "Fields that are still to be chosen from data, model and machine.")

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) == "auto" and item.name in AUTO:
                setattr(self, item.name, _default(item))
                self.auto = [*self.auto, item.name]
        # A field that is still to be chosen holds its default, so another value was given to `replace`.
        self.auto = [item.name for item in fields(self) if item.name in self.auto and _is_default(self, item)]
        texts = {name: str(value) for name, value in vars(self).items() if isinstance(value, str | dict | list)}
        if leaking := [name for name, text in texts.items() if has_token(text)]:
            raise ValueError(
                f"{', '.join(leaking)} contains a token or a password, but recipes are printed, saved and published: "
                "remove it. Log in with `hf auth login`, or set HF_TOKEN."
            )
        for item in fields(self):
            value, least = getattr(self, item.name), item.metadata["least"]
            if item.name in SIZES and isinstance(value, str):
                value = _pixels(item.name, value)
            try:
                converted = _convert(value, item.type)
            except TypeError:
                shown = without_tokens(repr(value))
                raise ValueError(f"{item.name} must be {_expected(item.type)}, got {shown}.") from None
            if least is not None and converted is not None and converted < least:
                raise ValueError(f"{item.name} must be at least {least}, got {value}.")
            setattr(self, item.name, converted)
        for name in SIZES:
            if isinstance(text := self.model_config.get(name), str):
                self.model_config = {**self.model_config, name: _pixels(name, text)}
        if self.model is not None:
            self.model = variant_name(self.model) or self.model
        if self.epochs == 0 and self.max_steps is None:
            raise ValueError("epochs must be more than 0: an evaluation without training is `hf-vit evaluate`.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, such as 0.999, got {self.ema_decay}.")
        if self.early_stopping is not None and self.best_metric is None and "best_metric" not in self.auto:
            raise ValueError("early_stopping needs a metric that improves: set best_metric, for example to auto.")
        if self.compile_mode != "default":
            self._check_compile_mode()
        if self.teacher and self.task != "distillation":
            raise ValueError(
                f"teacher belongs to task=distillation, got task={self.task}: set one or remove the other."
            )
        if self.global_views == 1 and self.local_views == 0:
            raise ValueError("lejepa compares views: global_views=1 needs local_views of at least 1.")
        if self.sigreg_weight > 1:
            raise ValueError(f"sigreg_weight must be at most 1, got {self.sigreg_weight}.")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {self.mask_ratio}.")
        if self.loss == "binary_cross_entropy" and self.label_smoothing:
            raise ValueError(
                "binary_cross_entropy counts every class with a share of the label as present, and "
                f"label_smoothing={self.label_smoothing} gives all classes a share: set it to 0."
            )

    def _check_compile_mode(self) -> None:
        """Raise `ValueError` unless CUDA graphs can record the step: a replay overwrites earlier results."""
        if not self.compile:
            raise ValueError(f"compile_mode is {self.compile_mode}, but nothing is compiled: set compile to true.")
        has_two_sizes = self.task == "lejepa" and self.local_views > 0
        if self.accumulation_steps > 1 or self.gradient_checkpointing or has_two_sizes:
            raise ValueError(
                f"compile_mode: {self.compile_mode} replays CUDA graphs, which cannot be combined with "
                "accumulation_steps, gradient_checkpointing or the local_views of lejepa: set compile_mode to default."
            )

    @property
    def teachers(self) -> list[str]:
        """The names of all teachers."""
        return [self.teacher] if isinstance(self.teacher, str) else list(self.teacher or [])

    @classmethod
    def from_recipe(cls, recipe: str | Path, **overrides: Any) -> Self:
        """Read a recipe: the name of one that comes with the package, or a YAML file.

        `overrides` replace its fields; `model_config.NAME` replaces one field of the architecture. If a recipe
        describes a model from scratch and another `model` is given, its `model_config` and `position_std` are ignored.

        Raises:
            ValueError: If there is no such recipe, a name is not a field, or a value does not fit its field.
        """
        expected = f"{recipe} is not a recipe: expected a YAML file of fields and values"
        try:
            values = yaml.safe_load(recipe_path(recipe).read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            raise ValueError(expected + ("." if mark is None else f"; line {mark.line + 1} is not.")) from None
        if not isinstance(values, dict):
            raise ValueError(f"{expected}.")
        if overrides.get("model") and values.get("model") is None:
            values.pop("model_config", None)
            values.pop("position_std", None)
        for name, value in overrides.items():
            if name.startswith("model_config."):
                if isinstance(value, str):
                    with suppress(TypeError):
                        value = _convert(value, float)
                architecture = {**(values.get("model_config") or {}), name.removeprefix("model_config."): value}
                values["model_config"] = architecture
            else:
                values[name] = value
        names = [item.name for item in fields(cls)]
        if unknown := [key for key in values if key not in names]:
            name = str(unknown[0])
            meant = nearest(name, names)
            remedy = f"did you mean {meant!r}?" if meant else "`hf-vit recipes NAME` prints all fields of a recipe."
            raise ValueError(f"Unknown recipe field {without_tokens(name)!r}: {remedy}")
        return cls(**values)

    def to_yaml(self) -> str:
        """Return the recipe as the text of a YAML file."""
        return yaml.safe_dump(self._stated(), sort_keys=False)

    def explain(self) -> str:
        """Return the recipe as the text of a YAML file in which a comment explains each field."""
        values = self._stated()
        return "".join(
            f"# {item.metadata['help']}\n{item.name}: {json.dumps(values[item.name])}\n"  # JSON is YAML on one line
            for item in fields(self)
            if item.name in values
        )

    def _stated(self) -> dict[str, Any]:
        values = {**asdict(self), **dict.fromkeys(self.auto, "auto")}
        del values["auto"]
        return values


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def default_recipe(model: str | None) -> str:
    """Return the name of the recipe for a model: a checkpoint, a variant, or `None` for a small model from scratch."""
    return "scratch" if is_from_scratch(model) else "finetune"


def recipe_path(recipe: str | Path) -> Path:
    """Return the file of a recipe, given its name or path."""
    shipped = shipped_recipes()
    path = shipped.get(str(recipe), Path(recipe))
    if not path.is_file():
        name = without_tokens(str(recipe))
        raise ValueError(f"Unknown recipe {name!r}: give a YAML file or one of {', '.join(shipped)}.")
    return path


def recipe_header(recipe: str | Path) -> str:
    """Return the comment at the top of a recipe: source, command, hardware, time and result."""
    lines = recipe_path(recipe).read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(takewhile(lambda line: line.startswith("#"), lines))


def default_values() -> dict[str, Any]:
    """Return the defaults of all fields, which are the values of fields that older checkpoints do not have."""
    return {item.name: _default(item) for item in fields(TrainConfig)}


def _default(item: Any) -> Any:
    return item.default if item.default is not MISSING else item.default_factory()


def _is_default(config: TrainConfig, item: Any) -> bool:
    return getattr(config, item.name) == _default(item)


def _pixels(name: str, text: str) -> int | list[int]:
    """Read one side or [height, width] from `"224"` or `"224x160"`."""
    height, width = read_size(name, text)
    return height if height == width else [height, width]


def _convert(value: Any, kind: Any) -> Any:
    """Return a value as a type, or raise `TypeError`; YAML reads 1e-3 as text, and 5 as no float."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value in arguments:
            return value
    elif origin is list:
        if isinstance(value, list | tuple):
            return [_convert(item, arguments[0]) for item in value]
    elif origin is dict:
        if isinstance(value, dict):
            return value
    elif arguments:  # a union
        for choice in arguments:
            with suppress(TypeError):
                return _convert(value, choice)
    elif kind in (int, float):
        with suppress(TypeError, ValueError, OverflowError):
            number = float(value)
            if math.isfinite(number) and not isinstance(value, bool) and (kind is float or number == int(number)):
                return kind(number)
    elif isinstance(value, kind):
        return value
    elif kind is str and type(value) in (int, float):
        return str(value)
    raise TypeError


def _expected(kind: Any) -> str:
    """Return what to call a type in an error."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): "null"}
    if kind in names:
        return names[kind]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is list:
        return f"a list of {names[get_args(kind)[0]].removeprefix('a ')}s"
    return "a mapping" if get_origin(kind) is dict else " or ".join(map(_expected, get_args(kind)))
