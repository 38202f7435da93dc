"""Folders of images: one scan lists the files, and their places give the split and the class of each image.

The order of images and of classes is that of the builder `imagefolder` of `datasets`, which earlier releases used.
That builder reads splits from the names of files and of class folders, and drops the images of some layouts silently.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image as PILImage

from ..system.places import is_junk
from ..system.texts import counted, shortened

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
IMAGE_WORDS = {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "jpegimages"}
MASK_WORDS = {"mask", "masks", "annotation", "annotations", "segmentation", "segmentations", "groundtruth", "trimaps"}
FILLERS = {*IMAGE_WORDS, "set", "data", "dataset", "split", "folder", "files"}  # as in train_images
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
NOT_DECODED = {"PDF", "MPEG", "HDF5", "BUFR", "GRIB"}  # Pillow recognizes these formats and cannot decode them
REMEDIES = {".heic": "pillow-heif", ".heif": "pillow-heif"}
MASK_FILE = re.compile(r"(.+)_mask(?:_\d+)?$", re.IGNORECASE)


@cache
def image_endings() -> frozenset[str]:
    """Return the endings, in lower case, of files that can be read as images."""
    if find_spec("pillow_heif"):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    known = PILImage.registered_extensions().items()  # Pillow 12.0 may register the empty ending
    readable = {ending for ending, name in known if ending and name in PILImage.OPEN and name not in NOT_DECODED}
    return frozenset({*readable, ".npy"})


def is_image_file(name: str) -> bool:
    """Return whether the ending of a file name is that of an image."""
    return os.path.splitext(name)[1].lower() in image_endings()


def split_of(name: str) -> str | None:
    """Return the split that a name stands for: `"train"`, `"validation"` or `"test"`; `None` if not exactly one."""
    return _split_and_rest(name)[0]


def _words(name: str) -> list[str]:
    letters = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)  # as in TrainImages
    return [word.lower() for word in re.findall(r"[^\W\d_]+", letters)]


def _split_and_rest(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the split in a name, and its other words but those that say nothing, such as `images`."""
    words = _words(name)
    found = {SPLITS[word] for word in words if word in SPLITS}
    rest = tuple(word for word in words if word not in SPLITS and word not in FILLERS)
    return (found.pop() if len(found) == 1 else None), rest


# ----------------------------------------------------------------------------------------------------------- scan


@dataclass
class Skipped:
    """What a scan passed over: files by ending, and folders by name."""

    files: Counter[str] = field(default_factory=Counter)
    folders: Counter[str] = field(default_factory=Counter)

    def note(self) -> str | None:
        """Return a sentence that counts everything, or `None` if nothing was skipped."""
        parts = []
        if self.files:
            kinds = (f"{count} {kind}{_remedy(kind)}" for kind, count in self.files.most_common())
            parts.append(f"{counted(self.files.total(), 'file')} not read as images: {', '.join(kinds)}")
        if self.folders:
            parts.append(f"{counted(len(self.folders), 'folder')}: {shortened(sorted(self.folders))}")
        return f"Skipped {'; and '.join(parts)}." if parts else None


def _remedy(kind: str) -> str:
    return f" (install {REMEDIES[kind]} to read them)" if kind in REMEDIES else ""


@dataclass
class Folder:
    """A folder: the names of its images and tables, and its folders by name."""

    path: Path
    images: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    folders: dict[str, "Folder"] = field(default_factory=dict)

    @property
    def has_images(self) -> bool:
        return bool(self.images) or any(folder.has_images for folder in self.folders.values())

    def with_images(self) -> dict[str, "Folder"]:
        """Return the folders that hold images, at any depth."""
        return {name: folder for name, folder in self.folders.items() if folder.has_images}

    def files(self) -> Iterator[Path]:
        """Yield the images of the folder and of all folders below."""
        yield from (self.path / name for name in self.images)
        for folder in self.folders.values():
            yield from folder.files()


def scan(path: Path) -> tuple[Folder, Skipped]:
    """List the images and tables below a folder; links are followed, but not in circles."""
    skipped = Skipped()
    return _scan(path.absolute(), skipped, ()), skipped


