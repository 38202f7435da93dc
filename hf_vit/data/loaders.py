"""DataLoaders for training and evaluation, and errors about killed workers."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ..system.machine import cores
from ..system.transfers import has_own_memory, to_device
from .images import EvaluationImages, TrainingImages, Visit, collate
from .orders import EvaluationOrder


class DeviceLoader(DataLoader):
    """A loader of images that are cached on a device: it augments each batch there, as a whole.

    Args:
        images: With a cache on a device.
        options: Options of `DataLoader`, for batches with plans in place of pixels.
    """

    def __init__(self, images: EvaluationImages, **options: Any) -> None:
        super().__init__(images.planned(), **options)
        self.cached: Any = images.cached

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        from .batched_augmentation import carry_out

        for batch in super().__iter__():
            planned = batch["pixel_values"]
            if isinstance(planned, Tensor):  # gray images, since none of the batch can be read
                pixel_values = to_device(planned, self.cached.blocks[0].device)
            else:
                pixel_values = carry_out(planned, [self.cached[plan.position] for plan in planned])
            yield {**batch, "pixel_values": pixel_values}


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
    has_one_size: bool = False,
) -> DataLoader:
    """Return a loader of every image once over all processes; arguments are those of `EvaluationOrder`."""
    order = EvaluationOrder(images, batch_size, processes, process, is_counted, has_one_size)
    return _loader(images, order, num_workers)


def _loader(images: EvaluationImages, order: Sampler[list[Visit]], num_workers: int) -> DataLoader:
    workers = min(num_workers, cores())
    return (DeviceLoader if images.is_on_device else DataLoader)(
        images,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator(),  # without it, every loader would advance torch's default generator
        pin_memory=has_own_memory(torch.accelerator.current_accelerator(True)),
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
