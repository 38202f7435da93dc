"""Metrics and features of a model over a loader: every image once, in order, on any number of processes.

A batch is `pixel_values` (uint8 `[B, C, H, W]`), `labels` (int64 `[B]`; float32 `[B, num_labels]` for several labels
per image and for targets; masks, uint8 `[B, H, W]`; or objects, float32 `[B, M, 5]`), `index` `[B]`, and `broken`,
the names of images that could not be read. The index is the position of the image in the data, or -1 if the image is
not counted.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

from ..inference.threads import on_every_core
from ..model.detection_boxes_hf_vit import most_likely_objects
from ..model.detection_hf_vit import object_losses
from ..model.image_geometry_hf_vit import resize_logits
from ..model.losses_hf_vit import pixel_losses
from ..system.transfers import HostCopies
from .detection import BoxResults, need_pycocotools
from .labels import kind_of
from .results import ImageResults, LabelResults, MaskResults, TargetResults

Results = ImageResults | LabelResults | TargetResults | MaskResults | BoxResults

LOWER_IS_BETTER = frozenset({"loss", "mae", "rmse", "calibration_error"})  # of the names of metrics

MOST_ON_DEVICE = 256 << 20  # bytes of the results of batches, before they are copied to the CPU
# From a model, a loader, and what maps a batch to `pixel_values`, to every batch with its outputs.
Forward = Callable[[Any, Any, Callable[[Any], Tensor]], Iterator[tuple[Any, Any]]]


def forward_in_turn(model: Any, loader: Any, to_input: Callable[[Any], Tensor]) -> Iterator[tuple[Any, Any]]:
    """Yield each batch of a loader with the outputs of the model."""
    for batch in loader:
        yield batch, model(pixel_values=to_input(batch))


def forward_on_cores(model: Any, loader: Any, to_input: Callable[[Any], Tensor]) -> Iterator[tuple[Any, Any]]:
    """Yield each batch of a loader with the outputs of the model; each CPU core reads and computes batches alone."""

    @torch.inference_mode()
    def forward(visits: list[Any]) -> tuple[Any, Any]:
        batch = loader.collate_fn([loader.dataset[visit] for visit in visits])
        return batch, model(pixel_values=to_input(batch))

    return on_every_core(forward, loader.batch_sampler)


def classify(
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Any,
    normalize: Callable[[Tensor], Tensor],
    forward: Forward = forward_in_turn,
    has_logits: bool = False,
) -> ImageResults:
    """Classify every image of a loader; all processes get the results of all.

    Args:
        model: Prepared by `accelerator`, or plain on its device. Its mode is restored.
        loader: Gives every process batches of the same number and sizes.
        normalize: Maps uint8 pixels to the input of the model.
        forward: How batches are computed.
        has_logits: Whether the results have the logits.
    """
    num_labels = 0

    def measure(outputs: Any, labels: Tensor) -> tuple[Tensor, ...]:
        nonlocal num_labels
        num_labels = outputs.logits.shape[-1]
        return (*_of_classes(outputs.logits, labels), *([outputs.logits.float()] if has_logits else []))

    columns, broken = _of_each_image(model, loader, accelerator, normalize, measure, forward)
    index, labels, predicted, confidence, losses, ranks, *logits = columns
    found = logits[0] if has_logits else None
    return ImageResults(labels, predicted, confidence, losses, ranks, num_labels, broken, index, found)


def recognize(
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Any,
    normalize: Callable[[Tensor], Tensor],
    forward: Forward = forward_in_turn,
    thresholds: Sequence[float] | None = None,
) -> LabelResults:
    """Compute the probability of every label for every image of a loader.

    Args:
        model, loader, accelerator, normalize, forward: As for `classify`. Labels of the batches are 0 or 1,
            `[B, num_labels]`; -100 stands for an unknown one.
        thresholds: As for `LabelResults`.
    """

    def measure(outputs: Any, labels: Tensor) -> tuple[Tensor, ...]:
        return _of_labels(outputs.logits, labels)

    columns, broken = _of_each_image(model, loader, accelerator, normalize, measure, forward)
    index, labels, scores, losses = columns
    return LabelResults(labels, scores, losses, thresholds, broken, index)


def regress(
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Any,
    normalize: Callable[[Tensor], Tensor],
    forward: Forward = forward_in_turn,
    scale: Sequence[float] | None = None,
) -> TargetResults:
    """Predict the targets of every image of a loader.

    Args:
        model, loader, accelerator, normalize, forward: As for `classify`. Labels of the batches are `[B, num_labels]`.
        scale: As for `TargetResults`.
    """

    def measure(outputs: Any, labels: Tensor) -> tuple[Tensor, ...]:
        return labels.float(), outputs.logits.float()

    (index, labels, predicted), broken = _of_each_image(model, loader, accelerator, normalize, measure, forward)
    return TargetResults(labels, predicted, scale, broken, index)


def segment(
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Any,
    normalize: Callable[[Tensor], Tensor],
    forward: Forward = forward_in_turn,
    ignore_index: int = 255,
) -> MaskResults:
    """Predict the classes of the pixels of every image of a loader, at the size of its mask in the batch.

    Args:
        model, loader, accelerator, normalize, forward: As for `classify`. Labels of the batches are `[B, H, W]`.
        ignore_index: Label of pixels that do not count.
    """

    def measure(outputs: Any, labels: Tensor) -> tuple[Tensor, ...]:
        return pixel_counts(outputs.logits, labels, ignore_index)

    (index, *columns), broken = _of_each_image(model, loader, accelerator, normalize, measure, forward)
    labels, predicted, hits, losses = columns
    return MaskResults(labels, predicted, hits, losses, broken, index)


def detect(
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Any,
    normalize: Callable[[Tensor], Tensor],
    forward: Forward = forward_in_turn,
    thresholds: Sequence[float] | None = None,
) -> BoxResults:
    """Detect the objects of every image of a loader.

    Args:
        model, loader, accelerator, normalize, forward: As for `classify`. Labels of the batches are `[B, M, 5]`.
        thresholds: As for `BoxResults`.
    """
    need_pycocotools()
    num_labels = 0

    def measure(outputs: Any, labels: Tensor) -> tuple[Tensor, ...]:
        nonlocal num_labels
        num_labels = outputs.logits.shape[-1]
        return objects_and_losses(outputs, labels)

    columns, broken = _of_each_image(model, loader, accelerator, normalize, measure, forward)
    index, labels, predicted, losses = columns
    return BoxResults(labels, predicted, losses, num_labels, thresholds, broken, index)


def evaluate_images(
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Any,
    normalize: Callable[[Tensor], Tensor],
    config: Any,
    forward: Forward = forward_in_turn,
) -> Results:
    """Return the results of a model per image, of the kind that `kind_of` its config.

    Args:
        model, loader, accelerator, normalize, forward: As for `classify`.
        config: Config of the model. Its thresholds decide which of several labels are predicted.
    """
    measures: dict[str, Callable[..., Results]] = {
        "single_label_classification": classify,
        "multi_label_classification": partial(recognize, thresholds=config.thresholds),
        "regression": partial(regress, scale=config.target_scale),
        "semantic_segmentation": partial(segment, ignore_index=config.semantic_loss_ignore_index),
        "object_detection": partial(detect, thresholds=config.thresholds),
    }
    measure = measures[kind_of(config)]
    return measure(model, loader, accelerator, normalize, forward=forward)


def results_of(logits: Tensor, labels: Tensor, config: Any) -> Results:
    """Return the results for logits `[N, num_labels]` that another loop computed, such as that of Trainer.

    Args:
        logits, labels: Of every image, on the CPU; labels as in a batch.
        config: As for `evaluate_images`.
    """
    if config.problem_type == "regression":
        return TargetResults(labels.float(), logits.float(), config.target_scale)
    if config.problem_type == "multi_label_classification":
        labels, scores, losses = _of_labels(logits, labels)
        return LabelResults(labels, scores, losses, config.thresholds)
    labels, predicted, confidence, losses, ranks = _of_classes(logits, labels)
    return ImageResults(labels, predicted, confidence, losses, ranks, logits.shape[-1])


def extract_features(
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Any,
    normalize: Callable[[Tensor], Tensor],
    pooled: nn.Module,
    forward: Forward = forward_in_turn,
) -> tuple[Tensor, Tensor, list[str]]:
    """Compute the features of every image of a loader; every process gets the features of all images.

    Args:
        model, loader, accelerator, normalize, forward: As for `classify`; the model may have any head or none.
        pooled: Module of the model whose output is the features. The pooler, `vit.pooler` of a classifier, gives the
            input of the classifier, after the pre-logits layer if there is one.

    Returns:
        Features, float32 `[N, D]` on the CPU; labels `[N]`; names of images that could not be read.
    """
    outputs_of_pooled: list[Tensor] = []
    # A hook, since a wrapped or sharded model must be called as a whole.
    hook = pooled.register_forward_hook(lambda module, inputs, output: outputs_of_pooled.append(output))

    def measure(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        return outputs_of_pooled.pop().float(), labels

    try:
        (_, features, labels), broken = _of_each_image(model, loader, accelerator, normalize, measure, forward)
    finally:
        hook.remove()
    return features, labels, broken


def _of_classes(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Return labels, predicted classes, their probabilities, losses, and ranks of the true classes, `[B]` each."""
    logits = logits.float()  # [B, num_labels]
    predicted = logits.argmax(dim=-1)
    confidence = logits.softmax(dim=-1).gather(1, predicted[:, None]).squeeze(1)
    losses = F.cross_entropy(logits, labels, reduction="none")
    of_label = logits.gather(1, labels[:, None])
    is_earlier = torch.arange(logits.shape[-1], device=logits.device) < labels[:, None]
    # Not "larger than": NaN must never make the true class look likely.
    is_ahead = ~(logits <= of_label) | ((logits == of_label) & is_earlier)
    return labels, predicted, confidence, losses, is_ahead.sum(dim=-1)


