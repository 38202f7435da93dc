"""The best model of a run: chosen by a metric among all evaluations, and part of the run's state."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..evaluation.metrics import LOWER_IS_BETTER


class BestModel:
    """The best evaluated weights so far.

    Attributes:
        metric: Name of the metric by which weights are chosen.
        step: Number of steps of the best weights; 0 before the first evaluation.
        value, last_value: The metric of the best weights, and of the last evaluation.
        without_improvement: Number of evaluations since the best one.
        weights: Complete weights on the main process, on the CPU; empty elsewhere.
    """

    def __init__(self, metric: str, early_stopping: int | None = None) -> None:
        self.metric, self.early_stopping = metric, early_stopping
        self.step, self.without_improvement = 0, 0
        self.value = self.last_value = math.nan
        self.weights: dict[str, Tensor] = {}

    @property
    def is_over(self) -> bool:
        """Whether the run is to end, since the metric has not improved for `early_stopping` evaluations."""
        return self.early_stopping is not None and self.without_improvement >= self.early_stopping

    def update(self, step: int, metrics: dict[str, Any], weights: Callable[[], dict[str, Tensor]]) -> bool:
        """Take an evaluation into account, and return whether it is the best; called by all processes together.

        Raises:
            ValueError: If there is no such metric.
        """
        value = metrics.get(self.metric)
        if not isinstance(value, int | float) or self.metric == "count":
            known = [name for name, value in metrics.items() if isinstance(value, int | float) and name != "count"]
            raise ValueError(f"There is no metric {self.metric!r}: set best_metric to one of {', '.join(known)}.")
        self.last_value = value
        is_better = value < self.value if self.metric in LOWER_IS_BETTER else value > self.value
        if not is_better and not math.isnan(self.value):
            self.without_improvement += 1
            return False
        self.step, self.value, self.without_improvement, self.weights = step, value, 0, weights()
        return True

    def state_dict(self) -> dict[str, Any]:
        names = ("step", "value", "last_value", "without_improvement", "weights")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, saved: dict[str, Any], is_main_process: bool) -> None:
        vars(self).update(saved)
        if not is_main_process:
            self.weights = {}
