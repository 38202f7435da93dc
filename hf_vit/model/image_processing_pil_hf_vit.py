"""Image processor of the Vision Transformer: the PIL backend, and everything that the torchvision backend shares.

An image becomes pixel values in four steps: conversion to 8-bit RGB or grayscale (`process_image`), resize, center
crop and normalization (`_preprocess`). The backends differ only in the resize. This file does not need torchvision.

With `packing` images keep their aspect ratio and are not cropped: each becomes a grid of whole patches, and the
patches of all images are concatenated without padding (Dehghani et al., "Patch n' Pack", arXiv:2307.06304).

8-bit pixels are resized as Pillow does: in 8 bits, width before height. Floating-point pixels are not rounded.
"""

import difflib
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    ImageInput,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType, logging

from .detection_boxes_hf_vit import HFViTDetectionBoxes
from .image_conversion_hf_vit import (
    arranged,
    checked_range,
    convert_to_rgb,
    flatten_images,
    levels,
    map_range,
    options_for_channels,
    per_channel,
    pil_of_tensor,
    pixels_of_file,
    tensor_of_array,
    tensor_of_pil,
    tensor_to_gray,
    tensor_to_rgb,
    upright_8_bit,
    values_of_file,
)
from .image_geometry_hf_vit import (
    center_crop,
    checked_patch_size,
    cut_into_patches,
    packed_size,
    resized_size,
    size_of,
    trim_long_side,
)
from .image_reading_hf_vit import read_image, upright
from .segmentation_maps_hf_vit import HFViTSegmentationMaps

if TYPE_CHECKING:  # never executed: makes transformers save the torchvision backend together with this file
    from .image_processing_hf_vit import HFViTImageProcessor  # noqa: F401

logger = logging.get_logger(__name__)

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
IMAGENET = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
INCEPTION = {"image_mean": IMAGENET_STANDARD_MEAN, "image_std": IMAGENET_STANDARD_STD}
MAX_INTERMEDIATE_PIXELS = 2**26  # after resizing the width, before the height

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Paper's code, google-research/vision_transformer vit_jax/input_pipeline.py: `tf.image.resize` to the square,
        # then (im - 127.5) / 127.5; in big_vision `resize(res)|value_range(-1, 1)`. TensorFlow does not antialias
        # there; Pillow, transformers' port of these checkpoints and this preset do. Upscaled images have the same
        # pixels, downscaled images are smoother.
        "original": MappingProxyType({"resample": BILINEAR, **INCEPTION}),
        # timm/models/vision_transformer.py `_cfg`: crop_pct 0.9, bicubic, Inception mean and std; the pixels of
        # timm/data/transforms_factory.py `transforms_imagenet_eval`. timm's 384 pixel models have crop_pct=1.0.
        "timm": MappingProxyType({"crop_pct": 0.9, "resample": BICUBIC, **INCEPTION}),
        # facebookresearch/deit datasets.py `build_transform`: shorter side to 256 for 224 (eval_crop_ratio 0.875),
        # bicubic, ImageNet mean and std. torchvision's ViT weights for 224 pixels differ only in resample=BILINEAR.
        "center_crop": MappingProxyType({"crop_pct": 0.875, "resample": BICUBIC, **IMAGENET}),
    }
)


