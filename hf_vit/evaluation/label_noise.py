"""The probability that a given label is wrong, from predictions for images that the classifier was not trained on.

The model of the labels: a given label is the true one with probability 1 - r, and any other class with the same
probability otherwise. The rate r and the temperature of the classifier are those of the highest likelihood, with a
weak preference for low rates. Bayes' rule then gives the probability of every single label to be wrong.
model_cards/audit compares this with the rule of confident learning (Northcutt et al., arXiv:1911.00068).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .calibration import fit_temperature

EXPECTED_PRECISION = 0.7  # expected share of wrong labels among those that are listed
LEAST_PROBABILITY = 0.2  # of a listed label to be wrong
HIGHEST_RATE = 0.5  # of wrong labels
# Log likelihood that a rate of 1 costs: where predictions are no better than chance, every rate is equally likely, and
# the labels are then taken to be right.
PRIOR = 2.0
FENCE = 3.0  # interquartile ranges above the third quartile, from which a value is far from the others (Tukey 1977)


class LabelNoise(NamedTuple):
    """The probability `[N]` that each label is wrong, the rate of wrong labels, and the temperature."""

    probability: Tensor
    rate: float
    temperature: float


def label_noise(logits: Tensor, labels: Tensor, first: LabelNoise | None = None) -> LabelNoise:
    """Return how likely it is that each label is wrong.

    Args:
        logits: `[N, K]` with K > 1, for images that the classifier was not trained on.
        labels: Given class indices `[N]`.
        first: An earlier result for the same labels, where the search begins. Where all logits have about the same
            margin, wrong labels and a higher temperature explain errors equally well.
    """
    from scipy.optimize import minimize

    logits, others = logits.double(), logits.shape[1] - 1

    def probabilities(values: "list[float]") -> tuple[Tensor, float]:
        chances = (logits / math.exp(min(max(values[0], -5.0), 5.0))).softmax(dim=1)
        return chances.gather(1, labels[:, None])[:, 0], HIGHEST_RATE / (1 + math.exp(-max(values[1], -20.0)))

    def loss(values: "list[float]") -> float:
        right, rate = probabilities(values)
        likelihood = ((1 - rate) * right + rate * (1 - right) / others).clamp(min=1e-12).log().mean().item()
        return PRIOR * rate / len(labels) - likelihood

    temperature, odds = fit_temperature(logits, labels), -3.0
    if first is not None:
        temperature, odds = first.temperature, -math.log(max(HIGHEST_RATE / first.rate - 1, 1e-6))
    found = minimize(loss, [math.log(temperature), odds], method="Nelder-Mead")
    right, rate = probabilities(found.x)
    wrong = rate * (1 - right) / others
    probability = wrong / (wrong + (1 - rate) * right).clamp(min=1e-12)
    return LabelNoise(probability.float(), rate, math.exp(found.x[0]))


def binary_label_noise(logits: Tensor, labels: Tensor, unknown: float) -> Tensor:
    """Return how likely it is that each of several labels per image is wrong, `[N, K]`; 0 for unknown ones.

    Args:
        logits: `[N, K]`, for images that the classifier was not trained on.
        labels: 0, 1 or `unknown`, `[N, K]`.
    """
    probability = torch.zeros_like(logits)
    for label in range(logits.shape[1]):
        is_known = labels[:, label] != unknown
        given = labels[is_known, label].long()
        if len(given.unique()) > 1:
            of_two = torch.stack([torch.zeros(len(given)), logits[is_known, label]], dim=1)
            probability[is_known, label] = label_noise(of_two, given).probability
    return probability


def most_suspicious(probability: Tensor) -> Tensor:
    """Return the positions of suspicious labels, the most suspicious first.

    As many are returned as keep the expected share of wrong ones at `EXPECTED_PRECISION`, and none below
    `LEAST_PROBABILITY`.
    """
    values, order = probability.sort(descending=True, stable=True)
    expected = values.cumsum(0) / torch.arange(1, len(values) + 1)
    return order[(expected >= EXPECTED_PRECISION) & (values >= LEAST_PROBABILITY)]


def far_from_others(values: Tensor) -> Tensor:
    """Return the positions of values above Tukey's outer fence, the largest first."""
    if len(values) < 4:
        return torch.zeros(0, dtype=torch.int64)
    low, high = values.float().quantile(torch.tensor([0.25, 0.75])).tolist()
    order = values.argsort(descending=True, stable=True)
    return order[values[order] > high + FENCE * (high - low)] if high > low else order[:0]
