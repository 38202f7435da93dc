"""Both image processors: any input gives the same pixels, and presets and stock files give those of their sources."""

import base64
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from isolated import python
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from transformers import AutoImageProcessor, pipeline
from transformers.models.deit import DeiTImageProcessor
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit import ViTImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTImageProcessor, HFViTImageProcessorPil
from hf_vit.model.image_processing_pil_hf_vit import PRESETS, convert_to_rgb

BACKENDS = [HFViTImageProcessor, HFViTImageProcessorPil]
both_backends = pytest.mark.parametrize("backend", BACKENDS, ids=["torchvision", "pil"])
PHOTOS = sorted((Path(__file__).parents[2] / "shared" / "data" / "photos").glob("*.JPEG"))[:12]

LEVELS: dict[str, Any] = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
MODES += ["I", "I;16", "I;16B", "F"]


def noise(height: int, width: int, channels: int = 3, seed: int = 0, contrast: bool = False) -> np.ndarray:
    """White noise; with `contrast` black and white only, which is the worst that a resize can get."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, channels), dtype=np.uint8)
    return np.where(pixels > 127, 255, 0).astype(np.uint8) if contrast else pixels


def image_of_mode(mode: str, height: int = 6, width: int = 9, contrast: bool = False) -> Image.Image:
    rgba = noise(height, width, 4, contrast=contrast)
    gray = Image.fromarray(rgba[..., 0])
    if mode in ("I;16", "I;16B"):
        sixteen = rgba[..., 0].astype(np.uint16) * 257
        return Image.frombytes(mode, (width, height), sixteen.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    if mode == "I":
        return Image.fromarray(rgba[..., 0].astype(np.int32) * 257)
    if mode == "La":
        return Image.fromarray(rgba[..., 2:], "LA").convert("La")
    if mode == "PA":
        return Image.frombytes("PA", (width, height), rgba[..., 2:].tobytes())
    if mode == "LAB":
        return Image.frombytes("LAB", (width, height), rgba[..., :3].tobytes())
    if mode in ("1", "F"):
        return gray.convert(mode)
    return Image.fromarray(rgba).convert("RGB" if mode in ("CMYK", "YCbCr", "HSV", "P") else "RGBA").convert(mode)


def levels(processor: Any, images: Any, **kwargs: Any) -> Tensor:
    pixels = processor(images, **{**LEVELS, **kwargs}).pixel_values
    assert pixels.is_contiguous()
    return pixels.float()


def difference(first: Tensor, second: Tensor) -> float:
    assert first.shape == second.shape and first.dtype == second.dtype
    return (first - second).abs().max().item()


# ------------------------------------------------------------------------------------------- the backends agree


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    mode=st.sampled_from(MODES),
    height=st.integers(1, 90),
    width=st.integers(1, 200),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    preset=st.sampled_from(list(PRESETS)),
    resample=st.sampled_from([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC]),
    contrast=st.booleans(),
)
def test_backends_agree_within_one_level(
    mode: str, height: int, width: int, size: tuple[int, int], preset: str, resample: int, contrast: bool
) -> None:
    image = image_of_mode(mode, height, width, contrast)
    first, second = (levels(backend.from_preset(preset, size, resample=resample), image) for backend in BACKENDS)
    assert first.shape == (1, 3, *size)
    assert difference(first, second) <= 1


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (200, 1), (300, 40), (40, 300), (375, 500), (64, 64), (224, 224)])
def test_backends_agree_at_full_size(shape: tuple[int, int], preset: str, contrast: bool) -> None:
    image = Image.fromarray(noise(*shape, contrast=contrast))
    first, second = (levels(backend.from_preset(preset), image) for backend in BACKENDS)
    assert difference(first, second) <= 1


@pytest.mark.skipif(not PHOTOS, reason="no photos beside the project")
@pytest.mark.parametrize("preset", PRESETS)
def test_backends_agree_on_photos(preset: str) -> None:
    images = [Image.open(path) for path in PHOTOS]
    first, second = (backend.from_preset(preset)(images, return_tensors="pt").pixel_values for backend in BACKENDS)
    level = 1 / 255 / min(PRESETS[preset]["image_std"])
    assert difference(first, second) <= level + 1e-5


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("num_channels", [1, 3])
def test_tensors_are_resized_within_one_level_of_images(preset: str, num_channels: int) -> None:
    """The way of an accelerator's tensors, taken on the CPU."""
    image = Image.fromarray(noise(130, 70, contrast=True)).convert("RGB" if num_channels == 3 else "L")
    processor = HFViTImageProcessor.from_preset(preset, (64, 96), num_channels)
    pixels = torch.from_numpy(np.array(image)).view(130, 70, num_channels).permute(2, 0, 1)
    fields = {name: getattr(processor, name) for name in processor.valid_kwargs.__annotations__}
    resized = processor._preprocess([pixels], **{**fields, **LEVELS}).pixel_values
    assert difference(levels(processor, image), resized.float()) <= 1


