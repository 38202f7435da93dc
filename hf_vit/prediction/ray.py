"""`hf-vit predict --engine ray`: predict shards in Ray actors on a cluster.

Ray transfers jobs only; each actor reads the images and writes the shards. So sources and output must have the same
paths on every node.
"""

import logging
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..inference.digest import digest_of
from ..system.extras import need
from .shards import Settings, ShardJob, predict_shards
from .table import PredictionTable

if TYPE_CHECKING:
    from accelerate import Accelerator


class Division(NamedTuple):
    """How a cluster is divided: the device and the number of actors, and the number of reading threads of each."""

    device: str
    actors: int
    threads: int

    @classmethod
    def of(cls, nodes: Sequence[dict[str, float]], actors: int | None) -> "Division":
        """Divide the resources of nodes: an actor for each GPU, with its share of the cores; or one for each core."""
        with_gpus = [node for node in nodes if node.get("GPU")]
        if not with_gpus:
            return cls("cpu", actors or int(sum(node.get("CPU", 0) for node in nodes)), 1)
        threads = min(int(node.get("CPU", 1) // node["GPU"]) for node in with_gpus)
        return cls("cuda", actors or int(sum(node["GPU"] for node in with_gpus)), max(1, threads))


class Actor:
    """A `Predictor` on a worker, and its table; paths are relative to `folder`."""

    def __init__(self, settings: Settings, table: PredictionTable, division: Division, folder: str) -> None:
        os.chdir(folder)
        self.predictor = settings.predictor(device=division.device, workers=division.threads)
        self.table = table

    def write(self, job: ShardJob) -> tuple[int, int]:
        """Write the shards of a job; return the numbers of images and of broken images."""
        counts = zip((0, 0), *predict_shards(self.predictor, [job], self.table), strict=True)
        images, broken = map(sum, counts)
        return images, broken


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

        if not ray.is_initialized():
            handler = signal.getsignal(signal.SIGTERM)
            ray.init(**_local_cluster(settings.workers), log_to_driver=False, logging_level=logging.ERROR)
            signal.signal(signal.SIGTERM, handler)  # Ray's would end the process with its own exit code
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.division = Division.of(nodes, settings.workers)
        self.device, self.runtime = self.division.device, settings.runtime
        model, processor = settings.load(is_to_file=True)
        self.settings, self.model = settings, digest_of(model, model.config, processor)
        self.facts = settings.facts_of_features(model, processor)

    def predict(self, jobs: Iterable[ShardJob], table: PredictionTable) -> Iterator[tuple[int, int]]:
        """Have the actors write all shards; see `predict_shards`.

        Raises:
            ChildProcessError: If an actor was lost more often than it is started again.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError
        from ray.util import ActorPool

        pieces = [piece for job in jobs for piece in job.divide(self.division.actors)]
        # An actor that is lost starts again, and so does its job.
        kind = ray.remote(num_gpus=int(self.device == "cuda"), max_restarts=3, max_task_retries=3)(Actor)
        number = min(self.division.actors, len(pieces))
        actors: list[Any] = [kind.remote(self.settings, table, self.division, os.getcwd()) for _ in range(number)]
        try:
            if actors:
                yield from ActorPool(actors).map_unordered(lambda actor, piece: actor.write.remote(piece), pieces)
        except RayTaskError as error:
            raise error.cause from None  # without the traceback of the actor
        except RayActorError as error:
            raise ChildProcessError(
                "A Ray actor died, often because memory ran out. Finished shards are kept: run the command again."
            ) from error


def _local_cluster(workers: int | None) -> dict[str, Any]:
    """Return options for a cluster on this machine, closed to others; none if `RAY_ADDRESS` names a cluster."""
    if "RAY_ADDRESS" in os.environ:
        return {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return {"num_cpus": workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