def _scan(path: Path, skipped: Skipped, above: tuple[str, ...]) -> Folder:
    folder = Folder(path)
    above = (*above, os.path.realpath(path))
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        ending = os.path.splitext(entry.name)[1].lower()
        is_hidden = entry.name.startswith(".") or is_junk(entry.name)
        if entry.is_dir():
            if is_hidden:
                skipped.folders[entry.name] += 1
            elif os.path.realpath(entry.path) not in above:
                folder.folders[entry.name] = _scan(path / entry.name, skipped, above)
        elif not is_hidden and ending in image_endings():
            folder.images.append(entry.name)
        elif not is_hidden and ending in TABLE_ENDINGS:
            folder.tables.append(entry.name)
        else:
            skipped.files[entry.name if entry.name.startswith(".") else ending or "without an ending"] += 1
    _drop_masks(folder, skipped)
    return folder


def _drop_masks(folder: Folder, skipped: Skipped) -> None:
    """Skip `masks` beside `images`, `train_masks` beside `train`, and `x_mask.png` beside `x.png`.

    Without such a neighbour, the name may be that of a class.
    """
    stems = {os.path.splitext(name)[0] for name in folder.images}
    for name in list(folder.images):
        match = MASK_FILE.match(os.path.splitext(name)[0])
        if match and match[1] in stems:
            folder.images.remove(name)
            skipped.files["masks"] += 1
    kinds = {name: set(_words(name)) for name in folder.folders}
    neighbours = [words - IMAGE_WORDS for words in kinds.values() if words & {*IMAGE_WORDS, *SPLITS}]
    for name, words in kinds.items():
        if words & MASK_WORDS and folder.folders[name].has_images and words - MASK_WORDS in neighbours:
            del folder.folders[name]
            skipped.folders[name] += 1


# --------------------------------------------------------------------------------------------------------- layout


class Placed(NamedTuple):
    """An image and the class that its folder gives it, if any."""

    path: Path
    label: str | None


@dataclass
class Layout:
    """The images of a folder by split, and sentences about what was found."""

    splits: dict[str, list[Placed]]
    notes: list[str] = field(default_factory=list)

    @property
    def has_classes(self) -> bool:
        return any(image.label is not None for images in self.splits.values() for image in images)


def split_folders(folder: Folder) -> dict[str, list[Folder]]:
    """Return the folders of each split, if the folder is divided into splits.

    The names of its folders then share all words but those for the split, as in `seg_train` and `seg_test`. So a class
    `test tube` is not a split. A folder such as `seg_pred` may lie beside a training and an evaluation split.
    """
    named = {name: _split_and_rest(name) for name in folder.with_images()}
    splits: dict[str, list[Folder]] = {}
    for name, (split, _) in named.items():
        if split is not None:
            splits.setdefault(split, []).append(folder.folders[name])
    rests = {rest for split, rest in named.values() if split is not None}
    others = [name for name, (split, _) in named.items() if split is None]
    is_divided = len(rests) == 1 and (len(splits) > 1 or rests == {()})
    return splits if is_divided and (not others or {"train"} < splits.keys()) else {}


def unwrapped(folder: Folder, may_have_tables: bool = False) -> Folder:
    """Return the folder below, as long as nothing lies beside it and it has no split or class for its name."""
    while not folder.images and not split_folders(folder) and len(inner := folder.with_images()) == 1:
        if folder.tables and not may_have_tables:
            break
        [(name, only)] = inner.items()
        if only.images and not _says_nothing(name, folder):
            break
        folder = only
    return folder


def _says_nothing(name: str, parent: Folder) -> bool:
    split, rest = _split_and_rest(name)
    is_plain = bool(_words(name)) and not rest and split in (None, split_of(parent.path.name))
    return is_plain or name == parent.path.name


def layout_of(root: Folder) -> Layout:
    """Infer the splits and classes of a scanned folder.

    The class of an image is the first folder below that of its split, whatever folders lie below the class.
    """
    root = unwrapped(root, may_have_tables=True)
    notes: list[str] = []
    by_split = split_folders(root)
    if by_split:
        used = [folder for folders in by_split.values() for folder in folders]
        if others := [name for name, folder in root.with_images().items() if folder not in used]:
            notes.append(f"Skipped the images in {shortened(others)}: expected the name of a split.")
        if root.images:
            notes.append(_beside(root.images, "splits"))
    elif divided := _splits_of_classes(root):
        splits = {split: sorted(images, key=lambda image: image.path.as_posix()) for split, images in divided.items()}
        return Layout(splits, notes)
    else:
        by_split = {"train": [root]}
    splits = {}
    for split, folders in by_split.items():
        images = [image for folder in folders for image in _placed(_without_wrapper(folder), notes)]
        splits[split] = sorted(images, key=lambda image: image.path.as_posix())
    return Layout(splits, notes)


