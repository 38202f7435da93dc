"""What an evaluation measured of every image, and the metrics that follow: a class for each kind of labels.

All of them have `metrics()`, whose names are the same for every data set, and `per_class(label_names)`, a row for
every class, label or target.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DENSE_CLASSES = 1000


class Indexed:
    """Results in the order of the data; without an index, they are of all images."""

    labels: Tensor
    index: Tensor

    def __post_init__(self) -> None:
        if len(self.index) != len(self.labels):
            self.index = torch.arange(len(self.labels))


@dataclass
class ImageResults(Indexed):
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
        logits: `[N, num_labels]`, float32, if they were asked for.
    """

    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    losses: Tensor
    ranks: Tensor
    num_labels: int
    broken: list[str] = field(default_factory=list)
    index: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor | None = None

    def metrics(self) -> dict[str, float]:
        """Return accuracies and F1 in [0, 1], the mean loss, the calibration error, and the number of images.

        Balanced accuracy is the mean recall of classes with images; macro-F1 is the mean over classes with images or
        predictions, as in scikit-learn.
        """
        metrics = {"accuracy": _share(self.predicted == self.labels)}
        if self.num_labels > 5:
            metrics["top5_accuracy"] = _share(self.ranks < 5)
        count, predicted, hits = (counts.double() for counts in self._counts())
        has_images, is_used = count > 0, count + predicted > 0
        metrics["balanced_accuracy"] = (hits[has_images] / count[has_images]).mean().item()
        metrics["macro_f1"] = (2 * hits[is_used] / (count + predicted)[is_used]).mean().item()
        metrics["loss"] = self.losses.double().mean().item()
        metrics["calibration_error"] = self.calibration_error()
        return {**metrics, "count": len(self.labels)}

    def agreement(self, other: Any) -> float:
        """Return the share of images with the same predicted class."""
        return _share(self.predicted == other.predicted)

    def calibration_error(self, bins: int = 15) -> float:
        """Return the expected calibration error of Guo et al. (arXiv:1706.04599), with bins of equal width.

        It is the mean distance between confidence and accuracy over bins, weighted by their numbers of images.
        """
        confidence = self.confidence.double()
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
        bin_of = torch.bucketize(confidence, edges[1:-1])  # bins are open below
        gaps = (self.predicted == self.labels).double() - confidence
        return (torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, gaps).abs().sum() / len(gaps)).item()

    def _counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the numbers of images, of predictions and of correct predictions of every class."""
        each = self.labels, self.predicted, self.labels[self.predicted == self.labels]
        count, predicted, hits = (torch.bincount(classes, minlength=self.num_labels) for classes in each)
        return count, predicted, hits

    def per_class(self, label_names: Sequence[str]) -> list[dict[str, Any]]:
        """Return `label`, `count`, `recall` (also as `accuracy`), `precision` and `f1` of every class.

        A value that is undefined, such as the recall of a class without images, is `None`.
        """
        rows = []
        for name, *counts in zip(label_names, *(counts.tolist() for counts in self._counts()), strict=True):
            count, predicted, hits = counts
            recall = ratio(hits, count)
            f1 = ratio(2 * hits, count + predicted)
            precision = ratio(hits, predicted)
            row = {"label": name, "count": count, "accuracy": recall, "recall": recall, "precision": precision}
            rows.append({**row, "f1": f1})
        return rows

    def confusion(self) -> Tensor:
        """Return the confusion matrix `[num_labels, num_labels]`: rows are true classes, columns predicted ones.

        With more than `DENSE_CLASSES` classes it is a sparse tensor, since a dense one of 50,000 classes has 20 GB.
        """
        pairs, counts = torch.stack([self.labels, self.predicted]).unique(dim=1, return_counts=True)
        size = (self.num_labels, self.num_labels)
        with torch.sparse.check_sparse_tensor_invariants():  # torch 2.11 warns without it
            confusion = torch.sparse_coo_tensor(pairs, counts, size, is_coalesced=True)
            return confusion if self.num_labels > DENSE_CLASSES else confusion.to_dense()

    def pairs(self) -> list[tuple[int, int, int]]:
        """Return (true class, predicted class, number of images) for every pair that occurs, in order."""
        pairs, counts = torch.stack([self.labels, self.predicted]).unique(dim=1, return_counts=True)
        return [(*pair, count) for *pair, count in zip(*pairs.tolist(), counts.tolist(), strict=True)]


Predictions = ImageResults  # its name in version 0.1


@dataclass
class LabelResults(Indexed):
    """Results of a classifier with several labels per image, in the order of the data, on the CPU.

    Attributes:
        labels: 1 for labels that an image has, 0 for others, -100 for unknown ones, float32 `[N, num_labels]`.
        scores: Probabilities, float32 `[N, num_labels]`.
        losses: Binary cross-entropies, `[N, num_labels]`; 0 for unknown labels.
        thresholds: Probability above which a label counts as predicted, for each label; 0.5 if not given.
        broken, index: As for `ImageResults`.
    """

    labels: Tensor
    scores: Tensor
    losses: Tensor
    thresholds: Sequence[float] | None = None
    broken: list[str] = field(default_factory=list)
    index: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def predicted(self) -> Tensor:
        """Whether each label is predicted, `[N, num_labels]`."""
        return self.scores > torch.tensor(self.thresholds or [0.5] * self.labels.shape[1])

    def metrics(self) -> dict[str, float]:
        """Return mean average precision and F1 in [0, 1], the mean loss, and the number of images.

        The average precision is the mean over labels that some image has. Micro-F1 is over all labels of all images;
        macro-F1 is the mean over labels that are present or predicted.
        """
        precisions = [value for value in self.average_precisions() if value is not None]
        hits, of_both = self._counts()
        is_used = of_both > 0
        return {
            "mean_average_precision": sum(precisions) / max(1, len(precisions)),
            "micro_f1": (2 * hits.sum() / of_both.sum().clamp(min=1)).item(),
            "macro_f1": (2 * hits[is_used] / of_both[is_used]).sum().item() / max(1, int(is_used.sum())),
            "loss": (self.losses.double().sum() / (self.labels != -100).sum().clamp(min=1)).item(),
            "count": len(self.labels),
        }

    def _counts(self) -> tuple[Tensor, Tensor]:
        """Return for every label the number of its correct predictions, and of its images plus its predictions."""
        has, is_predicted = self.labels == 1, self.predicted & (self.labels != -100)
        return (has & is_predicted).sum(dim=0).double(), (has.sum(dim=0) + is_predicted.sum(dim=0)).double()

    def agreement(self, other: Any) -> float:
        """Return the fraction of (image, label) pairs for which both predictions are the same."""
        return (self.predicted == other.predicted).double().mean().item()

    def average_precisions(self) -> list[float | None]:
        """Return the average precision of every label; `None` if no image has it."""
        from sklearn.metrics import average_precision_score

        return [
            float(average_precision_score(labels, scores)) if labels.any() else None
            for labels, scores in map(self._known, range(self.labels.shape[1]))
        ]

    def best_thresholds(self) -> list[float]:
        """Return the threshold of every label with the highest F1 on these images; 0.5 for a label without images.

        It is the middle between two probabilities, so that rounding does not change the predictions.
        """
        from sklearn.metrics import precision_recall_curve

        chosen = []
        for labels, scores in map(self._known, range(self.labels.shape[1])):
            if not labels.any():
                chosen.append(0.5)
                continue
            precision, recall, thresholds = precision_recall_curve(labels, scores)
            f1 = 2 * precision * recall / (precision + recall).clip(min=1e-12)
            best = int(f1[:-1].argmax())  # the last entry has no threshold
            least = float(thresholds[best])
            below = scores[scores < least]
            chosen.append((least + float(below.max() if len(below) else 0.0)) / 2)
        return chosen

    def _known(self, label: int) -> tuple[Any, Any]:
        is_known = self.labels[:, label] != -100
        return self.labels[is_known, label].numpy() == 1, self.scores[is_known, label].double().numpy()

    def per_class(self, label_names: Sequence[str]) -> list[dict[str, Any]]:
        """Return `label`, `count` (images that have it), `average_precision`, `f1` and `threshold` of every label.

        A value that is undefined is `None`.
        """
        count, thresholds = (self.labels == 1).sum(dim=0).tolist(), self.thresholds or [0.5] * self.labels.shape[1]
        f1 = [ratio(2 * hits, both) for hits, both in zip(*(part.tolist() for part in self._counts()), strict=True)]
        columns = zip(label_names, count, self.average_precisions(), f1, thresholds, strict=True)
        names = ("label", "count", "average_precision", "f1", "threshold")
        return [dict(zip(names, row, strict=True)) for row in columns]


@dataclass
class TargetResults(Indexed):
    """Results of a regression, in the order of the data, on the CPU.

    Attributes:
        labels: True targets, float32 `[N, num_labels]`, in their own units.
        predicted: Predicted targets, of the same shape.
        scale: Unit of each target in the loss, such as `target_scale` of the model's config; 1 if not given.
        broken, index: As for `ImageResults`.
    """

    labels: Tensor
    predicted: Tensor
    scale: Sequence[float] | None = None
    broken: list[str] = field(default_factory=list)
    index: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labels = self.labels.reshape(self.predicted.shape)

    def metrics(self) -> dict[str, float]:
        """Return the means over targets of R^2, mean absolute error and root mean squared error, loss and count.

        The loss is the mean squared error in units of `scale`.
        """
        rows = self.per_class([""] * self.labels.shape[1])
        means = {name: sum(row[name] for row in rows) / len(rows) for name in ("r2", "mae", "rmse")}
        residuals = (self.predicted.double() - self.labels) / torch.tensor(self.scale or [1.0] * len(rows))
        return {**means, "loss": residuals.square().mean().item(), "count": len(self.labels)}

    def agreement(self, other: Any) -> float:
        """Return the mean over targets of R^2 of these values as predictions of the others'."""
        return TargetResults(other.predicted, self.predicted).metrics()["r2"]

    def per_class(self, label_names: Sequence[str]) -> list[dict[str, Any]]:
        """Return `label`, `count`, `mae`, `rmse` and `r2` of every target.

        R^2 of targets that are all the same is 1 if they are all predicted exactly, and else 0, as in scikit-learn.
        """
        from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

        labels, predicted = self.labels.double().numpy(), self.predicted.double().numpy()
        if len(labels) == 1:  # scikit-learn defines R^2 for two images or more
            labels, predicted = labels.repeat(2, axis=0), predicted.repeat(2, axis=0)
        each = [
            measure(labels, predicted, multioutput="raw_values").tolist()
            for measure in (mean_absolute_error, root_mean_squared_error, r2_score)
        ]
        return [
            {"label": name, "count": len(self.labels), "mae": mae, "rmse": rmse, "r2": r2}
            for name, mae, rmse, r2 in zip(label_names, *each, strict=True)
        ]


