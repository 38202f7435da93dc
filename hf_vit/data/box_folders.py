"""Folders of images with files of boxes: COCO, Pascal VOC and YOLO.

COCO  annotations/instances_train.json and train/a.jpg, train/_annotations.coco.json beside its images, and others
VOC   Annotations/a.xml and JPEGImages/a.jpg, divided by ImageSets/Main/train.txt; or a.xml beside a.jpg
YOLO  labels/train/a.txt and images/train/a.jpg, train/labels and train/images, or a.txt beside a.jpg; names of
      classes in data.yaml, classes.txt or obj.names

Splits are named by folders and files, as in other folders of images.
"""

import json
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..system.texts import counted, shortened
from .archives import is_archive, unpacked
from .folders import SPLITS, scan, split_of, words_of
from .mask_folders import place_of
from .objects import ONLY_CLASS
from .opening import Opened, open_source, storage_of
from .tables import Finder

EXPECTED = (
    "expected COCO JSON (annotations/instances_train.json, or _annotations.coco.json next to the images), Pascal VOC "
    "XML (Annotations/a.xml for JPEGImages/a.jpg), or YOLO text (labels/a.txt for images/a.jpg)"
)
ENDINGS = (".json", ".xml", ".txt", ".yaml", ".yml", ".names")
OTHER_JSON = ("caption", "keypoint", "panoptic", "stuff", "image_info")  # of COCO: not boxes of things
PLAIN_TEXTS = ("classes", "labels", "names", "obj", "train", "val", "valid", "test", "readme", "license", "notes")
MISSING_SHARE = 0.5


@dataclass
class Row:
    """An image and its objects: boxes in the format of their files, names of classes, and which ones are ignored."""

    image: str
    width: int = 0  # as the annotation states it; 0 if it does not
    height: int = 0
    boxes: list[list[float]] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    ignored: list[bool] = field(default_factory=list)

    def add(self, box: list[float], category: str, is_ignored: bool = False) -> None:
        """Add an object."""
        self.boxes.append(box)
        self.categories.append(category)
        self.ignored.append(is_ignored)


@dataclass
class Read:
    """What was read: rows by split, names of classes in their order, the format of the boxes, and notes."""

    splits: dict[str, list[Row]]
    names: list[str]
    box_format: str
    notes: list[str] = field(default_factory=list)


class Files:
    """The images and the files of annotations below a folder, by their endings."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.folder, self.skipped = scan(root, keeps_masks=True)
        self.images = sorted(self.folder.files())
        self.by_ending: dict[str, list[Path]] = {ending: [] for ending in ENDINGS}
        for place, folders, names in os.walk(self.root, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                ending = os.path.splitext(name)[1].lower()
                if ending in self.by_ending and not name.startswith("."):
                    self.by_ending[ending].append(Path(place, name))

    def beside(self, annotations: list[Path]) -> Iterator[tuple[Path, str, str | None]]:
        """Yield each file of annotations that has the name of an image, with the image, and the split if any."""
        images: dict[Any, list[str]] = {}
        for image in self.images:
            stem = Path(image).stem
            images.setdefault((*self.place(image), stem), []).append(image)
            images.setdefault(stem, []).append(image)
        for path in annotations:
            found = images.get((*self.place(path), path.stem)) or images.get(path.stem, [])
            if len(found) == 1:
                yield path, found[0], self.place(path)[0] or self.place(found[0])[0]

    def place(self, path: str | Path) -> tuple[str | None, tuple[str, ...]]:
        """Return the split that the folders of a file name, and what else they say; see `mask_folders`."""
        place = place_of(Path(path).relative_to(self.root).parts[:-1])
        return place.split, place.key


def open_boxes(source: Any, streaming: bool, image_column: str | None, label_columns: list[str]) -> Opened:
    """Open a source of images and boxes: a folder, an archive or a file of annotations, or what `open_source` reads.

    Raises:
        ValueError: If files of annotations cannot be understood, or the source cannot be opened.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if is_archive(path):
            path = unpacked(path)
        if path.is_file() and path.suffix.lower() in (".json", ".yaml", ".yml"):
            return _opened(_of_file(path))
        if path.is_dir() and storage_of(path) == "imagefolder":
            files = Files(path)
            for read in READERS.values():
                if (found := read(files)) is not None:
                    return _opened(found)
            if not any(place.tables for place in (files.folder, *files.folder.folders.values())):
                raise ValueError(f"Found no boxes in {path}: {EXPECTED}. {_seen(files)}")
    return open_source(source, streaming, image_column, label_columns)


def _seen(files: Files) -> str:
    number = counted(len(files.images), "image")
    others = {ending: len(paths) for ending, paths in files.by_ending.items() if paths}
    kinds = ", ".join(f"{count} {ending}" for ending, count in others.items())
    return f"Found {number}{f' and files of annotations that fit none of these ({kinds})' if kinds else ''}."


