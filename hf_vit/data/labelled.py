"""From a name to labelled images: any source of `datasets`, prepared on the disk or read as a stream."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    Value,
)

from .opening import (
    EVAL_SPLITS,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    MISSING,
    TRAIN_SPLITS,
    _classes_in,
    _label_like,
    choose,
    identity_of,
    images_in,
    known,
    open_splits,
    seed_of,
    stated_length,
)


@dataclass(frozen=True)
class ImageData:
    """Images with their labels: what is learned from, and what is held out.

    `columns` are the names of image and label, the latter `None` where there are no labels; `label_names` says what
    the numbers of the labels stand for; `train_length` counts the training images, about where a stream was cut. A
    stream gives images as they are stored, `{"bytes", "path"}`.
    """

    name: str
    train: Any
    evaluation: Any
    columns: tuple[str, str | None]
    label_names: list[str]
    eval_split: str
    train_length: int

    @property
    def is_stream(self) -> bool:
        return isinstance(self.train, IterableDataset)


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
    """Load images, with something held out.

    Args:
        source: `"digits"` (scikit-learn's); a parquet file or webdataset shard; a folder of these, named by split or
            in a subfolder for each; what `save_to_disk` wrote; a folder of images, one subfolder a class; or a
            dataset's name on the Hub.
        train_split: Split to learn from; found by its usual name if not given.
        eval_split: Split to hold out. Where there is none, a part of the training split is: evenly by class, or of a
            stream by what the images are.
        image_column: Column of images; the only one, or the one with a usual name, if not given.
        label_column: Column of labels; the only one of classes, or the one with a usual name, if not given.
        eval_fraction: Share that is held out where there is no split for it.
        train_share: Share of every class of the training images that is learned from; a smaller share is part of any
            larger one.
        train_repeats: Times that these are there, so that an epoch of a few images can be as long as one of many.
        split_seed: Of these choices. It is no part of a run's seed: all seeds are measured on the same images.
        streaming: Whether to read the source as it comes, instead of preparing it on the disk first.
        train_images: Number of training images in a stream; read through it once if neither this nor the source
            says it. The same pass finds the classes of labels that have no names.
        needs_labels: Whether data without labels is refused.
        needs_train: Whether a split to learn from is; without, what is only for testing is taken whole.

    Raises:
        ValueError: If the source is nothing of these, or splits or columns cannot be told.
    """
    splits = open_splits(source, streaming)
    usual = [name for name in EVAL_SPLITS if name in splits]
    if eval_split is not None and eval_split not in splits:
        raise ValueError(f"There is no split {eval_split!r} in {source}: it has {', '.join(splits)}.")
    if not needs_train and (eval_split or usual):
        train_name = eval_split = eval_split or usual[0]
    else:
        train_name = choose("train_split", splits, train_split, TRAIN_SPLITS)
        eval_split = eval_split or next((name for name in usual if name != train_name), None)
    used = [splits[name] for name in (train_name, eval_split) if name is not None]
    features = known(used[0]).features
    image_column = choose("image_column", images_in(features), image_column, IMAGE_COLUMNS)
    if needs_labels or label_column is not None:
        label_column = choose(
            "label_column", _classes_in(features) or _label_like(features), label_column, LABEL_COLUMNS
        )
    columns = (image_column, label_column)
    used = [known(split).select_columns([name for name in columns if name]) for split in used]
    used = [split.cast_column(image_column, Image(decode=not streaming)) for split in used]
    kind = _Streams if streaming else _Tables
    found = kind(used, columns, eval_fraction, split_seed).data(_name_of(source), eval_split, train_images)
    found = found if train_share == 1 else _share_of(found, train_share, split_seed)
    return found if train_repeats == 1 else _repeated(found, train_repeats)


def _share_of(data: ImageData, share: float, seed: int) -> ImageData:
    """Return data with a share of its training images."""
    if data.is_stream:
        raise ValueError(f"A stream is learned from whole: set train_share: 1, or streaming: false; got {share}.")
    label = data.columns[1]
    _, chosen = split_evenly(data.train[label] if label else [0] * len(data.train), share, seed, "train_share")
    if not chosen:
        raise ValueError(f"train_share={share} leaves none of {len(data.train)} training images: make it larger.")
    return replace(data, train=data.train.select(chosen), train_length=len(chosen))


def _repeated(data: ImageData, times: float) -> ImageData:
    """Return data whose training images are there several times."""
    if data.is_stream:
        raise ValueError(f"A stream is read once an epoch: set train_repeats: 1, or streaming: false; got {times}.")
    if times < 1:
        raise ValueError(f"train_repeats must be at least 1, got {times}: for fewer images set train_share.")
    places = [place % data.train_length for place in range(round(times * data.train_length))]
    return replace(data, train=data.train.select(places), train_length=len(places))


def _name_of(source: str | Path) -> str:
    path = Path(source).expanduser()
    return path.resolve().stem if path.exists() else str(source)  # a card is no place for the paths of a machine


# ------------------------------------------------------------------------------------- splits and their classes


class _Tables:
    """Splits that are known from end to end."""

    def __init__(self, splits: list[Any], columns: tuple[str, str | None], fraction: float, seed: int) -> None:
        self.columns, self.fraction, self.seed = columns, fraction, seed
        self.splits, self.names = (splits, []) if columns[1] is None else self._classes(splits, columns[1])

    def _classes(self, splits: list[Any], column: str) -> tuple[list[Any], list[str]]:
        """Give the labels of all splits the same classes, named."""
        if (names := _names_of_classes(splits, column)) is not None:
            return splits, names
        for feature in (split.features[column] for split in splits):
            if not isinstance(feature, Value | ClassLabel):
                raise ValueError(f"Expected one class an image in {column!r}, got {feature}: name a label_column.")
        names, number = _name_classes(self._values(splits, column), column)
        return [self._numbered(split, column, number, names) for split in splits], names

    def _values(self, splits: list[Any], column: str) -> set[Any]:
        return {value for split in splits for value in split.unique(column)}

    def _numbered(self, split: Any, column: str, number: dict[Any, int], names: list[str]) -> Any:
        numbers = [number[value] for value in split[column]]
        return split.remove_columns(column).add_column(column, numbers).cast_column(column, ClassLabel(names=names))

    def _hold_out(self, split: Any) -> tuple[Any, Any]:
        label = self.columns[1]
        kept, held_out = split_evenly(split[label] if label else [0] * len(split), self.fraction, self.seed)
        return split.select(kept), split.select(held_out)

    def _length(self, split: Any, train_images: int | None, share: float) -> int:
        return len(split)

    def data(self, name: str, eval_split: str | None, train_images: int | None) -> ImageData:
        share = 1.0 if len(self.splits) == 2 else 1 - self.fraction
        train, evaluation = self.splits if len(self.splits) == 2 else self._hold_out(self.splits[0])
        length = self._length(train, train_images, share)
        if length == 0 or (isinstance(evaluation, Dataset) and len(evaluation) == 0):
            raise ValueError(f"{name} gives {length} images to learn from, and something must be left to hold out.")
        return ImageData(name, train, evaluation, self.columns, self.names, eval_split or "held out", length)


class _Streams(_Tables):
    """Splits that are read from their beginning, again and again."""

    def _values(self, splits: list[Any], column: str) -> set[Any]:
        return {row[column] for split in splits for row in split.select_columns(column)}

    def _numbered(self, split: Any, column: str, number: dict[Any, int], names: list[str]) -> Any:
        features = Features({**split.features, column: ClassLabel(names=names)})
        return split.map(lambda row: {column: number[row[column]]}, features=features)

    def _hold_out(self, split: Any) -> tuple[Any, Any]:
        limit = int(_share(self.fraction) * 2**63)

        def is_held_out(row: dict[str, Any]) -> bool:
            return seed_of(self.seed, "split", identity_of(row[self.columns[0]] or MISSING)) < limit

        return split.filter(lambda row: not is_held_out(row)), split.filter(is_held_out)

    def _length(self, split: Any, train_images: int | None, share: float) -> int:
        if train_images is not None:
            return train_images
        # Of the whole, whether it is stated or counted: the length of a run must not depend on what a cache holds.
        whole = self.splits[0]
        # A column of labels is faster to read than one of images.
        smallest = whole if self.columns[1] is None else whole.select_columns(self.columns[1])
        return round(share * (stated_length(whole) or sum(1 for _ in smallest)))


def split_evenly(
    labels: Iterable[int], fraction: float, seed: int, name: str = "eval_fraction"
) -> tuple[list[int], list[int]]:
    """Return indices to keep and to hold out, in order: `fraction`, called `name`, of every class is held out."""
    generator = torch.Generator().manual_seed(seed_of(seed, "split"))
    classes = torch.tensor(list(labels))
    held_out: set[int] = set()
    for label in classes.unique():
        members = (classes == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        held_out.update(members[order[: round(_share(fraction, name) * len(members))]].tolist())
    return [index for index in range(len(classes)) if index not in held_out], sorted(held_out)


def _share(fraction: float, name: str = "eval_fraction") -> float:
    if not 0 < fraction < 1:
        raise ValueError(f"{name} is a share between 0 and 1, got {fraction}.")
    return fraction


def _names_of_classes(splits: list[Any], column: str) -> list[str] | None:
    features: list[Any] = [split.features.get(column) for split in splits]
    if not all(isinstance(feature, ClassLabel) and feature.names for feature in features):
        return None
    if len({tuple(feature.names) for feature in features}) > 1:
        raise ValueError(f"The splits have different classes in {column!r}: {[f.names for f in features]}.")
    return features[0].names


def _name_classes(values: set[Any], column: str) -> tuple[list[str], dict[Any, int]]:
    """Return the names of classes, and the number of each value that stands for one."""
    if None in values:
        raise ValueError(f"Some images have no label in {column!r}: remove them, or name another label_column.")
    ordered = sorted(values, key=lambda value: (str(type(value)), value))
    if all(isinstance(value, int) and value >= 0 for value in ordered):  # numbers are kept as they are
        ordered = list(range(max(ordered, default=-1) + 1))
    return [str(value) for value in ordered], {value: number for number, value in enumerate(ordered)}


# -------------------------------------------------------------------------------------------------- the source


# ----------------------------------------------------------------------------------------------------- columns


def _recipe_of(source: str) -> dict[str, Any]:
    """Return the fields of the run that left a model in a folder, if they are there."""
    path = Path(source) / RECIPE
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _held_out_by(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that say which part of the data a run held out."""
    return {name: recipe[name] for name in ("eval_fraction", "split_seed") if name in recipe}


RECIPE = "recipe.yaml"  # in the folder of a run
