"""Conversion of images of any mode, dtype and layout to RGB or grayscale, in 8 bits wherever that loses nothing."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format
from transformers.utils import logging

from .image_reading_hf_vit import upright

logger = logging.get_logger(__name__)

# For dtypes that do not determine the value of white: (white, minimum, maximum), where the largest value of an image
# is between minimum and maximum. Outside of these ranges white is unknown: floats up to 9 may be pixels in [0, 1] with
# outliers, or an almost black image in [0, 255].
RANGES = {
    "floats": ((1, -0.125, 1.25), (255, 16, 318)),
    "integers": ((255, 0, 318), (65535, 4096, 65535)),
}


def flatten_images(images: Any) -> Iterator[Any]:
    """Yield the single images of nested lists and of 4-D batches."""
    if isinstance(images, list | tuple):
        for image in images:
            yield from flatten_images(image)
    elif isinstance(images, Image.Image | str | bytes | os.PathLike):
        yield images
    elif not isinstance(images, np.ndarray | Tensor):
        raise TypeError(
            "Expected PIL images, arrays, tensors, paths, URLs, bytes, or lists of these, "
            f"got {type(images).__name__}."
        )
    elif images.ndim in (2, 3):
        yield images
    elif images.ndim == 4:
        yield from images
    else:
        raise ValueError(
            f"Expected images of 2 or 3 dimensions or batches of 4, got an array of shape {tuple(images.shape)}."
        )


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any mode to upright 8-bit RGB, with transparent pixels on white.

    16-bit grayscale keeps its range (65535 becomes 255), whereas `Image.convert` would clip it to white.
    """
    image = upright_8_bit(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def upright_8_bit(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, and convert modes 1, I, I;16 and F to mode L.

    `values_of_file` converts values outside of the usual ranges.
    """
    if 0 in image.size:
        raise ValueError(
            f"Expected an image of at least 1x1 pixels, got {image.height}x{image.width} (height x width): "
            "check how it was read or cropped."
        )
    image = upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return pil_of_tensor(to_8_bit(values_of_file(tensor_of_array(np.array(image))))[None])
    if image.mode == "1" and not image.has_transparency_data:
        return image.convert("L")
    return image


def tensor_of_pil(image: Image.Image) -> Tensor:
    """Return the pixels as uint8 `[C, H, W]`, channels last in memory."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def pil_of_tensor(pixels: Tensor) -> Image.Image:
    """Return a PIL image of mode L, RGB or RGBA from uint8 `[C, H, W]`."""
    return Image.fromarray((pixels[0] if pixels.shape[0] == 1 else pixels.permute(1, 2, 0)).numpy())


def tensor_of_array(image: np.ndarray) -> Tensor:
    """Return a tensor that shares memory with an array where torch supports its strides, byte order and flags."""
    if image.dtype.kind not in "buif":
        raise ValueError(f"Expected bool, integer or float pixels, got dtype {image.dtype}.")
    if not (image.dtype.isnative and image.flags.writeable) or min(image.strides, default=0) < 0:
        image = image.astype(image.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(image)


def arranged(image: np.ndarray | Tensor, input_data_format: str | ChannelDimension | None) -> Tensor:
    """Return an array or tensor (H, W), (H, W, C) or (C, H, W) as `[C, H, W]` of the same dtype."""
    pixels = (tensor_of_array(image) if isinstance(image, np.ndarray) else image).detach()
    if pixels.is_complex():
        raise ValueError(f"Expected bool, integer or float pixels, got dtype {pixels.dtype}.")
    if pixels.ndim == 2:
        pixels = pixels[None]
    else:
        if input_data_format is None and not {pixels.shape[0], pixels.shape[-1]} & {1, 3, 4}:
            raise ValueError(
                "Expected an image of shape (height, width), (height, width, channels) or (channels, height, width) "
                f"with 1, 3 or 4 channels, got {tuple(image.shape)}: for other numbers of channels pass "
                "input_data_format and do_convert_rgb=False."
            )
        layout = ChannelDimension(
            input_data_format or infer_channel_dimension_format(pixels, (1, 3, 4))  # type: ignore[arg-type]
        )
        pixels = pixels if layout == ChannelDimension.FIRST else pixels.permute(2, 0, 1)
    if 0 in pixels.shape:
        raise ValueError(
            f"Expected an image of at least 1x1 pixels, got an array of shape {tuple(image.shape)}: "
            "check how it was read or cropped."
        )
    return pixels


def full_scale(pixels: Tensor) -> int:
    """Return the value of white.

    bool, uint8 and uint16 have their full range. For other dtypes, the largest value decides between two ranges, see
    `RANGES`. Values may exceed white, since interpolation overshoots; `levels` clips them.

    Raises:
        ValueError: If the values fit neither range.
    """
    known = {torch.bool: 1, torch.uint8: 255, torch.uint16: 65535}
    if pixels.dtype in known:
        return known[pixels.dtype]
    if pixels.dtype in (torch.uint32, torch.uint64):  # torch has no min and max for these
        pixels = pixels.long()
    low, high = pixels.min().item(), pixels.max().item()
    ranges = RANGES["floats" if pixels.is_floating_point() else "integers"]
    for white, least, most in ranges:
        overshoot = white / 8 if pixels.is_floating_point() else 0
        if low >= -overshoot and least <= high <= most:  # false for NaN
            return white
    raise ValueError(
        f"Expected {pixels.dtype} pixels from 0 to {ranges[0][0]} or to {ranges[1][0]}, got {low:.6g} to "
        f"{high:.6g}: pass pixels that are not normalised yet, state their value_range, or pass do_rescale=False to "
        "use them as they are."
    )


def values_of_file(values: Tensor) -> Tensor:
    """Convert the values of a file so that `full_scale` accepts them.

    Values that it accepts already are returned unchanged. Otherwise, integers of up to 16 bits become uint16, and
    other values, such as measurements, are stretched to [0, 1] with NaN as 0.
    """
    try:
        full_scale(values)
        return values
    except ValueError:
        if not values.is_floating_point() and values.long().min() >= 0 and values.long().max() <= 65535:
            return values.to(torch.uint16)
        logger.warning_once(
            "An image has an unusual range of values and is stretched: its smallest becomes black, its largest white. "
            "Set value_range in the image processor to read all images alike."
        )
        finite = values[values.isfinite()].double()
        low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
        return ((values.double() - low) / max(high - low, 1e-300)).clamp(0, 1).nan_to_num(0.0)


def levels(pixels: Tensor) -> Tensor:
    """Convert pixels of any dtype to levels with white at 255: uint8, but unrounded for floats and dark 16-bit images.

    A 16-bit image without a value above 4095 would keep at most 16 of its levels in 8 bits.
    """
    if pixels.dtype == torch.uint8:
        return pixels
    white = full_scale(pixels)
    scaled = (pixels.float() * (255 / white)).clamp_(0, 255)
    if pixels.is_floating_point():
        return scaled
    if white == 65535 and scaled.max() < 16 and scaled.min() < scaled.max():
        logger.warning_once(
            "A 16-bit image has no value above 4095 and is almost black, since white is 65535. If its pixels "
            "have fewer bits, set value_range in the image processor, such as (0, 4095) for 12 bits."
        )
        return scaled
    return scaled.round_().to(torch.uint8)


def to_8_bit(pixels: Tensor) -> Tensor:
    """Convert pixels of any dtype to uint8, with white at 255."""
    return levels(pixels).round().to(torch.uint8)


def checked_range(value_range: Any) -> list[list[float]]:
    """Return a value range, one (low, high) or one per channel, as a list of pairs.

    Raises:
        ValueError: If it has another form, or a low that is not below its high.
    """
    try:
        pairs = np.asarray(value_range, dtype=np.float64)
        pairs = pairs[None] if pairs.ndim == 1 else pairs
        if pairs.ndim == 2 and pairs.shape[1] == 2 and np.isfinite(pairs).all() and (pairs[:, 0] < pairs[:, 1]).all():
            return pairs.tolist()
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"Expected value_range as (low, high), or one such pair per channel, with low < high, got {value_range!r}: "
        "12-bit pixels have (0, 4095)."
    )


def map_range(
    image: Any, value_range: Any, do_convert_rgb: bool | None, input_data_format: str | ChannelDimension | None
) -> Tensor:
    """Map the pixels of an image linearly from a value range to 0..255, clipped and rounded: uint8 `[C, H, W]`.

    NaN becomes 0. All bits of a PIL image of mode I, I;16 or F are used.
    """
    if not isinstance(image, Image.Image):
        pixels = arranged(image, input_data_format)
    elif image.mode == "F" or image.mode.startswith("I"):
        pixels = tensor_of_array(np.array(upright(image)))[None]
    else:
        pixels = tensor_of_pil(convert_to_rgb(image) if do_convert_rgb else upright_8_bit(image))
    pairs = checked_range(value_range)
    if len(pairs) not in (1, pixels.shape[0]):
        raise ValueError(
            f"value_range has {len(pairs)} pairs but the image has {pixels.shape[0]} channels: pass one pair for all "
            "channels, or as many pairs."
        )
    low, high = torch.tensor(pairs, dtype=torch.float64, device=pixels.device).view(-1, 2, 1, 1).unbind(1)
    levels = (pixels.double() - low) * (255 / (high - low))
    return levels.nan_to_num(0.0).clamp(0, 255).round().to(torch.uint8)


def pixels_of_file(
    image: Image.Image | Tensor, do_convert_rgb: bool | None, value_range: Any = None
) -> Image.Image | Tensor:
    """Convert a tensor from `read_image` to `levels`; return a PIL image unchanged.

    Of four bands, only the first three are kept if the image becomes RGB: the fourth is not transparency, which only
    PIL images have. With a `value_range`, the values are not converted.
    """
    if isinstance(image, Image.Image):
        return image
    image = image[:3] if do_convert_rgb and image.shape[0] == 4 else image
    return image if value_range is not None else levels(values_of_file(image))


def tensor_to_rgb(pixels: Tensor, white: int | None = None) -> Tensor:
    """Convert `[C, H, W]` with 1, 3 or 4 channels to `[3, H, W]`, with transparent pixels on white.

    `white` is the value of white, by default the `full_scale` of the pixels.
    """
    if pixels.shape[0] == 1:
        return pixels.expand(3, -1, -1)
    if pixels.shape[0] == 4:
        white = full_scale(pixels) if white is None else white
        alpha = (pixels[3:].float() / white).clamp(0, 1)
        colors = pixels[:3] * alpha + white * (1 - alpha)
        return colors if pixels.is_floating_point() else colors.round().to(pixels.dtype)
    if pixels.shape[0] == 3:
        return pixels
    raise ValueError(
        f"Expected an image with 1, 3 or 4 channels, got {pixels.shape[0]}: pass do_convert_rgb=False to keep all "
        "channels, with one value per channel in image_mean and image_std."
    )


def tensor_to_gray(pixels: Tensor) -> Tensor:
    """Convert `[1 or 3, H, W]` to `[1, H, W]` with Pillow's integer weights."""
    if pixels.shape[0] == 1:
        return pixels
    if pixels.shape[0] != 3:
        raise ValueError(
            f"Expected an image with 1 or 3 channels for do_grayscale, got {pixels.shape[0]}: "
            "leave do_convert_rgb on, which converts 4 channels to 3."
        )
    weights = torch.tensor((19595, 38470, 7471), device=pixels.device).view(3, 1, 1) / 65536
    luma = (pixels * weights).sum(dim=0, keepdim=True)
    return luma if pixels.is_floating_point() else (luma + 0.5).floor().to(pixels.dtype)


def per_channel(values: float | Sequence[float], num_channels: int, name: str) -> Tensor:
    """Return mean or std as `[C, 1, 1]`, or as `[1, 1, 1]` if all channels share one value."""
    values = (values,) if isinstance(values, int | float) else tuple(values)
    if len(set(values)) == 1:
        values = values[:1]
    if len(values) not in (1, num_channels):
        raise ValueError(
            f"{name} has {len(values)} values but the image has {num_channels} channels: pass as many values, or "
            "convert to 3 channels with do_convert_rgb=True or to 1 with do_grayscale=True."
        )
    return torch.tensor(values).view(-1, 1, 1)


def options_for_channels(number: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a processor for images of `number` channels, given its mean and std."""
    averages = {}
    for name in ("image_mean", "image_std"):
        old = values[name]
        is_kept = np.ndim(old) == 1 and len(old) == number
        averages[name] = old if is_kept else [float(np.mean(old))] * number
    return {"do_convert_rgb": number in (1, 3), "do_grayscale": True if number == 1 else None, **averages}
