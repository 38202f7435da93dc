"""The state of a run: what a checkpoint saves is what a resumed run loads."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..system.disk import writing
from .best import BestModel
from .parallel import load_optimizer_state, load_weights, optimizer_state, whole_weights


class AveragedWeights:
    """An exponential moving average of a model's trainable parameters.

    Args:
        decay: Share of the average that remains after a step; `None` keeps no average.
    """

    def __init__(self, model: torch.nn.Module, decay: float | None) -> None:
        self.decay, self.model = decay, model
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad] if decay else []
        self.pairs = [(parameter, parameter.detach().clone()) for parameter in trainable]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        for is_sharded in (False, True):  # one operation takes either kind
            pairs = [pair for pair in self.pairs if isinstance(pair[0], DTensor) == is_sharded]
            if pairs and self.decay is not None:
                parameters, averages = (list(tensors) for tensors in zip(*pairs, strict=True))
                torch._foreach_lerp_(averages, parameters, 1 - self.decay)  # one launch for many tensors

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the model, and restore the weights afterwards."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the weights."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):  # it may still hold gathered weights from before the swap
                module.reshard()
        for parameter, average in self.pairs:
            weights = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weights)


class RunLog:
    """The log of a run, as rows in memory and as lines of a file."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = path, accelerator
        self.rows: list[dict[str, Any]] = []

    def rewrite(self) -> None:
        """Write the file anew: lines after the loaded checkpoint are dropped, since their steps are repeated."""
        if self.accelerator.is_main_process:
            with writing("the log", self.path):
                self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def add(self, step: int, **row: Any) -> None:
        """Add a line, and pass it to the tracker if there is one."""
        self.rows.append({"step": step, **row})
        if self.accelerator.is_main_process:
            with writing("the log", self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        self.accelerator.log(row, step=step)


@dataclass
class Throughput:
    """The speed of a run, including its earlier parts if it was interrupted.

    Attributes:
        seconds: Total time.
        training_seconds: Time without evaluating and saving.
        waited_seconds: Time spent waiting for images.
        images: Number of training images.
    """

    seconds: float = 0.0
    training_seconds: float = 0.0
    waited_seconds: float = 0.0
    images: int = 0

    def __post_init__(self) -> None:
        self.mark = self.training_mark = time.perf_counter()

    def next_batch(self, batches: Iterator[Any]) -> Any:
        """Return the next batch, and count the time spent waiting for it."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited_seconds += time.perf_counter() - start
        return batch

    def lap(self) -> None:
        """Count the time since the last lap."""
        now = time.perf_counter()
        self.seconds += now - self.mark
        self.training_seconds += now - self.training_mark
        self.mark = self.training_mark = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside this context from the training time."""
        self.lap()
        try:
            yield
        finally:
            self.training_mark = time.perf_counter()

    def summary(self) -> dict[str, float]:
        """Return the seconds, images/s, and the share of training time spent waiting for images."""
        return {
            "seconds": round(self.seconds, 1),
            "images_per_second": round(self.images / max(1e-9, self.training_seconds), 1),
            "data_wait_share": round(self.waited_seconds / max(1e-9, self.training_seconds), 3),
        }


def accepted_broken(share: float, number: int) -> float:
    """Return how many of a number of images may be unreadable: a share, but at least 3 unless it is 0."""
    return max(3.0, share * number) if share else 0.0


class BrokenImages:
    """Names of images that cannot be read, in order of appearance.

    Args:
        limits: Largest acceptable number per split.
        say: Prints a line.
    """

    def __init__(self, limits: dict[str, float], say: Callable[[str], None]) -> None:
        self.limits, self.say = limits, say
        self.names: dict[str, list[str]] = {split: [] for split in limits}
        self.new: list[str] = []  # training images of this process that `gather` has not counted yet

    def gather(self) -> None:
        """Count the unreadable training images of all processes since the last call."""
        self.add("training", gather_object(self.new))
        self.new.clear()

    def add(self, split: str, names: Iterable[str]) -> None:
        """Count names; raise `ValueError` if there are more than the limit."""
        known = self.names[split]
        for name in names:
            if name not in known:
                known.append(name)
                self.say(f"Skipped an image that cannot be read: {name}")
        if len(known) > self.limits[split]:
            raise ValueError(
                f"{len(known)} images of the {split} data cannot be read, more than max_broken allows: "
                f"{', '.join(known[:5])}{', ...' if len(known) > 5 else ''}. Repair or remove them, or allow more."
            )


@dataclass
class TrainingState:
    """Everything that a checkpoint holds. All processes call `state_dict` and `load_state_dict` together.

    Attributes:
        identity: The recipe and the number of training images; a run resumes only if they match.
        step: Number of completed steps.
        is_evaluation_due: Whether a signal interrupted the evaluation after this step.
        pending_losses: Losses that are not in the log yet, one per step, on the device: reading one waits for it.
        images_per_epoch: Number of images of a stream that this process read in each epoch so far.
        split: Number of parts into which each batch is split, since memory ran out.
        best: The best weights so far, if a metric chooses the final model.
    """

    accelerator: Accelerator
    model: Any
    optimizer: Any
    average: AveragedWeights
    log: RunLog
    broken: BrokenImages
    identity: dict[str, Any]
    step: int = 0
    is_evaluation_due: bool = False
    pending_losses: list[Tensor] = field(default_factory=list)
    images_per_epoch: list[int] | None = None
    throughput: Throughput = field(default_factory=Throughput)
    split: int = 1
    best: BestModel | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state; `model` becomes a safetensors file, the rest `training_state.pt`.

        Tensors are complete on the main process. Later steps do not change the returned tensors. The keys are a file
        format: older checkpoints lack the newest ones, which stand last here.

        Raises:
            FloatingPointError: If a loss is not finite; such a state is not worth saving.
        """
        losses = self.mean_losses()
        self.broken.gather()
        scaler = self.accelerator.scaler
        return {
            "model": whole_weights(self.model),
            "optimizer": optimizer_state(self.model, self.optimizer),
            "average": self._averaged_weights(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "step": self.step,
            "is_evaluation_due": self.is_evaluation_due,
            "pending": losses.cpu(),
            "log": self.log.rows.copy(),
            "broken": deepcopy(self.broken.names),
            "pace": asdict(self.throughput),
            "images_an_epoch": gather_object([copy(self.images_per_epoch)]),
            "processes": self.accelerator.num_processes,
            "identity": self.identity,
            "split": self.split,
            "best": None if self.best is None else self.best.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned, on any number of processes.

        Its weights may be the trained ones alone if the others are those of the model already.
        """
        if saved["average"] is not None:
            with self.average.in_place():
                load_weights(self.model, saved["average"])
        load_weights(self.model, saved["model"])
        self.split = saved.get("split", 1)
        if self.best is not None and saved.get("best") is not None:
            self.best.load_state_dict(saved["best"], self.accelerator.is_main_process)
        load_optimizer_state(self.model, self.optimizer, saved["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.step = saved["step"]
        self.is_evaluation_due = saved["is_evaluation_due"]
        self.pending_losses = list(saved["pending"].to(self.accelerator.device))
        self.log.rows = saved["log"]
        self.broken.names = saved["broken"]
        self.throughput = Throughput(**saved["pace"])
        if saved["processes"] == self.accelerator.num_processes:  # others would divide the stream differently
            self.images_per_epoch = saved["images_an_epoch"][self.accelerator.process_index]

    def mean_losses(self) -> Tensor:
        """Return the pending losses in float32, each the mean over the processes; raise if one is not finite."""
        if not self.pending_losses:
            return torch.zeros(0, device=self.accelerator.device)
        losses = torch.stack(self.pending_losses)
        if self.accelerator.num_processes > 1:
            # In float64, the mean of equal numbers is that number to the bit: loaded losses are means already. It is
            # computed on the CPU, since some accelerators have no float64.
            losses = self.accelerator.gather(losses[None]).cpu().double().mean(dim=0).float()
        if nonfinite := (~losses.isfinite()).nonzero().flatten().tolist():
            raise FloatingPointError(
                f"The loss or gradient of step {self.step - len(losses) + 1 + nonfinite[0]} is not finite. The run "
                "stops; its earlier checkpoints are intact. Try a lower learning_rate, a longer warmup_epochs, "
                "precision: fp32, or on_nonfinite: skip."
            )
        return losses

    def _averaged_weights(self) -> dict[str, Tensor] | None:
        if self.average.decay is None:
            return None
        with self.average.in_place():
            return whole_weights(self.model)
