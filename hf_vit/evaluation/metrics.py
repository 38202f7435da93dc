"""Metrics and features of a model over a loader: every image once, in order, on any number of processes.

A batch is `pixel_values` (uint8 `[B, C, H, W]`), `labels` and `index` `[B]`, and `broken`, the names of images that
could not be read. The index is the position of the image in the data, or -1 if the image is not counted.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

from ..inference.threads import on_every_core

LOWER_IS_BETTER = frozenset({"loss", "mae", "rmse", "calibration_error"})  # of the names of metrics

# From a model, a loader, and what maps a batch to `pixel_values`, to every batch with its outputs.
Forward = Callable[[Any, Any, Callable[[Any], Tensor]], Iterator[tuple[Any, Any]]]


@dataclass
class ImageResults:
    """Results of a classifier per image, 1-D, in the order of the data, on the CPU.

    Attributes:
        labels: True classes.
        predicted: Most likely classes; the first one of equally likely ones.
        confidence: Probability of the predicted class.
        losses: Cross-entropy.
        ranks: Number of classes ahead of the true one; of equally likely classes, those with a lower index are ahead.
            So a classifier of zeros does not have a top-5 accuracy of 100 %.
        num_labels: Number of classes of the model.
        broken: Names of images that could not be read, and are not counted.
        index: Positions of the others in the data; all of them if not given.
    """

    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    losses: Tensor
    ranks: Tensor
    num_labels: int
    broken: list[str] = field(default_factory=list)
    index: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        if len(self.index) != len(self.labels):
            self.index = torch.arange(len(self.labels))

    def metrics(self) -> dict[str, float]:
        """Return accuracies in [0, 1], the mean loss, the expected calibration error, and the number of images."""
        metrics = {"accuracy": _share(self.predicted == self.labels)}
        if self.num_labels > 5:
            metrics["top5_accuracy"] = _share(self.ranks < 5)
        metrics["loss"] = self.losses.double().mean().item()
        metrics["calibration_error"] = self.calibration_error()
        return {**metrics, "count": len(self.labels)}

    def calibration_error(self, bins: int = 15) -> float:
        """Return the expected calibration error of Guo et al. (arXiv:1706.04599), with bins of equal width.

        It is the mean distance between confidence and accuracy over bins, weighted by their numbers of images.
        """
        confidence = self.confidence.double()
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
        bin_of = torch.bucketize(confidence, edges[1:-1])  # bins are open below
        gaps = (self.predicted == self.labels).double() - confidence
        return (torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, gaps).abs().sum() / len(gaps)).item()

    def per_class(self, label_names: Sequence[str]) -> list[dict[str, Any]]:
        """Return `label`, `count`, `accuracy` (recall) and `precision` of every class; `None` if undefined."""
        count, predicted, hits = (
            torch.bincount(classes, minlength=self.num_labels).tolist()
            for classes in (self.labels, self.predicted, self.labels[self.predicted == self.labels])
        )
        return [
            {
                "label": name,
                "count": count[index],
                "accuracy": hits[index] / count[index] if count[index] else None,
                "precision": hits[index] / predicted[index] if predicted[index] else None,
            }
            for index, name in zip(range(self.num_labels), label_names, strict=True)
        ]

    def confusion(self) -> Tensor:
        """Return the confusion matrix `[num_labels, num_labels]`: rows are true classes, columns predicted ones."""
        pairs = self.labels * self.num_labels + self.predicted
        return torch.bincount(pairs, minlength=self.num_labels**2).view(self.num_labels, self.num_labels)


def _share(is_hit: Tensor) -> float:
    return is_hit.sum().item() / len(is_hit)


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
) -> ImageResults:
    """Classify every image of a loader; all processes get the results of all.

    Args:
        model: Prepared by `accelerator`, or plain on its device. Its mode is restored.
        loader: Gives every process batches of the same number and sizes.
        normalize: Maps uint8 pixels to the input of the model.
        forward: How batches are computed.
    """
    num_labels = 0

    def measure(outputs: Any, labels: Tensor) -> tuple[Tensor, ...]:
        nonlocal num_labels
        logits = outputs.logits.float()  # [B, num_labels]
        num_labels = logits.shape[-1]
        predicted = logits.argmax(dim=-1)
        confidence = logits.softmax(dim=-1).gather(1, predicted[:, None]).squeeze(1)
        losses = F.cross_entropy(logits, labels, reduction="none")
        of_label = logits.gather(1, labels[:, None])
        is_earlier = torch.arange(num_labels, device=logits.device) < labels[:, None]
        # Not "larger than": NaN must never make the true class look likely.
        is_ahead = ~(logits <= of_label) | ((logits == of_label) & is_earlier)
        return labels, predicted, confidence, losses, is_ahead.sum(dim=-1)

    columns, broken = _of_each_image(model, loader, accelerator, normalize, measure, forward)
    index, labels, predicted, confidence, losses, ranks = columns
    return ImageResults(labels, predicted, confidence, losses, ranks, num_labels, broken, index)


def extract_features(
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Any,
    normalize: Callable[[Tensor], Tensor],
    pooled: nn.Module,
) -> tuple[Tensor, Tensor, list[str]]:
    """Compute the features of every image of a loader; all processes get those of all.

    Args:
        model, loader, accelerator, normalize: As for `classify`; the model may have any head or none.
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
        (_, features, labels), broken = _of_each_image(model, loader, accelerator, normalize, measure, forward_in_turn)
    finally:
        hook.remove()
    return features, labels, broken


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
    rows: list[Any] = []
    broken: list[str] = []
    try:
        for batch, outputs in forward(model, loader, lambda batch: normalize(to_device(batch["pixel_values"]))):
            broken += batch["broken"]
            labels, index = to_device((batch["labels"], batch["index"]))
            rows.append(accelerator.gather((index, *measure(outputs, labels))))
            if len(rows) > 1:  # one batch late: copying waits for the device, which then has the next batch to compute
                rows[-2] = send_to_device(rows[-2], "cpu")
    finally:
        model.train(was_training)
    if accelerator.num_processes > 1:
        broken = gather_object(broken)
    columns = [torch.cat(column) for column in zip(*send_to_device(rows, "cpu"), strict=True)]
    index = columns[0]
    order = index.argsort()[int((index < 0).sum()) :]
    if len(order) == 0:
        raise ValueError(f"No image to evaluate: {len(broken)} could not be read ({', '.join(broken[:3])}).")
    return [column[order] for column in columns], sorted(broken)  # the same for any number of processes
