"""The table that `hf-vit predict` writes: a folder of finished shards, which become one file at the end.

A row is an image, in the order of the sources, in .parquet and .jsonl files:

    image     string         the name of its file; without a name, the number of the row, from 0
    labels    list<string>   the most likely classes, the most likely first, or all targets of a regression; see
                             `Prediction`; none if the image is broken
    scores    list<float>    their probabilities, or the values of targets
    error     string         why the image is broken, or null
    features  list<float>    the pooled features before the classifier, if requested; null if the image is broken; in
                             .parquet files of float16 if requested
    boxes     list<list<float>>  of a detector: left, top, right and bottom of each object in pixels of the image
    unknown   bool           of a model that can abstain: whether it does
    label_set list<string>   of a model with label sets: the labels in it, the most likely first

A .parquet file with features states in its metadata, below `hf_vit`, how they were made, for `FeatureIndex`.

A .csv or .tsv file has the columns image, label, score, label_2, score_2, ... and error, and no features. For models
that can abstain or have label sets, unknown (true or false) and label_set (as in JSON) come before the error. The file
of a detector has a row for each object, with the columns image, label, score, left, top, right, bottom and error; an
image without objects has one row.

A shard is written under another name, synced and renamed; its name says which images it holds. The folder also holds
the plan: the sources and settings of the shards. The file appears by one renaming, and then the folder is removed.
"""

import csv
import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..system.disk import UNFINISHED, sync, writing
from .output import check_output, check_replaceable
from .predictor import Prediction
from .shards import Shard

PLAN, FACTS = "plan.json", "hf_vit"
ROW_GROUP_BYTES = 32 << 20  # before compression
SIDES = ("left", "top", "right", "bottom")  # of a box
# Columns of models of some kinds only.
OF_SOME: dict[str, pa.DataType] = {
    "boxes": pa.list_(pa.list_(pa.float32(), 4)),
    "unknown": pa.bool_(),
    "label_set": pa.list_(pa.string()),
}


def schema_of(has_features: bool, of_some: Collection[str] = (), is_half: bool = False) -> pa.Schema:
    """Return the columns of the table and their types, with the given columns of `OF_SOME`."""
    fields = [
        pa.field("image", pa.string()),
        pa.field("labels", pa.list_(pa.string())),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("error", pa.string()),
    ]
    features = pa.list_(pa.float16() if is_half else pa.float32())
    fields += [pa.field("features", features)] * has_features
    return pa.schema([*fields, *(pa.field(name, kind) for name, kind in OF_SOME.items() if name in of_some)])


def table_of(predictions: list[Prediction], schema: pa.Schema) -> pa.Table:
    """Return predictions of stored images as a table; `image` is null where an image has no name."""
    columns: dict[str, list[Any]] = {
        "image": [_text(prediction.source["path"]) for prediction in predictions],
        "labels": [[_text(label) for label in prediction.labels] for prediction in predictions],
        "scores": [prediction.scores for prediction in predictions],
        "error": [_text(prediction.error) for prediction in predictions],
        "features": [prediction.features for prediction in predictions],
        "boxes": [None if prediction.boxes is None else prediction.boxes.tolist() for prediction in predictions],
        "unknown": [prediction.is_unknown for prediction in predictions],
        "label_set": [
            None if prediction.label_set is None else [_text(label) for label in prediction.label_set]
            for prediction in predictions
        ],
    }
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def _text(text: str | None) -> str | None:
    # File names may hold bytes that are not text, which Python represents as surrogates.
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


@contextmanager
def _parquet(path: Path, schema: pa.Schema, most: int) -> Iterator[Callable[[pa.Table], None]]:
    waiting: list[pa.Table] = []
    with pq.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()

        def write(table: pa.Table) -> None:
            waiting.append(table)
            if sum(each.nbytes for each in waiting) > ROW_GROUP_BYTES:
                flush()

        yield write
        flush()


@contextmanager
def _json_lines(path: Path, schema: pa.Schema, most: int) -> Iterator[Callable[[pa.Table], None]]:
    with path.open("w", encoding="utf-8") as lines:
        yield lambda table: lines.writelines(json.dumps(row) + "\n" for row in table.to_pylist())


@contextmanager
def _text_table(
    path: Path, schema: pa.Schema, most: int, delimiter: str = ","
) -> Iterator[Callable[[pa.Table], None]]:
    numbers = ["", *(f"_{number}" for number in range(2, most + 1))][:most]
    columns = [f"{what}{number}" for number in numbers for what in ("label", "score")]
    has_boxes = "boxes" in schema.names
    further = [name for name in ("unknown", "label_set") if name in schema.names]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerow(["image", *(["label", "score", *SIDES] if has_boxes else columns), *further, "error"])

        def write(table: pa.Table) -> None:
            for row in table.to_pylist():
                error = row["error"] or ""
                pairs = [(label, f"{score:.6g}") for label, score in zip(row["labels"], row["scores"], strict=True)]
                if has_boxes:
                    sides = [[f"{side:.6g}" for side in box] for box in row["boxes"] or ()]
                    objects = [[*pair, *box] for pair, box in zip(pairs, sides, strict=True)]
                    writer.writerows([row["image"], *cells, error] for cells in objects or [[""] * 6])
                else:
                    pairs += [("", "")] * (most - len(pairs))
                    said = ["" if row[name] is None else json.dumps(row[name], ensure_ascii=False) for name in further]
                    writer.writerow([row["image"], *chain.from_iterable(pairs), *said, error])

        yield write


