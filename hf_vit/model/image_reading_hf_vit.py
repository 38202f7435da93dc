"""From the file of an image, or its bytes, to 8-bit pixels: the one place that opens images.

Pillow reads every format. JPEGs, which most photographs are, it hands over pixel by pixel through Python's objects;
simplejpeg, where it is installed, calls the same libjpeg-turbo and gives the same bits as an array; what simplejpeg
will not read is read again by Pillow. Whatever is wrong with a file is a `ValueError` that names it.

An image of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels is refused before it is decoded. This is Pillow's own limit,
which there only warns; the environment's `HF_VIT_MAX_IMAGE_PIXELS` sets it for commands and their processes.
"""

import base64
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

LIMIT = "HF_VIT_MAX_IMAGE_PIXELS"
if LIMIT in os.environ:
    Image.MAX_IMAGE_PIXELS = int(os.environ[LIMIT])
SECONDS_OF_SILENCE = 30  # of a server that an image comes from
LEAST_OF_BASE64, MOST_OF_A_NAME = 40, 4096  # characters: of an image, and of a path

# What brings rows and columns upright, by the number of the EXIF orientation: of an array, and of a PIL image.
UPRIGHT: dict[int, tuple[Callable[[np.ndarray], np.ndarray], Image.Transpose]] = {
    2: (lambda pixels: pixels[:, ::-1], Image.Transpose.FLIP_LEFT_RIGHT),
    3: (lambda pixels: pixels[::-1, ::-1], Image.Transpose.ROTATE_180),
    4: (lambda pixels: pixels[::-1], Image.Transpose.FLIP_TOP_BOTTOM),
    5: (lambda pixels: pixels.swapaxes(0, 1), Image.Transpose.TRANSPOSE),
    6: (lambda pixels: pixels.swapaxes(0, 1)[:, ::-1], Image.Transpose.ROTATE_270),
    7: (lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1), Image.Transpose.TRANSVERSE),
    8: (lambda pixels: pixels.swapaxes(0, 1)[::-1], Image.Transpose.ROTATE_90),
}
LYING = (5, 6, 7, 8)  # whose rows and columns are exchanged

# From an image's (height, width) to the least (height, width) at which it still serves.
LeastSize = Callable[[tuple[int, int]], tuple[int, int]]


def read_image(source: str | os.PathLike | bytes, least_size: LeastSize | None = None) -> Image.Image | Tensor:
    """Read an image from a file, from the bytes of one, or from the web.

    Args:
        source: Path, bytes, URL of http or https, or text in base64, with or without `data:image/...;base64,`.
        least_size: Lets a larger JPEG be decoded at a half, a quarter or an eighth of its sides, which takes a
            fraction of the time, as long as it keeps this size; both are (height, width) upright. All pixels if not
            given.

    Returns:
        A JPEG in color or gray as uint8 `[C, H, W]`, upright, in memory with the channels last; anything else as a
        PIL image as it is stored, in any mode and orientation, the first one where there are several.

    Raises:
        ValueError: If it is no image, not a whole one, or has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels; the
            message begins with the name of the file.
        OSError: If there is no such file, or none that may be read.
    """
    data = source if isinstance(source, bytes) else _bytes_of(source)
    with _errors_named("An image given as bytes" if isinstance(source, bytes) else _short(source), data):
        return _decode(data, least_size)


def upright(image: Image.Image) -> Image.Image:
    """Return a PIL image with its pixels, brought upright.

    Raises:
        ValueError: If it was opened from a file whose pixels cannot be decoded.
    """
    with _errors_named(_short(getattr(image, "filename", "") or "An image")):
        image.load()
    orientation = _orientation_of(image)
    # ImageOps.exif_transpose would also write all EXIF tags anew, and fail at those that it cannot write.
    return image.transpose(UPRIGHT[orientation][1]) if orientation in UPRIGHT else image


# ---------------------------------------------------------------------------------------------- from source to bytes


def _bytes_of(source: str | os.PathLike) -> bytes:
    text = os.fspath(source)
    if is_url(text):
        return download(text)
    is_data = text.startswith("data:")
    if is_data or (len(text) >= LEAST_OF_BASE64 and not os.path.exists(text)):
        try:
            encoded = text.partition(",")[2] if is_data else text
            return base64.b64decode("".join(encoded.split()), validate=True)
        except ValueError:
            if len(text) > MOST_OF_A_NAME:
                raise ValueError(f"{_short(text)} is no name of a file, no URL, and not base64.") from None
    with open(text, "rb") as file:
        return file.read()


def is_url(source: object) -> bool:
    """Say whether an image is to be fetched from the web."""
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def download(url: str, timeout: float = SECONDS_OF_SILENCE) -> bytes:
    """Fetch a file of the web; raise `ValueError` if it is not to be had, or silent for `timeout` seconds."""
    try:
        answer = get_session().get(url, timeout=timeout, follow_redirects=True)
        return answer.raise_for_status().content
    except Exception as error:  # whatever the client of that session raises
        without_password = re.sub("//[^/@]*@", "//", _short(url))
        raise ValueError(f"{without_password} could not be downloaded: {error}") from error


# --------------------------------------------------------------------------------------------- from bytes to pixels


def _decode(data: bytes, least_size: LeastSize | None) -> Image.Image | Tensor:
    with Image.open(io.BytesIO(data)) as image:
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        # MPO is what phones write: a JPEG, and others behind it.
        is_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
        orientation = _orientation_of(image) if is_jpeg else 1
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
                if orientation in UPRIGHT:
                    pixels = UPRIGHT[orientation][0](pixels).copy()
                return torch.from_numpy(pixels).permute(2, 0, 1)
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
        image.load()
        return image


def _orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where none can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # tags may be cut off, or be no tags at all; the pixels are there
        return 1


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


# ------------------------------------------------------------------------------------------------------- what is wrong


@contextmanager
def _errors_named(name: str, data: bytes | None = None) -> Iterator[None]:
    """Make whatever a decoder raises a `ValueError` that says what is wrong with which file."""
    try:
        yield
    except Exception as error:  # decoders raise almost anything
        raise ValueError(f"{name} {_fault(error, data)}") from error


def _fault(error: Exception, data: bytes | None) -> str:
    if data == b"":
        return "is empty: 0 bytes."
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return (
            f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels and may be a decompression bomb: reduce it, or, where "
            f"images can be trusted, set PIL.Image.MAX_IMAGE_PIXELS, or {LIMIT} in the environment."
        )
    if data is not None and isinstance(error, UnidentifiedImageError):
        if data[:512].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
            return "is a page of text, not an image: load the image that it shows."
        return f"is no image, or damaged at its beginning: no format fits its {len(data):,} bytes."
    return f"is damaged, cut off, or of a kind that is not supported ({type(error).__name__}: {error})."


def _short(source: str | os.PathLike) -> str:
    """Return a name as it is, and of text in base64 the beginning."""
    name = os.fspath(source)
    return name if len(name) <= MOST_OF_A_NAME else f"{name[:40]}..."