@pytest.mark.parametrize("preset", PRESETS)
def test_images_of_an_accelerator_are_resized_by_shape(preset: str) -> None:
    """A device that computes nothing, where there is no other: the shapes must come out."""
    processor = HFViTImageProcessor.from_preset(preset, (32, 48))
    images = [torch.zeros(3, *size, dtype=torch.uint8) for size in [(40, 60), (9, 7), (40, 60)]]
    for batch in (images, torch.stack(images[::2]), [Image.new("RGBA", (5, 6)), images[0]]):
        pixels = processor(batch, device="meta", return_tensors="pt").pixel_values
        assert pixels.shape == (len(batch), 3, 32, 48)
        assert (pixels.device.type, pixels.dtype) == ("meta", torch.float32)


@pytest.mark.parametrize("preset", PRESETS)
def test_floats_are_resized_within_one_level_of_images(preset: str) -> None:
    pixels = noise(130, 70, contrast=True)
    for backend in BACKENDS:
        processor = backend.from_preset(preset, (64, 96), image_mean=0.0, image_std=1 / 255)
        expected = processor(pixels, return_tensors="pt").pixel_values
        for image in (pixels / 255.0, torch.from_numpy(pixels).half()):
            pixel_values = processor(image, return_tensors="pt").pixel_values
            # Half a level by the rounding between the passes, with weights of at most 1.25, and half by the last one.
            assert difference(expected, pixel_values) <= 1.126


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    channels=st.sampled_from([1, 3, 4]),
    preset=st.sampled_from(list(PRESETS)),
    num_channels=st.sampled_from([1, 3]),
)
def test_backends_agree_on_floats(height: int, width: int, channels: int, preset: str, num_channels: int) -> None:
    image = noise(height, width, channels).astype(np.float32) / 255
    first, second = (
        backend.from_preset(preset, (40, 56), num_channels, image_mean=0.5, image_std=0.25)(
            image, return_tensors="pt", input_data_format="channels_last"
        ).pixel_values
        for backend in BACKENDS
    )
    assert first.shape == (1, num_channels, 40, 56)
    assert difference(first, second) < 1e-3


# --------------------------------------------------------------------------------- presets are those of their sources


@pytest.mark.parametrize("preset", ["timm", "center_crop"])
@pytest.mark.parametrize("size", [(224, 224), (96, 160), (97, 61)])
@pytest.mark.parametrize("shape", [(375, 500), (301, 200), (80, 333)])
def test_presets_equal_timm(preset: str, size: tuple[int, int], shape: tuple[int, int]) -> None:
    timm_data = pytest.importorskip("timm.data")
    values = PRESETS[preset]
    transform = timm_data.create_transform(
        (3, *size),
        interpolation="bicubic",
        crop_pct=values["crop_pct"],
        mean=values["image_mean"],
        std=values["image_std"],
    )
    image = Image.fromarray(noise(*shape))
    expected = transform(image)[None]
    pil = HFViTImageProcessorPil.from_preset(preset, size)(image, return_tensors="pt").pixel_values
    torchvision = HFViTImageProcessor.from_preset(preset, size)(image, return_tensors="pt").pixel_values
    assert difference(pil, expected) < 1e-6
    assert difference(torchvision, expected) <= 1 / 255 / min(values["image_std"]) + 1e-5


@both_backends
def test_original_is_a_plain_resize_to_minus_one_to_one(backend: Any) -> None:
    image = Image.fromarray(noise(50, 90))
    pixels = backend.from_preset("original", (50, 90))(image, return_tensors="pt").pixel_values
    expected = torch.from_numpy((noise(50, 90).astype(np.float32) - 127.5) / 127.5).permute(2, 0, 1)
    torch.testing.assert_close(pixels[0], expected, atol=1e-6, rtol=0)


