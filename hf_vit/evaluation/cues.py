"""Spurious cues: how accurate a classifier is that sees only properties unrelated to the content of images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .intervals import interval_of

MOST_IMAGES = 20_000  # that take part; more do not change the result much
FOLDS, TREES, LEAST_PER_LEAF = 5, 40, 3
STRONG = 0.1  # accuracy above the chance rate from which a cue is strong


@dataclass(frozen=True)
class Cue:
    """Cross-validated accuracy from one group of facts, its 95 % interval, and the accuracy of the largest class."""

    facts: str
    accuracy: float
    low: float
    high: float
    chance: float

    @property
    def is_strong(self) -> bool:
        return self.low > self.chance + STRONG


def cues_of(facts: Mapping[str, Tensor], labels: Tensor, seed: int = 0) -> list[Cue]:
    """Return how well forests of decision trees predict labels from facts, group by group, in cross-validation.

    Args:
        facts: Columns `[N, C]` by the name of their group.
        labels: Class indices `[N]`; classes with fewer images than folds are left out.
        seed: Of the forests and the folds.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    given = labels.numpy()
    numbers = np.bincount(given)
    rows = np.flatnonzero(numbers[given] >= FOLDS)
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MOST_IMAGES])
    numbers = np.bincount(given[rows]) if len(rows) else numbers
    rows = rows[numbers[given[rows]] >= FOLDS]  # of those that were drawn
    if len(set(given[rows])) < 2:
        return []
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    chance = float(np.bincount(given[rows]).max() / len(rows))
    found = []
    for name, columns in facts.items():
        values: Any = columns.numpy()[rows]
        forest = RandomForestClassifier(TREES, min_samples_leaf=LEAST_PER_LEAF, random_state=seed)
        accuracy = float((cross_val_predict(forest, values, given[rows], cv=folds) == given[rows]).mean())
        found.append(Cue(name, accuracy, *interval_of(accuracy, len(rows)), chance))
    return found
