"""Calibrate the probabilities of a classifier: Guo et al. 2017, "On Calibration of Modern Neural Networks"."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BOUNDS = (0.05, 20.0)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature by which to divide logits so that the likelihood of the labels is highest.

    The accuracy does not change. Logits and labels must be of images that the classifier was not trained on.

    Args:
        logits: `[N, num_labels]`, at a temperature of 1.
        labels: Class indices `[N]`; or 0 or 1 for each of several labels, `[N, num_labels]`, where -100 is unknown.

    Returns:
        The temperature, within `BOUNDS`: classifiers that are always right would have none.
    """
    from scipy.optimize import minimize_scalar

    logits = logits.double()
    if labels.ndim == 2:
        is_known = labels != -100
        logits, targets = logits[is_known], labels[is_known].double()

        def loss(log_temperature: float) -> float:
            return F.binary_cross_entropy_with_logits(logits / math.exp(log_temperature), targets).item()
    else:

        def loss(log_temperature: float) -> float:
            return F.cross_entropy(logits / math.exp(log_temperature), labels).item()

    with torch.no_grad():
        found = minimize_scalar(loss, bounds=tuple(map(math.log, BOUNDS)), method="bounded")
    return math.exp(found.x)
