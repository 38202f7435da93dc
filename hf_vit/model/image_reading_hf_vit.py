"""Reading of images from files, bytes and URLs.

Pillow reads all formats except NumPy arrays and TIFFs that it has no mode for; see `image_arrays_hf_vit` for these. It
reads HEIC if pillow-heif is installed. JPEG is read with simplejpeg if it is installed: it calls the same
libjpeg-turbo and returns the same values as an array, without Pillow's copies. Pillow reads the files that simplejpeg
rejects. Any problem with a file raises a `ValueError` that names the file.

An image with more than `PIL.Image.MAX_IMAGE_PIXELS` pixels is rejected before decoding, whereas Pillow only warns. The
environment variable `HF_VIT_MAX_IMAGE_PIXELS` sets this limit for commands and their processes.
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

from .image_arrays_hf_vit import (
    BITS,
    NeedsTifffile,
    decode_deep_png,
    decode_numpy,
    decode_tiff,
    eight_bits_as_sixteen,
    is_deep_png,
    is_numpy,
    is_tiff,
    needs_tifffile,
)

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

LIMIT = "HF_VIT_MAX_IMAGE_PIXELS"
if LIMIT in os.environ:
    Image.MAX_IMAGE_PIXELS = int(os.environ[LIMIT])
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
DOWNLOAD_TIMEOUT = 30  # seconds without a response from the server
MIN_BASE64_LENGTH, MAX_PATH_LENGTH = 40, 4096  # characters

# By EXIF orientation: the operation on an array and on a PIL image that turns the pixels upright.
UPRIGHT: dict[int, tuple[Callable[[np.ndarray], np.ndarray], Image.Transpose]] = {
    2: (lambda pixels: pixels[:, ::-1], Image.Transpose.FLIP_LEFT_RIGHT),
    3: (lambda pixels: pixels[::-1, ::-1], Image.Transpose.ROTATE_180),
    4: (lambda pixels: pixels[::-1], Image.Transpose.FLIP_TOP_BOTTOM),
    5: (lambda pixels: pixels.swapaxes(0, 1), Image.Transpose.TRANSPOSE),
    6: (lambda pixels: pixels.swapaxes(0, 1)[:, ::-1], Image.Transpose.ROTATE_270),
    7: (lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1), Image.Transpose.TRANSVERSE),
    8: (lambda pixels: pixels.swapaxes(0, 1)[::-1], Image.Transpose.ROTATE_90),
}
TRANSPOSED = (5, 6, 7, 8)  # orientations that exchange height and width


class NamedBytes(bytes):
    """Bytes of a file, with its name for error messages."""

    name: str


# Maps the (height, width) of an image to the smallest (height, width) that it may be decoded at.
LeastSize = Callable[[tuple[int, int]], tuple[int, int]]


def read_image(source: str | os.PathLike | bytes, least_size: LeastSize | None = None) -> Image.Image | Tensor:
    """Read an image from a file, bytes, or the web.

    Args:
        source: Path, encoded bytes, http or https URL, or base64 text with or without `data:image/...;base64,`.
        least_size: Permits decoding a JPEG at 1/2, 1/4 or 1/8 of its size, which takes a fraction of the time, if at
            least this size remains; sizes are (height, width) of the upright image. Default: decode all pixels.

    Returns:
        An RGB or grayscale JPEG as upright uint8 `[C, H, W]`, channels last in memory. A NumPy file, a TIFF with 2
        or more than 3 channels without transparency, and 16-bit colors as `[C, H, W]` of the stored dtype. Any other
        image as a PIL image in its stored mode and orientation; the first frame if there are several.

    Raises:
        ValueError: If the source is not an image, is corrupt, or has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels;
            the message starts with the name of the file.
        OSError: If the file does not exist or cannot be read.
    """
    data = source if isinstance(source, bytes) else _bytes_of(source)
    name = getattr(source, "name", "An image given as bytes") if isinstance(source, bytes) else _short(source)
    with _errors_named(name, data):
        return _decode(data, least_size)


def upright(image: Image.Image) -> Image.Image:
    """Load a PIL image and turn it upright.

    Raises:
        ValueError: If the file that it was opened from cannot be decoded.
    """
    with _errors_named(_short(getattr(image, "filename", "") or "An image")):
        image.load()
    orientation = _orientation_of(image)
    # ImageOps.exif_transpose also rewrites all EXIF tags, and fails at those that it cannot write.
    return image.transpose(UPRIGHT[orientation][1]) if orientation in UPRIGHT else image


def _bytes_of(source: str | os.PathLike) -> bytes:
    text = os.fspath(source)
    if is_url(text):
        return download(text)
    is_data = text.startswith("data:")
    if is_data or (len(text) >= MIN_BASE64_LENGTH and not os.path.exists(text)):
        try:
            encoded = text.partition(",")[2] if is_data else text
            return base64.b64decode("".join(encoded.split()), validate=True)
        except ValueError:
            if len(text) > MAX_PATH_LENGTH:
                raise ValueError(f"{_short(text)} is not a path, a URL or base64.") from None
    with open(text, "rb") as file:
        return file.read()


def is_url(source: object) -> bool:
    """Return whether an image is an http or https URL."""
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def download(url: str, timeout: float = DOWNLOAD_TIMEOUT) -> NamedBytes:
    """Download a file; raise `ValueError` on failure or after `timeout` seconds without a response."""
    name = re.sub("//[^/@]*@", "//", _short(url))  # without a password
    try:
        response = get_session().get(url, timeout=timeout, follow_redirects=True)
        data = NamedBytes(response.raise_for_status().content)
    except Exception as error:  # the HTTP client of huggingface_hub can be replaced
        raise ValueError(f"{name} could not be downloaded: {error}") from error
    data.name = name
    return data


def is_heic(data: bytes) -> bool:
    """Return whether a file starts like HEIC or HEIF, the format of phones; False for the similar AVIF."""
    return data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS


def can_read_heic() -> bool:
    """Enable Pillow to open HEIC files; return whether pillow-heif, which this needs, is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _decode(data: bytes, least_size: LeastSize | None) -> Image.Image | Tensor:
    if is_numpy(data):
        return decode_numpy(data)
    try:
        opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if is_tiff(data):
            return decode_tiff(data)
        if not (is_heic(data) and can_read_heic()):
            raise
        opened = Image.open(io.BytesIO(data))
    with opened as image:
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        if image.format == "TIFF" and needs_tifffile(image):
            return _decode_tiff(data, image)
        if is_deep_png(image):
            return decode_deep_png(data, image)
        # Phones write MPO: a JPEG followed by further JPEGs.
        is_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
        orientation = _orientation_of(image) if is_jpeg else 1
        factor = 1
        if is_jpeg and least_size is not None:
            stored = (image.height, image.width)
            least = least_size(stored[::-1] if orientation in TRANSPOSED else stored)
            factor = _reduction(stored, least[::-1] if orientation in TRANSPOSED else least)
        if is_jpeg and simplejpeg is not None:
            try:
                pixels = _decode_jpeg(data, image, factor)
            except ValueError:
                pass  # Pillow may accept the file; otherwise it reports the problem
            else:
                if orientation in UPRIGHT:
                    pixels = UPRIGHT[orientation][0](pixels).copy()
                return torch.from_numpy(pixels).permute(2, 0, 1)
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
        image.load()
        return image


