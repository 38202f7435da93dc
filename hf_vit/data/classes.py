"""Labels of any kind as one column: class indices, several classes an image as 0/1, or numbers.

The kind follows from the values, unless it is given: texts, whole numbers and truth values are classes; lists, several
0/1 columns and texts with a separator are several labels; numbers with fractions are targets of regression.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from typing import Any

from datasets import ClassLabel, Features, IterableDataset, List, Value

from ..system.texts import counted, shortened
from .folders import same_names
from .opening import choose
from .tables import LABEL_NAMES, SPLIT_NAMES, is_multi_hot, normalized, usual

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
SEGMENTATION = "semantic_segmentation"  # not of a config: a class for every pixel
DETECTION = "object_detection"  # not of a config: boxes, and a class for each
DENSE = (SEGMENTATION, DETECTION)
TASK_OF = {
    **{SINGLE: "classification", MULTI: "multi_label", REGRESSION: "regression"},
    **{SEGMENTATION: "segmentation", DETECTION: "detection"},
}
SEPARATORS = ("|", ";", ",")  # that are inferred
PEEKED = 512  # labels of a stream that are read to tell whether it is sorted
UNKNOWN = -100.0  # one of several labels of an image that nobody knows
LABELS = "labels"  # the column that replaces several ones


@dataclass
class Part:
    """A split of a source with its columns, for training or evaluation."""

    split: Any
    image_column: str
    label_columns: list[str]
    is_train: bool

    def values(self) -> list[Any]:
        """Return the labels of all images as stored; tuples for several columns."""
        names = self.label_columns
        if isinstance(self.split, IterableDataset):  # labels are faster to read than images
            rows = [tuple(_text(row[name]) for name in names) for row in self.split.select_columns(names)]
        else:
            rows = list(zip(*(map(_text, self.split[name][:]) for name in names), strict=True))
        return [row[0] for row in rows] if len(names) == 1 else rows

    def names(self) -> list[str] | None:
        """Return the names of the classes if the source states them."""
        feature = self.split.features[self.label_columns[0]]
        feature = getattr(feature, "feature", feature)  # of a list
        return feature.names if isinstance(feature, ClassLabel) and feature.names else None

    def with_labels(self, column: str, feature: Any, convert: Callable[[Any], Any], values: list[Any]) -> Any:
        """Return the split with images and one column of converted labels."""
        names = self.label_columns
        if isinstance(self.split, IterableDataset):
            features = Features({self.image_column: self.split.features[self.image_column], column: feature})

            def label_of(row: dict[str, Any]) -> dict[str, Any]:
                values = tuple(_text(row[name]) for name in names)
                return {column: convert(values[0] if len(names) == 1 else values)}

            return self.split.map(
                label_of, remove_columns=[name for name in names if name != column], features=features
            )
        return self.split.remove_columns(names).add_column(
            column, [convert(value) for value in values], feature=feature
        )


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


@dataclass
class Labels:
    """What the labels of some splits are.

    Attributes:
        problem_type: As in the config of transformers.
        names: Of the classes or targets.
        column: Name of the column of labels.
        notes: Sentences for the user.
        masks: What the values of masks mean, if these are the labels.
    """

    problem_type: str
    names: list[str]
    column: str
    notes: list[str] = field(default_factory=list)
    masks: Any = None


def choose_label_columns(split: Any, found: list[str], given: Sequence[str], image_column: str) -> list[str]:
    """Return the columns of labels: the given ones, that with a usual name, the only one, or all if they hold 0/1."""
    names = [name for name in split.features if name != image_column]
    if given:
        if not names:
            raise ValueError(f"Unknown label_column {given[0]!r}: the data has no labels.")
        return [choose("label_column", names, name, ()) for name in given]
    found = [name for name in found if name != image_column]
    others = [name for name in found if normalized(name) not in SPLIT_NAMES] or found
    if not usual(others, LABEL_NAMES) and len(others) > 1:
        types = [str(getattr(split.features[name], "dtype", "")) for name in others]
        if all(each.startswith(("int", "uint", "float", "bool")) for each in types):
            rows = Part(split, image_column, others, True).values()
            if is_multi_hot(dict(zip(others, map(list, zip(*rows, strict=True)), strict=True))):
                return others
    return [choose("label_column", others, None, tuple(usual(others, LABEL_NAMES)))]


def convert_labels(parts: list[Part], problem_type: str | None, separator: str | None) -> tuple[list[Any], Labels]:
    """Return the splits with labels of one kind in one column, and what they are.

    Raises:
        ValueError: If labels are missing, or do not fit `problem_type`.
    """
    columns = parts[0].label_columns
    column = columns[0] if len(columns) == 1 else LABELS
    stated = [part.names() if len(part.label_columns) == 1 else None for part in parts]
    is_list = isinstance(parts[0].split.features[columns[0]], List)
    if problem_type in (None, SINGLE) and not is_list and stated[0] and all(names == stated[0] for names in stated):
        splits = [_renamed(part, column) for part in parts]
        return splits, Labels(SINGLE, stated[0], column)
    values = [_named(part.values(), names) for part, names in zip(parts, stated, strict=True)]
    note = _fill_blank(values, problem_type, separator, stated)
    for part, own in zip(parts, values, strict=True):
        if len(part.label_columns) == 1:
            _refuse_missing(own, part.label_columns)
    kind = _kind_of(values, columns, problem_type, separator, stated)
    splits = []
    for part, own, names in zip(parts, values, stated, strict=True):
        convert = partial(_converted, kind.convert, names) if names else kind.convert
        raw = part.values() if names and not isinstance(part.split, IterableDataset) else own
        splits.append(part.with_labels(column, kind.feature, convert, raw))
    return [_renamed(part, column, split) for part, split in zip(parts, splits, strict=True)], Labels(
        kind.problem_type, kind.names, column, [*kind.notes, *note]
    )


def note_on_order(stream: Any, labels: Labels) -> list[str]:
    """Return a note if the first labels of a stream are sorted, since only a buffer of its images is shuffled."""
    if labels.problem_type != SINGLE:
        return []
    first = [row[labels.column] for row in islice(stream.select_columns(labels.column), PEEKED)]
    seen = len(set(first))
    changes = sum(label != other for label, other in pairwise(first))
    if len(first) < PEEKED or changes >= 2 * seen or seen == len(labels.names):
        return []
    return [
        f"The stream is sorted by class: its first {PEEKED} images are of {seen} of {len(labels.names)} classes, and "
        "only shuffle_buffer images are mixed at a time. Expect a low accuracy: shuffle the images before you write "
        "the shards, or set streaming: false."
    ]


def _fill_blank(values: list[list[Any]], asked: str | None, separator: str | None, stated: list[Any]) -> list[str]:
    """Read a blank cell among cells of several labels as none of the labels, with a note, and another as no label."""
    texts = list(dict.fromkeys(value for own in values for value in own if isinstance(value, str)))
    if not texts or any(stated):
        return []
    is_several = asked == MULTI or separator is not None or (asked is None and _separator_in(texts, False) is not None)
    blank = 0
    for own in values:
        for row, value in enumerate(own):
            if value is None or (isinstance(value, str) and not value.strip()):
                own[row], blank = "" if is_several else None, blank + 1
    note = f"{counted(blank, 'image has', 'images have')} a blank label, which is read as none of the labels."
    return [note] if blank and is_several else []


def _renamed(part: Part, column: str, split: Any = None) -> Any:
    split = part.split if split is None else split
    old = part.label_columns[0]
    return split if column in split.features else split.rename_column(old, column)


def _name_of(value: Any, names: list[str]) -> Any:
    """Return the names for class indices; an index without a class stays."""
    if isinstance(value, list):
        return [names[index] for index in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _converted(convert: Callable[[Any], Any], names: list[str], value: Any) -> Any:
    return convert(_name_of(value, names))


def _named(values: list[Any], names: list[str] | None) -> list[Any]:
    return [_name_of(value, names) for value in values] if names else values


def _refuse_missing(values: list[Any], columns: list[str]) -> None:
    lost = [
        number
        for number, value in enumerate(values, start=1)
        if any(item is None or item != item for item in (value if isinstance(value, tuple) else (value,)))
    ]
    if lost:
        rows = f"row{'s' * (len(lost) > 1)} {shortened(lost)}"
        raise ValueError(
            f"{len(lost):,} of {len(values):,} images have no label in {', '.join(map(repr, columns))} ({rows}): "
            "add the labels, remove these rows, or specify another label_column."
        )


# ---------------------------------------------------------------------------------------------------------- kinds


@dataclass
class _Kind:
    problem_type: str
    names: list[str]
    feature: Any
    convert: Callable[[Any], Any]
    notes: list[str] = field(default_factory=list)


def _kind_of(
    values: list[list[Any]], columns: list[str], asked: str | None, separator: str | None, stated: list[Any]
) -> _Kind:
    everything = [value for own in values for value in own]
    if len(columns) > 1:
        return _of_columns(everything, columns, asked)
    column, first = columns[0], everything[0] if everything else None
    if isinstance(first, list):
        return _of_lists(everything, column, asked, stated[0])
    texts = [value for value in dict.fromkeys(everything) if isinstance(value, str)]
    if asked != REGRESSION and texts and (separator or (asked != SINGLE and not any(stated))):
        found = separator or _separator_in(texts, is_expected=asked == MULTI)
        if found is not None:
            kind = _several(
                [_tokens(text, found) for text in texts], lambda value: _tokens(str(value or ""), found), stated[0]
            )
            if separator is None:
                example = next(text for text in texts if found in text)
                kind.notes.append(
                    f"Labels such as {example!r} in {column!r} are read as several labels divided by {found!r}. "
                    "For one class per image, set the task to classification."
                )
            return kind
    has_fractions = any(isinstance(value, float) and value != int(value) for value in everything)
    if asked == REGRESSION or (asked is None and has_fractions):
        return _numbers(everything, column, is_asked=asked == REGRESSION)
    if has_fractions:
        number = next(value for value in everything if isinstance(value, float) and value != int(value))
        raise ValueError(
            f"Expected classes in {column!r}, found numbers such as {number}: set the task to regression, or specify "
            "another label_column."
        )
    everything = [int(value) if isinstance(value, float) else value for value in everything]
    if asked == MULTI:
        return _several([[value] for value in everything], lambda value: [value], stated[0])
    return _classes(values, stated)


def _single(names: list[str], convert: Callable[[Any], int], notes: list[str]) -> _Kind:
    return _Kind(SINGLE, names, ClassLabel(names=names), convert, notes)


def _vectors(problem_type: str, names: list[str], convert: Callable[[Any], list[float]]) -> _Kind:
    return _Kind(problem_type, names, List(Value("float32")), convert)


def _classes(values: list[list[Any]], stated: list[Any]) -> _Kind:
    """Return one class per image; classes of several sources and splits are united by name."""
    if any(stated):
        lists = [own or sorted({str(value) for value in seen}) for own, seen in zip(stated, values, strict=True)]
        same, notes = same_names(lists)
        names = [name for name in _united(lists) if name not in same]
        index: dict[Any, int] = {name: number for number, name in enumerate(names)}
        # A hidden label, -1, stays one.
        return _single(names, lambda value: index.get(same.get(str(value), str(value)), -1), notes)
    same, notes = same_names([[value for value in dict.fromkeys(own) if isinstance(value, str)] for own in values])
    seen = {value for own in values for value in own if value not in same}
    ordered: list[Any] = sorted(seen, key=lambda value: (str(type(value)), value))
    if _are_indices(ordered):
        ordered = list(range(int(max(ordered, default=-1)) + 1))
    index = {value: number for number, value in enumerate(ordered)}
    names = [str(int(value) if isinstance(value, float) else value) for value in ordered]
    return _single(names, lambda value: index[same.get(value, value)], notes)


def _are_indices(values: list[Any]) -> bool:
    """Return whether distinct values are indices of classes from 0, of which some may be missing."""
    are_whole = all(isinstance(value, int | float) and type(value) is not bool and value >= 0 for value in values)
    return are_whole and min(values, default=-1) == 0 and max(values) < 2 * len(values)


def _united(lists: list[list[str]]) -> list[str]:
    """Return all names: sorted if each list is, else those of the first list first."""
    names = list(dict.fromkeys(name for own in lists for name in own))
    return sorted(names) if all(own == sorted(own) for own in lists) else names


def _of_columns(rows: list[tuple[Any, ...]], columns: list[str], asked: str | None) -> _Kind:
    """Return the kind of several columns: 0/1 for one or several classes, or numbers."""
    given = [value for row in rows for value in row if value is not None and value != UNKNOWN]
    unknown = sum(map(len, rows)) - len(given)
    if unknown and given and asked != REGRESSION and all(value in (0, 1) for value in given):
        note = f"{unknown:,} labels in the columns {shortened(columns)} are missing and count as unknown."
        kind = _vectors(MULTI, columns, lambda row: [UNKNOWN if value is None else float(value) for value in row])
        return replace(kind, notes=[note])
    _refuse_missing(rows, columns)
    if asked != REGRESSION and all(value in (0, 1) for value in given):
        if asked == SINGLE and (bad := sum(sum(row) != 1 for row in rows)):
            raise ValueError(
                f"Expected one class per image in {shortened(columns)}, but {bad:,} of {len(rows):,} rows have "
                "none or several: set the task to multi_label."
            )
        if asked != MULTI and all(sum(row) == 1 for row in rows):
            return _single(columns, lambda row: [*map(int, row)].index(1), [])
        return _vectors(MULTI, columns, _floats)
    if asked in (SINGLE, MULTI):
        raise ValueError(
            f"Expected 0 and 1 in the columns {shortened(columns)}, found other values: set the task to regression."
        )
    for row in rows:
        for name, value in zip(columns, row, strict=True):
            if not isinstance(value, int | float):
                raise ValueError(f"Expected numbers in column {name!r}, found {value!r}: specify other label columns.")
    return _vectors(REGRESSION, columns, _floats)


def _of_lists(rows: list[list[Any]], column: str, asked: str | None, stated: list[str] | None) -> _Kind:
    """Return the kind of lists: of labels, of 0/1 for each class, or of numbers of equal length."""
    lengths, items = {len(row) for row in rows}, {item for row in rows for item in row}
    is_table = len(lengths) == 1 and max(lengths) > 1
    columns = [f"{column} {index}" for index in range(max(lengths, default=0))]
    if is_table and stated is None and items <= {0, 1} and any(len(set(row)) < len(row) for row in rows):
        return _of_columns([tuple(row) for row in rows], columns, asked or MULTI)
    if asked == REGRESSION or (asked is None and any(isinstance(item, float) and item != int(item) for item in items)):
        if len(lengths) != 1:
            raise ValueError(
                f"Expected the same number of targets in every row of {column!r}, found {sorted(lengths)}: repair the "
                "rows."
            )
        return _of_columns([tuple(row) for row in rows], columns if is_table else [column], REGRESSION)
    if asked == SINGLE:
        raise ValueError(
            f"Expected one class per image in {column!r}, found lists: set the task to multi_label, or specify "
            "another label_column."
        )
    return _several(rows, lambda row: row, stated)


def _several(rows: Iterable[list[Any]], tokens: Callable[[Any], list[Any]], stated: list[str] | None) -> _Kind:
    """Return several labels per image."""
    seen = {item for row in rows for item in row}
    ordered: list[Any] = sorted(seen, key=lambda item: (str(type(item)), item))
    if stated and seen <= set(stated):
        ordered = stated
    elif _are_indices(ordered):
        ordered = list(range(max(ordered, default=-1) + 1))
    index = {item: number for number, item in enumerate(ordered)}

    def convert(value: Any) -> list[float]:
        present = {index[item] for item in tokens(value)}
        return [float(number in present) for number in range(len(ordered))]

    return _vectors(MULTI, [str(item) for item in ordered], convert)


def _numbers(values: list[Any], column: str, is_asked: bool) -> _Kind:
    try:
        for value in values:
            float(value)
    except ValueError:
        raise ValueError(
            f"Expected numbers in {column!r} for regression, found {value!r}: specify another label_column, or set "
            "the task to classification."
        ) from None
    note = f"The labels in {column!r} are numbers with fractions, so the task is regression."
    kind = _vectors(REGRESSION, [column], lambda value: [float(value)])
    return kind if is_asked else replace(kind, notes=[note])


def _floats(row: Iterable[Any]) -> list[float]:
    return [float(value) for value in row]


def _tokens(text: str, separator: str) -> list[str]:
    return [token for part in text.split(separator) if (token := part.strip())]


def _separator_in(texts: list[str], is_expected: bool) -> str | None:
    """Return the separator in labels, if splitting gives labels that occur in several texts.

    So a name with a comma, as "crane, bird", stays one class. If several labels are expected, any separator will do.
    """
    for separator in SEPARATORS:
        combined = [text for text in texts if separator in text]
        if not combined:
            continue
        count = Counter(token for text in texts for token in set(_tokens(text, separator)))
        tokens = {token for text in combined for token in _tokens(text, separator)}
        if is_expected or (len(count) < len(texts) and all(count[token] > 1 for token in tokens)):
            return separator
    return " " if is_expected and any(re.search(r"\S\s+\S", text) for text in texts) else None
