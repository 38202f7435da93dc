"""Thresholds for answers that can say "unknown", from held-out predictions, and their effect on other images.

A label set has the labels of a probability above a threshold (split conformal prediction with the scores of Sadinle,
Lei and Wasserman 2019, arXiv:1609.00451). Among sets with the same coverage these are the smallest on average, and a
single number is all that a runtime needs. Sets that adapt to the image (APS, arXiv:2006.02544) are larger, and need
random numbers for an exact coverage, or parameters against large sets (RAPS, arXiv:2009.14193).

The threshold of abstention bounds the error of the images that are answered (Geifman and El-Yaniv 2017,
arXiv:1705.08500). Their binary search cannot use a small sample, since it begins with half of it; the bounds of a few
fixed shares are tested instead, all at once (arXiv:2110.01052).
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ..data.images import derive_seed
from ..model.abstention_hf_vit import abstains, in_label_sets
from ..system.texts import counted

COVERAGE, MAX_ERROR, SHARE = 0.9, 0.05, 0.5  # of a calibration, if nothing else is asked for
DOUBT = 0.05  # probability that the error of answered images exceeds its bound
TESTED = 20  # thresholds, at equal steps of the share of images that are answered
CENTRAL = 0.95  # of the intervals of measurements
SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)  # of answered images, in a table


@dataclass(frozen=True)
class CalibrationPlan:
    """What to fit to held-out predictions.

    Attributes:
        coverage: Share of images whose label set is to have the true label; `None` for no label sets.
        max_error: Largest share of wrong answers among the answered images; `None` to answer every image.
        share: Share of the images that thresholds are fitted to; they are measured on the others.
        seed: Of the choice of these images.

    Raises:
        ValueError: For a value out of its range.
    """

    coverage: float | None = COVERAGE
    max_error: float | None = MAX_ERROR
    share: float = SHARE
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value, usual in (
            ("--coverage", self.coverage, COVERAGE),
            ("--max-error", self.max_error, MAX_ERROR),
        ):
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{option} must be between 0 and 1, such as {usual}, got {value}.")
        if not 0 < self.share <= 1:
            raise ValueError(f"--calibration-share must be above 0 and at most 1, got {self.share}.")

    @property
    def parts(self) -> "list[CalibrationPlan]":
        """The same plan for label sets alone, and for abstention alone."""
        each = [(self.coverage, None), (None, self.max_error)]
        return [replace(self, coverage=coverage, max_error=error) for coverage, error in each if (coverage or error)]

    def check(self, number: int) -> None:
        """Raise `ValueError` if thresholds cannot be fitted to this number of images."""
        for option, value, least, remedy in (
            ("--coverage", self.coverage, least_for_coverage, "smaller"),
            ("--max-error", self.max_error, least_for_error, "larger"),
        ):
            if value is not None and number < (needed := least(value)):
                raise ValueError(
                    f"{option} {value:g} needs at least {counted(needed, 'image')} that the model was not trained on, "
                    f"got {number:,}: use more images, or a {remedy} {option}."
                )

    def divide(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the indices of the images to fit to and of those to measure on, each in order."""
        order = torch.randperm(number, generator=torch.Generator().manual_seed(derive_seed(self.seed, "calibration")))
        fitted = round(self.share * number)
        return order[:fitted].sort().values, order[fitted:].sort().values


def plan_of(
    is_wanted: bool, coverage: float | None, max_error: float | None, share: float = SHARE
) -> CalibrationPlan | None:
    """Return the plan for options of a command, with both defaults if neither is given; `None` if it is not wanted.

    Raises:
        ValueError: If options are given for a calibration that is not wanted.
    """
    given = {"--coverage": coverage is not None, "--max-error": max_error is not None}
    given["--calibration-share"] = share != SHARE
    if not is_wanted:
        if used := [option for option, is_given in given.items() if is_given]:
            raise ValueError(f"{used[0]} is an option of a calibration: add --calibrate, or remove it.")
        return None
    if coverage is None and max_error is None:
        coverage, max_error = COVERAGE, MAX_ERROR
    return CalibrationPlan(coverage, max_error, share)


def _missed(coverage: float) -> Fraction:
    # Exact: 1 - 0.9 in floating point is below a tenth, so that nine images would not be enough.
    return 1 - Fraction(repr(float(coverage)))