@both_backends
def test_presets_by_name(backend: Any) -> None:
    assert backend.from_preset("timm").to_dict()["crop_pct"] == 0.9
    assert backend.from_preset("timm", 384, crop_pct=1.0).crop_pct == 1.0
    assert dict(backend.from_preset("original", (96, 160)).size) == {"height": 96, "width": 160}
    assert backend().to_dict() == backend.from_preset("original").to_dict()
    with pytest.raises(ValueError, match="original, timm, center_crop"):
        backend.from_preset("tim")
    with pytest.raises(TypeError):
        PRESETS["timm"]["crop_pct"] = 1.0  # type: ignore[index]


STOCK = {  # preprocessor_config.json of google/vit-base-patch16-224 (old and new), facebook/deit-base-patch16-224
    "old vit": {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "size": 224,
    },
    "vit": {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "ViTImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 224, "width": 224},
    },
    "old deit": {
        "crop_size": 224,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "DeiTFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 256,
    },
    "shortest edge, odd margin": {
        "crop_size": {"height": 223, "width": 201},
        "do_center_crop": True,
        "image_processor_type": "ViTImageProcessor",
        "resample": 3,
        "size": {"shortest_edge": 224},
    },
    "crop larger than the image": {
        "crop_size": {"height": 255, "width": 98},
        "do_center_crop": True,
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 200, "width": 120},
    },
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_files_give_stock_pixels(name: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(STOCK[name]))
    image = Image.fromarray(noise(300, 401))
    stock = (
        (DeiTImageProcessor, DeiTImageProcessorPil) if "deit" in name else (ViTImageProcessor, ViTImageProcessorPil)
    )
    for ours, theirs, levels_apart in zip(BACKENDS, stock, (2, 0), strict=True):
        pixels = ours.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values
        expected = theirs.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values
        if "larger" in name:  # stock's PIL backend pads an odd margin to the other side
            expected = ViTImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values
            levels_apart = 1
        assert difference(pixels, expected) <= levels_apart / 255 / 0.22 + 1e-5


@both_backends
def test_output_size_can_be_set(backend: Any) -> None:
    image = Image.fromarray(noise(70, 90))
    processors = [
        backend.from_preset("original"),
        backend.from_preset("timm"),
        backend(size=256, do_center_crop=True, crop_size=224),
        backend(size={"shortest_edge": 256}, do_center_crop=True, crop_size=224),
    ]
    for processor in processors:
        processor.set_output_size((32, 64))
        assert levels(processor, image).shape == (1, 3, 32, 64)
    assert dict(processors[2].size) == {"height": 37, "width": 73}
    assert dict(processors[3].size) == {"shortest_edge": 73}


# ------------------------------------------------------------------------------------------------------- PIL images


def with_transparency(mode: str, transparency: Any) -> Image.Image:
    """A PNG, read back, whose only colour is the one that tRNS makes transparent."""
    image = Image.new(mode, (3, 2), 0)
    if mode == "P":
        image.putpalette([200, 100, 0] * 2)
    file = BytesIO()
    image.save(file, "PNG", transparency=transparency)
    return Image.open(file)


