"""Image processor of the Vision Transformer: the PIL backend, and all that the torchvision backend shares with it.

An image becomes pixel values in four steps: any input to 8-bit RGB or gray (`process_image`), resize, centre crop,
normalise (`_preprocess`). The backends differ in the resize alone. This file works where torchvision is missing.

With `packing` images keep their aspect and nothing is cropped: each becomes a grid of whole patches, and the patches
of all images one pack, without padding (Dehghani et al., "Patch n' Pack", arXiv:2307.06304).

Pixels of 8 bits are resized as Pillow does it: in 8 bits, columns before rows. Floating-point pixels are not rounded.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    ImageInput,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType

from .image_reading_hf_vit import read_image, upright

if TYPE_CHECKING:
    # Never executed. A saved folder gets the files that relative imports name, so each backend names the other.
    from .image_processing_hf_vit import HFViTImageProcessor  # noqa: F401

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
MOST_BETWEEN = 2**26  # pixels between resizing columns and rows
LONGEST = 64  # times its other side is an image resized whole for a crop, and more for a crop that is long itself

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Paper's code, google-research/vision_transformer vit_jax/input_pipeline.py: `tf.image.resize` to the square,
        # then (im - 127.5) / 127.5; in big_vision `resize(res)|value_range(-1, 1)`. TensorFlow does not antialias
        # there. Pillow does, as does transformers' port of these checkpoints, and so does this preset: the same pixels
        # when enlarging, smoother ones when reducing.
        "original": MappingProxyType(
            {"resample": BILINEAR, "image_mean": IMAGENET_STANDARD_MEAN, "image_std": IMAGENET_STANDARD_STD}
        ),
        # timm/models/vision_transformer.py `_cfg`: crop_pct 0.9, bicubic, inception mean and std; the pixels of
        # timm/data/transforms_factory.py `transforms_imagenet_eval`. timm's 384 pixel models have crop_pct=1.0.
        "timm": MappingProxyType(
            {
                "crop_pct": 0.9,
                "resample": BICUBIC,
                "image_mean": IMAGENET_STANDARD_MEAN,
                "image_std": IMAGENET_STANDARD_STD,
            }
        ),
        # facebookresearch/deit datasets.py `build_transform`: shorter side to 256 for 224 (eval_crop_ratio 0.875),
        # bicubic, ImageNet mean and std. torchvision's ViT weights of 224 pixels differ in resample=BILINEAR alone.
        "center_crop": MappingProxyType(
            {
                "crop_pct": 0.875,
                "resample": BICUBIC,
                "image_mean": IMAGENET_DEFAULT_MEAN,
                "image_std": IMAGENET_DEFAULT_STD,
            }
        ),
    }
)


class HFViTImageProcessorKwargs(ImagesKwargs, total=False):
    """Options beside those of every image processor.

    Attributes:
        crop_pct: Share of the resized image that the centre crop keeps, in (0, 1]. The image is resized, aspect kept,
            until it covers `size / crop_pct`; then `size` is cut from its centre. Part of resizing: without
            `do_resize` nothing is cropped.
        do_grayscale: Give one channel, the luma of the image (ITU-R 601-2, as Pillow's mode L).
        packing: Most patches that an image may have. Images become a pack: `pixel_values` `[rows, C*ph*pw]`, the
            patches of one image behind those of the other, and `patch_grids` `[images, 2]`, the (rows, columns) of
            each. `size`, `crop_pct` and a centre crop are then without effect.
        patch_size: Pixels of a patch of a pack, one number or (height, width), the model's; 16 if not given.
        reducing_gap: Lets a JPEG file be decoded at a half, quarter or eighth of its sides where that is still so many
            times the size that it is resized to; Pillow's `thumbnail` has the option of this name. The least time is
            at 1; `None` decodes all pixels of all files.
    """

    crop_pct: float | None
    do_grayscale: bool | None
    packing: int | None
    patch_size: int | list[int] | tuple[int, int] | None
    reducing_gap: float | int | None


# ---------------------------------------------------------------------------------------------------- PIL images


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Turn a PIL image of any mode upright and into 8-bit RGB, what is transparent onto white.

    16-bit grayscale keeps its range (65535 becomes 255), where `Image.convert` would clip it to white.
    """
    image = upright_8_bit(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def upright_8_bit(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, and bring modes 1, I, I;16 and F to mode L.

    Measurements, which have another range than pixels, are stretched to it: the least is black, the most white.
    """
    if 0 in image.size:
        raise ValueError(
            f"Expected an image of at least 1x1 pixels, got {image.height}x{image.width} (height x width): "
            "check how it was read or cropped."
        )
    image = upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        levels = to_8_bit(in_range(tensor_of_array(np.array(image))))
        return Image.fromarray(levels.numpy())
    if image.mode == "1" and not image.has_transparency_data:
        return image.convert("L")
    return image


def tensor_of_pil(image: Image.Image) -> Tensor:
    """View the pixels as `[C, H, W]` uint8, in memory with the channels last."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def pil_of_tensor(pixels: Tensor) -> Image.Image:
    """Make a PIL image of uint8 `[C, H, W]`, of mode L, RGB or RGBA."""
    return Image.fromarray((pixels[0] if pixels.shape[0] == 1 else pixels.permute(1, 2, 0)).numpy())


# ---------------------------------------------------------------------------------------------- arrays and tensors


def tensor_of_array(image: np.ndarray) -> Tensor:
    """View an array as a tensor; copy what torch cannot view: reversed, foreign byte order, read-only."""
    if image.dtype.kind not in "buif":
        raise ValueError(f"Expected pixels that are bool, integers or floats, got dtype {image.dtype}.")
    if not (image.dtype.isnative and image.flags.writeable) or min(image.strides, default=0) < 0:
        image = image.astype(image.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(image)


def channels_first(image: np.ndarray | Tensor, input_data_format: str | ChannelDimension | None) -> Tensor:
    """View an array or tensor of shape (H, W), (H, W, C) or (C, H, W) as `[C, H, W]`, uint8 or float32."""
    pixels = (tensor_of_array(image) if isinstance(image, np.ndarray) else image).detach()
    if pixels.is_complex():
        raise ValueError(f"Expected pixels that are bool, integers or floats, got dtype {pixels.dtype}.")
    if pixels.ndim == 2:
        pixels = pixels[None]
    else:
        if input_data_format is None and not {pixels.shape[0], pixels.shape[-1]} & {1, 3, 4}:
            raise ValueError(
                f"Expected an image of shape (height, width), (height, width, channels) or (channels, height, width) "
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
    return pixels.float() if pixels.is_floating_point() else to_8_bit(pixels)


def full_scale(pixels: Tensor) -> int:
    """Return the value that stands for white.

    bool, uint8 and uint16 say it by their type. Other integers are 8-bit levels unless one exceeds 255, then 16-bit
    ones; floats lie in [0, 1] unless one exceeds 1, then in [0, 255].
    """
    known = {torch.bool: 1, torch.uint8: 255, torch.uint16: 65535}
    if pixels.dtype in known:
        return known[pixels.dtype]
    if pixels.dtype in (torch.uint32, torch.uint64):  # whose extremes torch does not find
        pixels = pixels.long()
    low, high = pixels.min().item(), pixels.max().item()
    scales = (1, 255) if pixels.is_floating_point() else (255, 65535)
    for scale in scales:
        if low >= 0 and high <= scale:  # false for NaN
            return scale
    raise ValueError(
        f"Expected {pixels.dtype} pixels from 0 to {scales[0]} or to {scales[1]}, got {low} to {high}: pass pixels "
        "that are not normalised yet, or do_rescale=False to use them as they are."
    )


def in_range(values: Tensor) -> Tensor:
    """Return values whose range `full_scale` knows, and stretch others to [0, 1]; what is no number becomes 0."""
    try:
        full_scale(values)
        return values
    except ValueError:
        known = values[values.isfinite()].double()
        low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
        stretched = (values.double() - low) / max(high - low, 1e-300)
        return stretched.clamp(0, 1).nan_to_num(0.0)


def to_8_bit(pixels: Tensor) -> Tensor:
    """Bring pixels of any type to uint8 levels, white to 255."""
    scale = full_scale(pixels)
    if scale == 255 and not pixels.is_floating_point():
        return pixels.to(torch.uint8)
    return (pixels.float() * (255 / scale)).round().to(torch.uint8)


def tensor_to_rgb(pixels: Tensor) -> Tensor:
    """Bring `[C, H, W]` of 1, 3 or 4 channels to `[3, H, W]`, an alpha channel onto white."""
    if pixels.shape[0] == 1:
        return pixels.expand(3, -1, -1)
    if pixels.shape[0] == 4:
        white = full_scale(pixels)
        alpha = pixels[3:].float() / white
        colors = pixels[:3] * alpha + white * (1 - alpha)
        return colors if pixels.is_floating_point() else colors.round().to(pixels.dtype)
    if pixels.shape[0] == 3:
        return pixels
    raise ValueError(
        f"Expected an image of 1, 3 or 4 channels, got {pixels.shape[0]}: pass do_convert_rgb=False to keep them, "
        "with as many values in image_mean and image_std."
    )


def tensor_to_gray(pixels: Tensor) -> Tensor:
    """Bring `[1 or 3, H, W]` to `[1, H, W]` by the integer weights of Pillow."""
    if pixels.shape[0] == 1:
        return pixels
    if pixels.shape[0] != 3:
        raise ValueError(
            f"Expected an image of 1 or 3 channels for do_grayscale, got {pixels.shape[0]}: "
            "leave do_convert_rgb on, which brings 4 channels to 3."
        )
    weights = torch.tensor((19595, 38470, 7471), device=pixels.device).view(3, 1, 1) / 65536
    luma = (pixels * weights).sum(dim=0, keepdim=True)
    return luma if pixels.is_floating_point() else (luma + 0.5).floor().to(pixels.dtype)


# ------------------------------------------------------------------------------------------------------- geometry


def size_of(image: Image.Image | Tensor) -> tuple[int, int]:
    """Return (height, width), the last two dimensions of a tensor."""
    return (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[-2], image.shape[-1])


def covering_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (height, width) of the aspect of `size` that covers `target`.

    Rounds as the sources do: torchvision's `Resize` to a shorter side cuts off, timm's `ResizeKeepRatio`, for
    rectangular targets, rounds.
    """
    if target[0] == target[1]:
        return int(target[0] * size[0] / min(size)), int(target[0] * size[1] / min(size))
    ratio = min(size[0] / target[0], size[1] / target[1])
    return round(size[0] / ratio), round(size[1] / ratio)


def resized_size(old: tuple[int, int], size: SizeDict, crop_pct: float | None) -> tuple[int, int]:
    """Return the (height, width) that an image of `old` is resized to."""
    if size.height and size.width:
        if crop_pct is None:
            return size.height, size.width
        return covering_size(old, (math.floor(size.height / crop_pct), math.floor(size.width / crop_pct)))
    if size.shortest_edge and size.longest_edge:
        return get_size_with_aspect_ratio(old, size.shortest_edge, size.longest_edge)
    if size.shortest_edge:
        return covering_size(old, (size.shortest_edge, size.shortest_edge))
    raise ValueError(f"Expected size with height and width or with shortest_edge, got {dict(size)}.")


def packed_grid(size: tuple[int, int], patch_size: tuple[int, int], packing: int) -> tuple[int, int]:
    """Return the (rows, columns) of patches that an image of `size` has in a pack.

    That is its own size, in whole patches rounded up, if these are at most `packing`; else the least reduced size of
    its aspect that has at most so many, each side rounded to the nearest whole patch.
    """
    own = (-(-size[0] // patch_size[0]), -(-size[1] // patch_size[1]))
    if math.prod(own) <= packing:
        return own

    def patches_beside(number: int, side: int, other: int) -> int:
        return max(1, -((side - (2 * number + 1) * other) // (2 * side)))  # of other, when side has number and a half

    # A growing image leaves a grid when one of its sides comes to whole patches and a half.
    rows, columns = (max(1, (2 * side + patch) // (2 * patch)) for side, patch in zip(size, patch_size, strict=True))
    height, width = size[0] * patch_size[1], size[1] * patch_size[0]  # in one unit: the aspect in patches
    grids = [(rows, columns)]
    grids += [(number, patches_beside(number, height, width)) for number in range(1, min(rows, packing + 1))]
    grids += [(patches_beside(number, width, height), number) for number in range(1, min(columns, packing + 1))]
    return max((grid for grid in grids if math.prod(grid) <= packing), key=math.prod)


def center_crop(image: Image.Image | Tensor, size: SizeDict, rounding: Callable[[float], int]) -> Image.Image | Tensor:
    """Cut (height, width) from the centre; what lies outside of the image is black."""
    if not (size.height and size.width):
        raise ValueError(f"Expected crop_size with height and width, got {dict(size)}.")
    height, width = size_of(image)
    top, left = rounding((height - size.height) / 2), rounding((width - size.width) / 2)
    bottom, right = top + size.height, left + size.width
    if isinstance(image, Image.Image):
        return image.crop((left, top, right, bottom))
    return F.pad(image, (-left, right - width, -top, bottom - height))


def without_far_ends(image: Image.Image | Tensor, crop: SizeDict) -> Image.Image | Tensor:
    """Cut off of a very long image what no centre crop would keep: 1x20000, resized for one, takes gigabytes."""
    sides = cast(int, crop.height), cast(int, crop.width)
    height, width = size_of(image)
    longest = math.ceil(LONGEST * max(sides) / min(sides) * min(height, width))
    if max(height, width) <= longest:
        return image
    return center_crop(image, SizeDict(height=min(height, longest), width=min(width, longest)), rounding=int)


def per_channel(values: float | Sequence[float], num_channels: int, name: str) -> Tensor:
    """Bring mean or std to `[C, 1, 1]`, or `[1, 1, 1]` if all channels share one value."""
    values = (values,) if isinstance(values, int | float) else tuple(values)
    if len(set(values)) == 1:
        values = values[:1]
    if len(values) not in (1, num_channels):
        raise ValueError(
            f"{name} has {len(values)} values, the image {num_channels} channels: give as many, or bring the images "
            "to 3 channels by do_convert_rgb=True or to 1 by do_grayscale=True."
        )
    return torch.tensor(values).view(-1, 1, 1)


def cut_into_patches(image: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut an image `[C, H, W]` into patches `[rows, C, ph, pw]`, in the order of the model's `patchify`."""
    cut = image.unflatten(2, (-1, patch_size[1])).unflatten(1, (-1, patch_size[0]))  # [C, h, ph, w, pw]
    return cut.permute(1, 3, 0, 2, 4).flatten(0, 1)


# ------------------------------------------------------------------------------------------------------ processors


class HFViTImageProcessing(BaseImageProcessor):
    """What both backends do alike; a backend adds `_resize_side`.

    Takes PIL images of any mode, arrays and tensors of shape (H, W), (H, W, C) or (C, H, W) in any type, paths, URLs,
    4-D batches and lists of all these. `PRESETS` has the preprocessing of the usual checkpoints.
    """

    _auto_class = "AutoImageProcessor"  # saving copies the code too
    valid_kwargs = HFViTImageProcessorKwargs

    do_convert_rgb = True
    do_resize = True
    size: Any = {"height": 224, "width": 224}
    do_center_crop: bool | None = None
    crop_size: Any = None
    resample = BILINEAR
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    crop_pct = None
    do_grayscale = None
    packing = None
    patch_size: Any = None
    # From there on photographs keep within a level: of 12 megapixels half of each side is decoded for 224.
    reducing_gap: float | int | None = 6.0

    @classmethod
    def from_preset(cls, name: str, size: int | tuple[int, int] = 224, num_channels: int = 3, **kwargs: Any) -> Self:
        """Build the preprocessing that `PRESETS` has under `name`, with its sources.

        `size` is what the model gets, (height, width) or one number for both. `num_channels` is the model's: 1 takes
        the luma of any image, 3 its RGB, others expect images of that many channels. `kwargs` go over the preset.

        Example:
            >>> processor = HFViTImageProcessorPil.from_preset("original", (32, 64))
            >>> processor(Image.new("CMYK", (300, 200)), return_tensors="np").pixel_values.shape
            (1, 3, 32, 64)
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}: choose one of {', '.join(PRESETS)}.")
        channels = {1: {"do_grayscale": True}, 3: {}}.get(num_channels, {"do_convert_rgb": False})
        return cls(**{"size": size, **PRESETS[name], **channels, **kwargs})

    def set_output_size(self, size: int | tuple[int, int]) -> None:
        """Make `size`, (height, width), what the model gets; the margin of a centre crop grows in proportion."""
        height, width = (size, size) if isinstance(size, int) else size
        output = SizeDict(height=height, width=width)
        if not self.do_center_crop:
            self.size = output
            return
        factors = {"height": height / self.crop_size["height"], "width": width / self.crop_size["width"]}
        edges = dict(self.size).items()
        self.size = SizeDict(**{edge: round(old * factors.get(edge, max(factors.values()))) for edge, old in edges})
        self.crop_size = output

    def to_dict(self) -> dict[str, Any]:
        """Describe the processor; the code of both backends is named, whichever is saved."""
        auto_map = {
            "torchvision": "image_processing_hf_vit.HFViTImageProcessor",
            "pil": "image_processing_pil_hf_vit.HFViTImageProcessorPil",
        }
        return {**super().to_dict(), "auto_map": {"AutoImageProcessor": auto_map}}

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list[Any]:
        return list(flatten(images))  # files stay files: `process_image` knows the size that is wanted

    def _standardize_kwargs(self, resample: Any = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        kwargs = super()._standardize_kwargs(**kwargs)
        if not isinstance(resample, int | None):  # torchvision's InterpolationMode
            resample = Image.Resampling[resample.name.removesuffix("_EXACT")]
        crop_pct, size = kwargs.get("crop_pct"), kwargs["size"]
        if crop_pct is not None:
            if not 0 < crop_pct <= 1:
                raise ValueError(f"Expected crop_pct in (0, 1], got {crop_pct}: 0.875 keeps 224 of 256 pixels.")
            if kwargs.get("do_center_crop"):
                raise ValueError("Expected one way to crop, got crop_pct and do_center_crop: leave one out.")
            if not (size and size.height and size.width):
                raise ValueError(f"Expected size with height and width beside crop_pct, got {size and dict(size)}.")
        if kwargs.get("do_pad"):
            raise ValueError("do_pad is not supported: resize to one size, or crop, which pads what is smaller.")
        gap = kwargs.get("reducing_gap")
        if gap is not None and gap < 1:
            raise ValueError(f"Expected reducing_gap of at least 1, got {gap}: an image would be decoded too small.")
        if kwargs.get("packing") is not None:
            kwargs["patch_size"] = checked_patch_size(kwargs["packing"], kwargs.get("patch_size"))
        return {**kwargs, "resample": resample}

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        do_grayscale: bool | None = None,
        do_rescale: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> Any:
        """Bring any input to the channels that the model takes.

        Gives a PIL image of mode RGB or L, or a tensor `[C, H, W]` of 8 bits or, not rounded, of floats.
        """
        if isinstance(image, str | bytes | os.PathLike):
            image = read_image(image, partial(self.least_size, **kwargs))
            input_data_format = ChannelDimension.FIRST
        if not isinstance(image, Image.Image):
            pixels = channels_first(image, input_data_format)
            if device is not None:
                pixels = pixels.to(device)
            # Pillow puts colors onto white where there is an alpha channel: its rounding is its own.
            if pixels.dtype != torch.uint8 or pixels.device.type != "cpu" or pixels.shape[0] != 4:
                if do_convert_rgb:
                    pixels = tensor_to_rgb(pixels)
                if do_grayscale:
                    pixels = tensor_to_gray(pixels)
                if do_rescale and pixels.is_floating_point():
                    pixels = pixels * (255 / full_scale(pixels))  # rescale_factor counts from 8-bit levels
                return pixels
            image = pil_of_tensor(pixels)

        if do_convert_rgb:
            image = convert_to_rgb(image)
        else:
            image = upright_8_bit(image)
            if image.mode in ("P", "PA"):
                raise ValueError("The channel of a palette image is an index, not a colour: pass do_convert_rgb=True.")
        if do_grayscale and image.mode != "L":
            image = image.convert("L")
        return image if image.mode in ("RGB", "L") else tensor_of_pil(image)

    def least_size(self, old: tuple[int, int], **kwargs: Any) -> tuple[int, int]:
        """Return the (height, width) that a file of `old` must at least be decoded at, by `reducing_gap`.

        `kwargs` are the options of a call, where they are not the processor's own.
        """
        names = ("do_resize", "size", "crop_pct", "reducing_gap", "packing", "patch_size")
        do_resize, size, crop_pct, gap, packing, patch_size = (kwargs.get(name, getattr(self, name)) for name in names)
        if not do_resize or gap is None:
            return old
        if packing is None:
            if not isinstance(size, SizeDict):  # as somebody may have set it
                size = self._standardize_kwargs(size=size, default_to_square=self.default_to_square)["size"]
            new = resized_size(old, size, crop_pct)
        else:
            patch_size = checked_patch_size(packing, patch_size)
            grid = packed_grid(old, patch_size, packing)
            new = (grid[0] * patch_size[0], grid[1] * patch_size[1])
        return math.ceil(gap * new[0]), math.ceil(gap * new[1])

    def _resize(self, image: Any, size: tuple[int, int], resample: int, do_clip: bool) -> Any:
        """Resize columns, then rows, to (height, width); with `do_clip` floats stay in 0..255, as 8 bits do.

        The order shows: bicubic overshoots beside hard edges, and each pass clips. Pillow had this order before
        version 13, which goes by the sizes. A very tall image goes by them here too: its rows would fill the memory.
        """
        height, width = size_of(image)
        between = (height, size[1])
        if math.prod(between) > max(MOST_BETWEEN, size[0] * width):
            between = (size[0], width)
        for step in (between, size):
            if size_of(image) != step:
                image = self._resize_side(image, step, resample)
                if do_clip and isinstance(image, Tensor) and image.is_floating_point():
                    image = image.clamp(0, 255)
        return image

    def _resize_side(self, image: Any, size: tuple[int, int], resample: int) -> Any:
        raise NotImplementedError

    def _map(self, function: Callable[[Any], Any], images: list[Any], disable_grouping: bool | None) -> list[Any]:
        return [function(image) for image in images]

    def _preprocess(
        self,
        images: list[Image.Image | Tensor],
        do_resize: bool | None,
        size: SizeDict,
        resample: int,
        crop_pct: float | None,
        do_center_crop: bool | None,
        crop_size: SizeDict,
        do_rescale: bool | None,
        rescale_factor: float,
        do_normalize: bool | None,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        packing: int | None,
        patch_size: Any,
        disable_grouping: bool | None,
        return_tensors: str | TensorType | None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Resize, crop and normalise what `process_image` gave."""

        crop = size if crop_pct is not None else crop_size if do_center_crop else None
        keeps_aspect = crop_pct is not None or not (size and size.height and size.width)

        def fit(image: Image.Image | Tensor) -> Image.Image | Tensor:
            if do_resize:
                if crop and keeps_aspect:
                    image = without_far_ends(image, crop)
                new_size = resized_size(size_of(image), size, crop_pct)
                image = self._resize(image, new_size, resample, do_clip=bool(do_rescale))
                if crop_pct is not None:
                    return center_crop(image, size, rounding=round)  # as torchvision's CenterCrop, so timm's
            return center_crop(image, crop_size, rounding=int) if do_center_crop else image

        def fit_grid(image: Image.Image | Tensor) -> Image.Image | Tensor:
            grid = packed_grid(size_of(image), patch_size, cast(int, packing))
            new_size = (grid[0] * patch_size[0], grid[1] * patch_size[1])
            if not do_resize and size_of(image) != new_size:
                raise ValueError(
                    f"Expected an image of whole patches of {patch_size}, at most {packing}, for packing without "
                    f"do_resize, got {size_of(image)} (height, width): leave do_resize on."
                )
            return self._resize(image, new_size, resample, do_clip=bool(do_rescale))

        def normalize(batch: Tensor) -> Tensor:
            scale = rescale_factor if do_rescale else 1.0
            if not do_normalize:
                return batch * scale if do_rescale else batch
            mean = per_channel(image_mean, batch.shape[1], "image_mean") / scale
            std = per_channel(image_std, batch.shape[1], "image_std") / scale
            return batch.float().sub_(mean.to(batch.device)).div_(std.to(batch.device))

        if not images:
            raise ValueError("Expected at least one image, got none.")
        fitted = self._map(fit if packing is None else fit_grid, images, disable_grouping)
        tensors = [tensor_of_pil(image) if isinstance(image, Image.Image) else image for image in fitted]
        if packing is not None:
            patches = torch.cat([cut_into_patches(image, patch_size) for image in tensors])
            grids = [[image.shape[1] // patch_size[0], image.shape[2] // patch_size[1]] for image in tensors]
            pack = {"pixel_values": normalize(patches).flatten(1), "patch_grids": torch.tensor(grids)}
            pack = {name: self._output(values) for name, values in pack.items()}
            return BatchFeature(data=pack, tensor_type=return_tensors)
        shapes = {tuple(image.shape) for image in tensors}
        if len(shapes) == 1:
            batch = normalize(torch.stack([image.contiguous() for image in tensors]))
            data: Any = batch if return_tensors else list(batch)
        elif return_tensors is None:
            data = [normalize(torch.stack([image]))[0] for image in tensors]
        else:
            raise ValueError(
                f"Expected images of one shape for return_tensors={return_tensors!r}, got {sorted(shapes)} "
                "(channels, height, width): leave do_resize on, or crop."
            )
        return BatchFeature(data={"pixel_values": self._output(data)}, tensor_type=return_tensors)

    def _output(self, data: Any) -> Any:
        return data


def checked_patch_size(packing: int, patch_size: int | Sequence[int] | None) -> tuple[int, int]:
    """Return `patch_size` as (height, width), 16 pixels where it is `None`."""
    patch_size = 16 if patch_size is None else patch_size
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    if min(packing, height, width) < 1:
        raise ValueError(
            f"Expected at least 1 for packing, the most patches of an image, and for patch_size, pixels of a patch, "
            f"got {packing} and {(height, width)}: 196 patches of 16 are as many as of a square of 224 pixels."
        )
    return height, width


def flatten(images: Any) -> Any:
    """Walk the single images of nested lists and of 4-D batches."""
    if isinstance(images, list | tuple):
        for image in images:
            yield from flatten(image)
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


class HFViTImageProcessorPil(HFViTImageProcessing, PilBackend):  # type: ignore[misc]
    """Image processor by Pillow, on the CPU."""

    def process_image(self, image: Any, device: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        image = super().process_image(image.cpu() if isinstance(image, Tensor) else image, **kwargs)
        is_image = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.shape[0] in (1, 3)
        return pil_of_tensor(image) if is_image else image

    def _resize_side(self, image: Any, size: tuple[int, int], resample: int) -> Any:
        height, width = size
        if isinstance(image, Image.Image):
            return image.resize((width, height), resample)
        bands = [Image.fromarray(band).resize((width, height), resample) for band in image.numpy()]  # mode L or F
        return torch.from_numpy(np.stack([np.asarray(band) for band in bands]))

    def _output(self, data: Any) -> Any:
        return [image.numpy() for image in data] if isinstance(data, list) else data.numpy()


__all__ = ["HFViTImageProcessorPil"]
