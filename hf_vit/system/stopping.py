"""Being asked to stop: SIGINT, SIGTERM and SIGHUP, heeded where what was done is safe."""

import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, Self

import torch
from accelerate import Accelerator


class Interrupted(BaseException):
    """A run was asked to stop, has saved where it stands, and can go on from there.

    No `Exception`: libraries turn these into errors of their own.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class EvaluationStopped(Exception):
    """A signal came while a run was evaluating."""


class StopSignals:
    """Note SIGINT, SIGTERM and SIGHUP instead of dying of them; a second SIGINT interrupts at once.

    Until `has_begun` is set there is nothing to save, and the first one interrupts at once, too. One that is to be
    ignored, as `nohup` has it of SIGHUP, stays so.

    Args:
        at_once: What is said behind "Stopped by SIGNAL" where one interrupts at once.
    """

    SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
    STEPS_BETWEEN_AGREEMENTS = 10

    def __init__(self, at_once: str = " before the first step.") -> None:
        self.at_once = at_once

    def __enter__(self) -> Self:
        self.received, self.has_begun = 0, False
        self.before = {signum: signal.getsignal(signum) for signum in self.SIGNALS}
        for signum, handler in self.before.items():
            if handler is not signal.SIG_IGN or signum == signal.SIGINT:  # which shells ignore for what runs behind
                signal.signal(signum, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])
        if not self.has_begun:
            raise Interrupted(signum, f"Stopped by {signal.Signals(signum).name}{self.at_once}")

    def agreed(self, accelerator: Accelerator, step: int) -> int:
        """Return the signal that any process got, the same on all of them; asked for by all at the same steps."""
        if accelerator.num_processes == 1:
            return self.received
        if step % self.STEPS_BETWEEN_AGREEMENTS:
            return 0
        received = torch.tensor([self.received], device=accelerator.device)
        return int(accelerator.gather(received).max())

    def heeded(self, batches: Iterable[Any], accelerator: Accelerator) -> Iterator[Any]:
        """Yield batches of an evaluation until a signal comes; then raise `EvaluationStopped` with its number."""
        for number, batch in enumerate(batches):
            if signum := self.agreed(accelerator, number):
                raise EvaluationStopped(signum)
            yield batch
