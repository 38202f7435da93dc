"""What `heads.yaml` states: for each head its task, its data, and options of its training."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...system.texts import nearest
from ..recipe import TrainConfig

# Fields of a recipe that a head has for itself, and values that differ from those of a recipe.
OF_DATA = (
    *("data", "train_split", "eval_split", "image_column", "label_column", "label_separator", "box_format"),
    *("eval_fraction", "split_seed", "train_share"),
)
OF_TRAINING = {"max_steps": 1000, "learning_rate": 1e-3, "batch_size": 32}
OF_PIXELS = ("patch_subdivision",)
OF_ANOMALY = ("normal", "memory_size", "num_neighbors")
# Further fields of a head, by task.
TASKS: dict[str, tuple[str, ...]] = {
    "classification": (),
    "multi_label": (),
    "regression": (),
    "segmentation": (*OF_TRAINING, *OF_PIXELS),
    "detection": (*OF_TRAINING, *OF_PIXELS),
    "anomaly": OF_ANOMALY,
}
EXAMPLE = "species: {task: classification, data: photos/}"


@dataclass(frozen=True)
class HeadPlan:
    """One head of a file.

    Attributes:
        name, task: Name and task of the head.
        recipe: Fields of a recipe: its data, and of a head for pixels or objects its training.
        own: Other fields: of the head in the config, and `normal`, the class of normal images.
    """

    name: str
    task: str
    recipe: TrainConfig
    own: dict[str, Any] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        """Whether the head reads patches."""
        return self.task in ("segmentation", "detection", "anomaly")

    @property
    def stated(self) -> dict[str, Any]:
        """Everything that decides the head, as plain values."""
        names = (*OF_DATA, *(OF_TRAINING if self.task in ("segmentation", "detection") else ()))
        return {"task": self.task, **{name: getattr(self.recipe, name) for name in names}, **self.own}


def read_plans(file: str | Path, data: str | list[str] | None = None) -> list[HeadPlan]:
    """Read the heads of a YAML file.

    Args:
        file: Maps names of heads to their fields.
        data: Data of heads that state none.

    Raises:
        ValueError: If the file is not such a mapping, or a field is unknown or does not fit.
    """
    expected = f"{file} does not describe heads: expected a line for each, such as `{EXAMPLE}`"
    try:
        stated = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"; line {mark.line + 1} is no YAML"
        raise ValueError(f"{file} cannot be read." if isinstance(error, OSError) else f"{expected}{where}.") from None
    if not isinstance(stated, dict) or not stated or not all(isinstance(head, dict) for head in stated.values()):
        raise ValueError(f"{expected}.")
    return [_plan(str(file), str(name), head, data) for name, head in stated.items()]


def _plan(file: str, name: str, head: dict[str, Any], data: str | list[str] | None) -> HeadPlan:
    where = f"{file}: the head {name!r}"
    if head.get("task") not in TASKS:
        raise ValueError(f"{where} needs a task, one of {', '.join(TASKS)}; got {head.get('task')!r}.")
    task = head["task"]
    known = ("task", *OF_DATA, *TASKS[task])
    for word in head:
        if word not in known:
            meant = nearest(str(word), known)
            remedy = f"did you mean {meant}?" if meant else f"the fields are {', '.join(known)}."
            raise ValueError(f"{where} has the unknown field {word!r}: {remedy}")
    fields = {word: value for word, value in head.items() if word in (*OF_DATA, *OF_TRAINING)}
    own = {word: value for word, value in head.items() if word in (*OF_PIXELS, *OF_ANOMALY)}
    if data is not None:
        fields.setdefault("data", data)
    if not fields.get("data"):
        raise ValueError(f"{where} needs data, such as a folder of images: add data: photos/.")
    try:
        objective = {} if task == "anomaly" else {"task": task}
        return HeadPlan(name, task, TrainConfig(**{**OF_TRAINING, **objective, **fields}), own)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
