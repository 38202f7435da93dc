"""The metric to expect on new images, from predictions for held-out images."""

import math
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from ...evaluation.intervals import wilson
from .heads import SingleLabel

RESAMPLES = 500  # of the bootstrap


def expected_score(
    problem: SingleLabel,
    logits: Tensor,
    targets: Tensor,
    choices: int = 1,
    new_images: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the metric on held-out images with a 95 % interval.

    For accuracy it is Wilson's interval, for other metrics one from the bootstrap over images. It is widened as
    Bonferroni's correction does, since the best of several methods looks better than it is.

    Args:
        problem: Kind of labels.
        logits, targets: Predictions for images that were not trained on.
        choices: Number of methods from which the best was chosen on these images.
        new_images: Number of other images that the metric will be measured on; the interval is then a prediction
            interval for that measurement. Otherwise it is a confidence interval.

    Returns:
        `score`, `low`, `high`, and `images`, the number of held-out images.
    """
    count, score = len(targets), problem.score(logits, targets)
    z = NormalDist().inv_cdf(1 - 0.025 / max(1, choices))
    if problem.metric == "accuracy":
        # Both samples are drawn, so their variances add up, as if there were fewer images.
        effective = count if new_images is None else count * new_images / (count + new_images)
        low, high = wilson(score, effective, z)
    else:
        generator = torch.Generator().manual_seed(seed)
        draws = (torch.randint(count, (count,), generator=generator) for _ in range(RESAMPLES))
        scores = torch.tensor([problem.score(logits[draw], targets[draw]) for draw in draws])
        wide = z * scores.std().item() * math.sqrt(1 if new_images is None else 1 + count / new_images)
        low, high = score - wide, min(1.0, score + wide)
        if problem.metric == "mean_average_precision":  # the bootstrap of a perfect ranking has no spread
            low = min(low, wilson(score, count, z)[0])
    return {"score": score, "low": low, "high": high, "images": count}
