"""From a name to labelled images: any source of `datasets`, prepared on the disk or read as a stream."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Sequence,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetNotFoundError
from PIL import Image as PILImage

from .system.texts import without_tokens

TRAIN_SPLITS = ("train", "training")
EVAL_SPLITS = ("validation", "valid", "val", "test", "testing", "eval")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
MISSING: dict[str, Any] = {"bytes": None, "path": None}  # an image where a table has none


def seed_of(*parts: int | str) -> int:
    """Return a seed that depends on every part, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def identity_of(stored: dict[str, Any]) -> int:
    """Return a number that says which image this is, wherever and whenever it is read: of its bytes, or its name."""
    content = stored["bytes"] or "/".join(Path(stored["path"] or "").parts[-2:]).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


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


def stated_length(split: Any) -> int | None:
    """Return the number of images that a source says a stream to have, if it says so."""
    stated = (split.info.splits or {}).get(str(split.split))
    return stated.num_examples or None if stated else None


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


def open_splits(source: str | Path, streaming: bool) -> dict[str, Any]:
    """Return the splits of a source by name."""
    path = Path(source).expanduser()
    if str(source) == "digits":
        loaded: Any = _digits().to_iterable_dataset() if streaming else _digits()
    elif path.is_file() and path.suffix in BUILDERS:
        loaded = _load(BUILDERS[path.suffix], streaming, data_files={"train": str(path)})
    elif str(source) and path.is_dir():
        loaded = _open_folder(path, streaming)
    elif path.exists() or path.is_absolute() or str(source).count("/") > 1 or not str(source):
        raise ValueError(
            f"Expected data in {without_tokens(str(source))!r}: a folder of images with one subfolder a class, a "
            "parquet file or webdataset shard or a folder of them, a dataset's name on the Hub, or 'digits'."
        )
    else:
        loaded = _load(str(source), streaming)
    return dict(loaded) if isinstance(loaded, DatasetDict | IterableDatasetDict) else {"train": loaded}


def _load(builder: str, streaming: bool, **files: Any) -> Any:
    try:
        return load_dataset(builder, streaming=streaming, **files)
    except DatasetNotFoundError:
        raise ValueError(
            f"There is no folder {without_tokens(builder)!r} here, and on the Hub no such dataset for you: check the "
            "name; if it is private, log in by `hf auth login`."
        ) from None


def _open_folder(path: Path, streaming: bool) -> Any:
    if is_saved(path):
        saved: Any = load_from_disk(str(path))
        splits = saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        return IterableDatasetDict({k: v.to_iterable_dataset() for k, v in splits.items()}) if streaming else splits
    if shards := shards_in(path):
        return _load(BUILDERS[shards[0]], streaming, data_files=shards[1])
    if not any(file.suffix.lower() in IMAGE_FILES for file in path.rglob("*")):
        raise ValueError(f"{path} holds no images ({', '.join(IMAGE_FILES)}), parquet files or webdataset shards.")
    return _load("imagefolder", streaming, data_dir=str(path))


def is_saved(path: Path) -> bool:
    """Say whether a folder is what `save_to_disk` wrote."""
    return (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists()


def shards_in(path: Path) -> tuple[str, dict[str, list[str]]] | None:
    """Return the parquet files, or the webdataset shards, of a folder: their suffix, and them by split; or `None`."""
    for suffix in BUILDERS:
        found = sorted([*path.glob(f"*{suffix}"), *path.glob(f"*/*{suffix}")])
        if files := [file for file in found if file.stem != "metadata"]:  # which belongs to a folder of images
            return suffix, _by_split(path, files)
    return None


def _by_split(root: Path, files: list[Path]) -> dict[str, list[str]]:
    """Sort files by the split that their folder or a word of their name says."""
    splits: dict[str, list[str]] = {}
    for file in files:
        is_named_by_folder = file.parent != root and file.parent.name in (*TRAIN_SPLITS, *EVAL_SPLITS)
        words = [file.parent.name] if is_named_by_folder else re.split(r"[-_.]", file.stem)
        name = next((word for word in words if word in (*TRAIN_SPLITS, *EVAL_SPLITS)), words[0])
        splits.setdefault(name, []).append(str(file))
    if any(name in TRAIN_SPLITS for name in splits) or len(splits) == 1:
        return splits
    # Shards that are only numbered belong together.
    numbered = [file for name in list(splits) if name not in EVAL_SPLITS for file in splits.pop(name)]
    return {**({"train": numbered} if numbered else {}), **splits}


def _digits() -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 pixels, 16 levels of ink brought to 255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [PILImage.fromarray(image) for image in (digits.images * (255 / 16)).round().astype("uint8")]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    return Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


# ----------------------------------------------------------------------------------------------------- columns


def choose(what: str, found: Any, given: str | None, usual: tuple[str, ...]) -> str:
    """Return the given name if it is there, else the usual or only one."""
    names = list(found)
    if given is not None:
        if given in names or not names:
            return given
        raise ValueError(f"{what}={given!r} is not there: choose one of {', '.join(names)}.")
    for name in (*usual, *(names if len(names) == 1 else ())):
        if name in names:
            return name
    raise ValueError(f"Which {what}? Name one of: {', '.join(names) or 'none was found'}.")


def known(split: Any) -> Any:
    """Return a split that knows its columns; a stream that does not state them shows them in its first row."""
    return split if split.features is not None else split._resolve_features()


def images_in(features: Features) -> list[str]:
    # Parquet without the features of `datasets` holds images as {bytes, path}.
    return [name for name, feature in features.items() if isinstance(feature, Image) or _is_struct(feature)]


def _classes_in(features: Features) -> list[str]:
    return [name for name, feature in features.items() if isinstance(feature, ClassLabel)]


def _label_like(features: Features) -> list[str]:
    return [
        name
        for name, feature in features.items()
        if isinstance(feature, Value | Sequence) and not name.startswith("__")  # webdataset's key and address
    ]


def _is_struct(feature: Any) -> bool:
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def as_stored(split: Any, columns: tuple[str, str | None]) -> Any:
    """Return a split that gives images as `{"bytes", "path"}`: what cannot be decoded must not end a run."""
    return split.cast_column(columns[0], Image(decode=False)) if isinstance(split, Dataset) else split


def stored_rows(split: Any, columns: tuple[str, str | None]) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the images of such a split, each with its label; 0 where there are none."""
    image, label = columns
    for row in split:
        yield row[image] or MISSING, row[label] if label else 0
