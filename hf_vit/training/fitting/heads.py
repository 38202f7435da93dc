"""A linear head on frozen features, chosen by cross-validation: one small class per kind of labels.

Features are standardized for the fit. The standardization is then folded into the weights, so that the head is an
ordinary linear layer on the pooled features.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.classes import UNKNOWN
from ...data.images import derive_seed
from ...evaluation.results import LabelResults, TargetResults
from ...model.pooling_hf_vit import HFViTDistilledClassifier
from ...system.machine import cores
from ..tasks import binary_cross_entropy_of_labels, moments_of

FOLDS = 5
# Most images that take part in the choice of pooling and strength; the chosen setting is then validated on all.
MOST_TO_CHOOSE = 4000
STEPS_OF_FIT = 300  # of L-BFGS; it stops earlier when it has converged
ABSENT = -10.0  # logit of a class without training images, below the least bias of the others


@dataclass(frozen=True)
class LinearHead:
    """A linear layer: `weight` `[num_labels, D]` and `bias` `[num_labels]`, float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits `[N, num_labels]`."""
        return features @ self.weight.T + self.bias

    @torch.no_grad()
    def write_into(self, classifier: Any) -> None:
        """Set the weights of a model's classifier, so that it gives these logits."""
        if isinstance(
            classifier, HFViTDistilledClassifier
        ):  # the mean of two classifiers, each with half the features
            for part, weight in zip(
                (classifier.cls, classifier.distillation), self.weight.chunk(2, dim=1), strict=True
            ):
                part.weight.copy_(2 * weight)
                part.bias.copy_(self.bias)
            return
        classifier.weight.copy_(self.weight)
        classifier.bias.copy_(self.bias)


