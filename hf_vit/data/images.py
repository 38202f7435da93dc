"""Which image comes when, and how it becomes pixels: orders, images, loaders.

Images travel as uint8 until they are a batch on the device, where `normalize` gives what the image processor would.
Evaluation sees exactly the processor's pixels; training sees augmented ones, whose randomness follows from (seed,
epoch, image) and from nothing else: neither the number of workers nor of processes changes it, and a run that resumes
needs no state of it. An order says what to load, workers decode what it says; a stream is read by its order, once for
all workers.
"""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import fsspec
import torch
from PIL import Image as PILImage
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF

from ..model.image_reading_hf_vit import read_image
from ..system.texts import one_line
from .opening import MISSING, as_stored, seed_of, stored_rows

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


# ------------------------------------------------------------------------------------------------------ loaders
