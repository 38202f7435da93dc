"""What reads files gives the pixels that Pillow gives."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hf_vit import HFViTImageProcessor, HFViTImageProcessorPil
from hf_vit.model import image_reading_hf_vit as reading
from hf_vit.model.image_reading_hf_vit import read_image

ORIENTATION = 0x0112


def picture(height: int, width: int) -> Image.Image:
    """Return something smooth with some texture, as photographs are."""
    coarse = np.random.default_rng(0).integers(50, 206, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    image.save(file, kind, exif=exif, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    """Return the upright pixels `[H, W, C]`."""
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    return pixels[..., None] if pixels.ndim == 2 else pixels


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request, monkeypatch):
    """Run a test with and without the faster decoder."""
    if request.param == "Pillow":
        monkeypatch.setattr(reading, "simplejpeg", None)
    return request.param


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (33, 17), (61, 120)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_has_pillow_s_pixels(mode, size, orientation):
    for subsampling in (0, 1, 2):
        for is_progressive in (False, True):
            data = encoded(
                picture(*size).convert(mode),
                orientation=orientation,
                subsampling=subsampling,
                progressive=is_progressive,
            )
            pixels = read_image(data)
            assert pixels.dtype == torch.uint8
            np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), by_pillow(data))


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "P"), ("PNG", "I;16"), ("TIFF", "F"), ("JPEG", "CMYK"), ("BMP", "L"), ("WEBP", "RGBA")]
)
def test_other_images_are_as_stored(kind, mode, tmp_path):
    image = picture(20, 30)
    image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else image
    image = image if mode == "I;16" else image.convert(mode)
    path = tmp_path / "image"
    image.save(path, kind)
    read = read_image(path)
    assert isinstance(read, Image.Image)
    np.testing.assert_array_equal(np.asarray(read), np.asarray(Image.open(path)))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("height", "least", "factor"),
    [
        (304, 153, 1),
        (304, 152, 2),
        (304, 77, 2),
        (304, 76, 4),
        (304, 38, 8),
        (304, 1, 8),
        (300, 1, 4),
        (302, 1, 2),
        (303, 1, 1),
    ],
)
def test_a_jpeg_is_reduced_as_far_as_it_serves(decoder, orientation, height, least, factor):
    data = encoded(picture(height, 400), orientation=orientation)

    def least_size(size: tuple[int, int]) -> tuple[int, int]:
        assert size == ((height, 400) if orientation == 1 else (400, height))  # upright
        return least, least

    read = read_image(data, least_size)
    read = ImageOps.exif_transpose(read) if isinstance(read, Image.Image) else read
    size = (read.height, read.width) if isinstance(read, Image.Image) else tuple(read.shape[1:])
    expected = (height // factor, 400 // factor)
    assert size == (expected if orientation == 1 else expected[::-1])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_part_of_a_jpeg_is_an_error(decoder, share):
    data = encoded(picture(100, 100))
    with pytest.raises(ValueError, match="An image given as bytes is"):
        read_image(data[: int(share * len(data))])


@pytest.mark.parametrize("backend", [HFViTImageProcessor, HFViTImageProcessorPil])
def test_processors_take_paths_and_bytes(backend, decoder, tmp_path: Path):
    image, processor = picture(120, 90), backend(size=32)
    data = encoded(image, orientation=6)
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    upright = ImageOps.exif_transpose(Image.open(path))
    expected = processor(upright, return_tensors="pt")["pixel_values"]
    for source in (data, path, str(path)):
        got = processor([source, [source]], reducing_gap=None, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(got, torch.cat([expected, expected]), rtol=0, atol=0)


@pytest.mark.parametrize("backend", [HFViTImageProcessor, HFViTImageProcessorPil])
def test_a_reduced_photograph_is_within_a_level(backend, decoder):
    """The default of `reducing_gap` decodes half of each side here."""
    data = encoded(picture(800, 864), quality=90)
    processor = backend(size=64)
    assert processor.least_size((800, 864)) == (384, 384)
    exact, reduced = (
        processor(data, reducing_gap=gap, do_normalize=False, do_rescale=False, return_tensors="pt")["pixel_values"]
        for gap in (None, processor.reducing_gap)
    )
    difference = (exact.int() - reduced.int()).abs()
    assert difference.max() == 1  # 0 if it had not been reduced


@pytest.mark.parametrize("backend", [HFViTImageProcessor, HFViTImageProcessorPil])
def test_a_gap_below_one_is_an_error(backend):
    with pytest.raises(ValueError, match="reducing_gap of at least 1"):
        backend(size=8, reducing_gap=0.5)(picture(9, 9))
