"""Match the classes of a data set with the classes of a model."""

from collections import Counter
from typing import Any

from ..checkpoints.checkpoint import CLASSIFIER, Checkpoint
from ..data.labelled import ImageData
from ..system.texts import shortened

SINGLE_LABEL = "single_label_classification"
# By transformers' name of what the labels are.
KINDS = {
    SINGLE_LABEL: "one label per image",
    "multi_label_classification": "several labels per image",
    "regression": "numbers to predict",
}
UNKNOWN = -100.0


def labels_of(checkpoint: Checkpoint) -> list[str] | None:
    """Return the label names of a checkpoint by class index; `None` without a classifier."""
    config: Any = checkpoint.config
    if checkpoint.architecture != CLASSIFIER or not config.num_labels:
        return None
    return [config.id2label[index] for index in range(config.num_labels)]


def match_labels(of_model: list[str] | None, of_data: list[str]) -> tuple[list[int] | None, str]:
    """Return the model's class index for each class of the data, and a note unless both have the same classes.

    Classes are matched by name, or by position if one side has only numbers for names, and both have as many.

    Args:
        of_model: Label names of the model; `None` without a classifier.

    Returns:
        The indices, or `None` if the classes do not match; the note then says why.
    """
    if of_model is None:
        return None, "The model has no classifier."
    if of_model == of_data:
        return list(range(len(of_data))), ""
    number = Counter(of_model)  # two classes of ImageNet are named crane
    pairs = list(zip(of_model, of_data, strict=False))
    if len(of_model) == len(of_data) and all(ours == theirs or number[ours] > 1 for ours, theirs in pairs):
        return list(range(len(of_data))), "Classes of the model that share a name are matched by position."
    index = {name: index for index, name in enumerate(of_model) if number[name] == 1}
    if all(name in index for name in of_data):
        note = "Classes are matched by name; their order differs."
        if len(of_model) > len(of_data):
            note = f"The data has {len(of_data)} of the {len(of_model)} classes of the model."
        return [index[name] for name in of_data], note
    if len(of_model) == len(of_data) and (_are_numbers(of_model) or _are_numbers(of_data)):
        side = "model" if _are_numbers(of_model) else "data"
        return list(range(len(of_data))), (
            f"The classes of the {side} have no names, so they are matched by position: {of_model[0]} is "
            f"{of_data[0]}, ..., {of_model[-1]} is {of_data[-1]}."
        )
    unknown = [name for name in of_data if name not in index]
    return None, (
        f"The model lacks {len(unknown)} of the data's {len(of_data)} classes ({shortened(unknown)}); it has "
        f"{len(of_model)} classes ({shortened(of_model)}). Rename the classes of the data, or choose the "
        "--label-column that the model was trained on."
    )


def _are_numbers(names: list[str]) -> bool:
    return all(name in (str(index), f"LABEL_{index}") for index, name in enumerate(names))


def contradiction(config: Any, data: ImageData) -> str:
    """Return a sentence if model and data do not agree in what their labels are, else `""`."""
    ours, theirs = config.problem_type or SINGLE_LABEL, data.problem_type
    if theirs is not None and ours != theirs:
        return (
            f"The model has {KINDS[ours]}, but the data has {KINDS[theirs]}: choose another --label-column, or "
            "another model."
        )
    if ours == "regression" and len(data.label_names) < config.num_labels:
        return f"The model predicts {config.num_labels} targets, but the data has {len(data.label_names)} of them."
    return ""


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
            row[index] = value
        rows.append(row)
    return rows
