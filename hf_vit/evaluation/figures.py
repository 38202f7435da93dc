"""Figures and features of a model over a loader: each image once, in their order, on any number of processes.

A batch is `pixel_values` (uint8 `[B, C, H, W]`), `labels` and `index` `[B]`, and `broken`, the names of images that
could not be read. The index is the image's place in the data; what only fills a batch up has -1 and is not counted.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

# Of a model, a loader and what brings a batch to the model's input: each batch with its outputs.
Answers = Callable[[Any, Iterable[Any], Callable[[Any], Tensor]], Iterator[tuple[Any, Any]]]


@dataclass
class Predictions:
    """What a classifier answers, a number an image: 1-D, in the order of the data, on the CPU.

    Attributes:
        labels: The true classes.
        predicted: The likeliest classes; the first of several that are equally likely.
        confidence: Probability of the predicted class.
        losses: Cross-entropy.
        ranks: Number of classes that come before the true one; of equally likely ones, those with a lower number do.
            So a head of zeros, which knows nothing, has no top-5 accuracy of 100 %.
        num_labels: Number of classes that the model tells apart.
        broken: Names of images that could not be read, and are not counted.
        index: Places of the others in the data; all of them if not given.
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

    def figures(self) -> dict[str, float]:
        """Return accuracies in 0 to 1, the mean loss, the expected calibration error, and the count of images."""
        figures = {"accuracy": _share(self.predicted == self.labels)}
        if self.num_labels > 5:
            figures["top5_accuracy"] = _share(self.ranks < 5)
        figures["loss"] = self.losses.double().mean().item()
        figures["calibration_error"] = self.calibration_error()
        return {**figures, "count": len(self.labels)}

    def calibration_error(self, bins: int = 15) -> float:
        """Return how far confidence is from accuracy: the mean over bins of confidence, each by its number of images.

        The expected calibration error of Guo et al. (arXiv:1706.04599), with bins of equal width, open below.
        """
        confidence = self.confidence.double()
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
        bin_of = torch.bucketize(confidence, edges[1:-1])
        gaps = (self.predicted == self.labels).double() - confidence
        return (torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, gaps).abs().sum() / len(gaps)).item()

    def per_class(self, label_names: Sequence[str]) -> list[dict[str, Any]]:
        """Return `label`, `count`, `accuracy` (recall) and `precision` of every class; `None` where there is none."""
        count, answered, hits = (
            torch.bincount(classes, minlength=self.num_labels).tolist()
            for classes in (self.labels, self.predicted, self.labels[self.predicted == self.labels])
        )
        return [
            {
                "label": name,
                "count": count[index],
                "accuracy": hits[index] / count[index] if count[index] else None,
                "precision": hits[index] / answered[index] if answered[index] else None,
            }
            for index, name in zip(range(self.num_labels), label_names, strict=True)
        ]

    def confusion(self) -> Tensor:
        """Return numbers of images `[num_labels, num_labels]`: a row a true class, a column a predicted one."""
        pairs = self.labels * self.num_labels + self.predicted
        return torch.bincount(pairs, minlength=self.num_labels**2).view(self.num_labels, self.num_labels)


def in_turn(model: Any, loader: Iterable[Any], to_input: Callable[[Any], Tensor]) -> Iterator[tuple[Any, Any]]:
    """Yield each batch of a loader with what the model answers."""
    for batch in loader:
        yield batch, model(pixel_values=to_input(batch))


def classify(
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Any,
    normalize: Callable[[Tensor], Tensor],
    answers: Answers = in_turn,
) -> Predictions:
    """Let a classifier answer for every image of a loader; all processes get the answers of all.

    Args:
        model: As `accelerator` prepared it, or plain on its device. Its mode is left as it was.
        loader: Gives every process batches of the same number and sizes.
        normalize: Brings uint8 pixels to what the model takes.
        answers: How batches become answers.
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
        # Not "larger": what is not a number must never make the true class look likely.
        is_before = ~(logits <= of_label) | ((logits == of_label) & is_earlier)
        return labels, predicted, confidence, losses, is_before.sum(dim=-1)

    columns, broken = _of_each_image(model, loader, accelerator, normalize, measure, answers)
    index, labels, predicted, confidence, losses, ranks = columns
    return Predictions(labels, predicted, confidence, losses, ranks, num_labels, broken, index)


def extract(
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Any,
    normalize: Callable[[Tensor], Tensor],
    pooled: nn.Module,
) -> tuple[Tensor, Tensor, list[str]]:
    """Compute the features of every image of a loader; all processes get those of all.

    Args:
        model, loader, accelerator, normalize: As for `classify`; the model may have a head or not.
        pooled: Module in the model whose output the features are. For what enters the classifier, the pre-logits
            layer included where there is one, that is the pooler: `vit.pooler` of a classifier.

    Returns:
        Features, float32 `[N, D]` on the CPU; labels `[N]`; names of images that could not be read.
    """
    caught: list[Tensor] = []
    # By a hook, since a model that is wrapped or sharded computes right only when it is called as a whole.
    hook = pooled.register_forward_hook(lambda module, inputs, output: caught.append(output))

    def measure(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        return caught.pop().float(), labels

    try:
        (_, features, labels), broken = _of_each_image(model, loader, accelerator, normalize, measure)
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
    answers: Answers = in_turn,
) -> tuple[list[Tensor], list[str]]:
    """Return where the images are, what `measure` says of each, a tensor a quantity, and the names of broken ones."""
    to_device = partial(send_to_device, device=accelerator.device, non_blocking=True)
    was_training = model.training
    model.eval()
    rows: list[Any] = []
    broken: list[str] = []
    try:
        for batch, outputs in answers(model, loader, lambda batch: normalize(to_device(batch["pixel_values"]))):
            broken += batch["broken"]
            labels, index = to_device((batch["labels"], batch["index"]))
            rows.append(accelerator.gather((index, *measure(outputs, labels))))
            if len(rows) > 1:  # one batch late: to fetch it waits for the device, which has the next one to do
                rows[-2] = send_to_device(rows[-2], "cpu")
    finally:
        model.train(was_training)
    if accelerator.num_processes > 1:
        broken = gather_object(broken)
    columns = [torch.cat(column) for column in zip(*send_to_device(rows, "cpu"), strict=True)]
    index = columns[0]
    order = index.argsort()[int((index < 0).sum()) :]
    if len(order) == 0:
        raise ValueError(f"There is no image to measure: {len(broken)} could not be read ({', '.join(broken[:3])}).")
    return [column[order] for column in columns], sorted(broken)  # the same however the images were divided


def _share(is_so: Tensor) -> float:
    return is_so.sum().item() / len(is_so)
