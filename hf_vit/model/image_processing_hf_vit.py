"""Image processor of the Vision Transformer: the torchvision backend.

It shares everything except the resize with the PIL backend. On every device, resized pixels differ from Pillow's by
at most one level of 255.
"""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_transforms import group_images_by_shape, reorder_images

from .image_conversion_hf_vit import pil_of_tensor, tensor_of_pil
from .image_geometry_hf_vit import size_of
from .image_processing_pil_hf_vit import HFViTImageProcessing, HFViTImageProcessorKwargs

INTERPOLATIONS: dict[int, tvF.InterpolationMode] = {
    Image.Resampling.NEAREST: tvF.InterpolationMode.NEAREST_EXACT,
    Image.Resampling.BILINEAR: tvF.InterpolationMode.BILINEAR,
    Image.Resampling.BICUBIC: tvF.InterpolationMode.BICUBIC,
}


class HFViTImageProcessor(HFViTImageProcessing, TorchvisionBackend):  # type: ignore[misc]
    """Preprocess images with torchvision on the CPU or, with `device`, on an accelerator."""

    valid_kwargs = HFViTImageProcessorKwargs

    def process_image(self, image: Any, device: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        image = super().process_image(image, device=device, **kwargs)
        if isinstance(image, Image.Image) and device is not None and torch.device(device).type != "cpu":
            return tensor_of_pil(image).to(device)
        return image

    def _map(self, function: Callable[[Any], Any], images: list[Any], disable_grouping: bool | None) -> list[Any]:
        """Process images of one shape as a batch if they are on an accelerator."""
        if any(isinstance(image, Image.Image) or image.device.type == "cpu" for image in images):
            return super()._map(function, images, disable_grouping)
        groups, index = group_images_by_shape(images, disable_grouping=disable_grouping)
        return list(reorder_images({shape: function(batch) for shape, batch in groups.items()}, index))

    def _resize(self, image: Any, size: tuple[int, int], resample: int, do_clip: bool) -> Any:
        is_tensor = isinstance(image, Tensor)
        if not is_tensor or (image.dtype == torch.uint8 and image.device.type == "cpu"):
            height, width = size_of(image)
            if resample == Image.Resampling.BILINEAR and height >= size[0] and width >= size[1]:
                # For downscaling, torchvision's 8-bit kernel resizes the width, then the height, in one call; pixels
                # differ from Pillow's by at most one level.
                pixels = image if is_tensor else tensor_of_pil(image)
                return tvF.resize(pixels, list(size), interpolation=INTERPOLATIONS[resample])
            image = pil_of_tensor(image) if is_tensor and image.shape[0] in (1, 3) else image
        if isinstance(image, Image.Image) or image.is_floating_point():
            return super()._resize(image, size, resample, do_clip)
        # Pillow also rounds between the two passes. Without it, a value changes by less than one level.
        floats = super()._resize(image.float(), size, resample, do_clip=True)
        return floats.round().to(image.dtype)

    def _resize_side(self, image: Any, size: tuple[int, int], resample: int) -> Any:
        interpolation = INTERPOLATIONS.get(resample)
        if isinstance(image, Image.Image):
            # The 8-bit kernel has 16-bit weights. With it, bicubic interpolation and upscaling would differ from
            # Pillow by two levels in one value per million, in one photo out of five. Pillow therefore resizes the
            # width.
            if interpolation is None or image.width != size[1]:
                return image.resize((size[1], size[0]), resample)
            image = tensor_of_pil(image)
        elif interpolation is None:
            raise ValueError(
                "Expected resample nearest (0), bilinear (2) or bicubic (3) for float images and on accelerators, "
                f"got {resample}: use backend='pil'."
            )
        return tvF.resize(image, list(size), interpolation=interpolation)


__all__ = ["HFViTImageProcessor"]
