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
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image as PILImage

from ..model.image_reading_hf_vit import can_read_heic
from ..system.places import is_junk
from ..system.texts import counted, shortened

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "validate", "valid", "val", "dev", "devel", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "holdout", "heldout"), "test"),
}
IMAGE_WORDS = {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "jpegimages"}
MASK_WORDS = {"mask", "masks", "annotation", "annotations", "segmentation", "segmentations", "groundtruth", "trimaps"}
FILLERS = {*IMAGE_WORDS, "set", "data", "dataset", "split", "folder", "files"}  # as in train_images and trainset
TWO_WORDS = re.compile(r"\b(hold|held)[-_ ]?(?=out)", re.IGNORECASE)
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
NOT_DECODED = {"PDF", "MPEG", "HDF5", "BUFR", "GRIB"}  # Pillow recognizes these formats and cannot decode them
REMEDIES = dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif")
MASK_FILE = re.compile(r"(.+)_mask(?:_\d+)?\.\w+$", re.IGNORECASE)


@cache
def image_endings() -> frozenset[str]:
    """Return the endings, in lower case, of files that can be read as images."""
    can_read_heic()
    known = PILImage.registered_extensions().items()  # Pillow 12.0 may register the empty ending
    readable = {ending for ending, name in known if ending and name in PILImage.OPEN and name not in NOT_DECODED}
    return frozenset({*readable, ".npy"})


def is_image_file(name: str) -> bool:
    """Return whether the ending of a file name is that of an image."""
    return os.path.splitext(name)[1].lower() in image_endings()


def split_of(name: str) -> str | None:
    """Return the split that a name stands for: `"train"`, `"validation"` or `"test"`; `None` if not exactly one."""
    return _split_and_rest(name)[0]


def is_split(name: str) -> bool:
    """Return whether a name denotes a split and nothing else: `TRAIN` or `test_images`, but not `train_extra`."""
    split, rest = _split_and_rest(name)
    return split is not None and not rest


def words_of(name: str) -> list[str]:
    """Return the words of a name in lower case, where `trainset` counts as `train`."""
    letters = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", TWO_WORDS.sub(r"\1", name))  # as in TrainImages
    words = [word.lower() for word in re.findall(r"[^\W\d_]+", letters)]
    return [next((start for end in FILLERS if (start := word.removesuffix(end)) in SPLITS), word) for word in words]


