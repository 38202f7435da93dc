"""Run a model on all cores: one batch per core at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from ..system.machine import cores

Item = TypeVar("Item")


Answer = TypeVar("Answer")


# Images that a core of the CPU, and a GPU, answers for at a time.
BATCH_OF_CPU, BATCH_OF_GPU = 8, 256


AHEAD = 2  # batches that each core may be ahead of who reads the answers


def default_batch_size(device_type: str) -> int:
    """Return how many images a core, or a GPU, answers for at a time."""
    return BATCH_OF_CPU if device_type == "cpu" else BATCH_OF_GPU


def on_every_core(
    work: Callable[[Item], Answer], items: Iterable[Item], workers: int | None = None
) -> Iterator[Answer]:
    """Yield `work(item)` of every item, in their order, each worked on by one core alone.

    Cores that share an operation wait for each other at its end; what decodes images or multiplies matrices leaves
    Python's lock, so that threads do. Items are taken no further ahead than the workers need.

    Args:
        workers: Threads; as many as this process may use cores if not given.
    """
    workers = workers or cores()
    threads = torch.get_num_threads()
    waiting: deque[Future[Answer]] = deque()
    # Inside its thread, torch would let each use all cores.
    with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            torch.set_num_threads(threads)