COLORS: dict[str, tuple[Callable[[], Image.Image], tuple[int, int, int]]] = {
    "1": (lambda: Image.new("1", (3, 2), 1), (255, 255, 255)),
    "L": (lambda: Image.new("L", (3, 2), 100), (100, 100, 100)),
    "L, transparent black": (lambda: with_transparency("L", 0), (255, 255, 255)),
    "1, transparent black": (lambda: with_transparency("1", 0), (255, 255, 255)),
    "LA": (lambda: Image.new("LA", (3, 2), (0, 127)), (128, 128, 128)),
    "La": (lambda: Image.new("LA", (3, 2), (0, 127)).convert("La"), (128, 128, 128)),
    "P": (lambda: Image.new("RGB", (3, 2), (200, 100, 0)).quantize(2), (200, 100, 0)),
    "P, int": (lambda: with_transparency("P", 0), (255, 255, 255)),
    "P, bytes": (lambda: with_transparency("P", b"\x7f"), (228, 178, 128)),
    "PA": (lambda: Image.frombytes("PA", (3, 2), b"\x00\x7f" * 6), (128, 128, 128)),
    "RGB": (lambda: Image.new("RGB", (3, 2), (200, 100, 0)), (200, 100, 0)),
    "RGB, transparent black": (lambda: with_transparency("RGB", (0, 0, 0)), (255, 255, 255)),
    "RGBA": (lambda: Image.new("RGBA", (3, 2), (200, 100, 0, 127)), (228, 178, 128)),
    "RGBA, clear": (lambda: Image.new("RGBA", (3, 2), (200, 100, 0, 0)), (255, 255, 255)),
    "RGBa": (lambda: Image.new("RGBA", (3, 2), (200, 100, 0, 127)).convert("RGBa"), (228, 178, 128)),
    "CMYK": (lambda: Image.new("CMYK", (3, 2), (55, 155, 255, 0)), (200, 100, 0)),
    "YCbCr": (lambda: Image.new("RGB", (3, 2), (200, 100, 0)).convert("YCbCr"), (200, 100, 0)),
    "HSV": (lambda: Image.new("RGB", (3, 2), (200, 100, 0)).convert("HSV"), (200, 100, 0)),
    "LAB": (lambda: Image.new("LAB", (3, 2), (255, 128, 128)), (255, 255, 255)),
    "I;16": (lambda: Image.new("I;16", (3, 2), 100 * 257), (100, 100, 100)),
    "I;16, dark": (lambda: Image.new("I;16", (3, 2), 255), (1, 1, 1)),
    "I;16B": (lambda: Image.new("I;16B", (3, 2), 65535), (255, 255, 255)),
    "I of 16 bits": (lambda: Image.new("I", (3, 2), 100 * 257), (100, 100, 100)),
    "I of 8 bits": (lambda: Image.new("I", (3, 2), 100), (100, 100, 100)),
    "F to 255": (lambda: Image.new("F", (3, 2), 100.4), (100, 100, 100)),
    "F to 1": (lambda: Image.new("F", (3, 2), 0.2), (51, 51, 51)),
}


@pytest.mark.parametrize("name", COLORS)
def test_any_mode_becomes_rgb(name: str) -> None:
    make, expected = COLORS[name]
    rgb = convert_to_rgb(make())
    assert (rgb.mode, rgb.size) == ("RGB", (3, 2))
    np.testing.assert_allclose(np.array(rgb)[0, 0].astype(int), expected, atol=2)
    for backend in BACKENDS:
        np.testing.assert_array_equal(levels(backend(size=2), make())[0, :, 0, 0], np.array(rgb)[0, 0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_orientation_is_honoured(kind: str, orientation: int, tmp_path: Path) -> None:
    image = Image.fromarray(noise(8, 16).repeat(4, axis=0).repeat(4, axis=1))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"image.{kind.lower()}"
    image.save(path, kind, exif=exif)
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened)
        expected = torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)[None].float()
        assert expected.shape[-2:] == ((64, 32) if orientation > 4 else (32, 64))
        for backend in BACKENDS:
            processor = backend(do_resize=False)
            torch.testing.assert_close(levels(processor, opened), expected)
            torch.testing.assert_close(levels(processor, str(path)), expected)


@both_backends
def test_images_by_path_and_base64(backend: Any, tmp_path: Path) -> None:
    image = Image.fromarray(noise(60, 60))
    image.save(tmp_path / "image.png")
    text = base64.encodebytes((tmp_path / "image.png").read_bytes()).decode()
    processor = backend(size=9, crop_pct=1)
    for source in (tmp_path / "image.png", str(tmp_path / "image.png"), text):
        assert difference(levels(processor, source), levels(processor, image)) == 0
        assert levels(processor, [source, image]).shape == (2, 3, 9, 9)


def test_images_are_left_as_they_were() -> None:
    image = image_of_mode("RGBA")
    floats = noise(6, 9).astype(np.float32) / 255
    copies = image.copy(), floats.copy()
    for backend in BACKENDS:
        backend(do_resize=False)([image, floats], return_tensors="pt")
        backend(do_resize=False, do_rescale=False)([image, floats], return_tensors="pt")
    assert image.tobytes() == copies[0].tobytes()
    np.testing.assert_array_equal(floats, copies[1])


# ------------------------------------------------------------------------------------------------ arrays and tensors