def _of_file(path: Path) -> Read:
    """Return what a COCO file, or the data.yaml of YOLO, and the images beside or below say."""
    folder = path.absolute().parent
    if path.suffix.lower() == ".json":
        folder = folder.parent if words_of(folder.name)[:1] == ["annotations"] else folder
    files = Files(folder)
    if path.suffix.lower() == ".json":
        files.by_ending[".json"] = [path.absolute()]
    found = (read_coco if path.suffix.lower() == ".json" else read_yolo)(files)
    if found is None:
        raise ValueError(f"{path} is not a file of bounding boxes: {EXPECTED}.")
    return found


def _opened(read: Read) -> Opened:
    from datasets import ClassLabel, Dataset, Features, Image, List, Value

    objects = {
        "bbox": List(List(Value("float64"))),
        "category": List(ClassLabel(names=read.names or [ONLY_CLASS])),
        "iscrowd": List(Value("bool")),
    }
    features = Features(
        {
            "image": Image(),
            "width": Value("int64"),
            "height": Value("int64"),
            "objects": objects,
            "box_format": Value("string"),
        }
    )
    splits = {
        split: Dataset.from_dict(
            {
                "image": [row.image for row in rows],
                "width": [row.width for row in rows],
                "height": [row.height for row in rows],
                "objects": [{"bbox": row.boxes, "category": row.categories, "iscrowd": row.ignored} for row in rows],
                "box_format": [read.box_format] * len(rows),
            },
            features=features,
        )
        for split, rows in read.splits.items()
    }
    return Opened(splits, read.notes)


# ------------------------------------------------------------------------------------------------------------ COCO


def read_coco(files: Files) -> Read | None:
    """Read the COCO files of a folder; `None` if there are none.

    Raises:
        ValueError: If their images are missing, or two files describe the same images.
    """
    paths = [path for path in files.by_ending[".json"] if not any(word in path.stem for word in OTHER_JSON)]
    contents = {path: content for path in paths or files.by_ending[".json"] if (content := _coco_in(path))}
    if not contents:
        return None
    read = Read({}, _names_of_coco(list(contents.values())), "coco")
    listed: Counter[str] = Counter()
    for path, content in contents.items():
        hint = path.stem if split_of(path.stem) or path.parent == files.root else path.parent.name
        split = split_of(hint) or "train"
        rows, missing = _rows_of_coco(path, content, Finder(files.root, hint, files.folder))
        if missing:
            number = f"{len(missing):,} of the {counted(len(content['images']), 'image')} that {path.name} lists"
            if len(missing) > MISSING_SHARE * len(content["images"]):
                raise ValueError(
                    f"{number} are not in {files.root}: {shortened(missing)}. Put the images there, or name their "
                    "folder as the data."
                )
            read.notes.append(f"Skipped {number} but are not there: {shortened(missing)}.")
        listed.update(row.image for row in rows)
        read.splits.setdefault(split, []).extend(rows)
    if twice := [Path(image).name for image, number in listed.items() if number > 1]:
        is_listed = "is" if len(twice) == 1 else "are"
        raise ValueError(
            f"{counted(len(twice), 'image')} ({shortened(twice)}) {is_listed} listed twice in "
            f"{shortened([path.name for path in contents])}: give one of these files as the data."
        )
    if alone := len(set(files.images) - set(listed)):
        read.notes.append(f"Skipped {counted(alone, 'image')} that no file of annotations lists.")
    return read


