"""Which image comes when, and how it becomes pixels: orders, images, loaders.

Images travel as uint8 until they are a batch on the device, where `normalize` gives what the image processor would.
Evaluation sees exactly the processor's pixels; training sees augmented ones, whose randomness follows from (seed,
epoch, image) and from nothing else: neither the number of workers nor of processes changes it, and a run that resumes
needs no state of it. An order says what to load, workers decode what it says; a stream is read by its order, once for
all workers.
"""

import math
import os
import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, islice
from typing import Any, NamedTuple

import fsspec
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms.v2 import functional as tvF

from .data import MISSING, ImageData, as_stored, identity_of, seed_of, stored_rows
from .model.image_reading_hf_vit import read_image
from .system.texts import one_line

# Rows of a stream that are read ahead of the workers.
READ_AHEAD = 256
GRAY = PILImage.new("RGB", (32, 32), "gray")


class Visit(NamedTuple):
    """One image at one time: what an order asks a worker for.

    `index` is the image's place in the data, or in a stream its identity; `row` is (stored image, label) if the order
    has read it already. A visit that is not `counted` only fills a batch up.
    """

    epoch: int
    index: int  # type: ignore[assignment] # tuples have a method of that name
    row: tuple[dict[str, Any], int] | None = None
    counted: bool = True


# ------------------------------------------------------------------------------------------------------- images


def normalize(pixels: Tensor, processor: Any) -> Tensor:
    """Bring uint8 pixels `[B, C, H, W]` to what `processor` gives, on the device where they are."""
    mean, std = (
        # Values that are alike for three channels also fit the one of a grayscale model.
        torch.tensor(values[:1] if len(set(values)) == 1 else values, device=pixels.device).view(-1, 1, 1)
        / processor.rescale_factor
        for values in (processor.image_mean, processor.image_std)
    )
    return pixels.float().sub_(mean).div_(std)  # in place: new memory costs more than the arithmetic


def as_seen(image: PILImage.Image | Tensor, processor: Any) -> Tensor:
    """Return what `processor` makes of an image that `read_image` gave, not normalised yet: uint8 `[C, H, W]`."""
    outputs = processor(
        image, input_data_format="channels_first", do_rescale=False, do_normalize=False, return_tensors="pt"
    )
    return outputs["pixel_values"][0]


def content_of(stored: dict[str, Any]) -> str | bytes:
    """Return what `read_image` takes of an image that is stored as `{"bytes", "path"}`; networks raise anything."""
    source = stored["path"] if stored["bytes"] is None else stored["bytes"]
    if isinstance(source, str) and "://" in source:  # in a dataset that is streamed
        with fsspec.open(source, "rb") as file:
            return file.read()
    return source


