"""Run inference on all CPU cores, with one batch per core."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from ..system.machine import cores

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCH_OF_CPU, BATCH_OF_GPU = 8, 256  # images per CPU core and per GPU
AHEAD = 2  # batches that each core may compute before their results are consumed


def default_batch_size(device_type: str) -> int:
    """Return the default batch size per CPU core or GPU."""
    return BATCH_OF_CPU if device_type == "cpu" else BATCH_OF_GPU


def on_every_core(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """Yield `work(item)` for each item in order, computed by threads that use one CPU core each.

    Cores that share an operation would wait for each other at its end. Image decoding and matrix products release the
    GIL, so threads suffice. Items are requested only as far ahead as the workers need.

    Args:
        workers: Number of threads; by default the number of CPU cores available to this process.
    """
    workers = workers or cores()
    threads = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    # By default torch would use all cores in each of the threads.
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