class HFViTImageProcessorKwargs(ImagesKwargs, total=False):
    """Options in addition to those of every image processor.

    Attributes:
        crop_pct: Share of the resized image that the center crop keeps, in (0, 1]. The image is resized at its aspect
            ratio until it covers `size / crop_pct`, then `size` is cropped. Without `do_resize` nothing is cropped.
        do_grayscale: Whether to convert images to one channel, the luma (ITU-R 601-2, Pillow's mode L).
        do_reduce_labels: Whether to subtract 1 from the classes of segmentation maps; class 0 is then ignored.
        packing: Maximum number of patches per image. The output is a pack: `pixel_values` `[rows, C*ph*pw]`, the
            patches of all images in order, and `patch_grids` `[images, 2]`, the (rows, columns) of each. `size`,
            `crop_pct` and a center crop then have no effect.
        patch_size: Size of the model's patches in pixels, one number or (height, width), for `packing`; default 16.
        reducing_gap: Permits decoding a JPEG file at 1/2, 1/4 or 1/8 of its size while this leaves at least
            `reducing_gap` times the size that it is resized to, like the option of Pillow's `thumbnail`. 1 is fastest;
            `None` always decodes all pixels.
        value_range: Pixel values of black and white, a pair (low, high) or one pair per channel. Pixels are mapped
            linearly from this range to 0..255, clipped, and rounded to 8 bits: 256 levels over this range. Required
            if the dtype does not determine the range, such as (0, 4095) for 12-bit pixels in 16-bit files. `None`:
            bool, uint8 and uint16 have their full range. For other dtypes, the largest value of an image selects the
            range: floats up to 1.25 have (0, 1), from 16 on (0, 255); integers up to 318 have (0, 255), from 4096 on
            (0, 65535). Values beyond the range are clipped. Arrays with other values raise an error. Files of other
            integers have 16 bits, and other files are stretched from their smallest value to their largest.
    """

    crop_pct: float | None
    do_grayscale: bool | None
    do_reduce_labels: bool | None
    packing: int | None
    patch_size: int | list[int] | tuple[int, int] | None
    reducing_gap: float | int | None
    value_range: list[float] | list[list[float]] | tuple[float, float] | None


# Names of options in other libraries that `difflib` does not match.
OTHER_NAMES = {"mean": "image_mean", "std": "image_std", "interpolation": "resample"} | dict.fromkeys(
    ("image_size", "img_size"), "size"
)


def option_meant_by(name: str) -> str | None:
    """Return the option that an unknown keyword probably stands for, or `None`."""
    options = HFViTImageProcessorKwargs.__annotations__
    if name in options:
        return None
    near = difflib.get_close_matches(name, options, 1, cutoff=0.8)
    return OTHER_NAMES.get(name, near[0] if near else None)


