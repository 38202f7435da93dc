"""Quality of frozen features: a linear probe, nearest neighbors, and few-shot regression.

Features and labels come from `metrics.extract_features`, a pair for training and a pair for testing. The labels of
test images are used to compute accuracy only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..system.texts import counted

Labelled = tuple[Tensor, Tensor]  # features [N, D], labels [N]


def linear_probe(
    train: Labelled, test: Labelled, strengths: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), seed: int = 0
) -> dict[str, Any]:
    """Fit a multinomial logistic regression to standardized features.

    `C` is chosen from `strengths` by accuracy on a random fifth of the training images of every class, drawn by
    `seed`; the smallest of equally good ones. Then the probe is fitted to all training images.

    Returns:
        `accuracy`, `C`, whether the optimizer has `converged`, and the numbers of images and features.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    standardize, labels = _standardizer(train[0]), train[1]
    features, test_features = standardize(train[0]), standardize(test[0])
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for members in _members(labels, generator).values():
        held_out[members[: len(members) // 5]] = True
    if len(labels.unique()) < 2 or not held_out.any():
        raise ValueError(
            f"A linear probe needs two classes, and five training images in one of them: got "
            f"{counted(len(labels), 'image')} in {counted(len(labels.unique()), 'class', 'classes')}."
        )

    def fit(which: Tensor, strength: float) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # reported as `converged`
            return LogisticRegression(C=strength, max_iter=1000).fit(features[which].numpy(), labels[which].numpy())

    def score(strength: float) -> float:
        return float(fit(~held_out, strength).score(features[held_out].numpy(), labels[held_out].numpy()))

    best = max(sorted(strengths), key=score)
    probe = fit(torch.ones_like(held_out), best)
    return {
        "accuracy": float(probe.score(test_features.numpy(), test[1].numpy())),
        "C": best,
        "converged": bool(np.max(probe.n_iter_) < 1000),
        **_sizes(train, test),
    }


def knn(train: Labelled, test: Labelled, k: int = 20, temperature: float = 0.07) -> dict[str, Any]:
    """Classify by the `k` nearest training images in cosine similarity, weighted by exp(similarity / temperature).

    As DINO does (arXiv:2104.14294, after arXiv:1805.01978). With fewer than `k` training images, all of them are used.

    Returns:
        `accuracy`, the `k` that was used, `temperature`, and the numbers of images and features.
    """
    k = min(k, len(train[1]))
    bank = F.normalize(train[0].float(), dim=-1)
    num_classes = int(train[1].max()) + 1
    hits = 0
    for features, labels in zip(test[0].float().split(1024), test[1].split(1024), strict=True):
        similarity, nearest = (F.normalize(features, dim=-1) @ bank.T).topk(k, dim=-1)  # [B, k]
        votes = torch.zeros(len(labels), num_classes).scatter_add_(
            1, train[1][nearest], (similarity / temperature).exp()
        )
        hits += int((votes.argmax(dim=-1) == labels).sum())
    return {"accuracy": hits / len(test[1]), "k": k, "temperature": temperature, **_sizes(train, test)}


def few_shot(
    train: Labelled,
    test: Labelled,
    shots: Sequence[int] = (1, 5, 10, 25),
    seeds: Sequence[int] = (0, 1, 2),
    l2: float = 2.0**10,
    label_names: Sequence[str] = (),
) -> dict[str, Any]:
    """Fit a few images per class by regularized least squares: the paper's few-shot accuracy (section 4.1).

    Features of the drawn images are standardized by their mean and deviation and regressed on targets of -1 and 1, in
    closed form and float64. The default `l2`, the bias constant and the number of seeds are those that big_vision
    uses for all of its few-shot results.

    Args:
        train, test: Features and labels.
        shots: Numbers of images per class. A number that a class does not have is skipped, with a message.
        seeds: Seeds of the draws; more shots include the images of fewer.
        l2: Weight of the squared norm.
        label_names: Label names for messages.

    Returns:
        `shots`, by number of shots: the `mean` over seeds, the sample standard deviation `std`, and all `accuracies`;
        messages about `skipped` numbers; `l2`, `seeds`, and the numbers of images and features.
    """
    classes = torch.cat([train[1], test[1]]).unique()
    available = torch.bincount(train[1], minlength=int(classes.max()) + 1)[classes]
    fewest, rarest = int(available.min()), int(classes[available.argmin()])
    results: dict[int, Any] = {}
    skipped = []
    draws = {seed: _members(train[1], torch.Generator().manual_seed(seed)) for seed in seeds}
    for number in shots:
        if fewest < number:
            name = repr(label_names[rarest]) if label_names else rarest
            skipped.append(
                f"Skipped {number} shots: class {name} has {fewest} training images. Add some to have {number}."
            )
            continue
        accuracies = []
        for drawn in draws.values():
            chosen = torch.cat([members[:number] for members in drawn.values()])
            scores = regression(train[0][chosen], train[1][chosen], classes, l2)(test[0])  # [N, classes]
            accuracies.append((classes[scores.argmax(dim=-1)] == test[1]).double().mean().item())
        std = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None
        results[number] = {"mean": float(np.mean(accuracies)), "std": std, "accuracies": accuracies}
    return {"shots": results, "skipped": skipped, "l2": l2, "seeds": list(seeds), **_sizes(train, test)}


BIAS = 100.0  # a constant feature, large enough to be hardly regularized


def regression(features: Tensor, labels: Tensor, classes: Tensor, l2: float) -> Callable[[Tensor], Tensor]:
    """Fit a regularized linear map from standardized features to targets of -1 and 1.

    Returns:
        A function from features `[N, D]` to scores `[N, len(classes)]`.
    """
    standardize = _standardizer(features)

    def prepare(x: Tensor) -> Tensor:
        return F.pad(standardize(x), (0, 1), value=BIAS)

    x = prepare(features)  # [N, D + 1]
    y = 2.0 * (labels[:, None] == classes).double() - 1
    number, width = x.shape
    if number < width:  # the same solution from a smaller system
        weights = x.T @ torch.linalg.solve(x @ x.T + l2 * torch.eye(number, dtype=x.dtype), y)
    else:
        weights = torch.linalg.solve(x.T @ x + l2 * torch.eye(width, dtype=x.dtype), x.T @ y)
    return lambda x: prepare(x) @ weights


def _members(labels: Tensor, generator: torch.Generator) -> dict[int, Tensor]:
    """Return the indices of the images of every class, in random order."""
    members = {int(label): (labels == label).nonzero().squeeze(1) for label in labels.unique()}
    return {label: indices[torch.randperm(len(indices), generator=generator)] for label, indices in members.items()}


def _standardizer(features: Tensor) -> Callable[[Tensor], Tensor]:
    features = features.double()
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0) + 1e-5
    return lambda x: (x.double() - mean) / std


def _sizes(train: Labelled, test: Labelled) -> dict[str, int]:
    return {"train_images": len(train[1]), "test_images": len(test[1]), "features": train[0].shape[1]}
