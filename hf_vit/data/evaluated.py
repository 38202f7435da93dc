"""The images to evaluate a model on: an evaluation split, what its run held out, or everything."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from .archives import ENDINGS, stem_of
from .folders import split_of
from .labelled import ALL, HELD_OUT, METRICS, RECIPE, ImageData, hold_out, load_data


def load_evaluation_data(
    model: str, source: str | Sequence[str], head: str | None = None, **options: Any
) -> tuple[ImageData, str]:
    """Load data to evaluate a model: the usual evaluation split, or without one, all images.

    Only the data that a run learned from is divided, as the run divided it. With `needs_train`, for probes, any data
    without an evaluation split is.

    Args:
        model: If this is the folder of a run, its recipe and metrics are read.
        source, options: As for `load_data`.
        head: Head of a multi-task model whose training data counts.

    Returns:
        The data, and a sentence for the user on how it relates to the training data of the model, or `""`.
    """
    past = _Past.of(Path(model), head)
    if head is not None:  # the columns that the head was trained on
        columns = ("image_column", "label_column", "label_separator")
        options |= {name: past.recipe.get(name) for name in columns if options.get(name) is None}
    needs_train, is_same = options.pop("needs_train", True), past.may_have_used(source)
    if needs_train:
        data = load_data(source, **options, **past.held_out)
        return _warned(data, past.warning() if is_same and data.eval_split == HELD_OUT else "")
    data = load_data(source, **options, needs_train=False, holds_out=False)
    if data.evaluation is not None:
        is_learned = is_same and split_of(data.eval_split) == "train"
        return _warned(data, "The model was trained on these images, or on most of them." * is_learned)
    whole = replace(data, evaluation=data.train, eval_split=ALL)
    if not past.data:
        return whole, ""
    if past.is_fitted and is_same:
        return _warned(whole, past.warning())
    if not is_same:
        note = f"All images are evaluated, since the model was trained on other data ({past.names})."
        return whole, f"{note} Only the paths are compared: copies of the training images are not noticed."
    if not past.has_as_many(len(data.train)):
        return _warned(
            whole,
            f"All images are evaluated, since there are not as many as in the training data ({past.names}): the model "
            "may have learned from some of them.",
        )
    train, evaluation = hold_out(data, **past.fractions)
    return _warned(replace(data, train=train, evaluation=evaluation, eval_split=HELD_OUT), past.warning())


def _warned(data: ImageData, warning: str) -> tuple[ImageData, str]:
    """Return data with a warning, or `""`, that the model may have learned from the evaluation split."""
    return replace(data, is_seen=bool(warning)), warning


@dataclass(frozen=True)
class _Past:
    """The recipe and the metrics that a run left in the folder of its model; empty without a run."""

    recipe: dict[str, Any]
    metrics: dict[str, Any]

    @classmethod
    def of(cls, folder: Path, head: str | None = None) -> "_Past":
        recipe, metrics = folder / RECIPE, folder / METRICS
        past = cls(
            yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {},
            json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else {},
        )
        if head is None:
            return past
        of_head = past.metrics.get("heads", {}).get(head, {})
        return cls(of_head.get("plan", {}), of_head)

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` made the model, which holds out nothing."""
        return "fitted_to" in self.metrics

    @property
    def data(self) -> list[str]:
        """Names of the training data."""
        named = self.metrics["fitted_to"] if self.is_fitted else self.recipe.get("data")
        return [named] if isinstance(named, str) and named else list(named or ())

    @property
    def names(self) -> str:
        return ", ".join(map(_last_part, self.data))

    @property
    def held_out(self) -> dict[str, Any]:
        """What the run stated about the division of its data."""
        return {name: self.recipe[name] for name in ("eval_fraction", "split_seed") if name in self.recipe}

    @property
    def fractions(self) -> dict[str, Any]:
        return {"fraction": self.recipe.get("eval_fraction", 0.2), "seed": self.recipe.get("split_seed", 0)}

    def may_have_used(self, source: str | Sequence[str]) -> bool:
        """Return whether a source may be the training data: a copy on another machine has another folder."""
        given = [source] if isinstance(source, str) else source
        return not set(map(_last_part, self.data)).isdisjoint(map(_last_part, given))

    def has_as_many(self, number: int) -> bool:
        """Return whether the run may have divided this number of images; True if it does not state its own."""
        trained, evaluated = self.metrics.get("train_images"), self.metrics.get("eval_count")
        is_sampled = self.recipe.get("streaming") or any(
            self.recipe.get(name, 1) != 1 for name in ("train_share", "train_repeats")
        )
        if trained is None or evaluated is None or is_sampled:
            return True
        return trained + evaluated <= number <= trained + evaluated + len(self.metrics.get("broken_images", ()))

    def warning(self) -> str:
        """Return a sentence if the run held out other images than those that are held out here."""
        if self.is_fitted:
            return "The model was trained on all of these images: metrics on other images will be lower."
        if self.recipe.get("streaming"):
            return "The model was trained on a stream, which holds out other images: it may have seen some of these."
        return ""


def _last_part(source: str) -> str:
    """Return the last part of a path or a name, without the ending of an archive."""
    path = Path(source)
    name = (path.resolve() if path.exists() else path).name
    return name if not name.lower().endswith(ENDINGS) else stem_of(Path(name))
