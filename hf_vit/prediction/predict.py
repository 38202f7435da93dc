"""Predictions for all images of some sources: one by one, or as a table on disk that an interrupted run resumes."""

import hashlib
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.sources import Part, Sources
from ..inference.optimize import inference_precision
from ..inference.threads import default_batch_size
from ..system.progress import progress_bar, show
from .predictor import Prediction
from .shards import Settings, jobs_of

if TYPE_CHECKING:
    from accelerate import Accelerator

BATCHES_PER_SHARD = 16  # an interruption loses seconds of work, and processes end at about the same time
LONGEST_WAIT = timedelta(days=30)  # of one process for the others


@dataclass(frozen=True)
class Summary:
    """The number of rows of a table, the names of broken images, the throughput of this run, and the runtime."""

    images: int
    broken: list[str]
    images_per_second: float
    runtime: str = "torch"


def predict_each(sources: Sources, settings: Settings) -> Iterator[tuple[str, Prediction]]:
    """Load a model, and return an iterator over the name, or else the number, and the prediction of every image.

    Raises:
        ValueError: If there are no images.
    """
    predictor = settings.predictor()
    rows = sources.rows()
    first = next(rows, None)
    if first is None:
        raise no_images(sources)
    predictions = enumerate(predictor(chain([first], rows)))
    return ((prediction.source["path"] or str(number), prediction) for number, prediction in predictions)


def predict_to_file(
    output: Path,
    sources: Sources,
    settings: Settings,
    engine: str = "processes",
    restart: bool = False,
    half_features: bool = False,
) -> Summary | None:
    """Write the predictions for all images of some sources to a file; the same call resumes an interrupted run.

    Args:
        output: A .csv, .tsv, .jsonl or .parquet file, replaced at the end; see `hf_vit.prediction.table`. Finished
            shards are in `output.parts` until then.
        engine: `"processes"`, those of a launcher, or `"ray"`.
        restart: Whether to remove finished shards first.
        half_features: Whether a .parquet file has features in half precision.

    Returns:
        A summary; `None` on every process but the first.

    Raises:
        Interrupted: On SIGINT, SIGTERM or SIGHUP.
        ValueError: If there are no images or no classifier; if finished shards were made with other settings; if the
            sources changed during the run.
        OSError: If the table cannot be written, or another process of this run has ended.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, gather_object

    from ..system.locking import lock_folder_together
    from ..system.stopping import StopSignals
    from .processes import Processes
    from .ray import RayActors
    from .table import PredictionTable

    table = PredictionTable(output, settings.has_features, half_features)
    with StopSignals(f"; finished shards are in {table.folder}."):
        # Without `cpu`, processes that a launcher started on CPUs would not form a group.
        is_cpu = torch.accelerator.current_accelerator(True) is None
        accelerator = Accelerator(cpu=is_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
        settings = replace(settings, precision=inference_precision(settings.precision))
        workers = RayActors(settings, accelerator) if engine == "ray" else Processes(settings, accelerator)
        table.facts = {"model": settings.model, "digest": workers.model, **workers.facts}
        batch_size = settings.batch_size or default_batch_size(workers.device)
        shard_size = BATCHES_PER_SHARD * batch_size
        planned = Survey(sources.parts(shard_size))
        for _ in planned:
            pass
        if not planned.parts:
            raise no_images(sources)
        plan = {
            "sources or batch size": f"{planned.digest.hexdigest()} {batch_size}",
            "model": workers.model,
            "precision": settings.precision,
            "device": workers.device,
            "top-k": 5 if settings.top_k is None else settings.top_k,
            "chosen labels": "above their thresholds" if settings.top_k is None else "the most likely",
            "features": settings.has_features,
            "compile": settings.compile,
            "windows": settings.has_windows,
            **({} if workers.runtime == "torch" else {"runtime": workers.runtime}),
        }
        try:
            with lock_folder_together(accelerator, table.folder):
                table.check(plan, restart)
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    table.begin(plan, restart)
                accelerator.wait_for_everyone()
                finished, read = table.finished(), Survey(sources.parts(shard_size))
                accelerator.wait_for_everyone()  # no process finishes a shard before all have listed them
                total = None if sources.stated is None else planned.images + sources.stated
                images, broken, began = 0, 0, time.perf_counter()
                with _progress(accelerator, total, sum(shard.rows for shard in finished)) as bar:
                    for in_batch, broken_in_batch in workers.predict(jobs_of(read, finished, shard_size), table):
                        images, broken = images + in_batch, broken + broken_in_batch
                        bar.update(in_batch)
                        show(bar, {"broken": f"{broken:,}"})
                speed = (images, time.perf_counter() - began)
                if read.digest.digest() != planned.digest.digest():
                    raise ValueError("The sources changed during the run: start again with --restart.")
                speeds = gather_object([speed])  # waits for all processes
                written = table.join(planned.parts) if accelerator.is_main_process else None
                accelerator.wait_for_everyone()
        finally:
            with suppress(OSError):  # unless it holds files
                table.folder.rmdir()
    if written is None:
        return None
    predicted, seconds = zip(*speeds, strict=True)
    return Summary(*written, sum(predicted) / max(seconds), workers.runtime)


class Survey:
    """Number the parts of sources as they are read; compute a digest, and count them and their known images."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.rest, self.digest, self.parts, self.images = parts, hashlib.blake2b(digest_size=16), 0, 0

    def __iter__(self) -> Iterator[tuple[int, Part]]:
        for part in self.rest:
            self.digest.update(part.identity.encode("utf-8", "backslashreplace"))
            self.images += part.length or 0
            self.parts += 1
            yield self.parts - 1, part


def no_images(sources: Sources) -> ValueError:
    """Return the error for sources without images."""
    return ValueError(" ".join(filter(None, [f"Found no images in {', '.join(sources.words)}.", sources.skipped()])))


def _progress(accelerator: "Accelerator", total: int | None, done: int) -> Any:
    """Return a progress bar for the first process; all processes have about the same number of images."""
    number = accelerator.num_processes
    return progress_bar(
        None if total is None else -(-total // number),
        "images",
        initial=done // number,
        what="" if number == 1 else f"process 1 of {number}",
        disable=None if accelerator.is_main_process else True,
    )