# Each writes a file of the given columns, of at most that many labels per image.
Writer = Callable[[Path, pa.Schema, int], AbstractContextManager[Callable[[pa.Table], None]]]
WRITERS: dict[str, Writer] = {
    ".csv": _text_table,
    ".tsv": partial(_text_table, delimiter="\t"),
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}


class PredictionTable:
    """A file of predictions in progress.

    Args:
        output: The file; its suffix is a key of `WRITERS`.
        has_features: Whether the table has the features column.
        is_half: Whether the file has features in half precision.
        facts: How features are made, for the metadata of a .parquet file.

    Raises:
        ValueError: As for `check_output` and `check_replaceable`.
    """

    def __init__(self, output: Path, has_features: bool, is_half: bool = False) -> None:
        check_output(output, has_features, is_half)
        check_replaceable(output)
        self.output, self.has_features, self.is_half = output, has_features, is_half
        self.facts: dict[str, Any] = {}
        self.schema = schema_of(has_features, OF_SOME)  # of shards; columns that only some models have may be all null
        self.folder = output.with_name(f"{output.name}.parts")

    def check(self, plan: dict[str, Any], restart: bool) -> None:
        """Check that finished shards were made by the same plan.

        Raises:
            ValueError: If they were not, and are not to be removed.
        """
        previous = self._plan()
        if previous is not None:  # what an older version did not know does not differ
            previous = {**plan, **previous}
        if not restart and previous is not None and previous != plan:
            names = [name for name in {**previous, **plan} if previous.get(name) != plan.get(name)]
            raise ValueError(
                f"The shards in {self.folder} were made with different settings ({', '.join(names)}): use the same "
                "settings, choose another --output, or remove the shards with --restart."
            )

    def begin(self, plan: dict[str, Any], restart: bool) -> None:
        """Write the plan unless a run resumes; shards without a plan are removed."""
        if restart:
            (self.folder / PLAN).unlink(missing_ok=True)
        if self._plan() is None:
            self._clear()
            self._write(PLAN, lambda path: path.write_text(json.dumps(plan, indent=1), encoding="utf-8"))

    def _plan(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / PLAN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def finished(self) -> set[Shard]:
        """Return the finished shards."""
        return {shard for name in os.listdir(self.folder) if (shard := Shard.from_name(name)) is not None}

    def write(self, shard: Shard, predictions: list[Prediction]) -> None:
        """Write a shard atomically.

        Raises:
            OSError: If it cannot be written, for example on a full disk.
        """
        self._write(shard.name, partial(pq.write_table, table_of(predictions, self.schema)))

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        unfinished = self.folder / f"{UNFINISHED}{name}"
        with writing("predictions; finished shards are intact", self.folder / name):
            write(unfinished)
            sync(unfinished)
            unfinished.rename(self.folder / name)

    def join(self, parts: int) -> tuple[int, list[str]]:
        """Join the shards of all parts to the file, and remove them.

        Returns:
            The number of rows, and the names of broken images.

        Raises:
            ValueError: If a shard is missing.
            OSError: If the file cannot be written, for example on a full disk.
        """
        shards = sorted(self.finished())
        self._check_complete(shards, parts)
        unfinished, images, broken = self.folder / f"{UNFINISHED}table", 0, []
        with writing("the file; all shards are intact", self.output):
            most = max((self._most_labels(shard) for shard in shards), default=0)
            schema = schema_of(self.has_features, self._of_some(shards), self.is_half)
            if self.has_features and self.facts:
                schema = schema.with_metadata({FACTS: json.dumps(self.facts)})
            with WRITERS[self.output.suffix](unfinished, schema, most) as write:
                for shard in shards:
                    table = pq.read_table(self.folder / shard.name, schema=self.schema)
                    names = [name or str(images + row) for row, name in enumerate(table["image"].to_pylist())]
                    table = table.set_column(0, self.schema.field("image"), pa.array(names, pa.string()))
                    errors = table["error"].to_pylist()
                    broken += [name for name, error in zip(names, errors, strict=True) if error is not None]
                    images += len(names)
                    write(table.select(schema.names).cast(schema))
            sync(unfinished)
            unfinished.rename(self.output)
            sync(self.output.absolute().parent)
        (self.folder / PLAN).unlink(missing_ok=True)  # there is nothing to resume from here on
        self._clear()
        return images, broken

    def _of_some(self, shards: list[Shard]) -> list[str]:
        """Return the columns of `OF_SOME` that have values; a shard of an older version has no such columns."""
        found = set[str]()
        for shard in shards:
            table = pq.read_table(self.folder / shard.name, schema=self.schema, columns=list(OF_SOME))
            found |= {name for name in OF_SOME if table[name].null_count < len(table)}
        return [name for name in OF_SOME if name in found]

    def _most_labels(self, shard: Shard) -> int:
        lengths = pc.list_value_length(pq.read_table(self.folder / shard.name, columns=["labels"])["labels"])
        return pc.max(lengths).as_py() or 0

    def _check_complete(self, shards: list[Shard], parts: int) -> None:
        following = [0] * parts  # the number of the next shard, or -1 after the last one
        for shard in shards:
            if shard.number == following[shard.part]:
                following[shard.part] = -1 if shard.is_last else shard.number + 1
        if missing := sum(number != -1 for number in following):
            raise ValueError(
                f"{self.folder} lacks shards of {missing} of {parts} parts: make sure that all processes see the same "
                "folder, and run the command again to resume."
            )

    def _clear(self) -> None:
        """Remove our files from the folder, and no others."""
        for name in os.listdir(self.folder):
            if name == PLAN or name.startswith(UNFINISHED) or Shard.from_name(name) is not None:
                (self.folder / name).unlink(missing_ok=True)
