"""Find what is odd in labelled images: unreadable files, duplicates, contradicting labels, and tiny classes.

Exact duplicates have the same stored bytes. Near duplicates are found from features that the caller has computed.
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..system.texts import shortened
from .images import NO_IMAGE, name_of, stored_source
from .labelled import ImageData
from .opening import as_stored

NEAR = 0.985  # cosine similarity of centred features from which two images are near duplicates
TINY = 10  # a class with fewer training images is named


def stored_bytes(stored: dict[str, Any]) -> bytes:
    """Return the file content of an image as `datasets` stores it, `{"bytes", "path"}`; raises as `read_stored`."""
    source = stored_source(stored)
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def content_digest(content: bytes) -> str:
    """Return 32 hexadecimal digits that identify the content of a file."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@dataclass
class Contents:
    """Digests and names of the images of a split, in order; the digest of an image that cannot be read is `None`."""

    digests: list[str | None]
    names: list[str]

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
    return Contents([digest for digest, _ in found], [name for _, name in found])


def _content(rows: Any, column: str, decode: bool, index: int) -> tuple[str | None, str]:
    from ..model.image_reading_hf_vit import read_image

    stored = rows[index][column] or NO_IMAGE
    name = name_of(stored) or f"image {index}"
    try:
        content = stored_bytes(stored)
        if decode:
            read_image(content)
        return content_digest(content), name
    except Exception:  # the image is named and counted
        return None, name


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
        near: The same for near duplicates, with their similarity.
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
                f"Near duplicates of training images in the evaluation split (cosine similarity of centred features "
                f"of at least {NEAR}): {len(pairs):,} ({shortened(pairs)})."
            )
        return found


def audit(
    data: ImageData,
    contents: tuple[Contents, Contents | None] | None = None,
    features: tuple[Tensor, Tensor | None] | None = None,
) -> Audit:
    """Find unreadable images, duplicates, contradicting labels and tiny classes.

    Args:
        data: Prepared data, not a stream. An evaluation split of `None` is left out.
        contents: Results of `read_contents` for both splits, if they exist already.
        features: Features `[N, D]` of the readable images of both splits; near duplicates are found with them.
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
        if features is not None and features[1] is not None:
            found.near = _near_duplicates(train, evaluation, features[0], features[1])
    return found


def _near_duplicates(
    train: Contents, evaluation: Contents, train_features: Tensor, features: Tensor
) -> list[tuple[str, str, float]]:
    """Return evaluation images with a near duplicate in training; exact duplicates are left out."""
    mean = train_features.mean(dim=0)
    bank = F.normalize(train_features - mean, dim=-1)
    names = [[n for n, d in zip(c.names, c.digests, strict=True) if d is not None] for c in (train, evaluation)]
    known = set(train.digests)
    digests = [digest for digest in evaluation.digests if digest is not None]
    near, row = [], 0
    for chunk in features.split(512):
        similarity, nearest = (F.normalize(chunk - mean, dim=-1) @ bank.T).max(dim=-1)
        for value, other in zip(similarity.tolist(), nearest.tolist(), strict=True):
            if value >= NEAR and digests[row] not in known:
                near.append((names[1][row], names[0][other], value))
            row += 1
    return near