def _split_and_rest(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the split in a name, and its other words but those that say nothing, such as `images`."""
    words = words_of(name)
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


def skipped_in(folders: Iterable[str | Path]) -> str | None:
    """Return a sentence that counts the files below some folders that are no images, or `None` without any."""
    skipped = Skipped()
    for folder in folders:
        for _, below, names in os.walk(folder):
            below[:] = [name for name in below if not is_junk(name)]
            names = [name for name in names if not (is_junk(name) or name.startswith("."))]
            kinds = (os.path.splitext(name)[1].lower() for name in names)
            skipped.files.update(kind or "without an ending" for kind in kinds if kind not in image_endings())
    return skipped.note()


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

    def files(self) -> Iterator[str]:
        """Yield the paths of the images of the folder and of all folders below."""
        start = os.path.join(self.path, "")
        yield from (start + name for name in self.images)
        for folder in self.folders.values():
            yield from folder.files()

    def only_folders(self) -> list[str]:
        """Return the names of the folders with images if no image lies beside them."""
        return [] if self.images else list(self.with_images())


def scan(path: Path, keeps_masks: bool = False) -> tuple[Folder, Skipped]:
    """List the images and tables below a folder; links are followed, but not in circles."""
    skipped = Skipped()
    return _scan(path.absolute(), skipped, (), keeps_masks), skipped


def _scan(path: Path, skipped: Skipped, above: tuple[str, ...], keeps_masks: bool) -> Folder:
    folder = Folder(path)
    above = (*above, os.path.realpath(path))
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        ending = os.path.splitext(entry.name)[1].lower()
        is_hidden = entry.name.startswith(".") or is_junk(entry.name)
        if entry.is_symlink() and not os.path.exists(entry.path):
            skipped.files["broken links"] += 1
        elif entry.is_dir():
            if is_hidden:
                skipped.folders[entry.name] += 1
            elif os.path.realpath(entry.path) not in above:
                folder.folders[entry.name] = _scan(path / entry.name, skipped, above, keeps_masks)
        elif not is_hidden and ending in image_endings():
            folder.images.append(entry.name)
        elif not is_hidden and ending in TABLE_ENDINGS:
            folder.tables.append(entry.name)
        else:
            skipped.files[entry.name if entry.name.startswith(".") else ending or "without an ending"] += 1
    if not keeps_masks:
        _drop_masks(folder, skipped)
    return folder


def _drop_masks(folder: Folder, skipped: Skipped) -> None:
    """Skip `masks` beside `images`, `train_masks` beside `train`, and `x_mask.png` beside `x.png`.

    Without such a neighbour, the name may be that of a class.
    """
    stems = {os.path.splitext(name)[0] for name in folder.images}
    masks = {name for name in folder.images if (found := MASK_FILE.match(name)) and found[1] in stems}
    if masks:
        folder.images = [name for name in folder.images if name not in masks]
        skipped.files["masks"] += len(masks)
    kinds = {name: set(words_of(name)) for name in folder.with_images()}
    if not all(words & {*IMAGE_WORDS, *SPLITS, *MASK_WORDS} for words in kinds.values()):
        return  # a class `mask` among others
    neighbours = [words - IMAGE_WORDS for words in kinds.values() if words & {*IMAGE_WORDS, *SPLITS}]
    for name, words in kinds.items():
        if words & MASK_WORDS and words - MASK_WORDS in neighbours:
            del folder.folders[name]
            skipped.folders[name] += 1


# --------------------------------------------------------------------------------------------------------- layout


class Placed(NamedTuple):
    """An image and the class that its folder gives it, if any."""

    path: str
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

    The names of its folders then share all words but those for the split, as in `seg_train` and `seg_test`, or the
    folders share a class. So a class `test tube` is not a split. A folder such as `seg_pred` may lie beside a training
    and an evaluation split.
    """
    named = {name: _split_and_rest(name) for name in folder.with_images()}
    splits: dict[str, list[Folder]] = {}
    for name, (split, _) in named.items():
        if split is not None:
            splits.setdefault(split, []).append(folder.folders[name])
    rests = {rest for split, rest in named.values() if split is not None}
    others = [name for name, (split, _) in named.items() if split is None]
    is_divided = len(rests) == 1 and (len(splits) > 1 or rests == {()})
    if len(rests) > 1 and len(splits) > 1:  # train-clean and test are splits if both hold the same classes
        is_divided = bool(set.intersection(*(set(inner.only_folders()) for each in splits.values() for inner in each)))
    return splits if is_divided and (not others or {"train"} < splits.keys()) else {}


def unwrapped(folder: Folder, may_have_tables: bool = False) -> Folder:
    """Descend into folders that are the only content of their parent, unless the name is that of a split or class."""
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
    is_plain = bool(words_of(name)) and not rest and split in (None, split_of(parent.path.name))
    return is_plain or name == parent.path.name


def layout_of(root: Folder) -> Layout:
    """Infer the splits and classes of a scanned folder.

    The class of an image is the first folder below that of its split, whatever folders lie below the class.
    """
    root = unwrapped(root, may_have_tables=True)
    notes: list[str] = []
    by_split, of_classes = split_folders(root), {}
    if by_split:
        used = {folder.path for folders in by_split.values() for folder in folders}
        if others := [name for name, folder in root.with_images().items() if folder.path not in used]:
            notes.append(f"Skipped the images in {shortened(others)}: expected the name of a split.")
        if empty := [name for name, folder in root.folders.items() if split_of(name) and not folder.has_images]:
            _refuse_empty_training(root, empty, by_split)
            notes.append(_without_images(root, empty))
    else:
        of_classes = _splits_of_classes(root)
    if root.images and (by_split or of_classes):
        notes.append(_beside(root.images, "splits" if by_split else "classes"))
    if not by_split and not of_classes:
        _refuse_unclear_splits(root)
        by_split = {"train": [root]}
    splits = of_classes or {
        split: [image for folder in folders for image in _placed(_without_wrapper(folder), notes)]
        for split, folders in by_split.items()
    }
    for images in splits.values():
        images.sort(key=lambda image: image.path.replace(os.sep, "/"))
    return Layout(splits, list(dict.fromkeys(notes)))


def _refuse_empty_training(root: Folder, empty: list[str], by_split: dict[str, list[Folder]]) -> None:
    if "train" not in by_split and (names := [name for name in empty if split_of(name) == "train"]):
        raise ValueError(
            f"The folder {names[0]} in {root.path} holds no images: put the training images there, or remove it to "
            f"divide the images of {', '.join(by_split)}."
        )


def _refuse_unclear_splits(root: Folder) -> None:
    """Raise an error where a folder may be a split or a class: it is named `train`, and holds folders as others do."""
    inner = {name: folder.only_folders() for name, folder in root.with_images().items()}
    for name, classes in inner.items():
        others = [other for other in inner if other != name]
        shares = any(set(classes) & set(inner[other]) for other in others)
        if is_split(name) and others and (shares or len(classes) > 1):
            raise ValueError(
                f"Cannot tell whether {name} in {root.path} is a split or a class: it holds the folders "
                f"{shortened(classes)}, but {shortened(others)} beside it "
                f"{'is' if len(others) == 1 else 'are'} not named as a split. If it is a split, name the others "
                f"train, validation or test, or move them away. If it is a class, move all classes into one folder, "
                "train."
            )


def _without_wrapper(folder: Folder) -> Folder:
    """Return `train/images` for a split `train` whose classes lie in it."""
    while not folder.images and len(inner := folder.with_images()) == 1:
        [(name, only)] = inner.items()
        if not _says_nothing(name, folder):
            break
        folder = only
    return folder


def _splits_of_classes(root: Folder) -> dict[str, list[Placed]]:
    """Return the images by split if every folder is a class that is divided into splits.

    Raises:
        ValueError: If some classes are divided and others are not.
    """
    classes = {name: {} if folder.images else split_folders(folder) for name, folder in root.with_images().items()}
    if len(classes) < 2 or all(len(splits) < 2 for splits in classes.values()):
        return {}
    if whole := [name for name, splits in classes.items() if not splits]:
        divided = next(name for name, splits in classes.items() if len(splits) > 1)
        raise ValueError(
            f"{divided} in {root.path} is divided into {' and '.join(classes[divided])}, but {shortened(whole)} "
            f"{'is' if len(whole) == 1 else 'are'} not: divide all classes, or none."
        )
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
        notes.append(_without_images(folder, empty))
    if folder.images:
        notes.append(_beside(folder.images, "classes"))
    below = Counter(name for inner in classes.values() for name in inner.only_folders())
    inner = [name for name in below if set(words_of(name)) - IMAGE_WORDS or not words_of(name)]
    if inner and (below.total() > len(below) or all(each.only_folders() for each in classes.values())):
        notes.append(
            f"The classes are {shortened(list(classes))}; the folders below them, such as {shortened(inner)}, are "
            "not classes."
        )
    return [Placed(path, name) for name, inner in classes.items() for path in inner.files()]


def _without_images(folder: Folder, names: list[str]) -> str:
    return f"{counted(len(names), 'folder')} without images in {folder.path.name}: {shortened(names)}."


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

    A split whose folders are all unknown to the training split has no classes, such as `test/unknown`.
    """
    order = sorted(layout.splits, key=lambda split: split != "train")
    same, notes = same_names([sorted({image.label or "" for image in layout.splits[split]}) for split in order])
    layout.notes += notes
    if same:
        for split, images in layout.splits.items():
            layout.splits[split] = [Placed(path, same.get(label or "", label)) for path, label in images]
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


def same_names(lists: list[list[str]]) -> tuple[dict[str, str], list[str]]:
    """Return names that are written in two ways, each with its first spelling, and notes for the user.

    In the first list, which is that of the training split, names that differ in case stay two classes, since they may
    be meant; names that differ in Unicode form look alike, and are one class.
    """
    same: dict[str, str] = {}
    keys: dict[str, list[str]] = {}
    for name in dict.fromkeys(lists[0]):
        known = keys.setdefault(key_of(name), [])
        composed = unicodedata.normalize("NFC", name)
        if alike := [other for other in known if unicodedata.normalize("NFC", other) == composed]:
            same[name] = alike[0]
        else:
            known.append(name)
    for name in dict.fromkeys(name for own in lists[1:] for name in own if name not in lists[0]):
        if len(found := keys.setdefault(key_of(name), [name])) == 1 and found[0] != name:
            [same[name]] = found
    notes = []
    if same:
        pairs = [f"{name!r} as {first!r}" for name, first in same.items()]
        notes.append(f"Classes that differ only in case or Unicode form are united: {shortened(pairs)}.")
    if apart := [" and ".join(map(repr, known)) for known in keys.values() if len(known) > 1]:
        notes.append(
            f"Classes that differ only in case or spaces: {shortened(apart)}. Rename them if they are the same."
        )
    return same, notes


def key_of(name: str) -> str:
    """Return the name of a class without case, outer spaces and Unicode form."""
    return unicodedata.normalize("NFC", name).casefold().strip()
