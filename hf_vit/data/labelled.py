"""Labelled images from any source of `datasets`, prepared on disk or streamed: a training and an evaluation split."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import ClassLabel, Features, Image, IterableDataset, Value

from .images import NO_IMAGE, derive_seed, image_digest
from .opening import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    choose,
    choose_splits,
    image_columns,
    label_columns,
    open_splits,
    stated_length,
    with_features,
)

RECIPE = "recipe.yaml"  # in the folder of a run
HELD_OUT = "held out"  # the name of an evaluation split that was taken from the training split


@dataclass(frozen=True)
class ImageData:
    """Labelled images: a training and an evaluation split.

    `columns` are the names of the image and label columns, the latter `None` without labels; `label_names` are the
    names of the class indices; `train_length` is the number of training images, approximate if a stream was divided.
    A stream gives images as they are stored, `{"bytes", "path"}`. `problem_type` is transformers' name for what the
    labels are, `None` without labels; `notes` are sentences about the data for the user.
    """

    name: str
    train: Any
    evaluation: Any
    columns: tuple[str, str | None]
    label_names: list[str]
    eval_split: str
    train_length: int
    problem_type: str | None = "single_label_classification"
    notes: list[str] = field(default_factory=list)

    @property
    def is_stream(self) -> bool:
        return isinstance(self.train, IterableDataset)

    def class_counts(self) -> list[int] | None:
        """Return the number of training images of every class or label; `None` for targets, streams or no labels."""
        if self.is_stream or self.columns[1] is None or self.problem_type == "regression":
            return None
        labels = torch.tensor(self.train[self.columns[1]][:])
        if self.problem_type == "multi_label_classification":
            return (labels == 1).sum(dim=0).tolist()
        return torch.bincount(labels, minlength=len(self.label_names)).tolist()


def load_data(
    source: str | Path,
    *,
    train_split: str | None = None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    eval_fraction: float = 0.2,
    train_share: float = 1.0,
    train_repeats: float = 1.0,
    split_seed: int = 0,
    streaming: bool = False,
    train_images: int | None = None,
    needs_labels: bool = True,
    needs_train: bool = True,
) -> ImageData:
    """Open a data set and divide it into a training and an evaluation split.

    Args:
        source: `"digits"` (scikit-learn's); a parquet file or webdataset shard; a folder of these, named by split or
            in one subfolder per split; a folder that `save_to_disk` wrote; a folder of images, one subfolder per
            class; or the name of a data set on the Hub.
        train_split: Training split; found by its usual name if not given.
        eval_split: Evaluation split; found by its usual name if not given. Without one, a part of the training split
            is held out: the same share of every class, or of a stream by a digest of each image.
        image_column: Column of images; the only one, or the one with a usual name, if not given.
        label_column: Column of labels; the only one of classes, or the one with a usual name, if not given.
        eval_fraction: Share to hold out if there is no evaluation split.
        train_share: Share of the training images of every class to use. Larger shares include smaller ones.
        train_repeats: Number of times that the training images are repeated, for longer epochs of few images.
        split_seed: Seed of these choices, apart from the seed of a run: all seeds are evaluated on the same images.
        streaming: Whether to stream the source instead of preparing it on disk first.
        train_images: Number of training images in a stream. If neither this nor the source states it, they are
            counted in one pass; unnamed classes are found in a pass, too.
        needs_labels: Whether to raise an error if there are no labels.
        needs_train: Whether a training split is required; if not, an evaluation split alone is enough.

    Raises:
        ValueError: If the source cannot be opened, or its splits or columns cannot be inferred.
    """
    splits = open_splits(source, streaming)
    train_name, eval_name = choose_splits(splits, train_split, eval_split, needs_train)
    used = [with_features(splits[name]) for name in (train_name, eval_name) if name is not None]
    features = used[0].features
    image_column = choose("image_column", image_columns(features), image_column, IMAGE_COLUMNS)
    if needs_labels or label_column is not None:
        label_column = choose("label_column", label_columns(features), label_column, LABEL_COLUMNS)
    columns = (image_column, label_column)
    used = [split.select_columns([name for name in columns if name]) for split in used]
    used = [split.cast_column(image_column, Image(decode=not streaming)) for split in used]
    path = Path(source).expanduser()
    name = path.resolve().stem if path.exists() else str(source)  # a model card must not reveal local paths
    kind = _Streams if streaming else _Tables
    data = kind(used, columns, eval_fraction, split_seed).divide(name, eval_name, train_images)
    is_plain = train_share == train_repeats == 1
    return data if is_plain else _resampled(data, train_share, train_repeats, split_seed)


def load_evaluation_data(model: str, source: str, **options: Any) -> tuple[ImageData, str]:
    """Load data to evaluate a model; if a run left the model, hold out what the run held out.

    Args:
        model: If this is the folder of a run, its recipe is read.
        source, options: As for `load_data`.

    Returns:
        The data, and a warning if the model may have been trained on some of the held-out images, or `""`.
    """
    path = Path(model) / RECIPE
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    held_out = {name: recipe[name] for name in ("eval_fraction", "split_seed") if name in recipe}
    data = load_data(source, **options, **held_out)
    if data.eval_split == HELD_OUT and recipe.get("streaming"):
        return data, "The model was trained on a stream, which holds out other images: it may have seen some of these."
    return data, ""


def _resampled(data: ImageData, share: float, repeats: float, seed: int) -> ImageData:
    """Return data with a share of its training images, repeated."""
    if data.is_stream:
        raise ValueError("train_share and train_repeats need a prepared data set: set both to 1, or streaming: false.")
    if repeats < 1:
        raise ValueError(f"train_repeats must be at least 1, got {repeats}: to use fewer images, set train_share.")
    chosen = list(range(len(data.train)))
    if share != 1:
        _, chosen = split_evenly(_labels(data.train, data.columns[1]), share, seed, "train_share")
    if not chosen:
        raise ValueError(f"train_share={share} leaves none of {len(data.train)} training images: increase it.")
    indices = [chosen[index % len(chosen)] for index in range(round(repeats * len(chosen)))]
    return replace(data, train=data.train.select(indices), train_length=len(indices))


def _labels(split: Any, column: str | None) -> list[int]:
    return split[column] if column else [0] * len(split)


class _Tables:
    """One or two prepared splits, with the same classes."""

    def __init__(self, splits: list[Any], columns: tuple[str, str | None], fraction: float, seed: int) -> None:
        self.columns, self.fraction, self.seed = columns, fraction, seed
        self.splits, self.label_names = (splits, []) if columns[1] is None else self._with_classes(splits, columns[1])

    def divide(self, name: str, eval_split: str | None, train_images: int | None) -> ImageData:
        """Return the splits as data; a single one is divided."""
        train, evaluation = self.splits if len(self.splits) == 2 else self._hold_out(self.splits[0])
        length = self._train_length(train, train_images)
        if length == 0 or (hasattr(evaluation, "__len__") and len(evaluation) == 0):
            raise ValueError(f"{name} has {length} training images and needs some for evaluation too: add images.")
        return ImageData(name, train, evaluation, self.columns, self.label_names, eval_split or HELD_OUT, length)

    def _with_classes(self, splits: list[Any], column: str) -> tuple[list[Any], list[str]]:
        """Return the splits with labels of the same classes, and the names of these."""
        features: list[Any] = [split.features.get(column) for split in splits]
        if all(isinstance(feature, ClassLabel) and feature.names for feature in features):
            if len({tuple(feature.names) for feature in features}) > 1:
                raise ValueError(f"The splits have different classes in {column!r}: {[f.names for f in features]}.")
            return splits, features[0].names
        for feature in features:
            if not isinstance(feature, Value | ClassLabel):
                raise ValueError(
                    f"Expected one class per image in {column!r}, got {feature}: specify another label_column."
                )
        values = self._values(splits, column)
        if None in values:
            raise ValueError(f"Some images have no label in {column!r}: remove them, or specify another label_column.")
        ordered = sorted(values, key=lambda value: (str(type(value)), value))
        if all(isinstance(value, int) and value >= 0 for value in ordered):  # already class indices
            ordered = list(range(max(ordered, default=-1) + 1))
        names, indices = [str(value) for value in ordered], {value: index for index, value in enumerate(ordered)}
        return [self._with_indices(split, column, indices, names) for split in splits], names

    def _values(self, splits: list[Any], column: str) -> set[Any]:
        return {value for split in splits for value in split.unique(column)}

    def _with_indices(self, split: Any, column: str, indices: dict[Any, int], names: list[str]) -> Any:
        labels = [indices[value] for value in split[column]]
        return split.remove_columns(column).add_column(column, labels).cast_column(column, ClassLabel(names=names))

    def _hold_out(self, split: Any) -> tuple[Any, Any]:
        train, held_out = split_evenly(_labels(split, self.columns[1]), self.fraction, self.seed)
        return split.select(train), split.select(held_out)

    def _train_length(self, train: Any, train_images: int | None) -> int:
        return len(train)


class _Streams(_Tables):
    """One or two streamed splits, which are read from the beginning in every epoch."""

    def _values(self, splits: list[Any], column: str) -> set[Any]:
        return {row[column] for split in splits for row in split.select_columns(column)}

    def _with_indices(self, split: Any, column: str, indices: dict[Any, int], names: list[str]) -> Any:
        features = Features({**split.features, column: ClassLabel(names=names)})
        return split.map(lambda row: {column: indices[row[column]]}, features=features)

    def _hold_out(self, split: Any) -> tuple[Any, Any]:
        limit = int(_checked_share(self.fraction, "eval_fraction") * 2**63)

        def is_held_out(row: dict[str, Any]) -> bool:
            return derive_seed(self.seed, "split", image_digest(row[self.columns[0]] or NO_IMAGE)) < limit

        return split.filter(lambda row: not is_held_out(row)), split.filter(is_held_out)

    def _train_length(self, train: Any, train_images: int | None) -> int:
        if train_images is not None:
            return train_images
        # Of the undivided split, whether stated or counted: the number of steps must not depend on a cache.
        split, share = self.splits[0], 1.0 if len(self.splits) == 2 else 1 - self.fraction
        # Labels are faster to read than images.
        smallest = split if self.columns[1] is None else split.select_columns(self.columns[1])
        return round(share * (stated_length(split) or sum(1 for _ in smallest)))


def split_evenly(
    labels: Iterable[int], fraction: float, seed: int, name: str = "eval_fraction"
) -> tuple[list[int], list[int]]:
    """Divide indices, in order, so that the second list has `fraction` of every class; `name` is for errors."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "split"))
    classes = torch.tensor(list(labels))
    chosen: set[int] = set()
    for label in classes.unique():
        members = (classes == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        chosen.update(members[order[: round(_checked_share(fraction, name) * len(members))]].tolist())
    return [index for index in range(len(classes)) if index not in chosen], sorted(chosen)


def _checked_share(fraction: float, name: str) -> float:
    if not 0 < fraction < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {fraction}.")
    return fraction