def _decode_tiff(data: bytes, image: Image.Image) -> Tensor:
    """Decode a TIFF whose channels or bits Pillow would drop; without tifffile, colors may lose their lower bits."""
    try:
        pixels = decode_tiff(data)
    except NeedsTifffile:
        bits = getattr(image, "tag_v2", {}).get(BITS, ())
        if image.mode != "RGB" or getattr(image, "n_frames", 1) > 1 or len(bits) != 3:
            raise
        return eight_bits_as_sixteen(image)
    orientation = _orientation_of(image)
    if orientation in UPRIGHT:
        turned = UPRIGHT[orientation][0](pixels.permute(1, 2, 0).numpy()).copy()
        pixels = torch.from_numpy(turned).permute(2, 0, 1)
    return pixels


def _orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, or 1 if it cannot be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # truncated or invalid tags do not affect the pixels
        return 1


def _reduction(size: tuple[int, int], least: tuple[int, int]) -> int:
    """Return the largest factor of 1, 2, 4 and 8 that divides `size` and leaves at least `least`.

    With a factor that does not divide `size`, the last pixel would extend beyond the image and stretch it.
    """
    for factor in (8, 4, 2):
        if all(side % factor == 0 and side >= factor * enough for side, enough in zip(size, least, strict=True)):
            return factor
    return 1


def _decode_jpeg(data: bytes, image: Image.Image, factor: int) -> np.ndarray:
    colorspace = {"RGB": "RGB", "L": "GRAY"}[image.mode]
    least = {"min_height": image.height // factor, "min_width": image.width // factor} if factor > 1 else {}
    # Use the slow, exact transforms, as Pillow does. With `strict`, a truncated file raises an error.
    return simplejpeg.decode_jpeg(data, colorspace, fastdct=False, fastupsample=False, strict=True, **least)


@contextmanager
def _errors_named(name: str, data: bytes | None = None) -> Iterator[None]:
    """Convert any exception of a decoder to a `ValueError` that names the file and the problem."""
    try:
        yield
    except Exception as error:  # decoders raise almost anything
        raise ValueError(f"{name} {_fault(error, data)}") from error


def _fault(error: Exception, data: bytes | None) -> str:
    if data == b"":
        return "is empty: 0 bytes."
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return (
            f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels and may be a decompression bomb: resize it, or, if you "
            f"trust your images, set PIL.Image.MAX_IMAGE_PIXELS or the environment variable {LIMIT}."
        )
    if isinstance(error, NeedsTifffile):
        return (
            "is a TIFF that Pillow cannot read, such as one of several channels, or is corrupt: "
            'install tifffile with pip install "hf-vit[tiff]".'
        )
    if data is not None and isinstance(error, UnidentifiedImageError):
        if is_heic(data) and not can_read_heic():
            return "is a HEIC image: install pillow-heif to read it, or convert it to JPEG."
        if data[:512].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
            return "is a web page or SVG, not a bitmap image: use the image that the page shows."
        return f"is not an image: no image format matches its {len(data):,} bytes."
    return f"is corrupt, truncated or in an unsupported format ({type(error).__name__}: {error})."


def _short(source: str | os.PathLike) -> str:
    """Return a path unchanged, and only the beginning of base64 text."""
    name = os.fspath(source)
    return name if len(name) <= MAX_PATH_LENGTH else f"{name[:40]}..."
