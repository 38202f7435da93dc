"""`hf-vit predict --engine ray`: the shards of a table, answered for by actors of Ray Data on a cluster.

What travels through Ray is which images an actor takes; the images it reads itself, and the shards it writes itself.
So sources and output lie where every node sees them, under the same names.
"""

import logging
import os
import pickle
import signal
from collections.abc import Iterable, Iterator
from typing import Any

from accelerate import Accelerator

from ..checkpoints.models import load
from ..system.extras import need
from .predictor import Predictor
from .shards import Settings, Share, Task, answer, identity_of
from .table import Answers

MOST_BLOCKS = 1000  # of Ray's, each of which goes to one actor


class Actor:
    """A `Predictor` that lives on a worker, and the table that it writes to; names are relative to `folder`."""

    def __init__(self, settings: Settings, answers: Answers, shard_size: int, device: str, folder: str) -> None:
        os.chdir(folder)
        self.predictor = Predictor.from_pretrained(
            settings.model, image_size=settings.image_size, device=device, **{**settings.options, "workers": 1}
        )
        self.answers, self.shard_size = answers, shard_size

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        counts = [(0, 0)]
        for pickled in batch["work"]:
            task, share = pickle.loads(pickled)
            counts += answer(self.predictor, [task], self.answers, self.shard_size, share)
        images, broken = map(sum, zip(*counts, strict=True))
        return {"images": [images], "broken": [broken]}


class RayActors:
    """Actors on the cluster that `RAY_ADDRESS` names, or on one of this machine: one for each GPU, else each core.

    Raises:
        ValueError: If Ray is not installed, or a launcher has started several processes.
    """

    def __init__(self, settings: Settings, accelerator: Accelerator) -> None:
        if accelerator.num_processes > 1:
            raise ValueError("--engine ray starts its workers itself: leave out the launcher, or the engine.")
        need("ray", "ray")
        import ray
        import ray.data

        if not ray.is_initialized():
            heeded = signal.getsignal(signal.SIGTERM)
            ray.init(**_local(settings.workers), log_to_driver=False, logging_level=logging.ERROR)
            signal.signal(signal.SIGTERM, heeded)  # Ray would end with its own code
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        resources = ray.cluster_resources()
        self.device = "cuda" if resources.get("GPU") else "cpu"
        self.number = settings.workers or int(resources["GPU" if self.device == "cuda" else "CPU"])
        self.settings, self.model = settings, identity_of(*load(settings.model, settings.image_size))

    def answer(self, tasks: Iterable[Task], answers: Answers, shard_size: int) -> Iterator[tuple[int, int]]:
        import ray

        shares = [Share(turn, self.number) for turn in range(self.number)]
        work = [
            {"work": pickle.dumps((task, share))}
            for task in tasks
            for share in (shares if task.is_long(shard_size) else [Share()])
        ]
        if not work:
            return
        counted = ray.data.from_items(work, override_num_blocks=min(len(work), MOST_BLOCKS)).map_batches(
            Actor,
            fn_constructor_args=(self.settings, answers, shard_size, self.device, os.getcwd()),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(self.number, len(work))),
            num_gpus=int(self.device == "cuda"),
        )
        for row in counted.iter_rows():
            yield row["images"], row["broken"]


def _local(workers: int | None) -> dict[str, Any]:
    """Return the options of a cluster on this machine alone, reachable from nowhere else; none if one is named."""
    if "RAY_ADDRESS" in os.environ:
        return {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return {"num_cpus": workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
