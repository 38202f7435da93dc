"""Tables of image paths and labels: CSV, TSV, JSON lines and parquet.

A table is a dictionary of columns. Values of text files become numbers where all values of a column are numbers. Paths
are found relative to the table, or by their last parts among the images below its folder, with or without an ending.
"""

import ast
import csv
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..system.texts import shortened
from .folders import TABLE_ENDINGS, Folder, Skipped, is_image_file, scan, split_of

Columns = dict[str, list[Any]]
# Usual names of columns, in the order of preference; compared without case, spaces and underscores.
IMAGE_NAMES = (
    *("filename", "image", "img", "imagepath", "imgpath", "path", "filepath", "file", "imagefile", "imagename"),
    *("imgname", "imagefilename", "images", "photo", "picture", "imageid", "imgid", "id", "name"),
)
LABEL_NAMES = (
    *("label", "labels", "cls", "class", "finelabel", "target", "targets", "category", "categories", "species"),
    *("classname", "classid", "labelname", "labelid", "tags", "breed", "y"),
)
SPLIT_NAMES = ("split", "set", "subset", "partition", "datasplit")
MISSING = {"", "na", "nan", "n/a", "null", "none"}  # in a column of numbers; in one of words, only ""
SHARE_MISSING = 0.02  # of the files of a table that may be missing, and three in any case
NUMBER = re.compile(r"[+-]?(?!0[0-9])(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2})?")  # 007 and 1_0 are names
SAMPLED = 64  # values that are looked up to tell whether a column holds paths


def normalized(name: str) -> str:
    """Return the name of a column without case, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", name.lower())


def usual(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Return the names that are usual for a column, in the order of `known`."""
    rank = {name: index for index, name in enumerate(known)}
    return sorted((name for name in names if normalized(name) in rank), key=lambda name: rank[normalized(name)])


# ----------------------------------------------------------------------------------------------------------- read


def read_table(path: Path, has_header: bool = True) -> Columns:
    """Read a table into columns.

    Raises:
        ValueError: If the file is not such a table.
    """
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path).to_pydict()
        text = _text_of(path)
        if path.suffix.lower() in (".csv", ".tsv"):
            return _read_csv(text, path.suffix.lower(), has_header)
        is_list = text.lstrip().startswith("[")
        rows = json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}
    except (ValueError, AttributeError, TypeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}.") from error