def layouts(pixels: np.ndarray) -> dict[str, np.ndarray | Tensor]:
    """The same image as users have it."""
    first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    frozen = pixels.copy()
    frozen.setflags(write=False)
    return {
        "HWC": pixels,
        "CHW": first,
        "reversed twice": pixels[:, ::-1].copy()[:, ::-1],
        "read-only": frozen,
        "tensor HWC": torch.from_numpy(pixels),
        "tensor CHW": torch.from_numpy(first),
        "int64": first.astype(np.int64),
        "uint16": pixels.astype(np.uint16) * 257,
        "big endian": (pixels.astype(np.uint16) * 257).astype(">u2"),
        "int32 of 16 bits": first.astype(np.int32) * 257,
    }


@both_backends
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_layout_and_type_gives_the_pixels_of_the_image(backend: Any, channels: int) -> None:
    pixels = noise(33, 47, channels)
    pixels[0, 0] = 255
    processor = backend(size=(20, 30))
    expected = levels(processor, Image.fromarray(pixels[..., 0] if channels == 1 else pixels))
    variants = layouts(pixels)
    if channels == 1:
        variants |= {"HW": pixels[..., 0], "tensor HW": torch.from_numpy(pixels[..., 0])}
    for name, image in variants.items():
        assert difference(levels(processor, image), expected) == 0, name
    batch = levels(processor, list(variants.values()))
    assert difference(batch, expected.expand_as(batch)) == 0