def _without_wrapper(folder: Folder) -> Folder:
    """Return `train/images` for a split `train` whose classes lie in it."""
    while not folder.images and len(inner := folder.with_images()) == 1:
        [(name, only)] = inner.items()
        if not _says_nothing(name, folder):
            break
        folder = only
    return folder


def _splits_of_classes(root: Folder) -> dict[str, list[Placed]]:
    """Return the images by split if every folder is a class that is divided into splits."""
    classes = {name: split_folders(folder) for name, folder in root.with_images().items()}
    if root.images or len(classes) < 2 or not all(len(splits) > 1 for splits in classes.values()):
        return {}
    found: dict[str, list[Placed]] = {}
    for name, splits in classes.items():
        for split, folders in splits.items():
            found.setdefault(split, []).extend(Placed(path, name) for folder in folders for path in folder.files())
    return found


def _placed(folder: Folder, notes: list[str]) -> list[Placed]:
    classes = folder.with_images()
    if not classes:
        return [Placed(path, None) for path in folder.files()]
    if empty := [name for name in folder.folders if name not in classes]:
        notes.append(f"{counted(len(empty), 'folder')} without images in {folder.path.name}: {shortened(empty)}.")
    if folder.images:
        notes.append(_beside(folder.images, "classes"))
    return [Placed(path, name) for name, inner in classes.items() for path in inner.files()]


def _beside(names: list[str], places: str) -> str:
    return f"Skipped {counted(len(names), 'image')} beside the folders of the {places}: {shortened(names)}."


# ------------------------------------------------------------------------------------------------------- data sets


def dataset_of(images: Iterable[Placed], label_names: list[str] | None) -> Any:
    """Return a data set of paths in memory, with a column of classes if these are given."""
    from datasets import ClassLabel, Dataset, Features, Image

    rows = list(images)
    columns: dict[str, list[Any]] = {"image": [str(row.path) for row in rows]}
    features: dict[str, Any] = {"image": Image()}
    if label_names is not None:
        columns["label"] = [row.label for row in rows]
        features["label"] = ClassLabel(names=label_names)
    return Dataset.from_dict(columns, features=Features(features))


def datasets_of(layout: Layout) -> dict[str, Any]:
    """Return the splits of a layout as data sets; a split without class folders has no column of classes.

    Class folders are united over splits if they differ in case or Unicode form alone. A split whose folders are all
    unknown to the training split has no classes, such as `test/unknown`.
    """
    _unite_classes(layout)
    classes = {split: {image.label for image in images} - {None} for split, images in layout.splits.items()}
    for split, names in classes.items():
        if split != "train" and names and classes.get("train") and not names & classes["train"]:
            layout.notes.append(
                f"The folders of the {split} split ({shortened(sorted(map(str, names)))}) are not in the "
                "training split, so its images count as not labelled."
            )
            names.clear()
    label_names = sorted({str(name) for names in classes.values() for name in names})
    return {
        split: dataset_of(images, label_names if classes[split] else None) for split, images in layout.splits.items()
    }


def _unite_classes(layout: Layout) -> None:
    first, same = layout.splits.get("train", []), {}
    known: dict[str, set[str]] = {}
    for image in first:
        if image.label is not None:
            known.setdefault(key_of(image.label), set()).add(image.label)
    names = {label for names in known.values() for label in names}
    for split, images in layout.splits.items():
        for number, (path, label) in enumerate(images):
            if label is not None and label not in names and len(found := known.get(key_of(label), set())) == 1:
                [same[label]] = found
                layout.splits[split][number] = Placed(path, same[label])
    if same:
        pairs = [f"{name!r} as {first!r}" for name, first in same.items()]
        layout.notes.append(f"Classes that differ only in case or Unicode form are united: {shortened(pairs)}.")


def key_of(name: str) -> str:
    """Return the name of a class without case, outer spaces and Unicode form."""
    return unicodedata.normalize("NFC", name).casefold().strip()
