"""Boxes of objects in the columns of a data set: where they are, what their numbers mean, and what their classes are.

From here on, an object is a row of five numbers: the index of its class, and the centre, width and height of its box
as shares of the upright image. An ignored object, such as a crowd, has the class `-2 - index`: the loss skips negative
classes, and metrics count nothing there.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..system.machine import cores
from ..system.texts import counted, shortened
from .classes import DETECTION, Labels, Part
from .images import NO_IMAGE, name_of, upright_size
from .opening import IMAGE_COLUMNS, choose, image_columns

OBJECTS = "objects"
OBJECT_COLUMNS = (OBJECTS, "object", "annotations", "annotation", "labels", "label", "boxes", "bboxes")
BOX_KEYS = ("bbox", "bboxes", "box", "boxes", "bounding_box", "bounding_boxes")
CLASS_KEYS = (
    *("category", "categories", "category_id", "category_ids", "class", "classes", "class_id", "class_ids"),
    *("class_label", "class_labels", "label", "labels", "name", "names"),
)
IGNORED_KEYS = ("iscrowd", "is_crowd", "crowd", "difficult", "ignore", "ignored")
ONLY_CLASS = "object"  # of boxes without classes

Boxes = np.ndarray  # [N, 4]


def _corners_of_coco(boxes: Boxes) -> Boxes:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _corners_of_yolo(boxes: Boxes) -> Boxes:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)


# By format: to corners (left, top, right, bottom), and what the four numbers are.
FORMATS: dict[str, tuple[Callable[[Boxes], Boxes], str]] = {
    "coco": (_corners_of_coco, "[x, y, width, height] in pixels"),
    "voc": (lambda boxes: boxes, "[x1, y1, x2, y2] in pixels"),
    "yolo": (_corners_of_yolo, "[centre x, centre y, width, height] from 0 to 1"),
}
FITTING, MISFIT = 0.95, 0.5  # shares of boxes in their images at which a format is certain, and is wrong
TOLERANCE = 0.02  # of a side, by which a box may leave its image
# By EXIF orientation: where the corners of a box of the stored image are in the upright image.
TURNED: dict[int, tuple[Callable[[float], float], Callable[[float], float]]] = {
    5: (lambda y: y, lambda x: x),
    6: (lambda y: 1 - y, lambda x: x),
    7: (lambda y: 1 - y, lambda x: 1 - x),
    8: (lambda y: y, lambda x: 1 - x),
}


# -------------------------------------------------------------------------------------------------------- columns


def _fields_of(feature: Any) -> dict[str, Any]:
    """Return the fields of a column of objects: a list of structures, or a structure of lists."""
    inner = feature if isinstance(feature, dict) else getattr(feature, "feature", None)
    return inner if isinstance(inner, dict) else {}


def _first(names: Iterable[str], known: Sequence[str]) -> str | None:
    found = set(names)
    return next((name for name in known if name in found), None)


def columns_of_objects(
    features: Any, image_column: str | None = None, given: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """Return the column of images, and those of objects: one of structures, or those of boxes and of their classes.

    Args:
        features: Of a split.
        image_column: Column of images; found if not given.
        given: Columns of objects; found if not given. There are none if the data has none.

    Raises:
        ValueError: If a given column does not exist, or the choice is not clear.
    """
    image = choose("image_column", image_columns(features), image_column, IMAGE_COLUMNS)
    if given:
        return image, [
            choose("label_column", [name for name in features if name != image], name, ()) for name in given
        ]
    structures = [name for name, feature in features.items() if _first(_fields_of(feature), BOX_KEYS)]
    if structures:
        return image, [choose("label_column", structures, None, OBJECT_COLUMNS)]
    boxes = _first(features, BOX_KEYS)
    if boxes is None:
        return image, []
    classes = _first((name for name in features if hasattr(features[name], "feature")), CLASS_KEYS)
    return image, [boxes] if classes is None else [boxes, classes]


def objects_without_classes(features: Any) -> str | None:
    """Return the column of objects of features in which no column of classes says that images are classified."""
    from datasets import ClassLabel

    if any(isinstance(feature, ClassLabel) for feature in features.values()):
        return None
    return next((name for name, feature in features.items() if _first(_fields_of(feature), BOX_KEYS)), None)


@dataclass
class Objects:
    """The objects of a part as stored, in one list for all images.

    Attributes:
        counts: Numbers of objects of the images.
        boxes: Four numbers each.
        categories: Class indices or names; `None` for all if there are no classes.
        ignored: Whether each one is a crowd, or difficult.
        names: Names of class indices, if the data states them.
        sizes: (width, height) of every image as its annotation states it; 0 where it does not.
        box_format: Key of `FORMATS`, if the source has a format of its own.
    """

    counts: np.ndarray
    boxes: Boxes
    categories: list[Any]
    ignored: np.ndarray
    names: list[str] | None
    sizes: np.ndarray
    box_format: str | None
    lost: int = 0  # objects without four finite numbers


def objects_of(part: Part) -> Objects:
    """Return the objects of a part.

    Raises:
        ValueError: If a column does not hold boxes and classes.
    """
    split, features = part.split, part.split.features
    column, *others = part.label_columns
    fields = _fields_of(features[column])
    box_key, class_key = _first(fields, BOX_KEYS), _first(fields, CLASS_KEYS)
    ignored_key = _first(fields, IGNORED_KEYS)
    rows = split[column][:]
    if not fields:
        boxes, class_feature = rows, features[others[0]] if others else None
        categories = split[others[0]][:] if others else [None] * len(rows)
        ignored: list[Any] = [None] * len(rows)
    elif box_key is None:
        raise ValueError(f"Expected boxes in {column!r}, as {' or '.join(BOX_KEYS[:4])}; got {', '.join(fields)}.")
    else:
        class_feature = None if class_key is None else fields[class_key]
        boxes, categories, ignored = (_values(rows, key) for key in (box_key, class_key, ignored_key))
    found = _joined(boxes, categories, ignored, column)
    class_feature = getattr(class_feature, "feature", class_feature)  # of a list
    found.names = getattr(class_feature, "names", None)
    if {"width", "height"} <= set(features):
        columns = (split[name][:] for name in ("width", "height"))
        found.sizes = np.array([[value or 0 for value in values] for values in columns], dtype=np.float64).T
    if "box_format" in features and len(split):
        found.box_format = split[0]["box_format"]
    return found


def _values(rows: list[Any], key: str | None) -> list[list[Any] | None]:
    """Return the values of a field for every image, from structures of lists or lists of structures."""
    if key is None:
        return [None] * len(rows)
    return [
        row.get(key) if isinstance(row, dict) else None if row is None else [each.get(key) for each in row]
        for row in rows
    ]


def _joined(boxes: list[Any], categories: list[Any], ignored: list[Any], column: str) -> Objects:
    kept: list[tuple[Any, Any, bool]] = []
    counts, lost = [], 0
    for row, (own, classes, flags) in enumerate(zip(boxes, categories, ignored, strict=True)):
        own = own or []
        classes, flags = (values or [None] * len(own) for values in (classes, flags))
        if not len(own) == len(classes) == len(flags):
            numbers = f"{counted(len(own), 'box', 'boxes')} and {counted(len(classes), 'class', 'classes')}"
            raise ValueError(f"Row {row} of {column!r} has {numbers}: expected one class for each box.")
        before = len(kept)
        for box, category, flag in zip(own, classes, flags, strict=True):
            if box is None or len(box) != 4 or not all(map(_is_finite, box)):
                lost += 1
            else:
                kept.append((box, category, bool(flag)))
        counts.append(len(kept) - before)
    number = len(kept)
    return Objects(
        counts=np.array(counts, dtype=np.int64),
        boxes=np.array([box for box, _, _ in kept], dtype=np.float64).reshape(number, 4),
        categories=[category for _, category, _ in kept],
        ignored=np.array([flag for _, _, flag in kept], dtype=bool),
        names=None,
        sizes=np.zeros((len(boxes), 2)),
        box_format=None,
        lost=lost,
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


# -------------------------------------------------------------------------------------------------------- formats


def box_format_of(
    boxes: Boxes, frames: np.ndarray, asked: str | None, describe: Callable[[int], str]
) -> tuple[str, str | None]:
    """Return the format of boxes, and a note unless it is the given one, or COCO's.

    Args:
        boxes: As stored.
        frames: (width, height) of the image of each box.
        asked: The format, if it is known; it is only checked then.
        describe: Returns the image of a box, for an error.

    Raises:
        ValueError: If the boxes do not fit into their images.
    """
    if not len(boxes):
        return asked or "coco", None
    shares = {name: _fitting(relative_corners(boxes, frames, name)) for name in FORMATS}
    if asked is None and boxes.max() <= 1.001 and (boxes > 0).any():
        return _relative_format(boxes)
    chosen = asked or "coco"
    if (
        asked is None
        and shares["coco"].mean() < FITTING
        and shares["voc"].mean() > max(FITTING, shares["coco"].mean())
    ):
        note = (
            f"The boxes are read as {FORMATS['voc'][1]} (box_format: voc): as {FORMATS['coco'][1]}, "
            f"{1 - shares['coco'].mean():.0%} of them would leave their images."
        )
        return "voc", note
    if shares[chosen].mean() < MISFIT:
        wrong = int(np.flatnonzero(~shares[chosen])[0])
        values = ", ".join(f"{value:.4g}" for value in boxes[wrong])
        meanings = ", ".join(f"{name} for {meaning}" for name, (_, meaning) in FORMATS.items())
        raise ValueError(
            f"Expected boxes as {FORMATS[chosen][1]}, but {1 - shares[chosen].mean():.0%} of them do not fit into "
            f"their images, such as [{values}] in {describe(wrong)}: set box_format to one of {meanings}."
        )
    return chosen, None


def _relative_format(boxes: Boxes) -> tuple[str, str]:
    """Return the format of boxes whose values are from 0 to 1, and a note."""
    ones = np.ones((len(boxes), 2))
    fits = {name: _fitting(relative_corners(boxes, ones, name)).mean() for name in FORMATS}
    if fits["yolo"] < FITTING or max(fits["coco"], fits["voc"]) >= FITTING:
        raise ValueError(
            "The boxes have values from 0 to 1: if they are [centre x, centre y, width, height], set box_format to "
            "yolo; store others in pixels."
        )
    return "yolo", f"The boxes are read as {FORMATS['yolo'][1]} (box_format: yolo)."


def relative_corners(boxes: Boxes, frames: np.ndarray, box_format: str) -> Boxes:
    """Return the corners of boxes as shares of their images, given (width, height) of the image of each box."""
    corners = FORMATS[box_format][0](boxes)
    return corners if box_format == "yolo" else corners / np.concatenate([frames, frames], axis=1)


def _fitting(corners: Boxes) -> np.ndarray:
    """Return for each box whether it has an area, and lies in its image."""
    is_inside = np.logical_and(corners >= -TOLERANCE, corners <= 1 + TOLERANCE).all(axis=1)
    return np.logical_and(is_inside, (corners[:, 2:] > corners[:, :2]).all(axis=1))


# --------------------------------------------------------------------------------------------------------- uniting


@dataclass
class _Seen:
    """What was found in all parts, for notes."""

    lost: int = 0
    clipped: int = 0
    ignored: int = 0
    empty: int = 0
    turned: int = 0
    scaled: int = 0
    names: list[str] = field(default_factory=list)  # of images with lost boxes

    def notes(self) -> list[str]:
        """Return sentences for the user."""
        lines = []
        if self.lost:
            lines.append(
                f"Skipped {counted(self.lost, 'box', 'boxes')} without an area in the image, or without four numbers"
                f"{f': in {shortened(list(dict.fromkeys(self.names)))}' if self.names else ''}."
            )
        if self.clipped:
            reach = "reaches" if self.clipped == 1 else "reach"
            is_clipped = "is clipped to it" if self.clipped == 1 else "are clipped to them"
            images = "its image" if self.clipped == 1 else "their images"
            lines.append(f"{counted(self.clipped, 'box', 'boxes')} {reach} beyond {images}, and {is_clipped}.")
        if self.ignored:
            lines.append(
                f"{counted(self.ignored, 'box', 'boxes')} of crowds or difficult objects: left out of training, and "
                "ignored in evaluation."
            )
        if self.turned:
            lines.append(
                f"The boxes of {counted(self.turned, 'image')} are turned with the image, whose file states that it "
                "lies on its side (EXIF): the annotations state its size before turning."
            )
        if self.scaled:
            lines.append(
                f"The boxes of {counted(self.scaled, 'image')} are scaled: the annotations state another size of the "
                "image than its file has."
            )
        if self.empty:
            have = "has no boxes: it is" if self.empty == 1 else "have no boxes: they are"
            lines.append(f"{counted(self.empty, 'image')} {have} all background.")
        return lines


def united_objects(
    parts: list[Part], names: dict[int, str] | None = None, box_format: str | None = None
) -> tuple[list[Any], Labels]:
    """Return the parts with columns of stored images and of objects, and what the labels are.

    Args:
        parts: Splits with their columns.
        names: Names of class indices, if a file states them.
        box_format: Key of `FORMATS`; found if not given.

    Raises:
        ValueError: If the boxes do not fit into their images, or there are none.
    """
    from datasets import Image, List, Value

    found = [objects_of(part) for part in parts]
    label_names, indices = _classes_of(found, names)
    if not sum(len(own.boxes) for own in found):
        raise ValueError("Found no boxes in the data: expected some, with a class for each.")
    image, seen = parts[0].image_column, _Seen()
    stored = [part.split.select_columns([part.image_column]) for part in parts]
    for number, split in enumerate(stored):
        split = split if image in split.features else split.rename_column(parts[number].image_column, image)
        stored[number] = split.cast_column(image, Image(decode=False))
    sizes = [_sizes_of(split, image) for split in stored]
    frames, turned = zip(*(_frames(own, each, seen) for own, each in zip(found, sizes, strict=True)), strict=True)
    formats, notes = _formats_of(found, frames, stored, image, box_format)
    columns = []
    for own, classes, frame, turn, split, each in zip(found, indices, frames, turned, stored, formats, strict=True):
        rows, owners = _rows(own, classes, frame, turn, each, seen)
        counts = np.bincount(owners, minlength=len(split))
        is_known = (frame > 0).all(axis=1)
        names_lost = np.flatnonzero(is_known & (counts < own.counts))[:10].tolist()
        seen.names += [name_of(split[row][image] or NO_IMAGE) or f"image {row}" for row in names_lost]
        seen.empty += int((is_known & (counts == 0)).sum())
        divided = np.split(rows, np.cumsum(counts)[:-1])
        feature = List(List(Value("float32"), length=5))
        columns.append(split.add_column(OBJECTS, [each.tolist() for each in divided], feature=feature))
    return columns, Labels(DETECTION, label_names, OBJECTS, [*notes, *seen.notes()])


def images_of_classes(rows: list[list[list[float]]], number: int) -> list[int]:
    """Return the number of images with an object of each class, that is not ignored, given the objects of images."""
    counts = Counter(index for objects in rows for index in {int(each[0]) for each in objects})
    return [counts[index] for index in range(number)]


def _classes_of(found: list[Objects], names: dict[int, str] | None) -> tuple[list[str], list[np.ndarray]]:
    """Return the names of all classes, and the class index of every object of every part."""
    stated: list[str] = []
    seen: set[Any] = set()
    named = []
    for own in found:
        by_index = dict(enumerate(own.names)) if own.names else names or {}
        stated += by_index.values()
        named.append([_name(category, by_index) for category in own.categories])
        seen |= set(named[-1])
    numbers = sorted((name for name in seen if isinstance(name, int)), key=int)
    texts = sorted(name for name in seen if isinstance(name, str))
    label_names = list(dict.fromkeys([*stated, *map(str, numbers), *texts]))
    index = {name: number for number, name in enumerate(label_names)}
    return label_names, [np.array([index[str(name)] for name in own], dtype=np.int64) for own in named]


def _name(category: Any, names: dict[int, str]) -> str | int:
    """Return the name of a class, or the index of one without a name."""
    if category is None:
        return ONLY_CLASS
    if isinstance(category, int | float):
        return names.get(int(category), int(category))
    return str(category)


def _sizes_of(split: Any, column: str) -> np.ndarray:
    """Return width, height and EXIF orientation of every image as it is shown, `[N, 3]`; zeros if unreadable."""

    def size(row: int) -> tuple[int, int, int]:
        height, width, orientation = upright_size(split[row][column] or NO_IMAGE) or (0, 0, 0)
        return width, height, orientation

    with ThreadPoolExecutor(cores()) as threads:
        return np.array(list(threads.map(size, range(len(split)))), dtype=np.float64).reshape(-1, 3)


def _frames(own: Objects, sizes: np.ndarray, seen: _Seen) -> tuple[np.ndarray, np.ndarray]:
    """Return the frame that the boxes of each image refer to, and the orientation of those that are to be turned.

    The frame, (width, height), is the stated one, or else that of the upright image.
    """
    upright, orientations = sizes[:, :2], sizes[:, 2]
    is_stated = np.asarray((own.sizes > 0).all(axis=1))
    differs = is_stated & (upright > 0).all(axis=1) & (own.sizes != upright).any(axis=1) & (own.counts > 0)
    is_swapped = (own.sizes == upright[:, ::-1]).all(axis=1)
    is_turned: np.ndarray = np.logical_and(differs & is_swapped, np.isin(orientations, list(TURNED)))
    seen.turned += int(is_turned.sum())
    seen.scaled += int((differs & ~is_turned).sum())
    return np.where(is_stated[:, None], own.sizes, upright), np.where(is_turned, orientations, 0)


def _formats_of(
    found: list[Objects], frames: list[np.ndarray], stored: list[Any], image: str, asked: str | None
) -> tuple[list[str], list[str]]:
    """Return the format of the boxes of each part, and notes; parts without a stated format have the same one."""
    formats, notes = [own.box_format for own in found], []
    for stated in dict.fromkeys(formats):
        members = [number for number, each in enumerate(formats) if each == stated]
        owners = [np.repeat(np.arange(len(found[number].counts)), found[number].counts) for number in members]
        places = [(number, row) for number, rows in zip(members, owners, strict=True) for row in rows.tolist()]
        boxes = np.concatenate([found[number].boxes for number in members])
        sides = np.concatenate([frames[number][rows] for number, rows in zip(members, owners, strict=True)])
        is_known = (sides > 0).all(axis=1)
        positions = np.flatnonzero(is_known)

        def describe(wrong: int, places: Any = places, positions: Any = positions, sides: Any = sides) -> str:
            number, row = places[positions[wrong]]
            width, height = sides[positions[wrong]].astype(int).tolist()
            name = name_of(stored[number][row][image] or NO_IMAGE) or f"image {row}"
            return f"{name} of {height}x{width} pixels (height x width)"

        chosen, note = box_format_of(boxes[is_known], sides[is_known], asked or _fixed(stated), describe)
        notes += [note] if note else []
        for number in members:
            formats[number] = chosen
    return [str(each) for each in formats], notes


def _fixed(stated: str | None) -> str | None:
    """Return a format that files state; boxes in COCO files may be of another one, as those in columns."""
    return None if stated == "coco" else stated


def _rows(
    own: Objects, classes: np.ndarray, frames: np.ndarray, turned: np.ndarray, box_format: str, seen: _Seen
) -> tuple[np.ndarray, np.ndarray]:
    """Return the objects of a part as rows of class, centre, width and height, and the image of each."""
    owners = np.repeat(np.arange(len(own.counts)), own.counts)
    sides = frames[owners]
    is_known = (sides > 0).all(axis=1)
    corners = relative_corners(own.boxes, np.where(sides > 0, sides, 1), box_format)
    for orientation, (across, down) in TURNED.items():
        chosen = turned[owners] == orientation
        left, top, right, bottom = corners[chosen].T
        ends = np.stack([across(top), down(left), across(bottom), down(right)], axis=1)
        corners[chosen] = np.concatenate(
            [np.minimum(ends[:, :2], ends[:, 2:]), np.maximum(ends[:, :2], ends[:, 2:])], axis=1
        )
    clipped = corners.clip(0, 1)
    is_kept = is_known & (clipped[:, 2:] - clipped[:, :2] > 1e-6).all(axis=1)
    seen.lost += own.lost + int((is_known & ~is_kept).sum())
    pixel = 1 / np.where(sides > 0, sides, 1)
    is_clipped = (np.abs(corners - clipped) > np.concatenate([pixel, pixel], axis=1)).any(axis=1)
    seen.clipped += int((is_clipped & is_kept).sum())
    seen.ignored += int((own.ignored & is_kept).sum())
    low, high = clipped[is_kept, :2], clipped[is_kept, 2:]
    coded = np.where(own.ignored, -2 - classes, classes)[is_kept, None]
    return np.concatenate([coded, (low + high) / 2, high - low], axis=1), owners[is_kept]
