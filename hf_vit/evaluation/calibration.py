"""Calibrate the probabilities of a classifier: Guo et al. 2017, "On Calibration of Modern Neural Networks"."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BOUNDS = (0.05, 20.0)


def interval_for(expected: dict[str, Any], number: int) -> tuple[float, float]:
    """Return the 95 % interval of a metric on `number` new images, from the interval of its expected value.

    The variance of a mean over `number` images is added to that of the estimate.

    Args:
        expected: `score`, with `low` and `high`, measured on `images`; they are an interval for `new_images` if that
            is not `None`.
        number: Number of images, at least 1.
    """
    score, images, new = expected["score"], expected["images"], expected["new_images"]
    wider = math.sqrt((1 + images / number) / (1 if new is None else 1 + images / new))
    low, high = score - wider * (score - expected["low"]), score + wider * (expected["high"] - score)
    return low if expected["low"] < 0 else max(0.0, low), min(1.0, high)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature by which to divide logits so that the likelihood of the labels is highest.

    The accuracy does not change. Logits and labels must be of images that the classifier was not trained on. Labels
    are smoothed as if there were one more image, whose label could be any, so that a few images that are all predicted
    right do not make every probability 0 or 1. Platt (1999) adds one for each of two classes; one for each of ten more
    than doubles the loss of a classifier that is right for 99 % of 180 images.

    Args:
        logits: `[N, num_labels]`, at a temperature of 1.
        labels: Class indices `[N]`; or 0 or 1 for each of several labels, `[N, num_labels]`, where -100 is unknown.

    Returns:
        The temperature, within `BOUNDS`.
    """
    from scipy.optimize import minimize_scalar

    logits = logits.double()
    if labels.ndim == 2:
        is_known = labels != -100
        smoothing = 1 / (len(labels) + 2)
        logits, targets = logits[is_known], labels[is_known].double() * (1 - 2 * smoothing) + smoothing

        def loss(log_temperature: float) -> float:
            return F.binary_cross_entropy_with_logits(logits / math.exp(log_temperature), targets).item()
    else:
        smoothing = 1 / (len(labels) + 1)

        def loss(log_temperature: float) -> float:
            scaled = logits / math.exp(log_temperature)
            return F.cross_entropy(scaled, labels, label_smoothing=smoothing).item()

    with torch.no_grad():
        found = minimize_scalar(loss, bounds=tuple(map(math.log, BOUNDS)), method="bounded")
    return math.exp(found.x)