@both_backends
def test_floats_of_either_range_are_the_same_picture(backend: Any) -> None:
    pixels = noise(33, 47)
    pixels[0, 0] = 255
    processor = backend(size=(20, 30))
    expected = processor(pixels, return_tensors="pt").pixel_values
    unit = pixels.astype(np.float32) / 255
    for image in (unit, unit.astype(np.float64), pixels.astype(np.float16), torch.from_numpy(pixels).float()):
        assert difference(processor(image, return_tensors="pt").pixel_values, expected) < 2 / 127.5
    # Already rescaled, as stock processors take it.
    rescaled = processor(unit, do_rescale=False, return_tensors="pt").pixel_values
    assert difference(rescaled, processor(unit, return_tensors="pt").pixel_values) < 1e-5
    # Already normalised: nobody asks for the range.
    normalized = processor(unit * 4 - 2, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
    assert normalized.min() < -1


@both_backends
def test_booleans_are_black_and_white(backend: Any) -> None:
    mask = noise(5, 7, 1)[..., 0] > 127
    expected = torch.from_numpy(mask).float().mul(255).expand(1, 3, 5, 7)
    torch.testing.assert_close(levels(backend(do_resize=False), mask), expected)
    torch.testing.assert_close(levels(backend(do_resize=False), torch.from_numpy(mask)), expected)


@both_backends
def test_ambiguous_layout_follows_input_data_format(backend: Any) -> None:
    pixels = noise(3, 5)[:, :3]  # 3 x 3 x 3
    first = torch.from_numpy(pixels).float()[None]
    processor = backend(do_resize=False)
    torch.testing.assert_close(levels(processor, pixels), first)
    torch.testing.assert_close(levels(processor, pixels, input_data_format="channels_first"), first)
    torch.testing.assert_close(levels(processor, pixels, input_data_format="channels_last"), first.permute(0, 3, 1, 2))


@both_backends
def test_batches_keep_their_order(backend: Any) -> None:
    images = [noise(height, width, seed=seed) for seed, (height, width) in enumerate([(20, 30), (9, 9), (20, 30)])]
    processor = backend(size=(16, 24))
    one_by_one = torch.cat([processor(image, return_tensors="pt").pixel_values for image in images])
    nested = [[images[0]], [Image.fromarray(images[1]), torch.from_numpy(images[2])]]
    for batch in (images, nested):
        assert difference(processor(batch, return_tensors="pt").pixel_values, one_by_one) == 0
    stack = np.stack([images[0], images[2]])
    for batch in (stack, torch.from_numpy(stack), stack.transpose(0, 3, 1, 2)):
        assert difference(processor(batch, return_tensors="pt").pixel_values, one_by_one[[0, 2]]) == 0
    arrays = processor(images, return_tensors="np").pixel_values
    assert isinstance(arrays, np.ndarray) and arrays.dtype == np.float32
    loose = processor(images, do_resize=False).pixel_values
    assert [tuple(image.shape) for image in loose] == [(3, 20, 30), (3, 9, 9), (3, 20, 30)]
    assert all(isinstance(image, Tensor if backend is HFViTImageProcessor else np.ndarray) for image in loose)


# ---------------------------------------------------------------------------------------------- other than 3 channels


@both_backends
def test_grayscale_is_the_luma_whatever_comes(backend: Any) -> None:
    processor = backend.from_preset("original", (12, 10), num_channels=1)
    gray = Image.fromarray(noise(12, 10, 1)[..., 0])
    expected = (np.array(gray, np.float32) - 127.5) / 127.5
    unit = np.array(gray.convert("RGB"), np.float32) / 255
    for image in (gray, gray.convert("RGB"), gray.convert("LA"), np.array(gray), np.array(gray.convert("RGB")), unit):
        pixels = processor(image, return_tensors="np").pixel_values
        assert pixels.shape == (1, 1, 12, 10)
        np.testing.assert_allclose(pixels[0, 0], expected, atol=1e-5)
    color = Image.fromarray(noise(12, 10))
    np.testing.assert_array_equal(levels(processor, color)[0, 0], np.array(color.convert("L"), np.float32))


@both_backends
def test_pipeline_works_with_a_model_of_one_channel(backend: Any) -> None:
    config = HFViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    model = HFViTForImageClassification(config).eval()
    processor = backend.from_preset("original", config.image_shape, config.num_channels)
    image = Image.fromarray(noise(8, 8, 1)[..., 0])
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    scores = {guess["label"]: guess["score"] for guess in classify(image, top_k=3)}
    with torch.no_grad():
        expected = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    for label, score in scores.items():
        assert score == pytest.approx(expected[config.label2id[label]].item(), abs=1e-6)


@both_backends
def test_channels_can_be_left_alone(backend: Any) -> None:
    gray = Image.fromarray(noise(9, 9, 1)[..., 0])
    processor = backend(size=6, do_convert_rgb=False, image_mean=[0.1], image_std=[0.3])
    assert processor(gray, return_tensors="pt").pixel_values.shape == (1, 1, 6, 6)
    five = noise(9, 9, 5)
    processor = backend.from_preset("original", 6, num_channels=5)
    pixels = processor(five, input_data_format="channels_last", return_tensors="pt").pixel_values
    assert pixels.shape == (1, 5, 6, 6)
    each = [
        backend(size=6, do_convert_rgb=False)(band, return_tensors="pt").pixel_values
        for band in np.moveaxis(five, -1, 0)
    ]
    assert difference(pixels, torch.cat(each, dim=1)) <= 1 / 127.5 + 1e-6
    cmyk = image_of_mode("CMYK")
    torch.testing.assert_close(
        levels(backend(do_resize=False, do_convert_rgb=False), cmyk)[0],
        torch.from_numpy(np.array(cmyk)).permute(2, 0, 1).float(),
    )


# ------------------------------------------------------------------------------------------------------------ errors

WRONG: dict[str, tuple[dict[str, Any], Any, str]] = {
    "no pixels": ({}, np.zeros((0, 4, 3), np.uint8), r"at least 1x1 pixels.*\(0, 4, 3\)"),
    "no pixels, PIL": ({}, Image.new("RGB", (0, 4)), "at least 1x1 pixels, got 4x0"),
    "no images": ({}, [], "at least one image"),
    "5 channels": ({}, np.zeros((5, 8, 8), np.uint8), r"1, 3 or 4 channels, got \(5, 8, 8\)"),
    "5 channels, said": ({"input_data_format": "channels_first"}, np.zeros((5, 8, 8), np.uint8), "got 5"),
    "5 dimensions": ({}, np.zeros((1, 1, 3, 8, 8), np.uint8), r"\(1, 1, 3, 8, 8\)"),
    "complex": ({}, np.zeros((8, 8, 3), complex), "dtype complex128"),
    "negative": ({}, np.full((8, 8, 3), -1), "from 0 to 255 or to 65535, got -1"),
    "normalised": ({}, np.full((8, 8, 3), -0.5), "do_rescale=False"),
    "not a number": ({}, np.full((8, 8, 3), np.nan), "got nan"),
    "mean of 3": ({"do_convert_rgb": False, "image_mean": [0.1, 0.2, 0.3]}, np.zeros((8, 8)), "image_mean has 3"),
    "gray of 4": ({"do_convert_rgb": False, "do_grayscale": True}, np.zeros((4, 8, 8)), "do_grayscale, got 4"),
    "palette": ({"do_convert_rgb": False}, Image.new("P", (8, 8)), "do_convert_rgb=True"),
    "crop_pct": ({"crop_pct": 1.5}, np.zeros((8, 8, 3)), r"\(0, 1\], got 1.5"),
    "two crops": ({"crop_pct": 0.9, "do_center_crop": True, "crop_size": 8}, np.zeros((8, 8, 3)), "one way to crop"),
    "crop of an edge": ({"crop_pct": 0.9, "size": {"shortest_edge": 8}}, np.zeros((8, 8, 3)), "height and width"),
    "longest edge": ({"size": {"longest_edge": 8}}, np.zeros((8, 8, 3)), "longest_edge"),
    "padding": ({"do_pad": True, "pad_size": 8}, np.zeros((8, 8, 3)), "do_pad is not supported"),
    "shapes": ({"do_resize": False}, [np.zeros((8, 8, 3)), np.zeros((9, 8, 3))], "one shape"),
}


@both_backends
@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_was_expected(backend: Any, name: str) -> None:
    kwargs, images, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        backend()(images, return_tensors="pt", **kwargs)


def test_kinds_of_resampling_that_tensors_do_not_have() -> None:
    floats = noise(9, 9).astype(np.float32) / 255
    image = Image.fromarray(noise(9, 9))
    for resample in Image.Resampling:
        first, second = (levels(backend(size=5, resample=resample), image) for backend in BACKENDS)
        assert difference(first, second) <= 1
    with pytest.raises(ValueError, match="backend='pil'"):
        HFViTImageProcessor(size=5, resample=Image.Resampling.LANCZOS)(floats)


# ---------------------------------------------------------------------------------------------------- saving, loading


@both_backends
@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_saved_is_loaded(backend: Any, preset: str, tmp_path: Path) -> None:
    processor = backend.from_preset(preset, (24, 40))
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "HFViTImageProcessor"
    assert saved["auto_map"]["AutoImageProcessor"].keys() == {"torchvision", "pil"}
    for other, name in zip(BACKENDS, ("torchvision", "pil"), strict=True):
        loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=name)
        assert type(loaded) is other
        assert loaded.to_dict() == processor.to_dict()
    names = {path.name for path in tmp_path.iterdir()}
    kinds = ("arrays", "conversion", "geometry", "processing", "processing_pil", "reading")
    code = {f"image_{kind}_hf_vit.py" for kind in kinds}
    code |= {"detection_boxes_hf_vit.py", "segmentation_maps_hf_vit.py"}
    assert names == {"preprocessor_config.json", *code}


