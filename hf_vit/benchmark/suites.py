"""What is compared: a case is one piece of work, of a size, that all variants of its suite do.

training        a step on one batch
inference       logits of one batch
preprocessing   photos in memory, still encoded, to pixel values for a model to answer about
augmentation    the same to randomly cropped and flipped ones for a model to learn from
prediction      photos in files to labels
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..variants import config_of
from .measure import CEILING, SUBJECTS, Job

SUITES = tuple(SUBJECTS)


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        suite: One of `SUITES`.
        name: What a reader calls it, within the suite.
        images: Of one call.
        model: Name of the model, see `model_fields`; `None` where there is none.
        photos: Size of the photos that are made for it, (height, width); `None` where there are none.
        is_quick: Whether all of it shall be small.
    """

    suite: str
    name: str
    images: int
    model: str | None = None
    photos: tuple[int, int] | None = None
    is_quick: bool = False

    @property
    def uses_one_thread(self) -> bool:
        """Whether it is the work of one of several processes that load images."""
        return self.suite in ("preprocessing", "augmentation")


# ------------------------------------------------------------------------------------------------------- models

CIFAR = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_labels": 10}
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "Ti/4 depth 6": {**CIFAR, "image_size": 32, "patch_size": 4, "num_hidden_layers": 6},
    "Ti/4 depth 9": {**CIFAR, "image_size": 32, "patch_size": 4, "num_hidden_layers": 9},
    "quick": {**CIFAR, "image_size": 224, "patch_size": 56, "num_hidden_layers": 2},
}


def model_fields(name: str) -> dict[str, Any]:
    """Return fields of `HFViTConfig` for `Ti/16`, `B/16` and the like, at 224 pixels, or one of `SMALL_MODELS`.

    Raises:
        ValueError: For a name that is not there.
    """
    if name in SMALL_MODELS:
        return SMALL_MODELS[name]
    config = config_of(f"ViT-{name}", num_labels=1000)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
    return {**{field: getattr(config, field) for field in names}, "image_size": 224, "num_labels": 1000}


# -------------------------------------------------------------------------------------------------------- cases

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
OTHER_BATCH = 8  # of a model that the tables do not have


def cases_of(
    suite: str,
    device: str,
    models: Sequence[str] = (),
    batch_size: int | None = None,
    photos: Sequence[Path] = (),
    is_quick: bool = False,
) -> list[Case]:
    """Return the cases of a suite, those of one model beside each other.

    Args:
        suite: One of `SUITES`.
        device: `"cpu"` or `"cuda"`.
        models: Names, see `model_fields`, instead of the usual ones.
        batch_size: Instead of the usual ones, for training and inference.
        photos: The user's; none are made then.
        is_quick: One case, as small as can be.

    Raises:
        ValueError: For a model that is not there.
    """
    for model in models:
        model_fields(model)
    if is_quick:
        models, batch_size = ["quick"], 2
    if suite in ("training", "inference"):
        table: dict[str, Any] = (TRAINING if suite == "training" else INFERENCE)[device]
        cases = []
        for model in models or table:
            sizes = batch_size or table.get(model, OTHER_BATCH)
            for size in (sizes,) if isinstance(sizes, int) else sizes:
                cases.append(Case(suite, f"{model}, batch {size}", size, model, is_quick=is_quick))
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
        return [
            Case(suite, f"{model}, {number} files of {kind}", number, model, size, is_quick)
            for model in models or PREDICTION
        ]
    return [Case(suite, f"{number} of {kind}", number, None, size, is_quick) for kind, (size, number) in kinds.items()]


def variants_of(suite: str, precision: str, against: Sequence[str] = (), is_compile_wanted: bool = False) -> list[str]:
    """Return the variants to measure, the one that the others are compared with first.

    Args:
        suite: One of `SUITES`.
        precision: `"fp32"` or `"bf16"`.
        against: Libraries, all if empty. Ours is always measured.
        is_compile_wanted: Also those that torch compiles, which takes minutes.
    """

    def is_wanted(variant: str) -> bool:
        library, *how = variant.split()
        if "compiled" in how and not is_compile_wanted:
            return False
        if "bf16" in how and precision != "bf16":
            return False
        return variant == CEILING or library == "ours" or not against or library in against

    return [variant for variant in SUBJECTS[suite] if is_wanted(variant)]


def libraries() -> list[str]:
    """Return all that ours can be compared with."""
    names = {variant.split()[0] for suite in SUBJECTS.values() for variant in suite if variant != CEILING}
    return sorted(names - {"ours"})


# ------------------------------------------------------------------------------------------------ what is the same


def relative_error(answer: np.ndarray, reference: np.ndarray) -> float:
    """Return the length of the difference, of that of the reference."""
    if answer.shape != reference.shape or not np.isfinite(answer).all():
        return float("inf")
    return float(np.linalg.norm((answer - reference).ravel()) / np.linalg.norm(reference.ravel()))


def regret(answer: np.ndarray, reference: np.ndarray) -> float:
    """Return how much less probable the labels are than the best ones, by the reference, as a mean share.

    Args:
        answer: Numbers of labels `[B]`.
        reference: Probabilities `[B, labels]`.
    """
    best = reference.max(axis=1)
    if answer.shape != best.shape:
        return float("inf")
    return float(np.mean(1 - np.take_along_axis(reference, answer[:, None], axis=1)[:, 0] / best))


# How far an answer may be from the reference, which is in fp32, and still be of the same work.
BOUNDS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], float], dict[str, float]]] = {
    "training": (relative_error, {"fp32": 5e-3, "bf16": 5e-2}),
    "inference": (relative_error, {"fp32": 1e-3, "bf16": 3e-2}),
    "preprocessing": (relative_error, {"uint8": 1e-2, "reduced": 5e-2}),
    "augmentation": (relative_error, {"uint8": 1e-2}),
    "prediction": (regret, {"fp32": 1e-2, "bf16": 5e-2}),
}


__all__ = ["BOUNDS", "CEILING", "SUBJECTS", "SUITES", "Case", "Job", "cases_of", "model_fields", "variants_of"]