@dataclass
class MaskResults(Indexed):
    """Results of semantic segmentation per image, in the order of the data, on the CPU. Ignored pixels do not count.

    Attributes:
        labels, predicted, hits: Numbers of pixels of every class, of those predicted as it, and of those that are
            both, int64 `[N, num_labels]`.
        losses: Sums of the cross-entropies of pixels, `[N]`.
        broken, index: As for `ImageResults`.
    """

    labels: Tensor
    predicted: Tensor
    hits: Tensor
    losses: Tensor
    broken: list[str] = field(default_factory=list)
    index: Tensor = field(default_factory=lambda: torch.empty(0))

    def metrics(self) -> dict[str, float]:
        """Return the mean intersection over union, the share of correct pixels, the mean loss, and the image count.

        As usual, pixels of all images are summed first, and the mean is over classes that are present or predicted.
        """
        labels, predicted, hits = self._counts()
        union, number = labels + predicted - hits, labels.sum().clamp(min=1)
        is_used = union > 0
        return {
            "mean_iou": (hits[is_used] / union[is_used]).sum().item() / max(1, int(is_used.sum())),
            "pixel_accuracy": (hits.sum() / number).item(),
            "loss": (self.losses.double().sum() / number).item(),
            "count": len(self.labels),
        }

    def _counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the numbers of pixels over all images."""
        labels, predicted, hits = (pixels.double().sum(dim=0) for pixels in (self.labels, self.predicted, self.hits))
        return labels, predicted, hits

    def agreement(self, other: Any) -> float:
        """Return the share of images whose numbers of predicted pixels of every class are the same."""
        return _share((self.predicted == other.predicted).all(dim=1))

    def accuracies(self) -> Tensor:
        """Return the share of correct pixels of every image; 1 for an image without known pixels."""
        known = self.labels.sum(dim=1)
        return (self.hits.sum(dim=1) / known.clamp(min=1)).where(known > 0, 1.0)

    def per_class(self, label_names: Sequence[str]) -> list[dict[str, Any]]:
        """Return `label`, `count` (images with it), `share` (of the pixels), `iou` and `recall` of every class.

        A value that is undefined, such as the recall of a class without pixels, is `None`.
        """
        total = self.labels.sum().item()
        images = (self.labels > 0).sum(dim=0).tolist()
        rows = []
        for name, count, *pixels in zip(label_names, images, *(each.tolist() for each in self._counts()), strict=True):
            labels, predicted, hits = pixels
            values = {"iou": ratio(hits, labels + predicted - hits), "recall": ratio(hits, labels)}
            rows.append({"label": name, "count": count, "share": ratio(labels, total), **values})
        return rows


def _share(is_hit: Tensor) -> float:
    return is_hit.sum().item() / len(is_hit)


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
