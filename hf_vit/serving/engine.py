"""Dynamic batching: images of many requests go through the model together.

Threads decode images as they arrive. Whenever a model thread is free, it takes the images that are decoded, at most a
batch. While others are still being decoded, it waits for them up to `max_wait`; a lone request never waits. So batches
grow with the load, as in the dynamic batchers of Triton and TorchServe, and small ones cost no latency.

An image's answer does not depend on the others of its batch, up to rounding: matrix products of different sizes add in
different orders.

If the model raises an error, each image of the batch is tried alone, since one of them may be the cause. Then the
engine runs the model on a gray image. If this fails too, the engine has failed: all requests get an error.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..prediction.predictor import Prediction, Predictor
from ..system.machine import cores
from ..system.texts import counted, one_line
from .metrics import Metrics

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

LEAST_QUEUE = 128  # images


class QueueFull(Exception):
    """Raised if the queue has no room for the images of a request."""


class ModelFailed(Exception):
    """Raised if the model raised an error for an image, or if the engine has failed."""


@dataclass(eq=False)
class Waiting:
    """A decoded image, the answer that its request waits for, and the time of its arrival by the loop's clock."""

    prediction: Prediction
    pixels: Tensor
    answer: "asyncio.Future[Prediction]"
    since: float


class Engine:
    """Answer images in batches, between `start` and `close`, in one event loop.

    Args:
        predictor: Reads images and computes batches.
        sample: Pixels of an image that the model must be able to answer, `[C, H, W]`.
        metrics: Counts images and batches.
        workers: Number of threads that run the model, which share the CPU cores.
        max_wait: Seconds that a decoded image waits for others that are being decoded.
        queue_size: Number of images of requests without a response; by default 128, or two batches if that is more.
        on_failure: Called if the engine fails.
    """

    def __init__(
        self,
        predictor: Predictor,
        sample: Tensor,
        metrics: Metrics,
        workers: int = 1,
        max_wait: float = 0.005,
        queue_size: int | None = None,
        on_failure: Callable[[], object] = lambda: None,
    ) -> None:
        self.predictor, self.sample, self.metrics = predictor, sample, metrics
        self.workers, self.max_wait, self.on_failure = workers, max_wait, on_failure
        self.queue_size = queue_size or max(LEAST_QUEUE, 2 * predictor.batch_size)
        self.failure: BaseException | None = None
        self.is_ready = self.is_closing = False
        self.held = self.decoding = 0  # images of requests without a response, and those of them being decoded
        self.waiting: deque[Waiting] = deque()
        self.open: set[asyncio.Future[Prediction]] = set()

    async def start(self) -> None:
        """Start the threads; the engine is ready when the model has been warmed up."""
        self.threads = torch.get_num_threads()
        share = max(1, self.threads // self.workers)
        self.readers = ThreadPoolExecutor(cores(), "reader", _set_threads, (1,))
        self.models = ThreadPoolExecutor(self.workers, "model", _set_threads, (share,))
        self.changed, self.free = asyncio.Event(), asyncio.Semaphore(self.workers)
        self.task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """End the threads; requests that are left get an error."""
        self.is_closing = True
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task
        for pool in (self.readers, self.models):
            await asyncio.to_thread(pool.shutdown, cancel_futures=True)
        torch.set_num_threads(self.threads)

    @property
    def is_full(self) -> bool:
        """Whether a request would be rejected."""
        return self.held >= self.queue_size

    async def predict(self, images: Sequence[bytes]) -> list[Prediction]:
        """Return the prediction for each encoded image; a broken image has an `error`.

        Cancelling this call drops the images that are not being computed yet.

        Raises:
            QueueFull: If the queue has no room for all of them.
            ModelFailed: If the model raised an error for one of them, or the engine has failed.
        """
        if self.held + len(images) > self.queue_size:
            raise QueueFull
        self.held += len(images)
        tasks = [asyncio.create_task(self._predict(image)) for image in images]
        try:
            return await asyncio.gather(*tasks)
        finally:
            self.held -= len(images)
            for task in tasks:
                task.cancel()

    async def _predict(self, image: bytes) -> Prediction:
        result = "dropped"
        try:
            self.decoding += 1
            try:
                prediction, pixels = await self.in_reader(lambda: self.predictor.read(image))
            finally:
                self.decoding -= 1
                self.changed.set()
            prediction.source = None  # frees memory while the pixels wait
            if pixels is not None:
                prediction = await self._answered(prediction, pixels)
            result = "answered" if prediction.error is None else "broken"
            return prediction
        except Exception:
            result = "failed"
            raise
        finally:
            self.metrics.images[result] += 1

    async def _answered(self, prediction: Prediction, pixels: Tensor) -> Prediction:
        if self.failure is not None:
            raise ModelFailed(_sentence(self.failure))
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Prediction] = loop.create_future()
        self.open.add(answer)
        self.waiting.append(Waiting(prediction, pixels, answer, loop.time()))
        self.changed.set()
        try:
            return await answer
        finally:
            self.open.discard(answer)

    async def in_reader(self, work: Callable[[], Result]) -> Result:
        """Return the result of a function that one of the decoding threads runs."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, work)

    # ------------------------------------------------------------------------------------------ the model's side

    async def _run(self) -> None:
        """Warm the model up, then answer batches until the engine is closed or fails."""
        workers: list[asyncio.Task[None]] = []
        try:
            for number in sorted({1, self.predictor.batch_size}):
                await self._check(number)
            self.is_ready = True
            # One more than there are model threads: the results of a batch are read while the next one is computed.
            workers += [asyncio.create_task(self._work()) for _ in range(self.workers + 1)]
            await asyncio.gather(*workers)
        except BaseException as error:  # also that of a cancelled task: nobody else would answer
            self._fail(error)
        finally:
            self.is_ready = False
            for worker in workers:
                worker.cancel()

    def _fail(self, error: BaseException) -> None:
        for answer in self.open:
            if not answer.done():
                answer.set_exception(ModelFailed(_sentence(error)))
        if not self.is_closing:
            logger.error("The model has failed, so the server stops.", exc_info=error)
            self.failure = error
            self.on_failure()

    async def _work(self) -> None:
        while True:
            batch: list[Waiting] = []
            try:
                async with self.free:  # only a free thread takes images: others may still join them
                    batch = await self._next_batch()
                    finish = await self._start(batch)
                await self._finish(batch, finish)
            except ModelFailed as error:
                await self._recover(batch, error)

    async def _next_batch(self) -> list[Waiting]:
        """Wait for decoded images; return them when the batch is full or the oldest one need not wait any longer."""
        loop, size = asyncio.get_running_loop(), self.predictor.batch_size
        while True:
            self.waiting = deque(each for each in self.waiting if not each.answer.done())  # not dropped
            left = None
            if self.waiting:
                left = self.waiting[0].since + self.max_wait - loop.time() if self.decoding else 0
                if left <= 0 or len(self.waiting) >= size:
                    return [self.waiting.popleft() for _ in range(min(size, len(self.waiting)))]
            self.changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), left)

    async def _start(self, batch: Sequence[Waiting]) -> Callable[[], list[Prediction]]:
        self.metrics.batches.add(len(batch))
        images = [(each.prediction, each.pixels) for each in batch]
        return await _attempt(self.models, lambda: self.predictor.start(images))

    async def _finish(self, batch: Sequence[Waiting], finish: Callable[[], list[Prediction]]) -> None:
        for each, prediction in zip(batch, await _attempt(self.readers, finish), strict=True):
            if not each.answer.done():
                each.answer.set_result(prediction)

    async def _recover(self, batch: Sequence[Waiting], error: ModelFailed) -> None:
        """Try each image of a batch alone, then check the model."""
        logger.error(f"The model failed on {counted(len(batch), 'image')}.", exc_info=error.__cause__)
        for each in batch:
            try:
                await self._finish([each], await self._start([each]))
            except ModelFailed as again:
                if not each.answer.done():
                    each.answer.set_exception(again)
        await self._check()

    async def _check(self, number: int = 1) -> None:
        """Compute a batch of gray images; raise `ModelFailed` if that is impossible."""
        size = (self.sample.shape[-2], self.sample.shape[-1])
        images = [(Prediction(None, size=size), self.sample) for _ in range(number)]
        await _attempt(self.readers, await _attempt(self.models, lambda: self.predictor.start(images)))


async def _attempt(pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
    """Run a function in a pool; raise `ModelFailed` from whatever it raises."""

    def attempt() -> Any:
        try:
            return work(), None
        except BaseException as error:  # asyncio would end the event loop at some of them
            return None, error

    result, error = await asyncio.get_running_loop().run_in_executor(pool, attempt)
    if error is not None:
        raise ModelFailed(_sentence(error)) from error
    return result


def _sentence(error: BaseException) -> str:
    if isinstance(error, ModelFailed):
        return str(error)
    if isinstance(error, asyncio.CancelledError):
        return "The server stopped before it answered this image: send it again."
    return f"The model failed ({type(error).__name__}: {one_line(str(error))[:200]})."


def _set_threads(number: int) -> None:
    torch.get_num_threads()  # otherwise the first operation of this thread would take over the number of another one
    torch.set_num_threads(number)
