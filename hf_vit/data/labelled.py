"""Labelled images from any source of `datasets`, prepared on disk or streamed: a training and an evaluation split."""

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset, Image, IterableDataset, concatenate_datasets

from ..system.texts import counted, shortened
from .archives import is_archive, stem_of
from .classes import (
    DENSE,
    DETECTION,
    REGRESSION,
    SEGMENTATION,
    SINGLE,
    TASK_OF,
    Labels,
    Part,
    choose_label_columns,
    convert_labels,
    note_on_order,
)
from .dense import DENSE_LABELS, DenseLabels
from .folders import is_split
from .images import NO_IMAGE, derive_seed, image_digest, name_of
from .masks import MaskCode, names_beside
from .objects import images_of_classes, objects_without_classes
from .opening import (
    IMAGE_COLUMNS,
    as_stream,
    choose,
    choose_splits,
    eval_splits,
    image_columns,
    label_columns,
    open_source,
    stated_length,
    with_features,
)
from .tables import normalized

# Names of tables that say less than the name of their folder.
PLAIN_NAMES = {"label", "labels", "metadata", "annotation", "annotations", "data", "images", "index", "train", "table"}
RECIPE, METRICS = "recipe.yaml", "metrics.json"  # in the folder of a run
Source: TypeAlias = str | Path | Dataset | IterableDataset | dict  # of splits
HELD_OUT, ALL = "held out", "all"  # evaluation splits of a source without one: a part, or all of its images


class Unlabelled(ValueError):
    """The data has no labels that a classifier could learn; `short` says so without a remedy."""

    def __init__(self, short: str, message: str) -> None:
        super().__init__(message)
        self.short = short


