"""`hf-vit predict --engine ray`: predict shards in Ray Data actors on a cluster.

Ray transfers jobs only; each actor reads the images and writes the shards. So sources and output must have the same
paths on every node.
"""

import logging
import os
import pickle
import signal
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..system.extras import need
from .shards import Settings, ShardJob, model_digest, predict_shards
from .table import PredictionTable

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_BLOCKS = 1000  # of a Ray data set; each block goes to one actor


class Actor:
    """A `Predictor` on a worker, and its table; paths are relative to `folder`."""

    def __init__(self, settings: Settings, table: PredictionTable, device: str, folder: str) -> None:
        os.chdir(folder)
        self.predictor = settings.predictor(device=device, workers=1)
        self.table = table

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        jobs = [pickle.loads(job) for job in batch["job"]]
        images, broken = map(sum, zip((0, 0), *predict_shards(self.predictor, jobs, self.table), strict=True))
        return {"images": [images], "broken": [broken]}


class RayActors:
    """An engine whose workers are actors, one per GPU or else per CPU core, of the cluster at `RAY_ADDRESS`.

    Without that variable, Ray runs on this machine alone.

    Raises:
        ValueError: If Ray is not installed, or a launcher has started several processes.
    """

    def __init__(self, settings: Settings, accelerator: "Accelerator") -> None:
        if accelerator.num_processes > 1:
            raise ValueError("--engine ray starts its own workers: remove the launcher, or the option.")
        need("ray", "ray")
        import ray
        import ray.data

        if not ray.is_initialized():
            handler = signal.getsignal(signal.SIGTERM)
            ray.init(**_local_cluster(settings.workers), log_to_driver=False, logging_level=logging.ERROR)
            signal.signal(signal.SIGTERM, handler)  # Ray's would end the process with its own exit code
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        resources = ray.cluster_resources()
        self.device = "cuda" if resources.get("GPU") else "cpu"
        self.number = settings.workers or int(resources["GPU" if self.device == "cuda" else "CPU"])
        self.settings, self.model = settings, model_digest(*settings.load(is_to_file=True))

    def predict(self, jobs: Iterable[ShardJob], table: PredictionTable) -> Iterator[tuple[int, int]]:
        """Have the actors write all shards; see `predict_shards`."""
        import ray

        pieces = [{"job": pickle.dumps(piece)} for job in jobs for piece in job.divide(self.number)]
        if not pieces:
            return
        counts = ray.data.from_items(pieces, override_num_blocks=min(len(pieces), MAX_BLOCKS)).map_batches(
            Actor,
            fn_constructor_args=(self.settings, table, self.device, os.getcwd()),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(self.number, len(pieces))),
            num_gpus=int(self.device == "cuda"),
        )
        for row in counts.iter_rows():
            yield row["images"], row["broken"]


def _local_cluster(workers: int | None) -> dict[str, Any]:
    """Return options for a cluster on this machine, closed to others; none if `RAY_ADDRESS` names a cluster."""
    if "RAY_ADDRESS" in os.environ:
        return {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return {"num_cpus": workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