def standardized(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return features with mean 0 and standard deviation 1, and the mean and deviation that they had."""
    std, mean = torch.std_mean(features, dim=0, correction=0)
    std = std.clamp(min=1e-6)
    return (features - mean) / std, mean, std


def folded(weight: Any, bias: Any, mean: Tensor, std: Tensor) -> LinearHead:
    """Return the head for raw features that is equivalent to `weight`, `bias` on standardized ones."""
    weight = torch.as_tensor(np.asarray(weight, dtype=np.float64)) / std.double()
    bias = torch.as_tensor(np.asarray(bias, dtype=np.float64)) - weight @ mean.double()
    return LinearHead(weight.float(), bias.float())


class SingleLabel:
    """One class per image: multinomial logistic regression, judged by accuracy."""

    metric, task = "accuracy", "classification"
    strengths: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
    first = 1e-2  # the strength that poolings are compared with

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels

    def targets(self, labels: Sequence[Any]) -> Tensor:
        """Return labels as a tensor."""
        return torch.tensor(labels, dtype=torch.int64)

    def strata(self, targets: Tensor) -> Tensor:
        """Return what folds have equal shares of."""
        return targets

    def fit(self, features: Tensor, targets: Tensor, strength: float) -> LinearHead:
        """Return the head for features `[N, D]`."""
        from sklearn.linear_model import LogisticRegression

        scaled, mean, std = standardized(features)
        weight, bias = torch.zeros(self.num_labels, features.shape[1]), torch.zeros(self.num_labels)
        present = targets.unique()
        if len(present) < 2:
            bias[:] = ABSENT
            bias[present] = 0.0
            return LinearHead(weight, bias)
        probe = LogisticRegression(C=strength, max_iter=STEPS_OF_FIT).fit(scaled.numpy(), targets.numpy())
        rows, offsets = probe.coef_, probe.intercept_
        if len(present) == 2:  # one row for both classes: softmax of half of it and its negative is its sigmoid
            rows, offsets = np.concatenate([-rows, rows]) / 2, np.concatenate([-offsets, offsets]) / 2
        head = folded(rows, offsets, mean, std)
        weight[present], bias[:] = head.weight, head.bias.min() + ABSENT
        bias[present] = head.bias
        if len(present) < self.num_labels:  # far below the others for every training image
            bias[torch.bincount(targets, minlength=self.num_labels) == 0] = head(features).min() + ABSENT
        return LinearHead(weight, bias)

    def errors(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the error of every image, `[N]`: here 1 for a wrong class and 0 for the right one."""
        return (logits.argmax(dim=-1) != targets).float()

    def score(self, logits: Tensor, targets: Tensor) -> float:
        """Return the accuracy in [0, 1]."""
        return 1 - self.errors(logits, targets).double().mean().item()

    def loss(self, logits: Tensor, targets: Tensor) -> float:
        """Return the mean cross-entropy."""
        return F.cross_entropy(logits.float(), targets).item()

    def fields(self, targets: Tensor) -> dict[str, Any]:
        """Return further fields of the model's config."""
        return {"problem_type": "single_label_classification"}

    def in_model(self, head: LinearHead, targets: Tensor) -> LinearHead:
        """Return the weights of the model's classifier."""
        return head


class MultiLabel(SingleLabel):
    """Several classes per image: one logistic regression per class, judged by the mean average precision.

    A target of -100 is unknown, and ignored.
    """

    metric, task = "mean_average_precision", "multi_label"

    def targets(self, labels: Sequence[Any]) -> Tensor:
        return torch.tensor(np.asarray(labels, dtype=np.float32))

    def strata(self, targets: Tensor) -> Tensor:
        # The rarest class of an image: it is what folds would miss first.
        present = targets == 1
        rarity = torch.where(present, present.sum(dim=0), torch.inf)
        return torch.where(present.any(dim=1), rarity.argmin(dim=1), self.num_labels)

    def fit(self, features: Tensor, targets: Tensor, strength: float) -> LinearHead:
        from sklearn.linear_model import LogisticRegression

        scaled, mean, std = standardized(features)
        rows, offsets = np.zeros((self.num_labels, features.shape[1])), np.zeros(self.num_labels)
        for label in range(self.num_labels):
            is_known = targets[:, label] != UNKNOWN
            present = targets[is_known, label].int().numpy()
            if len(set(present)) < 2:
                offsets[label] = -ABSENT if present.any() else ABSENT
                continue
            probe = LogisticRegression(C=strength, max_iter=STEPS_OF_FIT).fit(scaled[is_known].numpy(), present)
            rows[label], offsets[label] = probe.coef_[0], probe.intercept_[0]
        return folded(rows, offsets, mean, std)

    def score(self, logits: Tensor, targets: Tensor) -> float:
        """Return the mean average precision over the classes that occur."""
        return LabelResults(targets, logits, torch.zeros_like(logits)).metrics()["mean_average_precision"]

    def errors(self, logits: Tensor, targets: Tensor) -> Tensor:
        is_known = targets != UNKNOWN
        losses = F.binary_cross_entropy_with_logits(logits.float(), targets.where(is_known, 0), reduction="none")
        return (losses * is_known).sum(dim=-1) / is_known.sum(dim=-1).clamp(min=1)

    def loss(self, logits: Tensor, targets: Tensor) -> float:
        return binary_cross_entropy_of_labels(logits, targets).item()

    def fields(self, targets: Tensor) -> dict[str, Any]:
        return {"problem_type": "multi_label_classification"}


class Regression(SingleLabel):
    """Numbers: ridge regression on standardized targets, judged by R² (the mean over targets).

    The logits of the model are `head * target_scale + target_mean`; those of a `LinearHead` are in original units.
    """

    metric, task = "r2", "regression"
    strengths = tuple(1 / alpha for alpha in (1e4, 3e3, 1e3, 300.0, 100.0, 30.0, 10.0, 1.0))
    first = 1 / 300.0

    def targets(self, labels: Sequence[Any]) -> Tensor:
        return torch.tensor(np.asarray(labels, dtype=np.float32)).reshape(len(labels), self.num_labels)

    def strata(self, targets: Tensor) -> Tensor:
        return torch.zeros(len(targets), dtype=torch.int64)

    def fit(self, features: Tensor, targets: Tensor, strength: float) -> LinearHead:
        from sklearn.linear_model import Ridge

        scaled, mean, std = standardized(features)
        ridge = Ridge(alpha=1 / strength).fit(scaled.double().numpy(), targets.double().numpy())
        return folded(ridge.coef_.reshape(self.num_labels, -1), np.atleast_1d(ridge.intercept_), mean, std)

    def score(self, logits: Tensor, targets: Tensor) -> float:
        return TargetResults(targets, logits).metrics()["r2"]

    def errors(self, logits: Tensor, targets: Tensor) -> Tensor:
        return ((logits - targets) / moments_of(targets)[1]).square().mean(dim=-1)

    def loss(self, logits: Tensor, targets: Tensor) -> float:
        return F.mse_loss(logits.float(), targets).item()

    def fields(self, targets: Tensor) -> dict[str, Any]:
        mean, std = moments_of(targets)
        return {"problem_type": "regression", "target_mean": mean.tolist(), "target_scale": std.tolist()}

    def in_model(self, head: LinearHead, targets: Tensor) -> LinearHead:
        mean, std = moments_of(targets)
        return LinearHead(head.weight / std[:, None], (head.bias - mean) / std)


PROBLEMS: dict[str, type[SingleLabel]] = {
    "single_label_classification": SingleLabel,
    "multi_label_classification": MultiLabel,
    "regression": Regression,
}


def shown(metric: str, value: float) -> str:
    """Return a score as people read it: accuracy in percent, others as numbers."""
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.3f}"


def folds_of(strata: Tensor, digests: Sequence[str], seed: int, number: int = FOLDS) -> Tensor:
    """Assign images to folds with equal shares of every stratum, `[N]`.

    Images with the same content are in the same fold, or a fold would be asked about images that the others contain.
    A stratum with fewer images than folds is missing in some of them.
    """
    number = max(2, min(number, len(set(digests))))
    fold_of: dict[str, int] = {}
    folds = torch.zeros(len(strata), dtype=torch.int64)
    next_fold = 0
    generator = torch.Generator().manual_seed(derive_seed(seed, "folds"))
    for stratum in strata.unique().tolist():
        members = (strata == stratum).nonzero().flatten()
        for index in members[torch.randperm(len(members), generator=generator)].tolist():
            if digests[index] not in fold_of:
                fold_of[digests[index]] = next_fold
                next_fold = (next_fold + 1) % number
            folds[index] = fold_of[digests[index]]
    return folds