WITHOUT_PACKAGE = """
import sys
source, again, outputs = sys.argv[1:]
backends = ["torchvision", "pil"]
if "no_torchvision" in outputs:
    sys.modules["torchvision"] = None
    backends = ["pil"]
import numpy as np
from transformers import AutoImageProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

def load(folder, backend):
    try:
        return AutoImageProcessor.from_pretrained(folder, backend=backend, trust_remote_code=True)
    except ImportError:  # in transformers 5.17 this class requires torchvision for any backend
        name = "image_processing_pil_hf_vit.HFViTImageProcessorPil"
        return get_class_from_dynamic_module(name, folder).from_pretrained(folder)

image = np.load(source + "/image.npy")
results = {}
for backend in backends:
    processor = load(source, backend)
    assert type(processor).__module__.startswith("transformers_modules"), type(processor).__module__
    processor.save_pretrained(again)
    for other in backends:
        results[backend + other] = load(again, other)(image, return_tensors="np").pixel_values
assert load(source, None).backend == backends[0]
np.savez(outputs, **results)
"""


@pytest.mark.parametrize("case", ["no_torchvision", pytest.param("all", marks=pytest.mark.slow)])
def test_a_saved_folder_stands_alone(case: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    processor = HFViTImageProcessorPil.from_preset("timm", (24, 40))
    processor.save_pretrained(source)
    np.save(source / "image.npy", noise(50, 60))
    python(WITHOUT_PACKAGE, source, tmp_path / "again", tmp_path / f"{case}.npz", home=tmp_path / "home")
    results = np.load(tmp_path / f"{case}.npz")
    assert len(results) == (1 if case == "no_torchvision" else 4)
    for names, pixels in results.items():
        backend = HFViTImageProcessorPil if names.endswith("pil") else HFViTImageProcessor
        expected = backend.from_preset("timm", (24, 40))(noise(50, 60), return_tensors="np").pixel_values
        np.testing.assert_array_equal(pixels, expected)
