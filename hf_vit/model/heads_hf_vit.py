"""Heads of a multi-task model in its config: a task, its labels and its options for each head name.

`HFViTConfig.task_heads` maps names to dictionaries such as
`{"task": "classification", "id2label": {0: "cat", 1: "dog"}}`.
`configuration_hf_vit` imports this file, so the functions below receive the config as an argument.
"""

from typing import Any

from .labels_hf_vit import LABELS, label_pair, names_by_number
from .validation_hf_vit import OF_CERTAINTY, OF_HEAD

OF_IMAGES = ("id2label", "pooling", "representation_size")
OF_PIXELS = ("id2label", "out_indices", "patch_subdivision", "decoder_kernel_size", "semantic_loss_ignore_index")
# By task: the fields of `HFViTConfig` that a head can set for itself, and its `problem_type` in transformers.
TASKS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "classification": ((*OF_IMAGES, "temperature", *OF_CERTAINTY), "single_label_classification"),
    "multi_label": ((*OF_IMAGES, "temperature", "thresholds"), "multi_label_classification"),
    "regression": ((*OF_IMAGES, "target_mean", "target_scale"), "regression"),
    "segmentation": (OF_PIXELS, None),
    "detection": (("id2label", "patch_subdivision", "thresholds"), None),
    "anomaly": (("out_indices",), None),
}
# Further fields of an anomaly head, with their defaults and minimums: the number of normal patches in its memory, the
# number of nearest patches whose distances are averaged, and the score above which an image is an anomaly.
OF_ANOMALY: dict[str, tuple[Any, float]] = {
    "memory_size": (1024, 1),
    "num_neighbors": (1, 1),
    "threshold": (None, 0.0),
}
# Other entries of the output, and methods of a dictionary, which a head of the same name would hide.
TAKEN = {*dir(dict), "loss", "hidden_states", "attentions", "to_tuple", "move_to_end", "popitem"}


def checked_heads(config: Any) -> dict[str, dict[str, Any]] | None:
    """Return `config.task_heads` with integers as class indices and defaults filled in.

    Raises:
        ValueError: For a name that cannot be an attribute, an unknown task or field, and invalid values.
    """
    if config.task_heads is None:
        return None
    # Sorted like config.json, so that saving a model does not change the order of its outputs.
    return {name: _checked_head(config, name, head) for name, head in sorted(config.task_heads.items())}


def _checked_head(config: Any, name: str, head: dict[str, Any]) -> dict[str, Any]:
    where = f"heads[{name!r}]"
    if not name.isidentifier() or name.startswith("_") or name in TAKEN:
        raise ValueError(f"A head needs a name like a variable, such as 'species', got {name!r}: choose another one.")
    task = head.get("task")
    if task not in TASKS:
        raise ValueError(f"{where} must have a task, one of {', '.join(TASKS)}, got {task!r}.")
    fields = TASKS[task][0]
    known = ("task", *fields, *(OF_ANOMALY if task == "anomaly" else ()))
    if unknown := [field for field in head if field not in known]:
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}: choose among {', '.join(known)}.")
    if "id2label" in fields and not head.get("id2label"):
        raise ValueError(f"{where} needs id2label, the names of its classes or targets.")
    checked = dict(head)
    if "id2label" in fields:
        checked["id2label"] = label_pair(names_by_number(head["id2label"]), None)[0]
    if task == "segmentation" and len(checked["id2label"]) < 2:
        raise ValueError(f"{where} needs at least two classes: count the background as a class.")
    if task == "anomaly":
        for field, (default, least) in OF_ANOMALY.items():
            value = checked.setdefault(field, default)
            is_number = type(value) in (int, type(default)) or (default is None and type(value) in (float, type(None)))
            if not is_number or (value is not None and value < least):
                raise ValueError(f"{field} of {where} must be a number of at least {least:g}, got {value!r}.")
        if checked["num_neighbors"] > checked["memory_size"]:
            raise ValueError(f"num_neighbors of {where} must be at most its memory_size, {checked['memory_size']}.")
    try:
        config_of_head(config, checked)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return checked


def config_of_head(config: Any, head: dict[str, Any]) -> Any:
    """Return the config of the single-task model that has the encoder of `config` and one of its heads."""
    fields, problem_type = TASKS[head["task"]]
    own = {field: head[field] for field in fields if field in head}
    left_out = {*LABELS, *OF_HEAD, "num_labels", "problem_type", "task_heads", "architectures", "auto_map", *fields}
    left_out |= {"out_features", "out_indices", "feature_strides"}
    shared = {field: value for field, value in config.to_dict().items() if field not in left_out}
    inherited = {field: getattr(config, field) for field in ("pooling", "representation_size") if field in fields}
    of_head = type(config).from_dict({**shared, **inherited, **own, "problem_type": problem_type})
    of_head.name_or_path, of_head._attn_implementation = config.name_or_path, config._attn_implementation
    return of_head
