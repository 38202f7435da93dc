"""The order in which images are visited, and how batches are divided over processes."""

import math
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import Sampler

from .images import Images, TrainingImages, Visit
from .labelled import ImageData
from .opening import identity_of, seed_of, stored_rows

# Rows of a stream that are read ahead of the workers.
READ_AHEAD = 256


class Parts(NamedTuple):
    """How a batch is divided: into accumulated parts, each over the processes; and which process this is."""

    accumulated: int = 1
    processes: int = 1
    process: int = 0

    def check(self, batch_size: int) -> None:
        if batch_size % (self.accumulated * self.processes):
            raise ValueError(
                f"batch_size={batch_size} must be divisible by accumulation_steps * processes = "
                f"{self.accumulated} * {self.processes}."
            )


WHOLE = Parts()


class TableOrder(Sampler[list[Visit]]):
    """Say which images of a table belong to which step, for one process.

    An epoch is a permutation that follows from (seed, epoch), cut into batches; what is left over waits for another
    epoch. So a step alone says where a run stands, and `first_step` is all that it takes to go on.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, first_step: int, last_step: int, parts: Parts = WHOLE
    ) -> None:
        parts.check(batch_size)
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.first_step, self.last_step, self.parts = first_step, last_step, parts

    def __iter__(self) -> Iterator[list[Visit]]:
        order_of, order = -1, torch.empty(0)
        for step in range(self.first_step, self.last_step):
            epoch, offset = divmod(step, self.length // self.batch_size)
            if epoch != order_of:
                generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
                order_of, order = epoch, torch.randperm(self.length, generator=generator)
            batch = order[offset * self.batch_size : (offset + 1) * self.batch_size]
            for part in batch.chunk(self.parts.accumulated):
                own = part.chunk(self.parts.processes)[self.parts.process]
                yield [Visit(epoch, index) for index in own.tolist()]


class StreamOrder(Sampler[list[Visit]]):
    """Read a stream again and again, in batches for one process.

    The shards of an epoch, and a buffer of images, are shuffled by (seed, epoch). Each process reads its own shards,
    or its share of every shard if their number does not allow it, and begins anew when they end. To go on at a step
    is to pass over what was read before, undecoded, and over whole epochs unread if `images_an_epoch` tells of them.

    Args:
        images_an_epoch: Numbers of images in this process' parts of the first epochs, as far as an earlier run has
            read them. Since shards change hands, they differ if the sizes of shards do.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        seed: int,
        first_step: int,
        last_step: int,
        parts: Parts = WHOLE,
        buffer: int = 2048,
        images_an_epoch: Sequence[int] | None = None,
    ) -> None:
        parts.check(batch_size)
        self.columns = images.columns
        shuffled = images.split.shuffle(seed=seed_of(seed, "order") % 2**32, buffer_size=buffer)
        self.stream = split_dataset_by_node(shuffled, rank=parts.process, world_size=parts.processes)
        self.batch_size = batch_size // (parts.accumulated * parts.processes)
        self.first_step, self.last_step, self.accumulated = first_step, last_step, parts.accumulated
        self.images_an_epoch = list(images_an_epoch or ())

    def __iter__(self) -> Iterator[list[Visit]]:
        batches = (self.last_step - self.first_step) * self.accumulated
        visits = read_ahead(islice(self._visits(), batches * self.batch_size), READ_AHEAD)
        while batch := list(islice(visits, self.batch_size)):
            yield batch

    def _visits(self) -> Iterator[Visit]:
        passed = self.first_step * self.accumulated * self.batch_size
        for epoch in count():
            if epoch < len(self.images_an_epoch) and passed >= self.images_an_epoch[epoch]:
                passed -= self.images_an_epoch[epoch]
                continue
            self.stream.set_epoch(epoch)
            number = 0
            for number, row in enumerate(stored_rows(self.stream, self.columns), start=1):
                if number > passed:
                    yield Visit(epoch, identity_of(row[0]), row)
            if number == 0:
                raise ValueError("The stream has no images for this process: use fewer processes, or more images.")
            if epoch == len(self.images_an_epoch):
                self.images_an_epoch.append(number)
            elif number != self.images_an_epoch[epoch]:
                raise ValueError(
                    f"The stream ends behind {number} images, where {self.images_an_epoch[epoch]} were read before: "
                    "it is no longer the data of this run."
                )
            passed = max(0, passed - number)


class EvaluationOrder(Sampler[list[Visit]]):
    """Say which images a process measures: each image once over all processes, and batches of the same sizes on all.

    Every process takes each n-th image; what is missing in its last batch is filled up with images that do not count.

    Args:
        is_counted: Whether any image of this process is: not if another process measures the same.
    """

    def __init__(
        self, images: Images, batch_size: int, processes: int = 1, process: int = 0, is_counted: bool = True
    ) -> None:
        self.images, self.batch_size, self.processes, self.process = images, batch_size, processes, process
        self.is_counted = is_counted

    def __iter__(self) -> Iterator[list[Visit]]:
        visits = self._visits()
        while chunk := list(islice(visits, self.batch_size * self.processes)):
            own = chunk[self.process :: self.processes]
            missing = math.ceil(len(chunk) / self.processes) - len(own)
            own += [chunk[0]._replace(counted=False)] * missing
            yield own if self.is_counted else [visit._replace(counted=False) for visit in own]

    def _visits(self) -> Iterator[Visit]:
        if self.images.labels:
            return (Visit(0, index) for index in range(len(self.images)))
        return (Visit(0, index, row) for index, row in enumerate(self.images.rows()))


def read_ahead(items: Iterable[Any], number: int) -> Generator[Any]:
    """Yield items that a thread reads up to `number` ahead."""
    ready: queue.Queue = queue.Queue(number)
    is_closed = threading.Event()

    def put(item: Any) -> bool:
        while not is_closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:  # who waits for an item must hear of anything
            put((None, error))

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        is_closed.set()


def steps_of(epochs: float, length: int, batch_size: int) -> int:
    """Return the number of steps in `epochs`, at least one."""
    return max(1, math.ceil(epochs * (length // batch_size)))


def training_order(
    data: ImageData,
    images: TrainingImages,
    batch_size: int,
    seed: int,
    steps: tuple[int, int],
    parts: Parts,
    buffer: int,
    images_an_epoch: Sequence[int] | None = None,
) -> TableOrder | StreamOrder:
    """Return the order that fits the data, from the first of `steps` to before the last."""
    if batch_size > data.train_length:
        raise ValueError(
            f"batch_size={batch_size} is more than the {data.train_length} training images: make it smaller."
        )
    if data.is_stream:
        return StreamOrder(images, batch_size, seed, *steps, parts, buffer, images_an_epoch)
    return TableOrder(data.train_length, batch_size, seed, *steps, parts)
