"""Folders of images and masks: which mask belongs to which image, and to which split, by their places and names.

images/a.jpg        masks/a.png
train/images/a.jpg  train/masks/a.png            (also val/, test/)
images/train/a.jpg  annotations/train/a.png      (ADE20K)
train/a.png         trainannot/a.png             (CamVid), train_masks/a_mask.gif (Carvana)
JPEGImages/a.jpg    SegmentationClass/a.png      (Pascal VOC)
a.jpg               a_mask.png                   or a.png
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..system.texts import counted, shortened
from .archives import is_archive, unpacked
from .folders import IMAGE_WORDS, MASK_WORDS, SPLITS, Folder, scan, words_of
from .opening import Opened, open_source, storage_of

MASKS = {*MASK_WORDS, "annot", "annots", "label", "labels", "gt", "segmentationclass", "trimap"}
# What words of folders may end with, the longest first, as in trainannot.
ENDINGS = sorted(MASKS, key=len, reverse=True)
SUFFIX = re.compile(
    r"[-_. ](?:gtfine_label(?:train)?ids|masks?|labels?|segmentations?|seg|annotations?|annot|gt|l)$",
    re.IGNORECASE,
)
IMAGE_SUFFIX = re.compile(r"[-_](?:leftimg8bit|image|img|rgb)$", re.IGNORECASE)
JPEG = (".jpg", ".jpeg")
Key = tuple[str | None, tuple[str, ...], str]  # split, other words of the folders, and name


class Place(NamedTuple):
    """What the place of a file says: whether it is a mask, its split if any, and what image and mask share."""

    is_mask: bool
    split: str | None
    key: tuple[str, ...]


def place_of(parts: tuple[str, ...]) -> Place:
    """Return what the folders of a file say, the outermost first."""
    is_mask, split, key = False, None, []
    for part in parts:
        rest = []
        for word in words_of(part):
            ending = next((ending for ending in ENDINGS if word.endswith(ending)), "")
            if ending and word.removesuffix(ending) in ("", *SPLITS):
                is_mask, word = True, word.removesuffix(ending)
            if word in SPLITS:
                split = SPLITS[word]
            elif word not in IMAGE_WORDS and word not in ("", "class", "raw", "set", "data", "gtfine", "leftimg"):
                rest.append(word)
        key += [" ".join(rest)] if rest else []
    return Place(is_mask, split, tuple(key))


def pairs_in(folder: Folder) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """Return the paths of images and masks by split, and notes for the user.

    Raises:
        ValueError: If no image has a mask.
    """
    files = sorted(folder.files())
    common = os.path.commonpath([os.path.dirname(file) for file in files])
    images: dict[Key, str] = {}
    masks: dict[Key, str] = {}
    for file in files:
        path = Path(os.path.relpath(file, common))
        place = place_of(path.parts[:-1])
        if place.is_mask:
            masks[place.split, place.key, path.stem.lower()] = file
        else:
            images[place.split, place.key, path.name.lower()] = file
    if not masks:
        images, masks = _beside(images)
    stems = {(split, key, Path(name).stem) for split, key, name in images}
    for (split, key, stem), file in list(masks.items()):  # a_mask.png for a.jpg, whatever the folder
        if (split, key, stem) not in stems:
            masks.setdefault((split, key, SUFFIX.sub("", stem)), file)
    splits: dict[str, list[tuple[str, str]]] = {}
    used, alone = set(), []
    for (split, key, name), file in images.items():
        stem = Path(name).stem
        mask = masks.get((split, key, stem)) or masks.get((split, key, IMAGE_SUFFIX.sub("", stem)))
        if mask is None:
            alone.append(os.path.basename(file))
            continue
        used.add(mask)
        splits.setdefault(split or "train", []).append((file, mask))
    if not splits:
        found = f"{counted(len(images), 'image')} ({shortened(alone)})" if images else "no images"
        wrong = f"{counted(len(set(masks.values())), 'mask')}" if masks else "no masks"
        raise ValueError(
            f"Expected masks of the images in {folder.path}, found {found} and {wrong} that match: put them into the "
            "folders images and masks under the same names, such as images/a.jpg and masks/a.png, with or without "
            "folders train, validation and test above or below."
        )
    notes = []
    if alone:
        notes.append(f"Skipped {counted(len(alone), 'image')} without a mask: {shortened(alone)}.")
    if lost := [os.path.basename(file) for file in sorted(set(masks.values()) - used)]:
        notes.append(f"Skipped {counted(len(lost), 'mask')} without an image: {shortened(lost)}.")
    return splits, notes


def _beside(images: dict[Key, str]) -> tuple[dict[Key, str], dict[Key, str]]:
    """Divide files of one folder into images and masks: `a.jpg` with `a_mask.png`, or with `a.png`."""
    stems = {(split, key, Path(name).stem) for split, key, name in images}
    jpegs = {(split, key, Path(name).stem) for split, key, name in images if name.endswith(JPEG)}
    kept, masks = {}, {}
    for (split, key, name), file in images.items():
        stem = Path(name).stem
        plain = SUFFIX.sub("", stem)
        is_named = plain != stem and (split, key, plain) in stems
        if is_named or ((split, key, stem) in jpegs and not name.endswith(JPEG)):
            masks[split, key, stem] = file
        else:
            kept[split, key, name] = file
    return kept, masks


def open_masks(source: Any, streaming: bool, image_column: str | None, mask_columns: list[str]) -> Opened:
    """Open a source of images and masks: a folder or an archive of both, or what `open_source` reads.

    Raises:
        ValueError: If no image has a mask, or the source cannot be opened.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if is_archive(path):
            path = unpacked(path)
        if path.is_dir() and storage_of(path) == "imagefolder":
            return _open_folder(path)
    return open_source(source, streaming, image_column, mask_columns)


def _open_folder(path: Path) -> Opened:
    from datasets import Dataset, Features, Image

    root, skipped = scan(path, keeps_masks=True)
    if not root.has_images:
        raise ValueError(f"{path} holds no images. {skipped.note() or 'It is empty.'}")
    splits, notes = pairs_in(root)
    features = Features({"image": Image(), "mask": Image()})
    data_sets = {
        split: Dataset.from_dict(
            {"image": [image for image, _ in pairs], "mask": [mask for _, mask in pairs]}, features=features
        )
        for split, pairs in splits.items()
    }
    for ending in (".json", ".txt"):  # names of classes
        del skipped.files[ending]
    note = skipped.note()
    return Opened(data_sets, [*([note] if note else []), *notes])