def least_for_coverage(coverage: float) -> int:
    """Return the least number of images that a label set of this coverage can be fitted to: 1 / (1 - coverage) - 1.

    Example:
        >>> least_for_coverage(0.9), least_for_coverage(0.99)
        (9, 99)
    """
    return max(1, math.ceil(1 / _missed(coverage)) - 1)


def least_for_error(max_error: float) -> int:
    """Return the smallest number of images for which a bound on the error can hold, if all predictions are right.

    Example:
        >>> least_for_error(0.05), least_for_error(0.01)
        (117, 597)
    """
    return math.ceil(math.log(DOUBT / TESTED) / math.log1p(-max_error))


def fit_label_set_threshold(probabilities: Tensor, labels: Tensor, coverage: float) -> float:
    """Return the least probability of the labels in a set that has the true label with probability `coverage`.

    This holds on average over new images, and over images to fit to, if they are exchangeable with the new ones.

    Args:
        probabilities: `[N, num_labels]`.
        labels: Class indices, `[N]`.
        coverage: In (0, 1).

    Raises:
        ValueError: If there are too few images.
    """
    CalibrationPlan(coverage, None).check(len(labels))
    of_label = probabilities.gather(1, labels[:, None]).squeeze(1).sort().values
    rank = math.floor((len(labels) + 1) * _missed(coverage))  # of the threshold among these, from 1
    return of_label[rank - 1].item()


def fit_abstention_threshold(probabilities: Tensor, labels: Tensor, max_error: float) -> float:
    """Return the lowest of `TESTED` confidences at which the error of the answered images is bounded by `max_error`.

    The confidence is the largest probability. At the tested ones, equal steps of the images are answered. Each bound
    holds with probability 1 - `DOUBT` / `TESTED`, so that all of them do with 1 - `DOUBT`.

    Args:
        probabilities: `[N, num_labels]`.
        labels: Class indices, `[N]`.
        max_error: In (0, 1).

    Raises:
        ValueError: If no bound is low enough; it states the lowest.
    """
    CalibrationPlan(None, max_error).check(len(labels))
    confidence, predicted = probabilities.max(dim=-1)
    is_wrong, ordered = predicted != labels, confidence.sort(descending=True).values
    bounds = {}
    for step in range(TESTED, 0, -1):
        threshold = ordered[math.ceil(step * len(labels) / TESTED) - 1].item()
        is_answered = confidence >= threshold
        errors = int((is_wrong & is_answered).sum())
        bounds[threshold] = upper_bound(errors, int(is_answered.sum()), DOUBT / TESTED)
        if bounds[threshold] <= max_error:
            return threshold
    best = min(bounds, key=lambda threshold: bounds[threshold])
    raise ValueError(
        f"No threshold keeps the error of the answers at {max_error:.1%} with {1 - DOUBT:.0%} confidence: of "
        f"{counted(len(labels), 'image')}, {int(is_wrong.sum()):,} are wrong, and the lowest bound is "
        f"{bounds[best]:.1%}. Use more images, or a --max-error of at least {math.ceil(1000 * bounds[best]) / 1000:g}."
    )


