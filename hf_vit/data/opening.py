"""Open a data set by name: its splits, and its columns of images and labels.

`datasets` is imported where it is used, since predictions for image files do without it.
"""

import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..system.network import sentence_of
from ..system.places import is_path, missing
from ..system.texts import shortened, without_tokens
from .archives import ENDINGS, is_archive, unpacked
from .folders import TABLE_ENDINGS, datasets_of, is_split, layout_of, scan, split_of, unwrapped
from .tables import Tables, is_table, open_table, tables_of

logger = logging.getLogger(__name__)

TRAIN_SPLITS = ("train", "training")
EVAL_SPLITS = ("validation", "valid", "val", "test", "testing", "eval")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
SHARDS = 64  # of a stream from memory
ORDER_OF_STREAM = 0  # seed: neighbours on disk are of one class, and a stream is only shuffled in parts
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}  # of `datasets`, by the suffix of their shards


def choose(what: str, found: Iterable[str], given: str | None, usual: tuple[str, ...]) -> str:
    """Return the given name, or else the usual or only one.

    Raises:
        ValueError: If the given name was not found, or none was given and the choice is not clear.
    """
    names = list(found)
    if given is not None:
        if given in names or not names:
            return given
        raise ValueError(f"Unknown {what} {given!r}: choose one of {', '.join(names)}.")
    for name in (*usual, *(names if len(names) == 1 else ())):
        if name in names:
            return name
    raise ValueError(
        f"Cannot infer {what}: specify one of {', '.join(names)}." if names else f"Found no {what}: specify one."
    )


@dataclass
class Opened:
    """The splits of a source by name, and sentences about what was found there."""

    splits: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def open_splits(source: str | Path, streaming: bool) -> dict[str, Any]:
    """Return the splits of a source by name; see `load_data` for what a source may be."""
    return open_source(source, streaming).splits


def open_source(
    source: Any, streaming: bool, image_column: str | None = None, label_columns: Sequence[str] = ()
) -> Opened:
    """Open a source; the columns say which tables of images and labels are meant.

    With `streaming`, shards and data sets on the Hub are streams; what is in memory anyway is not.
    """
    loaded, notes = source, list[str]()
    if isinstance(source, str | Path):
        loaded, notes = _open_name(source, streaming, image_column, label_columns)
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return Opened({name: split.with_format(None) for name, split in splits.items()}, notes)


def _open_name(
    source: str | Path, streaming: bool, image_column: str | None, label_columns: Sequence[str]
) -> tuple[Any, list[str]]:
    """Return what `datasets` loads, and sentences about it."""
    path, name = Path(source).expanduser(), str(source)
    if name not in ("", "digits") and is_archive(path):
        return _open_name(unpacked(path), streaming, image_column, label_columns)
    storage = storage_of(path) if name not in ("", "digits") else None
    notes: list[str] = []
    if name == "digits":
        loaded: Any = _digits()
    elif storage == "saved":
        from datasets import load_from_disk

        loaded = load_from_disk(str(path))
    elif storage == "imagefolder" or _is_folder_of_tables(path, storage):
        loaded, notes = _open_folder(path, image_column, label_columns)
    elif path.is_file() and is_table(path) and (table := open_table(path, image_column)) is not None:
        tables = Tables([table])
        loaded, notes = tables.splits(), tables.notes
    elif path.is_file() and path.suffix.lower() in TABLE_ENDINGS and path.suffix.lower() not in BUILDERS:
        raise no_images_in(path)
    elif storage is not None:
        from datasets import load_dataset

        loaded = load_dataset(storage, streaming=streaming, data_files=shards_of(path))
    elif not name or path.exists() or is_path(name):
        shown = without_tokens(name)
        seen = f"Expected a data set, got {shown!r}" if not name or path.exists() else missing(shown)
        raise ValueError(
            f"{seen}. Specify a folder of images with one subfolder per "
            "class, a table of paths and labels (.csv, .tsv, .jsonl, .parquet), a zip or tar of these, a parquet file "
            "or webdataset shard or a folder of them, a data set on the Hub, or 'digits'."
        )
    else:
        loaded = _load_from_hub(name, streaming)
    return loaded, notes