def _coco_in(path: Path) -> dict[str, Any] | None:
    """Return the content of a COCO file with boxes; `None` for another file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError):
        return None
    keys = ("images", "annotations", "categories")
    is_coco = isinstance(content, dict) and all(isinstance(content.get(key), list) for key in keys)
    return content if is_coco and content["images"] and content["categories"] else None


def _names_of_coco(contents: list[dict[str, Any]]) -> list[str]:
    """Return the names of all categories, in the order of their ids.

    Roboflow's exports begin with a category without objects that is the supercategory of the others: it is left out.
    """
    names: dict[str, None] = {}
    for content in contents:
        used = {annotation.get("category_id") for annotation in content["annotations"]}
        for category in sorted(content["categories"], key=lambda category: category["id"]):
            others = (other.get("supercategory") for other in content["categories"] if other is not category)
            if category["id"] in used or category.get("name") not in others:
                names[_name_of(category)] = None
    return list(names)


def _name_of(category: dict[str, Any]) -> str:
    return str(category.get("name", category["id"]))


def _rows_of_coco(path: Path, content: dict[str, Any], finder: Finder) -> tuple[list[Row], list[str]]:
    """Return the rows of a COCO file, and the names of images that are not there."""
    names = {category["id"]: _name_of(category) for category in content["categories"]}
    rows: dict[Any, Row] = {}
    missing = []
    for image in content["images"]:
        name = str(image.get("file_name", ""))
        beside = path.parent / name
        found = str(beside) if name and beside.is_file() else finder.find(name)
        if found is None:
            missing.append(name)
        else:
            rows[image["id"]] = Row(found, int(image.get("width") or 0), int(image.get("height") or 0))
    known = {image["id"] for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation.get("image_id") not in known or annotation.get("category_id") not in names:
            raise ValueError(
                f"An annotation of {path.name} (id {annotation.get('id')}) has the image_id "
                f"{annotation.get('image_id')} and the category_id {annotation.get('category_id')}, but the file does "
                "not list both."
            )
        if (row := rows.get(annotation["image_id"])) is not None:
            box = annotation.get("bbox") or _around(annotation.get("segmentation"))
            row.add(box, names[annotation["category_id"]], bool(annotation.get("iscrowd")))
    return list(rows.values()), missing


def _around(polygons: Any) -> list[float]:
    """Return the box [x, y, width, height] around polygons [x1, y1, x2, y2, ...]; an empty one without polygons."""
    values = [value for polygon in polygons or () for value in polygon] if isinstance(polygons, list) else []
    if not values:
        return []
    left, top = min(values[::2]), min(values[1::2])
    return [left, top, max(values[::2]) - left, max(values[1::2]) - top]


# ------------------------------------------------------------------------------------------------------ Pascal VOC


def read_voc(files: Files) -> Read | None:
    """Read the XML files of a folder; `None` if there are none with the name of an image.

    Raises:
        ValueError: If a file has no boxes where they are expected.
    """
    lists = _lists_of_voc(files)
    read, used, unlisted = Read({}, [], "voc"), set(), 0
    for path, image, split in files.beside(files.by_ending[".xml"]):
        row = _row_of_voc(path, image)
        used.add(image)
        if lists:
            root = next((parent for parent in path.parents if parent in lists), None)
            named = None if root is None else lists[root].get(path.stem)
            unlisted += named is None
            if named is None:
                continue
            split = named
        read.splits.setdefault(split or "train", []).append(row)
    if not used:
        return None
    read.names = sorted({name for rows in read.splits.values() for row in rows for name in row.categories})
    if unlisted:
        read.notes.append(f"Skipped {counted(unlisted, 'image')} that no list in ImageSets/Main names.")
    if alone := [os.path.basename(image) for image in files.images if image not in used]:
        read.notes.append(f"Skipped {counted(len(alone), 'image')} without an XML file: {shortened(alone)}.")
    return read


def _lists_of_voc(files: Files) -> dict[Path, dict[str, str]]:
    """Return the split of each name that ImageSets/Main of a folder lists, by folder; trainval only without train."""
    lists: dict[Path, dict[str, str]] = {}
    for path in sorted(files.by_ending[".txt"], key=lambda path: path.stem == "trainval"):
        if [part.lower() for part in path.parts[-3:-1]] != ["imagesets", "main"]:
            continue
        split = SPLITS.get(path.stem.lower(), "train" if path.stem.lower() == "trainval" else None)
        if split is not None:
            names = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            known = lists.setdefault(path.parents[2], {})
            for name in names:
                known.setdefault(name, split)
    return lists


def _row_of_voc(path: Path, image: str) -> Row:
    try:
        root = ElementTree.fromstring(path.read_bytes())
        size = root.find("size")
        row = Row(image) if size is None else Row(image, _number(size, "width"), _number(size, "height"))
        for each in root.iter("object"):
            box = each.find("bndbox")
            if box is None:
                raise ValueError("an object without bndbox")
            corners = [float(box.findtext(name, "nan")) for name in ("xmin", "ymin", "xmax", "ymax")]
            if not (name := (each.findtext("name") or "").strip()):
                raise ValueError("an object without a name")
            row.add(corners, name, (each.findtext("difficult") or "0").strip() == "1")
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(
            f"{path} is not an annotation of Pascal VOC ({error}): expected objects with a name and a bndbox of xmin, "
            "ymin, xmax and ymax."
        ) from None
    return row


def _number(element: Any, name: str) -> int:
    return int(float(element.findtext(name) or 0))


# ------------------------------------------------------------------------------------------------------------ YOLO


def read_yolo(files: Files) -> Read | None:
    """Read the text files of a folder; `None` if there are none with the name of an image.

    Raises:
        ValueError: If a line is not an object, or its class has no name.
    """
    names, stated = _yaml_of(files)
    texts = [path for path in files.by_ending[".txt"] if path.stem.lower() not in PLAIN_TEXTS]
    labels = {image: (path, split) for path, image, split in files.beside(texts)}
    if not labels:
        return None
    read = Read({}, list(names.values()), "yolo")
    without, polygons = 0, 0
    highest = -1
    for image in files.images:
        row = Row(image)
        if image in labels:
            for index, box, is_polygon in _objects_in(labels[image][0]):
                highest, polygons = max(highest, index), polygons + is_polygon
                if names and index not in names:
                    raise ValueError(
                        f"{labels[image][0]} has the class {index}, but {counted(len(names), 'class', 'classes')} "
                        f"{'is' if len(names) == 1 else 'are'} named ({shortened(list(names.values()))})."
                    )
                row.add(box, names.get(index, str(index)))
        else:
            without += 1
        split = stated(image) or files.place(image)[0] or "train"
        read.splits.setdefault(split, []).append(row)
    read.names = read.names or [str(index) for index in range(highest + 1)]
    if without:
        read.notes.append(
            f"{counted(without, 'image has', 'images have')} no text file of labels, and "
            f"{'counts' if without == 1 else 'count'} as without objects."
        )
    if polygons:
        around = "box around it" if polygons == 1 else "boxes around them"
        read.notes.append(f"{counted(polygons, 'polygon is', 'polygons are')} read as the {around}.")
    if not names:
        read.notes.append(
            "The classes have no names: write them into data.yaml (names: [cat, dog]) or classes.txt, one per line."
        )
    return read


def _objects_in(path: Path) -> Iterator[tuple[int, list[float], bool]]:
    """Yield the class, the box and whether it was a polygon, of every line of a text file."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not (words := line.replace(",", " ").split()):
            continue
        try:
            values = [float(word) for word in words[1:]]
            index = int(float(words[0]))
            is_polygon = len(values) >= 6 and len(values) % 2 == 0
            if len(values) not in (4, 5) and not is_polygon:  # the fifth is the confidence of a prediction
                raise ValueError
            if max(values) > 1.5:
                raise ArithmeticError
        except (ValueError, ArithmeticError) as error:
            pixels = "; its values are in pixels" if isinstance(error, ArithmeticError) else ""
            raise ValueError(
                f"Line {number} of {path} is not an object of YOLO: expected a class index and centre x, centre y, "
                f"width and height from 0 to 1, got {shortened([line], 60)}{pixels}."
            ) from None
        if is_polygon:
            left, top, width, height = _around([values])
            yield index, [left + width / 2, top + height / 2, width, height], True
        else:
            yield index, values[:4], False


