"""Match the labels of a data set with the labels of a model."""

from collections import Counter
from typing import Any

from ..checkpoints.checkpoint import CLASSIFIER, Checkpoint
from ..system.texts import shortened


def match_labels(of_model: list[str] | None, of_data: list[str]) -> tuple[list[int] | None, str]:
    """Return the model's class for each class of the data, and a sentence where that is not plain.

    By name. By position only where one side has but numbers for names, and as many of them.

    Args:
        of_model: Names of classes in the model's order; `None` for a model without a head.
    """
    if of_model is None:
        return None, "The model has no head that tells classes apart."
    if of_model == of_data:
        return list(range(len(of_data))), ""
    number = Counter(of_model)  # two of ImageNet's classes are called crane
    pairs = list(zip(of_model, of_data, strict=False))
    if len(of_model) == len(of_data) and all(ours == theirs or number[ours] > 1 for ours, theirs in pairs):
        return list(range(len(of_data))), "Classes of the model that share a name are taken by position."
    place = {name: index for index, name in enumerate(of_model) if number[name] == 1}
    if all(name in place for name in of_data):
        sentence = "Classes are matched by name; their order differs."
        if len(of_model) > len(of_data):
            sentence = f"The data has {len(of_data)} of the {len(of_model)} classes that the model chooses from."
        return [place[name] for name in of_data], sentence
    if len(of_model) == len(of_data) and (_are_numbers(of_model) or _are_numbers(of_data)):
        side = "model" if _are_numbers(of_model) else "data"
        return list(range(len(of_data))), (
            f"The {side}'s classes have no names, so they are taken by position: {of_model[0]} is {of_data[0]}, ..., "
            f"{of_model[-1]} is {of_data[-1]}."
        )
    strangers = [name for name in of_data if name not in place]
    return None, (
        f"The model does not know {len(strangers)} of the data's {len(of_data)} classes ({shortened(strangers)}); it "
        f"tells {len(of_model)} apart ({shortened(of_model)}). Name the data's classes as the model does, or choose "
        f"the --label-column that it was trained for."
    )


def _are_numbers(names: list[str]) -> bool:
    return all(name in (str(index), f"LABEL_{index}") for index, name in enumerate(names))


def _classes_of(checkpoint: Checkpoint) -> list[str] | None:
    """Return the names of the classes that a checkpoint tells apart, `None` without a classifier."""
    config: Any = checkpoint.config
    if checkpoint.architecture != CLASSIFIER or not config.num_labels:
        return None
    return [config.id2label[index] for index in range(config.num_labels)]