def _of_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Return labels, probabilities, and losses, `[B, num_labels]` each."""
    logits = logits.float()
    losses = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0), reduction="none")
    return labels, logits.sigmoid(), losses * (labels != -100)


def pixel_counts(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    """Return numbers of pixels by label, by prediction, and where both agree, `[B, num_labels]`, and summed losses."""
    logits = resize_logits(logits, (labels.shape[1], labels.shape[2]))
    losses, is_known = pixel_losses(logits, labels, ignore_index)
    predicted, number = logits.argmax(dim=1), logits.shape[1]

    def counts(classes: Tensor, is_counted: Tensor) -> Tensor:
        # Ignored pixels are counted as an extra class.
        marked = classes.where(is_counted, number).flatten(1)
        zeros = torch.zeros(len(marked), number + 1, dtype=torch.int64, device=marked.device)
        return zeros.scatter_add_(1, marked, torch.ones_like(marked))[:, :number]

    labels = labels.long()
    each = (labels, is_known), (predicted, is_known), (labels, is_known & (labels == predicted))
    return (*(counts(*pair) for pair in each), losses.sum(dim=(1, 2)))


def objects_and_losses(outputs: Any, labels: Tensor) -> tuple[Tensor, ...]:
    """Return labels, the most likely objects, and losses, `[B, ...]` each, for outputs of a detector."""
    return labels, most_likely_objects(outputs.logits, outputs.pred_boxes), object_losses(outputs, labels)


@torch.no_grad()
def _of_each_image(
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Any,
    normalize: Callable[[Tensor], Tensor],
    measure: Callable[[Any, Tensor], tuple[Tensor, ...]],
    forward: Forward,
) -> tuple[list[Tensor], list[str]]:
    """Return the indices of images and the quantities from `measure`, a tensor each, and names of broken images."""
    to_device = partial(send_to_device, device=accelerator.device, non_blocking=True)
    was_training = model.training
    model.eval()
    gathered: list[list[Tensor]] = []  # on the CPU
    rows: list[tuple[Tensor, ...]] = []  # of batches, on the device: a copy would wait for it
    broken: list[str] = []
    try:
        for batch, outputs in forward(model, loader, lambda batch: normalize(to_device(batch["pixel_values"]))):
            broken += batch["broken"]
            labels, index = to_device((batch["labels"], batch["index"]))
            rows.append((index, *measure(outputs, labels)))
            if sum(column.nbytes for column in rows[0]) * len(rows) > MOST_ON_DEVICE:
                gathered.append(_gathered(rows, accelerator))
                rows.clear()
        if rows:
            gathered.append(_gathered(rows, accelerator))
    finally:
        model.train(was_training)
    if accelerator.num_processes > 1:
        broken = gather_object(broken)
    columns = [torch.cat(column) for column in zip(*gathered, strict=True)]
    index = columns[0]
    order = index.argsort()[int((index < 0).sum()) :]
    if len(order) == 0:
        raise ValueError(f"No image to evaluate: {len(broken)} could not be read ({', '.join(broken[:3])}).")
    return [column[order] for column in columns], sorted(broken)  # the same for any number of processes


def _gathered(rows: list[tuple[Tensor, ...]], accelerator: Any) -> list[Tensor]:
    """Return the quantities of some batches of all processes on the CPU, a tensor each."""
    columns = [accelerator.gather(torch.cat(column)) for column in zip(*rows, strict=True)]
    return HostCopies(columns, accelerator.device).wait()
