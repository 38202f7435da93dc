"""Defaults that follow from facts: values for the fields of a recipe that are `auto`, each with its reason.

Every rule is a function of the recipe and the facts. Rules run in the order of `RULES`, so a later one sees the values
that the user gave or earlier rules chose: the learning rate follows from the batch size.

Sources of the numbers:
- Dosovitskiy et al. 2021 (arXiv:2010.11929), appendix B.1.1: fine-tuning takes 500 (Pets, Flowers) to 20,000 steps
  (ImageNet) of 512 images.
- Bao et al. 2021, BEiT (arXiv:2106.08254), and He et al. 2021, MAE (arXiv:2111.06377), table 9: AdamW with a layer
  decay of 0.65 to 0.75 and a warm-up of 5 to 20 % of the steps.
- Touvron et al. 2021, DeiT (arXiv:2012.12877) and Steiner et al. 2022 (arXiv:2106.10270): 1e-3 from scratch.
- transformers' image classification examples: 5e-5 for ViT-B.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..data.classes import SINGLE, TASK_OF
from ..evaluation.labels import KINDS
from ..system.texts import counted, hanging
from .facts import Facts
from .recipe import TrainConfig
from .tasks import TASKS

MEMORY_SHARE = 0.25  # of the free memory, for cached images
ACTIVATION_SHARE = 0.8  # of the free memory, for activations
# Values per token, layer and unit of width that a backward pass needs: Korthikanti et al. 2022 (arXiv:2205.05198)
# count 34 bytes in half precision. Fused attention stores no attention matrix.
VALUES_KEPT = 17
STEPS_PER_EPOCH = {"fine-tuning": 10, "scratch": 64}  # at least, where the smallest batch size allows it
SMALLEST_BATCH, LARGEST_BATCH = 32, 128
SMALLEST_BATCH_OF_OBJECTS = 8  # of images, each of which has many objects to learn
# Number of epochs: at least and at most, the image visits that end a long run, and the steps that a short one needs.
EPOCHS = {"fine-tuning": (3, 20, 600_000, 500), "scratch": (10, 100, 3_000_000, 2_000)}
MOST_EPOCHS = 100
EVALUATIONS = 25
WARMUP_SHARE = 0.1
WIDTH_OF_RATE = 384  # of ViT-S, for which the learning rates below are stated
# AdamW's learning rates for 64 images per step.
RATES = {"all": 1e-4, "lora": 5e-4, "head": 1e-3}
LOWEST_RATE, HIGHEST_RATE = 1e-5, 1e-3
RATE_FROM_SCRATCH, WIDTH_FROM_SCRATCH = 1e-3, 192
# Optimizers relative to AdamW: Lion takes 3 to 10 times lower rates (arXiv:2302.06675), LAMB twice as high ones in
# DeiT III (arXiv:2204.07118), Muon AdamW's (arXiv:2502.16982).
RELATIVE_RATES = {"adamw": 1.0, "muon": 1.0, "lion": 0.2, "lamb": 2.0}
# SGD with momentum, for 512 images: 0.01 is in the middle of the ViT paper's grid; a new head alone takes more.
SGD_RATES = {"all": 0.01, "lora": 0.03, "head": 0.1}
# Values that change nothing, whose reasons are not printed.
NEUTRAL = {"accumulation_steps": 1, "shorter_side": None, "num_workers": 0, "cache": "none", "layer_decay": 1.0}
SMALLEST_GRID = 7  # patches along a side

Choice = tuple[Any, str]


def resolve(config: TrainConfig, facts: Facts) -> tuple[TrainConfig, dict[str, str]]:
    """Choose the fields that are `auto`.

    Returns:
        The recipe with concrete values, and the reason of each by the name of its field.
    """
    reasons = {}
    if "image_size" in config.auto and config.model is None and "patch_size" not in config.model_config:
        patch_size, reasons["model_config.patch_size"] = _patch_size(config, facts)
        config = replace(config, model_config={**config.model_config, "patch_size": patch_size})
    for name, rule in RULES.items():
        if name in config.auto:
            value, reasons[name] = rule(config, facts)
            config = replace(config, **{name: value, "auto": [other for other in config.auto if other != name]})
    return config, reasons


def describe_choices(config: TrainConfig, reasons: dict[str, str]) -> list[str]:
    """Return aligned lines of at most 80 columns: field, value, reason; without values that change nothing."""
    rows = []
    for name, reason in reasons.items():
        value: Any = config
        for part in name.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        if value != NEUTRAL.get(name, ...):
            rows.append((name, _shown(value), reason))
    first, second = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    return [line for name, value, reason in rows for line in hanging(f"{name:{first}}  {value:{second}}  ", reason)]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < value < 0.01 else f"{value:g}"
    return "null" if value is None else str(value)


# ---------------------------------------------------------------------------------------------------- what is learned


def _task(config: TrainConfig, facts: Facts) -> Choice:
    kind = facts.problem_type or SINGLE
    return TASK_OF[kind], f"the data has {KINDS[kind]}"


def _patch_size(config: TrainConfig, facts: Facts) -> Choice:
    side = min(facts.stored_size) if facts.stored_size else 224
    patch = next((size for size in (16, 8, 4, 2) if side >= SMALLEST_GRID * size), 1)
    return patch, f"at least {SMALLEST_GRID} patches along a side of {side:.0f} pixels"


def _image_size(config: TrainConfig, facts: Facts) -> Choice:
    if facts.is_checkpoint and facts.image_size:
        height, width = facts.image_size
        return height if height == width else [height, width], "the checkpoint's own"
    patch = max(_patch_of(config, facts))
    usual = 224 // patch * patch
    stored = min(facts.stored_size) if facts.stored_size else math.inf
    if config.task == "detection" and facts.stored_size:  # boxes keep their shapes
        sides = [max(1, round(side / stored * min(stored, usual) / patch)) * patch for side in facts.stored_size]
        return sides, f"the aspect ratio of the images, at most {usual} pixels along the shorter side"
    if stored >= usual:
        return usual, "usual for models from scratch"
    size = min(usual, max(round(stored / patch), SMALLEST_GRID) * patch)
    return size, f"the shorter side of the images, {stored:.0f} pixels, in patches of {patch}"


def _patch_of(config: TrainConfig, facts: Facts) -> tuple[int, int]:
    stated = config.model_config.get("patch_size") or facts.patch_size
    return (stated, stated) if isinstance(stated, int) else tuple(stated)


def _best_metric(config: TrainConfig, facts: Facts) -> Choice:
    return TASKS[config.task].best_metric, f"the default for {config.task}"


# ------------------------------------------------------------------------------------------------------- optimization


def _kind(facts: Facts) -> str:
    return "fine-tuning" if facts.is_checkpoint else "scratch"


def _batch_size(config: TrainConfig, facts: Facts) -> Choice:
    steps = STEPS_PER_EPOCH[_kind(facts)]
    least = SMALLEST_BATCH_OF_OBJECTS if config.task == "detection" else SMALLEST_BATCH
    wanted = min(LARGEST_BATCH, max(least, facts.images // steps), max(1, facts.images))
    size = 2 ** int(math.log2(wanted))
    size = max(1, math.ceil(size / facts.processes)) * facts.processes
    return size, f"{facts.images:,} training images, {counted(max(1, facts.images // size), 'step')} per epoch"


def _steps_per_epoch(config: TrainConfig, facts: Facts) -> int:
    return max(1, facts.images // config.batch_size)


def _epochs(config: TrainConfig, facts: Facts) -> Choice:
    if config.max_steps is not None:
        return config.max_steps / _steps_per_epoch(config, facts), f"max_steps is {config.max_steps:,}"
    least, most, visits, steps = EPOCHS[_kind(facts)]
    epochs = max(least, min(most, visits / max(1, facts.images)))
    epochs = max(epochs, min(MOST_EPOCHS, steps / _steps_per_epoch(config, facts)))
    epochs = math.ceil(epochs)
    steps = epochs * _steps_per_epoch(config, facts)
    return epochs, f"{steps:,} steps, {steps * config.batch_size:,} image visits"


def _warmup_epochs(config: TrainConfig, facts: Facts) -> Choice:
    return round(WARMUP_SHARE * config.epochs, 3), f"{WARMUP_SHARE:.0%} of the steps"


def _learning_rate(config: TrainConfig, facts: Facts) -> Choice:
    kind = {"all": "full fine-tuning", "lora": "low-rank updates", "head": "a linear head"}[config.trained]
    of_model = f"of a model of width {facts.width}"
    if not facts.is_checkpoint:
        rate, reason = RATE_FROM_SCRATCH * min(1, WIDTH_FROM_SCRATCH / facts.width), "training from scratch"
        if config.optimizer == "sgd":
            rate *= 100
        return _rounded(rate * RELATIVE_RATES.get(config.optimizer, 1)), f"{reason} {of_model}"
    reason = f"{kind} {of_model}, {config.optimizer}, batch size {config.batch_size}"
    if config.optimizer == "sgd":
        return _rounded(SGD_RATES[config.trained] * config.batch_size / 512), reason
    rate = RATES[config.trained] * math.sqrt(config.batch_size / 64)
    if config.trained != "head":  # the rate of a head does not depend on the layers below
        rate *= WIDTH_OF_RATE / facts.width
    limit = HIGHEST_RATE if config.trained == "all" else 10 * HIGHEST_RATE
    rate = min(limit, max(LOWEST_RATE, rate))
    return _rounded(rate * RELATIVE_RATES[config.optimizer]), reason


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")


def _layer_decay(config: TrainConfig, facts: Facts) -> Choice:
    if not facts.is_checkpoint:
        return 1.0, "training from scratch"
    if config.trained != "all" or config.task in ("masked_patches", "distillation", "lejepa"):
        return 1.0, "layer decay is only used in full fine-tuning"
    return 0.65 if facts.width >= 1024 else 0.75, f"full fine-tuning of {facts.depth} layers of width {facts.width}"


def _eval_every(config: TrainConfig, facts: Facts) -> Choice:
    every = max(1, math.ceil(config.epochs / EVALUATIONS))
    number = math.ceil(config.epochs / every)
    return every, f"{number} evaluation{'s' * (number > 1)}"


# ------------------------------------------------------------------------------------------------------------ machine


def _pixels(config: TrainConfig) -> tuple[int, int]:
    size = config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _useful_side(config: TrainConfig) -> int:
    """Return the smallest shorter side at which no square crop of `smallest_crop` is enlarged."""
    return math.ceil(max(_pixels(config)) / math.sqrt(config.smallest_crop))


def _cache(config: TrainConfig, facts: Facts) -> Choice:
    if facts.is_stream:
        return "none", "the data is a stream"
    if facts.stored_size is None:
        return "none", "the sizes of the images are unknown"
    height, width = facts.stored_size
    side = _useful_side(config) if "shorter_side" in config.auto else config.shorter_side
    scale = 1 if side is None else min(1, side / min(height, width))
    needed = facts.images * 3 * height * width * scale**2 + facts.evaluation_images * 3 * math.prod(_pixels(config))
    needed *= facts.local_processes
    sizes = f"{needed / 2**30:.2g} GiB of decoded images, {facts.memory / 2**30:.2g} GiB of memory are free"
    return "ram" if needed < MEMORY_SHARE * facts.memory else "none", sizes


def _shorter_side(config: TrainConfig, facts: Facts) -> Choice:
    side = _useful_side(config)
    if config.cache == "none":
        return None, "images are not cached"
    if facts.stored_size is not None and min(facts.stored_size) <= side:
        return None, "the images are not larger than crops require"
    return side, f"crops of {config.smallest_crop:.0%} of an image are not enlarged"


def _num_workers(config: TrainConfig, facts: Facts) -> Choice:
    per_process = facts.cores // facts.local_processes
    if per_process <= 2:
        return 0, f"{per_process} CPU cores per process"
    if config.cache != "none" and facts.device == "cpu":
        return 0, "images are cached"
    return min(per_process, 8), f"{per_process} CPU cores per process"


def activation_bytes(config: TrainConfig, facts: Facts) -> float:
    """Return an estimate of the bytes per image that a backward pass needs."""
    (height, width), (rows, columns) = _pixels(config), _patch_of(config, facts)
    values = (height // rows * (width // columns) + 1) * facts.width
    per_layer = 1 if config.gradient_checkpointing else VALUES_KEPT
    layers = 1 if config.trained == "head" else facts.depth
    return values * (2 if facts.is_half else 4) * (layers * per_layer + VALUES_KEPT)


def _accumulation_steps(config: TrainConfig, facts: Facts) -> Choice:
    learned = facts.parameters if config.trained == "all" else facts.parameters // 50
    weights = 4 * facts.parameters + 12 * learned  # gradients and two moments
    free = max(0.0, ACTIVATION_SHARE * facts.memory_of_process - weights)
    share = max(1, config.batch_size // facts.processes)
    per_image = activation_bytes(config, facts)
    divisors = [number for number in range(1, share + 1) if share % number == 0]
    steps = next((number for number in divisors if share // number * per_image <= free), share)
    return steps, (
        f"about {share // steps * per_image / 2**30:.2g} GiB of activations for {share // steps} images, "
        f"{facts.memory_of_process / 2**30:.2g} GiB are free"
    )


# In the order in which they depend on each other.
RULES: dict[str, Callable[[TrainConfig, Facts], Choice]] = {
    "task": _task,
    "image_size": _image_size,
    "batch_size": _batch_size,
    "accumulation_steps": _accumulation_steps,
    "epochs": _epochs,
    "warmup_epochs": _warmup_epochs,
    "learning_rate": _learning_rate,
    "layer_decay": _layer_decay,
    "eval_every": _eval_every,
    "best_metric": _best_metric,
    "cache": _cache,
    "shorter_side": _shorter_side,
    "num_workers": _num_workers,
}
