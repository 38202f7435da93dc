"""DataLoaders for training and evaluation, and errors about killed workers."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, Sampler

from ..system.machine import cores
from .images import EvaluationImages, TrainingImages, Visit, collate
from .orders import EvaluationOrder


def training_loader(images: TrainingImages, order: Sampler[list[Visit]], num_workers: int) -> DataLoader:
    """Return a loader of the batches of `order`."""
    return _loader(images, order, num_workers)


def evaluation_loader(
    images: EvaluationImages,
    batch_size: int,
    num_workers: int,
    processes: int = 1,
    process: int = 0,
    is_counted: bool = True,
) -> DataLoader:
    """Return a loader of every image once over all processes; arguments are those of `EvaluationOrder`."""
    return _loader(images, EvaluationOrder(images, batch_size, processes, process, is_counted), num_workers)


def _loader(images: EvaluationImages, order: Sampler[list[Visit]], num_workers: int) -> DataLoader:
    # The training process augments images that are cached on its device.
    workers = 0 if images.is_on_device else min(num_workers, cores())
    return DataLoader(
        images,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator(),  # without it, every loader would advance torch's default generator
        pin_memory=torch.cuda.is_available() and not images.is_on_device,
        worker_init_fn=_leave_signals_to_parent if workers else None,
    )


def _leave_signals_to_parent(worker: int) -> None:
    # Ctrl-C, a closed terminal and a job scheduler signal the whole process group. The parent finishes its step,
    # saves, and ends its workers, if need be by SIGTERM. So where the system reports the sender of a signal, only a
    # SIGTERM from the parent ends a worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of, args=(os.getppid(),), daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit_on_sigterm_of(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Turn torch's error about a killed DataLoader worker, wherever it is raised, into a `ChildProcessError`."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise ChildProcessError(
            f"A data loading process was killed ({str(error).splitlines()[0].strip()}), often because memory ran "
            "out. Everything that was saved is intact: run the command again, if necessary with fewer num_workers."
        ) from error
