"""Labels that are more than a value for each image: masks and boxes. How they are opened, found, united and read."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from .box_folders import open_boxes
from .boxes import BoxedEvaluationImages, BoxedTrainingImages
from .classes import DETECTION, SEGMENTATION, Labels, Part
from .images import EvaluationImages, TrainingImages
from .mask_folders import open_masks
from .masks import (
    MaskedEvaluationImages,
    MaskedTrainingImages,
    code_of_masks,
    columns_of_masks,
    names_in_features,
)
from .objects import columns_of_objects, united_objects
from .opening import Opened, image_columns


class DenseLabels(NamedTuple):
    """What is done with labels of one kind.

    Attributes:
        name: Of the labels, in errors.
        missing: What to expect where there are none, given the column of images.
        open: Opens a source, as `open_source`.
        columns: Returns the column of images and those of labels, none if there are none, for features, a column of
            images and columns of labels, if these are given.
        unite: Returns splits of two columns, and what their labels are, for parts, names of classes by index if a
            file states them, and the format of boxes.
    """

    name: str
    missing: str
    open: Callable[[Any, bool, str | None, list[str]], Opened]
    columns: Callable[[Any, str | None, Sequence[str]], tuple[str, list[str]]]
    unite: Callable[[list[Part], dict[int, str] | None, str | None], tuple[list[Any], Labels]]


def _columns_of_masks(features: Any, image_column: str | None, given: Sequence[str]) -> tuple[str, list[str]]:
    image, mask = columns_of_masks(image_columns(features), image_column, *given[:1])
    return image, [] if mask is None else [mask]


def _united_masks(parts: list[Part], names: dict[int, str] | None, box_format: str | None) -> tuple[list[Any], Labels]:
    """Return the parts with stored images and masks in the same two columns, and what the masks mean."""
    from datasets import Image

    if names is None and (stated := names_in_features(parts[0].split.features)) is not None:
        names = dict(enumerate(stated))
    columns = parts[0].image_column, parts[0].label_columns[0]
    splits = []
    for part in parts:
        split = part.split.select_columns([part.image_column, *part.label_columns])
        for old, new in zip((part.image_column, *part.label_columns), columns, strict=True):
            split = split if old == new else split.rename_column(old, new)
            split = split.cast_column(new, Image(decode=False))
        splits.append(split)
    code, label_names, notes = code_of_masks(splits, columns, names)
    return splits, Labels(SEGMENTATION, label_names, columns[1], notes, code)


DENSE_LABELS: dict[str | None, DenseLabels] = {
    SEGMENTATION: DenseLabels(
        "masks",
        "a second column of images, such as mask, next to {image}, or folders images and masks",
        open_masks,
        _columns_of_masks,
        _united_masks,
    ),
    DETECTION: DenseLabels(
        "boxes",
        "a column objects with bbox and category next to {image}, or files of COCO, Pascal VOC or YOLO",
        open_boxes,
        columns_of_objects,
        united_objects,
    ),
}


def kinds_of_images(data: Any) -> tuple[Any, Any]:
    """Return the classes of training and evaluation images for an `ImageData`."""
    if data.problem_type == DETECTION:
        return BoxedTrainingImages, BoxedEvaluationImages
    if data.masks is None:
        return TrainingImages, EvaluationImages
    return partial(MaskedTrainingImages, code=data.masks), partial(MaskedEvaluationImages, code=data.masks)


def stop_cropping(processor: Any) -> None:
    """Let an image processor resize complete images to the size of its output, so that every pixel has its label."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    processor.do_center_crop = processor.crop_pct = None
    processor.set_output_size((size["height"], size["width"]))