def _text_of(path: Path) -> str:
    content = path.read_bytes()
    for encoding in ("utf-8-sig", "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return content.decode("cp1252", "replace")  # as older spreadsheets write


def _read_csv(text: str, ending: str, has_header: bool) -> Columns:
    line = text.lstrip("\n").split("\n", 1)[0]
    delimiter = "\t" if ending == ".tsv" else max(",;\t|", key=line.count)
    rows = [row for row in csv.reader(text.splitlines(keepends=True), delimiter=delimiter) if any(map(str.strip, row))]
    width = max(map(len, rows), default=0)
    first = rows.pop(0) if has_header and rows else ["image", "label"] if width == 2 else []
    names = [
        name.strip() or f"column {index + 1}" for index, name in enumerate([*first, *[""] * (width - len(first))])
    ]
    cells = [[*row, *[""] * (width - len(row))] for row in rows]
    return {name: [row[index] for row in cells] for index, name in enumerate(names)}


def typed(values: list[Any]) -> list[Any]:
    """Return the texts of a column as numbers, truth values or lists if all of them are; `None` for a missing one."""
    if not all(isinstance(value, str) for value in values):
        return values
    texts = [value.strip() for value in values]
    for convert in (_integer, _number, _boolean):
        try:
            converted = [None if text.lower() in MISSING else convert(text) for text in texts]
        except (ValueError, KeyError):
            continue
        return converted if any(value is not None for value in converted) else [None] * len(texts)
    try:
        return [_list(text) if text else None for text in texts]
    except (ValueError, SyntaxError):
        return [text or None for text in texts]


def _integer(text: str) -> int:
    if str(number := int(text)) != text or abs(number) >= 2**63:  # 007 is a name, and so is a number of 20 digits
        raise ValueError
    return number


def _number(text: str) -> float:
    if not NUMBER.fullmatch(text) or (text.lstrip("+-").isdecimal() and len(text) > 18):
        raise ValueError
    return float(text)


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _list(text: str) -> list[Any]:
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError
    return ast.literal_eval(text)


# ---------------------------------------------------------------------------------------------------------- paths


class Finder:
    """Finds the files that the cells of a table name.

    Args:
        folder: Of the table; paths are relative to it.
        hint: Names of a folder and of a split to prefer if a name fits several images.
    """

    def __init__(self, folder: Path, hint: str, scanned: Folder | None = None) -> None:
        self.folder, self.hint, self.scanned = folder, hint, scanned
        self.skipped = Skipped()
        self._by_name: dict[str, list[str]] | None = None

    def find(self, value: Any) -> str | None:
        """Return the path of the image that a cell names; `None` if there is none, or more than one that fits."""
        if value is None or not (text := str(value).strip()):
            return None
        text = text.replace("\\", "/")
        direct = os.path.join(self.folder, text)
        if is_image_file(text) and os.path.isfile(direct):  # False for a text that is too long for a path
            return os.path.abspath(direct)
        parts = [part for part in text.split("/") if part not in ("", ".", "..")]
        if not parts:
            return None
        found = self._named().get(unicodedata.normalize("NFC", parts[-1]), [])
        if len(found) == 1:
            return found[0]
        best = max((_common(path, parts) for path in found), default=0)
        found = [path for path in found if _common(path, parts) == best]
        if len(found) > 1:
            found = [path for path in found if self._is_preferred(path)]
        return found[0] if len(found) == 1 else None

    def _named(self) -> dict[str, list[str]]:
        """Return the images below the folder by name, with and without ending."""
        if self._by_name is None:
            self._by_name = {}
            if self.scanned is None:
                self.scanned, self.skipped = scan(self.folder)
            for path in self.scanned.files():
                full = unicodedata.normalize("NFC", os.path.basename(path))
                for name in (full, os.path.splitext(full)[0]):
                    self._by_name.setdefault(name, []).append(path)
        return self._by_name

    def _is_preferred(self, path: str) -> bool:
        inner = Path(path).relative_to(self.folder.absolute()).parts[:-1]
        split = split_of(self.hint)
        return any(part == self.hint or (split is not None and split_of(part) == split) for part in inner) or not inner


def _common(path: str, parts: list[str]) -> int:
    """Return how many of the last parts of a path are the given ones."""
    number = 1
    for ours, theirs in zip(reversed(path.split(os.sep)[:-1]), reversed(parts[:-1]), strict=False):
        if ours != theirs:
            break
        number += 1
    return number


# --------------------------------------------------------------------------------------------------------- tables


@dataclass
class Table:
    """A table whose rows name images.

    Attributes:
        path: Path of the table.
        columns: All columns but that of images.
        image_column: Name of the column of images.
        files: Image of each row; `None` if it is missing.
        named: Values of the column of images.
    """

    path: Path
    columns: Columns
    image_column: str
    files: list[str | None]
    named: list[Any]

    def rows_by_split(self) -> dict[str, list[int]]:
        """Return the rows of each split: by a column that names splits, or by the name of the table or its folder."""
        for name in usual(self.columns, SPLIT_NAMES):
            rows: dict[str, list[int]] = {}
            for row, value in enumerate(self.columns[name]):
                text = "" if value is None else str(value).strip()
                rows.setdefault(split_of(text) or text or "(blank)", []).append(row)
            if any(map(split_of, rows)):
                return rows
        split = split_of(self.path.stem) or split_of(self.path.parent.name) or "train"
        return {split: list(range(len(self.files)))}

    def unused_splits(self) -> str | None:
        """Return a note if a column is named like a column of splits, but has other values."""
        for name in usual(self.columns, SPLIT_NAMES):
            values = list(dict.fromkeys(map(str, self.columns[name])))
            if not any(map(split_of, values)):
                return (
                    f"The column {name!r} of {self.path.name} does not divide the images, since its values "
                    f"({shortened(values)}) are not names of splits such as train and test."
                )
        return None

    def missing(self) -> str | None:
        """Return a note about rows without a file.

        Raises:
            ValueError: If these are all rows, or more than a few.
        """
        lost = [str(name) for name, file in zip(self.named, self.files, strict=True) if file is None]
        if not lost:
            return None
        number = f"{len(lost):,} of {len(self.files):,} files in column {self.image_column!r} of {self.path.name}"
        if len(lost) == len(self.files) or len(lost) > max(3, SHARE_MISSING * len(self.files)):
            raise ValueError(
                f"{number} do not exist below {self.path.parent} or fit several images: {shortened(lost)}. Put the "
                "table next to the images, correct the paths, or choose another --image-column."
            )
        return f"Skipped {number} that do not exist or fit several images: {shortened(lost)}."


def open_table(path: Path, image_column: str | None, scanned: Folder | None = None) -> Table | None:
    """Open a table if one of its columns names images, else return `None`.

    Args:
        image_column: The column; if not given, the first one with a usual name that holds paths, or the only one.
        scanned: The images that the table may name; those below its folder if not given.
    """
    columns = read_table(path)
    finder = Finder(path.parent if scanned is None else scanned.path, path.stem, scanned)
    if path.suffix.lower() in (".csv", ".tsv") and any(is_image_file(name) and finder.find(name) for name in columns):
        columns = read_table(path, has_header=False)
    chosen = image_column if image_column in columns else _image_column(columns, finder.find)
    if chosen is None or (image_column is not None and image_column not in (chosen, "image")):
        return None
    named = columns.pop(chosen)
    if chosen == "file_name":  # as `datasets` renames it
        chosen = "image"
    is_text = path.suffix.lower() in (".csv", ".tsv")
    columns = {name: typed(values) if is_text else values for name, values in columns.items() if name != chosen}
    return Table(path, columns, chosen, [finder.find(name) for name in named], named)


def _image_column(columns: Columns, find: Callable[[Any], str | None]) -> str | None:
    def share(name: str) -> float:
        sample = list(islice((value for value in columns[name] if value not in (None, "")), SAMPLED))
        return sum(isinstance(value, str | int) and find(value) is not None for value in sample) / max(1, len(sample))

    plain = usual(columns, IMAGE_NAMES)
    for name in plain:
        if share(name) >= 0.5:
            return name
    others = [name for name in columns if name not in plain and share(name) >= 0.5]
    return others[0] if len(others) == 1 else next((name for name in plain if share(name) > 0), None)


def is_multi_hot(columns: Columns) -> bool:
    """Return whether there are several columns, and all of them hold 0 and 1."""
    return len(columns) > 1 and all(
        bool(values) and all(value in (0, 1) and value is not None for value in values) for values in columns.values()
    )


def dataset_of_table(table: Table, rows: list[int]) -> Any:
    """Return rows of a table as a data set in memory, without those whose image is missing."""
    import pyarrow as pa
    from datasets import Dataset, Image

    rows = [row for row in rows if table.files[row] is not None]
    columns: Columns = {table.image_column: [table.files[row] for row in rows]}
    for name, values in table.columns.items():
        chosen = [values[row] for row in rows]
        try:
            columns[name] = pa.array(chosen).to_pylist()
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # of several types
            columns[name] = [None if value is None else str(value) for value in chosen]
    return Dataset.from_dict(columns).cast_column(table.image_column, Image())


@dataclass
class Tables:
    """The tables of a folder that label its images."""

    tables: list[Table]
    notes: list[str] = field(default_factory=list)

    def splits(self) -> dict[str, Any]:
        """Return the splits as data sets."""
        from datasets import concatenate_datasets

        parts: dict[str, list[Any]] = {}
        for table in self.tables:
            self.notes += [note for note in (table.missing(), table.unused_splits()) if note]
            for split, rows in table.rows_by_split().items():
                parts.setdefault(split, []).append(dataset_of_table(table, rows))
        return {split: concatenate_datasets(tables) for split, tables in parts.items()}


def tables_of(folder: Folder, image_column: str | None, label_columns: Sequence[str], has_classes: bool) -> Tables:
    """Return the tables that label the images of a folder: those in it, and in the folders of its splits.

    Where class folders give labels already, a table is used only if it has a plain column of labels.
    """
    inner = [other for name, other in folder.folders.items() if split_of(name) is not None]
    paths = [place.path / name for place in (folder, *inner) for name in place.tables]
    found: list[Table] = []
    notes = []
    for path in paths:
        if "submission" in path.stem.lower():  # of Kaggle: its labels are placeholders
            continue
        scanned = next((place for place in inner if place.path == path.parent), folder)
        table = open_table(path, image_column, scanned)
        if table is None:
            continue
        plain = {name: values for name, values in table.columns.items() if normalized(name) not in SPLIT_NAMES}
        if any(name in plain for name in label_columns) or usual(plain, LABEL_NAMES) or is_multi_hot(plain):
            found.append(table)
        elif has_classes:
            names = f" ({', '.join(plain)})" if plain else ""
            notes.append(f"{path.name} is not used: its columns{names} are not labels, and the class folders are.")
        elif plain and not label_columns:
            found.append(table)
    splits = [split for table in found for split in table.rows_by_split()]
    if len(set(splits)) < len(splits):
        names = ", ".join(str(table.path.relative_to(folder.path)) for table in found)
        raise ValueError(f"Several tables label the images of {folder.path}: {names}. Give one of them as --data.")
    return Tables(found, notes)


def is_table(path: Path) -> bool:
    """Return whether a file is a table of a kind that only holds text, or a parquet file without images."""
    if path.suffix.lower() != ".parquet":
        return path.suffix.lower() in (*TABLE_ENDINGS, ".json")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError):
        return False  # the error of `datasets` names the fault

    def holds_images(kind: Any) -> bool:
        return pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    return os.path.getsize(path) > 0 and not any(holds_images(kind) for kind in schema.types)
