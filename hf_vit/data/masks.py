"""Masks of semantic segmentation: how they are found, what their values mean, and how they are read.

A mask is an image of class indices, grayscale or with a palette. The value 255 is ignored, unless 0 and 255 are the
only values: then 255 is the foreground. From the file to the batch, a mask is the last channel of its image, so that
caching and augmentation move both together.
"""

import json
import re
from collections.abc import Iterable, Sequence
from colorsys import hsv_to_rgb
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.segmentation_maps_hf_vit import IGNORED, class_indices
from ..system.machine import cores
from ..system.texts import counted, shortened
from .images import NO_IMAGE, EvaluationImages, TrainingImages, Visit, name_of, stored_source, upright_size

MASK_COLUMNS = (
    *("mask", "masks", "segmentation_mask", "segmentation_map", "segmentation", "semantic_segmentation"),
    *("annotation", "annotations", "label", "labels", "seg", "gt", "ground_truth", "trimap"),
)
NAME_FILES = ("id2label.json", "classes.json", "class_names.json", "classes.txt", "class_names.txt", "labels.txt")
MOST_CLASSES = 253  # a mask in memory has 8 bits; 255 is ignored, and 254 no class
NO_CLASS = 254
SAMPLE = 256  # masks that are read before a run if the classes have names
MOST_VALUES = 2**16
ASPECT_TOLERANCE = 0.02


@dataclass(frozen=True)
class MaskCode:
    """The meaning of the values in masks: `table` has the class of every value, `IGNORED`, or `NO_CLASS`."""

    table: Tensor

    @classmethod
    def of(cls, values: Iterable[int]) -> "MaskCode":
        """Return the code of masks in which the n-th value stands for class n."""
        table = torch.full((MOST_VALUES,), NO_CLASS, dtype=torch.uint8)
        table[IGNORED] = IGNORED
        for index, value in enumerate(values):
            table[value] = index
        return cls(table)

    def mapped(self, classes: Sequence[int]) -> "MaskCode":
        """Return the code for renumbered classes, given the new index of each class; -1 ignores a class."""
        new = torch.arange(256, dtype=torch.uint8)
        new[: len(classes)] = torch.tensor([IGNORED if index < 0 else index for index in classes], dtype=torch.uint8)
        return MaskCode(new[self.table.long()])

    def classes(self, values: Tensor, name: str) -> Tensor:
        """Return the classes of the values of a mask, uint8 `[H, W]`.

        Raises:
            ValueError: If a value stands for no class; names the mask.
        """
        classes = self.table[values.long()]
        if (classes == NO_CLASS).any():
            unknown = values[classes == NO_CLASS].unique().tolist()
            raise ValueError(
                f"The mask of {name} has {counted(len(unknown), 'value')} that no class has ({shortened(unknown)}): "
                "name all values in an id2label.json beside the data, or set them to 255 to ignore them."
            )
        return classes


def read_values(stored: dict[str, Any]) -> Tensor:
    """Return the values of a stored mask, `[H, W]` of an integer dtype.

    Raises:
        ValueError: If there is no mask, or it is corrupt, or has colours or fractions instead of class indices.
        OSError: If the file cannot be read.
    """
    values = class_indices(stored_source(stored))
    if values.is_floating_point() or int(values.min()) < 0 or int(values.max()) >= MOST_VALUES:
        raise ValueError(f"Expected class indices from 0 to {MOST_VALUES - 1}, got others: save the mask as PNG.")
    return values


# --------------------------------------------------------------------------------------------- columns and classes


def columns_of_masks(
    images: list[str], image_column: str | None = None, mask_column: str | None = None
) -> tuple[str, str | None]:
    """Return the columns of images and of masks, given all columns that hold images; no mask column if there is none.

    Raises:
        ValueError: If a given column does not exist, or the choice is not clear.
    """
    for given in (image_column, mask_column):
        if given is not None and given not in images:
            raise ValueError(f"Unknown column of images {given!r}: choose one of {', '.join(images)}.")
    usual = [name for name in MASK_COLUMNS if name in images and name != image_column]
    masks = [mask_column] if mask_column else usual
    rest = [image_column] if image_column else [name for name in images if name not in masks]
    if not masks and len(rest) == 2 and image_column is None and "image" in rest:
        masks, rest = [name for name in rest if name != "image"], ["image"]
    if "image" in rest:
        rest = ["image"]
    if len(rest) != 1:
        raise ValueError(f"Cannot infer the column of images: set image_column to one of {', '.join(images)}.")
    return rest[0], masks[0] if masks else None


def names_in_features(features: Any) -> list[str] | None:
    """Return the names of classes that the only column of lists of classes states, if there is one."""
    from datasets import ClassLabel

    lists = [getattr(feature, "feature", None) for feature in features.values()]
    found = [inner.names for inner in lists if isinstance(inner, ClassLabel) and inner.names]
    return found[0] if len(found) == 1 else None


