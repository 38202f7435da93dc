"""Shards of a prediction table: their names, the jobs of workers, and the loop that writes them.

Parts of the sources are divided into shards, and shards into batches, always in the same way. So the predictions do
not depend on which worker makes them, or on how often a run was interrupted.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoints.models import load
from ..data.sources import Part, Stored
from ..inference.windows import slide
from .predictor import Prediction, Predictor

if TYPE_CHECKING:
    from .table import PredictionTable

# A shard is a parquet file, but must not be a source if the output folder is one, so it has another suffix.
SHARD = re.compile(r"(\d{8})-(\d{6})-(\d+)(-last)?\.shard")


@dataclass(frozen=True)
class Settings:
    """Everything that determines the predictions.

    Attributes:
        model: A file, a folder or a name on the Hub, in any supported layout.
        precision, compile: As for `optimize_for_inference`.
        runtime: As for `in_runtime`.
        image_size: (height, width) in pixels; if not given, the model's, or with windows that of each image.
        batch_size, workers, top_k, has_features: As for `Predictor`.
        has_windows: Whether windows of the model's size slide over the images, for segmentation.
        head: Head of a multi-task model, which is then used as a model of this task alone.
    """

    model: str
    precision: str = "auto"
    image_size: tuple[int, int] | None = None
    compile: bool = False
    batch_size: int | None = None
    workers: int | None = None
    top_k: int | None = None
    has_features: bool = False
    has_windows: bool = False
    head: str | None = None
    runtime: str = "torch"

    def load(self, is_to_file: bool = False) -> tuple[Any, Any]:
        """Load the model and its image processor; raise `ValueError` for several heads if answers go to a file."""
        model, processor = load(self.model, None if self.has_windows else self.image_size, head=self.head)
        if is_to_file and hasattr(model, "heads"):
            named = " or ".join(name for name, head in model.config.task_heads.items() if head["task"] != "anomaly")
            if not named:
                raise ValueError("Anomaly scores are printed, not written to a file: remove --output.")
            raise ValueError(f"A file holds the predictions of a single head: choose one with --head, {named}.")
        if self.has_windows:
            slide(model, processor, self.image_size)
        return model, processor

    def predictor(self, is_to_file: bool = False, **options: Any) -> Predictor:
        """Load the model, and return a predictor; `options` override `self.options`."""
        return Predictor.from_model(*self.load(is_to_file), name=self.model, **{**self.options, **options})

    def facts_of_features(self, model: Any, processor: Any) -> dict[str, Any]:
        """Return how features are made by a loaded model, of plain types."""
        return {
            "pooling": model.config.pooling,
            "image_size": list(model.config.image_shape),
            "chosen_image_size": None if self.image_size is None else list(self.image_size),
            "precision": self.precision,
            "head": self.head,
            "processor": json.loads(processor.to_json_string()),
        }

    @property
    def options(self) -> dict[str, Any]:
        """Options of `Predictor.from_model`."""
        of_model = ("model", "image_size", "has_windows", "head")
        return {name: value for name, value in vars(self).items() if name not in of_model}


class Shard(NamedTuple):
    """Consecutive rows of a part: the numbers of part and shard, the number of rows, and whether it ends the part."""

    part: int
    number: int
    rows: int
    is_last: bool

    @property
    def name(self) -> str:
        return f"{self.part:08}-{self.number:06}-{self.rows}{'-last' * self.is_last}.shard"

    @classmethod
    def from_name(cls, name: str) -> "Shard | None":
        match = SHARD.fullmatch(name)
        return match and cls(int(match[1]), int(match[2]), int(match[3]), match[4] is not None)


class ShardJob(NamedTuple):
    """The unfinished shards of a part of the sources, or every n-th of them.

    Attributes:
        number: Number of the part.
        size: Number of images per shard.
        finished: Numbers of the shards that are finished.
        first, step: The shards to predict, if several workers share a part.
    """

    number: int
    part: Part
    size: int
    finished: set[int]
    first: int = 0
    step: int = 1

    def divide(self, workers: int) -> "list[ShardJob]":
        """Return a job for each worker if the part is known to have several shards, else this job alone."""
        if (self.part.length or 0) <= self.size:
            return [self]
        return [self._replace(first=first, step=workers) for first in range(workers)]

    def batches(self, batch_size: int) -> Iterator[tuple[Shard | None, list[Stored]]]:
        """Yield batches of stored images, the last one of each shard with the shard; skipped images stay undecoded."""
        rows = self.part.rows()
        batch: list[Stored] = []
        index, row = 0, next(rows, None)
        if row is None and not self.finished:
            yield Shard(self.number, 0, 0, True), batch
        while row is not None:
            following = next(rows, None)
            number, offset = divmod(index, self.size)
            if number % self.step == self.first and number not in self.finished:
                batch.append(row)
                is_end = following is None or offset + 1 == self.size
                if is_end or len(batch) == batch_size:
                    yield Shard(self.number, number, offset + 1, following is None) if is_end else None, batch
                    batch = []
            index, row = index + 1, following


def jobs_of(parts: Iterable[tuple[int, Part]], finished: set[Shard], size: int) -> Iterator[ShardJob]:
    """Yield a job for every part with unfinished shards."""
    numbers: dict[int, set[int]] = {}
    for shard in finished:
        numbers.setdefault(shard.part, set()).add(shard.number)
    complete = {shard.part for shard in finished if shard.is_last and len(numbers[shard.part]) == shard.number + 1}
    for number, part in parts:
        if number not in complete:
            yield ShardJob(number, part, size, numbers.get(number, set()))


def predict_shards(
    predictor: Predictor, jobs: Iterable[ShardJob], table: "PredictionTable"
) -> Iterator[tuple[int, int]]:
    """Write the shards of jobs, and yield the numbers of images and of broken images of each batch."""
    waiting: list[Prediction] = []
    batches = chain.from_iterable(job.batches(predictor.batch_size) for job in jobs)
    for shard, predictions in predictor.in_batches(batches):
        for prediction in predictions:
            prediction.source = {**prediction.source, "bytes": None}  # frees memory until the shard is written
        waiting += predictions
        if shard is not None:
            table.write(shard, waiting)
            waiting = []
        yield len(predictions), sum(prediction.error is not None for prediction in predictions)
