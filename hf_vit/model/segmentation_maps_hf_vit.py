"""Segmentation maps in the image processor: from a map to labels, and from logits to a map.

A map holds a class index for every pixel. It is resized and cropped like its image, but with nearest-neighbor
interpolation, and is not normalized. Pixels outside of the map and pixels of value 255 get the label 255, which the
loss ignores.
"""

import os
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_base import BatchFeature

from .image_conversion_hf_vit import arranged, flatten_images, tensor_of_array
from .image_geometry_hf_vit import resize_logits, size_of
from .image_reading_hf_vit import read_image, upright

IGNORED = 255


def class_indices(segmentation_map: Any) -> Tensor:
    """Return the class indices of a map, `[H, W]`, in the dtype that it stores.

    Args:
        segmentation_map: A path, bytes, a grayscale or palette PIL image, or an array or tensor `[H, W]`. The index
            of a palette image is the class. Color images must have the same value in all color channels.

    Raises:
        ValueError: If the map has colors instead of indices.
    """
    if isinstance(segmentation_map, str | bytes | os.PathLike):
        segmentation_map = read_image(segmentation_map)
    if isinstance(segmentation_map, Image.Image):
        segmentation_map = np.array(upright(segmentation_map))
    if isinstance(segmentation_map, np.ndarray):
        segmentation_map = tensor_of_array(segmentation_map)
    pixels = segmentation_map
    if pixels.ndim == 3:
        pixels = arranged(pixels, None)  # [C, H, W]
        colors = pixels[:3] if len(pixels) > 2 else pixels[:1]  # without transparency
        if (colors != colors[:1]).any():
            raise ValueError(
                f"Expected a segmentation map with one class index per pixel, got an image of {len(pixels)} channels "
                "with colours: convert the colours to class indices, in a grayscale or palette image."
            )
        pixels = colors[0]
    if pixels.ndim != 2:
        raise ValueError(f"Expected a segmentation map [height, width], got {list(pixels.shape)}.")
    return pixels


def reduce_labels(labels: Tensor) -> Tensor:
    """Return labels minus 1; 0, the background, becomes `IGNORED`."""
    return torch.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)


class HFViTSegmentationMaps:
    """Mixin of `HFViTImageProcessing` that processes segmentation maps."""

    do_reduce_labels: bool | None = None
    crop_pct: Any
    do_center_crop: Any

    def preprocess(self, images: Any, segmentation_maps: Any = None, **kwargs: Any) -> BatchFeature:
        """Preprocess images and, if given, their segmentation maps, which become `labels`, int64 `[B, H, W]`.

        Args:
            images: As described in the docstring of the class.
            segmentation_maps: One or several, as for `class_indices`, each of the size of its image.
            kwargs: Options of this call. `do_reduce_labels` subtracts 1 from all classes, and ignores class 0.
        """
        parent: Any = super()
        return parent.preprocess(images, segmentation_maps, **kwargs)

    def _preprocess_image_like_inputs(
        self, images: Any, segmentation_maps: Any = None, do_reduce_labels: bool | None = None, **kwargs: Any
    ) -> BatchFeature:
        processor: Any = self
        if segmentation_maps is None:
            parent: Any = super()
            return parent._preprocess_image_like_inputs(images, **kwargs)
        if kwargs["packing"] is not None:
            raise ValueError("A pack has no segmentation maps: set packing=None.")
        # Images are decoded completely, so that they have the sizes of their maps.
        prepared = processor._prepare_image_like_inputs(images, **{**kwargs, "reducing_gap": None})
        maps = [class_indices(each) for each in _single_maps(segmentation_maps)]
        sizes = [[size_of(each) for each in group] for group in (prepared, maps)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"Expected a segmentation map for each image, of its size, got maps of {sizes[1]} for images of "
                f"{sizes[0]} (height, width)."
            )
        call = SimpleNamespace(**{**kwargs, "resample": Image.Resampling.NEAREST, "do_rescale": False})
        labels = [self._labels(each, call, bool(do_reduce_labels)) for each in maps]
        inputs = processor._preprocess(prepared, **kwargs)
        return_tensors = kwargs.get("return_tensors")
        stacked = processor._output(torch.stack(labels) if return_tensors else labels)
        return BatchFeature({**inputs, "labels": stacked}, return_tensors)

    def _labels(self, indices: Tensor, call: SimpleNamespace, is_reduced: bool) -> Tensor:
        """Return labels `[H, W]` for class indices of any size."""
        processor: Any = self
        indices = indices.cpu().float()
        # A crop fills the area outside of the map with 0, so the classes are shifted by 1 during the crop.
        fitted = processor._fit((reduce_labels(indices) if is_reduced else indices)[None] + 1, call)[0] - 1
        return fitted.long().masked_fill(fitted < 0, IGNORED)

    def original_size(self, image: Any) -> tuple[int, int]:
        """Return the (height, width) of the upright image, regardless of the size it is processed at."""
        if isinstance(image, str | bytes | os.PathLike):
            image = read_image(image)
        if isinstance(image, Image.Image):
            return size_of(upright(image))
        return size_of(arranged(image, None))

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Any]:
        """Return the predicted class of every pixel, int64 `[H, W]` for each image.

        Args:
            outputs: Output of a model, with `logits` `[B, num_labels, h, w]`.
            target_sizes: (height, width) of each image, to which its logits are resized; by default, maps have the
                size of the logits.
            return_segmentation_scores: Whether to return `segmentation`, the classes, and `segmentation_scores`, the
                logits `[num_labels, H, W]`, for each image.

        Raises:
            ValueError: If the numbers of sizes and images differ, or the processor crops images.
        """
        logits = outputs.logits
        scores = list(logits) if target_sizes is None else self._resized_scores(logits, target_sizes)
        maps = [each.argmax(dim=0) for each in scores]
        if not return_segmentation_scores:
            return maps
        pairs = zip(maps, scores, strict=True)
        return [BatchFeature({"segmentation": classes, "segmentation_scores": each}) for classes, each in pairs]

    def _resized_scores(self, logits: Tensor, target_sizes: Sequence[tuple[int, int]] | Tensor) -> list[Tensor]:
        if self.crop_pct is not None or self.do_center_crop:
            raise ValueError(
                "The image processor crops images, so maps do not cover the target sizes: set crop_pct=None and "
                "do_center_crop=False."
            )
        sizes = target_sizes.tolist() if isinstance(target_sizes, Tensor) else target_sizes
        if len(sizes) != len(logits):
            raise ValueError(f"Expected a target size for each of {len(logits)} images, got {len(sizes)}.")
        return [resize_logits(each[None], (size[0], size[1]))[0] for each, size in zip(logits, sizes, strict=True)]


def _single_maps(maps: Any) -> Iterator[Any]:
    """Yield single maps; an array of three dimensions is a batch unless its first or last one has 1 channel."""
    for each in flatten_images(maps):
        is_batch = not isinstance(each, str | bytes | os.PathLike | Image.Image) and each.ndim == 3
        yield from each if is_batch and 1 not in (each.shape[0], each.shape[-1]) else [each]