def upper_bound(errors: int, number: int, doubt: float) -> float:
    """Return the upper bound of an error rate that holds with probability 1 - `doubt` (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    return 1.0 if errors >= number else float(beta.ppf(1 - doubt, errors + 1, number - errors))


def interval_of_share(count: int, number: int) -> tuple[float, float]:
    """Return the 95 % interval of a probability, from `count` of `number` independent trials."""
    doubt = (1 - CENTRAL) / 2
    return 1 - upper_bound(number - count, number, doubt), upper_bound(count, number, doubt)


def coverage_interval(coverage: float, fitted_to: int, number: int) -> tuple[float, float]:
    """Return the 95 % interval of the coverage on `number` images of label sets that were fitted to `fitted_to`.

    The number of covered images has the beta-binomial distribution (Vovk 2012, arXiv:1209.2673), without ties.
    """
    from scipy.stats import betabinom

    missed = math.floor((fitted_to + 1) * _missed(coverage))
    low, high = betabinom.interval(CENTRAL, number, fitted_to + 1 - missed, missed)
    return float(low) / number, float(high) / number


def fit_certainty(logits: Tensor, labels: Tensor, plan: CalibrationPlan) -> dict[str, float | None]:
    """Return the fields of a config that `plan` asks for; the others are `None`.

    Args:
        logits: `[N, num_labels]`, divided by the temperature.
        labels: Class indices, `[N]`.

    Raises:
        ValueError: If there are too few images or too many errors, or if a logit is NaN or infinite.
    """
    if not logits.isfinite().all():
        raise ValueError("The logits have NaN or infinite values: use --precision fp32.")
    probabilities = logits.float().softmax(dim=-1)
    fields: dict[str, float | None] = dict.fromkeys(
        ("abstention_threshold", "label_set_threshold", "label_set_coverage")
    )
    if plan.coverage is not None:
        threshold = fit_label_set_threshold(probabilities, labels, plan.coverage)
        fields |= {"label_set_threshold": threshold, "label_set_coverage": plan.coverage}
    if plan.max_error is not None:
        fields["abstention_threshold"] = fit_abstention_threshold(probabilities, labels, plan.max_error)
    return fields


def measure_certainty(
    logits: Tensor, labels: Tensor, fields: dict[str, Any], fitted_to: int, label_names: list[str]
) -> dict[str, Any]:
    """Return what thresholds do on images that they were not fitted to.

    Args:
        logits, labels: As for `fit_certainty`.
        fields: Its result.
        fitted_to: Number of images that the thresholds were fitted to.
        label_names: By class index.

    Returns:
        `images`; `label_set`: `coverage` with `low` and `high`, between which 95 % of such measurements are expected,
        `mean_size`, and `lowest`, the class of at least ten images with the lowest coverage; `abstention`: shares
        `answered` and `error` (of the answers) with the 95 % interval `low` to `high`; and `risk_coverage`, rows of
        the `answered` share, the `accuracy` of the answers, and the `threshold`.
    """
    probabilities = logits.float().softmax(dim=-1)
    confidence, predicted = probabilities.max(dim=-1)
    is_right, number = predicted == labels, len(labels)
    measured: dict[str, Any] = {"images": number}
    if (threshold := fields["label_set_threshold"]) is not None:
        sets = in_label_sets(probabilities, threshold)
        is_covered = sets.gather(1, labels[:, None]).squeeze(1)
        low, high = coverage_interval(fields["label_set_coverage"], fitted_to, number)
        measured["label_set"] = {
            "coverage": is_covered.double().mean().item(),
            "low": low,
            "high": high,
            "mean_size": sets.sum(dim=1).double().mean().item(),
            "lowest": _lowest(is_covered, labels, label_names),
        }
    if (threshold := fields["abstention_threshold"]) is not None:
        measured["abstention"] = _answered(~abstains(probabilities, threshold), is_right)
    ordered = confidence.sort(descending=True).values
    thresholds = [ordered[math.ceil(share * number) - 1].item() for share in SHARES]
    rows = [{**_answered(confidence >= each, is_right), "threshold": each} for each in thresholds]
    measured["risk_coverage"] = [
        {"answered": row["answered"], "accuracy": 1 - row["error"], "threshold": row["threshold"]} for row in rows
    ]
    return measured


def _answered(is_answered: Tensor, is_right: Tensor) -> dict[str, Any]:
    answered, errors = int(is_answered.sum()), int((is_answered & ~is_right).sum())
    if answered == 0:
        return {"answered": 0.0, "error": None, "low": 0.0, "high": 1.0}
    low, high = interval_of_share(errors, answered)
    return {"answered": answered / len(is_right), "error": errors / answered, "low": low, "high": high}


def _lowest(is_covered: Tensor, labels: Tensor, label_names: list[str], least: int = 10) -> dict[str, Any] | None:
    counts = torch.bincount(labels, minlength=len(label_names))
    covered = torch.bincount(labels, is_covered.double(), minlength=len(label_names))
    shares = (covered / counts).where(counts >= least, 2.0)
    if (shares > 1).all():
        return None
    worst = int(shares.argmin())
    return {"label": label_names[worst], "coverage": shares[worst].item(), "images": int(counts[worst])}
