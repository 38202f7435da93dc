"""Names of the classes in a config: `id2label` and `label2id`, always complete, consistent and ordered by number.

Users and files state them with numbers as text, in any order, and often only one of the two.
"""

from typing import Any, TypeVar

from .validation_hf_vit import OF_HEAD

LABELS = ("id2label", "label2id")
C = TypeVar("C", bound=type)


def plain(value: Any) -> Any:
    """Return NumPy numbers and arrays as plain Python numbers and lists, also inside lists and tuples."""
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value.tolist() if hasattr(value, "tolist") else value


def names_by_number(id2label: Any) -> Any:
    """Return `id2label` with integers as keys, in their order, and text as names.

    Raises:
        ValueError: For a list, a key that is not a number, and two keys that are the same number.
    """
    if isinstance(id2label, (list, tuple)):
        raise ValueError("id2label must map class indices to names, got a list: pass dict(enumerate(names)).")
    if not isinstance(id2label, dict):
        return id2label  # the config rejects its type
    names = {_number("id2label", number): str(name) for number, name in id2label.items()}
    if len(names) < len(id2label):
        raise ValueError(f"id2label has two names for a class, got {id2label}: name every class once.")
    return dict(sorted(names.items()))


def numbers_by_name(label2id: Any) -> Any:
    """Return `label2id` with text as keys and integers as values, ordered by number."""
    if not isinstance(label2id, dict):
        return label2id
    numbers = {str(name): _number("label2id", number) for name, number in label2id.items()}
    return dict(sorted(numbers.items(), key=lambda item: item[1]))


def _number(field: str, number: Any) -> int:
    try:
        return int(plain(number))
    except (TypeError, ValueError):
        expected = "class indices to names" if field == "id2label" else "names to class indices"
        raise ValueError(f"{field} must map {expected}, got the index {number!r}: is it the other field?") from None


def label_pair(id2label: Any, label2id: Any) -> tuple[dict, dict]:
    """Return `id2label` and `label2id`, both complete, from both or one of them.

    Raises:
        ValueError: If the numbers are not 0, 1, 2, ..., or the two contradict each other.
    """
    given = label2id or {}
    if id2label is None:
        id2label = dict(sorted((number, name) for name, number in given.items()))
        if len(id2label) < len(given):
            raise ValueError(f"label2id must give every name a different number, got {given}.")
    if list(id2label) != list(range(len(id2label))):
        found = ", ".join(map(str, list(id2label)[:5]))
        raise ValueError(
            f"id2label must name the classes 0 to {len(id2label) - 1}, got {found}{', ...' * (len(id2label) > 5)}: "
            "number them from 0, as in dict(enumerate(names))."
        )
    for name, number in given.items():
        if id2label.get(number) != name:
            raise ValueError(
                f"label2id and id2label contradict each other: {name!r} is {number} in label2id, but class {number} "
                f"is {id2label.get(number)!r} in id2label. Pass only id2label."
            )
    return id2label, {name: number for number, name in id2label.items()} | given


def merge_labels(stored: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a stored config without the label fields that `given` replaces.

    `given` contains label names or a number of labels. If that number changes, the fields that describe the trained
    head are also left out. A stored `label2id` that contradicts the stored `id2label`, as written by other software,
    is left out.
    """
    names = names_by_number(stored.get("id2label"))
    changed = given.get("id2label", given.get("label2id"))
    number = given.get("num_labels") if changed is None else len(changed)
    old = len(names or stored.get("label2id") or ())
    left_out: set[str] = set()
    if changed is not None or number not in (None, old):
        left_out.update(LABELS, ["num_labels"])
    elif names is not None and not _agree(names, stored.get("label2id") or {}):
        left_out.add("label2id")
    if number not in (None, old):
        left_out.update(OF_HEAD)
    return {name: value for name, value in stored.items() if name not in left_out}


def _agree(id2label: dict[int, str], label2id: Any) -> bool:
    try:
        return all(id2label.get(number) == name for name, number in numbers_by_name(label2id).items())
    except ValueError:
        return False


def normalizes_values(config_class: C) -> C:
    """Decorate a strict config class, so that assigned NumPy numbers and label names are converted before type checks.

    An assignment of `id2label` or `label2id` to a finished config updates the other one.
    """
    assign: Any = config_class.__setattr__

    def __setattr__(self: Any, name: str, value: Any) -> None:
        value = plain(value)
        if name not in LABELS:
            return assign(self, name, value)
        value = names_by_number(value) if name == "id2label" else numbers_by_name(value)
        if not isinstance(value, dict) or "auto_map" not in vars(self):  # `auto_map` is set last
            return assign(self, name, value)
        if name == "id2label":
            pair = label_pair(value, None)
        else:  # id2label is usually assigned first, and may have a name twice
            pair = label_pair(self.id2label if _agree(self.id2label or {}, value) else None, value)
        for field, complete in zip(LABELS, pair, strict=True):
            assign(self, field, complete)
        return None

    config_class.__setattr__ = __setattr__  # type: ignore[method-assign,assignment]
    return config_class