def problem_of(problem_type: str | None, num_labels: int) -> SingleLabel:
    """Return the kind of labels of an `ImageData`."""
    if problem_type not in PROBLEMS:
        raise ValueError("The data has no labels to fit: specify its label_column.")
    return PROBLEMS[problem_type](num_labels)


@contextmanager
def calm_solvers() -> Iterator[None]:
    """Give every fit one thread, since its matrices are small, and silence warnings that it has not converged.

    Threads of BLAS that share such matrices mostly wait for each other. The score decides, not the convergence.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass
class FittedHead:
    """A head, and how it was chosen.

    Attributes:
        head: Fitted to all images.
        pooling, strength: What was chosen; the strength is the `C` of scikit-learn, or 1/alpha of ridge regression.
        folds: The fold of every image `[N]`.
        logits: Predictions for every image by a head that was fitted without its fold, `[N, num_labels]`.
        targets: Labels of the images.
        score, loss: Of these predictions.
        tried: One row per setting: `pooling`, `strength`, `score`, `loss`.
    """

    head: LinearHead
    pooling: str
    strength: float
    folds: Tensor
    logits: Tensor
    targets: Tensor
    score: float
    loss: float
    tried: list[dict[str, Any]] = field(default_factory=list)


def fit_head(
    features: Mapping[str, Tensor],
    targets: Tensor,
    problem: SingleLabel,
    digests: Sequence[str],
    seed: int = 0,
) -> FittedHead:
    """Choose pooling and strength by cross-validation, and fit the head to all images.

    Poolings are compared at one strength; then the strength of the best pooling is raised and lowered as long as the
    score does not fall. With more than `MOST_TO_CHOOSE` images, a part of them takes part in this choice.

    Args:
        features: Features `[N, D]` by pooling.
        targets: Labels, from `problem.targets`.
        problem: Kind of labels.
        digests: Identity of the content of every image.
        seed: Seed of the folds.
    """
    if len(targets) < 4 or len(set(digests)) < 2:
        raise ValueError(f"Expected at least 4 readable, distinct training images, got {len(set(digests))}: add more.")
    if problem.metric == "accuracy" and len(targets.unique()) < 2:
        raise ValueError("All training images have the same label: a classifier needs at least two classes.")
    folds = folds_of(problem.strata(targets), digests, seed)
    generator = torch.Generator().manual_seed(derive_seed(seed, "choose"))
    part = torch.randperm(len(targets), generator=generator)[:MOST_TO_CHOOSE].sort().values
    tried: dict[tuple[str, float], dict[str, Any]] = {}

    def score(pooling: str, strength: float) -> tuple[float, float]:
        if (pooling, strength) not in tried:
            logits = _out_of_fold(problem, features[pooling][part], targets[part], folds[part], strength)
            value, loss = problem.score(logits, targets[part]), problem.loss(logits, targets[part])
            tried[pooling, strength] = {"pooling": pooling, "strength": strength, "score": value, "loss": loss}
        row = tried[pooling, strength]
        return row["score"], -row["loss"]  # equally good ones are distinguished by the loss

    with calm_solvers():
        pooling, strength = _choose(features, problem, score)
        logits = _out_of_fold(problem, features[pooling], targets, folds, strength)
        head = problem.fit(features[pooling], targets, strength)
    return FittedHead(
        head,
        pooling,
        strength,
        folds,
        logits,
        targets,
        problem.score(logits, targets),
        problem.loss(logits, targets),
        list(tried.values()),
    )


def _choose(
    features: Mapping[str, Tensor], problem: SingleLabel, score: Callable[[str, float], tuple[float, float]]
) -> tuple[str, float]:
    """Return the best pooling, and its best strength."""
    pooling = max(features, key=lambda name: score(name, problem.first))
    strengths = problem.strengths
    start, scored = strengths.index(problem.first), {problem.first}
    for direction in (1, -1):
        position, best = start + direction, score(pooling, problem.first)[0]
        while 0 <= position < len(strengths):
            scored.add(strengths[position])
            value = score(pooling, strengths[position])[0]
            if value < best:
                break
            best, position = value, position + direction
    tried = [strength for strength in strengths if strength in scored]
    return pooling, max(tried, key=lambda strength: score(pooling, strength))


def _out_of_fold(problem: SingleLabel, features: Tensor, targets: Tensor, folds: Tensor, strength: float) -> Tensor:
    logits = torch.zeros(len(targets), problem.num_labels)

    def predict(fold: Tensor) -> None:
        held_out = folds == fold
        logits[held_out] = problem.fit(features[~held_out], targets[~held_out], strength)(features[held_out])

    with ThreadPoolExecutor(cores()) as threads:
        list(threads.map(predict, folds.unique()))
    return logits
