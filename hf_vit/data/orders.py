"""Batch samplers: the order in which images are visited, and how batches are divided over processes."""

import math
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import Sampler

from .images import EvaluationImages, TrainingImages, Visit, derive_seed, image_digest, stored_rows
from .labelled import ImageData

READ_AHEAD = 256  # rows of a stream


class BatchDivision(NamedTuple):
    """How a batch is divided: over accumulation steps, and each of these over processes; and the current process."""

    accumulation_steps: int = 1
    processes: int = 1
    process: int = 0

    def size_of_part(self, batch_size: int) -> int:
        """Return the number of images per accumulation step and process.

        Raises:
            ValueError: If a batch cannot be divided equally.
        """
        if batch_size % (self.accumulation_steps * self.processes):
            raise ValueError(
                f"batch_size={batch_size} must be divisible by accumulation_steps * processes = "
                f"{self.accumulation_steps} * {self.processes}."
            )
        return batch_size // (self.accumulation_steps * self.processes)


UNDIVIDED = BatchDivision()


class TableOrder(Sampler[list[Visit]]):
    """Sample batches of a table for one process.

    An epoch is a permutation that depends on (seed, epoch), divided into batches; the remainder is dropped. So the
    number of a step defines its images, and `first_step` is all that a resumed run needs.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        first_step: int,
        last_step: int,
        division: BatchDivision = UNDIVIDED,
    ) -> None:
        division.size_of_part(batch_size)
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.first_step, self.last_step, self.division = first_step, last_step, division

    def __iter__(self) -> Iterator[list[Visit]]:
        drawn_epoch, order = -1, torch.empty(0)
        for step in range(self.first_step, self.last_step):
            epoch, offset = divmod(step, self.length // self.batch_size)
            if epoch != drawn_epoch:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
                drawn_epoch, order = epoch, self._draw(generator)
            batch = order[offset * self.batch_size : (offset + 1) * self.batch_size]
            for part in batch.chunk(self.division.accumulation_steps):
                visits = part.chunk(self.division.processes)[self.division.process]
                yield [Visit(epoch, index, repeat=repeat) for index, repeat in visits.tolist()]

    def _draw(self, generator: torch.Generator) -> Tensor:
        """Return the images of an epoch and how often each was visited before in this epoch, `[length, 2]`."""
        indices = torch.randperm(self.length, generator=generator)
        return torch.stack([indices, torch.zeros_like(indices)], dim=1)


class BalancedOrder(TableOrder):
    """Sample batches of a table in which every class comes equally often in an epoch.

    An epoch has as many visits as there are images. Images of a rare class are visited repeatedly, equally often to
    within one; of a frequent class, every epoch visits a different part. With several labels per image, every
    positive label is a class, and so is an image without any.

    Args:
        labels: Class indices, or a list of 0 or 1 per class for every image.
        others: Arguments of `TableOrder`.
    """

    def __init__(self, labels: Sequence[Any], *others: Any) -> None:
        super().__init__(len(labels), *others)
        classes = torch.tensor(labels)
        if classes.ndim == 2:
            positive = classes > 0
            columns = [*positive.T, ~positive.any(dim=1)]
        else:
            columns = [classes == label for label in classes.unique()]
        self.members = [column.nonzero().squeeze(1) for column in columns if column.any()]

    def _draw(self, generator: torch.Generator) -> Tensor:
        least, rest = divmod(self.length, len(self.members))
        with_one_more = set(torch.randperm(len(self.members), generator=generator)[:rest].tolist())
        drawn = []
        for number, members in enumerate(self.members):
            visits = least + (number in with_one_more)
            for _ in range(math.ceil(visits / len(members))):
                drawn.append(members[torch.randperm(len(members), generator=generator)[:visits]])
                visits -= len(drawn[-1])
        visited = torch.cat(drawn)[torch.randperm(self.length, generator=generator)]
        seen = Counter[int]()
        repeats = []
        for index in visited.tolist():
            repeats.append(seen[index])
            seen[index] += 1
        return torch.stack([visited, torch.tensor(repeats)], dim=1)


class StreamOrder(Sampler[list[Visit]]):
    """Read a stream once per epoch, in batches for one process.

    The shards of an epoch, and a buffer of images, are shuffled by (seed, epoch). Each process reads its own shards,
    or every n-th image if the number of shards is not divisible, and starts the next epoch when they end. To resume
    at a step, images before it are skipped undecoded, and complete epochs unread if `images_per_epoch` has them.

    Args:
        images_per_epoch: Numbers of images that this process read in the first epochs, as far as an earlier run knows
            them. They differ where shards do, since processes read other shards in every epoch.
    """

    def __init__(
        self,
        images: EvaluationImages,
        batch_size: int,
        seed: int,
        first_step: int,
        last_step: int,
        division: BatchDivision = UNDIVIDED,
        buffer: int = 2048,
        images_per_epoch: Sequence[int] | None = None,
    ) -> None:
        self.batch_size = division.size_of_part(batch_size)
        self.columns = images.columns
        shuffled = images.split.shuffle(seed=derive_seed(seed, "order") % 2**32, buffer_size=buffer)
        self.stream = split_dataset_by_node(shuffled, rank=division.process, world_size=division.processes)
        self.skipped = first_step * division.accumulation_steps * self.batch_size
        self.length = (last_step - first_step) * division.accumulation_steps * self.batch_size
        self.images_per_epoch = list(images_per_epoch or ())

    def __iter__(self) -> Iterator[list[Visit]]:
        visits = read_ahead(islice(self._visits(), self.length), READ_AHEAD)
        while batch := list(islice(visits, self.batch_size)):
            yield batch

    def _visits(self) -> Iterator[Visit]:
        skipped = self.skipped
        for epoch in count():
            if epoch < len(self.images_per_epoch) and skipped >= self.images_per_epoch[epoch]:
                skipped -= self.images_per_epoch[epoch]
                continue
            self.stream.set_epoch(epoch)
            number = 0
            for number, row in enumerate(stored_rows(self.stream, self.columns), start=1):
                if number > skipped:
                    yield Visit(epoch, image_digest(row[0]), row)
            if number == 0:
                raise ValueError("The stream has no images for this process: use fewer processes, or more images.")
            if epoch == len(self.images_per_epoch):
                self.images_per_epoch.append(number)
            elif number != self.images_per_epoch[epoch]:
                raise ValueError(
                    f"The stream ended after {number} images, but had {self.images_per_epoch[epoch]} before: resume "
                    "on the data that the run started with."
                )
            skipped = max(0, skipped - number)


class EvaluationOrder(Sampler[list[Visit]]):
    """Sample every image once over all processes, in batches of the same sizes on each.

    Every process takes each n-th image; its last batch is filled with images that are not counted.

    Args:
        batch_size: Batch size per process.
        is_counted: Whether images of this process are counted: not if another process evaluates the same ones.
        has_one_size: Whether the last batch is as large as the others, for a model that is compiled for one size.
    """

    def __init__(
        self,
        images: EvaluationImages,
        batch_size: int,
        processes: int = 1,
        process: int = 0,
        is_counted: bool = True,
        has_one_size: bool = False,
    ) -> None:
        self.images, self.batch_size, self.processes, self.process = images, batch_size, processes, process
        self.is_counted, self.has_one_size = is_counted, has_one_size

    def __iter__(self) -> Iterator[list[Visit]]:
        visits = self._visits()
        while chunk := list(islice(visits, self.batch_size * self.processes)):
            batch = chunk[self.process :: self.processes]
            size = self.batch_size if self.has_one_size else math.ceil(len(chunk) / self.processes)
            batch += [chunk[0]._replace(counted=False)] * (size - len(batch))
            yield batch if self.is_counted else [visit._replace(counted=False) for visit in batch]

    def _visits(self) -> Iterator[Visit]:
        if self.images.labels:
            return (Visit(0, index) for index in range(len(self.images)))
        rows = stored_rows(self.images.split, self.images.columns)
        return (Visit(0, index, row) for index, row in enumerate(rows))


def read_ahead(items: Iterable[Any], number: int) -> Generator[Any]:
    """Yield items while a thread reads up to `number` of them ahead."""
    rest, end = iter(items), object()
    reader = ThreadPoolExecutor(1, thread_name_prefix="read ahead")
    try:
        waiting = deque(reader.submit(next, rest, end) for _ in range(number))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(reader.submit(next, rest, end))
            yield item
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def steps_of(epochs: float, length: int, batch_size: int) -> int:
    """Return the number of steps in `epochs`, at least one."""
    return max(1, math.ceil(epochs * (length // batch_size)))


def training_order(
    data: ImageData,
    images: TrainingImages,
    batch_size: int,
    seed: int,
    steps: tuple[int, int],
    division: BatchDivision,
    buffer: int,
    images_per_epoch: Sequence[int] | None = None,
    sampling: str = "shuffled",
) -> TableOrder | StreamOrder:
    """Return the order for a table or a stream; `steps` are the first one and the one after the last.

    `sampling` is `"shuffled"` or `"balanced"`, for every class equally often.
    """
    if sampling == "balanced" and (data.is_stream or data.columns[1] is None or data.problem_type == "regression"):
        raise ValueError("sampling: balanced needs classes of images that are not streamed: set sampling: shuffled.")
    if batch_size > data.train_length:
        raise ValueError(f"batch_size={batch_size} exceeds the {data.train_length} training images: reduce it.")
    if data.is_stream:
        return StreamOrder(images, batch_size, seed, *steps, division, buffer, images_per_epoch)
    if sampling == "balanced":
        return BalancedOrder(images.labels, batch_size, seed, *steps, division)
    return TableOrder(data.train_length, batch_size, seed, *steps, division)
