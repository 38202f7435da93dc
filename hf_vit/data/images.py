"""Images of a data set as pixels: read, prepare, augment, collate, normalize.

Pixels stay uint8 until the batch is on the device, where `normalize` completes what the image processor does.
Evaluation images are exactly the processor's. The augmentation of a training image depends on (seed, epoch, image)
alone: the numbers of workers and processes do not change it, and a resumed run restores no state for it.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from PIL import ExifTags
from PIL import Image as PILImage
from torch import Tensor

from ..model.image_conversion_hf_vit import pixels_of_file
from ..model.image_geometry_hf_vit import size_of
from ..model.image_reading_hf_vit import TRANSPOSED, LeastSize, read_image
from ..system.texts import one_line, without_tokens
from .cache import CachedImages

NO_IMAGE: dict[str, Any] = {"bytes": None, "path": None}  # what a row without an image is stored as


class Visit(NamedTuple):
    """One image in one epoch: what a sampler requests from a data set.

    `index` is the position of the image in the data, or in a stream its digest; `row` is (stored image, label) if the
    sampler has already read it. A visit that is not `counted` only fills a batch. `repeat` counts the earlier visits
    of the image in this epoch.
    """

    epoch: int
    index: int  # type: ignore[assignment] # tuples have a method of that name
    row: tuple[dict[str, Any], int] | None = None
    counted: bool = True
    repeat: int = 0


def derive_seed(*parts: int | str) -> int:
    """Derive a seed in [0, 2**63) from all parts, the same on every machine."""
    return _digest(repr(parts).encode())


def image_digest(stored: dict[str, Any]) -> int:
    """Return a number that identifies a stored image: a digest of its bytes, or of the end of its path."""
    return _digest(stored["bytes"] or "/".join(Path(stored["path"] or "").parts[-2:]).encode())


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def stored_rows(split: Any, columns: tuple[str, str | None]) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the stored image and the label of every row; the label is 0 without a label column."""
    image, label = columns
    for row in split:
        yield row[image] or NO_IMAGE, row[label] if label else 0


def read_stored(stored: dict[str, Any], least_size: LeastSize | None = None) -> PILImage.Image | Tensor:
    """Read an image that `datasets` stores as `{"bytes", "path"}`; see `read_image`.

    Raises:
        ValueError: If the row has no image, or the image cannot be fetched or decoded.
        OSError: If the file does not exist or cannot be read.
    """
    return read_image(stored_source(stored), least_size)


def stored_source(stored: dict[str, Any]) -> str | bytes:
    """Return the bytes of a stored image, or the path of a local file.

    Raises:
        ValueError: If the row has no image, or the image cannot be fetched.
    """
    source = stored["path"] if stored["bytes"] is None else stored["bytes"]
    if source is None:
        raise ValueError("This row has no image.")
    if isinstance(source, str) and "://" in source:  # in a streamed data set
        import fsspec

        try:
            with fsspec.open(source, "rb") as file:
                source = file.read()
        except Exception as error:  # network clients raise almost anything
            raise ValueError(without_tokens(f"{source} could not be fetched: {error}")) from error
    return source


def upright_size(stored: dict[str, Any]) -> tuple[int, int, int] | None:
    """Return (height, width) of a stored image as it is shown, and the EXIF orientation of its file.

    Only the header is read where Pillow reads the format. `None` if the image cannot be read.
    """
    try:
        source = stored_source(stored)
        try:
            with PILImage.open(BytesIO(source) if isinstance(source, bytes) else source) as opened:
                width, height = opened.size
                orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # of a format that Pillow lacks
            image = read_image(source)
            (height, width), orientation = size_of(image), 1
    except Exception:  # training names and counts what cannot be read
        return None
    return (width, height, orientation) if orientation in TRANSPOSED else (height, width, orientation)


def gray_image(processor: Any) -> Tensor:
    """Return a gray image with the channels that a processor expects, uint8 `[C, H, W]`."""
    return torch.full((3 if processor.do_convert_rgb else len(processor.image_mean), 32, 32), 128, dtype=torch.uint8)


