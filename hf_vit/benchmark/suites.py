"""Suites, cases and variants. A case is work of one size that all variants of its suite do.

training        a step on one batch
inference       logits of one batch
preprocessing   encoded photos in memory to pixel values for inference
augmentation    encoded photos in memory to randomly cropped and flipped pixel values for training
prediction      photos in files to labels
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..variants import config_of
from .measure import CEILING, SUBJECTS

SUITES = tuple(SUBJECTS)


@dataclass(frozen=True)
class Case:
    """Describe the work of one comparison.

    Attributes:
        suite: One of `SUITES`.
        name: Name within the suite.
        images: Number of images per call.
        model: Name of the model, see `model_fields`; `None` without a model.
        photos: Size of the photos to generate, (height, width); `None` without photos.
    """

    suite: str
    name: str
    images: int
    model: str | None = None
    photos: tuple[int, int] | None = None

    @property
    def uses_one_thread(self) -> bool:
        """Whether this is the work of one of several data loader workers."""
        return self.suite in ("preprocessing", "augmentation")


CIFAR = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_labels": 10}
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "Ti/4 depth 6": {**CIFAR, "image_size": 32, "patch_size": 4, "num_hidden_layers": 6},
    "Ti/4 depth 9": {**CIFAR, "image_size": 32, "patch_size": 4, "num_hidden_layers": 9},
    "quick": {**CIFAR, "image_size": 224, "patch_size": 56, "num_hidden_layers": 2},
}


def model_fields(name: str) -> dict[str, Any]:
    """Return fields of `HFViTConfig` for `Ti/16`, `B/16`, ... at 224 pixels, or for one of `SMALL_MODELS`.

    Raises:
        ValueError: For an unknown name.
    """
    if name in SMALL_MODELS:
        return SMALL_MODELS[name]
    config = config_of(name, num_labels=1000)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
    return {**{field: getattr(config, field) for field in names}, "image_size": 224, "num_labels": 1000}


# Batch sizes by device and model.
TRAINING = {
    "cpu": {"Ti/4 depth 6": 128, "Ti/4 depth 9": 128, "Ti/16": 16, "S/16": 8},
    "cuda": {"Ti/4 depth 6": 1024, "Ti/4 depth 9": 1024, "S/16": 256, "B/16": 128, "L/16": 64, "H/14": 32},
}
INFERENCE = {
    "cpu": {"Ti/16": (1, 16), "S/16": (1, 16), "B/16": (1, 16)},
    "cuda": {"Ti/16": (1, 256), "S/16": (1, 256), "B/16": (1, 256), "L/16": (1, 128), "H/14": (1, 64)},
}
PREDICTION = ("Ti/16", "B/16")
PHOTOS = {"500 px": (375, 500), "12 Mpx": (3000, 4000)}
NUMBER_OF_PHOTOS = {"500 px": 32, "12 Mpx": 4}
DEFAULT_BATCH_SIZE = 8  # for models that the tables lack


def cases_of(
    suite: str,
    device: str,
    models: Sequence[str] = (),
    batch_size: int | None = None,
    photos: Sequence[Path] = (),
    is_quick: bool = False,
) -> list[Case]:
    """Return the cases of a suite, grouped by model.

    Args:
        suite: One of `SUITES`.
        device: `"cpu"` or `"cuda"`.
        models: Names for `model_fields` instead of the default models.
        batch_size: Batch size of training and inference instead of the defaults.
        photos: Files to use instead of generated photos.
        is_quick: Whether to return one small case.

    Raises:
        ValueError: For an unknown model.
    """
    for model in models:
        model_fields(model)
    if is_quick:
        models, batch_size = ["quick"], 2
    if suite in ("training", "inference"):
        table: dict[str, Any] = (TRAINING if suite == "training" else INFERENCE)[device]
        cases = []
        for model in models or table:
            sizes = batch_size or table.get(model, DEFAULT_BATCH_SIZE)
            for size in (sizes,) if isinstance(sizes, int) else sizes:
                cases.append(Case(suite, f"{model}, batch {size}", size, model))
        return cases
    if is_quick:
        kinds = {"photos": ((90, 120), 2)}
    elif photos:
        kinds = {"your photos": ((0, 0), len(photos))}
    else:
        kinds = {name: (PHOTOS[name], NUMBER_OF_PHOTOS[name]) for name in PHOTOS}
    if suite == "prediction":
        kind, (size, number) = next(iter(kinds.items()))
        number = number if photos or is_quick else 2 * number
        name = f"{number} files of {kind}"
        return [Case(suite, f"{model}, {name}", number, model, size) for model in models or PREDICTION]
    return [Case(suite, f"{number} of {kind}", number, photos=size) for kind, (size, number) in kinds.items()]


def variants_of(suite: str, precision: str, against: Sequence[str] = (), is_compile_wanted: bool = False) -> list[str]:
    """Return the variants to measure, the baseline first.

    Args:
        suite: One of `SUITES`.
        precision: `"fp32"` or `"bf16"`.
        against: Other libraries; all if empty. Ours is always measured.
        is_compile_wanted: Whether to include compiled variants, which take minutes.
    """

    def is_wanted(variant: str) -> bool:
        if ("compiled" in variant and not is_compile_wanted) or ("bf16" in variant and precision != "bf16"):
            return False
        return variant == CEILING or not against or library_of(variant) in ("ours", *against)

    return [variant for variant in SUBJECTS[suite] if is_wanted(variant)]


def library_of(variant: str) -> str:
    """Return the library of a variant, its first word."""
    return variant.split()[0]


def libraries() -> list[str]:
    """Return the other libraries that have a variant."""
    names = {library_of(variant) for suite in SUBJECTS.values() for variant in suite if variant != CEILING}
    return sorted(names - {"ours"})


def relative_error(output: np.ndarray, reference: np.ndarray) -> float:
    """Return the norm of the difference relative to the norm of the reference."""
    if output.shape != reference.shape or not np.isfinite(output).all():
        return float("inf")
    return float(np.linalg.norm((output - reference).ravel()) / np.linalg.norm(reference.ravel()))


def regret(classes: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean loss of probability compared with the best classes, relative to these.

    Args:
        classes: Class indices `[B]`.
        reference: Probabilities `[B, labels]`.
    """
    best = reference.max(axis=1)
    if classes.shape != best.shape:
        return float("inf")
    return float(np.mean(1 - np.take_along_axis(reference, classes[:, None], axis=1)[:, 0] / best))


# Distance and, by precision, the largest distance from the fp32 reference that counts as equal.
BOUNDS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], float], dict[str, float]]] = {
    "training": (relative_error, {"fp32": 5e-3, "bf16": 5e-2}),
    "inference": (relative_error, {"fp32": 1e-3, "bf16": 3e-2}),
    "preprocessing": (relative_error, {"uint8": 1e-2, "reduced": 5e-2}),
    "augmentation": (relative_error, {"uint8": 1e-2}),
    "prediction": (regret, {"fp32": 1e-2, "bf16": 5e-2}),
}
