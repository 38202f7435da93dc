"""The state of a run."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule

from ..system.disk import writing


class AveragedWeights:
    """An exponential moving average of a model's parameters.

    Args:
        decay: Share of the average that a step leaves; `None` keeps no average.
    """

    def __init__(self, model: torch.nn.Module, decay: float | None) -> None:
        self.decay, self.model = decay, model
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad] if decay else []
        self.pairs = [(parameter, parameter.detach().clone()) for parameter in learned]

    @torch.no_grad()
    def update(self) -> None:
        for parameter, average in self.pairs:
            average.lerp_(parameter, 1 - (self.decay or 0.0))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the average in the model, and the weights again behind it."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the weights."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):  # which may still hold whole weights of before
                module.reshard()
        for parameter, average in self.pairs:
            weights = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weights)


class RunLog:
    """The log of a run: rows of a list, and lines of a file that follows it."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = path, accelerator
        self.rows: list[dict[str, Any]] = []

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Go back to `rows`: lines behind the checkpoint that a run resumes from will be written again."""
        self.rows = rows
        if self.accelerator.is_main_process:
            with writing("the log", self.path):
                self.path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def add(self, step: int, **row: Any) -> None:
        """Add a line, and tell the tracker, if there is one."""
        self.rows.append({"step": step, **row})
        if self.accelerator.is_main_process:
            with writing("the log", self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        self.accelerator.log(row, step=step)


@dataclass
class Pace:
    """How fast a run goes. `seconds` is all its time, what earlier parts of it took included; the rest leaves out
    evaluating and saving."""

    seconds: float = 0.0
    training_seconds: float = 0.0
    waited_seconds: float = 0.0
    images: int = 0

    def __post_init__(self) -> None:
        self.mark = self.mark_of_training = time.perf_counter()

    def waiting(self, batches: Iterator[Any]) -> Any:
        """Return the next batch, and count the time until it is there."""
        began = time.perf_counter()
        batch = next(batches)
        self.waited_seconds += time.perf_counter() - began
        return batch

    def lap(self) -> None:
        """Count the time since the last lap."""
        now = time.perf_counter()
        self.seconds += now - self.mark
        self.training_seconds += now - self.mark_of_training
        self.mark = self.mark_of_training = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do what is no training."""
        self.lap()
        try:
            yield
        finally:
            self.mark_of_training = time.perf_counter()

    def figures(self) -> dict[str, float]:
        """Return seconds, images a second, and the share of the time that training waits for images."""
        return {
            "seconds": round(self.seconds, 1),
            "images_per_second": round(self.images / max(1e-9, self.training_seconds), 1),
            "data_wait_share": round(self.waited_seconds / max(1e-9, self.training_seconds), 3),
        }


class BrokenImages:
    """Names of images that could not be read, in the order of their appearance."""

    def __init__(self, limits: dict[str, float], say: Callable[[str], None]) -> None:
        self.limits, self.say = limits, say
        self.names: dict[str, list[str]] = {split: [] for split in limits}

    def add(self, split: str, names: Iterable[str]) -> None:
        """Note names; raise if there are too many now."""
        known = self.names[split]
        for name in names:
            if name not in known:
                known.append(name)
                self.say(f"Left out, since it cannot be read: {name}")
        if len(known) > self.limits[split]:
            raise ValueError(
                f"{len(known)} images of the {split} data cannot be read, more than max_broken allows: "
                f"{', '.join(known[:5])}{', ...' if len(known) > 5 else ''}. Repair or remove them, or allow more."
            )
