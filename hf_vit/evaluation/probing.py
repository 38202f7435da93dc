"""How good features are without training the model: a linear probe, nearest neighbours, and a few images a class.

Features and labels come from `evaluation.extract`, a pair for training and a pair for testing. Nothing here looks at
the labels of the test images but to count hits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Labelled = tuple[Tensor, Tensor]  # features [N, D], labels [N]


def linear_probe(
    train: Labelled, test: Labelled, strengths: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), seed: int = 0
) -> dict[str, Any]:
    """Fit a multinomial logistic regression to standardized features.

    Its `C` is the one of `strengths` with the best accuracy on a fifth of the training images of every class, drawn
    by `seed` and held out; the weakest of several equally good ones. Then all training images are learned from.

    Returns:
        `accuracy`, `C`, whether the optimizer has `converged`, and the numbers of images and features.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    (features, test_features), labels = _standardized(train[0], test[0]), train[1]
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for members in _members(labels, generator).values():
        held_out[members[: len(members) // 5]] = True
    if len(labels.unique()) < 2 or not held_out.any():
        raise ValueError(
            f"A linear probe needs two classes, and five training images of one of them: got {len(labels)} of "
            f"{len(labels.unique())} classes."
        )

    def fit(which: Tensor, strength: float) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it is reported instead
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
    """Let the `k` nearest training images by cosine vote, each by exp(similarity / temperature).

    As DINO does (arXiv:2104.14294, after arXiv:1805.01978). With fewer than `k` training images, all of them vote.

    Returns:
        `accuracy`, `k` as used, `temperature`, and the numbers of images and features.
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
    """Learn from a few images a class by regularised least squares: the paper's few-shot accuracies (section 4.1).

    Features of the images that were drawn are standardized by their own mean and deviation and regressed on targets
    of -1 and 1, in closed form and float64. `l2` is not chosen here: it is the one that big_vision fixes for all of
    its few-shot figures, as are the constant of the bias and the seeds' number.

    Args:
        train, test: Features and labels.
        shots: Numbers of images a class. What no class may lack is left out, with a sentence.
        seeds: Of the draws; an image drawn for fewer shots is drawn for more, too.
        l2: Weight of the squared norm.
        label_names: For the sentences.

    Returns:
        `shots`, by number of shots: the `mean` over seeds, the sample's standard deviation `std`, all `accuracies`;
        sentences of what was `skipped`; `l2`, and the numbers of images and features.
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
                f"{number} shots are left out: class {name} has {fewest} training images. Give it at least {number}."
            )
            continue
        accuracies = []
        for drawn in draws.values():
            chosen = torch.cat([members[:number] for members in drawn.values()])
            answers = classes[regression(train[0][chosen], train[1][chosen], classes, l2)(test[0]).argmax(dim=-1)]
            accuracies.append((answers == test[1]).double().mean().item())
        std = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None
        results[number] = {"mean": float(np.mean(accuracies)), "std": std, "accuracies": accuracies}
    return {"shots": results, "skipped": skipped, "l2": l2, "seeds": list(seeds), **_sizes(train, test)}


BIAS = 100.0  # a constant feature, so large that it is hardly regularised


def regression(features: Tensor, labels: Tensor, classes: Tensor, l2: float) -> Callable[[Tensor], Tensor]:
    """Fit a regularised linear map from standardized features to targets of -1 and 1.

    Returns:
        A function from features `[N, D]` to scores `[N, len(classes)]`.
    """
    features = features.double()
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0) + 1e-5

    def prepare(x: Tensor) -> Tensor:
        return F.pad((x.double() - mean) / std, (0, 1), value=BIAS)

    x = prepare(features)  # [N, D + 1]
    y = 2.0 * (labels[:, None] == classes).double() - 1
    number, width = x.shape
    if number < width:  # the same solution, by the smaller system
        weights = x.T @ torch.linalg.solve(x @ x.T + l2 * torch.eye(number, dtype=x.dtype), y)
    else:
        weights = torch.linalg.solve(x.T @ x + l2 * torch.eye(width, dtype=x.dtype), x.T @ y)
    return lambda x: prepare(x) @ weights


def _members(labels: Tensor, generator: torch.Generator) -> dict[int, Tensor]:
    """Return the places of every class, in an order that is drawn."""
    members = {int(label): (labels == label).nonzero().squeeze(1) for label in labels.unique()}
    return {label: places[torch.randperm(len(places), generator=generator)] for label, places in members.items()}


def _standardized(features: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    features, others = features.double(), others.double()
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0) + 1e-5
    return (features - mean) / std, (others - mean) / std


def _sizes(train: Labelled, test: Labelled) -> dict[str, int]:
    return {"train_images": len(train[1]), "test_images": len(test[1]), "features": train[0].shape[1]}