def check_options(given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a keyword that nearly matches an option."""
    for name in given:
        if meant := option_meant_by(name):
            raise ValueError(f"Unknown option {name!r} of the image processor: did you mean {meant!r}?")


class HFViTImageProcessing(HFViTDetectionBoxes, HFViTSegmentationMaps, BaseImageProcessor):  # type: ignore[misc]
    """Base class of both backends; a backend adds `_resize_side`.

    Accepts PIL images of any mode, arrays and tensors of shape (H, W), (H, W, C) or (C, H, W) and any dtype, paths,
    URLs, 4-D batches, and lists of these. `PRESETS` holds the preprocessing of well-known checkpoints.
    """

    _auto_class = "AutoImageProcessor"  # `save_pretrained` also saves the code
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
    # From 6 on, reduced decoding changes photos by at most one level of 255. For an output of 224 pixels, a photo of
    # 12 megapixels is decoded at half its size.
    reducing_gap: float | int | None = 6.0
    value_range: Any = None

    def __init__(self, **kwargs: Any) -> None:
        check_options(kwargs)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a processor from a stored dictionary and further options.

        Stored keys that nearly match an option, such as those of another library, are ignored with a warning.
        """
        check_options(kwargs)
        unknown = {name: meant for name in image_processor_dict if (meant := option_meant_by(name))}
        for name, meant in unknown.items():
            logger.warning_once(
                f"The stored image processor has an unknown option {name!r}, which is ignored: did you mean {meant!r}?"
            )
        stored = {name: value for name, value in image_processor_dict.items() if name not in unknown}
        return super().from_dict(stored, **kwargs)

    @classmethod
    def from_preset(cls, name: str, size: int | tuple[int, int] = 224, num_channels: int = 3, **kwargs: Any) -> Self:
        """Build the preprocessing called `name` in `PRESETS`.

        Args:
            name: A key of `PRESETS`.
            size: Size of the model's input in pixels, one number or (height, width).
            num_channels: Channels of the model's input: 1 for the luma of any image, 3 for RGB; other numbers need
                images with that many channels. All channels then have the average of the preset's mean and of its std.
            kwargs: Further options; they override the preset.

        Example:
            >>> processor = HFViTImageProcessorPil.from_preset("original", (32, 64))
            >>> processor(Image.new("CMYK", (300, 200)), return_tensors="np").pixel_values.shape
            (1, 3, 32, 64)
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}: choose one of {', '.join(PRESETS)}.")
        options = {"size": size, **PRESETS[name], **kwargs}
        if num_channels != 3:
            options |= options_for_channels(num_channels, options)
        return cls(**options)

    def set_output_size(self, size: int | tuple[int, int]) -> None:
        """Set the size of the output, one number or (height, width); the margin of a center crop scales with it."""
        height, width = (size, size) if isinstance(size, int) else size
        output = SizeDict(height=height, width=width)
        if not self.do_center_crop:
            self.size = output
            return
        factors = {"height": height / self.crop_size["height"], "width": width / self.crop_size["width"]}
        edges = dict(self.size).items()
        self.size = SizeDict(**{edge: round(old * factors.get(edge, max(factors.values()))) for edge, old in edges})
        self.crop_size = output

    def set_num_channels(self, number: int) -> None:
        """Set the channels of the output: 1 for the luma, 3 for RGB; other numbers need arrays with that many.

        Photographs become LA for 2 channels and RGBA for 4, opaque where they have no transparency.

        If the number changes, all channels get the average of mean and std, and the widest value range.
        """
        changed = options_for_channels(number, {"image_mean": self.image_mean, "image_std": self.image_std})
        for name, value in changed.items():
            setattr(self, name, value)
        if self.value_range is not None:
            pairs = checked_range(self.value_range)
            if len(pairs) not in (1, number):
                self.value_range = [min(low for low, _ in pairs), max(high for _, high in pairs)]

    @property
    def mode_with_alpha(self) -> str | None:
        """LA or RGBA: the mode that 8-bit gray and color images are converted to if the output has transparency.

        The output has transparency if all of its 2 or 4 channels share one mean, as `set_num_channels` sets it.
        Channels of measurements have different means.
        """
        if self.do_convert_rgb or self.value_range is not None or len(set(self.image_mean)) > 1:
            return None
        return {2: "LA", 4: "RGBA"}.get(len(self.image_mean))

    def to_dict(self) -> dict[str, Any]:
        """Return the options, with an `auto_map` that names the code of both backends."""
        auto_map = {
            "torchvision": "image_processing_hf_vit.HFViTImageProcessor",
            "pil": "image_processing_pil_hf_vit.HFViTImageProcessorPil",
        }
        return {**super().to_dict(), "auto_map": {"AutoImageProcessor": auto_map}}

    def least_size(self, old: tuple[int, int], **kwargs: Any) -> tuple[int, int]:
        """Return the smallest (height, width) that a file of size `old` may be decoded at, from `reducing_gap`.

        `kwargs` are options of a call that override those of the processor.
        """
        names = ("do_resize", "size", "crop_pct", "reducing_gap", "packing", "patch_size")
        do_resize, size, crop_pct, gap, packing, patch_size = (kwargs.get(name, getattr(self, name)) for name in names)
        if not do_resize or gap is None:
            return old
        if packing is not None:
            new = packed_size(old, checked_patch_size(packing, patch_size), packing)
        else:
            if not isinstance(size, SizeDict):  # the attribute was assigned
                size = self._standardize_kwargs(size=size, default_to_square=self.default_to_square)["size"]
            new = resized_size(old, size, crop_pct)
        return math.ceil(gap * new[0]), math.ceil(gap * new[1])

    # ----------------------------------------------------------------- steps that transformers' `preprocess` calls

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list[Any]:
        return list(flatten_images(images))  # `process_image` reads files, since it knows the size that is needed

    def _standardize_kwargs(self, resample: Any = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        kwargs = super()._standardize_kwargs(**kwargs)
        if not isinstance(resample, int | None):  # a name, or torchvision's InterpolationMode
            name = getattr(resample, "name", str(resample)).upper().removesuffix("_EXACT")
            if name not in Image.Resampling.__members__:
                names = ", ".join(Image.Resampling.__members__).lower()
                raise ValueError(
                    f"Expected resample as one of {names}, or as a number of PIL.Image.Resampling, got {resample!r}."
                )
            resample = Image.Resampling[name]
        crop_pct, size = kwargs.get("crop_pct"), kwargs["size"]
        if crop_pct is not None:
            if not 0 < crop_pct <= 1:
                raise ValueError(f"Expected crop_pct in (0, 1], got {crop_pct}: 0.875 keeps 224 of 256 pixels.")
            if kwargs.get("do_center_crop"):
                raise ValueError("Expected one way to crop, got crop_pct and do_center_crop: pass only one.")
            if not (size and size.height and size.width):
                raise ValueError(f"Expected size with height and width for crop_pct, got {size and dict(size)}.")
        if kwargs.get("do_pad"):
            raise ValueError("do_pad is not supported: resize to one size, or use a centre crop, which pads.")
        if kwargs.get("value_range") is not None:
            kwargs["value_range"] = checked_range(kwargs["value_range"])
        gap = kwargs.get("reducing_gap")
        if gap is not None and gap < 1:
            raise ValueError(f"Expected reducing_gap of at least 1, got {gap}: use 1 for the fastest decoding.")
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
        value_range: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Convert any input to the channels of the model's input.

        Returns a PIL image of mode RGB or L, or a tensor `[C, H, W]`, uint8 or unrounded float.
        """
        are_levels = False  # from 0 to 255
        if isinstance(image, str | bytes | os.PathLike):
            image, are_levels = (
                pixels_of_file(read_image(image, partial(self.least_size, **kwargs)), do_convert_rgb, value_range),
                True,
            )
            input_data_format = ChannelDimension.FIRST
        if value_range is not None:
            image = map_range(image, value_range, do_convert_rgb, input_data_format)
            input_data_format = ChannelDimension.FIRST
        if isinstance(image, Image.Image) and image.mode.startswith("I"):
            image, are_levels = levels(values_of_file(tensor_of_array(np.array(upright(image)))))[None], True
            input_data_format = ChannelDimension.FIRST
        if not isinstance(image, Image.Image):
            pixels = arranged(image, input_data_format)
            if pixels.is_floating_point() and (are_levels or not do_rescale):
                pixels = pixels.float()
            else:
                pixels, are_levels = levels(pixels), True
            if device is not None:
                pixels = pixels.to(device)
            # 8-bit RGBA on the CPU goes through Pillow, so that tensors and PIL images are rounded alike.
            for_pillow = (4,) if do_convert_rgb or self.mode_with_alpha is None else (1, 3, 4)
            if pixels.dtype != torch.uint8 or pixels.device.type != "cpu" or pixels.shape[0] not in for_pillow:
                if do_convert_rgb:
                    pixels = tensor_to_rgb(pixels, 255 if are_levels else None)
                if do_grayscale:
                    pixels = tensor_to_gray(pixels)
                return pixels
            image = pil_of_tensor(pixels)

        if do_convert_rgb:
            image = convert_to_rgb(image)
        else:
            image = upright_8_bit(image)
            if self.mode_with_alpha is not None:
                image = (
                    image
                    if image.mode == self.mode_with_alpha
                    else image.convert("RGBA").convert(self.mode_with_alpha)
                )
            if image.mode in ("P", "PA"):
                raise ValueError("A palette image stores indices instead of colours: pass do_convert_rgb=True.")
        if do_grayscale and image.mode != "L":
            image = image.convert("L")
        return image if image.mode in ("RGB", "L") else tensor_of_pil(image)

    def _preprocess(
        self,
        images: list[Image.Image | Tensor],
        disable_grouping: bool | None = None,
        return_tensors: str | TensorType | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Resize, crop and normalize the outputs of `process_image`."""
        if not images:
            raise ValueError("Expected at least one image, got none.")
        call = SimpleNamespace(**options)
        fit = self._fit if call.packing is None else self._fit_to_grid
        fitted = self._map(partial(fit, call=call), images, disable_grouping)
        tensors = [tensor_of_pil(image) if isinstance(image, Image.Image) else image for image in fitted]
        shapes = {tuple(image.shape) for image in tensors}
        data: dict[str, Any]
        if call.packing is not None:
            patches = torch.cat([cut_into_patches(image, call.patch_size) for image in tensors])
            grids = [[image.shape[1] // call.patch_size[0], image.shape[2] // call.patch_size[1]] for image in tensors]
            data = {"pixel_values": self._normalize(patches, call).flatten(1), "patch_grids": torch.tensor(grids)}
        elif len(shapes) == 1:
            batch = self._normalize(torch.stack([image.contiguous() for image in tensors]), call)
            data = {"pixel_values": batch if return_tensors else list(batch)}
        elif return_tensors is None:
            data = {"pixel_values": [self._normalize(torch.stack([image]), call)[0] for image in tensors]}
        else:
            raise ValueError(
                f"Expected images of one shape for return_tensors={return_tensors!r}, got {sorted(shapes)} "
                "(channels, height, width): leave do_resize on, or crop."
            )
        return BatchFeature({name: self._output(values) for name, values in data.items()}, return_tensors)

    # -------------------------------------------------------------------------------- resize, crop, normalize

    def _map(self, function: Callable[[Any], Any], images: list[Any], disable_grouping: bool | None) -> list[Any]:
        return [function(image) for image in images]

    def _fit(self, image: Image.Image | Tensor, call: SimpleNamespace) -> Image.Image | Tensor:
        """Resize and crop one image, or a batch of one shape, with the options of a call."""
        if call.do_resize:
            crop = call.size if call.crop_pct is not None else call.crop_size if call.do_center_crop else None
            keeps_aspect = call.crop_pct is not None or not (call.size and call.size.height and call.size.width)
            if crop and keeps_aspect:
                image = trim_long_side(image, crop)
            new_size = resized_size(size_of(image), call.size, call.crop_pct)
            image = self._resize(image, new_size, call.resample, do_clip=bool(call.do_rescale))
            if call.crop_pct is not None:
                return center_crop(image, call.size, rounding=round)  # like torchvision's CenterCrop, which timm uses
        return center_crop(image, call.crop_size, rounding=int) if call.do_center_crop else image

    def _fit_to_grid(self, image: Image.Image | Tensor, call: SimpleNamespace) -> Image.Image | Tensor:
        """Resize one image to whole patches for a pack."""
        new_size = packed_size(size_of(image), call.patch_size, call.packing)
        if not call.do_resize and size_of(image) != new_size:
            raise ValueError(
                f"Expected an image of at most {call.packing} whole patches of {call.patch_size} for packing without "
                f"do_resize, got {size_of(image)} (height, width): leave do_resize on."
            )
        return self._resize(image, new_size, call.resample, do_clip=bool(call.do_rescale))

    def _resize(self, image: Any, size: tuple[int, int], resample: int, do_clip: bool) -> Any:
        """Resize the width, then the height; with `do_clip` floats stay in 0..255, as 8-bit pixels do.

        The order matters: bicubic interpolation overshoots at edges, and each pass clips. Pillow uses this order
        before version 13; version 13 chooses the order by the sizes. The height of very tall images is resized first,
        since the intermediate image would otherwise fill the memory.
        """
        height, width = size_of(image)
        between = (height, size[1])
        if math.prod(between) > max(MAX_INTERMEDIATE_PIXELS, size[0] * width):
            between = (size[0], width)
        for step in (between, size):
            if size_of(image) != step:
                image = self._resize_side(image, step, resample)
                if do_clip and isinstance(image, Tensor) and image.is_floating_point():
                    image = image.clamp(0, 255)
        return image

    def _resize_side(self, image: Any, size: tuple[int, int], resample: int) -> Any:
        raise NotImplementedError

    def _normalize(self, batch: Tensor, call: SimpleNamespace) -> Tensor:
        """Rescale and normalize `[B, C, H, W]`; changes a float batch in place."""
        scale = call.rescale_factor if call.do_rescale else 1.0
        if not call.do_normalize:
            return batch * scale if call.do_rescale else batch
        mean = per_channel(call.image_mean, batch.shape[1], "image_mean") / scale
        std = per_channel(call.image_std, batch.shape[1], "image_std") / scale
        return batch.float().sub_(mean.to(batch.device)).div_(std.to(batch.device))

    def _output(self, data: Any) -> Any:
        return data


class HFViTImageProcessorPil(HFViTImageProcessing, PilBackend):  # type: ignore[misc]
    """Preprocess images with Pillow on the CPU."""

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
