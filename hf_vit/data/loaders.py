"""Data loaders for training and evaluation."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, Sampler

from .images import EvaluationImages, Images, TrainingImages, Visit, collate
from .orders import EvaluationOrder


def training_loader(images: TrainingImages, order: Sampler[list[Visit]], num_workers: int) -> DataLoader:
    """Load the batches of `order`, in order."""
    return _loader(images, order, num_workers)


def evaluation_loader(
    images: EvaluationImages,
    batch_size: int,
    num_workers: int,
    processes: int = 1,
    process: int = 0,
    is_counted: bool = True,
) -> DataLoader:
    """Load every image once over all processes; `batch_size` is of one process, the rest as for `EvaluationOrder`."""
    return _loader(images, EvaluationOrder(images, batch_size, processes, process, is_counted), num_workers)


def _loader(images: Images, order: Sampler[list[Visit]], num_workers: int) -> DataLoader:
    # Images on a device are augmented there, by the process that trains.
    workers = 0 if images.is_on_device else num_workers
    return DataLoader(
        images,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator(),  # else every loader moves torch's own generator on
        pin_memory=torch.cuda.is_available() and not images.is_on_device,
        worker_init_fn=_leave_signals_to_parent if workers else None,
    )


def _leave_signals_to_parent(worker: int) -> None:
    # Ctrl-C, a closed terminal and what ends a job reach the whole process group: the parent finishes its step, saves,
    # and ends its workers, by a SIGTERM if nothing else helps. So only one from there counts, where the system tells
    # the sender.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, args=(os.getppid(),), daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_by_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Turn what torch raises of a worker that was killed, wherever the loop stands, into a `ChildProcessError`."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise ChildProcessError(
            f"A process that loads images was ended from outside ({str(error).splitlines()[0].strip()}), often for "
            "want of memory. What was saved is intact: give the command again, if need be with fewer num_workers."
        ) from error