def has_channels(image: PILImage.Image | Tensor, processor: Any) -> bool:
    """Return whether an image has the channels that a processor expects, or can be converted to them."""
    if processor.mode_with_alpha is not None and (
        isinstance(image, PILImage.Image) or (image.dtype == torch.uint8 and len(image) in (1, 3))
    ):
        return True
    return processor.do_convert_rgb or len(processor.image_mean) in (3, channels_in(image))


def channels_in(image: PILImage.Image | Tensor) -> int:
    """Return the number of channels of an image or a tensor `[C, H, W]`."""
    return len(image) if isinstance(image, Tensor) else len(image.getbands())


def name_of(stored: dict[str, Any]) -> str:
    """Return the last two parts of a stored image's path, which reveal little of the machine; `""` without a path."""
    return one_line("/".join(str(stored["path"] or "").replace("\\", "/").split("/")[-2:]))


def preprocess(image: PILImage.Image | Tensor, processor: Any) -> Tensor:
    """Apply an image processor up to normalization: levels `[C, H, W]`, uint8 or, for dark 16-bit images, float32."""
    if not has_channels(image, processor):
        raise ValueError(
            f"Expected an image of {len(processor.image_mean)} channels, got {channels_in(image)}: use files "
            "like those that the model was trained on."
        )
    outputs = processor(
        pixels_of_file(image, processor.do_convert_rgb, processor.value_range),
        input_data_format="channels_first",
        do_rescale=False,
        do_normalize=False,
        return_tensors="pt",
    )
    return outputs["pixel_values"][0]


def normalize(pixels: Tensor, processor: Any) -> Tensor:
    """Normalize levels `[B, C, H, W]`, the results of `preprocess`, as an image processor does, on their device."""
    mean, std = _moments(processor, pixels.device)
    # In place on a copy: allocation costs more than the arithmetic.
    return pixels.to(torch.float32, copy=True).sub_(mean).div_(std)


def levels_of(pixel_values: Tensor, processor: Any) -> Tensor:
    """Return the levels, float32 `[B, C, H, W]`, that `normalize` made pixel values of, on their device."""
    mean, std = _moments(processor, pixel_values.device)
    return pixel_values.to(torch.float32, copy=True).mul_(std).add_(mean)


