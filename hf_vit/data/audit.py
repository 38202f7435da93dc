"""Find what is odd in labelled images: unreadable files, duplicates, contradicting labels, and tiny classes.

Exact duplicates have the same stored bytes; near duplicates are those of `duplicates`.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..system.texts import counted, shortened
from .duplicates import SIDE, gray_values, near_duplicates, small_picture
from .images import NO_IMAGE, channels_in, name_of, stored_source
from .labelled import ImageData
from .opening import as_stored

TINY = 10  # a class with fewer training images is named
FORMATS = {
    b"\xff\xd8": "JPEG",
    b"\x89P": "PNG",
    b"GI": "GIF",
    b"RI": "WebP",
    b"BM": "BMP",
    b"II": "TIFF",
    b"MM": "TIFF",
}
FORMATS |= {b"\x93N": "NumPy"}  # by the first two bytes


def stored_bytes(stored: dict[str, Any]) -> bytes:
    """Return the file content of an image as `datasets` stores it, `{"bytes", "path"}`; raises as `read_stored`."""
    source = stored_source(stored)
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def content_digest(content: bytes) -> str:
    """Return 32 hexadecimal digits that identify the content of a file."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Picture:
    """What one pass over the files finds out about an image.

    Attributes:
        size: (height, width) of the upright image in pixels.
        channels: Number of channels as stored.
        file_bytes, format: Size and format of the file.
        small: uint8 `[SIDE, SIDE, 3]`, see `small_picture`.
    """

    size: tuple[int, int]
    channels: int
    file_bytes: int
    format: str
    small: np.ndarray

    @property
    def is_comparable(self) -> bool:
        """Whether the image has enough detail to tell near duplicates from images that are alike."""
        return min(self.size) >= SIDE


@dataclass
class Contents:
    """Digests and names of the images of a split, in order; the digest of an image that cannot be read is `None`.

    `pictures` are what was seen in the images, if they were decoded; `None` for one that cannot be read.
    """

    digests: list[str | None]
    names: list[str]
    pictures: list[Picture | None] = field(default_factory=list)

    @property
    def unreadable(self) -> list[str]:
        """Names of the images that cannot be read."""
        return [name for name, digest in zip(self.names, self.digests, strict=True) if digest is None]


def read_contents(split: Any, columns: tuple[str, str | None], decode: bool = True) -> Contents:
    """Read the files of a split once, on every core.

    Args:
        split: `train` or `evaluation` of an `ImageData`; not a stream.
        columns: Names of the image and label columns.
        decode: Whether to decode every image too; otherwise only missing files are found to be unreadable.
    """
    from concurrent.futures import ThreadPoolExecutor

    from ..system.machine import cores

    rows = as_stored(split, columns)
    threads = ThreadPoolExecutor(cores())  # reading, hashing and decoding release the lock of Python
    try:
        found = list(threads.map(partial(_content, rows, columns[0], decode), range(len(rows))))
    finally:
        threads.shutdown(cancel_futures=True)  # a signal does not wait for the other images
    pictures = [picture for _, _, picture in found] if decode else []
    return Contents([digest for digest, _, _ in found], [name for _, name, _ in found], pictures)


def _content(rows: Any, column: str, decode: bool, index: int) -> tuple[str | None, str, Picture | None]:
    stored = rows[index][column] or NO_IMAGE
    name = name_of(stored) or f"image {index}"
    try:
        content = stored_bytes(stored)
        return content_digest(content), name, picture_of(content) if decode else None
    except Exception:  # the image is named and counted
        return None, name, None


def picture_of(content: bytes) -> Picture:
    """Decode an image at no more than the size that is needed; raises as `read_image`."""
    from ..model.image_geometry_hf_vit import size_of
    from ..model.image_reading_hf_vit import read_image, upright

    sizes = []

    def least_size(size: tuple[int, int]) -> tuple[int, int]:
        sizes.append(size)
        return 2 * SIDE, 2 * SIDE

    image = read_image(content, least_size)
    image = image if isinstance(image, Tensor) else upright(image)
    size = sizes[0] if sizes else size_of(image)
    kind = FORMATS.get(content[:2], "other")
    return Picture(size, channels_in(image), len(content), kind, small_picture(image))


