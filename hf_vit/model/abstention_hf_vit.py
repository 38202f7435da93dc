"""The answer "unknown": abstention and label sets of a classifier with one label per image.

A classifier abstains if the probability of its most likely label is below `abstention_threshold` of the config
(selective classification: Geifman and El-Yaniv 2017, arXiv:1705.08500). Its label set contains all labels with a
probability of at least `label_set_threshold` (conformal prediction with the scores of Sadinle, Lei and Wasserman 2019,
arXiv:1609.00451), and always the most likely label. `hf-vit evaluate --calibrate` fits both thresholds.
"""

from typing import Any, NamedTuple

from torch import Tensor

from .losses_hf_vit import activation_of

UNKNOWN = "unknown"  # label that pipelines return if the model abstains
SHOWN = 5  # default number of labels that a pipeline returns


class Certainty(NamedTuple):
    """Result of a model's thresholds for one image.

    Attributes:
        is_unknown: Whether the model abstains; `None` if it has no threshold for this.
        label_set: Indices of the classes in the label set, the most likely first; `None` if it has no label sets.
        confidence: Probability of the most likely label.
    """

    is_unknown: bool | None = None
    label_set: list[int] | None = None
    confidence: float = 1.0


def abstains(probabilities: Tensor, threshold: float) -> Tensor:
    """Return for each image whether its largest probability is NaN or below a threshold, `[B]`."""
    return ~(probabilities.amax(dim=-1) >= threshold)


def in_label_sets(probabilities: Tensor, threshold: float) -> Tensor:
    """Return which classes are in the label set of each image, `[B, num_labels]`."""
    return (probabilities >= threshold) | (probabilities == probabilities.amax(dim=-1, keepdim=True))


def certainties(logits: Tensor, config: Any) -> list[Certainty]:
    """Apply the thresholds of a config to each image.

    Args:
        logits: `[B, num_labels]`, divided by the temperature of the config, as the model returns them.
        config: Config of the model, possibly from another library, or `None`.
    """
    if not hasattr(config, "abstention_threshold") or activation_of(config) != "softmax":
        return [Certainty()] * len(logits)
    probabilities = logits.float().softmax(dim=-1)
    unknown: list[bool | None] = [None] * len(logits)
    if config.abstention_threshold is not None:
        unknown = abstains(probabilities, config.abstention_threshold).tolist()
    sets: list[list[int] | None] = [None] * len(logits)
    if config.label_set_threshold is not None:
        sizes = in_label_sets(probabilities, config.label_set_threshold).sum(dim=-1).tolist()
        order = probabilities.argsort(dim=-1, descending=True, stable=True)
        sets = [row[:size].tolist() for row, size in zip(order, sizes, strict=True)]
    confidence = probabilities.amax(dim=-1).tolist()
    return [Certainty(*each) for each in zip(unknown, sets, confidence, strict=True)]


def with_certainty(found: list[dict[str, Any]], certainty: Certainty) -> list[dict[str, Any]]:
    """Add the result of the thresholds to the output of a pipeline.

    Args:
        found: Dictionaries of `label` and `score`, the highest score first.
        certainty: Result of the thresholds for the same image.

    Returns:
        The same dictionaries with `in_label_set`, if the model has label sets. If it abstains, the label "unknown"
        precedes them; its score is the probability that the most likely label is wrong.
    """
    if certainty.label_set is not None:
        number = len(certainty.label_set)
        found = [{**each, "in_label_set": index < number} for index, each in enumerate(found)]
    if certainty.is_unknown:
        found = [{"label": UNKNOWN, "score": 1 - certainty.confidence}, *found]
    return found


def most_shown(certainty: Certainty, top_k: int | None) -> int:
    """Return the number of labels that a pipeline returns; by default five, or the whole label set if it is larger."""
    return max(SHOWN, len(certainty.label_set or ())) if top_k is None else top_k
