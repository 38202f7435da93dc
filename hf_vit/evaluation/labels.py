"""Match the classes of a data set with the classes of a model."""

from collections import Counter
from dataclasses import replace
from typing import Any

from ..checkpoints.checkpoint import CLASSIFIER, DETECTOR, SEGMENTER, Checkpoint
from ..data.classes import DETECTION, MULTI, REGRESSION, SEGMENTATION, SINGLE, UNKNOWN
from ..data.dense import kinds_of_images
from ..data.folders import key_of
from ..data.images import EvaluationImages
from ..data.labelled import ImageData
from ..system.texts import counted, shortened

# By transformers' name of what the labels are.
KINDS = {
    SINGLE: "one label per image",
    MULTI: "several labels per image",
    REGRESSION: "numbers to predict",
    SEGMENTATION: "a class for every pixel",
    DETECTION: "boxes of objects",
}
OF_ARCHITECTURE = {SEGMENTER: SEGMENTATION, DETECTOR: DETECTION}


def kind_of(config: Any) -> str:
    """Return what the labels of a model are, a key of `KINDS`."""
    dense = [kind for name, kind in OF_ARCHITECTURE.items() if name in (config.architectures or ())]
    return dense[0] if dense else config.problem_type or SINGLE


def labels_of(checkpoint: Checkpoint) -> list[str] | None:
    """Return the label names of a checkpoint by class index; `None` without a classifier."""
    config: Any = checkpoint.config
    if checkpoint.architecture not in (CLASSIFIER, *OF_ARCHITECTURE) or not config.num_labels:
        return None
    return [config.id2label[index] for index in range(config.num_labels)]


def align(
    data: ImageData, of_model: list[str] | None, needs_all: bool = False
) -> tuple[ImageData, list[int] | None, str]:
    """Return data whose evaluation images have classes of the model, the model's index of each class, and a note.

    Images of classes that the model lacks are left out and counted in the note.

    Args:
        of_model: Label names of the model; `None` without a classifier.
        needs_all: Whether all images are needed; then the indices are `None` if the model lacks some classes.
    """
    matched, note = match_labels(of_model, data.label_names)
    column = data.columns[1]
    if matched is None or column is None:
        return data, None, note
    classes = [-1 if index is None else index for index in matched]
    unknown = [name for name, index in zip(data.label_names, matched, strict=True) if index is None]
    if not unknown or data.problem_type != SINGLE:
        return data, classes, note
    if needs_all:
        return data, None, note
    labels = data.evaluation[column][:]
    rows = [row for row, label in enumerate(labels) if label < 0 or classes[label] >= 0]
    if not rows:
        return data, None, f"{note} No image is of a class that the model knows."
    left_out = f"Left out: {len(labels) - len(rows):,} of {len(labels):,} images, which are of these classes."
    return replace(data, evaluation=data.evaluation.select(rows)), classes, f"{note} {left_out}"


def images_for_model(
    data: ImageData, split: Any, processor: Any, classes: list[int] | None, num_labels: int
) -> EvaluationImages:
    """Return the images of a split with labels as the model numbers them, or as the data does without `classes`."""
    if data.masks is not None and classes is not None:
        data = replace(data, masks=data.masks.mapped(classes))
    images: Any = kinds_of_images(data)[1](split, data.columns, processor)
    if data.problem_type == DETECTION and classes is not None:
        images.labels = objects_for_model(images.labels, classes)
    elif data.masks is None and classes is not None:
        images.labels = labels_for_model(images.labels, classes, num_labels)
    return images


def objects_for_model(labels: list[list[list[float]]], classes: list[int]) -> list[list[list[float]]]:
    """Return the objects of images with the model's class indices, without objects of classes it does not know."""

    def class_of(code: float) -> int:
        index = classes[int(code if code >= 0 else -2 - code)]
        return -1 if index < 0 else index if code >= 0 else -2 - index

    mapped = ([[class_of(code), *box] for code, *box in objects] for objects in labels)
    return [[each for each in objects if each[0] != -1] for objects in mapped]


def labels_for_model(labels: list[Any], classes: list[int], num_labels: int) -> list[Any]:
    """Return labels of the data as the model numbers them.

    With several per image, a label that the data lacks is unknown, -100.
    """
    if not labels or not isinstance(labels[0], list):
        return [classes[label] for label in labels]
    rows = []
    for label in labels:
        row = [UNKNOWN] * num_labels
        for index, value in zip(classes, label, strict=True):
            if index >= 0:
                row[index] = value
        rows.append(row)
    return rows


