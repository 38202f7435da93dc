"""What every training objective has, beside its loss and its evaluation."""

from typing import Any

from torch import Tensor

from .recipe import TrainConfig


class Objective:
    """Base class of the objectives in `tasks.TASKS`."""

    def begin(self, run: Any, model: Any) -> None:
        """Prepare what depends on the images and the model of a run; called once, before anything is written."""

    def published(self, model: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Return the model that a run saves at its end, and its weights, from those that it trains."""
        return model, weights


def refuse_mixing(config: TrainConfig, reason: str) -> None:
    """Raise `ValueError` if a recipe mixes images or weighs classes."""
    given = {name: getattr(config, name) for name in ("cutmix", "mixup", "label_smoothing")}
    given |= {"class_weights": config.class_weights} if config.class_weights != "none" else {}
    given |= {"sampling": config.sampling} if config.sampling == "balanced" else {}
    if mixing := [f"{name}={value}" for name, value in given.items() if value]:
        raise ValueError(f"{reason}: remove {', '.join(mixing)}.")