def _moments(processor: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of an image processor as levels, `[C, 1, 1]`."""
    mean, std = (
        _levels(tuple(values), processor.rescale_factor, device)
        for values in (processor.image_mean, processor.image_std)
    )
    return mean, std


@lru_cache(maxsize=16)
def _levels(values: tuple[float, ...], rescale_factor: float, device: torch.device) -> Tensor:
    """Return values of [0, 1] as levels, `[C, 1, 1]`; kept, since copying them to a GPU waits for it."""
    # Equal values for three channels also fit the single channel of a grayscale model.
    values = values[:1] if len(set(values)) == 1 else values
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(-1, 1, 1) / rescale_factor


class EvaluationImages(torch.utils.data.Dataset):
    """Images of a split by `Visit`, as the processor makes them, uint8 `[C, H, W]`.

    Args:
        split: `train` or `evaluation` of an `ImageData`.
        columns: Names of the columns of images and labels.
        processor: Image processor of the model.
        cache: `"none"`, `"ram"`, or a device. Decoded images are cached there; on a device they are augmented, too.
        cache_limit: Bytes that the cache may take. If the images need more, none is cached.
    """

    def __init__(
        self,
        split: Any,
        columns: tuple[str, str | None],
        processor: Any,
        cache: str | torch.device = "none",
        cache_limit: float = math.inf,
    ) -> None:
        from .opening import as_stored

        self.split, self.columns, self.processor = as_stored(split, columns), columns, processor
        self.cached: Any = None
        self.labels: list[int] = []
        self.cache_seconds = 0.0
        if not hasattr(split, "__len__"):
            if cache != "none":
                raise ValueError("A stream cannot be cached in memory: set cache: none, or streaming: false.")
            return
        self.labels = split[columns[1]][:] if columns[1] else [0] * len(split)
        if unlabelled := sum(label is None or (type(label) is int and label < 0) for label in self.labels):
            raise ValueError(f"{unlabelled} of {len(self.labels)} images have no label: choose another split.")
        if cache != "none":
            self.cached = self._fill_cache(torch.device("cpu" if cache == "ram" else cache), cache_limit)

    def _fill_cache(self, device: torch.device, limit: float) -> CachedImages | None:
        """Return all images, or `None` if they need more bytes than the limit."""
        began = time.perf_counter()
        threads = ThreadPoolExecutor(os.cpu_count())  # decoding releases the GIL
        try:
            images = threads.map(lambda index: self._read(Visit(0, index)), range(len(self)))
            return CachedImages(images, device, limit)
        except MemoryError:
            return None
        finally:
            threads.shutdown(cancel_futures=True)
            self.cache_seconds = time.perf_counter() - began

    @property
    def cached_bytes(self) -> int:
        """The size of the cache."""
        return 0 if self.cached is None else self.cached.nbytes

    def __len__(self) -> int:
        return len(self.split)

    def __getstate__(self) -> dict[str, Any]:
        # A stream may not pickle. A worker that is not forked gets its rows from the sampler.
        return self.__dict__ if hasattr(self.split, "__len__") else {**self.__dict__, "split": None}

    @property
    def is_on_device(self) -> bool:
        return self.cached is not None and any(block.device.type != "cpu" for block in self.cached.blocks)

    def planned(self) -> Self:
        """Return these images, which are cached on a device, with plans in place of their pixels."""
        from .batched_augmentation import PlannedImages

        planned = copy(self)
        planned.cached = PlannedImages(self.cached)
        return planned

    def least_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the smallest (height, width) at which an image of `size` may be decoded."""
        return self.processor.least_size(size)

    def prepare(self, image: PILImage.Image | Tensor) -> Tensor:
        """Convert a decoded image to pixels, the same at every visit."""
        return preprocess(image, self.processor)

    def gray(self) -> Tensor:
        """Return an image without content, which replaces one that cannot be read."""
        return self.prepare(gray_image(self.processor))

    def augment(self, pixels: Tensor, visit: Visit) -> Tensor:
        """Change the pixels of one visit."""
        return pixels

    def example(self, pixels: Tensor, visit: Visit) -> dict[str, Any]:
        """Return the `pixel_values` and `labels` of one visit."""
        return {"pixel_values": pixels, "labels": visit.row[1] if visit.row else self.labels[visit.index]}

    def __getitem__(self, visit: Visit | int) -> dict[str, Any]:
        """Return `pixel_values`, `labels`, `index` (-1 if not counted) and `broken`, a name or `None`.

        An image that cannot be read is gray.
        """
        visit = Visit(0, visit) if isinstance(visit, int) else visit
        pixels = self._read(visit) if self.cached is None else self.cached[visit.index]
        is_broken = pixels is None
        return {
            **self.example(self.augment(self.gray() if pixels is None else pixels, visit), visit),
            "index": visit.index if visit.counted and not is_broken else -1,
            "broken": self._name(visit) if visit.counted and is_broken else None,
        }

    def _stored(self, visit: Visit) -> dict[str, Any]:
        return visit.row[0] if visit.row else self.split[visit.index][self.columns[0]] or NO_IMAGE

    def _read(self, visit: Visit) -> Tensor | None:
        stored = self._stored(visit)
        try:
            image = read_stored(stored, self.least_size)
        except Exception:  # the image is named and counted, and too many of them end the run
            return None
        if not has_channels(image, self.processor):
            return None
        return self.prepare(image)

    def _name(self, visit: Visit) -> str:
        return name_of(self._stored(visit)) or f"image {visit.index}"


class TrainingImages(EvaluationImages):
    """Augmented images of a split.

    Args:
        augmentation: Transform of a uint8 image `[C, H, W]`; it draws from torch's default generator.
        seed: Seed of the run.
        shorter_side: Pixels; larger images are first reduced to this, which also makes the cache smaller.
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
        cache_limit: float = math.inf,
    ) -> None:
        self.augmentation, self.seed, self.shorter_side = augmentation, seed, shorter_side
        self.views: int | None = None  # if stated, epochs repeat the augmentation of the first ones
        self.answers: Callable[[Visit], Tensor] | None = None  # of teachers, in place of labels
        super().__init__(split, columns, processor, cache, cache_limit)

    def least_size(self, size: tuple[int, int]) -> tuple[int, int]:
        gap = self.processor.reducing_gap
        if self.shorter_side is None or gap is None:
            return size
        scale = gap * self.shorter_side / min(size)
        return math.ceil(scale * size[0]), math.ceil(scale * size[1])

    def prepare(self, image: PILImage.Image | Tensor) -> Tensor:
        from torchvision.transforms.v2 import functional as tvF  # prediction does without it

        processor = self.processor
        image = processor.process_image(
            pixels_of_file(image, processor.do_convert_rgb, processor.value_range),
            do_convert_rgb=processor.do_convert_rgb,
            do_grayscale=processor.do_grayscale,
            input_data_format="channels_first",
            value_range=processor.value_range,
        )
        pixels = tvF.pil_to_tensor(image) if isinstance(image, PILImage.Image) else image
        if pixels.is_floating_point():  # a dark 16-bit image; augmentation needs 8 bits
            pixels = pixels.round().to(torch.uint8)
        if self.shorter_side is not None and min(pixels.shape[-2:]) > self.shorter_side:
            pixels = tvF.resize(pixels, [self.shorter_side], antialias=True)
        return pixels

    def augment(self, pixels: Tensor, visit: Visit) -> Tensor:
        state = torch.get_rng_state()
        try:
            repeat = (visit.repeat,) if visit.repeat else ()
            epoch = visit.epoch if self.views is None else visit.epoch % self.views
            torch.default_generator.manual_seed(derive_seed(self.seed, epoch, visit.index, *repeat))
            return self.augmentation(pixels)
        finally:
            torch.set_rng_state(state)

    def example(self, pixels: Tensor, visit: Visit) -> dict[str, Any]:
        example = super().example(pixels, visit)
        return example if self.answers is None else {**example, "labels": self.answers(visit)}


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch of constant size: readable images of it replace those that cannot be read."""
    readable = [example for example in examples if not example.get("broken")] or examples
    chosen = [
        readable[index % len(readable)] if example.get("broken") else example for index, example in enumerate(examples)
    ]
    images: Any = [example["pixel_values"] for example in chosen]
    is_planned = hasattr(images[0], "plan")  # on a device, where the images are cached
    pixels = [image.plan if is_planned else image.contiguous() for image in images]
    return {
        "pixel_values": pixels if is_planned else torch.stack(pixels),
        "labels": _stacked([torch.as_tensor(example["labels"]) for example in chosen]),
        "index": torch.tensor([example.get("index", -1) for example in examples]),
        "broken": [example["broken"] for example in examples if example.get("broken")],
    }


def _stacked(labels: list[Tensor]) -> Tensor:
    """Stack labels. Labels of different lengths, such as boxes, are padded with rows of class -1."""
    if labels[0].ndim == 0 or len({len(each) for each in labels}) == 1:
        return torch.stack(labels)
    return torch.stack([padded(each, max(map(len, labels))) for each in labels])


def padded(objects: Tensor, number: int) -> Tensor:
    """Return rows of class and box, `[N, 5]`, with empty ones up to a number, whose class is -1."""
    empty = objects.new_zeros(number - len(objects), objects.shape[1])
    empty[:, 0] = -1
    return torch.cat([objects, empty])