def no_images_in(table: Path) -> ValueError:
    """Return the error for a table without a column of images."""
    return ValueError(
        f"No column of {table} names images: expected paths relative to {table.parent}, with or without an ending. "
        "Put the table beside the images, or name the column with --image-column."
    )


def _is_folder_of_tables(path: Path, storage: str | None) -> bool:
    """Return whether all parquet files of a folder hold paths instead of images."""
    if storage != "parquet" or not path.is_dir():
        return False
    return all(is_table(Path(file)) for files in shards_of(path).values() for file in files)


def _open_folder(
    path: Path, image_column: str | None, label_columns: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the splits of a folder of images, by its tables if they label the images, else by its folders."""
    root, skipped = scan(path)
    root, notes = unwrapped(root), [note] if (note := skipped.note()) else []
    layout = layout_of(root)
    tables = tables_of(root, image_column, label_columns, layout.has_classes)
    if not root.has_images and not tables.tables:
        found = " ".join([_what_lies(path), *notes])
        raise ValueError(f"{path} holds no images, tables, parquet files or webdataset shards. {found}")
    if tables.tables:
        splits = tables.splits()
        used = sum(len(split) for split in splits.values())
        number = sum(1 for _ in root.files())
        if used < number and root.has_images:
            tables.notes.append(f"Skipped {number - used:,} of {number:,} images that no table of labels names.")
        return splits, [*notes, *tables.notes]
    return datasets_of(layout), [*notes, *tables.notes, *layout.notes]


def _what_lies(path: Path) -> str:
    found = [entry.name for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
    archives = [name for name in found if name.lower().endswith(ENDINGS)]
    if archives:
        return f"It holds the archives {shortened(archives)}: give one of them, or unpack them."
    return f"It holds {shortened(found)}." if found else "It is empty."


def as_stream(split: Any) -> Any:
    """Return a data set as a stream of several shards, which workers then share, in a random order."""
    mixed = split.shuffle(seed=ORDER_OF_STREAM, keep_in_memory=True)
    return mixed.to_iterable_dataset(min(SHARDS, max(1, len(split))))


def eval_splits(names: Iterable[str]) -> list[str]:
    """Return the names of evaluation splits, in the order of preference: validation before test."""
    usual, others = [name for name in EVAL_SPLITS if name in names], []
    for kind in ("validation", "test"):
        others += [name for name in names if name not in usual and is_split(name) and split_of(name) == kind]
    return [*usual, *others]


def choose_splits(
    splits: Iterable[str], train_split: str | None, eval_split: str | None, needs_train: bool
) -> tuple[str, str | None]:
    """Return the names of the training and evaluation splits; the latter is `None` if it must be held out.

    Without `needs_train`, an evaluation split stands for both.
    """
    names = list(splits)
    train_split, eval_split = (spelled(name, names) for name in (train_split, eval_split))
    found = eval_splits(names)
    if eval_split is not None:
        choose("split", names, eval_split, EVAL_SPLITS)
    if not needs_train and (eval_split or found):
        eval_split = eval_split or found[0]
        return eval_split, eval_split
    plain = [name for name in names if is_split(name) and split_of(name) == "train"]
    train_split = choose("train_split", names, train_split, (*TRAIN_SPLITS, *(plain if len(plain) == 1 else ())))
    return train_split, eval_split or next((name for name in found if name != train_split), None)


def spelled(name: str | None, names: list[str]) -> str | None:
    """Return the name of a split as the source has it: `val` may be given for `validation`."""
    if name is None or name in names or split_of(name) is None:
        return name
    same = [other for other in names if is_split(other) and split_of(other) == split_of(name)]
    return same[0] if len(same) == 1 else name


def storage_of(path: Path) -> str | None:
    """Return how a path stores a data set: a builder of `datasets` or `"saved"`; `None` for other files and names."""
    if not path.is_dir():
        return BUILDERS.get(path.suffix.lower()) if path.is_file() else None
    if any((path / name).exists() for name in ("dataset_dict.json", "dataset_info.json")):
        return "saved"  # by `save_to_disk`
    shards = shards_of(path)
    return BUILDERS[Path(next(iter(shards.values()))[0]).suffix.lower()] if shards else "imagefolder"


def shards_of(path: Path) -> dict[str, list[str]]:
    """Return the parquet files, or else the webdataset shards, of a folder by split; a file is its only shard."""
    if path.is_file():
        return {"train": [str(path)]}
    below = [
        str(path),
        *(entry.path for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")),
    ]
    names = [
        Path(folder, name) for folder in below for name in os.listdir(folder) if name.lower().endswith((*BUILDERS,))
    ]
    for suffix in BUILDERS:
        found = sorted(file for file in names if file.suffix.lower() == suffix and file.name[0] != ".")
        if files := [file for file in found if file.stem != "metadata"]:  # that of a folder of images
            return _by_split(path, files)
    return {}


def _by_split(root: Path, files: list[Path]) -> dict[str, list[str]]:
    """Group files by the split in the name of their folder, or among the words of their own name."""
    splits: dict[str, list[str]] = {}
    for file in files:
        is_named_by_folder = file.parent != root and split_of(file.parent.name)
        words = [file.parent.name] if is_named_by_folder else re.split(r"[-_.]", file.stem)
        name = next((word for word in words if split_of(word)), split_of(file.stem) or words[0])
        splits.setdefault(name, []).append(str(file))
    if len(splits) == 1 or any(split_of(name) == "train" for name in splits):
        return splits
    # Shards that are only numbered belong together.
    numbered = [file for name in list(splits) if not split_of(name) for file in splits.pop(name)]
    return {**({"train": numbered} if numbered else {}), **splits}


def _load_from_hub(name: str, streaming: bool) -> Any:
    """Load a data set that is not here.

    Raises:
        ValueError: If there is none, or the Hub cannot be reached.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    unknown = missing(without_tokens(name))
    if "/" not in name:  # may be a misspelled folder; requests for it may take half a minute to fail
        logger.warning("%s; looking for a data set of this name on the Hub.", unknown)
    try:
        return load_dataset(name, streaming=streaming)
    except DatasetNotFoundError:
        raise ValueError(
            f"{unknown}; and no such data set on the Hub that you can access: check the name; if the data set is "
            "private, log in with `hf auth login`."
        ) from None
    except ConnectionError as error:
        raise ValueError(f"{unknown}. {sentence_of(error)}") from error


def _digits() -> Any:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 pixels, with 16 gray levels scaled to 255."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [PILImage.fromarray(image) for image in (digits.images * (255 / 16)).round().astype("uint8")]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    return Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


def stated_length(split: Any) -> int | None:
    """Return the number of images that the metadata of a stream states, if any."""
    stated = (split.info.splits or {}).get(str(split.split))
    return stated.num_examples or None if stated else None


def with_features(split: Any) -> Any:
    """Return a split with known features; a stream without them is read up to its first row."""
    return split if split.features is not None else split._resolve_features()


def image_columns(features: Any) -> list[str]:
    """Return the columns of images; parquet that `datasets` did not write has structs of bytes and path."""
    from datasets import Image

    return [
        name
        for name, feature in features.items()
        if isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
    ]


def label_columns(features: Any) -> list[str]:
    """Return the columns of classes, or else those that may hold labels."""
    from datasets import ClassLabel, List, Sequence, Value

    return [name for name, feature in features.items() if isinstance(feature, ClassLabel)] or [
        name
        for name, feature in features.items()
        if isinstance(feature, Value | Sequence | List) and not name.startswith("__")  # webdataset's key and address
    ]


def as_stored(split: Any, columns: tuple[str, str | None]) -> Any:
    """Return a split whose images are `{"bytes", "path"}`, so that one that cannot be decoded does not end a run."""
    from datasets import Dataset, Image

    return split.cast_column(columns[0], Image(decode=False)) if isinstance(split, Dataset) else split