@dataclass(frozen=True)
class ImageData:
    """Labelled images: a training and an evaluation split.

    `columns` are the names of the image and label columns, the latter `None` without labels; `label_names` are the
    names of the class indices; `train_length` is the number of training images, approximate if a stream was divided.
    A stream gives images as they are stored, `{"bytes", "path"}`. `problem_type` is transformers' name for what the
    labels are, `None` without labels; `notes` are sentences about the data for the user. With masks as labels, `masks`
    states what their values mean, and both columns hold images as they are stored; with boxes, the second one holds
    rows of objects (`objects`). `is_seen` states whether the model to evaluate may have learned from the evaluation
    split.
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
    masks: MaskCode | None = None
    is_seen: bool = False

    @property
    def is_stream(self) -> bool:
        return isinstance(self.train, IterableDataset)

    def class_counts(self) -> list[int] | None:
        """Return the number of training images of every class or label; `None` for other data, and for streams."""
        if self.is_stream or self.columns[1] is None or self.problem_type in (REGRESSION, SEGMENTATION):
            return None
        rows = self.train[self.columns[1]][:]
        if self.problem_type == DETECTION:
            return images_of_classes(rows, len(self.label_names))
        labels = torch.tensor(rows)
        if self.problem_type == "multi_label_classification":
            return (labels == 1).sum(dim=0).tolist()
        return torch.bincount(labels, minlength=len(self.label_names)).tolist()


def load_data(
    source: Source | Sequence[Source],
    *,
    train_split: str | None = None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    label_separator: str | None = None,
    problem_type: str | None = None,
    box_format: str | None = None,
    eval_fraction: float = 0.2,
    train_share: float = 1.0,
    train_repeats: float = 1.0,
    split_seed: int = 0,
    streaming: bool = False,
    train_images: int | None = None,
    needs_labels: bool = True,
    needs_train: bool = True,
    holds_out: bool = True,
) -> ImageData:
    """Open a data set and divide it into a training and an evaluation split.

    Args:
        source: `"digits"` (scikit-learn's); a folder of images, one subfolder per class, with or without folders for
            the splits; a table of image paths and labels (.csv, .tsv, .jsonl, .parquet), or a folder with a table and
            images; a zip or tar of these; a parquet file or webdataset shard; a folder of these, named by split or in
            one subfolder per split; a folder that `save_to_disk` wrote; the name of a data set on the Hub; a data set
            or a dictionary of splits of `datasets`, in any format; or a list of sources, whose images are joined and
            whose classes are united by name.
        train_split: Training split; found by its usual name if not given.
        eval_split: Evaluation split; found by its usual name if not given. Without one, a part of the training split
            is held out: the same share of every class, or of a stream by a digest of each image.
        image_column: Column of images or of their paths; the only one, or the one with a usual name, if not given.
        label_column: Column of labels; the only one of classes, or the one with a usual name, if not given. A list
            names several columns: of 0/1 for each class, or of numbers.
        label_separator: Separator between the labels of an image; detected if not given.
        problem_type: `"single_label_classification"`, `"multi_label_classification"` or `"regression"`; inferred from
            the labels if not given. `"semantic_segmentation"` reads masks as labels: a second column of images, or
            folders of images and masks (`mask_folders`). `"object_detection"` reads boxes: a column of objects
            (`objects`), or folders with files of COCO, Pascal VOC or YOLO (`box_folders`).
        box_format: What the four numbers of boxes in columns are, a key of `objects.FORMATS`; COCO's if not given,
            unless the others fit into the images and these do not.
        eval_fraction: Share to hold out if there is no evaluation split.
        train_share: Share of the training images of every class to use. Larger shares include smaller ones.
        train_repeats: Number of times that the training images are repeated, for longer epochs of few images.
        split_seed: Seed of these choices, apart from the seed of a run: all seeds are evaluated on the same images.
        streaming: Whether to stream the source instead of preparing it on disk first.
        train_images: Number of training images in a stream. If neither this nor the source states it, they are
            counted in one pass; unnamed classes are found in a pass, too.
        needs_labels: Whether to raise an error if there are no labels.
        needs_train: Whether a training split is required; if not, an evaluation split alone is enough.
        holds_out: Whether to hold out images if there is no evaluation split; if not, `evaluation` is `None` then.

    Raises:
        ValueError: If the source cannot be opened, its splits or columns cannot be inferred, or its labels are missing
            or do not fit `problem_type`.
    """
    sources = [source] if isinstance(source, Source) else list(source)
    if problem_type not in (None, *TASK_OF):
        raise ValueError(f"Unknown problem_type {problem_type!r}: choose one of {', '.join(TASK_OF)}.")
    columns = [label_column] if isinstance(label_column, str) else list(label_column or ())
    dense = DENSE_LABELS.get(problem_type)
    is_alone = len(sources) == 1
    choice = _Choice(train_split, eval_split, image_column, columns, needs_labels, needs_train, is_alone, dense)
    notes = choice.notes
    names: dict[int, str] | None = None
    parts: list[Part] = []
    eval_names: list[str] = []
    for each in sources:
        opened = (dense.open if dense else open_source)(each, streaming, image_column, columns)
        notes += opened.notes
        names = names or (names_beside(each) if dense else None)
        own, eval_name = choice.parts_of(_name_of(each), opened.splits)
        parts += own
        eval_names += [eval_name] if eval_name is not None else []
    if not any(part.is_train for part in parts):
        raise ValueError(
            "Found no training split in the sources: give a source with one, or its name as train_split."
            if sources
            else "Expected a data set, got an empty list: name at least one."
        )
    name = " + ".join(map(_name_of, sources))
    fraction = eval_fraction if holds_out else None
    if dense:
        united = _united_dense(dense, parts, names, box_format, streaming)
    else:
        united = _united(parts, problem_type, label_separator, streaming)
    data = _divided(united, name, fraction, split_seed, train_images)
    held_out = HELD_OUT if holds_out else ""
    data = replace(data, eval_split=", ".join(dict.fromkeys(eval_names)) or held_out, notes=[*notes, *data.notes])
    if needs_train:
        _check_classes(data, eval_fraction)
    is_plain = train_share == train_repeats == 1
    return data if is_plain else _resampled(data, train_share, train_repeats, split_seed)


def _name_of(source: Source) -> str:
    """Return the name of a source for cards, which must not reveal local paths."""
    if not isinstance(source, str | Path):
        split = next(iter(source.values())) if isinstance(source, dict) else source
        return split.info.dataset_name or "data"
    path = Path(source).expanduser()
    if is_archive(path):
        return stem_of(path)
    if path.is_file():
        path = path.resolve()
        return path.parent.name if normalized(path.stem) in PLAIN_NAMES and path.parent.name else path.stem
    return path.resolve().name if path.exists() else str(source)


@dataclass
class _Choice:
    """What to take from each source; arguments of `load_data`."""

    train_split: str | None
    eval_split: str | None
    image_column: str | None
    label_columns: list[str]
    needs_labels: bool
    needs_train: bool
    is_alone: bool
    dense: DenseLabels | None = None
    notes: list[str] = field(default_factory=list)

    def parts_of(self, name: str, splits: dict[str, Any]) -> tuple[list[Part], str | None]:
        """Return the training and evaluation parts of a source, and the name of the evaluation split if it has one."""
        eval_split = self.eval_split
        if not self.is_alone:
            if eval_split is not None and eval_split not in splits:
                eval_split = None
            if set(splits) == set(found := eval_splits(splits)):
                eval_split = eval_split or found[0]
                return [self._part(name, splits[eval_split], False, None)], eval_split
        train_name, eval_name = choose_splits(splits, self.train_split, eval_split, self.needs_train)
        train = self._part(name, splits[train_name], True, None)
        is_asked = self.eval_split is not None or set(splits) == {eval_name}
        if not is_asked and eval_name is not None and not self._is_labelled(splits[eval_name]):
            self.notes.append(
                f"The {eval_name} split has no labels, so it is not used: images of the training split are held "
                "out for evaluation."
            )
            rest = {each: split for each, split in splits.items() if each != eval_name}
            return self.parts_of(name, rest)
        unknown = [each for each in splits if each not in (train_name, eval_name) and not is_split(each)]
        if unknown and train_name != eval_name and None in (self.train_split, self.eval_split):
            self.notes.append(
                f"{counted(len(unknown), 'split')} not used: {shortened(unknown)}. To evaluate on one, specify it as "
                "eval_split."
            )
        if eval_name is None:
            return [train], None
        return [train, self._part(name, splits[eval_name], False, train)], eval_name

    def _is_labelled(self, split: Any) -> bool:
        """Return whether a split has labels, if they are needed: a column of them, of which some are given."""
        if not self.needs_labels:
            return True
        split = with_features(split)
        if self.dense:
            return bool(self.dense.columns(split.features, self.image_column, self.label_columns)[1])
        images = image_columns(split.features)
        names = [name for name in label_columns(split.features) if name not in images]
        names = [name for name in self.label_columns if name in split.features] or names
        if not names or isinstance(split, IterableDataset):
            return bool(names)
        return any(value is not None for name in names for value in split[name][:])

    def _part(self, name: str, split: Any, is_train: bool, like: Part | None) -> Part:
        """Return a split with its columns, which are those of `like` if it has them."""
        split = with_features(split)
        features = split.features
        if like is not None and all(each in features for each in (like.image_column, *like.label_columns)):
            return replace(like, split=split, is_train=is_train)
        if self.dense:
            image, labels = self.dense.columns(features, self.image_column, self.label_columns)
            if not labels:
                raise ValueError(
                    f"Found images without {self.dense.name} in {name}: expected "
                    f"{self.dense.missing.format(image=image)}. For another column, set label_column."
                )
            return Part(split, image, labels, is_train)
        given = "image" if self.image_column == "file_name" and "file_name" not in features else self.image_column
        image = choose("image_column", image_columns(features), given, IMAGE_COLUMNS)
        labels = []
        if self.needs_labels or self.label_columns:
            found = label_columns(features)
            if not self.label_columns and (boxes := objects_without_classes(features)):
                raise ValueError(
                    f"{name} has boxes of objects in {boxes!r}: set the task to detection (--task detection), or "
                    "specify a label_column."
                )
            if not found and not self.label_columns:
                raise Unlabelled(
                    f"{name} has no labels.",
                    f"Found images without labels in {name}: expected one subfolder per class, or a metadata.csv "
                    "beside them with the columns file_name and label. For another column, set label_column "
                    "(--label-column). "
                    f"{' '.join([_seen(split, image), *self.notes])}".rstrip(),
                )
            labels = choose_label_columns(split, found, self.label_columns, image)
        return Part(split, image, labels, is_train)


def _seen(split: Any, image_column: str) -> str:
    """Return the number of images of a split and a few of their names, for an error."""
    if isinstance(split, IterableDataset):
        return ""
    stored = split.cast_column(image_column, Image(decode=False))[:3][image_column]
    names = [name for each in stored if (name := name_of(each or NO_IMAGE))]
    return f"Found {counted(len(split), 'image')}{', such as ' * bool(names)}{', '.join(names)}."


@dataclass
class _United:
    """Training and evaluation parts with the same two columns; `lengths` are what streams state."""

    train: Any
    evaluation: Any | None
    columns: tuple[str, str | None]
    labels: Labels | None
    stated_length: int | None


def _united(parts: list[Part], problem_type: str | None, separator: str | None, streaming: bool) -> _United:
    """Return the parts with labels of one kind in one column, and the same columns."""
    image = parts[0].image_column
    is_stream = streaming or any(isinstance(part.split, IterableDataset) for part in parts)
    lengths = [
        len(split) if isinstance(split := part.split, Dataset) else stated_length(split)
        for part in parts
        if part.is_train
    ]
    labels = None
    for index, part in enumerate(parts):
        split = part.split.select_columns([part.image_column, *part.label_columns])
        # First: later operations on a stream would decode its images.
        split = split.cast_column(part.image_column, Image(decode=not is_stream))
        parts[index] = replace(part, split=split)
    splits = [part.split for part in parts]
    if parts[0].label_columns:
        splits, labels = convert_labels(parts, problem_type, separator)
    for index, part in enumerate(parts):
        if part.image_column != image:
            splits[index] = splits[index].rename_column(part.image_column, image)
        if is_stream and isinstance(splits[index], Dataset):  # after the labels: their rows are known until here
            splits[index] = as_stream(splits[index])
        elif is_stream and part.is_train and labels is not None:
            labels.notes += note_on_order(splits[index], labels)
    length = None if None in lengths else sum(length or 0 for length in lengths)
    return _divided_parts(parts, splits, (image, None if labels is None else labels.column), labels, length)


def _united_dense(
    dense: DenseLabels, parts: list[Part], names: dict[int, str] | None, box_format: str | None, streaming: bool
) -> _United:
    """Return the parts with stored images and labels in the same two columns, and what the labels are."""
    if streaming or any(isinstance(part.split, IterableDataset) for part in parts):
        kind = dense.name.capitalize()
        raise ValueError(
            f"{kind} cannot be streamed, since their classes are found before a run: set streaming: false."
        )
    splits, labels = dense.unite(parts, names, box_format)
    return _divided_parts(parts, splits, (parts[0].image_column, labels.column), labels, None)


def _divided_parts(
    parts: list[Part], splits: list[Any], columns: tuple[str, str | None], labels: Labels | None, length: int | None
) -> _United:
    trains, evals = (
        [split for split, part in zip(splits, parts, strict=True) if part.is_train == is_train]
        for is_train in (True, False)
    )
    return _United(_joined(trains), _joined(evals) if evals else None, columns, labels, length)


def _joined(splits: list[Any]) -> Any:
    return splits[0] if len(splits) == 1 else concatenate_datasets(splits)


def _divided(united: _United, name: str, fraction: float | None, seed: int, train_images: int | None) -> ImageData:
    """Return the splits as data; a training split alone is divided unless the fraction is `None`."""
    train, evaluation = united.train, united.evaluation
    labels = united.labels or Labels("", [], "")
    kind = labels.problem_type or None
    data = ImageData(name, train, evaluation, united.columns, labels.names, "", 0, kind, labels.notes, labels.masks)
    if evaluation is None and fraction is not None:
        divide = _hold_out_of_stream if data.is_stream else hold_out
        train, evaluation = divide(data, fraction, seed)
    length = len(train) if not data.is_stream else _stream_length(united, fraction or 0, train_images)
    if length == 0 or (isinstance(evaluation, Sized) and len(evaluation) == 0):
        is_least = fraction is not None and not data.is_stream and length == len(set(_strata(data)))
        remedy = "every class has one image only, so add images, or an evaluation split"
        remedy = remedy if is_least else f"add images, or change eval_fraction={fraction}"
        raise ValueError(
            f"{name} has {counted(length, 'training image')} and needs some for evaluation too: {remedy}."
        )
    return replace(data, train=train, evaluation=evaluation, train_length=length)


def hold_out(data: ImageData, fraction: float, seed: int) -> tuple[Any, Any]:
    """Split off a share of every class; return the remaining training images, and those split off."""
    train, held_out = split_evenly(_strata(data), fraction, seed)
    return data.train.select(train), data.train.select(held_out)


def _hold_out_of_stream(data: ImageData, fraction: float, seed: int) -> tuple[Any, Any]:
    limit = int(_checked_share(fraction, "eval_fraction") * 2**63)
    column = data.columns[0]

    def is_held_out(row: dict[str, Any]) -> bool:
        return derive_seed(seed, "split", image_digest(row[column] or NO_IMAGE)) < limit

    return data.train.filter(lambda row: not is_held_out(row)), data.train.filter(is_held_out)


def _stream_length(united: _United, fraction: float, train_images: int | None) -> int:
    if train_images is not None:
        return train_images
    # Of the undivided split, whether stated or counted: the number of steps must not depend on a cache.
    share = 1.0 if united.evaluation is not None else 1 - fraction
    label = united.columns[1]
    smallest = united.train if label is None else united.train.select_columns(label)  # faster to read than images
    return round(share * (united.stated_length or sum(1 for _ in smallest)))


def _check_classes(data: ImageData, fraction: float) -> None:
    """Add notes on classes with too few images, and raise a `ValueError` if there is one class only."""
    if data.problem_type == SINGLE and len(data.label_names) < 2:
        found = f"one class only, {data.label_names[0]}" if data.label_names else "no class"
        raise Unlabelled(
            f"{data.name} has {found}.",
            f"Found {found}, in {data.name}: expected at least two classes, as one subfolder each or as values of a "
            "label column." + "".join(f" {note}" for note in data.notes),
        )
    counts = data.class_counts()
    if counts is None:
        return
    few: dict[str, list[str]] = {"no training images, so the model cannot learn": [], "a single training image": []}
    for name, count in zip(data.label_names, counts, strict=True):
        if count < len(few):
            list(few.values())[count].append(name)
    if data.eval_split == HELD_OUT and data.problem_type == SINGLE:
        held_out = set(data.evaluation[data.columns[1]][:])
        few[f"no evaluation images at eval_fraction={fraction}"] = [
            name for index, name in enumerate(data.label_names) if index not in held_out and counts[index]
        ]
    for text, names in few.items():
        if names:
            has = "has" if len(names) == 1 else "have"
            which = (" it" if len(names) == 1 else " them") if text.endswith("learn") else ""
            data.notes.append(f"{counted(len(names), 'class', 'classes')} {has} {text}{which}: {shortened(names)}.")


def _resampled(data: ImageData, share: float, repeats: float, seed: int) -> ImageData:
    """Return data with a share of its training images, repeated."""
    if data.is_stream:
        raise ValueError("train_share and train_repeats need a prepared data set: set both to 1, or streaming: false.")
    if repeats < 1:
        raise ValueError(f"train_repeats must be at least 1, got {repeats}: to use fewer images, set train_share.")
    chosen = list(range(len(data.train)))
    if share != 1:
        _, chosen = split_evenly(_strata(data), share, seed, "train_share", keeps_one=False)
    if not chosen:
        raise ValueError(f"train_share={share} leaves none of {len(data.train)} training images: increase it.")
    indices = [chosen[index % len(chosen)] for index in range(round(repeats * len(chosen)))]
    return replace(data, train=data.train.select(indices), train_length=len(indices))


def _strata(data: ImageData) -> list[int]:
    """Return the class of each training image: the rarest of several, and the same one where there are none."""
    column = data.columns[1]
    if column is None or data.problem_type in (REGRESSION, *DENSE):
        return [0] * len(data.train)
    if data.problem_type == SINGLE:
        return data.train[column][:]
    counts = data.class_counts() or []
    rows = data.train[column][:]
    return [
        min((c for c, present in enumerate(row) if present == 1), key=counts.__getitem__, default=-1) for row in rows
    ]


def split_evenly(
    labels: Iterable[int], fraction: float, seed: int, name: str = "eval_fraction", keeps_one: bool = True
) -> tuple[list[int], list[int]]:
    """Divide indices, in order, so that the second list has `fraction` of every class; `name` is for errors.

    With `keeps_one`, the first list has at least one index of every class, and the second one is not empty if a class
    has two.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "split"))
    classes = torch.tensor(list(labels))
    share = _checked_share(fraction, name)
    chosen: set[int] = set()
    spare: list[int] = []  # one of each class that has several
    for label in classes.unique():
        members = (classes == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        number = round(share * len(members))
        chosen.update(members[order[: min(number, len(members) - 1) if keeps_one else number]].tolist())
        spare += members[order[: min(1, len(members) - 1)]].tolist()
    if keeps_one and not chosen and spare:
        order = torch.randperm(len(spare), generator=generator)[: max(1, round(share * len(classes)))]
        chosen.update(spare[index] for index in order.tolist())
    return [index for index in range(len(classes)) if index not in chosen], sorted(chosen)


def _checked_share(fraction: float, name: str) -> float:
    if not 0 < fraction < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {fraction}.")
    return fraction