@dataclass
class Audit:
    """What is odd in a data set.

    Attributes:
        counts: Readable training images per class, empty for regression.
        images: Numbers of training and evaluation images.
        unreadable: Names of unreadable images by split.
        repeated: Number of training images whose bytes occur earlier in the training split.
        contradictions: Names of training images with the same bytes and different labels, a list per content.
        leaked: Pairs of names, an evaluation image and a training image with the same bytes.
        near: The same for near duplicates, with their similarity; see `near_duplicates`.
        empty, tiny: Classes without a training image, and with fewer than `TINY`.
    """

    counts: dict[str, int]
    images: tuple[int, int]
    unreadable: dict[str, list[str]]
    repeated: int = 0
    contradictions: list[list[str]] = field(default_factory=list)
    leaked: list[tuple[str, str]] = field(default_factory=list)
    near: list[tuple[str, str, float]] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    tiny: dict[str, int] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """Return the findings in a few lines; none if nothing is odd."""
        found = []
        for split, names in self.unreadable.items():
            if names:
                found.append(f"Unreadable {split} images, which are left out: {len(names):,} ({shortened(names)}).")
        if self.tiny:
            listed = [f"{name} ({count})" for name, count in self.tiny.items()]
            found.append(f"Classes with fewer than {TINY} training images: {shortened(listed, 5)}.")
        if self.repeated:
            found.append(f"Training images with the same bytes as an earlier one: {self.repeated:,}.")
        if self.contradictions:
            pairs = [" = ".join(names[:2]) for names in self.contradictions]
            found.append(f"Training images with more than one label: {len(pairs):,} ({shortened(pairs)}).")
        if self.leaked:
            pairs = [f"{name} = {other}" for name, other in self.leaked]
            found.append(
                f"Evaluation images that are in the training split too, which makes the measured metrics too good: "
                f"{len(pairs):,} ({shortened(pairs)})."
            )
        if self.near:
            pairs = [f"{name} ~ {other} ({similarity:.3f})" for name, other, similarity in self.near]
            found.append(
                f"Near duplicates of training images in the evaluation split (encoded again, resized, mirrored or "
                f"cropped; similarity): {len(pairs):,} ({shortened(pairs)})."
            )
        return found


def audit(data: ImageData, contents: tuple[Contents, Contents | None] | None = None) -> Audit:
    """Find unreadable images, duplicates, contradicting labels and tiny classes.

    Args:
        data: Prepared data, not a stream. An evaluation split of `None` is left out.
        contents: Results of `read_contents` for both splits, if they exist already; near duplicates are found where
            it decoded the images.
    """
    if data.is_stream:
        raise ValueError("A stream cannot be audited: set streaming to false.")
    if contents is None:
        evaluation = None if data.evaluation is None else read_contents(data.evaluation, data.columns)
        contents = read_contents(data.train, data.columns), evaluation
    train, evaluation = contents
    labels = data.train[data.columns[1]][:] if data.columns[1] else [0] * len(data.train)
    readable = [index for index, digest in enumerate(train.digests) if digest is not None]
    counts = replace(data, train=data.train.select(readable)).class_counts()
    number_of = {} if counts is None else dict(zip(data.label_names, counts, strict=True))
    members: dict[str, list[int]] = defaultdict(list)
    for index in readable:
        members[str(train.digests[index])].append(index)
    groups = [group for group in members.values() if len(group) > 1]
    found = Audit(
        number_of,
        (len(train.digests), len(evaluation.digests) if evaluation else 0),
        {"training": train.unreadable, "evaluation": evaluation.unreadable if evaluation else []},
        sum(len(group) - 1 for group in groups),
        [[train.names[index] for index in group] for group in groups if len({str(labels[i]) for i in group}) > 1],
        empty=[name for name, count in number_of.items() if count == 0],
        tiny={name: count for name, count in number_of.items() if 0 < count < TINY},
    )
    if evaluation is not None:
        for digest, name in zip(evaluation.digests, evaluation.names, strict=True):
            if digest in members:
                found.leaked.append((name, train.names[members[digest][0]]))
        found.near = _near_pairs(train, evaluation)
    return found


def _near_pairs(train: Contents, evaluation: Contents) -> list[tuple[str, str, float]]:
    """Return evaluation images with their nearest duplicate in training; exact duplicates are left out."""
    known = set(train.digests)
    rows, others = _first_rows(train, set()), _first_rows(evaluation, known)
    thumbnails, of_training = (
        gray_values([contents.pictures[row].small for row in chosen])  # type: ignore[union-attr]
        for contents, chosen in ((evaluation, others), (train, rows))
    )
    nearest: dict[int, tuple[str, str, float]] = {}
    for pair in near_duplicates(thumbnails, of_training):
        names = evaluation.names[others[pair.first]], train.names[rows[pair.second]]
        nearest.setdefault(pair.first, (*names, pair.similarity))
    return list(nearest.values())


