"""Open a data set by name: its splits and its columns."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDatasetDict,
    Sequence,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetNotFoundError
from PIL import Image as PILImage

from ..system.texts import without_tokens

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


def stated_length(split: Any) -> int | None:
    """Return the number of images that a source says a stream to have, if it says so."""
    stated = (split.info.splits or {}).get(str(split.split))
    return stated.num_examples or None if stated else None


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