def names_beside(source: Any) -> dict[int, str] | None:
    """Return the names of values in masks that a file in the folder of a source states, if there is one.

    `id2label.json` and its like are a list of names, or map values to names or names to values; text files have a name
    on every line.

    Raises:
        ValueError: If such a file cannot be understood.
    """
    if not isinstance(source, str | Path) or not Path(source).expanduser().exists():
        return None
    path = Path(source).expanduser()
    folder = path if path.is_dir() else path.parent
    file = next((folder / name for name in NAME_FILES if (folder / name).is_file()), None)
    if file is None:
        return None
    text = file.read_text(encoding="utf-8-sig")
    try:
        stated = (
            json.loads(text)
            if file.suffix == ".json"
            else [re.sub(r"^\d+\s*[:\s]\s*", "", line).strip() for line in text.splitlines() if line.strip()]
        )
        if isinstance(stated, list):
            stated = dict(enumerate(stated))
        if all(isinstance(value, int) for value in stated.values()):
            stated = {value: name for name, value in stated.items()}
        names = {int(value): str(name) for value, name in stated.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f'{file} does not name classes ({error}): expected {{"0": "background", "1": "cat"}}, or a name per line.'
        ) from None
    return {value: name for value, name in sorted(names.items()) if value != IGNORED}


def code_of_masks(
    splits: Sequence[Any], columns: tuple[str, str], stated: dict[int, str] | None
) -> tuple[MaskCode, list[str], list[str]]:
    """Return what the values of masks mean, the names of the classes, and notes for the user.

    Args:
        splits: Data sets of stored images and masks. All of their masks are read if no classes are stated, else some.
        columns: Names of the columns of images and masks.
        stated: Names of values.

    Raises:
        ValueError: If masks cannot be understood.
    """
    seen = _values_in(splits, columns, None if stated is None else SAMPLE)
    known = [value for value in seen if value != IGNORED]
    if stated is not None:
        return _named(stated, known)
    if seen and set(seen) == {0, IGNORED}:
        note = "The masks have the values 0 and 255, which are read as background and foreground."
        table = MaskCode.of([0, IGNORED])
        return table, ["background", "foreground"], [note]
    if len(known) < 2:
        raise ValueError(f"Expected masks with at least two classes, found the values {seen}.")
    if known[-1] > 2 * len(known) + 4:
        raise ValueError(
            f"Expected masks with class indices from 0, found {counted(len(known), 'value')} up to {known[-1]} "
            f"({shortened(known)}): name the values in an id2label.json beside the data, such as "
            f'{{"{known[0]}": "background", "{known[1]}": "cat"}}. JPEG files do not keep exact values: save masks as '
            "PNG."
        )
    _check_number(known[-1] + 1)
    return MaskCode.of(range(known[-1] + 1)), [str(value) for value in range(known[-1] + 1)], []


def _named(stated: dict[int, str], known: list[int]) -> tuple[MaskCode, list[str], list[str]]:
    names, number = list(stated.values()), len(stated)
    _check_number(number)
    code = MaskCode.of(stated)
    if list(stated) == list(range(number)) and known and known[-1] == number:
        note = (
            f"The masks have values up to {number} for {number} classes: 0 is ignored, and 1 is {names[0]}, as in "
            "ADE20K (do_reduce_labels)."
        )
        return MaskCode.of([0, *range(1, number + 1)]).mapped([-1, *range(number)]), names, [note]
    unknown = [value for value in known if code.table[value] == NO_CLASS]
    if unknown:
        raise ValueError(
            f"The masks have {counted(len(unknown), 'value')} without a name ({shortened(unknown)}), and "
            f"{counted(number, 'class', 'classes')} {'is' if number == 1 else 'are'} named ({shortened(names)}): name "
            "them in an id2label.json beside the data, or set them to 255 to ignore them."
        )
    return code, names, []


def _check_number(number: int) -> None:
    if not 2 <= number <= MOST_CLASSES:
        raise ValueError(
            f"Expected 2 to {MOST_CLASSES} classes in masks, found {number}. JPEG files do not keep exact values: "
            "save masks as PNG."
        )


