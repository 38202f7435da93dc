"""Predict shards in this process, or in all processes that a launcher started."""

import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

from ..inference.digest import digest_of
from ..system.machine import cores
from .predictor import Predictor
from .shards import Settings, ShardJob, predict_shards
from .table import PredictionTable

if TYPE_CHECKING:
    from accelerate import Accelerator


class Processes:
    """An engine whose workers are the processes of an accelerator."""

    def __init__(self, settings: Settings, accelerator: "Accelerator") -> None:
        model, processor = settings.load(is_to_file=True)
        self.model, self.device = digest_of(model, model.config, processor), accelerator.device.type
        self.facts = settings.facts_of_features(model, processor)
        workers = settings.workers or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        options = {**settings.options, "workers": workers}
        # The first process measures which runtime is the fastest; the others read its result.
        with accelerator.main_process_first() if settings.runtime == "auto" else nullcontext():
            self.predictor = Predictor.from_model(
                model, processor, device=accelerator.device, name=settings.model, **options
            )
        self.runtime = self.predictor.runtime
        self.process, self.number = accelerator.process_index, accelerator.num_processes

    def predict(self, jobs: Iterable[ShardJob], table: PredictionTable) -> Iterator[tuple[int, int]]:
        """Write this process's share of the shards; see `predict_shards`."""
        pieces = (piece for job in jobs for piece in job.divide(self.number))
        own = (piece for piece in pieces if (piece.number + piece.first) % self.number == self.process)
        return predict_shards(self.predictor, own, table)
