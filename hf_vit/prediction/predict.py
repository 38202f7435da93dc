"""From sources to a table of answers: what `hf-vit predict` does, and how it goes on with what was stopped."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from tqdm.auto import tqdm

from ..data.sources import Part, Sources
from ..inference.optimize import inference_precision
from ..inference.threads import default_batch_size
from ..system.locking import lock_folder_together
from ..system.stopping import StopSignals
from .predictor import Prediction, Predictor
from .processes import Processes
from .ray import RayActors
from .shards import Settings, tasks_of
from .table import Answers

BATCHES_OF_A_SHARD = 16  # seconds of work are lost at most, and processes end at about the same time
LONGEST_WAIT = timedelta(days=30)  # of one process for the others
# Who answers; one of these is built from settings and an accelerator.
ENGINES: dict[str, Callable[[Settings, Accelerator], Any]] = {"processes": Processes, "ray": RayActors}


@dataclass(frozen=True)
class Summary:
    """What came of it: all rows, names of the broken ones, and the pace of what was done now."""

    images: int
    broken: list[str]
    images_per_second: float


class Survey:
    """What the parts of sources are, as far as it shows without reading them."""

    def __init__(self) -> None:
        self.digest, self.parts, self.images = hashlib.blake2b(digest_size=16), 0, 0

    def along(self, parts: Iterable[Part]) -> Iterator[tuple[int, Part]]:
        """Yield parts with their numbers, and take note of them."""
        for part in parts:
            self.digest.update(part.identity.encode("utf-8", "backslashreplace"))
            self.images += part.length or 0
            self.parts += 1
            yield self.parts - 1, part


def predict_each(sources: Sources, settings: Settings) -> Iterator[tuple[str, Prediction]]:
    """Load a model, and return an iterator over the name of every image, or its number, and what the model says of it.

    Raises:
        ValueError: If there are no images.
    """
    predictor = Predictor.from_pretrained(settings.model, image_size=settings.image_size, **settings.options)
    rows = sources.rows()
    first = next(rows, None)
    if first is None:
        raise ValueError(f"There are no images in {', '.join(sources.words)}.")
    predictions = enumerate(predictor(chain([first], rows)))
    return ((prediction.source["path"] or str(number), prediction) for number, prediction in predictions)


def predict_into(
    output: Path, sources: Sources, settings: Settings, engine: str = "processes", restart: bool = False
) -> Summary | None:
    """Answer for all images of some sources, and write the table; the same call goes on with one that was stopped.

    Args:
        output: A .parquet or .jsonl file, replaced at the end; see `hf_vit.answers`. While it is made, `output.parts`
            lies beside it.
        engine: Of `ENGINES`.
        restart: Whether finished shards are removed before.

    Returns:
        What came of it; `None` on every process but the first.

    Raises:
        Interrupted: If SIGINT, SIGTERM or SIGHUP came.
        ValueError: If there is nothing to read or to ask; if what was begun was another thing; if the sources changed
            meanwhile.
        OSError: If nothing can be written, or another process of this run has ended.
    """
    answers = Answers(output, settings.has_features)
    with StopSignals(f"; what is finished lies in {answers.folder}."):
        # Without this, processes that a launcher started on CPUs would not see each other.
        is_cpu = torch.accelerator.current_accelerator(True) is None
        accelerator = Accelerator(cpu=is_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
        settings = replace(settings, precision=inference_precision(settings.precision))
        working = ENGINES[engine](settings, accelerator)
        batch_size = settings.batch_size or default_batch_size(working.device)
        shard_size = BATCHES_OF_A_SHARD * batch_size
        planned = Survey()
        for _ in planned.along(sources.parts(shard_size)):
            pass
        if not planned.parts:
            raise ValueError(f"There are no images in {', '.join(sources.words)}.")
        plan = {
            "sources or batch size": f"{planned.digest.hexdigest()} {batch_size}",
            "model": working.model,
            "precision": settings.precision,
            "device": working.device,
            "top-k": settings.top_k,
            "features": settings.has_features,
            "compile": settings.compile,
        }
        try:
            with lock_folder_together(accelerator, answers.folder):
                answers.check(plan, restart)
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    answers.begin(plan, restart)
                accelerator.wait_for_everyone()
                done, seen, images, broken = answers.finished(), Survey(), 0, 0
                accelerator.wait_for_everyone()  # nobody finishes anything before all have looked
                total = None if sources.stated is None else planned.images + sources.stated
                began = time.perf_counter()
                with _bar(accelerator, total, sum(shard.rows for shard in done)) as bar:
                    tasks = tasks_of(seen.along(sources.parts(shard_size)), done)
                    for of_batch, broken_of_batch in working.answer(tasks, answers, shard_size):
                        images, broken = images + of_batch, broken + broken_of_batch
                        bar.update(of_batch)
                        bar.set_postfix({"broken": broken}, refresh=False)
                pace = (images, time.perf_counter() - began)
                if seen.digest.digest() != planned.digest.digest():
                    raise ValueError("The sources changed while they were read: begin anew by --restart.")
                paces = gather_object([pace])  # which waits for all
                written = answers.join(planned.parts) if accelerator.is_main_process else None
                accelerator.wait_for_everyone()
        finally:
            with suppress(OSError):  # unless something is in it
                answers.folder.rmdir()
    if written is None:
        return None
    done_now, seconds = zip(*paces, strict=True)
    return Summary(written.images, written.broken, sum(done_now) / max(seconds))


def _bar(accelerator: Accelerator, total: int | None, done: int) -> Any:
    """Return a bar for the first of the processes, which have about the same to do; none where nobody looks."""
    number = accelerator.num_processes
    return tqdm(
        total=None if total is None else -(-total // number),
        initial=done // number,
        desc="predict" if number == 1 else f"predict, 1 of {number} processes",
        unit=" images",
        disable=None if accelerator.is_main_process else True,
    )
