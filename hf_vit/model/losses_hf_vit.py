"""The loss of a classifier."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_hf_vit import HFViTConfig


def classification_loss(
    labels: Tensor,
    logits: Tensor,
    config: HFViTConfig,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute the loss of a classifier in float32.

    `config.problem_type` selects the loss. If it is `None`, the shape and dtype of the labels do; unlike other models
    of transformers, this one does not write the result into the config.

    Args:
        labels: Class indices `[B]`; soft labels `[B, num_labels]` that sum to one (mixup, distillation); 0 or 1 per
            label, `[B, num_labels]`, with `problem_type="multi_label_classification"`; or regression targets.
        logits: `[B, num_labels]`.
        config: The model's config.
        num_items_in_batch: Number of entries of `labels` in all accumulated batches. If given, the sum of the losses
            is divided by it; otherwise the loss is the mean over this batch.

    Raises:
        ValueError: If soft labels do not sum to one, or labels and logits differ in shape.
    """
    logits, labels = logits.float(), labels.to(logits.device)
    is_class = not labels.is_floating_point() and labels.ndim == 1
    kind = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    if kind == "single_label_classification" and is_class:
        loss = F.cross_entropy(logits, labels, reduction="sum")  # a label of -100 is ignored
        entries = (labels != -100).sum().clamp(min=1)
        return loss / (entries if num_items_in_batch is None else num_items_in_batch)
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
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return loss / len(labels) if num_items_in_batch is None else loss * logits.shape[-1] / num_items_in_batch
    measure = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
    if num_items_in_batch is None:
        return measure(logits, labels)
    return measure(logits, labels, reduction="sum") / num_items_in_batch


def _check_soft_labels(labels: Tensor, config: HFViTConfig) -> None:
    # Without problem_type, labels of several classes per image must not be mistaken for a distribution.
    if config.problem_type is not None or torch.compiler.is_compiling():
        return
    if (labels.sum(dim=-1) - 1).abs().max() > 1e-3:
        raise ValueError(
            "Labels [batch, num_labels] are soft labels by default, but their rows do not sum to one: for several "
            "labels per image, set problem_type='multi_label_classification' in the config."
        )
