"""Findings of `hf-vit audit` that need no model: unreadable and tiny images, duplicates, leaks, contradicting labels.

A finding is one image with one reason. All images of a data set are numbered through, the training images first.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .audit import Contents, Picture, read_contents
from .classes import DENSE, MULTI, REGRESSION, SINGLE
from .duplicates import LEAST_CONTRAST, gray_values, near_duplicates
from .images import NO_IMAGE
from .labelled import ImageData
from .opening import as_stored

TINY_SIDE = 32  # pixels of the shorter side, below which an image is tiny, unless most images of the data are
LARGEST_ASPECT = 5.0  # longer side divided by the shorter one, above which an image is a strip
OTHER_COLORS = 24.0  # difference of mean colours, of 255, from which a near duplicate is recoloured


@dataclass(frozen=True)
class Kind:
    """A kind of finding: its heading, what it means, and whether `clean` leaves out such training images."""

    heading: str
    meaning: str
    is_left_out: bool = True


UNREADABLE, CONTRADICTION, LEAK, NEAR_LEAK = "unreadable", "contradiction", "leak", "near leak"
EXACT, NEAR_COPY, WRONG_LABEL = "exact duplicate", "near duplicate", "wrong label"
SMALL, OUTLIER = "small or blank", "outlier"
KINDS = {
    UNREADABLE: Kind("Unreadable images", "Files that are missing, empty or corrupt."),
    LEAK: Kind(
        "Leaks: evaluation images in the training split",
        "An evaluation image with the same bytes as a training image inflates the measured metrics. The cleaned "
        "data leaves out the training image.",
    ),
    NEAR_LEAK: Kind(
        "Leaks: near duplicates of training images in the evaluation split",
        "The evaluation image is a training image that was encoded again, resized, mirrored, recoloured or cropped a "
        "little. The cleaned data leaves out the training image.",
    ),
    CONTRADICTION: Kind("Copies with different labels", "Images with the same bytes and different labels."),
    WRONG_LABEL: Kind(
        "Labels that are probably wrong",
        "The score is the probability that the label is wrong, from a linear classifier on frozen features that was "
        "not trained on the image. About seven in ten are expected to be wrong.",
    ),
    EXACT: Kind("Exact duplicates", "Images with the same bytes as an earlier image of the same split."),
    NEAR_COPY: Kind(
        "Near duplicates",
        "Images of the same split that were encoded again, resized, mirrored, recoloured or cropped a little. The "
        "score is the correlation of their gradients after alignment. Copies with different labels are kept.",
    ),
    SMALL: Kind("Tiny, narrow and blank images", "Images that show very little.", is_left_out=False),
    OUTLIER: Kind(
        "Outliers",
        "Images that are far from all others. The score is half the cosine distance of their features to those of "
        "their ten nearest neighbors.",
        is_left_out=False,
    ),
}


@dataclass(frozen=True)
class Finding:
    """What is odd about an image.

    Attributes:
        kind: Key of `KINDS`.
        image: Number of the image.
        score: Between 0 and 1 for probabilities and similarities; larger is odder.
        reason: A phrase for people.
        other: Number of the image that this one is a copy of.
        suggestion: Label that fits better.
    """

    kind: str
    image: int
    score: float
    reason: str
    other: int | None = None
    suggestion: str = ""


@dataclass
class Images:
    """All images of a data set, numbered consecutively, the training images first.

    Attributes:
        data: The data set.
        parts: Contents of its splits.
        splits: The training and the evaluation split, if there is one, with images as they are stored.
        labels: Labels as the data stores them; `None` without labels, and for masks and boxes.
        digests, names, pictures: Those of all contents.
    """

    data: ImageData
    parts: list[Contents]
    splits: list[Any] = field(init=False)
    labels: list[Any] | None = field(init=False)
    digests: list[str | None] = field(init=False)
    names: list[str] = field(init=False)
    pictures: list[Picture | None] = field(init=False)

    def __post_init__(self) -> None:
        data, column = self.data, self.data.columns[1]
        self.splits = [as_stored(split, data.columns) for split in (data.train, data.evaluation) if split is not None]
        has_labels = column is not None and data.problem_type not in DENSE
        self.labels = [label for split in self.splits for label in split[column][:]] if has_labels else None
        self.digests = [digest for part in self.parts for digest in part.digests]
        self.names = [name for part in self.parts for name in part.names]
        self.pictures = [picture for part in self.parts for picture in part.pictures]

    @classmethod
    def read(cls, data: ImageData) -> "Images":
        """Read and decode every file of a data set once."""
        splits = (split for split in (data.train, data.evaluation) if split is not None)
        return cls(data, [read_contents(split, data.columns) for split in splits])

    @property
    def first_evaluation(self) -> int:
        """The number of training images, which is the number of the first evaluation image."""
        return len(self.parts[0].digests)

    def place(self, image: int) -> tuple[str, int]:
        """Return the split of an image, `"train"` or the name of the evaluation split, and its row there."""
        first = self.first_evaluation
        return ("train", image) if image < first else (self.data.eval_split, image - first)

    def stored(self, image: int) -> dict[str, Any]:
        """Return an image as `datasets` stores it."""
        is_evaluation = image >= self.first_evaluation
        split, row = self.splits[is_evaluation], image - self.first_evaluation * is_evaluation
        return split[row][self.data.columns[0]] or NO_IMAGE

    def label_text(self, image: int) -> str:
        """Return the label of an image as text; `""` without labels."""
        return "" if self.labels is None else label_text(self.labels[image], self.data)


def label_text(label: Any, data: ImageData) -> str:
    """Return a label as `ImageData` stores it as text: a class, several separated by commas, or numbers."""
    if data.problem_type == SINGLE:
        return data.label_names[label]
    values = label if isinstance(label, list) else [label]
    if data.problem_type == MULTI:
        return ", ".join(name for name, value in zip(data.label_names, values, strict=True) if value == 1)
    if data.problem_type == REGRESSION:
        return ", ".join(f"{value:.6g}" for value in values)
    return str(label)


def findings_of(images: Images) -> list[Finding]:
    """Return everything that is found without a model."""
    return [*_unreadable(images), *_small(images), *_copies(images), *_near_copies(images)]


def _unreadable(images: Images) -> list[Finding]:
    reason = "cannot be read"
    return [Finding(UNREADABLE, image, 1.0, reason) for image, digest in enumerate(images.digests) if digest is None]


def _small(images: Images) -> list[Finding]:
    """Return tiny images, unless most images are, and strips and images of one colour."""
    found = []
    sides = sorted(min(picture.size) for picture in images.pictures if picture)
    is_usual = bool(sides) and sides[len(sides) // 2] < TINY_SIDE
    for image, picture in enumerate(images.pictures):
        if picture is None:
            continue
        (height, width), side = picture.size, min(picture.size)
        if side < TINY_SIDE and not is_usual:
            found.append(Finding(SMALL, image, 1 - side / TINY_SIDE, f"has {height}x{width} pixels"))
        elif max(picture.size) > LARGEST_ASPECT * side:
            reason = f"is a strip of {height}x{width} pixels"
            found.append(Finding(SMALL, image, 1 - side / max(picture.size), reason))
        elif picture.small.reshape(-1, 3).std(axis=0).max() < LEAST_CONTRAST:
            found.append(Finding(SMALL, image, 1.0, "has one color only"))
    return found


def _copies(images: Images) -> list[Finding]:
    """Return images with the same bytes as an earlier one of their split, or as a training image."""
    members: dict[str, list[int]] = defaultdict(list)
    for image, digest in enumerate(images.digests):
        if digest is not None:
            members[digest].append(image)
    found = []
    for group in members.values():
        original, *copies = group
        labels = {image: images.label_text(image) for image in group}
        if copies and len(set(labels.values())) > 1:
            reason = f"has the same bytes and another label: {' or '.join(sorted(set(labels.values())))}"
            others = [*copies, original]
            found += [Finding(CONTRADICTION, *pair) for pair in _paired(group, others, 1.0, reason)]
        firsts: dict[bool, int] = {}
        for image in group:
            is_evaluation = image >= images.first_evaluation
            if is_evaluation and original < images.first_evaluation:
                found.append(Finding(LEAK, image, 1.0, "has the same bytes as a training image", original))
            elif is_evaluation in firsts:
                reason = "has the same bytes as an earlier image"
                found.append(Finding(EXACT, image, 1.0, reason, firsts[is_evaluation]))
            firsts.setdefault(is_evaluation, image)
    return found


def _paired(group: Sequence[int], others: Sequence[int], score: float, reason: str) -> Any:
    return ((image, score, reason, other) for image, other in zip(group, others, strict=True))


def _near_copies(images: Images) -> list[Finding]:
    """Return the later image of each pair of near duplicates; exact ones are left out."""
    first_of: dict[str, int] = {}
    for image, (digest, picture) in enumerate(zip(images.digests, images.pictures, strict=True)):
        if digest is not None and picture is not None and picture.is_comparable:
            first_of.setdefault(digest, image)
    chosen = list(first_of.values())
    small = {image: picture.small for image in chosen if (picture := images.pictures[image]) is not None}
    found = []
    for pair in near_duplicates(gray_values(list(small.values()))):
        original, image = sorted((chosen[pair.first], chosen[pair.second]))
        is_leak = original < images.first_evaluation <= image
        difference = abs(small[original].mean(axis=(0, 1)) - small[image].mean(axis=(0, 1))).max()
        parts = [f"looks like {'a training image' if is_leak else 'another image'}"]
        parts += ["mirrored"] * pair.is_mirrored + ["in other colors"] * bool(difference > OTHER_COLORS)
        if images.label_text(original) != images.label_text(image):
            parts.append(f"with the label {images.label_text(original)}")
        kind = NEAR_LEAK if is_leak else NEAR_COPY
        found.append(Finding(kind, image, pair.similarity, ", ".join(parts), original))
    return found


def left_out(images: Images, findings: Sequence[Finding]) -> set[int]:
    """Return the images that cleaned data leaves out.

    Of the evaluation split these are unreadable and repeated images only, so that results stay comparable; leaks are
    left out of the training split. Near duplicates with different labels are kept, since the label may depend on what
    differs. One image of every group of copies is kept.
    """
    gone = {each.image for each in findings if each.kind in (UNREADABLE, EXACT)}
    for each in sorted(findings, key=lambda each: each.image):
        is_training, other = each.image < images.first_evaluation, each.other
        if each.kind in (LEAK, NEAR_LEAK) and other is not None:
            gone.add(other)
        elif is_training and each.kind in (CONTRADICTION, WRONG_LABEL):
            gone.add(each.image)
        elif is_training and each.kind == NEAR_COPY and other is not None and other not in gone:
            gone |= {each.image} if images.label_text(each.image) == images.label_text(other) else set()
    return gone


def counts_of(findings: Sequence[Finding]) -> dict[str, int]:
    """Return the number of images with each kind of finding, in the order of `KINDS`."""
    return {kind: len({each.image for each in findings if each.kind == kind}) for kind in KINDS}


def facts_of(pictures: Sequence[Picture]) -> dict[str, torch.Tensor]:
    """Return what is known of images without their content, by group of facts, float32 `[N, columns]`."""
    sizes = torch.tensor([picture.size for picture in pictures], dtype=torch.float32).reshape(-1, 2)
    files = torch.tensor([[picture.file_bytes, picture.channels] for picture in pictures], dtype=torch.float32)
    formats = sorted({picture.format for picture in pictures})
    kinds = torch.tensor([[float(picture.format == name) for name in formats] for picture in pictures])
    colors = torch.tensor([picture.small.reshape(-1, 3).mean(axis=0).tolist() for picture in pictures])
    files = files.reshape(-1, 2)
    return {
        "size and aspect ratio": torch.cat([sizes, sizes[:, :1] / sizes[:, 1:]], dim=1),
        "file size and format": torch.cat([files, kinds.reshape(len(pictures), -1)], dim=1),
        "mean color": colors.reshape(-1, 3),
    }
