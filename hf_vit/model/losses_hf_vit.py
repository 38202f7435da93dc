"""Scale of the logits and loss of classifiers of images or pixels."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_hf_vit import HFViTConfig
from .image_geometry_hf_vit import resize_logits

ACTIVATIONS = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}


def scaled_logits(outputs: Tensor, config: HFViTConfig) -> Tensor:
    """Return the logits for the outputs of a head `[B, num_labels]`.

    They are divided by the temperature of `config`. Standardized targets are converted to their own units, in float32,
    since half precision would round values that are large compared to their standard deviation.
    """
    if config.temperature != 1:
        outputs = outputs / config.temperature
    if config.target_scale is not None and config.target_mean is not None:
        outputs = outputs.float()
        outputs = outputs * filled(outputs, config.target_scale) + filled(outputs, config.target_mean)
    return outputs


def filled(like: Tensor, values: Sequence[float]) -> Tensor:
    """Return values as a tensor with the dtype and device of `like`; a copy to a GPU would synchronize with it."""
    return torch.stack([like.new_full((), value) for value in values])


def activation_of(config: HFViTConfig) -> str:
    """Return the activation that converts logits to scores: `"softmax"`, `"sigmoid"`, or `"none"` for a regression.

    It follows from `config.problem_type`. Without one, a single output gets the sigmoid, as in transformers' pipeline.
    """
    if config.problem_type is None:
        return "sigmoid" if config.num_labels == 1 else "softmax"
    return ACTIVATIONS[config.problem_type]


def classification_loss(
    labels: Tensor,
    logits: Tensor,
    config: HFViTConfig,
    num_items_in_batch: Tensor | int | None = None,
    class_weights: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute the loss of a classifier in float32.

    `config.problem_type` selects the loss. If it is `None`, one output is a regression, and several outputs have one
    label per image. Such a regression is then written into the config, as transformers does, so that pipelines return
    its value.

    Args:
        labels: Class indices `[B]`; soft labels `[B, num_labels]` that sum to one (mixup, distillation); 0 or 1 per
            label, `[B, num_labels]`, with `problem_type="multi_label_classification"`; or regression targets in their
            own units. A class index of -100 is ignored, and so is a -100 for one of several labels.
        logits: `[B, num_labels]`.
        config: The model's config. With `target_scale`, the loss of a regression is that of standardized targets.
        num_items_in_batch: Number of entries of `labels` in all accumulated batches. If given, the sum of the losses
            is divided by it; otherwise the loss is the mean over this batch.
        class_weights: `[num_labels]`, float32: factors on the loss of each class or, with several labels per image, on
            the loss of its positives. The divisor is still the number of entries, so weights of mean 1 keep the scale.

    Raises:
        ValueError: If soft labels do not sum to one, or labels and logits differ in shape.
    """
    logits, labels = logits.float(), labels.to(logits.device)
    is_class = not labels.is_floating_point() and labels.ndim == 1
    kind = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    if kind == "single_label_classification" and is_class:
        loss = F.cross_entropy(logits, labels, class_weights, reduction="sum")  # a label of -100 is ignored
        entries = (labels != -100).sum().clamp(min=1)
        return loss / (entries if num_items_in_batch is None else num_items_in_batch)
    if kind == "regression" and config.problem_type is None and not torch.compiler.is_compiling():
        config.problem_type = kind
    if kind == "regression" and config.num_labels == 1:
        logits = logits.squeeze(-1)
        labels = labels.reshape(logits.shape)
    if labels.shape != logits.shape:
        raise ValueError(
            f"{kind} with {config.num_labels} labels needs labels of shape {list(logits.shape)}, or class indices "
            f"[batch] for single_label_classification; got {list(labels.shape)} of {labels.dtype}."
        )
    labels = labels.float()
    if kind == "single_label_classification":
        _check_soft_labels(labels, config)
        # Every row is one distribution: its entries together count as num_labels items.
        loss = F.cross_entropy(logits, labels, class_weights, reduction="sum")
        return loss / len(labels) if num_items_in_batch is None else loss * logits.shape[-1] / num_items_in_batch
    if kind == "regression":
        is_known = torch.ones_like(labels, dtype=torch.bool)
        residuals = logits - labels
        if config.target_scale is not None:
            residuals = residuals / filled(residuals, config.target_scale)
        losses = residuals.square()
    else:
        is_known = labels != -100
        losses = F.binary_cross_entropy_with_logits(
            logits, labels.where(is_known, 0), reduction="none", pos_weight=class_weights
        )
        losses = losses * is_known
    return losses.sum() / (is_known.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def _check_soft_labels(labels: Tensor, config: HFViTConfig) -> None:
    # Without problem_type, labels of several classes per image must not be mistaken for a distribution.
    if config.problem_type is not None or torch.compiler.is_compiling():
        return
    if (labels.sum(dim=-1) - 1).abs().max() > 1e-3:
        raise ValueError(
            "Labels [batch, num_labels] are soft labels by default, but their rows do not sum to one: for several "
            "labels per image, set problem_type='multi_label_classification' in the config."
        )


def pixel_losses(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of every pixel in float32, and whether it counts, `[B, H, W]` each.

    Args:
        logits: `[B, num_labels, h, w]`, which are resized to the labels.
        labels: Class indices `[B, H, W]`.
        ignore_index: Label of pixels that do not count; their loss is 0.
    """
    labels = labels.to(logits.device)
    if labels.ndim != 3 or labels.is_floating_point():
        raise ValueError(
            f"Expected class indices [batch, height, width] as labels, got {list(labels.shape)} of {labels.dtype}: "
            "prepare the maps with the image processor, segmentation_maps=..."
        )
    labels = labels.long()
    losses = F.cross_entropy(
        resize_logits(logits, (labels.shape[1], labels.shape[2])), labels, ignore_index=ignore_index, reduction="none"
    )
    return losses, labels != ignore_index


def segmentation_loss(logits: Tensor, labels: Tensor, config: HFViTConfig) -> Tensor:
    """Return the mean cross-entropy of the pixels that count, at the size of the labels; see `pixel_losses`."""
    losses, is_known = pixel_losses(logits, labels, config.semantic_loss_ignore_index)
    return losses.sum() / is_known.sum().clamp(min=1)
