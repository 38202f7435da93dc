"""Reading of files whose pixels Pillow cannot hold: NumPy arrays, TIFF of any number of channels, 16-bit colors.

tifffile and imagecodecs (`pip install "hf-vit[tiff]"`) are imported when a file needs them. Sizes are checked before
pixels are decoded.
"""

import io
import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NUMPY_MAGIC = b"\x93NUMPY"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF
# Tags of TIFF 6.0.
BITS, PHOTOMETRIC, DESCRIPTION, SAMPLES, EXTRA_SAMPLES = 258, 262, 270, 277, 338
CMYK = 5  # photometric interpretation
ALPHA = ((1,), (2,))  # values of EXTRA_SAMPLES for transparency; others are measurements
MAX_VALUES_PER_PIXEL = 4  # of an image with MAX_IMAGE_PIXELS pixels; smaller images may have more channels


class NeedsTifffile(ValueError):
    """The file is a TIFF that only tifffile reads, and tifffile is not installed."""


def is_numpy(data: bytes) -> bool:
    """Return whether a file is an array that `numpy.save` wrote."""
    return data.startswith(NUMPY_MAGIC)


def is_tiff(data: bytes) -> bool:
    """Return whether a file starts like TIFF or BigTIFF."""
    return data.startswith(TIFF_MAGIC)


def decode_numpy(data: bytes) -> Tensor:
    """Return the array of a `.npy` file as `[C, H, W]` of its own dtype; see `channels_axis` for its layout.

    Raises:
        ValueError: If it does not hold numbers, is truncated, or is not an image.
        Image.DecompressionBombError: If it has too many pixels.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.kind not in "buif":
        raise ValueError(f"expected an array of numbers, got dtype {dtype}")
    check_shape(shape)
    if math.prod(shape) * dtype.itemsize > len(data) - file.tell():
        raise ValueError(f"the array of shape {shape} is truncated")
    return channels_first_of(np.load(io.BytesIO(data), allow_pickle=False))


def channels_axis(shape: tuple[int, ...]) -> int:
    """Return the axis of the channels, 0 or 2, of an image of shape (C, H, W) or (H, W, C).

    If only one of these axes has 1, 3 or 4 entries, it is that one; otherwise the one that leaves a square image;
    otherwise the shorter one.
    """
    first, middle, last = shape
    usual = [axis for axis in (0, 2) if shape[axis] in (1, 3, 4)]
    if len(usual) == 1:
        return usual[0]
    if (first == middle) != (middle == last):
        return 2 if first == middle else 0
    if first == last and first != middle:
        raise ValueError(f"the shape {shape} may be (channels, height, width) or (height, width, channels)")
    return 0 if first <= last else 2


def channels_first_of(array: np.ndarray) -> Tensor:
    """Return an image (H, W), (C, H, W) or (H, W, C) as a tensor `[C, H, W]` of the same dtype."""
    if array.ndim == 2:
        array = array[None]
    elif channels_axis(array.shape) == 2:
        array = array.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))


def check_shape(shape: tuple[int, ...]) -> None:
    """Raise an error if an array is not an image, or has too many pixels."""
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(
            f"expected shape (height, width), (channels, height, width) or (height, width, channels), got {shape}"
        )
    limit = Image.MAX_IMAGE_PIXELS
    pixels = math.prod(shape) if len(shape) == 2 else math.prod(shape) // shape[channels_axis(shape)]
    if limit is not None and (pixels > limit or math.prod(shape) > MAX_VALUES_PER_PIXEL * limit):
        raise Image.DecompressionBombError


def needs_tifffile(image: Image.Image) -> bool:
    """Return whether Pillow opens a TIFF but would drop channels or bits of it."""
    tags: Any = getattr(image, "tag_v2", {})
    samples, bits = tags.get(SAMPLES, 1), tags.get(BITS, (1,))
    if samples == 1:
        text = str(tags.get(DESCRIPTION, ""))
        # tifffile and ImageJ write one page per channel.
        return ('"shape"' in text or text.startswith("ImageJ")) and getattr(image, "n_frames", 1) > 1
    if set(bits) != {8}:
        return True
    is_color = samples == 3 or (samples == 4 and tags.get(PHOTOMETRIC) == CMYK)
    return not is_color and tuple(tags.get(EXTRA_SAMPLES, ())) not in ALPHA


def decode_tiff(data: bytes) -> Tensor:
    """Return the first image of a TIFF as `[C, H, W]` of its own dtype; pages that store channels become channels.

    Raises:
        NeedsTifffile: If tifffile is not installed.
        ValueError: If it is not an image.
        Image.DecompressionBombError: If it has too many pixels.
    """
    try:
        import tifffile
    except ImportError:
        raise NeedsTifffile from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        axes, shape = series.axes, series.shape
        # Q is an axis that tifffile wrote without a name; other axes are time, depth or further images.
        kept = tuple(size if axis in "YXSCQ" else 1 for axis, size in zip(axes, shape, strict=True))
        check_shape(tuple(size for size in kept if size > 1) if len(kept) > 3 else kept)
        array = series.asarray()
        array = array[tuple(slice(None) if axis in "YXSCQ" else 0 for axis in axes)]
        axes = "".join(axis for axis in axes if axis in "YXSCQ")
    if array.ndim > 3:
        array, axes = array.squeeze(), "".join(a for a, size in zip(axes, array.shape, strict=True) if size > 1)
    if array.ndim == 3 and "Q" not in axes:  # the file states which axis has the channels
        array = np.moveaxis(array, next(index for index, axis in enumerate(axes) if axis in "SC"), 0)
        return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    return channels_first_of(array)


def is_deep_png(image: Image.Image) -> bool:
    """Return whether a PNG has 16-bit colors; Pillow would keep only 8 bits of them."""
    return image.format == "PNG" and any("RGB;16B" in str(tile) for tile in getattr(image, "tile", ()))


def decode_deep_png(data: bytes, image: Image.Image) -> Tensor:
    """Return a PNG with 16-bit colors as uint16 `[3, H, W]`; without imagecodecs, the lower 8 bits are lost."""
    try:
        import imagecodecs
    except ImportError:
        return eight_bits_as_sixteen(image)
    return torch.from_numpy(imagecodecs.png_decode(data)).permute(2, 0, 1)


def eight_bits_as_sixteen(image: Image.Image) -> Tensor:
    """Return 16-bit colors as uint16 `[3, H, W]`, scaled from the 8 bits that Pillow keeps."""
    return torch.from_numpy(np.array(image.convert("RGB")).astype(np.uint16) * 257).permute(2, 0, 1)