class Images(torch.utils.data.Dataset):
    """Read the images of a split as uint8 `[C, H, W]`, by `Visit`.

    Args:
        split: `train` or `evaluation` of an `ImageData`.
        columns: Its columns.
        processor: Of the model's images.
        cache: `"none"`, or where decoded images are kept: `"ram"`, or a device, on which they are then augmented too.
    """

    def __init__(
        self, split: Any, columns: tuple[str, str | None], processor: Any, cache: str | torch.device = "none"
    ) -> None:
        self.split, self.columns, self.processor = as_stored(split, columns), columns, processor
        self.kept: list[Tensor | None] | None = None
        self.labels: list[int] = []
        if not hasattr(split, "__len__"):
            if cache != "none":
                raise ValueError("A stream cannot be kept in memory: set cache: none, or streaming: false.")
            return
        self.labels = split[columns[1]][:] if columns[1] else [0] * len(split)
        if unlabelled := sum(label is None or label < 0 for label in self.labels):
            raise ValueError(f"{unlabelled} of {len(self.labels)} images have no label: choose another split.")
        if cache != "none":
            device = torch.device("cpu" if cache == "ram" else cache)
            with ThreadPoolExecutor(os.cpu_count()) as threads:  # decoding leaves Python's lock
                read = threads.map(lambda index: self._read(self._stored(index)), range(len(split)))
                self.kept = [None if pixels is None else pixels.to(device) for pixels in read]

    def __len__(self) -> int:
        return len(self.split)

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is sent these images, not forked with them, is given the rows of a stream by its order.
        return self.__dict__ if hasattr(self.split, "__len__") else {**self.__dict__, "split": None}

    @property
    def is_on_device(self) -> bool:
        return any(pixels is not None and pixels.device.type != "cpu" for pixels in self.kept or ())

    def rows(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield all images as they are stored, with their labels."""
        return stored_rows(self.split, self.columns)

    def least_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) that an image of `size` must at least be decoded at."""
        raise NotImplementedError

    def prepare(self, image: PILImage.Image | Tensor) -> Tensor:
        """Do what is the same at every visit."""
        raise NotImplementedError

    def vary(self, pixels: Tensor, visit: Visit) -> Tensor:
        """Do what is another thing at every visit."""
        return pixels

    def __getitem__(self, visit: Visit | int) -> dict[str, Any]:
        """Return `pixel_values`, `labels`, `index` (-1 for what is not to be counted) and `broken`, a name or `None`.

        An image that cannot be read is gray.
        """
        visit = Visit(0, visit) if isinstance(visit, int) else visit
        stored, label = visit.row if visit.row is not None else (None, self.labels[visit.index])
        if self.kept is not None:
            pixels = self.kept[visit.index]
        else:
            pixels = self._read(self._stored(visit.index) if stored is None else stored)
        is_broken = pixels is None
        return {
            "pixel_values": self.vary(self.prepare(GRAY) if pixels is None else pixels, visit),
            "labels": label,
            "index": visit.index if visit.counted and not is_broken else -1,
            "broken": self._name(visit, stored) if visit.counted and is_broken else None,
        }

    def _stored(self, index: int) -> dict[str, Any]:
        return self.split[index][self.columns[0]] or MISSING

    def _read(self, stored: dict[str, Any]) -> Tensor | None:
        try:
            image = read_image(content_of(stored), self.least_size)
        except Exception:  # networks raise almost anything; the image is named, counted, and too many end the run
            return None
        return self.prepare(image)

    def _name(self, visit: Visit, stored: dict[str, Any] | None) -> str:
        """Name an image by the end of its path, which says no more of the machine than needed."""
        path = (self._stored(visit.index) if stored is None else stored)["path"]
        return one_line("/".join(str(path).replace("\\", "/").split("/")[-2:])) if path else f"image {visit.index}"


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch; other images of it stand in for those that cannot be read, so that its size stays."""
    readable = [example for example in examples if not example.get("broken")] or examples
    chosen = [
        readable[place % len(readable)] if example.get("broken") else example for place, example in enumerate(examples)
    ]
    return {
        "pixel_values": torch.stack([example["pixel_values"].contiguous() for example in chosen]),
        "labels": torch.tensor([example["labels"] for example in chosen]),
        "index": torch.tensor([example.get("index", -1) for example in examples]),
        "broken": [example["broken"] for example in examples if example.get("broken")],
    }


class EvaluationImages(Images):
    """Images as the processor sees them."""

    def least_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.processor.least_size(size)

    def prepare(self, image: PILImage.Image | Tensor) -> Tensor:
        return as_seen(image, self.processor)


class TrainingImages(Images):
    """Augmented images.

    Args:
        augmentation: Of a uint8 image `[C, H, W]`; draws from torch's generator.
        seed: Of the run.
        shorter_side: Larger images are reduced to this first, pixels; what is kept in memory is then smaller.
    """

    def __init__(
        self,
        split: Any,
        columns: tuple[str, str | None],
        processor: Any,
        augmentation: Callable[[Tensor], Tensor],
        seed: int,
        cache: str | torch.device = "none",
        shorter_side: int | None = None,
    ) -> None:
        self.augmentation = augmentation
        self.seed = seed
        self.shorter_side = shorter_side
        super().__init__(split, columns, processor, cache)

    def least_size(self, size: tuple[int, int]) -> tuple[int, int]:
        gap = self.processor.reducing_gap
        if self.shorter_side is None or gap is None:
            return size
        scale = gap * self.shorter_side / min(size)
        return math.ceil(scale * size[0]), math.ceil(scale * size[1])

    def prepare(self, image: PILImage.Image | Tensor) -> Tensor:
        processor = self.processor
        image = processor.process_image(
            image,
            do_convert_rgb=processor.do_convert_rgb,
            do_grayscale=processor.do_grayscale,
            input_data_format="channels_first",
        )
        pixels = tvF.pil_to_tensor(image) if isinstance(image, PILImage.Image) else image
        if self.shorter_side is not None and min(pixels.shape[-2:]) > self.shorter_side:
            pixels = tvF.resize(pixels, [self.shorter_side], antialias=True)
        return pixels

    def vary(self, pixels: Tensor, visit: Visit) -> Tensor:
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed_of(self.seed, visit.epoch, visit.index))
            return self.augmentation(pixels)
        finally:
            torch.set_rng_state(state)


# -------------------------------------------------------------------------------------------------------- order


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


# ------------------------------------------------------------------------------------------------------ loaders


def training_loader(images: TrainingImages, order: Sampler[list[Visit]], num_workers: int) -> DataLoader:
    """Load the batches of `order`, in order."""
    return _loader(images, order, num_workers)


def evaluation_loader(
    images: EvaluationImages,
    batch_size: int,
    num_workers: int,
    processes: int = 1,
    process: int = 0,
    is_counted: bool = True,
) -> DataLoader:
    """Load every image once over all processes; `batch_size` is of one process, the rest as for `EvaluationOrder`."""
    return _loader(images, EvaluationOrder(images, batch_size, processes, process, is_counted), num_workers)


def _loader(images: Images, order: Sampler[list[Visit]], num_workers: int) -> DataLoader:
    # Images on a device are augmented there, by the process that trains.
    workers = 0 if images.is_on_device else num_workers
    return DataLoader(
        images,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator(),  # else every loader moves torch's own generator on
        pin_memory=torch.cuda.is_available() and not images.is_on_device,
        worker_init_fn=_leave_signals_to_parent if workers else None,
    )


def _leave_signals_to_parent(worker: int) -> None:
    # Ctrl-C, a closed terminal and what ends a job reach the whole process group: the parent finishes its step, saves,
    # and ends its workers, by a SIGTERM if nothing else helps. So only one from there counts, where the system tells
    # the sender.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, args=(os.getppid(),), daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_by_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Turn what torch raises of a worker that was killed, wherever the loop stands, into a `ChildProcessError`."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise ChildProcessError(
            f"A process that loads images was ended from outside ({str(error).splitlines()[0].strip()}), often for "
            "want of memory. What was saved is intact: give the command again, if need be with fewer num_workers."
        ) from error


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
