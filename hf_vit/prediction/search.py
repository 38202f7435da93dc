"""Search by image in a table of features, which `hf-vit predict --features` writes.

Similarity is the cosine of features: both sides are divided by their L2 norm, as sentence-transformers does. A query
is embedded by the model, at the image size and with the processor that the table states.
"""

import csv
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.neighbors import nearest
from ..inference.digest import digest_of
from ..system.disk import writing
from .predictor import Predictor, Source
from .shards import Settings
from .table import FACTS

COLUMNS = ("query", "rank", "score", "image", "row", "label", "error")


class Neighbor(NamedTuple):
    """A similar image: its name and row in the table, the cosine similarity, and its most likely label or `""`."""

    image: str
    row: int
    score: float
    label: str


class SearchResult(NamedTuple):
    """The neighbours of a query, the most similar first; none if the query cannot be read, and `error` says why."""

    query: Any
    neighbors: list[Neighbor]
    error: str | None


class FeatureIndex:
    """A table of features in memory.

    Args:
        path: A .parquet file that `hf-vit predict --features` wrote.

    Attributes:
        names, labels: Name and most likely label of every image with features.
        rows: Their rows in the table.
        features: Unit vectors `[N, D]`, float16.
        facts: How they were made; empty for a table that does not state it.

    Raises:
        ValueError: If it is not a parquet file, or has no features.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.facts, table = _read(self.path)
        rows = [row for row, length in enumerate(_lengths(table["features"])) if length]
        if not rows:
            raise ValueError(f"No image in {path} has features: check the column error.")
        kept = table.take(rows)
        features = torch.from_numpy(_matrix(kept["features"]).astype(np.float32))
        self.features = F.normalize(features, dim=1).half()
        self.rows, self.names = rows, kept["image"].to_pylist()
        labels = kept["labels"].to_pylist() if "labels" in table.column_names else [[]] * len(rows)
        self.labels = [each[0] if each else "" for each in labels]
        self._embedders: dict[str | None, Predictor] = {}

    def __len__(self) -> int:
        return len(self.names)

    def search(self, images: Iterable[Source], k: int = 10, model: str | None = None) -> list[SearchResult]:
        """Return the `k` most similar images for every query.

        Args:
            images: As for `Predictor`: paths, bytes, PIL images, or images as `datasets` stores them.
            k: Number of neighbours; all of a smaller table.
            model: Where the model of the table lies now, if it is not where the table says.

        Raises:
            ValueError: If the model is not that of the table, or the table does not state it.
        """
        if k < 1:
            raise ValueError(f"Expected at least one neighbor, got k={k}.")
        found = list(self._embedder(model)(images))
        vectors = [torch.from_numpy(each.features) for each in found if each.features is not None]
        answers = iter(self.nearest(torch.stack(vectors), k) if vectors else [])
        return [
            SearchResult(each.source, next(answers) if each.features is not None else [], each.error) for each in found
        ]

    def nearest(self, features: Tensor, k: int = 10) -> list[list[Neighbor]]:
        """Return the neighbours of features `[N, D]` of the same model."""
        if features.shape[1] != self.features.shape[1]:
            raise ValueError(
                f"{self.path} has {self.features.shape[1]} features per image, the queries have {features.shape[1]}: "
                "use the model that made the table."
            )
        similarity, positions = nearest(F.normalize(features.float(), dim=1), self.features, k)
        return [
            [
                Neighbor(self.names[index], self.rows[index], score, self.labels[index])
                for score, index in zip(scores, indices, strict=True)
            ]
            for scores, indices in zip(similarity.clamp(-1, 1).tolist(), positions.tolist(), strict=True)
        ]

    def _embedder(self, model: str | None) -> Predictor:
        if model not in self._embedders:
            self._embedders[model] = self._load(model)
        return self._embedders[model]

    def _load(self, model: str | None) -> Predictor:
        """Load the model of the table, and check that it is."""
        source = model or self.facts.get("model")
        if source is None:
            raise ValueError(f"{self.path} does not state its model: name it with --model, or write the table again.")
        settings = Settings(source, has_features=True)
        if self.facts:
            size = self.facts["chosen_image_size"]
            settings = replace(
                settings,
                precision=self.facts["precision"],
                image_size=None if size is None else (size[0], size[1]),
                head=self.facts["head"],
            )
        loaded, processor = settings.load()
        if self.facts and digest_of(loaded, loaded.config, processor) != self.facts["digest"]:
            raise ValueError(
                f"{source} is not the model that made {self.path} ({self.facts['model']}, {self.facts['pooling']} "
                "pooling), or it has changed since: name that model with --model, or write the table again."
            )
        return Predictor.from_model(loaded, processor, name=source, **settings.options)


def _read(path: Path) -> tuple[dict[str, Any], pa.Table]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: write it with hf-vit predict MODEL IMAGES --features -o {path}.")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file, or is corrupt: {error}") from error
    if missing := [name for name in ("image", "features") if name not in table.column_names]:
        raise ValueError(
            f"{path} has no column {missing[0]!r}: expected a table that hf-vit predict --features wrote, with the "
            "ending .parquet."
        )
    return json.loads((table.schema.metadata or {}).get(FACTS.encode(), b"{}")), table


def _lengths(column: pa.ChunkedArray) -> list[int]:
    return pc.fill_null(pc.list_value_length(column), 0).to_pylist()


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of lists of equal length as a matrix."""
    width = len(column[0].values)
    values = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
    if len(values) != width * len(column):
        raise ValueError("Expected the same number of features for every image: write the table again.")
    return values.reshape(len(column), width)


def write_results(results: Iterable[SearchResult], output: Path) -> None:
    """Write a row per query and neighbour: query, rank, score, image, row, label, error.

    A query that cannot be read has one row with its error.

    Args:
        output: A .csv, .tsv, .jsonl or .parquet file.
    """
    rows: list[tuple[Any, ...]] = []
    for result in results:
        for rank, each in enumerate(result.neighbors, start=1):
            rows.append((str(result.query), rank, each.score, each.image, each.row, each.label, None))
        if result.error is not None:
            rows.append((str(result.query), None, None, None, None, None, result.error))
    types = (pa.string(), pa.int64(), pa.float32(), pa.string(), pa.int64(), pa.string(), pa.string())
    columns: list[Any] = list(zip(*rows, strict=True)) if rows else [()] * len(types)
    table = pa.table({n: pa.array(c, t) for n, c, t in zip(COLUMNS, columns, types, strict=True)})
    with writing("the results", output):
        if output.suffix == ".parquet":
            pq.write_table(table, output)
            return
        with output.open("w", encoding="utf-8", newline="") as file:
            if output.suffix == ".jsonl":
                file.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
                return
            writer = csv.writer(file, delimiter="\t" if output.suffix == ".tsv" else ",", lineterminator="\n")
            writer.writerows([COLUMNS, *rows])
