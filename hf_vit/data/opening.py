"""Open a data set by name: its splits, and its columns of images and labels.

`datasets` is imported where it is used, since predictions for image files do without it.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..system.texts import without_tokens

TRAIN_SPLITS = ("train", "training")
EVAL_SPLITS = ("validation", "valid", "val", "test", "testing", "eval")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
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


def open_splits(source: str | Path, streaming: bool) -> dict[str, Any]:
    """Return the splits of a source by name; see `load_data` for what a source may be."""
    path, name = Path(source).expanduser(), str(source)
    storage = storage_of(path) if name not in ("", "digits") else None
    if name == "digits":
        loaded: Any = _digits().to_iterable_dataset() if streaming else _digits()
    elif storage == "saved":
        loaded = _load_saved(path, streaming)
    elif storage == "imagefolder":
        if not any(file.suffix.lower() in IMAGE_FILES for file in path.rglob("*")):
            raise ValueError(f"{path} holds no images ({', '.join(IMAGE_FILES)}), parquet files or webdataset shards.")
        loaded = _load("imagefolder", streaming, data_dir=str(path))
    elif storage is not None:
        loaded = _load(storage, streaming, data_files=shards_of(path))
    elif not name or path.exists() or path.is_absolute() or name.count("/") > 1:
        raise ValueError(
            f"Expected a data set, got {without_tokens(name)!r}: specify a folder of images with one subfolder per "
            "class, a parquet file or webdataset shard or a folder of them, a data set on the Hub, or 'digits'."
        )
    else:
        loaded = _load(name, streaming)
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def choose_splits(
    splits: Iterable[str], train_split: str | None, eval_split: str | None, needs_train: bool
) -> tuple[str, str | None]:
    """Return the names of the training and evaluation splits; the latter is `None` if it must be held out.

    Without `needs_train`, an evaluation split stands for both.
    """
    usual = [name for name in EVAL_SPLITS if name in splits]
    if eval_split is not None:
        choose("split", splits, eval_split, EVAL_SPLITS)
    if not needs_train and (eval_split or usual):
        eval_split = eval_split or usual[0]
        return eval_split, eval_split
    train_split = choose("train_split", splits, train_split, TRAIN_SPLITS)
    return train_split, eval_split or next((name for name in usual if name != train_split), None)


def storage_of(path: Path) -> str | None:
    """Return how a path stores a data set: a builder of `datasets` or `"saved"`; `None` for other files and names."""
    if not path.is_dir():
        return BUILDERS.get(path.suffix) if path.is_file() else None
    if any((path / name).exists() for name in ("dataset_dict.json", "dataset_info.json")):
        return "saved"  # by `save_to_disk`
    shards = shards_of(path)
    return BUILDERS[Path(next(iter(shards.values()))[0]).suffix] if shards else "imagefolder"


def shards_of(path: Path) -> dict[str, list[str]]:
    """Return the parquet files, or else the webdataset shards, of a folder by split; a file is its only shard."""
    if path.is_file():
        return {"train": [str(path)]}
    for suffix in BUILDERS:
        found = sorted([*path.glob(f"*{suffix}"), *path.glob(f"*/*{suffix}")])
        if files := [file for file in found if file.stem != "metadata"]:  # that of a folder of images
            return _by_split(path, files)
    return {}


def _by_split(root: Path, files: list[Path]) -> dict[str, list[str]]:
    """Group files by the split in the name of their folder, or among the words of their own name."""
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


def _load(builder: str, streaming: bool, **files: Any) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(builder, streaming=streaming, **files)
    except DatasetNotFoundError:
        raise ValueError(
            f"Found no folder {without_tokens(builder)!r}, and no such data set on the Hub that you can access: check "
            "the name; if the data set is private, log in with `hf auth login`."
        ) from None


def _load_saved(path: Path, streaming: bool) -> Any:
    from datasets import load_from_disk

    saved = load_from_disk(str(path))
    if not streaming:
        return saved
    splits = saved if isinstance(saved, dict) else {"train": saved}
    return {name: split.to_iterable_dataset() for name, split in splits.items()}


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
    from datasets import ClassLabel, Sequence, Value

    return [name for name, feature in features.items() if isinstance(feature, ClassLabel)] or [
        name
        for name, feature in features.items()
        if isinstance(feature, Value | Sequence) and not name.startswith("__")  # webdataset's key and address
    ]


def as_stored(split: Any, columns: tuple[str, str | None]) -> Any:
    """Return a split whose images are `{"bytes", "path"}`, so that one that cannot be decoded does not end a run."""
    from datasets import Dataset, Image

    return split.cast_column(columns[0], Image(decode=False)) if isinstance(split, Dataset) else split