def match_labels(of_model: list[str] | None, of_data: list[str]) -> tuple[list[int | None] | None, str]:
    """Return the model's class index for each class of the data, and a note unless both have the same classes.

    Classes are matched by name, if need be without regard to case and Unicode form. If one side has only numbers for
    names, they are matched by number, or by position if both have as many.

    Args:
        of_model: Label names of the model; `None` without a classifier.

    Returns:
        The indices, `None` for a class that the model lacks; or `None` if no class matches. The note says why.
    """
    if of_model is None:
        return None, "The model has no classifier."
    if of_model == of_data:
        return list(range(len(of_data))), ""
    number = Counter(of_model)  # two classes of ImageNet are named crane
    pairs = list(zip(of_model, of_data, strict=False))
    if len(of_model) == len(of_data) and all(ours == theirs or number[ours] > 1 for ours, theirs in pairs):
        return list(range(len(of_data))), "Classes of the model that share a name are matched by position."
    found = [_index_of(name, of_model) for name in of_data]
    if None not in found:
        note = "Classes are matched by name; their order differs."
        if len(of_model) > len(of_data):
            note = f"The data has {len(of_data)} of the {len(of_model)} classes of the model."
        others = [
            f"{name!r} is {of_model[index]!r}"
            for name, index in zip(of_data, found, strict=True)
            if index is not None and of_model[index] != name
        ]
        return found, f"{note} Without regard to case, {shortened(others)}." if others else note
    by_number = _by_number(of_model, of_data)
    if by_number is not None:
        return list(by_number), (
            f"Classes are matched by number: {of_data[0]} is {of_model[by_number[0]]}, ..., {of_data[-1]} is "
            f"{of_model[by_number[-1]]}."
        )
    if len(of_model) == len(of_data) and (_are_numbers(of_model) or _are_numbers(of_data)):
        side = "model" if _are_numbers(of_model) else "data"
        return list(range(len(of_data))), (
            f"The classes of the {side} have no names, so they are matched by position: {of_model[0]} is "
            f"{of_data[0]}, ..., {of_model[-1]} is {of_data[-1]}."
        )
    unknown = [name for name, index in zip(of_data, found, strict=True) if index is None]
    note = f"The model lacks {len(unknown)} of the data's {len(of_data)} classes ({shortened(unknown)})"
    is_ambiguous = any(number[name] > 1 for name in unknown)
    if len(unknown) < len(of_data) and not is_ambiguous:
        return found, f"{note}."
    return None, (
        f"{note}; it has {counted(len(of_model), 'class', 'classes')} ({shortened(of_model)}). Rename the classes of "
        "the data, or choose the --label-column that the model was trained on."
    )


def _index_of(name: str, of_model: list[str]) -> int | None:
    """Return the only class of a name, or else the only one that differs in case or Unicode form alone."""
    for same in (lambda other: other == name, lambda other: key_of(other) == key_of(name)):
        if found := [index for index, other in enumerate(of_model) if same(other)]:
            return found[0] if len(found) == 1 else None
    return None


def _by_number(of_model: list[str], of_data: list[str]) -> list[int] | None:
    """Return the indices if the names of the data are the numbers of the model's classes."""
    if not all(name.isdecimal() and name == str(int(name)) for name in of_data):
        return None
    numbers = [int(name) for name in of_data]
    is_whole = sorted(numbers) == list(range(len(of_model)))
    is_unnamed = of_model == [f"LABEL_{index}" for index in range(len(of_model))]
    return numbers if is_whole or (is_unnamed and max(numbers) < len(of_model)) else None


def _are_numbers(names: list[str]) -> bool:
    return all(name in (str(index), f"LABEL_{index}") for index, name in enumerate(names))


def contradiction(config: Any, data: ImageData) -> str:
    """Return a sentence if model and data do not agree in what their labels are, else `""`."""
    ours, theirs = kind_of(config), data.problem_type
    if theirs is not None and ours != theirs:
        return (
            f"The model has {KINDS[ours]}, but the data has {KINDS[theirs]}: choose another --label-column, or "
            "another model."
        )
    if ours == REGRESSION and len(data.label_names) < config.num_labels:
        return f"The model predicts {config.num_labels} targets, but the data has {len(data.label_names)} of them."
    return ""
