"""From the file of an image, or its bytes, to 8-bit pixels: the one place that opens images.

Pillow reads every format. JPEGs, which most photographs are, it hands over pixel by pixel through Python's objects;
simplejpeg, where it is installed, calls the same libjpeg-turbo and gives the same bits as an array. Errors are
Pillow's: what simplejpeg will not read is read again by Pillow.
"""

import io
import os
from collections.abc import Callable

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# What brings rows and columns upright, by the number of the EXIF orientation.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
LYING = (5, 6, 7, 8)  # whose rows and columns are exchanged

# From an image's (height, width) to the least (height, width) at which it still serves.
LeastSize = Callable[[tuple[int, int]], tuple[int, int]]


def read_image(source: str | os.PathLike | bytes, least_size: LeastSize | None = None) -> Image.Image | Tensor:
    """Read an image from a file or from the bytes of one.

    Args:
        source: Path, or bytes.
        least_size: Lets a larger JPEG be decoded at a half, a quarter or an eighth of its sides, which takes a
            fraction of the time, as long as it keeps this size; both are (height, width) upright. All pixels if not
            given.

    Returns:
        A JPEG in color or gray as uint8 `[C, H, W]`, upright, in memory with the channels last; anything else as a
        PIL image as it is stored, in any mode and orientation.

    Raises:
        OSError: If the file cannot be read, or is no image, or not a whole one.
        PIL.Image.DecompressionBombError: If it has more than twice `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    data = source if isinstance(source, bytes) else _bytes_of(source)
    with _open(data, "bytes" if isinstance(source, bytes) else str(source)) as image:
        # MPO is what phones write: a JPEG, and others behind it.
        is_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if is_jpeg else 1
        factor = 1
        if is_jpeg and least_size is not None:
            stored = (image.height, image.width)
            least = least_size(stored[::-1] if orientation in LYING else stored)
            factor = _reduction(stored, least[::-1] if orientation in LYING else least)
        if is_jpeg and simplejpeg is not None:
            try:
                pixels = _decode_jpeg(data, image, factor)
            except ValueError:
                pass  # Pillow takes it all the same, or says what is wrong
            else:
                return _upright(pixels, orientation)
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
        image.load()
        return image


def _bytes_of(path: str | os.PathLike) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _open(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"No format of images fits {name}: {len(data):,} bytes.") from None


def _reduction(size: tuple[int, int], least: tuple[int, int]) -> int:
    """Return the largest factor of 1, 2, 4 and 8 that divides `size` and leaves no less than `least`.

    Where it does not divide, the last pixel would cover what is not there, and the image be stretched.
    """
    for factor in (8, 4, 2):
        if all(side % factor == 0 and side >= factor * enough for side, enough in zip(size, least, strict=True)):
            return factor
    return 1


def _decode_jpeg(data: bytes, image: Image.Image, factor: int) -> np.ndarray:
    colorspace = {"RGB": "RGB", "L": "GRAY"}[image.mode]
    least = {"min_height": image.height // factor, "min_width": image.width // factor} if factor > 1 else {}
    # The slow, exact transforms, which Pillow uses. Strict: a file that is cut off raises.
    return simplejpeg.decode_jpeg(data, colorspace, fastdct=False, fastupsample=False, strict=True, **least)


def _upright(pixels: np.ndarray, orientation: int) -> Tensor:
    if orientation in UPRIGHT:
        pixels = UPRIGHT[orientation](pixels).copy()
    return torch.from_numpy(pixels).permute(2, 0, 1)
