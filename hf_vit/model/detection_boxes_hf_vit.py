"""Boxes of objects in the image processor: from COCO's annotations to labels, and from outputs to boxes in pixels.

Boxes of annotations are in pixels of the upright image, after the EXIF orientation is applied. Boxes of labels are
relative to the image, so that resizing does not change them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_base import BatchFeature

from .image_conversion_hf_vit import flatten_images
from .image_geometry_hf_vit import corners_of

MOST_OBJECTS = 100  # per image, as in COCO's evaluation
MOST_OVERLAP = 0.5  # IoU of two objects of a class, as in torchvision's detectors


class HFViTDetectionBoxes:
    """Mixin of `HFViTImageProcessing` that processes the boxes of images."""

    crop_pct: Any
    do_center_crop: Any
    packing: Any

    def preprocess(self, images: Any, *args: Any, annotations: Any = None, **kwargs: Any) -> BatchFeature:
        """Preprocess images and, if given, their annotations, which become `labels`, one dictionary per image.

        Args:
            images: As described in the docstring of the class.
            args: Segmentation maps, if there are any.
            annotations: For each image, in COCO's format: `{"image_id": 7, "annotations": [{"bbox": [left, top,
                width, height], "category_id": 0, "area": 12.0, "iscrowd": 0}]}` in pixels of the upright image.
                Boxes are clipped to the image. Crowds, and boxes outside of the image, are left out.
            kwargs: Options of this call.

        Returns:
            `labels` has `class_labels` int64 `[n]`; `boxes` float32 `[n, 4]`, center x, center y, width and height
            relative to the image; and `image_id`, `area`, `iscrowd`, `orig_size`, `size`, as in transformers' DETR.
        """
        parent: Any = super()
        if annotations is None:
            return parent.preprocess(images, *args, **kwargs)
        processor: Any = self
        self._require_whole_images(**kwargs)
        images = list(flatten_images(images))
        sizes = [processor.original_size(image) for image in images]
        annotations = [annotations] if isinstance(annotations, Mapping) else list(annotations)
        if len(annotations) != len(sizes):
            raise ValueError(f"Expected annotations for each of {len(sizes)} images, got {len(annotations)}.")
        inputs = parent.preprocess(images, *args, **kwargs)
        new_sizes = [(each.shape[-2], each.shape[-1]) for each in inputs["pixel_values"]]
        labels = map(labels_of, annotations, sizes, new_sizes)
        kind = kwargs.get("return_tensors")
        inputs["labels"] = [BatchFeature(each, tensor_type=kind) for each in labels]
        return inputs

    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float | Sequence[float] = 0.5,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        top_k: int = MOST_OBJECTS,
    ) -> list[dict[str, Tensor]]:
        """Return the detected objects of each image: `scores`, `labels` and `boxes`, the highest score first.

        Args:
            outputs: Output of a model for object detection.
            threshold: Only objects with a score above it are returned; one number, or one per class.
            target_sizes: (height, width) of each image. Boxes (left, top, right, bottom) are in its pixels; by
                default, they are relative to the image.
            top_k: Maximum number of objects per image.

        Raises:
            ValueError: If the numbers of sizes and images differ, or the processor crops images.
        """
        self._require_whole_images()
        scores, classes, boxes = most_likely_objects(outputs.logits, outputs.pred_boxes, top_k).split([1, 1, 4], dim=2)
        scores, labels = scores.squeeze(2), classes.squeeze(2).long()
        boxes = corners_of(boxes).clamp(0, 1)
        if target_sizes is not None:
            if len(target_sizes) != len(boxes):
                raise ValueError(f"Expected a target size for each of {len(boxes)} images, got {len(target_sizes)}.")
            sizes = torch.as_tensor(target_sizes, device=boxes.device, dtype=boxes.dtype)
            boxes = boxes * sizes.flip(1).repeat(1, 2).unsqueeze(1)
        least = torch.as_tensor(threshold, device=scores.device)
        found = scores > (least[labels] if least.ndim else least)
        return [
            {"scores": scores[image][kept], "labels": labels[image][kept], "boxes": boxes[image][kept]}
            for image, kept in enumerate(found)
        ]

    def _require_whole_images(self, **call: Any) -> None:
        options = {name: call.get(name, getattr(self, name)) for name in ("crop_pct", "do_center_crop", "packing")}
        if given := [f"{name}={value}" for name, value in options.items() if value]:
            raise ValueError(
                f"Expected an image processor that resizes whole images for object detection, got {', '.join(given)}: "
                "set crop_pct=None, do_center_crop=False and packing=None."
            )


def labels_of(target: Mapping[str, Any], size: tuple[int, int], new_size: tuple[int, int]) -> dict[str, Tensor]:
    """Convert the annotations of an image, in COCO's format, to labels.

    Args:
        target: `image_id` and `annotations`, as for `preprocess`.
        size: (height, width) of the upright image.
        new_size: (height, width) of its pixel values.
    """
    if missing := {"image_id", "annotations"} - {*target}:
        raise ValueError(
            f"Expected annotations as a dictionary with image_id and annotations for each image, got one without "
            f"{' and '.join(sorted(missing))}: its keys are {', '.join(map(str, target)) or 'none'}."
        )
    objects = [each for each in target["annotations"] if not each.get("iscrowd")]
    if incomplete := [each for each in objects if not {"bbox", "category_id"} <= {*each}]:
        raise ValueError(
            "Expected bbox, [left, top, width, height], and category_id for every object, got one with the keys "
            f"{', '.join(map(str, incomplete[0])) or 'none'}."
        )
    height, width = size
    boxes = torch.tensor([[float(number) for number in each["bbox"]] for each in objects]).reshape(-1, 4)
    areas = [each.get("area", box[2] * box[3]) for each, box in zip(objects, boxes.tolist(), strict=True)]
    classes = torch.tensor([int(each["category_id"]) for each in objects], dtype=torch.int64)
    size_of_image = torch.tensor([width, height])
    low = (boxes[:, :2] / size_of_image).clamp(0, 1)
    high = ((boxes[:, :2] + boxes[:, 2:]) / size_of_image).clamp(0, 1)
    kept = (high > low).all(dim=1)
    scale = new_size[0] * new_size[1] / (height * width)
    return {
        "image_id": torch.tensor([target["image_id"]]),
        "class_labels": classes[kept],
        "boxes": torch.cat([(low + high) / 2, high - low], dim=1)[kept],
        "area": torch.tensor(areas, dtype=torch.float32)[kept] * scale,
        "iscrowd": torch.zeros_like(classes[kept]),
        "orig_size": torch.tensor(size),
        "size": torch.tensor(new_size),
    }


def most_likely_objects(logits: Tensor, boxes: Tensor, number: int = MOST_OBJECTS) -> Tensor:
    """Return the objects with the highest scores, float32 `[B, K, 6]`: score, class and box, whose form is unchanged.

    An object that overlaps a more likely one of its class gets the score 0.

    Args:
        logits: `[B, Q, num_labels]`; the score is their sigmoid.
        boxes: `[B, Q, 4]`: center, width and height.
        number: Largest K.
    """
    queries, num_labels = logits.shape[1:]
    scores, chosen = logits.float().sigmoid().flatten(1).topk(min(number, queries * num_labels), dim=1)
    classes = chosen % num_labels
    boxes = boxes.float().gather(1, (chosen // num_labels).unsqueeze(2).expand(-1, -1, 4))
    scores, order = scores.where(~are_duplicates(boxes, classes), 0).sort(dim=1, descending=True, stable=True)
    objects = torch.cat([classes.unsqueeze(2), boxes], dim=2)
    return torch.cat([scores.unsqueeze(2), objects.gather(1, order.unsqueeze(2).expand_as(objects))], dim=2)


def are_duplicates(boxes: Tensor, classes: Tensor) -> Tensor:
    """Return whether each box overlaps an earlier one of its class by more than `MOST_OVERLAP`, `[B, K]`.

    A large object can have several peaks. This is Fast NMS (YOLACT, arXiv:1904.02689): earlier boxes count even if
    they are duplicates themselves.

    Args:
        boxes: `[B, K, 4]`: center, width and height; the most likely first.
        classes: `[B, K]`.
    """
    low, high = corners_of(boxes).unsqueeze(1).split(2, dim=-1)  # [B, 1, K, 2]
    sides = torch.minimum(high, high.transpose(1, 2)) - torch.maximum(low, low.transpose(1, 2))  # [B, K, K, 2]
    common, areas = sides.clamp(min=0).prod(dim=-1), (high - low).prod(dim=-1)
    overlap = common / (areas + areas.transpose(1, 2) - common).clamp(min=1e-9)
    is_same = classes.unsqueeze(1) == classes.unsqueeze(2)
    return ((overlap > MOST_OVERLAP) & is_same).triu(diagonal=1).any(dim=1)
