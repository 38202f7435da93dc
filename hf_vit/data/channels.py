"""What the pixels of a data set are: number of channels, value range, mean and standard deviation.

Photographs need none of this: they have 8 bits, and a model's preset knows their mean. Measurements do, such as
microscopy and satellite images, or 12 bits in a file of 16.
"""

import io
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..model.image_conversion_hf_vit import map_range
from .images import NO_IMAGE, name_of, read_stored
from .opening import as_stored

PERCENTILES = (0.1, 99.9)  # of each channel: a hot pixel does not decide the range
PIXELS_PER_IMAGE = 16_384  # that are taken into account
PHOTO_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


@dataclass(frozen=True)
class Channels:
    """The pixels of a data set.

    Attributes:
        num_channels: 3 for gray and colour images, with or without transparency; otherwise the channels of the files.
        value_range: For 16-bit integers and floats, the values of black and white, one pair or one per channel; `None`
            for 8-bit images.
        mean, std: Per channel, in 0..1 after mapping from `value_range`; `None` where `num_channels` is 3.
    """

    num_channels: int = 3
    value_range: list[list[float]] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


def channels_of(split: Any, columns: tuple[str, str | None], sample: int = 64) -> Channels:
    """Return what the pixels of a split are, from a sample of its images; unreadable ones are skipped.

    Args:
        split: `train` or `evaluation` of an `ImageData`.
        columns: Names of the columns of images and labels.
        sample: Number of images to read: evenly spaced ones, or the first ones of a stream.

    Raises:
        ValueError: If images have different numbers of channels; two files are named.
    """
    first: dict[int, str] = {}  # by number of channels, the name of a file
    pixels: list[Tensor] = []  # [C, some pixels] of images that are no 8-bit photographs
    has_photos = False
    for number, stored in enumerate(_sample(split, columns, sample)):
        if _is_photo(stored):
            channels, has_photos = 3, True
        else:
            try:
                image = read_stored(stored)
            except Exception:  # training names and counts what cannot be read
                continue
            values = _values(image)
            channels = 3 if len(values) in (1, 3) else len(values)
            if channels != 3 or values.dtype not in (torch.uint8, torch.bool):
                pixels.append(values)
            else:
                has_photos = True
        first.setdefault(channels, name_of(stored) or f"image {number}")
        if len(first) > 1:
            (a, one), (b, other) = first.items()
            raise ValueError(
                f"Expected images with the same number of channels, got {one} with {a} and {other} with {b}: "
                "use files of one kind."
            )
    if not pixels or has_photos:  # 8-bit photographs keep their range, among which some 16-bit ones have theirs
        return Channels()
    return _measured(next(iter(first)), pixels)


def adapt_processor(processor: Any, channels: Channels, num_channels: int | None = None) -> None:
    """Set the channels of an image processor, and what follows from the data.

    A value range that the processor has already stays: its model was trained with it. So do a mean and a standard
    deviation per channel.

    Args:
        processor: The processor of a preset or a checkpoint; it is changed.
        channels: The result of `channels_of`.
        num_channels: Channels of the model; those of the data by default.

    Raises:
        ValueError: If the model cannot take the images.
    """
    number = num_channels or channels.num_channels
    of_data = channels.num_channels
    # Gray and colour images serve models of 1 and 3 channels, and those with transparency models of 2 and 4.
    if number != of_data and not (of_data == 3 and number in (1, 2, 4)):
        raise ValueError(
            f"The images have {of_data} channels, but the model has num_channels={number}: set "
            f"model_config.num_channels to {of_data}."
        )
    processor.set_num_channels(number)
    has_own = len(set(processor.image_mean)) > 1  # of a checkpoint for such images
    if channels.mean is not None and channels.std is not None and number == of_data and not has_own:
        processor.image_mean, processor.image_std = list(channels.mean), list(channels.std)
    if processor.value_range is None:
        processor.value_range = channels.value_range


def _sample(split: Any, columns: tuple[str, str | None], sample: int) -> Iterator[dict[str, Any]]:
    rows = as_stored(split, columns).select_columns([columns[0]])
    if hasattr(rows, "__len__"):
        chosen = sorted({index * len(rows) // sample for index in range(sample)} if len(rows) else ())
        return (row[columns[0]] or NO_IMAGE for row in rows.select(chosen))
    return (row[columns[0]] or NO_IMAGE for row in islice(rows, sample))


def _is_photo(stored: dict[str, Any]) -> bool:
    """Return whether the header of a file alone says that it is an 8-bit photograph."""
    source = stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
    with suppress(Exception), Image.open(source) as image:
        has_8_bits = image.mode in PHOTO_MODES and "16" not in str(image.tile)
        return has_8_bits and image.format != "TIFF"
    return False


def _values(image: Image.Image | Tensor) -> Tensor:
    """Return some pixels of an image, `[C, pixels]`: rows and columns at equal distances."""
    if isinstance(image, Image.Image):
        if image.mode in PHOTO_MODES:
            return torch.zeros(3, 1, dtype=torch.uint8)
        image = torch.from_numpy(np.array(image))[None]
    step = max(1, math.isqrt(image.shape[1] * image.shape[2] // PIXELS_PER_IMAGE))
    return image[:, ::step, ::step].flatten(1)


def _measured(num_channels: int, pixels: list[Tensor]) -> Channels:
    """Return range, mean and standard deviation of images that are no 8-bit photographs."""
    number = len(pixels[0]) if all(len(values) == len(pixels[0]) for values in pixels) else 1
    together = [values.double() if len(values) == number else values.double().flatten()[None] for values in pixels]
    values = torch.cat(together, dim=1).numpy()  # [C, pixels]
    value_range = None
    if any(part.dtype not in (torch.uint8, torch.bool) for part in pixels):
        least_step = 0.0 if any(part.is_floating_point() for part in pixels) else 1.0
        value_range = [_range_of(channel[np.isfinite(channel)], least_step) for channel in values]
        if num_channels == 3:  # one range for all colours keeps their balance
            value_range = [[min(low for low, _ in value_range), max(high for _, high in value_range)]]
    if num_channels == 3:
        return Channels(3, value_range)
    scale = value_range or [[0.0, 255.0]]
    mapped = map_range(torch.from_numpy(values)[:, None], scale, None, "channels_first").double() / 255
    mean, std = mapped.mean((1, 2)), mapped.std((1, 2), correction=0).clamp(min=1 / 255)
    return Channels(num_channels, value_range, _rounded(mean), _rounded(std))


def _range_of(values: np.ndarray, least_step: float) -> list[float]:
    """Return the percentiles of some values, widened to two digits of their distance and multiples of `least_step`."""
    if not len(values):
        return [0.0, 1.0]
    low, high = (float(value) for value in np.percentile(values, PERCENTILES))
    step = max(least_step, 10.0 ** (math.floor(math.log10(high - low)) - 1) if high > low else 1.0)
    widened = [math.floor(low / step) * step, math.ceil(high / step) * step]
    if widened[0] == widened[1]:
        widened[1] += step
    return [float(f"{value:.12g}") for value in widened]


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