def _first_rows(contents: Contents, known: set[str | None]) -> list[int]:
    """Return the first row of every content that was decoded, is not known, and can be compared."""
    rows = {digest: row for row, digest in reversed(list(enumerate(contents.digests))) if digest not in known}
    chosen = sorted(row for digest, row in rows.items() if digest is not None and contents.pictures)
    return [row for row in chosen if (picture := contents.pictures[row]) is not None and picture.is_comparable]


# ------------------------------------------------------------------------------------------- the quick check of a run

SAMPLED = 4096  # bytes of a file at its beginning, middle and end, which distinguish files of equal size
MOST_BYTES = 4 << 30  # of images in a table; with more, reading them all would delay a run
ROWS = 512  # that are read at once


def quick_check(data: ImageData, repeats: float = 1.0) -> str:
    """Return a sentence on copies across splits, missing and empty files, and classes without images.

    Images are not decoded. Files are read only if two have the same size. `""` for a stream, and for tables that are
    too large.

    Args:
        data: Prepared data.
        repeats: Number of times that the training split repeats its images.
    """
    splits = [data.train, data.evaluation]
    if data.is_stream or data.evaluation is None or sum(split.data.nbytes for split in splits) > MOST_BYTES:
        return ""
    rows = round(len(data.train) / max(1.0, repeats))
    train, evaluation = (as_stored(split, data.columns) for split in (data.train.select(range(rows)), data.evaluation))
    column, broken, seen = data.columns[0], list[str](), defaultdict[int, list[int]](list)
    for row, stored, size in _sizes(evaluation, column):
        if size:
            seen[size].append(row)
        else:
            broken.append(name_of(stored) or f"image {row}")
    copies: dict[int, tuple[str, str]] = {}
    keys: dict[int, dict[bytes, list[int]]] = {}
    for row, stored, size in _sizes(train, column):
        if not size:
            broken.append(name_of(stored) or f"image {row}")
        elif size in seen:
            if size not in keys:
                keys[size] = defaultdict(list)
                for other in seen[size]:
                    keys[size][_sampled(evaluation[other][column])].append(other)
            for other in keys[size].get(_sampled(stored), ()):
                same = evaluation[other][column]
                if other not in copies and _are_equal(stored, same):
                    copies[other] = (name_of(same) or f"image {other}", name_of(stored) or f"image {row}")
    counts = data.class_counts() or []
    empty = [name for name, count in zip(data.label_names, counts, strict=False) if count == 0]
    pairs = [f"{first} = {second}" for first, second in copies.values()]
    odd = [f"{counted(len(pairs), 'evaluation image')} also in the training split ({shortened(pairs)})"] * bool(pairs)
    odd += [f"{counted(len(broken), 'missing or empty file')} ({shortened(broken)})"] * bool(broken)
    odd += [f"{counted(len(empty), 'class', 'classes')} without training images ({shortened(empty)})"] * bool(empty)
    if odd:
        return f"Data check: {'; '.join(odd)}. hf-vit audit shows more."
    return "Data check: no evaluation image is also in the training split, and no file is missing or empty."


def _sizes(split: Any, column: str) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Yield row, stored image and size of every file, 0 for a missing one; files on other machines are left out."""
    for start in range(0, len(split), ROWS):
        for row, stored in enumerate(split[start : start + ROWS][column], start=start):
            stored = stored or NO_IMAGE
            content, path = stored["bytes"], stored["path"]
            if content is not None:
                yield row, stored, len(content)
            elif path is None or "://" not in path:
                yield row, stored, os.path.getsize(path) if path and os.path.isfile(path) else 0


def _are_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    with suppress(OSError):  # training counts files that cannot be read
        return stored_bytes(one) == stored_bytes(other)
    return False


def _sampled(stored: dict[str, Any]) -> bytes:
    """Return a few bytes of a stored image, or of its file; `b""` if it cannot be read."""
    with suppress(OSError):
        return _few_bytes(stored_source(stored))
    return b""


def _few_bytes(source: str | bytes) -> bytes:
    if isinstance(source, bytes):
        middle = len(source) // 2
        return source[:SAMPLED] + source[middle : middle + SAMPLED] + source[-SAMPLED:]
    parts, size = [], os.path.getsize(source)
    with open(source, "rb") as file:
        for start in (0, size // 2, max(0, size - SAMPLED)):
            file.seek(start)
            parts.append(file.read(SAMPLED))
    return b"".join(parts)
