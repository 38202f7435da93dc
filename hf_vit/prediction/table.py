"""The table that `hf-vit predict` writes: one file in the end, and until then a folder of finished shards beside it.

A row is an image, in the order of the sources:

    image     string         the name of its file; in a table without names its number in this one, from 0
    labels    list<string>   the likeliest classes, the likeliest first; none if the image is broken
    scores    list<float>    their probabilities
    error     string         why the image is broken, or null
    features  list<float>    the pooled features before the classifier, if they were asked for; null if it is broken

A shard is written under another name, synced and renamed; its name says which images it has. The folder also holds
the plan: what the shards were made from. The file comes into being by one renaming, and then the folder goes.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..system.disk import UNFINISHED, sync, writing
from .predictor import Prediction

PLAN = "plan.json"
ROW_GROUP_BYTES = 32 << 20  # of the file, before they are compressed


def schema_of(has_features: bool) -> pa.Schema:
    """Return the columns of the table and their types, which depend on nothing that was read."""
    features = [pa.field("features", pa.list_(pa.float32()))] * has_features
    fields = [
        pa.field("image", pa.string()),
        pa.field("labels", pa.list_(pa.string())),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("error", pa.string()),
        *features,
    ]
    return pa.schema(fields)


def table_of(predictions: list[Prediction], schema: pa.Schema) -> pa.Table:
    """Return predictions of stored images as a table; `image` is null where an image has no name."""
    columns: dict[str, list[Any]] = {
        "image": [_text(prediction.source["path"]) for prediction in predictions],
        "labels": [[_text(label) for label in prediction.labels] for prediction in predictions],
        "scores": [prediction.scores for prediction in predictions],
        "error": [_text(prediction.error) for prediction in predictions],
        "features": [prediction.features for prediction in predictions],
    }
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def _text(text: str | None) -> str | None:
    # Names of files may hold bytes that are no text, which Python keeps as halves of characters.
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


# -------------------------------------------------------------------------------------------------- kinds of files


@contextmanager
def _parquet(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
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
def _json_lines(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    with path.open("w", encoding="utf-8") as lines:
        yield lambda table: lines.writelines(json.dumps(row) + "\n" for row in table.to_pylist())


Writer = Callable[[Path, pa.Schema], AbstractContextManager[Callable[[pa.Table], None]]]
WRITERS: dict[str, Writer] = {".parquet": _parquet, ".jsonl": _json_lines}


# --------------------------------------------------------------------------------------------------------- shards


# Parquet, but not by its name: the folder may lie in one that is read, where it must not be taken for a source.
SHARD = re.compile(r"(\d{8})-(\d{6})-(\d+)(-last)?\.shard")


class Shard(NamedTuple):
    """A stretch of a part: its number there, its rows, and whether it is the last one of the part."""

    part: int
    block: int
    rows: int
    is_last: bool

    @property
    def name(self) -> str:
        return f"{self.part:08}-{self.block:06}-{self.rows}{'-last' * self.is_last}.shard"

    @classmethod
    def named(cls, name: str) -> "Shard | None":
        match = SHARD.fullmatch(name)
        return match and cls(int(match[1]), int(match[2]), int(match[3]), match[4] is not None)


@dataclass(frozen=True)
class Written:
    """What came of it: the number of rows, and the names of broken images."""

    images: int
    broken: list[str]


class Answers:
    """A file of answers that is being made.

    Args:
        output: The file; its suffix is one of `WRITERS`.
        has_features: Whether it has that column.

    Raises:
        ValueError: If it has another suffix, or there is no folder for it.
    """

    def __init__(self, output: Path, has_features: bool) -> None:
        if output.suffix not in WRITERS:
            raise ValueError(f"{output} is neither .parquet nor .jsonl: give --output one of these endings.")
        if not output.absolute().parent.is_dir():
            raise ValueError(f"There is no folder {output.parent} for --output: make it first.")
        self.output, self.schema = output, schema_of(has_features)
        self.folder = output.with_name(f"{output.name}.parts")

    def check(self, plan: dict[str, Any], restart: bool) -> None:
        """Refuse to go on with what was made from something else.

        Raises:
            ValueError: If so.
        """
        begun = self._plan()
        if not restart and begun is not None and begun != plan:
            names = [name for name in {**begun, **plan} if begun.get(name) != plan.get(name)]
            raise ValueError(
                f"What is finished in {self.folder} was made from something else ({', '.join(names)}): go on with the "
                "same, choose another --output, or begin anew by --restart, which removes it."
            )

    def begin(self, plan: dict[str, Any], restart: bool) -> None:
        """Write the plan, unless it is to be gone on with; what lies there without one goes."""
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
        """Return the shards that are done."""
        return {shard for name in os.listdir(self.folder) if (shard := Shard.named(name)) is not None}

    def write(self, shard: Shard, predictions: list[Prediction]) -> None:
        """Write a shard, whole or not at all.

        Raises:
            OSError: If the disk is full, among others.
        """
        self._write(shard.name, partial(pq.write_table, table_of(predictions, self.schema)))

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        unfinished = self.folder / f"{UNFINISHED}{name}"
        with writing("answers; what was finished is intact", self.folder / name):
            write(unfinished)
            sync(unfinished)
            unfinished.rename(self.folder / name)

    def join(self, parts: int) -> Written:
        """Make one file of the shards of so many parts, and remove them.

        Raises:
            ValueError: If there are not all of them.
            OSError: If the disk is full, among others.
        """
        shards = sorted(self.finished())
        self._refuse_gaps(shards, parts)
        unfinished, images, broken = self.folder / f"{UNFINISHED}table", 0, []
        with writing("the file; all shards are intact", self.output):
            with WRITERS[self.output.suffix](unfinished, self.schema) as write:
                for shard in shards:
                    table = pq.read_table(self.folder / shard.name, schema=self.schema)
                    names = [name or str(images + row) for row, name in enumerate(table["image"].to_pylist())]
                    table = table.set_column(0, self.schema.field("image"), pa.array(names, pa.string()))
                    errors = table["error"].to_pylist()
                    broken += [name for name, error in zip(names, errors, strict=True) if error is not None]
                    images += len(names)
                    write(table)
            sync(unfinished)
            unfinished.rename(self.output)
            sync(self.output.absolute().parent)
        (self.folder / PLAN).unlink(missing_ok=True)  # from here on there is nothing to go on with
        self._clear()
        return Written(images, broken)

    def _refuse_gaps(self, shards: list[Shard], parts: int) -> None:
        expected = [0] * parts  # the block that comes next, or -1 behind the last
        for shard in shards:
            if shard.block == expected[shard.part]:
                expected[shard.part] = -1 if shard.is_last else shard.block + 1
        if missing := sum(block != -1 for block in expected):
            raise ValueError(
                f"{self.folder} lacks shards of {missing} of {parts} parts: all processes must see the same folder. "
                "Start again to go on from there."
            )

    def _clear(self) -> None:
        """Remove what was written here, and nothing that a user has put beside it."""
        for name in os.listdir(self.folder):
            if name == PLAN or name.startswith(UNFINISHED) or Shard.named(name) is not None:
                (self.folder / name).unlink(missing_ok=True)