def _yaml_of(files: Files) -> tuple[dict[int, str], Callable[[str], str | None]]:
    """Return the names of classes by index, and a function from an image to the split that data.yaml states."""
    names: dict[int, str] = {}
    places: dict[str, str] = {}
    for path in [*files.by_ending[".yaml"], *files.by_ending[".yml"]]:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        except (yaml.YAMLError, OSError):
            continue
        if not isinstance(content, dict) or not isinstance(content.get("names"), list | dict):
            continue
        listed = content["names"]
        listed = dict(enumerate(listed)) if isinstance(listed, list) else listed
        names = {int(index): str(name) for index, name in sorted(listed.items())}
        places = _places_of(path, content)
        break
    if not names:
        plain = [path for path in files.by_ending[".txt"] if path.stem.lower() in ("classes", "labels")]
        for path in [*plain, *files.by_ending[".names"]][:1]:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            names = dict(enumerate(line.strip() for line in lines if line.strip()))

    def split_stated(image: str) -> str | None:
        if image in places:
            return places[image]
        return next((places[folder] for parent in Path(image).parents if (folder := str(parent)) in places), None)

    return names, split_stated


def _places_of(path: Path, content: dict[str, Any]) -> dict[str, str]:
    """Return the splits of the folders and images that data.yaml names, as far as they exist."""
    places: dict[str, str] = {}
    roots = [path.parent, *([path.parent / str(content["path"])] if content.get("path") else [])]
    for name, split in {"test": "test", "val": "validation", "valid": "validation", "train": "train"}.items():
        stated = content.get(name)
        for entry in [stated] if isinstance(stated, str) else stated or []:
            for place in (Path(os.path.abspath(root / str(entry))) for root in roots):
                if place.is_file() and place.suffix == ".txt":
                    lines = place.read_text(encoding="utf-8").split("\n")
                    images = (os.path.abspath(place.parent / line.strip()) for line in lines if line.strip())
                    places |= dict.fromkeys(images, split)
                elif place.is_dir():
                    places[str(place)] = split
    return places


READERS: dict[str, Callable[[Files], Read | None]] = {"COCO": read_coco, "VOC": read_voc, "YOLO": read_yolo}
