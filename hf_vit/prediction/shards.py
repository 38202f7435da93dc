"""Who answers for which images: tasks, the shares of workers, and the loop that writes finished shards.

Images are cut into shards, and these into batches, always in the same way; so whoever answers for a shard, and however
often all were killed in between, its answers are the same.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch

from ..data.sources import Part, Stored
from .predictor import Prediction, Predictor
from .table import Answers, Shard


@dataclass(frozen=True)
class Settings:
    """What decides the answers.

    Attributes:
        model: A file, a folder or a name on the Hub, in any layout.
        precision, compile: As for `optimize_for_inference`.
        image_size: Pixels, (height, width); the model's if not given.
        batch_size, workers, top_k, has_features: As for `Predictor`.
    """

    model: str
    precision: str = "auto"
    image_size: tuple[int, int] | None = None
    compile: bool = False
    batch_size: int | None = None
    workers: int | None = None
    top_k: int = 5
    has_features: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Those of `Predictor.from_model`."""
        names = ("precision", "compile", "batch_size", "workers", "top_k", "has_features")
        return {name: getattr(self, name) for name in names}


class Share(NamedTuple):
    """What one of several workers takes: in turn parts, and of those that are long, and known to be, shards."""

    number: int = 0
    of: int = 1

    def has(self, part: int, block: int = 0) -> bool:
        return (part + block) % self.of == self.number


class _Rows:
    """Images that know whether there are more."""

    def __init__(self, rows: Iterator[Stored]) -> None:
        self.rows, self.next = rows, next(rows, None)

    @property
    def is_over(self) -> bool:
        return self.next is None

    def up_to(self, number: int) -> Iterator[Stored]:
        for _ in range(number):
            if self.next is None:
                return
            row, self.next = self.next, next(self.rows, None)
            yield row


class Task(NamedTuple):
    """A part with its number, and those of its shards that are done already."""

    number: int
    part: Part
    blocks: set[int]

    def is_long(self, shard_size: int) -> bool:
        """Say whether it is known to have several shards, which several workers may take."""
        return (self.part.length or 0) > shard_size


def tasks_of(parts: Iterable[tuple[int, Part]], done: set[Shard]) -> Iterator[Task]:
    """Yield the parts that are not done, or not all of them."""
    blocks: dict[int, set[int]] = {}
    for shard in done:
        blocks.setdefault(shard.part, set()).add(shard.block)
    complete = {shard.part for shard in done if shard.is_last and len(blocks[shard.part]) == shard.block + 1}
    for number, part in parts:
        if number not in complete:
            yield Task(number, part, blocks.get(number, set()))


def answer(
    predictor: Predictor, tasks: Iterable[Task], answers: Answers, shard_size: int, share: Share
) -> Iterator[tuple[int, int]]:
    """Write the shards of a share, and yield how many images each batch has, and how many of them are broken."""
    finished: list[Prediction] = []
    for shard, predictions in predictor.in_batches(_batches(tasks, shard_size, predictor.batch_size, share)):
        for prediction in predictions:
            prediction.source = {**prediction.source, "bytes": None}  # which are not held until the shard is written
        finished += predictions
        if shard is not None:
            answers.write(shard, finished)
            finished = []
        yield len(predictions), sum(prediction.error is not None for prediction in predictions)


def _batches(
    tasks: Iterable[Task], shard_size: int, batch_size: int, share: Share
) -> Iterator[tuple[Shard | None, list[Any]]]:
    """Yield batches, the last one of each shard with what the shard is."""
    for task in tasks:
        is_long = task.is_long(shard_size)
        if not (is_long or share.has(task.number)):
            continue
        rows = _Rows(task.part.rows())
        for block in count():
            if block in task.blocks or not share.has(task.number, block if is_long else 0):
                for _ in rows.up_to(shard_size):  # undecoded
                    pass
            else:
                yield from _batches_of_block(rows, task.number, block, shard_size, batch_size)
            if rows.is_over:
                break


def _batches_of_block(
    rows: _Rows, part: int, block: int, shard_size: int, batch_size: int
) -> Iterator[tuple[Shard | None, list[Any]]]:
    number, is_end = 0, False
    while not is_end:
        batch = list(rows.up_to(min(batch_size, shard_size - number)))
        number += len(batch)
        is_end = rows.is_over or number == shard_size
        yield Shard(part, block, number, rows.is_over) if is_end else None, batch


def identity_of(model: Any, processor: Any) -> str:
    """Return what tells a model from any other: of its weights, its config and the preprocessing."""
    digest = hashlib.blake2b(digest_size=16)
    for described in (model.config, processor):
        fields = {**described.to_dict(), "transformers_version": None, "_name_or_path": None}
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