def _values_in(splits: Sequence[Any], columns: tuple[str, str], sample: int | None) -> list[int]:
    """Return the values of some or all masks, in order; unreadable masks are skipped.

    Raises:
        ValueError: If a mask has another aspect ratio than its image, or colours.
    """
    seen = torch.zeros(MOST_VALUES, dtype=torch.bool)

    def look(split: Any, index: int) -> tuple[Tensor | None, Exception | None]:
        row = split[index]
        stored = row[columns[1]] or NO_IMAGE
        try:
            values = read_values(stored)
        except (ValueError, OSError) as error:
            return None, error if "class indices" in str(error) else None
        return values.unique(), _mismatch(row[columns[0]] or NO_IMAGE, values.shape)

    with ThreadPoolExecutor(cores()) as threads:
        for split in splits:
            step = max(1, len(split) // sample) if sample else 1
            for values, problem in threads.map(partial(look, split), range(0, len(split), step)):
                if problem is not None:
                    raise problem
                if values is not None:
                    seen[values.long()] = True
    return seen.nonzero().squeeze(1).tolist()


def _mismatch(image: dict[str, Any], size: Sequence[int]) -> ValueError | None:
    """Return an error if a mask has another aspect ratio than its image, whose header alone is read."""
    if (found := upright_size(image)) is None:
        return None
    height, width, _ = found
    if abs(height * size[1] - width * size[0]) <= ASPECT_TOLERANCE * height * size[1] + max(height, width):
        return None
    return ValueError(
        f"Expected masks of the sizes of their images, got a mask of {size[0]}x{size[1]} for {name_of(image) or 'an'} "
        f"{'image' * (not name_of(image))} of {height}x{width} pixels (height x width)."
    )


# ----------------------------------------------------------------------------------------------------------- reading


def palette(number: int) -> np.ndarray:
    """Return a colour for every class, uint8 `[number, 3]`, the same for any number of classes.

    Hues are multiples of the golden ratio, so that the first n are far apart for every n; brightness alternates.
    """
    strengths = ((0.85, 0.95), (0.5, 0.8), (0.9, 0.55))  # saturation and value
    colors = [hsv_to_rgb(index * 0.618 % 1, *strengths[index % 3]) for index in range(number)]
    return (255 * np.array(colors)).round().astype(np.uint8)


def refuse_cropping(processor: Any, labels: str) -> None:
    """Raise `ValueError` if an image processor crops images, but not their labels."""
    if processor.crop_pct is not None or processor.do_center_crop:
        raise ValueError(
            f"The image processor crops images, but not their {labels}: set crop_pct=None and do_center_crop=False in "
            "preprocessor_config.json."
        )


NO_MASK = torch.full((1, 1), IGNORED, dtype=torch.uint8)  # a mask of ignored pixels


def _resized(classes: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a mask `[H, W]` to `[1, *size]`."""
    return torch.nn.functional.interpolate(classes[None, None], size=tuple(size), mode="nearest-exact")[0]


class WithMasks:
    """Images of which the last channel is the mask, until `example` divides them; mixed into `EvaluationImages`.

    Args:
        split, columns: As for `EvaluationImages`; the second column is that of the masks.
        code: What the values of the masks mean.
        options: Other arguments of `EvaluationImages`.
    """

    def __init__(self, split: Any, columns: tuple[str, str], *options: Any, code: MaskCode, **named: Any) -> None:
        self.mask_column, self.code = columns[1], code
        refuse_cropping(options[0], "masks")
        parent: Any = super()
        parent.__init__(split, (columns[0], None), *options, **named)

    def _read(self, visit: Any) -> Tensor | None:
        parent: Any = super()
        pixels, classes = parent._read(visit), self._classes(visit)
        # A mask that cannot be read is named and counted as its image is, and too many of them end the run.
        return None if pixels is None or classes is None else self._joined(pixels, classes)

    def _classes(self, visit: Any) -> Tensor | None:
        """Return the class indices of a mask at its own size, or `None` if it cannot be read."""
        images: Any = self
        try:
            values = read_values(images.split[visit.index][self.mask_column] or NO_IMAGE)
        except (ValueError, OSError):
            return None
        return self.code.classes(values, images._name(visit))

    def gray(self) -> Tensor:
        """Return an image without content, which replaces one that cannot be read."""
        parent: Any = super()
        return self._joined(parent.gray(), NO_MASK)

    def _joined(self, pixels: Tensor, classes: Tensor) -> Tensor:
        return torch.cat([pixels, _resized(classes, pixels.shape[-2:])])

    def example(self, pixels: Tensor, visit: Any) -> dict[str, Any]:
        """Return the image and its mask, uint8 `[H, W]`, as `pixel_values` and `labels`."""
        return {"pixel_values": pixels[:-1], "labels": pixels[-1].byte()}


class MaskedEvaluationImages(WithMasks, EvaluationImages):
    """Images with masks, as the processor makes them."""

    def label(self, index: int) -> Tensor:
        """Return a mask, uint8 `[H, W]`, without decoding its image; an unreadable one has no labeled pixel."""
        classes = self._classes(Visit(0, index))
        return _resized(NO_MASK if classes is None else classes, self.size)[0].byte()

    @cached_property
    def size(self) -> Sequence[int]:
        """(height, width) of all images in pixels."""
        return self.gray().shape[-2:]


class MaskedTrainingImages(WithMasks, TrainingImages):
    """Augmented images with masks."""
