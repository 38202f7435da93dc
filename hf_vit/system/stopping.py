"""SIGINT, SIGTERM and SIGHUP: stop a run where its progress is saved."""

import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from accelerate import Accelerator


class Interrupted(BaseException):
    """Raised when a signal has stopped a run after it saved its progress; the run can be resumed.

    Not a subclass of `Exception`, since libraries convert those into errors of their own.

    Attributes:
        exit_code: Exit code of the process, as shells have it.
        can_resume: Whether the same command continues; false if the run saves nothing.
    """

    def __init__(self, signum: int, message: str, can_resume: bool = True) -> None:
        super().__init__(message)
        self.exit_code, self.can_resume = 128 + signum, can_resume


class EvaluationStopped(Exception):
    """Raised when a signal arrives during an evaluation."""


class StopSignals:
    """Record SIGINT, SIGTERM and SIGHUP instead of ending the process; a second SIGINT interrupts immediately.

    Until `has_begun` is set there is nothing to save, and the first signal interrupts immediately too. Signals that
    the parent process ignores, such as SIGHUP under `nohup`, stay ignored.

    Args:
        at_once: Text after "Stopped by SIGNAL" in the message of an immediate interrupt.
    """

    SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
    STEPS_BETWEEN_AGREEMENTS = 10

    def __init__(self, at_once: str = " before the first step.") -> None:
        self.at_once = at_once

    def __enter__(self) -> Self:
        self.received, self.has_begun = 0, False
        self.before = {signum: signal.getsignal(signum) for signum in self.SIGNALS}
        for signum, handler in self.before.items():
            if handler is not signal.SIG_IGN or signum == signal.SIGINT:  # shells ignore SIGINT for background jobs
                signal.signal(signum, self._record)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _record(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])
        if not self.has_begun:
            raise Interrupted(signum, f"Stopped by {signal.Signals(signum).name}{self.at_once}")

    def agreed(self, accelerator: "Accelerator", step: int) -> int:
        """Return the signal that any process has received, 0 if none; the same on all processes.

        A collective operation: all processes must call it with the same `step`.
        """
        if accelerator.num_processes == 1:
            return self.received
        if step % self.STEPS_BETWEEN_AGREEMENTS:
            return 0
        import torch

        received = torch.tensor([self.received], device=accelerator.device)
        return int(accelerator.gather(received).max())

    def heeded(self, batches: Iterable[Any], accelerator: "Accelerator") -> Iterator[Any]:
        """Yield the batches of an evaluation; raise `EvaluationStopped` with the signal's number when one arrives."""
        for number, batch in enumerate(batches):
            if signum := self.agreed(accelerator, number):
                raise EvaluationStopped(signum)
            yield batch
